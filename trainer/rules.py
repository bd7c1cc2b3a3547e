"""Rules that choose the tokens of a step, by the names that `algorithm.which` takes.

A rule of your own is a function of `Tokens` that returns a `Choice`; docs/trainer.md has one. What
comes of it must depend on its argument alone: every rank calls it with the same tokens. B
sequences, T response tokens of the step, one sequence after the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

import entropy_kernels as ek
from entropy_kernels import token_rules
from trainer.functions import function_named
from trainer.update import at_least


@dataclass(frozen=True)
class Tokens:
    """What is known of a step's response tokens before its first update."""

    logprob_T: Tensor
    """Log-probs, nats, of the policy that `algorithm.entropy_source` names."""
    entropy_T: Tensor
    """Its entropies, nats."""
    threshold: Tensor
    """The entropy that `fraction` of the tokens reach."""
    advantage_T: Tensor
    """The advantage of each token's response."""
    lengths_B: Tensor
    """int64: the tokens of each response."""
    fraction: float
    """`algorithm.fraction`."""
    generator: Generator
    """What a rule draws from: seeded by run and step, the same on every rank."""
    impl: str = "auto"
    """The backend of selections."""

    @property
    def everything(self) -> Tensor:
        """The mask of all tokens."""
        return torch.ones_like(self.entropy_T, dtype=torch.bool)


@dataclass(frozen=True)
class Choice:
    """The tokens to train on."""

    selected_T: Tensor
    """bool."""
    weight_T: Tensor | None = None
    """Factors of the tokens' losses, fp32 >= 0. With them the loss divides by the number of all
    tokens, whatever `algorithm.denominator` is: 1 / P(selected) leaves the gradient unbiased."""
    kept_length_B: Tensor | None = None
    """int64: responses are cut to these lengths, at least 1, before the forward of an update."""


Rule = Callable[[Tokens], Choice]


def top(tokens: Tokens) -> Choice:
    """The `fraction` of the highest entropies, with ties to rounding."""
    return Choice(at_least(tokens.entropy_T, tokens.threshold))


def bottom(tokens: Tokens) -> Choice:
    """The `fraction` of the lowest entropies."""
    found = ek.top_entropy_mask(
        tokens.entropy_T, fraction=tokens.fraction, which="bottom", impl=tokens.impl
    )
    return Choice(found)


def random(tokens: Tokens) -> Choice:
    """A random `fraction`, as if it were all."""
    found = ek.top_entropy_mask(
        tokens.entropy_T,
        fraction=tokens.fraction,
        which="random",
        generator=tokens.generator,
        impl=tokens.impl,
    )
    return Choice(found)


def stapo(tokens: Tokens) -> Choice:
    """All but `silence_spurious`; an entropy is low below the one that `fraction` reach."""
    given = tokens.logprob_T, tokens.entropy_T, tokens.advantage_T, tokens.everything
    return Choice(token_rules.silence_spurious(*given, tokens.threshold))


def rsi(tokens: Tokens) -> Choice:
    """`surprisal_band`."""
    given = tokens.logprob_T, tokens.entropy_T, tokens.everything
    return Choice(token_rules.surprisal_band(*given))


def gmts(tokens: Tokens) -> Choice:
    """The `fraction` of the highest `gradient_magnitude`: H |A|, as the ratio is still 1."""
    given = tokens.logprob_T, tokens.logprob_T, tokens.entropy_T, tokens.advantage_T
    score_T = token_rules.gradient_magnitude(*given)
    threshold = ek.entropy_threshold(score_T, fraction=tokens.fraction, impl=tokens.impl)
    return Choice(at_least(score_T, threshold))


def nat_random(tokens: Tokens) -> Choice:
    """`random_tokens`: each with probability `fraction`, and weight 1 / `fraction`."""
    given = tokens.everything, tokens.fraction
    return Choice(*token_rules.random_tokens(*given, generator=tokens.generator))


def nat_prefix(tokens: Tokens) -> Choice:
    """`random_prefixes`: about `fraction` of each response, the rest of which is cut off."""
    lengths_B = tokens.lengths_B
    kept_T, weight_T = token_rules.random_prefixes(
        tokens.everything, tokens.fraction, lengths=lengths_B, generator=tokens.generator
    )
    sequence_T = torch.arange(len(lengths_B), device=kept_T.device).repeat_interleave(lengths_B)
    kept_B = torch.zeros_like(lengths_B).index_add(0, sequence_T, kept_T.long())
    return Choice(kept_T, weight_T, kept_B)


def clip_cov(tokens: Tokens) -> Choice:
    """`clip_cov` with its own fraction; what it drops stays in the denominator."""
    given = tokens.logprob_T, tokens.advantage_T, tokens.everything
    kept_T = token_rules.clip_cov(*given, generator=tokens.generator)
    return Choice(kept_T, kept_T.float())


def clip_discriminator(tokens: Tokens) -> Choice:
    """`clip_discriminator` about the mean of the discriminators."""
    score_T = token_rules.discriminator(tokens.logprob_T, tokens.entropy_T)
    given = score_T, tokens.advantage_T, tokens.everything
    return Choice(token_rules.clip_discriminator(*given))


RULES: Mapping[str, Rule] = {
    "top": top,
    "bottom": bottom,
    "random": random,
    "stapo": stapo,
    "rsi": rsi,
    "gmts": gmts,
    "nat-random": nat_random,
    "nat-prefix": nat_prefix,
    "clip-cov": clip_cov,
    "clip-discriminator": clip_discriminator,
}
DRAWN = frozenset({"random", "nat-random", "nat-prefix"})
"""Rules that look at no statistic."""


def rule_named(name: str) -> Rule:
    """The rule of `name`, one of RULES or "module:function"; ValueError where there is none."""
    return RULES[name] if name in RULES else function_named(name, "a rule of your own")


def name_of(rule: Rule) -> str:
    """The name that a run notes for `rule`, a function: "module:function"."""
    module, name = getattr(rule, "__module__", ""), getattr(rule, "__qualname__", "")
    if not callable(rule) or not module or not name:
        raise ValueError(f"a rule is a function; got a {type(rule).__name__}")
    return f"{module}:{name}"


def choose(rule: Rule, name: str, tokens: Tokens) -> Choice:
    """What `rule` chooses of `tokens`.

    Raises ValueError, naming the rule, where that is no `Choice` of these tokens.
    """
    choice = rule(tokens)
    if not isinstance(choice, Choice):
        raise ValueError(f"{name} must return a Choice; got a {type(choice).__name__}")
    _check(name, "selected_T", choice.selected_T, tokens.entropy_T, "a bool")
    if choice.weight_T is not None:
        _check(name, "weight_T", choice.weight_T, tokens.entropy_T, "a floating-point")
    if choice.kept_length_B is not None:
        _check(name, "kept_length_B", choice.kept_length_B, tokens.lengths_B, "an int64")
        kept_B, length_B = choice.kept_length_B, tokens.lengths_B
        if ((kept_B < 1) | (kept_B > length_B)).any():
            raise ValueError(f"{name}: kept_length_B must lie between 1 and each response's length")
    return choice


def _check(name: str, of: str, x: object, like: Tensor, kind: str) -> None:
    """A tensor of `kind` with the shape of `like`, on its device."""
    came = f"got a {type(x).__name__}"
    if isinstance(x, Tensor):
        right = {"a bool": x.dtype == torch.bool, "an int64": x.dtype == torch.int64}
        if right.get(kind, x.is_floating_point()) and (x.shape, x.device) == (
            like.shape,
            like.device,
        ):
            return
        came = f"got {x.dtype} {tuple(x.shape)} on {x.device}"
    wanted = f"{kind} tensor {tuple(like.shape)} on {like.device}"
    raise ValueError(f"{name}: {of} must be {wanted}; {came}")
