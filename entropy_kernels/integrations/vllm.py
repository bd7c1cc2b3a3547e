"""Entropies of sampled tokens out of vLLM, and the sets of ids that they were sampled from.

With this module as `entropies`:

    llm = LLM(model, **entropies.options(logprobs_mode="processed_logprobs"))
    asking = [entropies.recorded(params, key) for key in range(len(prompts))]
    answers = llm.generate(prompts, asking)
    lengths = [len(answer.outputs[0].token_ids) for answer in answers]
    found = entropies.take(llm, range(len(prompts)), lengths)   # found[b].entropies: fp32 [n]

docs/engines.md says what is recorded, its cost and its limits. It needs vLLM 0.32 or newer.
"""

import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ..support import Support
from . import _vllm_records as records
from ._vllm_request import Asked, asked_by, check_params

__all__ = ["Recorded", "forget", "options", "recorded", "take", "take_async"]

PROCESSOR = f"{__package__}.vllm_processors:EntropyProcessor"
EXTENSION = f"{__package__}.vllm_worker.WorkerExtension"
Params = TypeVar("Params")


class Recorded(NamedTuple):
    """What was recorded of one response: n tokens, on the CPU."""

    entropies: Tensor
    """The entropies in nats of softmax(logits / temperature), over the kept set, fp32 [n].

    They are untempered where the request was greedy."""
    kept: Support | None
    """The ids that were left to sample from, a set per token; None: nothing was cut off."""


def options(**llm_options: Any) -> dict[str, Any]:
    """Options of vLLM's LLM, or of its engine's arguments, which are `llm_options` and ours.

    Our logits processor comes last, after those of `llm_options`. A `worker_extension_cls` of
    theirs must be a subclass of ours, which is named `EXTENSION`.

    Raises:
        ValueError: the worker extension is none.
    """
    extension = llm_options.get("worker_extension_cls") or EXTENSION
    if extension != EXTENSION:
        ours, theirs = pkgutil.resolve_name(EXTENSION), pkgutil.resolve_name(extension)
        if not issubclass(theirs, ours):
            raise ValueError(
                f"worker_extension_cls must be a subclass of {EXTENSION}; got {extension}"
            )
    processors = [*(llm_options.get("logits_processors") or ()), PROCESSOR]
    return llm_options | {"logits_processors": processors, "worker_extension_cls": extension}


def recorded(params: Params, key: int | str, sets: bool = False) -> Params:
    """A copy of `params`, vLLM's SamplingParams, whose response's entropies are recorded.

    Args:
        key: what `take` asks for; each request that is not taken yet needs another.
        sets: keep the sets too that top_k, top_p and min_p leave. Our processor then does the
            cutting, and vLLM is told to cut nothing. Entropies are over the sets. So are vLLM's
            log-probs where its logprobs_mode is "processed_logprobs". A greedy request cuts
            nothing. Without `sets` entropies are those before vLLM's top_k, top_p and min_p.

    Raises:
        ValueError: `params` ask for what changes logits later (penalties, a thinking budget), for
            n > 1, or are recorded already.
    """
    if (before := asked_by(params)) is not None:
        raise ValueError(f"params are recorded already, under the key {before.key!r}")
    copy: Any = params.clone()  # type: ignore[attr-defined]
    asked = Asked(key)
    if sets:
        asked = Asked(key, max(copy.top_k, 0), copy.top_p, copy.min_p)
        copy.top_k, copy.top_p, copy.min_p = 0, 1.0, 0.0
    copy.extra_args = {**(copy.extra_args or {}), records.NAME: asked.plain()}
    check_params(copy)
    return copy


def take(llm: Any, keys: Iterable[int | str], lengths: Iterable[int]) -> list[Recorded]:
    """What was recorded of responses that have ended, which is forgotten by vLLM.

    Args:
        llm: vLLM's LLM, in this process or beside it, on any number of GPUs.
        keys: those of the requests, in the order of the result.
        lengths: the number of tokens of each response. An aborted request has what it reached.

    Raises:
        ValueError: a key that comes twice or that two requests shared, or one of which less than
            its length was recorded. Nothing is forgotten then.
    """
    question = _question(keys, lengths)
    found = records.decode(llm.collective_rpc(records.READ, args=question), *question)
    llm.collective_rpc(records.FORGET, args=question[:1])
    return [Recorded(*one) for one in found]


async def take_async(
    engine: Any, keys: Iterable[int | str], lengths: Iterable[int]
) -> list[Recorded]:
    """As `take`, from vLLM's AsyncLLM."""
    question = _question(keys, lengths)
    found = records.decode(await engine.collective_rpc(records.READ, args=question), *question)
    await engine.collective_rpc(records.FORGET, args=question[:1])
    return [Recorded(*one) for one in found]


def forget(llm: Any, keys: Iterable[int | str] | None = None) -> None:
    """Drop what was recorded under `keys`, by default all; unknown keys do no harm."""
    llm.collective_rpc(records.FORGET, args=(None if keys is None else list(keys),))


def _question(
    keys: Iterable[int | str], lengths: Iterable[int]
) -> tuple[Sequence[int | str], Sequence[int]]:
    keys, lengths = list(keys), [int(n) for n in lengths]
    if len(keys) != len(lengths):
        raise ValueError(f"each key needs a length; got {len(keys)} keys, {len(lengths)} lengths")
    if twice := {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else ():
        raise ValueError(f"keys must differ; got {sorted(map(str, twice))[:5]} twice")
    return keys, lengths
