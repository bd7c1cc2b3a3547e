"""Whether a run fits and what would make it, what it comes to, and the names of GPUs."""

from dataclasses import replace

import pytest

from tests.trainer.test_plan import BIG, RESPONSE, job_of
from trainer.plan.devices import GPUS, find_device
from trainer.plan.job import Assumptions
from trainer.plan.plan import plan
from trainer.plan.timing import sampling_seconds
from trainer.plan.totals import evaluation_draws, evaluation_seconds
from trainer.presets import PRESETS


def test_fits_leaves_the_margin_and_tight_does_not():
    found = plan(job_of("qwen3-14b", 8))
    assert (found.fits, found.possible) == (False, True)
    assert found.seconds is not None
    assert found.remedy == "--engine.memory-utilization 0.7"
    changed = {"engine.memory_utilization": 0.7}
    assert plan(job_of("qwen3-14b", 8, changes=changed)).fits
    assert plan(job_of("qwen3-14b", 8, assumptions=Assumptions(margin=0.02))).fits


@pytest.mark.parametrize(
    ("preset", "gpus", "gpu", "changes", "remedy"),
    [
        (
            "qwen3-1.7b",
            1,
            "h100",
            {"optimizer.tokens_per_micro_batch": 200_000},
            "--optimizer.tokens-per-micro-batch 100000",
        ),
        (
            "qwen3-14b",
            8,
            "h200",
            {"model.gradient_checkpointing": False, "engine.memory_utilization": 0.6},
            "--model.gradient-checkpointing",
        ),
        ("qwen3-32b", 8, "h200", {}, "--engine.memory-utilization 0.5"),
        ("qwen3-1.7b", 1, "4090", {}, "--gpus 4"),
        (
            "qwen3-32b",
            128,
            "h100",
            {},
            "--gpus 32 --gpus-per-node 2 --engine.placement beside --engine.devices 2 3 4 5 "
            "--engine.tensor-parallel 2",
        ),
        ("qwen3-14b", 8, "4090", {}, None),
    ],
)
def test_a_remedy_is_the_first_change_that_fits(preset, gpus, gpu, changes, remedy):
    assert plan(job_of(preset, gpus, gpu, changes=changes)).remedy == remedy


def test_totals_by_hand():
    found = plan(BIG)
    totals = found.totals
    assert (totals.steps, totals.updates, totals.evaluations) == (100, 1600, 21)
    draw = sum(sampling_seconds(BIG, found.memory, 64, 64))
    assert totals.evaluation_seconds == pytest.approx(2 * draw)
    seconds = 100 * found.seconds.step + 21 * 2 * draw
    assert totals.hours == pytest.approx(seconds / 3600)
    assert totals.gpu_hours == pytest.approx(128 * seconds / 3600)
    assert totals.trained_tokens == pytest.approx(100 * 8192 * RESPONSE)
    assert totals.sampled_tokens == 2 * totals.trained_tokens
    assert totals.checkpoint_bytes == 12 * 14_768_307_200
    odd = replace(BIG.config, steps=7, checkpoint_every=5, keep_checkpoints=9, keep_every=0)
    totals = plan(replace(BIG, config=odd)).totals
    assert totals.evaluations == 3  # before training, at 5, and at 7
    # 0, without moments, 5, 7 and one more while it is written.
    assert totals.disk_bytes == (3 + 1 / 3) * totals.checkpoint_bytes


@pytest.mark.parametrize(("every", "kept"), [(0, 2), (20, 6 + 1 / 3), (50, 3 + 1 / 3)])
def test_checkpoints_that_stay_are_counted(every, kept):
    """The last two, 95 and 100, and of 20 also 0, 20, ... 80; one more while it is written. That of
    0 has no moments."""
    totals = plan(replace(BIG, config=replace(BIG.config, keep_every=every))).totals
    assert totals.disk_bytes == pytest.approx((kept + 1) * totals.checkpoint_bytes)


def test_an_evaluation_on_named_sets_takes_longer():
    config = PRESETS["qwen3-14b"]()
    sets = replace(config.eval, data=("aime24", "aime25=local.jsonl"), samples=4)
    job = replace(BIG, config=replace(config, eval=sets))
    assert evaluation_draws(job) == [(64, 4), (64, 1), (30, 4), (30, 1), (30, 4), (30, 1)]
    memory = plan(BIG).memory
    assert evaluation_seconds(job, memory) > 2 * evaluation_seconds(BIG, memory)
    short = replace(job, config=replace(config, eval=replace(sets, max_new_tokens=512)))
    assert evaluation_seconds(short, memory) < 0.1 * evaluation_seconds(job, memory)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("H200", "h200"),
        ("NVIDIA H200", "h200"),
        ("h200-sxm", "h200"),
        ("H200 SXM5 141GB", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("A100", "a100-80gb"),
        ("A100-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("a100_40g", "a100-40gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("rtx4090", "4090"),
        ("AMD Instinct MI300X OAM", "mi300x"),
    ],
)
def test_gpus_are_known_in_any_spelling(spelling, name):
    assert find_device(spelling, {}) is GPUS[name]


@pytest.mark.parametrize("name", ["H100 PCIe", "H200 NVL", "A100 PCIe 40GB", "L40", "H20", ""])
def test_other_cards_are_not_taken_for_these(name):
    with pytest.raises(ValueError, match=f"no GPU '{name}' is known; there are a100-40gb"):
        find_device(name, {})


def test_an_unknown_gpu_is_known_by_its_numbers():
    own = {"memory": 96e9, "flops": 500e12, "bandwidth": 3e12}
    found = find_device("H100 PCIe", own)
    assert (found.memory, found.flops, found.bandwidth) == (96e9, 500e12, 3e12)
    with pytest.raises(ValueError, match="is known"):
        find_device("H100 PCIe", {"memory": 96e9})


def test_memory_is_that_of_the_card_and_not_of_its_name():
    """143,771 MiB, by nvidia-smi on an H200."""
    assert GPUS["h200"].memory == pytest.approx(150.75e9, rel=1e-4)
    assert GPUS["h100"].memory == pytest.approx(85.52e9, rel=1e-4)
