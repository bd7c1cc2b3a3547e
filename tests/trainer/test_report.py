"""The report of a run: all that was logged, nothing from outside, no HTML of the model's."""

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trainer.config import Config
from trainer.log import RunLog, Sample
from trainer.report import write_report
from trainer.report_plots import Line, _ticks, plot

WORDS = ["<think>", "\n", "Since", " the", " sum", " is", " 12", ",", " try", " 7", "+", "5", "."]
VOID = {"meta", "br"}


def metrics_row(rng: random.Random, step: int, steps: int) -> dict[str, float]:
    """What a healthy run logs at `step`: entropies fall, reward rises, both with noise."""
    done = step / steps
    tau = 0.9 - 0.35 * done + rng.gauss(0, 0.03)
    seconds, rows = 2.4 + rng.gauss(0, 0.1), rng.randint(9000, 11000)
    return {
        "step": step,
        "reward/mean": 0.3 + 0.4 * (1 - math.exp(-3 * done)) + rng.gauss(0, 0.04),
        "response/length": 31 + 9 * done + rng.gauss(0, 1.2),
        "response/truncated": 0.02,
        "entropy/mean": 0.32 - 0.1 * done + rng.gauss(0, 0.01),
        "entropy/p50": 0.05 - 0.03 * done,
        "entropy/p80": tau,
        "entropy/p95": 1.7 - 0.4 * done + rng.gauss(0, 0.04),
        "entropy/threshold": tau,
        "entropy/kept_fraction": 0.2 + rng.gauss(0, 0.003),
        "entropy/kept_mean": tau + 0.4,
        "head/rows": rows,
        "head/active_rows": rows // 5,
        "clip/low": abs(rng.gauss(0.006, 0.002)),
        "clip/high": abs(rng.gauss(0.011, 0.003)),
        "loss": rng.gauss(0, 0.02),
        "grad_norm": abs(rng.gauss(0.5, 0.1)),
        "tokens_per_second": rows / seconds,
        "time/step": seconds,
        "time/sample": 0.55 * seconds,
        "time/score": 0.1 * seconds,
        "time/update": 0.35 * seconds,
        "time/head": seconds * (0.12 + rng.gauss(0, 0.01)),
    }


def samples(rng: random.Random, heat: float, count: int = 6, length: int = 70) -> list[Sample]:
    rows = []
    for i in range(count):
        tokens = [rng.choice(WORDS) for _ in range(length)]
        entropy = [rng.expovariate(1 / heat) for _ in tokens]
        kept = [h > 1.6 * heat for h in entropy]
        prompt = "Reach 24 from 3, 5, 7 and 9 with + - * /.\nAnswer in one line."
        rows.append(Sample(prompt, "".join(tokens), float(i % 2), tokens, entropy, kept))
    return rows


def make_run(folder: Path, steps: int = 120) -> RunLog:
    """A run as the trainer logs it: step 0 has an evaluation only."""
    rng = random.Random(0)
    log = RunLog.open(folder, Config(name=folder.name, steps=steps), device="a test")
    for step in range(steps + 1):
        row = metrics_row(rng, step, steps) if step else {"step": step}
        if step % 20 == 0:
            gain = 0.3 * (1 - math.exp(-3 * step / steps)) + rng.gauss(0, 0.01)
            row |= {"eval/accuracy": 0.31 + gain, "eval/greedy": 0.38 + gain, "time/evaluate": 3.0}
            row |= {"eval/length": 31 + 9 * step / steps}
        log.write(row)
        if step == 1 or (step and step % 20 == 0):
            log.samples(step, samples(rng, 0.4 - 0.2 * step / steps))
    return log


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


def page(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text("utf-8")
    return text, Page(text)


def test_page_of_a_whole_run(tmp_path):
    log = make_run(tmp_path / "demo")
    text, parsed = page(log.folder)
    assert len(text) < 1_500_000
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 10
    assert "Not logged" not in parsed.text
    assert "top 20% of tokens by old entropy" in parsed.text
    assert re.search(r"31\.\d% at step 0, \d\d\.\d% at step 120", parsed.text)
    assert "RL step" in parsed.text
    assert "nats" in parsed.text
    assert "Step 1\n" in parsed.text
    assert "Step 120\n" in parsed.text


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
        {"class": "h10 k", "title": "2.000 nats, kept"},
        {"class": "h0", "title": "entropy not finite"},
    ]


def test_long_responses_and_runs_stay_small(tmp_path):
    log = RunLog.open(tmp_path / "run", Config())
    rng = random.Random(0)
    for step in range(1, 3001):
        log.write(metrics_row(rng, step, 3000))
    for step in (1, 3000):
        log.samples(step, samples(rng, 0.4, count=8, length=3000))
    text, parsed = page(log.folder)
    assert len(text) < 1_500_000
    assert "2600 more tokens" in parsed.text


def test_missing_metrics_are_named(tmp_path):
    log = RunLog.open(tmp_path / "run", Config())
    log.write({"step": 1, "reward/mean": 0.5})
    _, parsed = page(log.folder)
    assert "Not logged in this run: eval/accuracy or eval/greedy" in parsed.text
    assert "fewer than two values of eval/accuracy" in parsed.text
    assert "No responses were written" in parsed.text
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 1


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
    ticks = _ticks(low, high, 4)
    assert 2 <= len(ticks) <= 9
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12


def test_a_gap_breaks_the_line():
    points = [(1, 1.0), (2, 2.0), (3, None), (4, 3.0), (5, 1.0)]
    svg = plot([Line("a", points, "c1")], "unit")
    line = re.search(r'class="line c1" d="([^"]*)"', svg)
    assert line is not None
    assert line[1].count("M") == 2


def test_a_plot_without_values_is_refused():
    with pytest.raises(ValueError, match="nothing to plot"):
        plot([Line("a", [(1, None)], "c1")], "unit")
