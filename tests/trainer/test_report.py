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
from tests.trainer.report_cases import make_run, metrics_row, samples, skipped_row, unscored
from tests.trainer.small import Even, save_folder, settings
from trainer.config import Config, Eval, Reward
from trainer.log import RunLog, Sample
from trainer.report.charts import ticks
from trainer.report.page import LiveReport, write_report
from trainer.report.plots import MAX_POINTS, Line, plot
from trainer.report.samples import ends
from trainer.report.skips import KINDS
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
    assert count(parsed, "svg") == 18
    for title in (
        *("Held-out accuracy", "Accuracy on aime24, math500", "Training reward", "Loss"),
        *("Kinds of responses", "Response length", "Truncated responses", "Groups"),
        *("Gradient norm", "Sampler and trainer: KL", "Sampler and trainer: largest ratio"),
    ):
        assert f"<h3>{title}</h3>" in text
    assert "Not drawn: Skipped steps: none; Verifier failures: none." in parsed.text
    assert "Ended: step 120 of 120, at 20" in parsed.text
    assert "top 20% of tokens by old entropy" in parsed.text
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


def test_a_spike_does_not_flatten_the_rest(tmp_path):
    points = [(step, 1e6 if step == 700 else 1 + step % 2) for step in range(1000)]
    svg = plot([Line("a", points, "c1")], "unit")
    labels = re.findall(r'text-anchor="end">([\d.,]+)</text>', svg)
    assert float(labels[-1].replace(",", "")) < 1e5
    assert "not shown: single steps up to 1e+06" in svg


def test_dots_are_as_many_as_can_be_told_apart():
    def dots(number):
        svg = plot([Line("a", [(i, i % 3) for i in range(number)], "c1", markers=True)], "unit")
        return re.findall(r' r="([\d.]+)"', svg)

    assert dots(20) == ["3.5"] * 20
    assert dots(100) == ["1.8"] * 100
    assert dots(MAX_POINTS + 1) == []


def test_a_line_does_not_cross_a_long_stretch_without_values():
    points = [(i, 1.0) for i in range(10)] + [(i, 2.0) for i in range(40, 50)]
    line = re.search(r'class="line c1" d="([^"]*)"', plot([Line("a", points, "c1")], "unit"))
    assert line is not None
    assert line[1].count("M") == 2


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


@pytest.mark.parametrize("block", [64, 1 << 20])
@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_the_ends_of_many_samples_are_read(tmp_path, monkeypatch, block, steps):
    """Without the middle: a broken line there is not seen."""
    monkeypatch.setattr(trainer.report.samples, "BLOCK", block)
    log = RunLog.open(tmp_path / "run", Config())
    log.samples_path.touch()
    rng = random.Random(0)
    for step in range(1, steps + 1):
        log.samples(10 * step, [*unscored(rng), *samples(rng, 0.4, 2)])
    with log.samples_path.open("a") as file:
        file.write('{"step": 99, "resp')
    rows = ends(log.samples_path)
    want = {0: [], 1: [10] * 6}.get(steps, [10] * 6 + [10 * steps] * 6)
    assert [row["step"] for row in rows] == want
    assert ends(tmp_path / "no.jsonl") == []


def test_samples_on_the_page_are_of_every_kind(tmp_path):
    log = RunLog.open(tmp_path / "run", Config())
    log.write({"step": 1})
    rows = [Sample("p", "a", 0.0, ["a"], [], [], "wrong")] * 30
    rows += [Sample("p", "a", 0.0, ["a"], [], [], kind) for kind in KINDS]
    log.samples(1, rows)
    text, _ = page(log.folder)
    kinds = re.findall(r'<span class="(?:right|wrong)">(\w+)</span>', text)
    assert sorted(kinds) == sorted([*KINDS, "wrong"])


def test_samples_of_an_earlier_version(tmp_path):
    """Without a kind."""
    log = RunLog.open(tmp_path / "run", Config())
    log.write({"step": 1})
    log.samples(1, [Sample("p", "a", 0.5, ["a"], [0.1], [True]), *samples(random.Random(0), 1, 1)])
    rows = [json.loads(line) for line in log.samples_path.read_text().splitlines()]
    for row in rows:
        del row["kind"]
    log.samples_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert page(log.folder)[0].count('class="wrong">wrong<') == 2


def test_page_needs_nothing_from_outside(tmp_path):
    text, parsed = page(make_run(tmp_path / "demo").folder)
    bare = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?://|url\(|@import|//\w", bare)
    for tag, attributes in parsed.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}
        assert not {"src", "href", "xlink:href", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)


def test_text_of_the_model_is_escaped(tmp_path):
    evil = "<script>alert('&')</script>"
    log = RunLog.open(tmp_path / "run", Config(name=evil), device=evil)
    log.write({"step": 1, "reward/mean": 0.5})
    odd = '"><img src=x>\x00\x1b[31m\ud83d'
    log.samples(1, [Sample(evil, evil + odd, 1.0, [evil, odd], [0.1, 2.0], [False, True])])
    text, parsed = page(log.folder)
    assert not {"script", "img"} & {tag for tag, _ in parsed.tags}
    assert "&lt;script&gt;alert(" in text
    assert evil in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)


def test_tokens_are_graded_and_marked(tmp_path):
    log = RunLog.open(tmp_path / "run", Config())
    log.write({"step": 1})
    row = Sample("p", "ab c", 0.0, ["a", "b", " c"], [0.0, 2.0, math.nan], [False, True, False])
    log.samples(1, [row])
    spans = [a for tag, a in page(log.folder)[1].tags if tag == "span" and "title" in a]
    assert spans == [
        {"class": "h0", "title": "0.000 nats"},
        {"class": "h10 k", "title": "2.000 nats, selected"},
        {"class": "h0", "title": "entropy not finite"},
    ]


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


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0, 0), (5, 5), (-2, -2), (0, 0.0031), (-0.4, 0.9), (17, 12345), (0, 1e-9)],
)
def test_ticks_enclose_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12


def test_a_gap_breaks_the_line():
    points = [(1, 1.0), (2, 2.0), (3, None), (4, 3.0), (5, 1.0)]
    svg = plot([Line("a", points, "c1")], "unit")
    line = re.search(r'class="line c1" d="([^"]*)"', svg)
    assert line is not None
    assert line[1].count("M") == 2


def test_a_plot_without_values_is_refused():
    with pytest.raises(ValueError, match="nothing to plot"):
        plot([Line("a", [(1, None)], "c1")], "unit")
