"""TRL's SFT, DPO, KTO and RLOO run on our head, and log what they log on TRL's."""

import math

import pytest
import torch

pytest.importorskip("trl", reason="the adapter is for TRL")

from peft import LoraConfig
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from entropy_kernels.integrations import trl as adapter
from entropy_kernels.integrations._patch import Patch
from entropy_kernels.integrations.trl import LogProbFunction, patch_trl
from tests.integrations.counted import Counted
from tests.integrations.small_trainers import (
    KINDS,
    build_trainer,
    digits,
    logged,
    rows,
    theirs_counted,
    train,
)
from tests.marks import sampled
from tests.trainer.small import WORDS, build_model, save_folder

# Other projects' deprecations are theirs.
pytestmark = [sampled(0.2), pytest.mark.filterwarnings("ignore")]

D, V = 16, len(WORDS)
FIVE_DIGITS = 1e-5
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_dropout": 0.0}
METRICS = {
    "sft": {"entropy", "mean_token_accuracy"},
    "dpo": {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "logps/chosen"},
    "kto": {"entropy", "logits/chosen", "logits/rejected", "rewards/margins", "kl"},
    "rloo": {"entropy", "kl", "clip_ratio/region_mean"},
}


@pytest.fixture(autouse=True)
def _undone():
    yield
    if adapter._in_force is not None:
        adapter._in_force[1].undo()


@pytest.fixture
def folder(tmp_path):
    """A model's folder, from which reference models are read."""
    return save_folder(tmp_path / "model", "qwen3")


def assert_same(ours, theirs):
    """Every number that is logged, to five digits of its column's largest or of .1.

    Rewards are differences of log-probs of about 20, times .1; RLOO's first loss is 0 but for
    rounding.
    """
    assert len(ours) == len(theirs) > 0
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for name in {name for row in theirs for name in row}:
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in b]
        scale = max(abs(b) for _, b in pairs)
        assert all(abs(a - b) <= FIVE_DIGITS * max(scale, 0.1) for a, b in pairs), (name, pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_log_what_they_logged(tmp_path, folder, kind, monkeypatch):
    """And run on our head alone, whose backward has rows."""
    options = {"model": folder, "max_steps": 20}
    if kind == "rloo":
        # At ten times the rate rounding grows in ratios of whole sequences.
        options |= {"beta": 0.1, "learning_rate": 1e-3}
    with theirs_counted() as calls:
        theirs = train(kind, tmp_path, **options)
    assert len(calls) >= 20
    counts = Counted(monkeypatch, D, V)
    with patch_trl(), theirs_counted() as more:
        ours = train(kind, tmp_path, **options)
    assert not more
    assert len(counts.forward) == len(calls)
    assert len(counts.backward) == 20
    # RLOO has none where all completions of a prompt have one reward.
    assert sum(counts.backward) > 0
    assert min(counts.backward) > 0 or kind == "rloo"
    assert_same(ours, theirs)
    found = set().union(*(row.keys() for row in ours))
    assert METRICS[kind] <= found
    assert len({row["loss"] for row in ours}) > 10
    for name in METRICS[kind]:
        assert any(row.get(name) for row in ours), name


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_backward_runs_on_the_rows_with_a_label(tmp_path, folder, kind, monkeypatch):
    """Three products a row; passes of references and of KTO's divergence have none."""
    labels = []
    trainer = build_trainer(kind, tmp_path, model=folder)
    compute = trainer.compute_loss

    def counted(model, inputs, *rest, **options):
        mask = inputs["labels"] != -100 if kind == "sft" else inputs["completion_mask"].bool()
        labels.append(int(mask[:, 1:].sum()))
        return compute(model, inputs, *rest, **options)

    monkeypatch.setattr(trainer, "compute_loss", counted)
    counts = Counted(monkeypatch, D, V)
    with patch_trl():
        trainer.train()
    assert counts.backward == [3 * count for count in labels]
    forwards = {"sft": 1, "dpo": 2, "kto": 4}[kind]
    assert len(counts.forward) == forwards * len(labels)
    assert sum(counts.forward) >= min(forwards, 2) * sum(labels)


VARIANTS = {
    "sft-text": ("sft", {"data": [{"text": digits(i, 2 + i % 7)} for i in range(32)]}),
    "sft-dft": ("sft", {"loss_type": "dft"}),
    "sft-accumulation": ("sft", {"gradient_accumulation_steps": 2}),
    "sft-checkpointing": ("sft", {"gradient_checkpointing": True}),
    "sft-padding-free": ("sft", {"padding_free": True}),
    "sft-packing": ("sft", {"packing": True, "max_length": 24}),
    "sft-label-smoothing": ("sft", {"label_smoothing_factor": 0.1}),
    "dpo-wpo": ("dpo", {"use_weighting": True}),
    "dpo-precomputed": ("dpo", {"precompute_ref_log_probs": True}),
    "dpo-two-losses": ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "dpo-lengths": ("dpo", {"ld_alpha": 0.5}),
    "dpo-moving-reference": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "kto-precomputed": ("kto", {"precompute_ref_log_probs": True}),
    "kto-apo": ("kto", {"loss_type": "apo_zero_unpaired"}),
    "rloo-temperature": ("rloo", {"temperature": 0.7, "normalize_advantages": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_stands_around_the_head_stays(tmp_path, folder, name):
    kind, options = VARIANTS[name]
    theirs = train(kind, tmp_path / "a", model=folder, **options)
    with patch_trl(), theirs_counted() as calls:
        ours = train(kind, tmp_path / "b", model=folder, **options)
    assert not calls
    assert_same(ours, theirs)


@pytest.mark.parametrize("family", ["gemma2", "granite", "phi"])
@pytest.mark.parametrize("kind", KINDS)
def test_softcaps_scales_and_biases(tmp_path, kind, family):
    """logits/* are means of the model's own logits."""
    folder = save_folder(tmp_path / "model", family)
    theirs = train(kind, tmp_path, model=folder)
    with patch_trl(), theirs_counted() as calls:
        assert_same(train(kind, tmp_path, model=folder), theirs)
    assert not calls


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_the_reference_without_them(tmp_path, folder, kind):
    def run():
        return train(kind, tmp_path, model=folder, peft_config=LoraConfig(**LORA))

    theirs = run()
    with patch_trl(), theirs_counted() as calls:
        assert_same(run(), theirs)
    assert not calls


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_evaluation_and_its_metrics(tmp_path, folder, kind):
    """compute_metrics gets the logits of the model's own forward, as on TRL's head."""
    seen = []

    def mean_logit(prediction):
        seen.append(prediction.predictions)
        first = prediction.predictions
        first = first[0] if isinstance(first, tuple) else first
        return {"mean_logit": float(first.mean())}

    def run(**options):
        trainer = build_trainer(
            kind, tmp_path, model=folder, max_steps=2, data=rows(kind, 8), **options
        )
        trainer.eval_dataset = trainer.train_dataset
        trainer.train()
        trainer.evaluate()
        return logged(trainer)

    for options in ({}, {"compute_metrics": mean_logit}):
        theirs = run(**options)
        with patch_trl(), theirs_counted() as calls:
            ours = run(**options)
        assert not calls
        assert_same(ours[:-1], theirs[:-1])
        assert_same(ours[-1:], theirs[-1:])
        assert math.isfinite(ours[-1]["eval_entropy"])
        assert ("eval_mean_logit" in ours[-1]) == bool(options)
    assert len(seen) == 2


class Exact:
    """TRL's function in fp64, on what it is given; and the worst errors of two others on that."""

    def __init__(self, judged=True):
        self.judged = judged
        self.errors = {"theirs": {}, "ours": {}}

    def apply(self, hidden, weight, bias, targets, *rest):
        cast = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype
        h, w = hidden.to(cast).double(), weight.to(cast).double()
        with torch.autocast("cpu", enabled=False):
            exact = ChunkedLogProbFunction.apply(h, w, None, targets, *rest)
        assert bias is None
        if self.judged:
            self._judge(exact, hidden, weight, targets, rest)
        return tuple(x.float() if x is not None and x.is_floating_point() else x for x in exact)

    @torch.no_grad()
    def _judge(self, exact, hidden, weight, targets, rest):
        functions = {"theirs": ChunkedLogProbFunction, "ours": LogProbFunction()}
        for name, function in functions.items():
            found = function.apply(hidden, weight, None, targets, *rest)
            for i, (x, truth) in enumerate(zip(found, exact, strict=True)):
                if truth is None:
                    assert x is None
                    continue
                worst = float((x.double() - truth.double()).abs().sum())
                self.errors[name][i] = self.errors[name].get(i, 0.0) + worst


def in_bf16(kind, tmp_path, function, **options):
    """Losses of 20 steps under bf16 autocast, with another model for reference where there is one.

    As those of one and the same model are, DPO's first loss would be log 2 whatever the head.
    """
    model, other = (build_model("qwen3", vocab_size=512, seed=seed) for seed in (0, 1))
    if kind != "sft":
        options["ref_model"] = other
    replaced = (utils, "_ChunkedLogProbFunction", function)
    # A trainer leaves its autocast on; the outer one turns it off again.
    with (
        torch.autocast("cpu", enabled=False),
        Patch(replaced, (utils, "_use_triton", adapter._drops_unlabelled)),
    ):
        found = train(kind, tmp_path, model=model, bf16=True, max_steps=20, **options)
    assert not torch.is_autocast_enabled("cpu")
    return torch.tensor([row["loss"] for row in found], dtype=torch.float64)


OUTPUTS = {"sft": {0, 1, 4}, "dpo": {0, 1, 3, 4}, "kto": {0, 1, 3}}


@pytest.mark.parametrize(
    "kind", ["sft", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dpo", "kto"))]
)
def test_in_16_bits_ours_is_nearer_to_fp64(tmp_path, kind):
    """On the same states: log-probs, entropies, mean logits, who is the first, and the losses."""
    judge = Exact()
    in_bf16(kind, tmp_path, judge, learning_rate=1e-3)
    assert judge.errors["ours"].keys() == OUTPUTS[kind]
    for output, worst in judge.errors["ours"].items():
        if output == 4:  # how many are wrong
            assert worst == 0 <= judge.errors["theirs"][4]
        else:
            assert worst < 0.01 * judge.errors["theirs"][output], output
    truth, theirs, ours = (
        in_bf16(kind, tmp_path, function, learning_rate=0.0)
        for function in (Exact(judged=False), ChunkedLogProbFunction, LogProbFunction())
    )
    assert len(truth.unique()) > 10
    assert (ours - truth).abs().max() < 0.01 * (theirs - truth).abs().max()


def test_first_of_equal_logits():
    """A tie with an earlier id is not the first, as for argmax."""
    h = torch.tensor([[1.0, 0.0]] * 3)
    w = torch.tensor([[0.0, 1.0], [2.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    arguments = (h, w, None, torch.tensor([1, 2, 3]), 1.0, 64, None, 1.0, ("log_probs", "is_top1"))
    for function in (ChunkedLogProbFunction, LogProbFunction()):
        assert function.apply(*arguments)[4].tolist() == [True, False, False]


def test_nothing_of_a_batch_without_a_label():
    model = build_model("qwen3")
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    utils.add_fused_lm_head(model, outputs=outputs)
    ids = torch.zeros(2, 5, dtype=torch.long)
    with patch_trl():
        out = model(input_ids=ids, labels=torch.full((2, 5), -100), fused_lm_head=True)
    for name in outputs:
        assert getattr(out, name).shape == (2, 4)
        assert not getattr(out, name).any()
    assert out.is_top1.dtype == torch.bool


def test_statistics_do_not_go_with_fields_of_a_rollout():
    function = LogProbFunction()
    function.told = object()
    h, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"with entropies alone; got outputs=.*is_top1"):
        function.apply(h, w, None, y, 1.0, 64, None, 1.0, ("log_probs", "is_top1"))
