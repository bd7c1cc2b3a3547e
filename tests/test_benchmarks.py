"""The benchmarks refuse wrong results, alternate, and report what they measured."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import bench_entropy_threshold as threshold
from benchmarks import bench_head_floor as floor
from benchmarks import bench_linear_cost as cost
from benchmarks import bench_linear_logprob_entropy as bench
from benchmarks import bench_ratio_loss as ratio
from benchmarks import bench_trl_step as trl_step
from benchmarks import linear_logprob_entropy as op
from benchmarks import (
    peers,
    report,
    runner,
)
from benchmarks.runner import Contestant
from entropy_kernels import _native
from entropy_kernels._bench import machine
from entropy_kernels._bench.contestant import EVERYTHING
from entropy_kernels._bench.result_text import result_text
from tests import onednn
from trainer.report.charts import FRAME


def _quiet(line: str) -> None:
    pass


def _suite(contestants: list[Contestant], **options) -> dict[str, dict]:
    truth = {"value": torch.ones(8, dtype=torch.float64)}
    entries = runner.run_suite(
        contestants, None, lambda _: truth, rounds=3, dtype=torch.float32, log=_quiet, **options
    )
    return {entry["name"]: entry for entry in entries}


@pytest.mark.parametrize("wrong", [0.99, float("nan"), float("inf")])
def test_wrong_contestant_is_refused_and_never_timed(wrong):
    value = torch.ones(8)
    value[3] = wrong
    calls = []
    bad = Contestant("bad", "bad", lambda _: calls.append(0) or {"value": value})
    good = Contestant("good", "good", lambda _: {"value": torch.ones(8)})
    found = _suite([good, bad])
    assert len(calls) == 1
    assert "refused" in found["bad"]
    assert "wall_s" not in found["bad"]
    assert len(found["good"]["wall_s"]) == 3


def test_rounding_is_allowed_where_the_inputs_have_16_bits_only():
    off = {"value": torch.full((8,), 1.005)}
    truth = {"value": torch.ones(8)}
    errors = runner.check(off, truth, torch.bfloat16, exact=False)
    assert errors == pytest.approx({"value": 0.005}, rel=1e-3)
    with pytest.raises(runner.WrongResultError, match="value is off by"):
        runner.check(off, truth, torch.float32, exact=False)
    with pytest.raises(runner.WrongResultError):
        runner.check({"value": torch.full((8,), 1.02)}, truth, torch.bfloat16, exact=True)


def test_contestants_alternate_and_each_round_starts_with_another():
    order = []
    contestants = [
        Contestant(name, name, lambda _, name=name: order.append(name) or {}) for name in "abc"
    ]
    samples = runner.alternate(contestants, None, rounds=3, log=_quiet)
    assert "".join(order) == "abcbcacab"
    assert {name: x["turn"] for name, x in samples.items()} == {
        "a": [0, 5, 7],
        "b": [1, 3, 8],
        "c": [2, 4, 6],
    }


def write_pages(root):
    """The pages that the report fills."""
    (root / "docs").mkdir()
    markers = "<!-- benchmarks:begin -->\nstale\n<!-- benchmarks:end -->"
    for page in ("README.md", "docs/benchmarks.md"):
        (root / page).write_text(f"before\n{markers}\nafter\n")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree in which all suites wrote result files: tiny, without compilers and processes."""
    root = tmp_path_factory.mktemp("tree")
    results = root / "benchmarks" / "results"
    with pytest.MonkeyPatch.context() as patch:
        for module in (peers, runner):
            patch.setattr(module, "find_spec", lambda name: None)
        patch.setattr(runner, "peak_bytes", lambda module, names, problem: {names[0]: 2_000_000})
        heads, losses = op.contestants, ratio.contestants()

        def without_compilers(dtype):
            return [c for c in heads(("torch",), dtype) if c.uncompiled is None]

        patch.setattr(op, "contestants", without_compilers)
        patch.setattr(ratio, "contestants", lambda: [c for c in losses if c.uncompiled is None])
        for dtype in (torch.bfloat16, torch.float32):
            bench.measure((40, 16, 96), dtype, 2, results, log=_quiet)
            floor.measure((40, 16, 96), dtype, 2, results, log=_quiet)
            cost.measure(cost.QUICK, dtype, 2, results, log=_quiet)
        threshold.measure(20_000, 2, results, log=_quiet)
        ratio.measure((8, 64), 2, results, log=_quiet)
        trl_step.measure(*trl_step.QUICK, results, log=_quiet)
    write_pages(root)
    return root


def _runs(tree, op_name):
    return report.read(tree / "benchmarks" / "results")[op_name]


def test_suite_counts_products_and_lists_what_is_missing(tree):
    for run in _runs(tree, "linear_logprob_entropy"):
        entries = run["contestants"]
        refused = {entry["name"]: entry["refused"] for entry in entries if "refused" in entry}
        rounds = onednn.rounds_fp32() and run["dtype"] == "float32"
        assert ("eager-onednn" in refused) is rounds
        assert "is allowed" in refused.pop("eager-onednn", "is allowed")
        assert refused == {
            "eager-batch": "needs trl",
            "trl": "needs trl",
            "liger": "needs liger_kernel",
        }
        units = {entry["name"]: round(entry["units"], 6) for entry in entries if "units" in entry}
        assert units["eager"] == 3
        assert units["lce"] == 3
        assert units["checkpoint"] == units["chunked"] == units["lce-chunked"] == 4
        assert units["torch-1"] == 4
        assert units["torch-0.2"] == units["floor"] == 1.6
        computes = {entry["name"]: entry.get("computes", ()) for entry in entries}
        assert computes["torch-0.2"] == list(EVERYTHING)
        assert "selection" not in computes["eager"]
        assert "entropies" not in computes["lce"]
        # With so small a D the logits are recomputed, not stored.
        assert units["torch-0.2-known"] == 0.8
        assert units["torch-forward"] == 1
        assert units["torch-0.2-half"] < 1.6


def test_the_head_and_its_bare_products_do_the_same_work(tree):
    """In each direction and on each number of threads; one product forward, three backward."""
    for run in _runs(tree, "head_floor"):
        entries = {entry["name"]: entry for entry in run["contestants"] if "wall_s" in entry}
        forward, backward = floor.DIRECTIONS
        ours = "cpu" if _native.cpu() else "torch"
        for threads in {1, run["threads"]}:
            for direction in floor.DIRECTIONS:
                assert {f"{direction}-{name}-{threads}" for name in ("mm", ours)} <= set(entries)
            assert f"{backward}-{ours}-fresh-{threads}" in entries
        for direction in floor.DIRECTIONS:
            assert f"{direction}-lce-chunked-1" in entries
            flops = {x["flops"] for name, x in entries.items() if name.startswith(direction)}
            assert len(flops) == 1
        sizes = math.prod(run["shape"].values())
        assert entries[f"{forward}-mm-1"]["flops"] == 2 * sizes
        rows = round(op.FRACTION * run["shape"]["tokens"])
        active = sizes // run["shape"]["tokens"] * 3 * 2
        assert abs(entries[f"{backward}-mm-1"]["flops"] / active - rows) <= 1


def test_threshold_and_ratio_loss_contestants_agree(tree):
    (run,) = _runs(tree, "entropy_threshold")
    exact = {entry["name"] for entry in run["contestants"] if entry["error"] == 0}
    assert exact >= {"kthvalue", "topk", "sort", "ours"}
    (run,) = _runs(tree, "ratio_loss")
    assert max(entry["error"] for entry in run["contestants"]) < 1e-5


def test_quantile_refuses_what_is_too_long_and_is_listed_so():
    too_many = threshold.Problem(torch.zeros(2**24 + 1), 1)
    with pytest.raises(runner.RefusedError, match="too large"):
        threshold._quantile(too_many)


def test_cost_is_measured_at_all_points_of_its_sweeps(tree):
    for run in _runs(tree, "linear_cost"):
        ours = [entry for entry in run["contestants"] if entry.get("who") == "ours"]
        points = {(entry["sweep"], entry["value"]): entry["units"] for entry in ours}
        sweeps = cost.QUICK
        others = {x["name"]: x for x in run["contestants"] if x["name"].startswith(("lce", "trl"))}
        ends = ("fraction-0.2", "fraction-1")
        kept = {f"{sweep}-{value:g}" for sweep, value in points} - {"fraction-0.6"}
        assert set(ends) <= kept
        assert {name for name in others if "wall_s" in others[name]} == {f"lce-{x}" for x in kept}
        assert {x["units"] for x in others.values() if "wall_s" in x} == {3}
        assert {value for sweep, value in points if sweep == "tokens"} == set(sweeps.tokens)
        assert {v for sweep, v in points if sweep == "vocabulary"} == set(sweeps.vocabularies)
        assert points["fraction", 1.0] == pytest.approx(4, rel=0.05)
        assert points["fraction", 0.2] == pytest.approx(1.6, rel=0.05)


def test_report_renders_every_result_file(tree):
    _refuse_one(next(tree.glob("benchmarks/results/linear_logprob*bfloat16*")))
    readme = tree / "README.md"
    texts = {path.name: text for path, text in report.render(tree).items() if path != readme}
    short = report.render(tree)[readme]
    assert short.startswith("before\n")
    assert "40 x 16 x 96, bf16" in short
    assert "exponent" not in short
    text = texts["benchmarks.md"]
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert "| refused |" in text
    assert torch.__version__ in text
    assert "exponent" in text
    assert "20,000 entropies" in text
    assert ", fp32 products of highest precision;" in text
    assert "torch's linear_cross_entropy, no entropies: tokens" in text
    everything = " | ".join(["yes"] * len(EVERYTHING))
    assert re.search(rf"^\| torch-1, .*torch-0.2-half \| {everything} \|$", text, re.M)
    assert re.search(r"^\| .*lce, lce-chunked.* \| yes \|  \|  \| yes \| yes \|$", text, re.M)
    assert "512 tokens" in text
    assert "4 prompts of 3 tokens, completions of 8" in texts["README.md"]
    assert "refused: on purpose" in texts["README.md"]
    assert "refused: needs trl" in texts["README.md"]
    assert "The head against its products, 40 x 16 x 96, bf16" in texts["README.md"]
    for name in ("benchmarks.svg", "linear_cost.svg"):
        assert texts[name].startswith("<svg")
        assert "nan" not in texts[name]


def test_result_files_name_what_was_measured_and_with_what(tree):
    here = machine.processor()
    paths = list(tree.glob("benchmarks/results/*-cpu-*.json"))
    assert paths
    for path in paths:
        run = json.loads(path.read_text())
        assert path.stem.endswith(f"-{here.slug}")
        assert {"vendor", "family", "model", "name", "make"} <= set(run["processor"])
        assert run["blas"] == machine.libraries()
        assert run["fp32_products"] == "highest"
        if _native.cpu() is not None:
            dtype = getattr(torch, run["dtype"])
            assert run["instruction"] == _native.instruction_set(dtype)


def test_result_files_have_a_series_on_a_line():
    value = {"s": [1, 2.5, None], "t": ("x",), "u": [], "v": [[1, 2], {"a": [3]}], "w": {"b": "c"}}
    lines = [
        *("{", ' "s": [1, 2.5, null],', ' "t": ["x"],', ' "u": [],'),
        *(' "v": [', "  [1, 2],", "  {", '   "a": [3]', "  }", " ],", ' "w": {"b": "c"}', "}"),
    ]
    assert result_text(value).splitlines() == lines
    for path in sorted(runner.RESULTS.rglob("*.json")):
        text = path.read_text()
        assert result_text(json.loads(text)) == text, f"{path.name} is not as result_text writes it"


def test_every_make_that_has_result_files_has_its_tables(tree, tmp_path):
    """Files of before the processor was recorded are read by the name that they have."""
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(tree / "benchmarks" / "results", results)
    for path in list(results.glob("*-cpu-*.json")):
        run = json.loads(path.read_text()) | {"machine": "AMD EPYC (family 23, model 49)"}
        for key in ("processor", "instruction", "blas"):
            del run[key]
        run["date"] = "2001-01-01"
        (results / f"{run['op']}-cpu-{path.name[-60:]}-older.json").write_text(json.dumps(run))
    write_pages(tmp_path)
    texts = {path.relative_to(tmp_path): text for path, text in report.render(tmp_path).items()}
    here = machine.processor().make
    for text in (texts[Path("docs/benchmarks.md")], texts[Path("benchmarks/results/README.md")]):
        first, second = text.index(f"**On {here}**"), text.index("**On AMD Zen 2**")
        assert first < second
        assert machine.libraries() in text[first:second]
        assert "not recorded" not in text[first:second]
        assert "Instruction set: not recorded. Torch's libraries: not recorded" in text[second:]
        for table in ("exponent", "20,000 entropies", "512 tokens"):
            assert table in text[first:second]
            assert table in text[second:]
    plot = texts[Path("docs/linear_cost.svg")]
    assert f'viewBox="0 0 {3 * FRAME.width} {2 * FRAME.height}"' in plot
    titles = re.findall(r'class="title"[^>]*>([^<]*)<', plot)
    assert titles[3:] == ["AMD Zen 2"] * 3


def test_eager_by_onednn_stands_beside_eager_in_fp32_alone(tree):
    text = report.render(tree)[tree / "docs" / "benchmarks.md"]
    for run in _runs(tree, "linear_logprob_entropy"):
        names = [entry["name"] for entry in run["contestants"]]
        assert ("eager-onednn" in names) is (run["dtype"] == "float32")
    timed = "plain PyTorch, oneDNN's products | 3.00 |" in text
    assert timed is not onednn.rounds_fp32()


def test_report_has_no_section_without_a_result_file(tree, tmp_path):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in tree.glob("benchmarks/results/linear_logprob*.json"):
        (results / path.name).write_text(path.read_text())
    write_pages(tmp_path)
    texts = report.render(tmp_path)
    assert {path.name for path in texts} == {"README.md", "benchmarks.md", "benchmarks.svg"}
    assert not any("exponent" in text or "20,000 entropies" in text for text in texts.values())


def _refuse_one(path):
    run = json.loads(path.read_text())
    run["contestants"][-1] = {"name": "floor", "label": "floor", "refused": "on purpose"}
    path.write_text(json.dumps(run))


@pytest.mark.slow
def test_peak_memory_sees_what_a_step_holds():
    problem = op.make_problem(64, 64, 32768, torch.float32)
    peaks = runner.peak_bytes(op.__name__, ["checkpoint", "torch-0.2"], problem)
    if not peaks:
        pytest.skip("only Linux tells the peak")
    gradient, logits = 4 * 64 * 32768, 4 * 64 * 32768
    assert peaks["checkpoint"] > gradient + 2 * logits
    assert gradient / 2 < peaks["torch-0.2"] < peaks["checkpoint"]


def test_a_page_without_markers_fails_with_their_names(tmp_path):
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(SystemExit, match=r"page\.md needs .*benchmarks:begin"):
        report.between_markers(tmp_path / "page.md", "block")


def test_readme_says_what_the_result_files_say():
    for path, text in report.render(report.ROOT).items():
        assert path.read_text() == text, f"{path.name}: run python -m benchmarks.report"
