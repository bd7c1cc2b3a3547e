"""The CUDA kernel that merges vocabulary splits, on fibers: every digit of fp64's results.

T tokens, V vocabulary, S vocabulary splits, C columns of a split.
"""

import math

import numpy as np
import pytest
import torch

from entropy_kernels.verification.truth import scale_to_entropy

from . import host
from .answers import answers

IGNORE = -100
LOWEST = np.float32(-1e30)
LOG2E = np.float32(1.4426950408889634)
EPS = float(np.finfo(np.float32).eps)
NAMES = ("logprob", "entropy", "logsumexp", "max", "log_sum")
MUTANTS = [
    host.Mutant(name, "merge.cu", old, new)
    for name, old, new in (
        ("first barrier left out", "__syncthreads();\n    if (y < half)", "if (y < half)"),
        ("second barrier left out", "rows), scale);\n    __syncthreads();", "rows), scale);"),
        ("splits past the last", "if (j * step < a.splits - first)", "if (first < a.splits)"),
        ("splits at once, once", "first += kAtOnce * step", "first += a.splits"),
        ("1 taken from a rounded sum", "sums.s + (sums.n - 1.0f)", "(sums.s + sums.n) - 1.0f"),
        ("log without its digits", "log1p(rest),", "logf(1.0f + rest),"),
        ("target above the maximum", "if (above > 0.0f) above = 0.0f;", ""),
        ("row's own place for its slot", "? a.slot[t] :", "? int(t) :"),
        ("shared temperature", "a.temperature[t * a.stride_temperature]", "a.temperature[0]"),
        (
            "maximum over the temperature",
            "write(a.max, sums.m)",
            "write(a.max, sums.m / temperature)",
        ),
        ("negative temperature", "temperature > 0.0f &&", ""),
        ("infinite temperature", "temperature < INFINITY &&", ""),
        ("target of V", "target < a.vocabulary &&", "target <= a.vocabulary &&"),
        ("no row has a maximum", "sums.m > kLowest &&", ""),
        ("NaN answered", "&& rest == rest;", ";"),
        ("ignored rows NaN", "!valid ? 0.0f : defined", "defined"),
        ("statistics of the maximum lost", "(sums.q + sums.n) *", "sums.q *"),
        ("variance about the maximum", "sums.u * sums.u", "0.0f"),
        ("last rows left out", "a.rows) + rows - 1) / rows)", "a.rows)) / rows)"),
    )
]
STATISTICS = ("varentropy", "max_prob", "sum_p2", "sum_p2_logp")


class Case:
    """Logits, fp32 [T, V], their sums over S splits, and what the results must be.

    temperature: None, one for all rows, or one per row, which lie three apart.
    slots: the rows that have a target lie first, and the others are not there.
    """

    def __init__(self, logits, splits, *, target=None, temperature=None, slots=False, more=False):
        self.z, self.splits, self.more = np.asarray(logits, np.float32), splits, more
        (self.rows, self.columns), self.slots = self.z.shape, slots
        self.target = np.arange(self.rows) % self.columns if target is None else np.array(target)
        self.temperature = np.array([], np.float32)
        self.per_row = np.ones(self.rows, np.float32)
        if temperature is not None:
            self.per_row[:] = temperature
            self.temperature = np.array([temperature], np.float32)
            if self.temperature.size > 1:
                self.temperature = np.full(3 * self.rows, np.nan, np.float32)
                self.temperature[::3] = self.per_row

    def numbers(self):
        """What merge_host.cpp reads. What a kernel would not write is NaN."""
        valid = self.target != IGNORE
        inside = valid & (self.target >= 0) & (self.target < self.columns)
        fields = self.sums()
        logit = np.full(self.rows, np.nan, np.float32)
        logit[inside] = self.z[inside, self.target[inside]]
        # Rounded in another order, the largest may come out larger.
        logit[logit == self.z.max(1, initial=LOWEST)] *= np.float32(1 + EPS)
        slot = np.array([], np.int32)
        fields[:, :, ~valid] = np.nan
        if self.slots:
            slot = np.where(valid, valid.cumsum() - 1, -1).astype(np.int32)
            order = np.argsort(~valid, kind="stable")
            fields, logit = fields[:, :, order], logit[order]
        stride = 0 if self.temperature.size < 2 else 3
        sizes = [self.rows, self.columns, self.splits, IGNORE, slot.size, self.temperature.size]
        yield np.array([*sizes, stride, self.more], np.int64)
        yield from (np.ascontiguousarray(fields), logit, self.target.astype(np.int64))
        yield from (slot, self.temperature)

    @np.errstate(all="ignore")
    def sums(self):
        """[4 or 7, S, T], as a kernel of the head would leave them, each rounded once."""
        each = -(-self.columns // self.splits)
        pad = ((0, 0), (0, each * self.splits - self.columns))
        z = np.pad(self.z, pad, constant_values=LOWEST).reshape(self.rows, self.splits, each)
        m = np.fmax.reduce(z, axis=2, initial=LOWEST)
        scale = (LOG2E / self.per_row)[:, None, None]
        d = (z - m[:, :, None]).astype(np.float64) * scale
        e, near, top = np.exp2(d), np.fmax(d, -125.0), d == 0
        # A split without a column holds no maximum.
        top &= (m > LOWEST)[:, :, None]
        e = np.where((m > LOWEST)[:, :, None], e, 0.0)
        square = np.where(top, 0, e * e)
        found = [m, top.sum(2), np.where(top, 0, e).sum(2), (e * near).sum(2)]
        if self.more:
            found += [(e * near**2).sum(2), square.sum(2), (square * near).sum(2)]
        return np.stack(found).transpose(0, 2, 1).astype(np.float32)

    @np.errstate(all="ignore")
    def truth(self, dtype=np.float64):
        """Results by name, in a form that keeps all digits of rows that are nearly certain."""
        scale = self.per_row.astype(dtype)
        z = self.z.astype(dtype)
        m = np.fmax.reduce(z, axis=1, initial=LOWEST)
        d = (z - m[:, None]) / scale[:, None]
        e = np.exp(d)
        log_sum = np.log1p(np.where(d == 0, 0, e).sum(1) + ((d == 0).sum(1) - 1).astype(dtype))
        p, logp = e / np.exp(log_sum)[:, None], d - log_sum[:, None]
        plogp = np.where(p == 0, 0, p * np.where(p == 0, 0, logp))
        entropy = -plogp.sum(1)
        apart = np.where(p == 0, 0, logp + entropy[:, None])
        inside = (self.target >= 0) & (self.target < self.columns)
        at = np.where(inside, self.target, 0)[:, None]
        logprob = np.minimum(np.take_along_axis(d, at, 1)[:, 0], 0) - log_sum
        found = [logprob, entropy, m / scale + log_sum, m, log_sum]
        if self.more:
            found += [(p * apart**2).sum(1), p.max(1), (p * p).sum(1), (p * plogp).sum(1)]
        answered = inside & (m > LOWEST) & ~np.isnan(e).any(1)
        answered &= (self.per_row > 0) & (self.per_row < np.inf)
        names = NAMES + STATISTICS * self.more
        ignored = self.target == IGNORE
        return {
            name: np.where(ignored, 0, np.where(answered, x, np.nan))
            for name, x in zip(names, found, strict=True)
        }


def results(program, cases, seed=0):
    """The results of every case, by name."""
    numbers = (x for case in cases for x in case.numbers())
    written = np.frombuffer(answers(program, numbers, seed), np.float32)
    found, start = [], 0
    for case in cases:
        rows = {}
        for name in NAMES + STATISTICS * case.more:
            rows[name] = written[start : start + case.rows]
            start += case.rows
        found.append(rows)
    assert start == len(written)
    return found


def sizes(truth, per_row):
    """What the rounding of each result is relative to: what it is a sum of, without its sign."""
    found = {name: np.abs(x) for name, x in truth.items()}
    found["logsumexp"] = np.abs(truth["max"] / per_row) + truth["log_sum"]
    if "varentropy" in found:
        found["varentropy"] = truth["varentropy"] + (truth["entropy"] - truth["log_sum"]) ** 2
    return found


@np.errstate(all="ignore")
def check(program, cases):
    """Each element errs at most twice as far as the formula does in plain fp32, and by rounding."""
    for got, case in zip(results(program, cases), cases, strict=True):
        plain, truth = case.truth(np.float32), case.truth()
        for name, size in sizes(truth, case.per_row).items():
            exact = ~np.isfinite(truth[name]) | (truth[name] == 0)
            np.testing.assert_array_equal(got[name][exact], truth[name][exact], name)
            error, of_plain = (np.abs(x[name] - truth[name])[~exact] for x in (got, plain))
            worst = (of_plain / size[~exact]).max(initial=0)
            bound = (2 * worst + 4 * EPS) * size[~exact]
            wrong = ~(error <= bound)
            assert not wrong.any(), f"{name}: errors {error[wrong]} of {truth[name][~exact][wrong]}"


def peaked(rows, columns, seed=0):
    """Rows whose entropies are log-uniform from 1e-9 to 10 nats, or what V allows."""
    z = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    wanted = 10 ** torch.linspace(-9, min(1.0, math.log10(0.9 * math.log(columns))), rows)
    return (z * scale_to_entropy(z, wanted)).numpy()


def tied(rows, columns):
    """Small integers: the maximum lies in several splits."""
    return np.random.default_rng(1).integers(0, 3, (rows, columns))


def broken(rows=40, columns=90):
    """Infinities and NaN among ordinary rows, and columns that are -inf in whole splits."""
    z = peaked(rows, columns)
    z[0] = -np.inf
    z[1, 5] = np.nan
    z[2, 7] = np.inf
    z[3, 10:] = -np.inf
    z[4, :-1] = -np.inf
    z[5] = 0.0
    z[6, 3] = -3e38
    z[7] = np.nan
    target = np.arange(rows)
    target[10:20] = IGNORE
    target[20:23] = (columns, -1, 2**40)
    return z, target


def small_cases():
    z, target = broken()
    temperature = np.geomspace(0.2, 4, len(z))
    wrong = np.where(np.arange(len(z)) < 30, temperature, (0, -1, np.nan, -np.inf, np.inf) * 8)
    return [
        Case([[3.0]], 1, more=True),
        Case(tied(7, 30), 5, temperature=0.5, more=True),
        Case(tied(8, 13), 13),
        Case(peaked(1, 1201), 601, target=[17], more=True),
        Case(peaked(9, 1201), 601),
        Case(peaked(33, 300), 1, temperature=0.7, more=True),
        Case(z, 9, target=target, more=True),
        Case(z, 9, target=target, temperature=temperature, slots=True, more=True),
        Case(z, 7, target=target, temperature=wrong, slots=True),
        Case(z, 7, target=[IGNORE] * len(z), slots=True, more=True),
        Case(z[:0], 7),
    ]


def large_cases():
    rows = np.random.default_rng(0).normal(size=(8193, 9)) * 4
    return [
        Case(rows, 9, more=True, slots=True, target=np.where(np.arange(8193) % 5, 3, IGNORE)),
        Case(rows, 2),
        Case(peaked(20, 40000), 157, more=True),
        Case(peaked(20, 40000, 1), 600),
    ]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return lambda **options: host.build(
        tmp_path_factory.mktemp("merge"), [host.HERE / "merge_host.cpp"], **options
    )


@pytest.fixture(scope="module")
def program(build):
    return build()


@pytest.mark.parametrize("cases", [small_cases, large_cases])
def test_every_digit_of_fp64(program, cases):
    check(program, cases())


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_same_bits_in_every_schedule_and_no_race(build, program, sanitizer):
    given = [x for case in small_cases() for x in case.numbers()]
    want = answers(program, given)
    checked = build(sanitizer=sanitizer)
    for seed in range(3):
        assert answers(program, given, seed) == want
        assert answers(checked, given, seed) == want


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_broken_kernels_are_refused(build, mutant):
    broken = build(mutant=mutant, sanitizer="thread" if "barrier" in mutant.name else "")
    with pytest.raises(AssertionError):
        check(broken, small_cases())  # a race fails it, too
