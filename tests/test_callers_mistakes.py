"""Every argument of the head, the losses and the selection with every kind of wrong value: a
ValueError that names the argument and what came.
"""

from functools import partial

import numpy as np
import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import _arguments
from tests import mistakes
from tests.head_cases import logprob_entropy
from tests.loss_cases import PLACES, grouped, policy_loss, ratio_loss
from tests.marks import sampled
from tests.mistakes import (
    ADVANTAGE,
    ENTROPY,
    HIDDEN,
    INF,
    LOGPROB,
    MASK,
    NAN,
    SAMPLE,
    TARGET,
    WEIGHT,
    B,
    Call,
    D,
    L,
    V,
    check,
    contents,
    each,
)

pytestmark = sampled(0.2)

HEAD = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET}
HALF = (torch.int64, torch.bool, torch.float64, torch.complex64)
WRONG_HEAD = {
    "hidden": mistakes.tensor(HIDDEN, *HALF),
    "weight": mistakes.tensor(WEIGHT, *HALF),
    "target": mistakes.tensor(TARGET, torch.int8, torch.float32, torch.bool),
    "bias": mistakes.tensor(torch.zeros(V), *HALF, optional=True),
    "temperature": mistakes.number(0, -1.0, INF, of=(B, L))
    | {"a negative tensor": (torch.tensor([-1.0]), "-1"), "0-dim": (torch.tensor(NAN), "nan")},
    "softcap": mistakes.number(0, -1.0, INF, optional=True),
    "logit_scale": mistakes.number(0, -1.0, INF),
}
WRONG_BACKEND = {
    "max_active_rows": mistakes.whole(-1, INF, optional=True),
    "main_grad": mistakes.tensor(torch.zeros(V, D), torch.bfloat16, torch.bool, optional=True),
    "impl": mistakes.word(),
}
LOSS = {"old_logprob": LOGPROB, "advantage": ADVANTAGE, "mask": MASK}


LOGPROBS = partial(contents, LOGPROB)
WRONG_LOSS = {
    "old_logprob": mistakes.floats(LOGPROB, optional=True) | LOGPROBS(INF, -INF, 0.75),
    "advantage": mistakes.floats(ADVANTAGE) | contents(ADVANTAGE, INF, -INF),
    "mask": mistakes.mask(MASK),
}
CLIP = mistakes.number(-0.1, optional=True, of=(B, L)) | contents(ENTROPY, -0.5, NAN)
WRONG_OPTIONS = {
    "selected": mistakes.mask(MASK, optional=True),
    "loss_type": {
        "a word": ("foo", "'foo'"),
        "a list": (["dapo"], "list"),
        "None": (None, "None"),
        "a number": (3, "3"),
    },
    "clip_low": CLIP | {"above 1": (1.28, "1.28"), "inf": (INF, "inf")},
    "clip_high": CLIP,
    "dual_clip": mistakes.number(1.0, -3, optional=True),
    "denominator": mistakes.count(),
}
# By its name in a flat table, as tests/loss_cases.py has them.
WRONG_FIELDS = {
    "sequence_over": mistakes.word(optional=True),
    "aggregation": mistakes.word(optional=True),
    "num_sequences": mistakes.count(optional=True),
    "sequence_group": mistakes.group(),
    "token_weight": mistakes.tensor(SAMPLE, torch.int64, torch.complex64, optional=True)
    | contents(SAMPLE, -0.5, INF),
    "sampler_logprob": mistakes.floats(LOGPROB, optional=True) | LOGPROBS(INF, -INF, 0.75),
    "correction": mistakes.word(optional=True),
    "correction_cap": mistakes.number(-1, optional=True),
    "correction_floor": mistakes.number(-1, 2.5, optional=True),
    "reference_logprob": mistakes.floats(LOGPROB, optional=True) | LOGPROBS(INF, -INF, 0.75),
    "kl_coef": mistakes.number(INF, -INF, of=(B, L)) | contents(ENTROPY, INF),
    "kl_type": mistakes.word(),
    "kl_on": mistakes.word(),
    "entropy_coef": mistakes.number(INF, -INF, of=())
    | {
        "a broken tensor": (torch.tensor(NAN), "nan"),
        "an infinite one": (torch.tensor(INF), "inf"),
    },
    "entropy_on": mistakes.word(),
}
GROUPED = ("aggregation", "kl", "correction", "entropy_bonus", "parallel")
GROUPS = {name: mistakes.not_tensors() for name in GROUPED}
TOKENS = {"logprob": LOGPROB, **LOSS}
# What makes an option count.
NEEDS = {"sampler_logprob": LOGPROB, "correction": "tis", "reference_logprob": LOGPROB}
SELECT = {"fraction": mistakes.number(0, -0.2, 1.5, INF)}
WHICH = {"which": mistakes.word(), "scope": mistakes.word(), "group": mistakes.group()}
WRONG_CHOICE = WHICH | {"threshold_tolerance": mistakes.number(1.0, -0.1)}
WRONG_TOKENS = {
    "entropy": mistakes.tensor(ENTROPY, torch.float64, torch.bfloat16, torch.int64),
    "mask": mistakes.mask(MASK, optional=True),
}
PER_TOKEN = torch.zeros(B, L, 2, dtype=torch.int64)
IDS_PER_TOKEN = {
    label: x
    for label, x in mistakes.tensor(
        PER_TOKEN, torch.int8, torch.float32, torch.bool, optional=True
    ).items()
    # Other numbers of ids, and a row of no sequences, are right.
    if label not in ("one less", "0-dim")
}
RUN = {"vocab_group": mistakes.group(), **WRONG_BACKEND}
CALLS = {
    "linear_logprob_entropy": Call(
        logprob_entropy,
        HEAD,
        WRONG_HEAD
        | RUN
        | {
            "ignore_index": mistakes.whole(),
            "keep_logits": mistakes.flag(),
            "keep_logits_above": mistakes.number(optional=True, of=()),
            "statistics": mistakes.word()
            | {
                "a list": ([0.1], "0.1"),
                "a tuple": ((0.1,), "0.1"),
                "an array": (np.zeros(1), "array"),
            }
            | {"names": (["max_prob", "foo"], "foo"), "numbers": ([1, 2], "[1, 2]")},
            "token_ids": IDS_PER_TOKEN
            | {
                "no axis": (torch.tensor(3), "()"),
                "one axis too few": (TARGET, "(2, 3)"),
                "out of range": (torch.tensor([0, V]), str(V)),
                "negative": (torch.tensor([-1, 2]), "-1"),
            },
        },
    ),
    "ratio_loss": Call(
        ratio_loss,
        TOKENS | NEEDS,
        WRONG_LOSS
        | WRONG_OPTIONS
        | WRONG_FIELDS
        | {
            "logprob": mistakes.floats(LOGPROB) | LOGPROBS(0.75),
            "entropy": mistakes.floats(ENTROPY, optional=True),
            "impl": mistakes.word(),
        },
    ),
    "ratio_loss of groups": Call(ek.ratio_loss, TOKENS, GROUPS),
    "high_entropy_policy_loss": Call(
        policy_loss,
        HEAD | LOSS | NEEDS | {"fraction": 1.0},
        WRONG_HEAD
        | RUN
        | WRONG_LOSS
        | WRONG_OPTIONS
        | WRONG_FIELDS
        | SELECT
        | WRONG_CHOICE
        | {"threshold": mistakes.number(optional=True, of=())},
    ),
    "high_entropy_policy_loss of selected": Call(
        policy_loss,
        HEAD | LOSS | NEEDS | {"selected": MASK},
        WRONG_HEAD
        | RUN
        | WRONG_LOSS
        | {k: x for k, x in (WRONG_OPTIONS | WRONG_FIELDS).items() if k != "clip_low"},
    ),
    "high_entropy_policy_loss of groups": Call(
        ek.high_entropy_policy_loss, {"head": ek.Head(**HEAD), **LOSS}, GROUPS
    ),
    "high_entropy_policy_loss of a head": Call(
        ek.high_entropy_policy_loss,
        {"head": ek.Head(**HEAD), **LOSS},
        {name: mistakes.not_tensors() for name in ("head", "selection", "backend")},
    ),
    "HighEntropyPolicyLoss": Call(
        lambda **options: ek.HighEntropyPolicyLoss(**grouped(options, head=True)),
        {"loss_type": "dapo"},
        SELECT
        | {
            name: (WRONG_OPTIONS | WRONG_FIELDS | RUN | WRONG_CHOICE)[name]
            for name in ("dual_clip", "sequence_over", "aggregation", "correction", "kl_type")
            + ("kl_on", "entropy_coef", "entropy_on", "loss_type", "vocab_group", "impl")
            + ("sequence_group", "max_active_rows", *WRONG_CHOICE)
        }
        | {
            name: {k: x for k, x in found.items() if k not in ("a tensor", "elsewhere")}
            for name, found in {
                "clip_low": mistakes.number(-0.1, 1.28, optional=True),
                "denominator": mistakes.count(),
            }.items()
        },
    ),
    "entropy_threshold": Call(
        ek.entropy_threshold,
        {"entropy": ENTROPY, "mask": MASK},
        WRONG_TOKENS | SELECT | {"group": mistakes.group(), "impl": mistakes.word()},
    ),
    "top_entropy_mask": Call(
        ek.top_entropy_mask,
        {"entropy": ENTROPY, "mask": MASK, "which": "random"},
        WRONG_TOKENS
        | SELECT
        | WHICH
        | {"ties": mistakes.word(), "generator": mistakes.generator(), "impl": mistakes.word()},
    ),
}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_right_arguments_are_taken(call):
    call.function(**call.right)


# What errors call an option of a flat table.
FIELDS = {name: field for name, (_, field) in PLACES.items()}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("call", "name", "value", "came"), list(each(CALLS)))
def test_a_mistake_names_the_argument_and_what_came(call, name, value, came):
    check(call, name, value, came, name if call.wrong is GROUPS else FIELDS.get(name, name))


@pytest.fixture
def warned(monkeypatch):
    monkeypatch.setattr(_arguments, "_warned", set())


@pytest.mark.usefixtures("unchecked_shapes", "warned")
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "gspo", "gspo_token", "luspo"])
def test_a_bound_given_as_a_distance_warns_once_where_it_was_given(loss_type):
    clips = {"loss_type": loss_type, "clip_low": 0.8, "clip_high": 1.28}
    with pytest.warns(
        UserWarning, match=r"clipped at 2\.28.*clip_high=0\.28, and.*clip_low=0\.2"
    ) as got:
        ek.ratio_loss(**TOKENS, **clips)
    assert len(got) == 1
    ek.ratio_loss(**TOKENS, **clips)


LEGAL = {
    "no clip": {"clip_low": 1.0, "clip_high": INF},
    "far": {"clip_low": 0.2, "clip_high": 10.0},
    "cispo": {"loss_type": "cispo", "clip_low": 10.0, "clip_high": 1.28},
    "cispo's own": {"loss_type": "cispo", "clip_high": 4.0},
    "gmpo": {"loss_type": "gmpo", "clip_low": 1.5, "clip_high": 1.5},
    "dppo_tv": {"loss_type": "dppo_tv", "clip_low": 1.0, "clip_high": 1.5},
    "a cost": {"entropy_coef": -0.01, "entropy": ENTROPY},
    "no correction": {"sampler_logprob": LOGPROB.masked_fill(MASK, NAN), "correction": "tis"},
    "numpy's numbers": {"clip_low": np.float32(0.2), "denominator": np.int64(3)},
    "rounding": {"old_logprob": torch.full((B, L), 1e-4)},
    "16 bits": {"old_logprob": torch.full((B, L), 0.125, dtype=torch.bfloat16)},
    "anything outside": {"old_logprob": LOGPROB.masked_fill(~MASK, INF)},
    "nothing": {"mask": MASK & False},
    "nothing known": {"mask": MASK & False, "old_logprob": torch.full((B, L), NAN)},
}


@pytest.mark.usefixtures("unchecked_shapes", "warned")
@pytest.mark.parametrize("options", LEGAL.values(), ids=LEGAL)
def test_what_is_legal_neither_raises_nor_warns(options):
    loss, _ = ratio_loss(**TOKENS | options)
    assert loss.isfinite()


@pytest.mark.usefixtures("unchecked_shapes")
def test_values_are_not_looked_at_in_a_graph():
    """There, as on a GPU, they would have to be waited for."""
    step = torch.compile(ek.ratio_loss, fullgraph=True, backend="aot_eager")
    for options in ({}, {"old_logprob": LOGPROB.exp()}, {"clip_low": 0.8, "clip_high": 1.28}):
        assert step(**TOKENS | options)[0].isfinite()
