"""The planner against numbers worked out by hand, and what must grow with what."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.trainer.small import save_folder
from trainer.plan.architectures import ARCHITECTURES, find_architecture, from_folder
from trainer.plan.devices import find_device
from trainer.plan.flops import head_units, step_flops, unit
from trainer.plan.job import Assumptions, Job
from trainer.plan.lengths import Lengths
from trainer.plan.memory import cache_bytes, eager_logits, engine_room, step_memory
from trainer.plan.plan import plan
from trainer.plan.timing import collective_seconds, slots
from trainer.presets import PRESETS

HEAD_14B = 151_936 * 5120
LAYER_14B = 2 * 5120 * (40 + 8) * 128 + 3 * 5120 * 17_408  # weights of a layer's matrices
TOKENS = 2048 + 20_480
RESPONSE = 0.37 * 20_480
H200 = 143_771 * 2**20


def changed(config, changes):
    """`config` with `changes` by dotted names, those of a part at once."""
    parts = {}
    for name, value in changes.items():
        part, field = name.split(".")
        parts.setdefault(part, {})[field] = value
    sections = {p: replace(getattr(config, p), **fields) for p, fields in parts.items()}
    return replace(config, **sections)


def job_of(preset, gpus=1, gpu="h200", changes=None, **options):
    """A job of `preset`; `changes` are to fields of its parts, "optimizer.mini_batches"."""
    config = changed(PRESETS[preset](), changes or {})
    architecture = find_architecture(config.model.path, preset)
    return Job(config, architecture, find_device(gpu, {}), gpus=gpus, **options)


BIG = job_of("qwen3-14b", 128)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
        ("llama-3.1-8b", 8_030_261_248),
        ("tiny", 343_392),
    ],
)
def test_parameters_are_those_of_the_model_itself(name, parameters):
    shape = ARCHITECTURES[name]
    llama = not shape.qk_norm
    config = (LlamaConfig if llama else Qwen3Config)(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = (LlamaForCausalLM if llama else Qwen3ForCausalLM)(config)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == shape.parameters == parameters


def test_architectures_are_found_by_name_and_by_folder(tmp_path):
    assert find_architecture("Qwen/Qwen3-14B-Base") is ARCHITECTURES["qwen3-14b"]
    assert find_architecture("runs/mine", "llama-8b") is ARCHITECTURES["llama-3.1-8b"]
    assert find_architecture("meta-llama/Llama-3.1-8B") is ARCHITECTURES["llama-3.1-8b"]
    folder = save_folder(tmp_path / "qwen3-8b", "qwen3")
    found = find_architecture(folder)
    assert (found.hidden, found.layers, found.tied, found.qk_norm) == (16, 2, True, True)
    assert not from_folder(tmp_path / "qwen3-8b").qkv_bias
    with pytest.raises(ValueError, match="no architecture is known for 'a' or 'b'; wanted a tran"):
        find_architecture("a", "b")


@pytest.mark.parametrize(
    ("family", "says"), [("gpt2", "no dense decoder"), ("gemma2", "Gemma2ForCausalLM of .* has")]
)
def test_models_of_another_kind_are_refused(family, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        from_folder(tmp_path / save_folder(tmp_path / family, family))


def test_memory_of_14b_on_128_gpus():
    memory = step_memory(BIG)
    share = 4 * 14_768_307_200 / 128
    last, end = memory["last layer"], memory["end"]
    assert last["weights"] == last["gradients"] == share
    assert last["AdamW's moments"] == 2 * share
    assert last["embedding and head"] == 2 * (2 * HEAD_14B + 5120)
    assert last["activations kept"] == TOKENS * 40 * 2 * 5120
    assert last["gradient of the head"] == 2 * HEAD_14B
    assert last["gathered layers"] == 2 * 2 * (LAYER_14B + 2 * 5120 + 2 * 128)
    assert memory["first layer"]["gathered layers"] == last["gathered layers"] / 2
    assert memory["first layer"]["activations kept"] == TOKENS * 2 * 5120
    assert end["embedding's gradient"] == (2 + 4) * (2 * HEAD_14B + 5120)
    assert sum(memory["AdamW"].values()) == 4 * share + memory["AdamW"]["reserved"]
    assert cache_bytes(BIG) == 2 * 40 * 8 * 128 * 2
    assert eager_logits(BIG) == 12 * TOKENS * 151_936
    # Flash attention, bf16, a token: two norms, q's and k's, q k v and the result, the MLP.
    saved = 16 * 5120 + 6 * (5120 + 1024) + 2 * (2 * 5120 + 2 * 1024) + 8 * 17_408
    assert last["activations recomputed"] == TOKENS * saved
    # Its hidden states, their gradient and the last norm's; dz of 4,419 rows needs less than the
    # forward's workspace.
    assert memory["head"]["head's workspace"] == 10 * TOKENS * 5120 + (1 << 29)
    # With all rows but those of prompts, of 150 tokens to 7,577.6, dz has 5,120 columns.
    everything = step_memory(job_of("qwen3-14b-dapo", 128))["head"]["head's workspace"]
    rows = math.ceil(TOKENS * 7577.6 / 7727.6)
    assert everything == 10 * TOKENS * 5120 + rows * (10 * 5120 + 2 * 5120)


def test_a_cpu_stores_logits_by_panels():
    """As many as the head stores; the rows of prompts are not among them."""
    from benchmarks.plan_check import CASES
    from entropy_kernels._native import stored_shape

    job = CASES["vocabulary 151,936"].job()
    assert job.selected_rows == math.ceil(0.2 * 8 * 96)
    rows, columns = stored_shape(job.selected_rows, 151_936)
    assert job.stored_logits == 4 * rows * columns


def test_vllm_takes_its_share_of_a_gpu():
    memory = step_memory(BIG)
    assert memory["sample"]["engine's weights"] == 2 * 14_768_307_200
    assert memory["sample"]["cache"] == pytest.approx(0.8 * H200 - 2 * 14_768_307_200)
    given = job_of("qwen3-14b", 128, changes={"engine.kv_cache_bytes": 10**10})
    assert step_memory(given)["sample"]["cache"] == 1e10
    # A sequence of 22,528 tokens takes 3.7 GB.
    assert engine_room(BIG) == pytest.approx(memory["sample"]["cache"] - TOKENS * 163_840)
    assert plan(BIG).engine_starts
    small = job_of("qwen3-32b", 128, "h100")
    assert engine_room(small) < 0
    assert not plan(small).engine_starts
    assert not plan(small).fits
    assert plan(small).peak[1] < small.device.memory


def test_engines_on_gpus_of_their_own():
    apart = {"engine.placement": "beside", "engine.tensor_parallel": 4}
    apart["engine.devices"] = (1, 2, 3, 4)
    job = job_of("qwen3-32b", changes=apart)
    assert job.all_gpus == 5
    memory = step_memory(job)
    assert "cache" not in memory["sample"]
    assert memory["engine"]["engine's weights"] == 2 * 32_762_123_264 / 4
    assert memory["engine"]["cache"] == pytest.approx(0.8 * H200 - 2 * 32_762_123_264 / 4)


def test_the_trainers_own_engine():
    own = {"engine.kind": "transformers", "rollout.batch_size": 64}
    memory = step_memory(job_of("qwen3-1.7b", changes=own))
    # A copy in bf16, which stays where it is.
    assert all(memory[name]["engine's weights"] == 2 * 1_720_574_976 for name in memory)
    assert memory["sample"]["cache"] == 64 * (150 + 4096) * 2 * 28 * 8 * 128 * 2
    alone = step_memory(job_of("qwen3-1.7b", changes=own | {"model.compute_dtype": None}))
    assert not any("engine's weights" in parts for parts in alone.values())
    assert "embedding and head" not in alone["head"]
    assert alone["sample"]["cache"] == 2 * memory["sample"]["cache"]  # in fp32


def test_one_micro_batch_makes_its_gradients_while_it_frees_activations():
    plain = {"model.compute_dtype": None}
    many = job_of("qwen3-1.7b", changes=plain)
    one = job_of("qwen3-1.7b", changes=plain | {"optimizer.tokens_per_micro_batch": 1_000_000})
    assert (many.micro_batches, one.micro_batches) == (27, 1)
    assert "gradients" in step_memory(many)["last layer"]
    # The embedding's, which is the head's too, is there from the start.
    assert step_memory(one)["last layer"]["gradients"] == 4 * 151_936 * 2048
    assert "gradient of the head" not in step_memory(one)["last layer"]


def test_flops_of_14b():
    flops, tokens = step_flops(BIG), 8192 * (150 + RESPONSE)
    products = 2 * 40 * LAYER_14B * tokens
    # A long sequence has more pairs of positions: the mean of squares, not the square of the mean.
    squared = Lengths(RESPONSE, 20_480).second_moment
    attention = 4 * 40 * 40 * 128 * 8192 * (150**2 + 2 * 150 * RESPONSE + squared) / 2
    assert flops.forward == flops.score_backbone == pytest.approx(products + attention)
    assert flops.backward == pytest.approx(2 * products + 2.5 * attention)
    assert flops.recompute == pytest.approx(flops.forward - 2 * 40 * 5120 * 17_408 * tokens)
    assert flops.score_head == unit(BIG) == pytest.approx(2 * 8192 * RESPONSE * HEAD_14B)
    assert flops.update_head == pytest.approx(1.6 * unit(BIG))
    # Two rounds, as half of the groups are useful.
    sampled = 2 * 8192 * RESPONSE
    pairs = 2 * 8192 * (150 * RESPONSE + squared / 2)
    assert flops.decode == pytest.approx(
        sampled * (2 * 40 * LAYER_14B + 2 * HEAD_14B) + pairs * 4 * 40 * 40 * 128
    )
    assert flops.prefill == pytest.approx(
        2 * 512 * (150 * (2 * 40 * LAYER_14B + 4 * 40 * 40 * 128 * 75) + 2 * HEAD_14B)
    )


@pytest.mark.parametrize(
    ("preset", "changes", "units"),
    [
        ("qwen3-14b", {}, 1 + 3 * 0.2),
        ("qwen3-14b-dapo", {}, 4.0),
        ("qwen3-14b", {"algorithm.entropy_source": "old"}, 4 * 0.2),  # 2.7 GB of logits: no room
        ("qwen3-1.7b", {}, 3 * 0.2),  # 1,639 rows: 996 MB
        ("qwen3-1.7b", {"optimizer.tokens_per_micro_batch": 16_384}, 4 * 0.2),
        ("qwen3-1.7b", {"algorithm.fraction": 1.0}, 4.0),
    ],
)
def test_units_of_the_head(preset, changes, units):
    assert head_units(job_of(preset, changes=changes)) == pytest.approx(units)


@pytest.mark.parametrize(
    ("old", "entropies", "every", "passes", "units"),
    [
        ("recomputed", "old", 20, 1, 1),
        ("recomputed", "sampler", 0, 1, 0.2),  # the head on the selected tokens alone
        ("recomputed", "sampler", 4, 1, 0.2 * 3 / 4 + 1 / 4),
        ("sampler", "sampler", 20, 1 / 20, 1 / 20),  # comparisons alone
        ("sampler", "sampler", 0, 0, 0),
    ],
)
def test_a_step_has_the_scoring_passes_that_its_sources_need(old, entropies, every, passes, units):
    names = {"old_logprob": old, "entropy_source": entropies, "compare_every": every}
    job = job_of("qwen3-1.7b", 2, changes={f"algorithm.{k}": v for k, v in names.items()})
    flops = step_flops(job)
    assert flops.score_backbone == pytest.approx(passes * flops.forward)
    assert flops.score_head == pytest.approx(units * unit(job))
    assert flops.update_head == step_flops(job_of("qwen3-1.7b", 2)).update_head
    slow = replace(job, device=replace(job.device, link=1e6))
    gather = slow.micro_batches * 2 * collective_seconds(slow)[0]
    assert plan(slow).seconds.score == pytest.approx(passes * gather)


def test_the_heads_share_counts_scoring_and_update():
    found = plan(BIG)
    layers = found.flops.score_backbone + found.flops.update - found.flops.update_head
    for units in (0.6, 1.6, 3):
        head = (1 + units) * unit(BIG)
        assert found.head_share(units) == pytest.approx(head / (head + layers))


def test_collectives_of_14b():
    """A node's 8 ports of 50 GB/s are slower than a GPU's links of 450; 70% of it is reached."""
    moved = 127 / 128 * 14_768_307_200
    gather, reduce = collective_seconds(BIG)
    assert gather == pytest.approx(2 * moved / (0.7 * 400e9))
    assert reduce == pytest.approx(4 * moved / (0.7 * 400e9))
    within = collective_seconds(job_of("qwen3-14b", 8))
    assert within[0] == pytest.approx(2 * 7 / 8 * 14_768_307_200 / (0.7 * 450e9))
    assert collective_seconds(job_of("qwen3-14b")) == (0.0, 0.0)


def test_seconds_of_14b():
    found = plan(BIG)
    rate = 128 * 0.4 * 989e12
    assert slots(BIG, found.memory) == 64  # all of an engine's own
    lengths = Lengths(RESPONSE, 20_480)
    longest = lengths.of(8192)[-1]  # of all engines: they wait for it
    context = 150 * RESPONSE + lengths.second_moment / 2
    read = longest * 2 * 14_768_307_200 + 64 * context * 163_840
    assert found.seconds.decode == pytest.approx(2 * read / (0.6 * 4.8e12))
    assert found.seconds.score == pytest.approx(found.flops.score / rate)
    assert found.seconds.update == pytest.approx(found.flops.update / rate)
    assert found.seconds.step == pytest.approx(sum(found.seconds))


def test_a_slow_network_is_what_an_update_waits_for():
    slow = replace(BIG, device=replace(BIG.device, network=1e6))
    gather, reduce = collective_seconds(slow)
    count = BIG.micro_batches * 16
    assert plan(slow).seconds.update == pytest.approx(count * (2 * gather + reduce))


def test_what_grows_with_what():
    def train(job):
        return max(
            sum(parts.values()) for name, parts in step_memory(job).items() if name[0] != "s"
        )

    sizes = [train(job_of("qwen3-14b", gpus)) for gpus in (8, 16, 64, 128)]
    assert sizes == sorted(sizes, reverse=True)
    times = [plan(job_of("qwen3-14b", gpus)).seconds.step for gpus in (8, 16, 64, 128)]
    assert times == sorted(times, reverse=True)
    tokens = "optimizer.tokens_per_micro_batch"
    sizes = [train(job_of("qwen3-14b", 128, changes={tokens: t})) for t in (1, 32_768, 65_536)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]
    gpus = [plan(job_of("qwen3-8b", 16, gpu)).seconds.step for gpu in ("a100", "h100", "b200")]
    assert gpus == sorted(gpus, reverse=True)
    for kept in (False, True):
        job = job_of("qwen3-1.7b", changes={"model.gradient_checkpointing": kept})
        assert ("activations recomputed" in step_memory(job)["last layer"]) == kept
    everything = job_of("qwen3-1.7b", changes={"model.gradient_checkpointing": False})
    assert train(everything) > train(job_of("qwen3-1.7b"))
    assert step_flops(everything).recompute == 0


@pytest.mark.parametrize(
    ("preset", "options", "says"),
    [
        ("qwen3-14b", {"gpus": 0}, "gpus must be at least 1; got 0"),
        ("qwen3-14b", {"gpus": 12}, "multiple of gpus_per_node, 8, .* got 12"),
        ("qwen3-14b", {"gpus_per_node": -1}, "gpus_per_node must be at least 1; got -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(preset, options, says):
    with pytest.raises(ValueError, match=says):
        job_of(preset, **options)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mfu", 0), ("mfu", 1.5), ("useful", -1), ("prompt", 0), ("reserved", -1)],
)
def test_assumptions_that_cannot_hold_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} (must|at least)"):
        Assumptions(**{field: value})
