"""The sampler's log-probs and entropies in place of a scoring pass, and what is known of them."""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trainer.statistics
import trainer.train
from tests.trainer.small import metrics, on_even, save_folder, settings  # noqa: F401
from tests.trainer.update_cases import ALONE, distance
from trainer.checkpoint.sharded import read_whole
from trainer.config import Algorithm, Config, Engine, Model, Sources, sources
from trainer.config.changes import differences, recorded
from trainer.engines.transformers import TransformersEngine
from trainer.log import read_rows
from trainer.metrics import mismatch_metrics
from trainer.policy import Policy
from trainer.train import train
from trainer.update import TIE, score, update

FP32, BF16 = Model(), Model(compute_dtype="bfloat16")
MIXES = [
    *(("sampler", "sampler"), ("recomputed", "old"), ("recomputed", "sampler")),
    *(("sampler", "old"), ("recomputed", "current"), ("sampler", "current")),
]


def configure(root, model, name="run", steps=3, learning_rate=1e-4, **algorithm):
    """Steps so small that AdamW, which divides by what may be rounding, moves little by it."""
    config = settings(root, model, name=name, steps=steps, checkpoint_every=steps)
    optimizer = replace(config.optimizer, learning_rate=learning_rate)
    algorithm = {"min_groups": 1, "max_rounds": 2, "compare_every": 0} | algorithm
    return replace(config, optimizer=optimizer, algorithm=Algorithm(**algorithm))


def weights(root, name="run", step=3):
    (found,) = (root / name / "checkpoints").glob(f"step-*{step}")
    return read_whole(found)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_folder(tmp_path_factory.mktemp("models") / "model", "qwen3", spread=0.2)


@pytest.fixture
def noisy(monkeypatch):
    """An engine whose log-probs are off, as if it computed in another precision."""
    sample = TransformersEngine.sample

    def off(*arguments, **options):
        g = torch.Generator().manual_seed(1)
        found = sample(*arguments, **options)
        noise = [0.3 * torch.randn(one.logprobs.shape, generator=g) for one in found]
        return [
            one._replace(logprobs=(one.logprobs + x).clamp_max(0))
            for one, x in zip(found, noise, strict=True)
        ]

    monkeypatch.setattr(TransformersEngine, "sample", off)


@pytest.mark.parametrize(
    ("model", "old", "entropy", "want"),
    [
        (FP32, "auto", "auto", ("sampler", "sampler")),
        (BF16, "auto", "auto", ("recomputed", "sampler")),
        # Files of runs that began when there was always a pass.
        *((m, "auto", "old", ("recomputed", "old")) for m in (FP32, BF16)),
        *((m, "auto", "current", ("recomputed", "current")) for m in (FP32, BF16)),
        (FP32, "auto", "sampler", ("sampler", "sampler")),
        (BF16, "auto", "sampler", ("recomputed", "sampler")),
        *((m, "sampler", "auto", ("sampler", "sampler")) for m in (FP32, BF16)),
        *((m, "recomputed", "auto", ("recomputed", "sampler")) for m in (FP32, BF16)),
        *((BF16, *mix, mix) for mix in MIXES),
        *((FP32, *mix, mix) for mix in MIXES),
    ],
)
def test_what_auto_stands_for(model, old, entropy, want):
    algorithm = Algorithm(old_logprob=old, entropy_source=entropy)
    assert sources(Config(model=model, algorithm=algorithm)) == Sources(*want)


def test_bf16_in_the_engine_is_bf16():
    config = Config(engine=Engine(kind="vllm", dtype="bfloat16"))
    assert sources(config) == Sources("recomputed", "sampler")


@pytest.mark.parametrize(
    ("mix", "passes", "selected"),
    [(mix, mix[0] == "recomputed" or mix[1] == "old", mix == MIXES[2]) for mix in MIXES],
)
def test_when_there_is_a_scoring_pass(mix, passes, selected):
    assert (Sources(*mix).score, Sources(*mix).score_selected) == (passes, selected)


def test_a_run_of_an_older_version_goes_on_with_its_pass():
    """Its file has no `old_logprob`, and the entropies that were the default then."""
    before = dataclasses.asdict(Config())
    before["algorithm"]["entropy_source"] = "old"
    for name in ("old_logprob", "compare_every"):
        del before["algorithm"][name]
    assert sources(recorded(before)) == Sources("recomputed", "old")
    changes = differences(before, recorded(before), Path())
    assert not changes
    told = [str(change) for change in differences(before, Config(), Path())]
    assert told == [
        "algorithm.entropy_source was old, now sampler",
        "algorithm.old_logprob was recomputed, now sampler",
    ]
    # A run with the current policy's entropies names them, and is as it was.
    before["algorithm"]["entropy_source"] = "current"
    now = Config(algorithm=Algorithm(entropy_source="current"))
    assert not differences(before, now, Path())
    named = replace(now, algorithm=replace(now.algorithm, old_logprob="recomputed"))
    assert not differences(before, named, Path())


def test_no_forward_of_the_model_beside_those_of_the_updates(model, tmp_path, monkeypatch):
    calls = {"all": 0, "updates": 0}
    forward, backward, step = Policy.forward, trainer.update._backward, trainer.train._step

    def count(name, function):
        def counted(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return counted

    def counted_step(run):
        before = dict(calls)
        found = step(run)
        forwards = {name: calls[name] - before[name] for name in calls}
        return found | {f"calls/{name}": number for name, number in forwards.items()}

    monkeypatch.setattr(Policy, "forward", count("all", forward))
    monkeypatch.setattr(trainer.update, "_backward", count("updates", backward))
    monkeypatch.setattr(trainer.train, "_step", counted_step)
    for name, source in (("sampler", "sampler"), ("scored", "recomputed")):
        train(configure(tmp_path, model, name, old_logprob=source, compare_every=2))
        for row in read_rows(tmp_path / name / "metrics.jsonl")[1:]:
            more = row["calls/all"] - row["calls/updates"]
            scored = source == "recomputed" or row["step"] == 2
            assert (more > 0) == (row["time/score"] > 0) == scored
            assert row["calls/updates"] > 0
            parts = sum(row[f"time/{part}"] for part in ("sample", "score", "update"))
            assert row["time/step"] == pytest.approx(parts, abs=1e-6)


@pytest.mark.parametrize("which", ["top", "bottom", "random"])
def test_all_sources_train_alike_in_fp32(model, tmp_path, which):
    """Tokens, losses and weights are those of the scoring pass, to rounding."""
    mixes = [mix for mix in MIXES if which == "top" or mix[1] != "current"]
    for old, entropy in mixes:
        options = {"old_logprob": old, "entropy_source": entropy, "which": which}
        train(configure(tmp_path, model, f"{old}-{entropy}", 2, fraction=0.4, **options))
    for mix in mixes:
        as_it_was = "recomputed-current" if mix[1] == "current" else "recomputed-old"
        start, want = (weights(tmp_path, as_it_was, step) for step in (0, 2))
        got = weights(tmp_path, "-".join(mix), 2)
        assert distance(got.values(), want.values()) < 1e-6
        assert distance(want.values(), start.values()) > 1e-4
        rows = [metrics(tmp_path / name)[1:] for name in ("-".join(mix), as_it_was)]
        for row, other in zip(*rows, strict=True):
            for name in ("loss", "grad_norm", "entropy/threshold", "entropy/mean", "updates"):
                assert row[name] == pytest.approx(other[name], rel=1e-4, abs=2e-6), name
            assert row["entropy/selected_fraction"] == other["entropy/selected_fraction"]
            assert 0 <= row["mismatch/kl"] < 1e-9
            assert row["mismatch/max_ratio"] == pytest.approx(1, abs=1e-4)
            assert row["mismatch/difference"] < 1e-5


def test_masks_of_both_are_equal_in_fp32(model, tmp_path):
    train(configure(tmp_path, model, compare_every=1, steps=4))
    for row in metrics(tmp_path / "run")[1:]:
        assert (row["mask/overlap"], row["mask/shared"]) == (1, 1)
        assert row["mask/entropy_difference"] < 1e-5
        assert row["mismatch/all_max_ratio"] == pytest.approx(1, abs=1e-4)
        assert 0 <= row["mismatch/all_kl"] < 1e-9


@pytest.mark.parametrize("mix", [MIXES[0], MIXES[2]])
def test_comparing_changes_nothing_in_the_run(model, tmp_path, mix):
    options = {"old_logprob": mix[0], "entropy_source": mix[1], "learning_rate": 1e-2}
    for every in (0, 2):
        train(configure(tmp_path, model, f"every-{every}", compare_every=every, **options))
    plain, compared = (metrics(tmp_path / f"every-{every}") for every in (0, 2))
    more = [other.keys() - row.keys() for row, other in zip(plain, compared, strict=True)]
    names = {"mask/overlap", "mask/shared", "mask/entropy_difference"}
    names |= {f"mismatch/all_{name}" for name in ("kl", "max_ratio", "difference")}
    assert more == [set(), set(), names, set()]
    got, want = weights(tmp_path, "every-2"), weights(tmp_path, "every-0")
    assert distance(got.values(), want.values()) < (1e-12 if mix == MIXES[0] else 1e-3)


def compared_by_hand(found, rollouts, fraction):
    """Sets of places, by sorting; the first tokens of a group tie."""
    kept = []
    for entropy in (rollouts.sampler_entropy_T.tolist(), found.entropy_T.tolist()):
        lowest = sorted(entropy, reverse=True)[math.ceil(fraction * len(entropy)) - 1]
        kept.append({t for t, value in enumerate(entropy) if value >= lowest * (1 - TIE)})
    return len(kept[0] & kept[1]) / len(kept[0] | kept[1]), len(kept[0] & kept[1]) / len(kept[0])


def test_other_entropies_select_other_tokens_and_it_is_told(model, tmp_path, monkeypatch):
    seen = []

    def watched(policy, rollouts, *rest):
        g = torch.Generator().manual_seed(0)
        found = score(policy, rollouts, *rest)
        noise = 0.2 * torch.rand(found.entropy_T.shape, generator=g)
        entropy_T = found.entropy_T + noise
        threshold = entropy_T.sort(descending=True).values[math.ceil(0.4 * len(entropy_T)) - 1]
        found = found._replace(entropy_T=entropy_T, threshold=threshold)
        seen.append(compared_by_hand(found, rollouts, 0.4))
        return found

    monkeypatch.setattr(trainer.statistics, "score", watched)
    train(configure(tmp_path, model, fraction=0.4, compare_every=1))
    rows = metrics(tmp_path / "run")[1:]
    for row, (overlap, shared) in zip(rows, seen, strict=True):
        assert row["mask/overlap"] == pytest.approx(overlap)
        assert row["mask/shared"] == pytest.approx(shared)
        assert 0.1 < row["mask/entropy_difference"] < 0.2001
        assert 0 < overlap < shared < 1


@pytest.mark.parametrize(("correction", "share"), [("none", None), ("tis", 1.2), ("mis", 1.2)])
def test_the_mismatch_is_that_of_the_first_mini_batch(
    model, tmp_path, monkeypatch, noisy, correction, share
):
    """Over its kept tokens in all micro-batches, before the weights have moved."""
    config = configure(
        tmp_path, model, steps=2, correction=correction, correction_cap=1.2, fraction=0.4
    )
    config = replace(config, optimizer=replace(config.optimizer, tokens_per_micro_batch=20))
    want = []

    def watched(policy, optimizer, batch, *rest):
        now = score(policy, batch.rollouts, config, ALONE).logprob_T
        kept = batch.selected_T
        want.append(mismatch_metrics(now[kept], batch.rollouts.sampler_logprob_T[kept], config))
        return update(policy, optimizer, batch, *rest)

    monkeypatch.setattr(trainer.train, "update", watched)
    train(config)
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    first = want[:: config.optimizer.mini_batches]
    assert len(want) == 2 * len(rows) == 4
    for row, by_hand in zip(rows, first, strict=True):
        got = {name: value for name, value in row.items() if name.startswith("mismatch/")}
        assert got == pytest.approx(by_hand, rel=1e-4, abs=1e-7)
        assert got["mismatch/max_ratio"] > 1.2
        assert ("mismatch/corrected" in got) == (share is not None)
        assert got.get("mismatch/corrected", 0.5) > 0


def test_of_a_pass_over_the_selected_tokens_only_theirs_count(model, tmp_path, noisy):
    options = {"old_logprob": "recomputed", "entropy_source": "sampler", "fraction": 0.4}
    for every in (0, 1):
        train(configure(tmp_path, model, f"every-{every}", 2, compare_every=every, **options))
    for row, other in zip(*(metrics(tmp_path / f"every-{i}")[1:] for i in (0, 1)), strict=True):
        assert row["mismatch/kl"] == pytest.approx(other["mismatch/kl"], rel=1e-3)
        assert row["mismatch/kl"] != pytest.approx(other["mismatch/all_kl"], rel=1e-2)


@pytest.mark.parametrize("name", ["logprobs", "entropies"])
def test_numbers_of_the_sampler_that_are_not_finite_skip_the_step(
    model, tmp_path, monkeypatch, name
):
    sample, calls = TransformersEngine.sample, []

    def broken(*arguments, **options):
        found = sample(*arguments, **options)
        if options["temperature"] > 0 and len(arguments[1]) == 16:
            calls.append(1)
            if len(calls) == 2:
                for one in found:
                    getattr(one, name)[-1] = torch.nan
        return found

    monkeypatch.setattr(TransformersEngine, "sample", broken)
    config = configure(tmp_path, model, max_rounds=1)
    train(config)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    reason = {"logprobs": "sampler_logprob", "entropies": "entropy"}[name]
    assert [row.get(f"skipped/nonfinite_{reason}", 0) for row in rows] == [0, 0, 1, 0]
    assert "loss" not in rows[2]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="compare_every must be at least 0; got -1"):
        Algorithm(compare_every=-1)
    with pytest.raises(ValueError, match=r'which=.bottom. needs entropies .*; got "current"'):
        Algorithm(which="bottom", entropy_source="current")
