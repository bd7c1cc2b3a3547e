"""What the four runs' script reads, joins and refuses; the runs themselves take minutes."""

import json
import os
from xml.etree import ElementTree

import pytest

from benchmarks import engine_runs
from benchmarks.engine_runs import WAYS, collect, panels, parted, summary, table
from trainer.report.charts import figure

STEPS = 20


def rows(shift=0.0, parts_at=STEPS + 1):
    """A row of each step; from `parts_at` on one token more was sampled."""
    accuracy = {"eval/accuracy": 0.4 + shift, "eval/standard_error": 0.03, "eval/greedy": 0.5}
    evaluation = accuracy | {"eval/length": 9.0, "time/evaluate": 1.0}
    found = [{"step": 0, **evaluation}]
    for step in range(1, STEPS + 1):
        found.append(
            {
                "step": step,
                "tokens": 100.0 + (step >= parts_at),
                "reward/mean": step / STEPS,
                "response/length": 10.0,
                "response/truncated": 0.0,
                "groups/useful": 4.0,
                "entropy/mean": 0.3,
                "entropy/threshold": 0.5,
                "mismatch/kl": 1e-13,
                "mismatch/max_ratio": 1.00001,
                "tokens_per_second": 50.0,
                "time/step": 2.0,
            }
        )
    found[-1] |= evaluation
    return found


def write(root, way, found, **start):
    folder = root / way.name
    folder.mkdir(parents=True, exist_ok=True)
    start = {
        "time": "2026-01-02T03:04:05+00:00",
        "commit": "c0ffee",
        "dirty": False,
        "versions": {"transformers": engine_runs.importlib.metadata.version("transformers")},
        "platform": "Linux",
        "device": ("2 x " if way.processes == 2 else "") + "cpu, 1 threads",
    } | start
    settings = {"steps": STEPS, "seed": start.pop("seed", 0)}
    config = settings | {"name": way.name, "engine": {"kind": way.engine, "dtype": "auto"}}
    starts = [start] * start.pop("times", 1)
    (folder / "run.json").write_text(json.dumps({"config": config, "starts": starts}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture
def four(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_runs, "_versions", lambda logged: logged | {"vllm": "0"})
    for way, found in zip(WAYS, (rows(), rows(0.1, 1), rows(0.0, 7), rows(0.2, 1)), strict=True):
        write(tmp_path, way, found)
    return tmp_path


def test_four_runs_are_joined(four):
    result = collect(four)
    first, _, sharded, both = result["runs"]
    assert (first["steps"], first["seconds"]) == (STEPS, 2.0 * STEPS + 2.0)
    assert first["series"]["reward/mean"] == pytest.approx([i / STEPS for i in range(1, STEPS + 1)])
    assert first["evaluations"]["step"] == [0, STEPS]
    assert sharded["command"][2:5] == ["torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert both["command"][-2:] == ["--engine.kind", "vllm"]
    compared = {tuple(pair["runs"]): pair for pair in result["comparisons"]}
    assert len(compared) == 6
    assert compared["transformers", "transformers, FSDP2"]["parted_at_step"] == 7
    pair = compared["transformers", "vLLM, FSDP2"]
    assert pair["accuracy_difference"] == pytest.approx(0.2)
    assert pair["standard_error"] == pytest.approx(0.03 * 2**0.5, rel=1e-5)


def test_step_at_which_runs_part():
    assert parted(rows(), rows()) is None
    assert parted(rows(), rows(parts_at=3)) == 3
    assert parted(rows(), rows(0.1)) == 0
    with pytest.raises(ValueError, match="shorter"):
        parted(rows(), rows()[:-1])


def test_step_without_update_leaves_a_gap():
    found = rows()
    for name in ("mismatch/kl", "tokens_per_second"):
        del found[3][name]
    kept = summary(found)
    assert kept["series"]["mismatch/kl"][2] is None
    assert len(kept["series"]["mismatch/kl"]) == STEPS


@pytest.mark.parametrize(
    ("found", "start", "message"),
    [
        (rows()[:-1], {}, "incomplete: rows of steps 0 to 20 are wanted, got 20, the last of st"),
        (rows()[:4] + rows()[5:], {}, "incomplete"),
        ([], {}, "the last of step None"),
        (rows()[:-1] + [{"step": STEPS}], {}, "step 20: no eval/accuracy"),
        (rows(), {"commit": "beef"}, "other commit than engine-transformers: beef != c0ffee"),
        (rows(), {"versions": {"torch": "0"}}, "other versions"),
        (rows(), {"seed": 1}, "other settings"),
        (rows(), {"dirty": True}, "without edits"),
        (rows(), {"times": 2}, "started 2 times"),
        (rows(), {"device": "cpu, 1 threads"}, "has run"),
    ],
    ids=[
        *("last step", "step between", "no step", "last evaluation", "commit"),
        *("versions", "seed", "edits", "resumed", "one process"),
    ],
)
def test_refused(four, found, start, message):
    write(four, WAYS[3], found, **start)
    with pytest.raises(ValueError, match=message):
        collect(four)


def test_missing_run_is_refused(four):
    (four / WAYS[1].name / "run.json").unlink()
    with pytest.raises(ValueError, match="engine-vllm holds no run"):
        collect(four)


def test_interpreter_without_the_runs_versions_is_refused():
    with pytest.raises(ValueError, match="is wanted, this one has"):
        engine_runs._versions({"transformers": "0.1"})


def test_only_missing_runs_are_started(four, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        engine_runs.subprocess,
        "run",
        lambda command, check, env: started.append((command, check, env)),
    )
    for path in (four / WAYS[2].name).iterdir():
        path.unlink()
    (four / WAYS[2].name).rmdir()
    engine_runs._start(four, "tiny")
    [(command, check, environment)] = started
    assert command[1:] == [*WAYS[2].command("tiny"), "--root", str(four)]
    assert check
    assert environment == os.environ | engine_runs.ENVIRONMENT


def test_table_and_plot_show_every_run(four):
    result = collect(four)
    lines = table(result).splitlines()
    assert len(lines) == 2 + len(WAYS)
    assert lines[3].startswith("| vLLM | 50.0 ± 3.0% | 50.0 ± 3.0% | 0.775 | 10.0 | 1.0e-13 |")
    drawn = ElementTree.fromstring(figure(panels(result), "engine_runs.json"))
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    for way in WAYS:
        assert texts.count(way.label) == 3


def test_documentation_has_the_result_file_s_table():
    result = json.loads(engine_runs.RESULT.read_text())
    page = engine_runs.RESULT.parents[2] / "docs" / "distributed.md"
    assert table(result) in page.read_text()
