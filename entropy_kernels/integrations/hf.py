"""transformers models on our head: `patch_lm_head(model)`, then `model(..., target=ids)`; or
`lm_head(model)`, the head's parts for a loss of one's own.

B sequences, L their length, D hidden, V vocabulary.
"""

import inspect
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from .._arguments import check_tensor
from .._rows import check_statistics
from .._shapes import Bool, Float
from ..backends import check_impl
from ..head import check_temperature
from ..linear_logprob_entropy import LogprobEntropy, linear_logprob_entropy
from ._head import slot
from ._lm_head import LMHead, causal_lm, check_call, check_labels, lm_head, takes_use_cache
from ._patch import Patch

__all__ = ["LMHead", "LogprobEntropyOutput", "lm_head", "patch_lm_head"]


@dataclass
class LogprobEntropyOutput(ModelOutput):
    """What a patched model returns for targets, in place of logits.

    logprob, entropy (nats) and logsumexp are fp32, of the targets' shape and differentiable, and so
    is token_logprobs, with K more numbers per target. It and the statistics are None unless asked
    for. The rest is what the model returned.
    """

    logprob: Float[Tensor, "*tokens"] | None = None
    entropy: Float[Tensor, "*tokens"] | None = None
    logsumexp: Float[Tensor, "*tokens"] | None = None
    varentropy: Float[Tensor, "*tokens"] | None = None
    max_prob: Float[Tensor, "*tokens"] | None = None
    sum_p2: Float[Tensor, "*tokens"] | None = None
    sum_p2_logp: Float[Tensor, "*tokens"] | None = None
    mean_logit: Float[Tensor, "*tokens"] | None = None
    is_top1: Bool[Tensor, "*tokens"] | None = None
    token_logprobs: Float[Tensor, "*tokens K"] | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    router_logits: Any = None
    aux_loss: Any = None


_FIELDS = tuple(field.name for field in fields(LogprobEntropyOutput))


def patch_lm_head(model: nn.Module, *, impl: str = "auto") -> Patch:
    """Let a causal LM return log-probabilities and entropies of given targets instead of logits.

    Afterwards

        out = model(
            input_ids, attention_mask=..., target=target, temperature=1.0, statistics=(),
            token_ids=None,
        )

    is a `LogprobEntropyOutput`. `target[b, l]` is the token that position l predicts, commonly
    `input_ids[b, l + 1]`: nothing is shifted, unlike with `labels`. -100 means none: zeros and no
    gradient. Its shape is that of the logits without V: [B, L], or what `logits_to_keep` leaves of
    it. `temperature`, `statistics` and `token_ids` are those of `linear_logprob_entropy`; a
    temperature a token must be fp32. `use_cache` is false unless given. Without `target` the model
    is what it was, so `generate` still gets its logits.

    The model's own forward runs and calls its head, whose product is replaced; [B, L, V] logits
    never exist, and backward runs on the rows with gradient. So whatever acts on the model keeps
    acting: hooks of FSDP2, also where the head is a unit of its own, and of device_map. So do
    gradient checkpointing, autocast and a compiled backbone; a tied embedding's gradient adds up.
    What the model does to its logits (Gemma's softcap, Cohere's and Granite's scale) is measured
    here, on stand-ins. It is not read again: configure the model before.

    LoRA on the head is multiplied as [W, B]: a copy of the head's weight a forward, dropout
    included, never rounded into W. Its backward computes W's gradient too, and drops it.

    Order: PEFT first where it changes the head, then this; `fully_shard`, `torch.compile` and DDP
    before or after. Give this function the model, not DDP's wrapper. Accelerate's wrappers of
    forward may come before, after and off again. FSDP's mixed precision casts what the root returns
    to its `output_dtype`: leave that None or fp32.

    Args:
        model: a transformers causal LM, or a PeftModel of one.
        impl: as in `linear_logprob_entropy`.

    Returns:
        The patch: `undo()` ends it, and so does the end of a `with` block. Called again while it
        is in force, the same one.

    Raises:
        ImportError: transformers, or the PEFT whose layer is the head, of an unknown version.
        ValueError: another model, wrapper or head; prompt learning; an offloaded or tensor-parallel
            head. A function of the logits that no scale and softcap explain, naming both. Another
            `impl` than that of the patch in force. When called: `target` with `labels`;
            `temperature`, `statistics` or `token_ids` without `target`; a weight that FSDP has not
            gathered. Also a head, or a forward that does not know `target`, replaced since.
    """
    check_impl(impl)
    inner = causal_lm(model)
    forward = _in_force(inner)
    if forward is not None:
        if forward.head.impl != impl:
            raise ValueError(
                f"patch_lm_head(impl={forward.head.impl!r}) is in force; undo it before "
                f"impl={impl!r}"
            )
        return forward.patch
    forward = _ModelForward(inner, _HeadForward(lm_head(inner), impl))
    forward.patch = _HeadPatch(forward)
    return forward.patch


class _HeadForward:
    """A head's forward: its own, or, once targets are set, what is asked about them.

    An object and not a closure, so that a deep copy of the model has a copy of it.
    """

    def __init__(self, lm_head: LMHead, impl: str) -> None:
        self.lm_head, self.impl = lm_head, impl
        self.head: Any = causal_lm(lm_head.model).get_output_embeddings()
        self.original = getattr(self.head, slot(self.head))
        self.asked: tuple[Tensor, float | Tensor, Collection[str], Tensor | None] | None = None
        self.found: LogprobEntropy | None = None

    def __call__(self, hidden: Tensor, *args: Any, **more: Any) -> Tensor:
        if self.asked is None:
            return self.original(hidden, *args, **more)
        check_call(self.found, args, more)
        target, temperature, statistics, ids = self.asked
        if isinstance(temperature, Tensor):
            temperature = temperature.to(hidden.device)
        head = self.lm_head(hidden, target.to(hidden.device), temperature)
        found = linear_logprob_entropy(
            head,
            statistics=statistics,
            token_ids=None if ids is None else ids.to(hidden.device),
            impl=self.impl,
        )
        # FSDP gathers the weight again for backward when the gradient reaches what the head
        # returned. So all results come from that tensor, and are no views of it.
        assert found.logsumexp is not None
        packed = torch.stack([found.logprob, found.entropy, found.logsumexp], -1)
        if found.token_logprobs is not None:
            packed = torch.cat([packed, found.token_logprobs], -1)
        self.found = found._replace(
            logprob=packed[..., 0].clone(),
            entropy=packed[..., 1].clone(),
            logsumexp=packed[..., 2].clone(),
            token_logprobs=None if ids is None else packed[..., 3:].clone(),
        )
        return packed


class _ModelForward:
    """A causal LM's forward with four more options, see `patch_lm_head`."""

    patch: Patch

    def __init__(self, model: Any, head: _HeadForward) -> None:
        self.model, self.head = model, head
        self._original = getattr(model, slot(model))
        # What accelerate's mixed precision wraps, and its unwrap_model puts back.
        self._unwrapped = getattr(model, "_original_forward", None)
        self.no_cache = takes_use_cache(self.original)

    @property
    def original(self) -> Any:
        """The model's forward, without mixed precision once accelerate has taken that off."""
        if self._unwrapped is not None and not hasattr(self.model, "_original_forward"):
            return self._unwrapped
        return self._original

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's: `generate` asks it what the model takes."""
        return inspect.signature(self.original)

    def __call__(
        self,
        *args: Any,
        target: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        statistics: Collection[str] = (),
        token_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if args and isinstance(args[0], nn.Module):
            # Some bind what they find as `model.forward` to the model, as if it were a function.
            args = args[1:]
        if target is None:
            given = statistics or token_ids is not None
            if given or isinstance(temperature, Tensor) or temperature != 1:
                raise ValueError(
                    "temperature, statistics and token_ids are of targets; got target=None"
                )
            return self.original(*args, **options)
        check_tensor("target", target)
        check_temperature(temperature)
        check_statistics(statistics)
        if token_ids is not None:
            check_tensor("token_ids", token_ids)
        self._check(temperature, options)
        if self.no_cache and options.get("use_cache") is None:
            options["use_cache"] = False
        self.head.asked = target, temperature, statistics, token_ids
        try:
            output, found = self.original(*args, **options), self.head.found
        finally:
            self.head.asked = self.head.found = None
        name = type(self.model).__name__
        if found is None:
            raise ValueError(f"{name} did not call its head; was its forward replaced before?")
        if not isinstance(output, ModelOutput):
            raise ValueError(f"with target, {name} must return a ModelOutput; return_dict is false")
        others = {key: output.get(key) for key in _FIELDS if key not in found._fields}
        return LogprobEntropyOutput(**found._asdict(), **others)

    def _check(self, temperature: float | Tensor, options: dict[str, Any]) -> None:
        check_labels(options)
        if self.model.get_output_embeddings() is not self.head.head:
            raise ValueError(
                f"the head of {type(self.model).__name__} was replaced since patch_lm_head, which "
                "PEFT does: undo the patch and patch again"
            )
        if isinstance(temperature, Tensor) and temperature.dtype != torch.float32:
            raise ValueError(
                f"temperature must be fp32; got {temperature.dtype} (FSDP's mixed precision casts "
                "a model's inputs; a float stays what it is)"
            )


class _HeadPatch(Patch):
    """The two forwards, and a hook that sees when the model's was replaced since."""

    def __init__(self, forward: _ModelForward) -> None:
        model, head = forward.model, forward.head
        super().__init__((model, slot(model), forward), (head.head, slot(head.head), head))
        self._hook: RemovableHandle = model.register_forward_hook(_check_answered, with_kwargs=True)

    def undo(self) -> None:
        """Put back what was there before."""
        super().undo()
        self._hook.remove()


def _check_answered(model: nn.Module, args: Any, options: dict[str, Any], output: Any) -> None:
    if options.get("target") is not None and getattr(output, "logits", None) is not None:
        raise ValueError(
            f"{type(model).__name__}.forward was replaced since patch_lm_head and does not know "
            "`target`: patch again, after what replaced it"
        )


def _in_force(model: nn.Module) -> _ModelForward | None:
    """The forward that `patch_lm_head` gave to this model, also inside of what wraps it."""
    for name in ("forward", "_old_forward"):
        found: Any = vars(model).get(name)
        while found is not None and not isinstance(found, _ModelForward):
            found = getattr(found, "__func__", None) or getattr(found, "__wrapped__", None)
        if found is not None:
            return found
    return None
