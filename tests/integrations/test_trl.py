"""GRPOTrainer with our head gives TRL's own losses, and backward runs on the rows with gradient."""

import math
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytest.importorskip("trl", reason="the adapter is for TRL")

from peft import LoraConfig
from trl.trainer import utils
from trl.trainer.grpo_trainer import GRPOTrainer

from entropy_kernels.integrations import _patch, _trl_step
from entropy_kernels.integrations import trl as adapter
from entropy_kernels.integrations.trl import LogProbFunction, patch_trl
from tests.integrations.counted import Counted
from tests.integrations.small_grpo import LOSS_TYPES, build_trainer, difference, train
from tests.marks import sampled
from tests.processes import spawn
from tests.trainer.small import WORDS, build_model, save_folder
from tests.trainer.worlds import meeting, place

# Other projects' deprecations are theirs.
pytestmark = [sampled(0.2), pytest.mark.filterwarnings("ignore")]

D, V = 16, len(WORDS)
FIVE_DIGITS = 1e-5
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_dropout": 0.0}


@pytest.fixture(autouse=True)
def _undone():
    yield
    if adapter._in_force is not None:
        adapter._in_force[1].undo()


def assert_same(folder, *, digits=FIVE_DIGITS, model=lambda: None, **options):
    """A run of its own and one with the patch agree in each step."""
    want = train(folder, model=model(), **options)
    with patch_trl():
        got = train(folder, model=model(), **options)
    assert (difference(got, want) < digits).all(), f"{got}\n{want}"
    assert (want[:, 1] > 0).all()


@pytest.mark.parametrize("quantile", [1.0, 0.2])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_is_what_it_was(tmp_path, loss_type, quantile):
    assert_same(tmp_path, loss_type=loss_type, top_entropy_quantile=quantile)


VARIANTS = {
    "twenty-steps": {"max_steps": 20},
    "sequence-ratios": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "two-sided": {"delta": 1.5, "loss_type": "grpo"},
    "entropy-bonus": {"entropy_coef": 0.1},
    "adaptive-entropy": {"use_adaptive_entropy": True, "entropy_target": 3.0},
    "temperature": {"temperature": 0.7},
    "accumulation": {"gradient_accumulation_steps": 2, "num_iterations": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"peft": LoraConfig(**LORA)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_stands_around_the_head_stays(tmp_path, name):
    assert_same(tmp_path, **{"top_entropy_quantile": 0.2} | VARIANTS[name])


def test_a_kl_term_and_its_reference(tmp_path):
    """Both are read from a folder, as a reference model always is."""
    folder = save_folder(tmp_path / "model", "qwen3")
    assert_same(tmp_path, model=lambda: folder, beta=0.1, top_entropy_quantile=0.2)


def test_a_bf16_model_whose_head_is_cast_to_fp32(tmp_path):
    """Gradients enter the bf16 backbone and are rounded there: three digits."""
    assert_same(
        tmp_path,
        digits=1e-3,
        model=lambda: build_model("qwen3").bfloat16(),
        cast_lm_head_to_fp32=True,
        top_entropy_quantile=0.2,
        bf16=True,
    )


@pytest.mark.parametrize(("quantile", "peft"), [(1.0, False), (0.2, False), (0.2, True)])
def test_backward_runs_on_the_selected_rows(tmp_path, monkeypatch, quantile, peft):
    """Forward on the completions' tokens; three products a row, behind a frozen head two.

    Not on those of a zero advantage, which a response has whose reward is its group's mean.
    """
    kept, valid, active = [], [], []
    choose, compute = GRPOTrainer.get_high_entropy_mask, GRPOTrainer._compute_loss

    def chosen(trainer, entropies, mask, threshold):
        kept.append(choose(trainer, entropies, mask, threshold))
        return kept[-1]

    def counted(trainer, model, inputs):
        mask_BL = inputs["completion_mask"].bool()
        loss = compute(trainer, model, inputs)
        selected_BL = mask_BL if quantile == 1 else kept[-1]
        valid.append(int(mask_BL.sum()))
        active.append(int((selected_BL & (inputs["advantages"] != 0)[:, None]).sum()))
        return loss

    monkeypatch.setattr(GRPOTrainer, "get_high_entropy_mask", chosen)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", counted)
    counts = Counted(monkeypatch, D, V)
    lora = LoraConfig(**LORA) if peft else None
    with patch_trl():
        train(tmp_path, top_entropy_quantile=quantile, num_iterations=1, peft=lora)
    assert counts.forward == valid
    assert counts.backward == [(2 if peft else 3) * count for count in active]
    if quantile < 1:
        for keep, count in zip(kept, valid, strict=True):
            assert quantile * count <= int(keep.sum()) < quantile * count + 4


class StepByStep:
    """Entropies, mask and selection of every micro-batch, by optimizer step.

    By the trainer's threshold, or by one that is asked for besides.
    """

    def __init__(self, monkeypatch, besides=None, first=0):
        self.seen = {}
        choose = _trl_step.high_entropy_mask_of_step

        def chosen(trainer, entropies, mask, threshold, *rest):
            if besides is not None and trainer._step >= first:
                choose(trainer, entropies, mask, threshold, *rest)
                threshold = besides
            keep = choose(trainer, entropies, mask, threshold, *rest)
            if trainer.model.training:
                row = (entropies.detach()[mask.bool()], keep[mask.bool()])
                self.seen.setdefault(trainer.state.global_step, []).append(row)
            assert not (keep & ~mask.bool()).any()
            return keep

        monkeypatch.setattr(_trl_step, "high_entropy_mask_of_step", chosen)


def assert_exact(seen, quantile, micro_batches):
    """In each step the k tokens of highest entropy, k = ceil(quantile * n), and their equals.

    The first tokens of a group follow the same prompt and have the same entropy.
    """
    for rows in seen.values():
        assert len(rows) == micro_batches
        entropy = torch.cat([entropies for entropies, _ in rows])
        keep = torch.cat([kept for _, kept in rows])
        k = math.ceil(quantile * len(entropy))
        assert torch.equal(keep, entropy >= entropy.topk(k).values[-1])


@pytest.mark.parametrize("iterations", [1, 2])
def test_threshold_over_the_whole_step(tmp_path, monkeypatch, iterations):
    """Exact over all micro-batches, and not what each micro-batch by itself would select."""
    steps = StepByStep(monkeypatch)
    settings = {"gradient_accumulation_steps": 3, "num_iterations": iterations, "max_steps": 2}
    with patch_trl(scope="step"):
        train(tmp_path, top_entropy_quantile=0.2, **settings)
    assert len(steps.seen) == 2
    assert_exact(steps.seen, 0.2, micro_batches=3)
    micro_batches = [row for rows in steps.seen.values() for row in rows]
    alone = [entropy.topk(math.ceil(0.2 * len(entropy))).values[-1] for entropy, _ in micro_batches]
    same = [torch.equal(k, h >= tau) for (h, k), tau in zip(micro_batches, alone, strict=True)]
    assert not all(same)


@pytest.mark.parametrize("besides", [0.5, 0.1, 0.0])
def test_another_threshold_of_the_same_step(tmp_path, monkeypatch, besides):
    steps = StepByStep(monkeypatch, besides)
    settings = {"gradient_accumulation_steps": 3, "num_iterations": 1, "max_steps": 2}
    with patch_trl(scope="step"):
        train(tmp_path, top_entropy_quantile=0.2, **settings)
    assert len(steps.seen) == 2
    assert_exact(steps.seen, 1 - besides, micro_batches=3)


def test_another_threshold_asked_for_in_the_last_micro_batch_alone(tmp_path, monkeypatch):
    """The threshold of a step of three micro-batches is that of all three, too."""
    steps = StepByStep(monkeypatch, besides=0.5, first=2)
    settings = {"gradient_accumulation_steps": 3, "num_iterations": 1, "max_steps": 1}
    with patch_trl(scope="step"):
        train(tmp_path, top_entropy_quantile=0.2, **settings)
    (rows,) = steps.seen.values()
    entropy = torch.cat([entropies for entropies, _ in rows])
    for (entropies, keep), fraction in zip(rows, (0.2, 0.2, 0.5), strict=True):
        least = entropy.topk(math.ceil(fraction * len(entropy))).values[-1]
        assert torch.equal(keep, entropies >= least)


def test_threshold_of_one_micro_batch_scores_nothing_twice(tmp_path, monkeypatch):
    counts = Counted(monkeypatch, D, V)
    steps = StepByStep(monkeypatch)
    with patch_trl(scope="step"):
        trainer = build_trainer(tmp_path, top_entropy_quantile=0.2, num_iterations=1)
        trainer.train()
        assert len(counts.forward) == trainer.state.global_step == 3
        trainer.eval_dataset = trainer.train_dataset.select(range(2))
        assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert_exact(steps.seen, 0.2, micro_batches=1)


@pytest.mark.parametrize("settings", [{"steps_per_generation": 1}, {"steps_per_generation": 3}])
def test_a_step_not_generated_as_a_whole_is_refused(tmp_path, settings):
    with patch_trl(scope="step"), pytest.raises(ValueError, match="steps_per_generation"):
        train(
            tmp_path,
            top_entropy_quantile=0.2,
            gradient_accumulation_steps=2,
            num_iterations=1,
            **settings,
        )


def _sharded_gradients():
    """Gradients of a head under FSDP2, on tokens of this rank's own."""
    model = build_model("qwen3")
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    ids = torch.arange(14).view(2, 7) % 5 + 3 * dist.get_rank()
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    (out.loss - 0.1 * out.entropy.mean()).backward()
    return [p.grad.full_tensor() for p in model.parameters()]


def _rank(rank, folder, port):
    """Both runs on two processes, gradients of a sharded head, and the threshold over both."""
    os.environ |= place(rank, 2, port)
    torch.set_num_threads(1)
    options = {"top_entropy_quantile": 0.2, "ddp_backend": "gloo", "max_steps": 2}
    found = {"theirs": train(f"{folder}/{rank}", **options), "sharded": [_sharded_gradients()]}
    with patch_trl():
        found["ours"] = train(f"{folder}/{rank}", **options)
        found["sharded"].append(_sharded_gradients())
    with pytest.MonkeyPatch.context() as monkeypatch:
        steps = StepByStep(monkeypatch)
        with patch_trl(scope="step"):
            options |= {"gradient_accumulation_steps": 2, "num_iterations": 1}
            train(f"{folder}/{rank}", **options)
    torch.save(found | {"seen": steps.seen}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    store = meeting()
    spawn(_rank, args=(str(tmp_path), store.port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (difference(first["ours"], first["theirs"]) < FIVE_DIGITS).all(), first
    for theirs, ours in zip(*first["sharded"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
        assert ours.any()
    rows = {step: first["seen"][step] + second["seen"][step] for step in first["seen"]}
    assert len(rows) == 2
    assert_exact(rows, 0.2, micro_batches=4)


def test_patching_can_be_undone_and_repeated():
    before = utils._ChunkedLogProbFunction, utils._use_triton
    patch = patch_trl()
    assert isinstance(utils._ChunkedLogProbFunction, LogProbFunction)
    assert patch_trl() is patch
    patch.undo()
    patch.undo()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before
    select = GRPOTrainer.get_high_entropy_mask
    with patch_trl(scope="step") as patch:
        assert patch.active
        assert GRPOTrainer.get_high_entropy_mask is not select
        with pytest.raises(ValueError, match=r"patched with .*'scope': 'step'.* undo that before"):
            patch_trl()
        with pytest.raises(ValueError, match=r"undo that before .*'impl': 'torch'"):
            patch_trl(scope="step", impl="torch")
    assert not patch.active
    assert GRPOTrainer.get_high_entropy_mask is select
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


def test_unknown_scopes_and_versions_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="scope must be one of micro-batch, step; got 'epoch'"):
        patch_trl(scope="epoch")
    monkeypatch.setattr(_patch, "version", lambda name: "1.17.0")
    with pytest.raises(ImportError, match=r"trl>=1.16,<1.17.*got 1\.17\.0"):
        patch_trl()
