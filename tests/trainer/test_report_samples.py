"""The samples of a report: which are shown, and how their tokens are."""

import json
import math
import random
import re

import pytest

import trainer.report.page
import trainer.report.samples
import trainer.run
from tests.trainer.report_cases import samples, unscored
from tests.trainer.test_report import page
from trainer.config import Config
from trainer.log import RunLog, Sample
from trainer.report.samples import ends
from trainer.report.skips import KINDS


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
