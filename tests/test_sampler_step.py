"""The steps with what a sampler knows: sets, parts, products and tables."""

import json
from functools import partial

import pytest
import torch

from benchmarks import bench_sampler_step as suite
from benchmarks import peers, runner, sampler_tables
from benchmarks.sampler_step import (
    PARTS,
    Parts,
    Shape,
    eager,
    make_sets,
    random_bench,
    set_sizes,
)
from benchmarks.sources import ROOT
from benchmarks.step_rounds import error
from benchmarks.tables import named


def test_half_of_the_sets_are_of_one_id_and_the_mean_is_8():
    for tokens in (240, 1920):
        sizes = set_sizes(tokens)
        assert len(sizes) == tokens
        assert (sizes == 1).double().mean() == 0.5
        assert sizes[tokens // 2 :].min() >= 2
        assert sizes.double().mean() == pytest.approx(8, rel=0.02)
        assert sizes.double().quantile(0.99) == pytest.approx(80, rel=0.1)


def test_sets_have_their_targets_and_grow_with_the_entropy():
    entropy, target = torch.rand(400), torch.randint(100_000, (400,))
    kept = make_sets(entropy, target, 100_000)
    kept.check_values(target, torch.ones(400, dtype=torch.bool), 100_000)
    assert torch.equal(kept.sizes[entropy.argsort()], set_sizes(400))


@pytest.mark.parametrize(
    "shape",
    [
        suite.QUICK[0],
        # Wide enough for stored logits: three products of the selected rows, not four.
        Shape("gemma3", 2, 3, 40, 2, 640, 768),
    ],
    ids=lambda shape: shape.model,
)
def test_every_step_finds_the_same_gradient_and_its_products_are_the_formulas(shape):
    bench = random_bench(shape)
    truth = {over: bench.run(partial(eager, truncated=over), Parts()) for over in (False, True)}
    assert truth[True]["grad_norm"] != pytest.approx(truth[False]["grad_norm"], rel=1e-2)
    found = {}
    for name, (_, step) in installed().items():
        found[name] = suite.counted(bench, name, step)
        error(found[name]["sums"], truth[name == "ours-support"])
        assert found[name]["head_products"] == found[name]["formula_products"], name
    layers = sum(x.numel() for x in bench.policy.model.model.layers.parameters())
    read = shape.sequences * (shape.prompt + shape.response - 1)
    for entry in found.values():
        assert entry["products"]["forward"] == pytest.approx(layers * read, rel=0.02)
        # Checkpointed: forward again, perhaps without a layer's last product, and two gradients.
        assert 2.5 < entry["products"]["backward"] / entry["products"]["forward"] <= 3
    units = {name: entry["units"] for name, entry in found.items()}
    each = 3 if shape.hidden > 512 else 4
    rows = shape.tokens // 5
    assert (units["eager"], units["lce-known"]) == (4, 3)
    assert units.get("trl", 5) == 5
    assert units["ours"] == pytest.approx(1 + each * rows / shape.tokens, abs=0.1)
    assert units["ours-known"] == pytest.approx(units["ours"] - 1)
    assert units["ours-support"] < 0.2 * units["ours-known"]


def installed() -> dict[str, tuple[str, suite.Step]]:
    return {name: x for name, x in suite.CONTESTANTS.items() if not peers.why_not(name)}


def test_parts_are_those_of_the_step():
    shape, _ = suite.QUICK
    bench = random_bench(shape)
    for name, (_, step) in installed().items():
        parts = Parts()
        bench.run(step, parts)
        assert set(parts.seconds) <= set(PARTS)
        assert ("scoring head" in parts.seconds) == (name in ("eager", "trl", "ours")), name
        assert {"forward", "head", "backward", "optimizer"} <= set(parts.seconds), name
        assert all(seconds >= 0 for seconds in parts.seconds.values())


def test_a_wrong_step_is_refused():
    error({"loss": 1.00001}, {"loss": 1.0})
    with pytest.raises(runner.WrongResultError, match=r"1\.01"):
        error({"loss": 1.01}, {"loss": 1.0})
    with pytest.raises(runner.WrongResultError):
        error({"loss": float("nan")}, {"loss": 1.0})
    error({"loss": 0.0}, {"loss": 6e-9})
    with pytest.raises(runner.WrongResultError):
        error({"loss": 0.0}, {"loss": 2e-6})


def test_the_suite_writes_what_its_tables_read(tmp_path):
    shape, _ = suite.QUICK
    entries = suite.measure(shape, 1, tmp_path, log=lambda line: None)
    assert {entry["name"] for entry in entries} == set(suite.CONTESTANTS)
    assert {entry["name"] for entry in entries if "wall_s" in entry} == set(installed())
    (path,) = tmp_path.glob("sampler_step-cpu-float32-qwen3x2x4x60x2x32x512-*.json")
    assert path.stat().st_size


def test_the_tables_have_shares_of_the_step():
    def entry(name, wall, head, units):
        seconds = {key: [0.0, 0.0] for key in PARTS} | {"head": [head] * 2, "scoring": [1.0, 1.0]}
        return {
            "name": name,
            "label": name,
            "wall_s": [wall] * 2,
            "parts_s": seconds,
            "part_peak_bytes": {"head": 3_000_000},
            "units": units,
            "formula_units": units,
            "products": {
                "scoring": 2,
                "scoring head": 0,
                "forward": 4,
                "backward": 12,
                "head": 2,
                "optimizer": 0,
            },
        }

    sets = {"mean": 8.0, "singletons": 0.5, "p99": 80.0, "largest": 300.0, "selected_mean": 30.0}
    run = {
        "shape": suite.QUICK[0]._asdict(),
        "dtype": "float32",
        "machine": "m",
        "threads": 1,
        "rounds": 2,
        "versions": {"torch": "2"},
        "commit": "c",
        "date": "d",
        "sets": sets,
        "contestants": [entry("eager", 4.0, 2.0, 4.0), entry("ours", 2.0, 0.1, 0.6)],
    }
    text = sampler_tables.sampler_step_tables([run])
    assert "| ours | 2.00 | 0.50 | 1.00 | 0.00 | 0.10 | 0.00 | 50.0% | 5.0% |" in text
    assert "| ours | 0.6000 | 0.6000 | 10.00% | 10.00% | 0 | 0 | 3 | 0 |" in text
    assert "sets of 8.0 ids in the mean, 50% of one id" in text


def test_the_shares_that_the_docs_tell_are_those_measured():
    paths = sorted((ROOT / "benchmarks" / "results").glob("sampler_step-*.json"))
    runs = [json.loads(path.read_text()) for path in paths]

    def told(name, parts, digits=0):
        shares = [sampler_tables.share(named(run, name), parts) for run in runs]
        least, most = (f"{100 * x:.{digits}f}" for x in (min(shares), max(shares)))
        return f"{least}%" if least == most else f"{least} to {most}%"

    scoring = told("eager", ("scoring", "scoring head"))
    known, kept = told("ours-known", ("head",)), told("ours-support", ("head",), 1)
    text = " ".join((ROOT / "docs" / "benchmarks.md").read_text().split())
    assert f"The scoring pass takes {scoring} of the step on all logits." in text
    assert f"It takes {known}, and {kept}." in text
