"""What the studies on a pretrained model start from: its folder, and their prompts."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys

import pytest

from benchmarks import bench_real_model as suite
from benchmarks import peers
from benchmarks.paper_results import NOTHING
from benchmarks.real_model import engines, folder, kept, page, prompts
from benchmarks.sampler_step import FRACTION
from benchmarks.sources import ROOT
from tests.gemma import save_gemma


def test_worked_sums_are_right_whatever_their_way():
    ways = []
    for row in prompts.rows("sums", 300):
        numbers = [int(x) for x in re.findall(r"\d+", row["prompt"])]
        assert len(numbers) == 3
        assert row["answer"] == str(sum(numbers))
        assert row["worked"].endswith(f" The answer is {row['answer']}.")
        for left, right in re.findall(r"([\d+ ]+) = (\d+)", row["worked"]):
            assert sum(map(int, left.split(" + "))) == int(right)
        ways.append(" ".join(row["worked"].split()[:2]))
    assert {way.rstrip("0123456789") for way in ways} == {
        *("The answer", "Start with", "The largest", "Tens: ")
    }
    assert 0.3 < ways.count("The answer") / len(ways) < 0.5


def test_the_files_are_the_same_each_time_and_have_all_kinds(tmp_path):
    for name in ("one", "two"):
        prompts.write(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(f"{kind}.jsonl" for kind in ("sums", *prompts.KINDS))
    for name in files:
        text = (tmp_path / "one" / name).read_text()
        assert text == (tmp_path / "two" / name).read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == (prompts.SUMS if name == "sums.jsonl" else prompts.PROMPTS)
        assert all(row["prompt"] and row["answer"] for row in rows)


def test_word_problems_have_the_answer_of_their_numbers():
    for row in prompts.rows("word-problems", 50):
        have, more, times = (int(x) for x in re.findall(r"\d+", row["prompt"]))
        assert row["answer"] == str(have + more * times)


@pytest.mark.parametrize("trouble", ["no file", "a folder that exists", "another file"])
def test_what_is_no_gguf_file_of_the_model_is_told(trouble, tmp_path, capsys):
    file, target = tmp_path / "model.gguf", tmp_path / "model"
    wanted = {
        "no file": "FILE must be a GGUF file; got ",
        "a folder that exists": "FOLDER must not exist yet; got ",
        "another file": f"FILE must have the SHA-256 {folder.GEMMA}; got "
        + hashlib.sha256(b"GGUF").hexdigest(),
    }[trouble]
    if trouble != "no file":
        file.write_bytes(b"GGUF")
    if trouble == "a folder that exists":
        target.mkdir()
    with pytest.raises(SystemExit) as stopped:
        folder.main([str(file), str(target)])
    assert stopped.value.code == 2
    assert wanted in capsys.readouterr().err
    assert target.exists() is (trouble == "a folder that exists")


def test_a_file_is_not_converted_without_its_reader(tmp_path, capsys, monkeypatch):
    file, target = tmp_path / "model.gguf", tmp_path / "model"
    file.write_bytes(b"GGUF")
    command = [str(file), str(target), "--sha256", hashlib.sha256(b"GGUF").hexdigest()]
    converted = []
    monkeypatch.setattr(folder, "convert", lambda *given: converted.append(given))
    monkeypatch.setattr(folder, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        folder.main(command)
    assert stopped.value.code == 2
    assert "the package gguf, which is not installed" in capsys.readouterr().err
    assert not converted
    monkeypatch.setattr(folder, "find_spec", lambda name: name)
    assert folder.main(command) == 0
    assert converted == [(file, target)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a Gemma 3 of random weights that reads bytes."""
    return save_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.mark.filterwarnings("default")
def test_every_step_of_a_model_finds_its_gradient_and_the_head_is_timed(small, tmp_path):
    # It refuses a loss or a gradient that is not the truth's.
    entries = suite.measure(small, *suite.QUICK, tmp_path, log=lambda _: None)
    named = {entry["name"]: entry for entry in entries if "sums" in entry}
    assert {"eager", "ours", "ours-mask", "ours-known", "ours-support", "ours-all"} <= set(named)
    assert named["ours"]["sums"] != named["ours-all"]["sums"]
    for entry in named.values():
        assert len(entry["wall_s"]) == suite.QUICK[1]
        assert entry["products"]["backward"] > 0
    if not peers.why_not("trl"):
        trl, patched = named["trl"], named["trl-patched"]
        # patch_trl() changes nothing but the head, whose backward has a fifth of the rows.
        assert trl["products"]["forward"] == patched["products"]["forward"]
        assert patched["products"]["head"] < trl["products"]["head"]
        file = next(tmp_path.glob(kept.STEPS))
        tokens = json.loads(file.read_text())["shape"]["tokens"]
        selected = math.ceil(FRACTION * tokens)
        scaled = named["ours"]["sums"]["loss"] * selected / tokens
        assert trl["sums"]["loss"] == pytest.approx(scaled, rel=1e-4)
    heads = [entry for entry in entries if "sums" not in entry]
    assert {"eager", "cpu-0.2"} <= {entry["name"] for entry in heads if "wall_s" in entry}
    assert len(list(tmp_path.glob("real_*.json"))) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of inductor
def test_both_engines_answer_the_same_requests(small, monkeypatch):
    monkeypatch.setattr(engines, "TOKENS", 8)
    found = engines.measure(small, rounds=2)
    entries = {entry["name"]: entry for entry in found["engines"]}
    asked = engines.PROMPTS * engines.EACH
    for name in ("transformers", "generate", "generate-static", "generate-compiled"):
        tokens = entries[name]["tokens"]
        assert len(tokens) == len(entries[name]["wall_s"]) == 2
        assert all(asked <= count <= 8 * asked for count in tokens)
    assert "wall_s" in entries["vllm"] or entries["vllm"]["refused"] == "needs vLLM"


def test_the_engines_threads_keep_to_cores_of_their_own():
    """OpenMP reads its environment as torch loads; what is set later binds all to one core."""
    code = "import os, benchmarks.real_model.engines; print(os.environ['OMP_PROC_BIND'])"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    told = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=kept, text=True)
    assert told == "true\n"


def test_the_page_has_the_minutes_of_each_arms_runs(tmp_path):
    columns = {"step": [1], "entropy": [0.5], "length": [9], "rows": [3], "all_rows": [3]}
    evaluations = {"step": [0, 1], "accuracy": [0.1, 0.2], "greedy": [0.1, 0.3]}
    evaluations |= {"problems": [300, 300]}
    runs = [
        {"arm": arm, "seed": seed, "seconds": seconds, "rows": 3, "commits": ["c0ffee"]}
        | {"evaluations": evaluations, "training": columns}
        for arm, seed, seconds in (("all", 0, 60.0), ("all", 1, 120.0), ("top-20", 0, 45.0))
    ]
    (tmp_path / "learning.json").write_text(json.dumps({"runs": runs}))
    text = page.learning(tmp_path)
    assert "on one core: all (DAPO) 1.5, top 20% 0.8." in text
    assert "commits c0ffee; 3 runs, 0.1 hours by the clock in sum" in text


def test_the_page_has_what_was_found(tmp_path):
    assert page.patterns(tmp_path) == page.learning(tmp_path) == NOTHING
    assert page.figures(tmp_path) == {}
    one = {"count": 10, "mean": 0.5, "below_0.01": 0.25}
    one |= {"percentiles": {"50": 0.1, "80": 0.75}, "histogram": {}, "made": {}, "threshold": 0.7}
    one |= {"problems": 5, "cdf": {"points": [0.1, 1.0], "shares": [0.4, 0.9]}}
    token = {"text": " a|b\n", "token": 7, "count": 200, "mean": 2.0}
    thus = {"text": "Thus", "token": 8, "count": 3, "mean": 1.5}
    kinds = {name: {**one, "tokens": [token, thus]} for name in prompts.KINDS}
    (tmp_path / "patterns.json").write_text(json.dumps(kept.joined(kinds)))
    text = page.patterns(tmp_path)
    assert "| all kinds | 40 | 0.500 | 25.0% |  |  |" in text
    assert "| prose | 10 | 0.500 | 25.0% | 0.100 | 0.750 |" in text
    assert r"| ` a\|b\n` | 2.000 |" in text
    assert "| thus | 12 | 1.500 | 0.0% |" in text
    assert "Not sampled: wait, however," in text
    assert "few-shot-sums" in page.figures(tmp_path)["pretrained-patterns.svg"]
    point = {"low": 1.0, "high": 0.5, "length": 40.0}
    point["accuracy"] = {"value": 0.5, "low": 0.4, "high": 0.6}
    (tmp_path / "temperatures.json").write_text(json.dumps({"threshold": 0.7, "points": [point]}))
    assert "| 1 | 0.5 | 50.0% [40.0, 60.0] | 40.0 |" in page.temperatures(tmp_path)
    found = {"tokens": 9, "mean": [0.5, 0.25], "overlap": [[1, 0.75]], "correlation": [1, 0.9]}
    found["below_0.01"] = [0.25, 0.5]
    (tmp_path / "evolution-all.json").write_text(json.dumps(found))
    assert "| all (DAPO) | 9 | 75.0% | 90.0% | 0.500 | 0.250 | 25.0% | 50.0% |" in page.overlap(
        tmp_path
    )
