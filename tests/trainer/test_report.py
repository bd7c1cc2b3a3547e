"""The report of a run: all that was logged, nothing from outside, no HTML of the model's."""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

import trainer.report.page
import trainer.report.samples
import trainer.run
from tests.trainer.report_cases import make_run, metrics_row, skipped_row
from tests.trainer.small import Even, save_folder, settings
from trainer.config import Config, Eval, Reward
from trainer.log import RunLog, Sample
from trainer.report.page import LiveReport, write_report
from trainer.report.plots import MAX_POINTS
from trainer.train import train

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that tags close in order and keeps what the tests ask about."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def page(folder: Path, **options) -> tuple[str, Page]:
    text = write_report(folder, **options).read_text("utf-8")
    return text, Page(text)


def count(parsed: Page, name: str) -> int:
    return sum(tag == name for tag, _ in parsed.tags)


def test_page_of_a_whole_run(tmp_path):
    log = make_run(tmp_path / "demo", names=("", "aime24", "math500"))
    text, parsed = page(log.folder)
    assert len(text) < 1_000_000
    assert count(parsed, "svg") == 19
    for title in (
        *("Held-out accuracy", "Accuracy on aime24, math500", "Training reward", "Loss"),
        *("Kinds of responses", "Response length", "Truncated responses", "Groups"),
        *("Gradient norm", "Sampler and trainer: KL", "Sampler and trainer: largest ratio"),
        "Tokens of sampler and policy",
    ):
        assert f"<h3>{title}</h3>" in text
    assert "Not drawn: Skipped steps: none; Verifier failures: none." in parsed.text
    assert "Ended: step 120 of 120, at 20" in parsed.text
    assert "top 20% of tokens by sampler entropy" in parsed.text
    assert "0 of 120" in parsed.text
    assert "notice" not in text.split("</style>")[1]
    assert "Step 1\n" in parsed.text
    assert "Step 120\n" in parsed.text


def test_a_picture_is_told_to_those_who_do_not_see_it(tmp_path):
    text, parsed = page(make_run(tmp_path / "demo", steps=20).folder)
    pictures = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    assert pictures
    assert all(attributes["role"] == "img" for attributes in pictures)
    assert len(re.findall(r"<svg [^>]*><title>[^<]+</title><desc>[^<]+</desc>", text)) == len(
        pictures
    )
    assert "<desc>Steps 1 to 20, in loss: loss " in text


@pytest.mark.parametrize("word", ["running", "stopped", "ended", "elsewhere"])
def test_the_page_says_where_the_run_stands(tmp_path, word):
    log = make_run(tmp_path / "demo", 100, done=100 if word == "ended" else 60)
    owner = {"host": os.uname().nodename, "pid": os.getpid()}
    if word == "elsewhere":
        owner["host"] += "-not"
    if word != "stopped":
        (log.folder / ".lock").write_text(json.dumps(owner))
    _, parsed = page(log.folder)
    says = {
        "running": "Running: step 60 of 100, as of 20",
        "stopped": "Stopped at step 60 of 100, at 20",
        "ended": "Ended: step 100 of 100, at 20",
        "elsewhere": "Running: step 60 of 100, as of 20",
    }
    assert says[word] in parsed.text
    long_ago = time.time() - 3600
    os.utime(log.metrics_path, (long_ago, long_ago))
    _, parsed = page(log.folder)
    silent = {"running": "; no step for 1:00:00", "elsewhere": "Stopped at step 60"}
    assert silent.get(word, says[word]) in parsed.text


def test_a_run_that_never_updated_says_so_first(tmp_path):
    log = make_run(tmp_path / "never", 6, every=3, skip=1.0)
    text, parsed = page(log.folder)
    seen = " ".join(parsed.text.split())
    assert "No step updated the weights: 6 of 6 skipped, few useful groups." in seen
    assert re.search(r"Of 1,536 responses: 2\.0% wrong, 7\d\.\d% truncated, 2\d\.\d% unp", seen)
    assert "Of 192 groups: 0 useful, 0 all right, 192 all wrong." in seen
    assert "Most responses hit rollout.max_new_tokens." in seen
    places = [text.index(part) for part in ("No step upd", "Sampled responses", "Training rew")]
    assert places == sorted(places)
    assert {"wrong", "truncated", "unparsed"} <= set(re.findall(r'class="wrong">(\w+)<', text))
    assert "None of these was trained on" in seen
    assert "Loss: no value of loss" in seen


def test_a_run_that_has_ceased_to_update_says_so(tmp_path):
    log, rng = RunLog.open(tmp_path / "run", Config()), random.Random(0)
    for step in range(1, 21):
        log.write(metrics_row(rng, step, 20) if step < 15 else skipped_row(rng, step))
    assert (
        "The last 6 steps updated nothing; skipped: few useful groups." in page(log.folder)[1].text
    )
    log.write(metrics_row(rng, 21, 21))
    _, parsed = page(log.folder)
    assert "updated nothing;" not in parsed.text
    assert "6 of 21: few useful groups" in parsed.text


def test_verifier_failures_are_drawn_and_told(tmp_path):
    log, rng = RunLog.open(tmp_path / "run", Config()), random.Random(0)
    for step in range(1, 5):
        log.write(metrics_row(rng, step, 20) | {"reward/timeouts": 32.0})
    text, parsed = page(log.folder)
    assert "The verifier timed out on 128 of 1,024 responses" in parsed.text
    assert "The verifier failed" not in parsed.text
    assert "step 4\ntime-outs: 128" in parsed.text
    assert "<h3>Verifier failures</h3>" in text


def test_accuracies_have_the_number_of_problems_that_was_logged(tmp_path):
    """And their interval; neither is made up."""
    log = RunLog.open(tmp_path / "run", Config(eval=Eval(problems=1024)))
    first = {"eval/accuracy": 0.0, "eval/low": 0.0, "eval/high": 0.7935, "eval/problems": 1}
    log.write({"step": 0, **first, "eval/a.accuracy": 0.25, "eval/a.problems": 8})
    _, parsed = page(log.folder)
    seen = " ".join(parsed.text.split())
    assert "Held-out accuracy0.0% 0.0% to 79.3%1 problem, 95% interval; at step 0" in seen
    assert "Accuracy on a25.0% 8 problems; at step 0" in seen
    assert "1,024" not in seen
    last = {"eval/accuracy": 1.0, "eval/low": 0.2065, "eval/high": 1.0, "eval/problems": 1}
    log.write({"step": 10, **last})
    seen = " ".join(page(log.folder)[1].text.split())
    # The ends are hypot(1 - 0.2065, 0.7935 - 0) below and 0 above.
    assert "0.0% at step 0, 100.0% at step 10: +100.0 points (-12.2 to +100.0)" in seen
    log.write({"step": 20, "eval/accuracy": 0.5})
    assert "50.0% number of problems unknown;" in " ".join(page(log.folder)[1].text.split())


@pytest.mark.parametrize("verdicts", [(0.0, 2.0), (-1.0, 1.0), (-1.0, -1.0)])
def test_verdicts_outside_of_0_and_1_are_reported(tmp_path, verdicts):
    """Means of them were taken for shares."""
    wrong, right = verdicts
    reward = Reward(right=right if right != wrong else 1.0)
    log = RunLog.open(tmp_path / "run", Config(reward=reward))
    for step, mean in enumerate((wrong, (wrong + right) / 2, right)):
        log.write({"step": step, "eval/accuracy": mean, "reward/mean": mean})
    rows = [Sample("p", "a", verdict, ["a"], [0.1], [True]) for verdict in verdicts]
    log.samples(1, rows)
    text, _ = page(log.folder)
    found = re.findall(r'class="(\w+)">\1</span> · reward (\S+)', text)
    assert {float(reward): kind for kind, reward in found} == {
        wrong: "wrong",
        right: "right" if right != wrong else "wrong",
    }


def test_five_thousand_steps_stay_small_quick_and_legible(tmp_path):
    names = ("", "aime24", "math500")
    log = make_run(tmp_path / "long", 5000, names=names, skip=0.05, length=3000)
    began = time.process_time()
    text, parsed = page(log.folder)
    page_time = time.process_time() - began
    assert len(text) < 1_500_000
    assert "2600 more tokens" in parsed.text
    # Beside what reading the rows takes, which no page goes without.
    began = time.process_time()
    trainer.report.page.read_rows(log.metrics_path)
    assert page_time < max(30 * (time.process_time() - began), 1.0)
    paths = re.findall(r'<path class="line [^"]*" d="([^"]*)"', text)
    assert len(paths) > 30
    assert max(path.count("L") for path in paths) < MAX_POINTS
    bands = re.findall(r'<path class="band [^"]*" d="([^"]*)"', text)
    assert len(bands) > 10
    assert max(band.count("L") for band in bands) < 2 * MAX_POINTS
    assert count(parsed, "circle") == 0  # 251 evaluations: dots would merge
    assert "Shade: eight steps in ten." in parsed.text
    # The ends of the line are means over steps near the ends.
    reward = next(svg for svg in text.split("<svg ") if "Training reward" in svg)
    line = re.search(r'class="line c1" d="M([^"]*)"', reward)
    assert line is not None
    heights = [float(point.split()[1]) for point in line[1].split("L")]
    assert heights[0] > heights[-1] + 50
    assert max(abs(a - b) for a, b in itertools.pairwise(heights)) < 8  # it is smooth


def test_the_page_is_written_while_the_run_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.run, "make_task", lambda *_: Even())
    monkeypatch.setattr(trainer.report.page, "SHARE", math.inf)
    config = settings(tmp_path, save_folder(tmp_path / "model"), steps=5, eval=Eval(2, 4))
    seen = []

    def look(step):
        text = (tmp_path / "run" / "report.html").read_text()
        seen.append(re.findall(r'class="state">(\w+: step \d)', text)[0])

    train(config, look)
    look(6)
    assert seen == [f"Running: step {n}" for n in (0, 2, 2, 4, 4)] + ["Ended: step 5"]
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_page_that_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("of the picture")

    monkeypatch.setattr(trainer.run, "make_task", lambda *_: Even())
    config = settings(tmp_path, save_folder(tmp_path / "model"), steps=2, eval=Eval(1, 4))
    train(dataclasses.replace(config, steps=1))
    before = (tmp_path / "run" / "report.html").read_text()
    monkeypatch.setattr(trainer.report.page, "sections", fail)
    with pytest.warns(RuntimeWarning, match=r"report\.html was not written: Zero.*of the picture"):
        train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 3
    assert (tmp_path / "run" / "report.html").read_text() == before


def test_the_page_takes_a_small_part_of_the_time(tmp_path, monkeypatch):
    clock, drawn = [0.0], []

    def draw(*_):
        clock[0] += 2.0
        drawn.append(clock[0])

    monkeypatch.setattr(trainer.report.page, "write_report", draw)
    monkeypatch.setattr(trainer.report.page.time, "monotonic", lambda: clock[0])
    live = LiveReport(tmp_path)
    for _ in range(1000):
        clock[0] += 1.0
        live.refresh()
    assert 0.03 < 2 * len(drawn) / clock[0] <= 0.05
    before = len(drawn)
    live.refresh()
    live.refresh(running=False)
    assert len(drawn) == before + 1
    LiveReport(tmp_path, first=False).refresh(running=False)
    assert len(drawn) == before + 1


def test_page_needs_nothing_from_outside(tmp_path):
    text, parsed = page(make_run(tmp_path / "demo").folder)
    bare = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?://|url\(|@import|//\w", bare)
    for tag, attributes in parsed.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}
        assert not {"src", "href", "xlink:href", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)


def test_missing_metrics_are_named(tmp_path):
    log = RunLog.open(tmp_path / "run", Config())
    log.write({"step": 1, "reward/mean": 0.5})
    _, parsed = page(log.folder)
    assert "Held-out accuracy: no value of eval/accuracy or eval/greedy" in parsed.text
    assert "no value of eval/accuracy\n" in parsed.text.replace("</p>", "\n")
    assert "No responses were written" in parsed.text
    assert count(parsed, "svg") == 1


def test_values_that_were_not_finite_are_told(tmp_path):
    log = RunLog.open(tmp_path / "run", Config())
    for step, reward in enumerate([0.1, math.nan, 0.3, 0.4], start=1):
        log.write({"step": step, "reward/mean": reward})
    log.write({"step": 5, "reward/mean": 0.5, "head/rows": math.inf})
    text, parsed = page(log.folder)
    assert "2 logged values were not finite" in parsed.text
    assert "nan" not in text.replace("nano", "").lower().split("</style>")[1]


def test_torn_last_line_of_a_live_run(tmp_path):
    log = make_run(tmp_path / "demo", steps=3)
    with log.metrics_path.open("a") as file:
        file.write('{"step": 4, "rew')
    assert "3 of 3" in page(log.folder)[1].text
    assert not list(log.folder.glob("*.tmp"))


def test_folders_that_cannot_be_reported(tmp_path):
    with pytest.raises(ValueError, match=r"run\.json is missing"):
        write_report(tmp_path)
    log = RunLog.open(tmp_path / "run", Config())
    with pytest.raises(ValueError, match=r"metrics\.jsonl is missing"):
        write_report(log.folder)
    log.metrics_path.touch()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is empty"):
        write_report(log.folder)
