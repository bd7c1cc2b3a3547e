"""As tests/test_callers_mistakes.py: the rest of what is public, and misspelt keywords.

Liger's call convention raises Liger's errors: tests/integrations/test_liger_exceptions.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import distributed, losses, token_rules
from entropy_kernels.integrations import hf, trl, verl
from tests import mistakes
from tests.marks import sampled
from tests.mistakes import (
    ADVANTAGE,
    ENTROPY,
    INF,
    LOGPROB,
    MASK,
    NAN,
    SAMPLE,
    Call,
    Mistakes,
    check,
    each,
)
from trainer.tiny.model import build_tiny

pytestmark = sampled(0.2)

TOKENS = {"logprob": LOGPROB, "old_logprob": LOGPROB, "advantage": ADVANTAGE, "mask": MASK}
FRACTION = mistakes.number(0, -0.2, 1.5, INF)
# One tensor alone has no wrong shape and device.
ALONE = {"0-dim", "one less", "transposed", "a row", "elsewhere"}


def alone(found: Mistakes) -> Mistakes:
    return {label: x for label, x in found.items() if label not in ALONE}


def streaming(method: str, mode: str = "exact") -> Callable[..., Any]:
    def call(**options: Any) -> Any:
        threshold = ek.StreamingThreshold(mode=mode)
        threshold.update(ENTROPY, MASK)
        return getattr(threshold, method)(**options)

    return call


def seen(mode: str) -> dict[str, Any]:
    threshold = ek.StreamingThreshold(mode=mode)
    threshold.update(ENTROPY)
    return threshold.state_dict()


def wrong_state(mode: str) -> Mistakes:
    state, kept = seen(mode), "counts" if mode == "sketch" else "entropies"
    found = mistakes.not_tensors()
    for name in state:
        found[f"without {name}"] = ({k: x for k, x in state.items() if k != name}, name)
    found["of another fraction"] = (state | {"fraction": 0.5}, "0.5")
    found["of another kind"] = (state | {kept: state[kept].half()}, "float16")
    return found | {"of lists": (state | {kept: [1.0]}, "list")}


def of_loss(name: str) -> Call:
    function = getattr(losses, name)
    options: dict[str, Mistakes] = {
        "clip_low": mistakes.number(-1, of=(2, 3)),
        "clip_high": mistakes.number(-1, of=(2, 3)),
        "dual_clip": mistakes.number(1, optional=True),
        "sequence_group": mistakes.group(),
    }
    options |= {k: mistakes.number(0, -1) for k in ("tau_pos", "tau_neg", "cap")}
    options |= {k: mistakes.number(INF) for k in ("k_pos", "k_neg", "lambda_pos", "lambda_neg")}
    tensors = {k: mistakes.floats(x) for k, x in TOKENS.items() if k != "mask"}
    takes = function.__wrapped__.__kwdefaults__ or {}
    own = {k: options[k] for k in takes}
    return Call(function, TOKENS, tensors | {"mask": mistakes.mask(MASK)} | own)


RULE = {"logprob": LOGPROB, "advantage": ADVANTAGE, "mask": MASK}
WRONG_RULE = {
    "logprob": mistakes.floats(LOGPROB),
    "advantage": mistakes.floats(ADVANTAGE),
    "mask": mistakes.mask(MASK),
}
SHARE = {"fraction": FRACTION}
STATISTICS = {"max_prob": SAMPLE, "sum_p2": SAMPLE, "sum_p2_logp": -SAMPLE, "entropy": ENTROPY}
PAIR = {
    "a number": (0.2, "0.2"),
    "one": ((0.2,), "tuple"),
    "words": (("0.1", 0.2), "'0.1'"),
    "negative": ((0.2, -0.1), "-0.1"),
    "nan": ((NAN, 0.1), "nan"),
    "None": (None, "None"),
}


LOSSES = sorted({function.__name__ for function, _ in losses.LOSSES.values()})
SELECT = {"entropy": ENTROPY, "mask": MASK}
WRONG_SELECT = {
    "entropy": mistakes.tensor(ENTROPY, torch.float64, torch.bfloat16, torch.int64),
    "mask": mistakes.mask(MASK, optional=True),
}
OF_RANKS = {
    "all_reduce_sum": "tensor",
    "sum_over_ranks": "tensor",
    "all_reduce_max": "tensor",
    "gather_counts": "counts",
    "rank_offset": "count",
    "global_count": "mask",
}
IMPL = {"impl": mistakes.word()}
IDS = torch.tensor([[1, 2, 3, 4]])


def of_ranks(name: str, argument: str) -> Call:
    """Without a group nothing moves."""
    right = {argument: MASK if argument == "mask" else torch.ones(2), "group": None}
    wrong = {argument: mistakes.not_tensors(), "group": mistakes.group()}
    return Call(getattr(distributed, name), right, wrong)


def at_hand(found: Mistakes) -> Mistakes:
    """A patched model moves them to where its head is."""
    return {label: x for label, x in found.items() if label != "elsewhere"}


def patch_head(**options: Any) -> None:
    hf.patch_lm_head(**({"model": build_tiny(0)[0]} | options)).undo()


def patched_model(**options: Any) -> Any:
    model, _ = build_tiny(0)
    with hf.patch_lm_head(model):
        return model(IDS, **options)


GRAD = {"logprob": LOGPROB, "entropy": ENTROPY}
CALLS = {f"losses.{name}": of_loss(name) for name in LOSSES} | {
    "losses.bounded": Call(
        losses.bounded, {"log_ratio": LOGPROB}, {"log_ratio": alone(mistakes.floats(LOGPROB))}
    ),
    "covariance": Call(token_rules.covariance, RULE, WRONG_RULE),
    "clip_cov": Call(
        token_rules.clip_cov,
        RULE,
        WRONG_RULE
        | SHARE
        | {
            "low": mistakes.number(),
            "high": mistakes.number(),
            "clipped": mistakes.mask(MASK, optional=True),
            "generator": mistakes.generator(),
        },
    ),
    "kl_cov": Call(token_rules.kl_cov, RULE, WRONG_RULE | SHARE),
    "entropy_advantage": Call(
        token_rules.entropy_advantage,
        {"advantage": ADVANTAGE, "entropy": ENTROPY},
        {
            "advantage": mistakes.floats(ADVANTAGE),
            "entropy": mistakes.floats(ENTROPY),
            "alpha": mistakes.number(INF),
            "kappa": mistakes.number(0, -1),
        },
    ),
    "two_clip_ranges": Call(
        token_rules.two_clip_ranges,
        {"high_entropy": MASK},
        {"high_entropy": alone(mistakes.mask(MASK)), "low": PAIR, "high": PAIR},
    ),
    "select_token": Call(
        token_rules.select_token,
        {"logprob": LOGPROB, "max_prob": SAMPLE, "sum_p2": SAMPLE, "mask": MASK},
        {
            "logprob": mistakes.floats(LOGPROB),
            "max_prob": mistakes.floats(SAMPLE),
            "sum_p2": mistakes.floats(SAMPLE),
            "mask": mistakes.mask(MASK),
            "below": mistakes.number(0, 1.5),
        },
    ),
    "discriminator": Call(
        token_rules.discriminator, GRAD, {k: mistakes.floats(x) for k, x in GRAD.items()}
    ),
    "expected_discriminator": Call(
        token_rules.expected_discriminator,
        {k: x for k, x in STATISTICS.items() if k != "max_prob"},
        {k: mistakes.floats(x) for k, x in STATISTICS.items() if k != "max_prob"},
    ),
    "clip_discriminator": Call(
        token_rules.clip_discriminator,
        {"score": SAMPLE, "advantage": ADVANTAGE, "mask": MASK},
        {
            "score": mistakes.floats(SAMPLE),
            "advantage": mistakes.floats(ADVANTAGE),
            "mask": mistakes.mask(MASK),
            "centre": mistakes.floats(SAMPLE, optional=True),
            "mu": mistakes.number(-1),
        },
    ),
    "gradient_magnitude": Call(
        token_rules.gradient_magnitude,
        GRAD | {"old_logprob": LOGPROB, "advantage": ADVANTAGE},
        {
            **{name: mistakes.floats(LOGPROB) for name in ("logprob", "old_logprob", "entropy")},
            "advantage": mistakes.floats(ADVANTAGE),
            "clip_low": mistakes.number(-1),
            "clip_high": mistakes.number(-1),
            "reference_logprob": mistakes.floats(LOGPROB, optional=True),
            "kl_coef": mistakes.number(INF),
        },
    ),
    "silence_spurious": Call(
        token_rules.silence_spurious,
        GRAD | {"advantage": ADVANTAGE, "mask": MASK, "threshold": torch.tensor(0.5)},
        {
            **{name: mistakes.floats(LOGPROB) for name in ("logprob", "entropy")},
            "advantage": mistakes.floats(ADVANTAGE),
            "mask": mistakes.mask(MASK),
            "threshold": mistakes.not_tensors() | {"two values": (torch.zeros(2), "(2,)")},
            "below": mistakes.number(0, 1.5),
        },
    ),
    "surprisal_band": Call(
        token_rules.surprisal_band,
        GRAD | {"mask": MASK},
        {
            **{name: mistakes.floats(LOGPROB) for name in ("logprob", "entropy")},
            "mask": mistakes.mask(MASK),
            "low": mistakes.number(-1),
            "high": mistakes.number(0.1),
        },
    ),
    "random_tokens": Call(
        token_rules.random_tokens,
        {"mask": MASK},
        {"mask": alone(mistakes.mask(MASK)), **SHARE, "generator": mistakes.generator()},
    ),
    "random_prefixes": Call(
        token_rules.random_prefixes,
        {"mask": MASK},
        {
            "mask": alone(mistakes.mask(MASK)),
            **SHARE,
            "least": mistakes.number(0, 1.5),
            "lengths": mistakes.not_tensors(optional=True),
            "generator": mistakes.generator(),
        },
    ),
    "StreamingThreshold": Call(
        lambda **options: ek.StreamingThreshold(**options),
        {},
        {"fraction": FRACTION, "mode": mistakes.word(), "group": mistakes.group(), **IMPL},
    ),
    "EntropyController": Call(
        lambda **options: ek.EntropyController(**options),
        {"target": 0.2},
        {
            "target": mistakes.number(-0.1, INF)
            | {"three": ((0.1, 0.2, 0.3), "0.3"), "upside down": ((0.3, 0.1), "(0.3, 0.1)")},
            "coef": mistakes.number(-0.1, 1.1, INF),
            "delta": mistakes.number(-0.1, INF),
            "bounds": mistakes.number() | {"upside down": ((1.0, 0.0), "(1.0, 0.0)")},
            "group": mistakes.group(),
        },
    ),
    "update of a controller": Call(
        lambda **options: ek.EntropyController(0.2).update(**options),
        {"entropy": 0.1, "tokens": 3},
        {"entropy": mistakes.number(-0.1, INF), "tokens": mistakes.number(-1, INF)},
    ),
    "load_state_dict of a controller": Call(
        lambda state: ek.EntropyController(0.2).load_state_dict(state),
        {"state": {"coef": 0.1, "entropy": None}},
        {
            "state": mistakes.not_tensors()
            | {
                "a name": ({"coef": 0.1}, "'coef'"),
                "a broken coef": ({"coef": NAN, "entropy": 0.1}, "nan"),
                "a word": ({"coef": 0.1, "entropy": "low"}, "'low'"),
            }
        },
    ),
    "update": Call(streaming("update"), SELECT, WRONG_SELECT),
    "mask": Call(streaming("mask"), SELECT, WRONG_SELECT),
    "load_state_dict": Call(
        streaming("load_state_dict"), {"state": seen("exact")}, {"state": wrong_state("exact")}
    ),
    "load_state_dict of a sketch": Call(
        streaming("load_state_dict", "sketch"),
        {"state": seen("sketch")},
        {"state": wrong_state("sketch")},
    ),
    **{name: of_ranks(name, argument) for name, argument in OF_RANKS.items()},
    "patch_trl": Call(
        lambda **o: trl.patch_trl(**o).undo(), {}, {"scope": mistakes.word(), **IMPL}
    ),
    "patch_lm_head": Call(patch_head, {}, {"model": mistakes.not_tensors(), **IMPL}),
    "a patched model": Call(
        patched_model,
        {"target": IDS},
        {
            "target": at_hand(mistakes.tensor(IDS, torch.float32, optional=True)),
            "temperature": at_hand(mistakes.number(0, -1.0, INF, of=(1, 4))),
            "statistics": {"a word": ("foo", "foo"), "a number": (3, "3"), "names": (["a"], "a")},
            "token_ids": mistakes.not_tensors(optional=True)
            | {"floats": (torch.rand(2), "float32"), "out of range": (torch.tensor([-1]), "-1")},
        },
    ),
}
PATCH_VERL = Call(
    verl.patch_verl,
    {},
    {
        "fraction": FRACTION,
        "over_ranks": mistakes.flag(),
        "denominator": mistakes.word(),
        **IMPL,
    },
)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_right_arguments_are_taken(call):
    call.function(**call.right)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "name", "value", "came"), list(each(CALLS | {"patch_verl": PATCH_VERL}))
)
def test_a_mistake_names_the_argument_and_what_came(call, name, value, came):
    check(call, name, value, came)
