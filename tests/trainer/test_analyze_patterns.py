"""Entropy patterns: streamed statistics against those of all tokens at once, and the files."""

import json
import math
import re

import pytest
import torch

from tests.trainer.analyze_cases import here, models, options, sums  # noqa: F401
from trainer.studies.analyze import main, responses
from trainer.studies.analyze.patterns import Patterns, analyze_patterns
from trainer.studies.analyze.statistics import BINS, EntropyStatistics
from trainer.update import score

RELATIVE = 1 / 512  # what the nine bits of a bin leave out


def stream(token_T, entropy_T, portion, vocabulary=50):
    statistics = EntropyStatistics(vocabulary)
    for start in range(0, len(token_T), portion):
        statistics.update(token_T[start : start + portion], entropy_T[start : start + portion])
    return statistics


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    token_T = torch.randint(0, 40, (20_011,), generator=generator)
    entropy_T = torch.rand(20_011, generator=generator) ** 6 * 3
    entropy_T[::7] = 0.0
    entropy_T[::11] = 0.672
    return token_T, entropy_T


@pytest.mark.parametrize("portion", [1000, 4097, 20_011])
def test_streamed_statistics_are_those_of_all_tokens(tokens, portion):
    token_T, entropy_T = tokens
    found = stream(token_T, entropy_T, portion)
    assert found.count == len(token_T)
    assert found.mean() == pytest.approx(float(entropy_T.double().mean()), rel=1e-9)
    ordered = entropy_T.sort().values
    for percent in (0, 5, 20, 50, 80, 95, 99, 100):
        exact = float(ordered[max(math.ceil(percent / 100 * len(ordered)) - 1, 0)])
        assert found.percentile(percent) == pytest.approx(exact, rel=RELATIVE / 2, abs=0)
    assert found.percentile(100) == float(ordered[-1])
    for edge in (0.0, 0.01, 0.5, 1.0):
        low, high = (
            float((entropy_T < edge * (1 + x)).double().mean()) for x in (-RELATIVE, RELATIVE)
        )
        assert low - 1e-12 <= found.share_below(edge) <= high + 1e-12
    edges = [0.0, 0.1, 1.0, math.inf]
    assert sum(found.shares(edges)) == pytest.approx(1.0)
    by_hand = [(t, entropy_T[token_T == t]) for t in range(40)]
    wanted = sorted((-float(h.mean()), t, len(h)) for t, h in by_hand if len(h) >= 500)
    got = found.tokens(500)
    assert [(t, n) for t, n, _ in got] == [(t, n) for _, t, n in wanted]
    for (_, _, mean), (negated, _, _) in zip(got, wanted, strict=True):
        assert mean == pytest.approx(-negated, rel=1e-5)


def test_two_million_tokens_need_no_more_memory_than_none():
    statistics = EntropyStatistics(1000)
    state = [x for x in vars(statistics).values() if torch.is_tensor(x)]
    before = sum(x.untyped_storage().nbytes() for x in state)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        token_T = torch.randint(0, 1000, (100_000,), generator=generator)
        statistics.update(token_T, torch.rand(100_000, generator=generator))
    assert statistics.count == 2_000_000
    assert statistics.percentile(80) == pytest.approx(0.8, abs=0.004)
    after = [x for x in vars(statistics).values() if torch.is_tensor(x)]
    assert sum(x.untyped_storage().nbytes() for x in after) == before
    assert len(after) == len(vars(statistics)) == 5
    assert before == 16 * BINS + 8 * 2 * 1000


@pytest.mark.parametrize("entropy", [2.9999, 4.6921, 0.01, 11.93], ids=str)
def test_a_percentile_of_equal_entropies_is_their_mean(entropy):
    """All tokens of a model without preferences have about the same entropy."""
    equal = stream(torch.arange(40), torch.full((40,), entropy), 7)
    assert equal.percentile(80) == equal.percentile(5) == pytest.approx(equal.mean(), rel=1e-7)
    assert equal.share_below(equal.mean()) == 0
    # Within one bin of it, three quarters above: as the numbers themselves, not the bin's edge.
    near = torch.full((40,), entropy)
    near[:10] *= 1 - 1e-4
    found = stream(torch.arange(40), near, 40)
    assert found.percentile(80) > found.mean() > found.percentile(1)


@pytest.mark.parametrize(
    ("token", "entropy", "message"),
    [
        ([1, 2], [0.1], "one length"),
        ([50], [0.1], r"\[0, 50\); got 50"),
        ([-1], [0.1], r"\[0, 50\); got -1"),
        ([1], [math.nan], "finite"),
        ([1], [-0.1], "not negative"),
    ],
)
def test_what_is_no_entropy_is_refused(token, entropy, message):
    statistics = EntropyStatistics(50)
    with pytest.raises(ValueError, match=message):
        statistics.update(torch.tensor(token), torch.tensor(entropy))
    assert statistics.count == 0
    with pytest.raises(ValueError, match="no percentile of no tokens"):
        statistics.percentile(50)


def test_the_files_of_an_analysis(models, sums, tmp_path):  # noqa: F811
    settings = Patterns(models[0], **options(sums, tmp_path / "out"), minimum=3, coloured=4)
    found = json.loads(analyze_patterns(settings).read_text())
    assert found["settings"]["model"] == models[0]
    assert 0 < found["count"] <= 10 * 4 * 8
    shares = [token["share"] for token in found["tokens"]]
    assert sum(shares) <= 1 + 1e-9
    assert all(token["count"] >= 3 for token in found["tokens"])
    means = [token["mean"] for token in found["tokens"]]
    assert means == sorted(means, reverse=True)
    assert sum(found["histogram"]["shares"]) == pytest.approx(1.0)
    assert found["percentiles"]["80"] == found["threshold"]
    page = (tmp_path / "out" / "tokens.html").read_text()
    assert page.count("<article") == 4
    assert not re.search(r"""(src|href)=|https?://""", page)
    assert "<svg" in (tmp_path / "out" / "patterns.svg").read_text()


def test_portions_change_nothing(models, sums, tmp_path):  # noqa: F811
    def found(size):
        given = options(sums, tmp_path / str(size)) | {"batch_size": size}
        path = analyze_patterns(Patterns(models[0], **given, minimum=1))
        return json.loads(path.read_text())

    one, other = found(4), found(100)
    assert one["count"] == other["count"]
    assert one["mean"] == pytest.approx(other["mean"], rel=1e-5)
    assert [t["count"] for t in one["tokens"]] == pytest.approx(
        [t["count"] for t in other["tokens"]]
    )


@pytest.mark.parametrize(
    ("options_of", "passes"),
    [({}, 0), ({"impl": "torch"}, 1), ({"top_k": 5}, 1), ({"dtype": "bfloat16"}, 1)],
    ids=str,
)
def test_a_pass_scores_what_the_engine_cannot_report(
    options_of,
    passes,
    models,  # noqa: F811
    sums,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    ran = []
    monkeypatch.setattr(responses, "score", lambda *given: ran.append(0) or score(*given))
    given = options(sums, tmp_path / "out") | {"batch_size": 40} | options_of
    analyze_patterns(Patterns(models[0], **given))
    assert len(ran) == passes


def test_reported_entropies_are_the_policys(models, sums, tmp_path):  # noqa: F811
    def found(impl):
        given = options(sums, tmp_path / impl) | {"impl": impl}
        return json.loads(analyze_patterns(Patterns(models[0], **given, minimum=1)).read_text())

    reported, scored = found("auto"), found("torch")
    assert reported["count"] == scored["count"]
    assert reported["mean"] == pytest.approx(scored["mean"], rel=1e-5)
    means = [{t["token"]: t["mean"] for t in one["tokens"]} for one in (reported, scored)]
    assert means[0] == pytest.approx(means[1], rel=1e-4, abs=1e-5)


def test_bad_settings_are_refused(models, sums, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\]; got 0"):
        Patterns(models[0], **options(sums, tmp_path), fraction=0.0)
    with pytest.raises(ValueError, match="temperature > 0"):
        Patterns(models[0], **options(sums, tmp_path), temperature=0.0)


def test_an_unknown_analysis_shows_what_there_is(capsys):
    assert main(["pattern"]) == 2
    assert "temperatures" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process; torchrun has started 2"):
        main(["patterns"])
