"""transformers models on our head: `patch_lm_head(model)`, then `model(..., target=ids)`.

B sequences, L their length, D hidden, V vocabulary.
"""

import inspect
import sys
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .._shapes import Float
from ..functional import LogprobEntropy, linear_logprob_entropy
from ._head import as_linear, backbone, measure, parts
from ._patch import Patch, require


@dataclass
class LogprobEntropyOutput(ModelOutput):
    """What a patched model returns for targets, in place of logits.

    logprob, entropy (nats) and logsumexp are fp32, of the targets' shape and differentiable; the
    statistics are None unless asked for; the rest is what the model returned.
    """

    logprob: Float[Tensor, "*tokens"] | None = None
    entropy: Float[Tensor, "*tokens"] | None = None
    logsumexp: Float[Tensor, "*tokens"] | None = None
    varentropy: Float[Tensor, "*tokens"] | None = None
    max_prob: Float[Tensor, "*tokens"] | None = None
    sum_p2: Float[Tensor, "*tokens"] | None = None
    sum_p2_logp: Float[Tensor, "*tokens"] | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    router_logits: Any = None
    aux_loss: Any = None


_FIELDS = tuple(field.name for field in fields(LogprobEntropyOutput))


def patch_lm_head(model: nn.Module, *, impl: str = "auto") -> Patch:
    """Let a causal LM return log-probabilities and entropies of given targets instead of logits.

    Afterwards

        out = model(input_ids, attention_mask=..., target=target, temperature=1.0, statistics=())

    is a `LogprobEntropyOutput`. `target[b, l]` is the token that position l predicts, commonly
    `input_ids[b, l + 1]`: nothing is shifted, unlike with `labels`. -100 means none: zeros and no
    gradient. Its shape is that of the logits without V: [B, L], or what `logits_to_keep` leaves of
    it. `temperature` and `statistics` are those of `linear_logprob_entropy`; a temperature a token
    must be fp32. `use_cache` is false unless given. Without `target` the model is what it was, so
    `generate` still gets its logits.

    The model's own forward runs and calls its head, whose product is replaced; [B, L, V] logits
    never exist, and backward runs on the rows with gradient. So whatever acts on the model keeps
    acting: hooks of FSDP2, also where the head is a unit of its own, and of device_map; gradient
    checkpointing, autocast, a compiled backbone; a tied embedding's gradient adds up. What the
    model does to its logits (Gemma's softcap, Cohere's and Granite's scale) is measured here, on
    stand-ins, and not read again: configure the model before.

    LoRA on the head is multiplied as [W, B]: a copy of the head's weight a forward, dropout
    included, never rounded into W. Its backward computes W's gradient too, and drops it.

    Order: PEFT first where it changes the head, then this; `fully_shard`, `torch.compile` and DDP
    before or after, but give this function the model, not DDP's wrapper. FSDP's mixed precision
    casts what the root returns to its `output_dtype`: leave that None or fp32.

    Args:
        model: a transformers causal LM, or a PeftModel of one.
        impl: as in `linear_logprob_entropy`.

    Returns:
        The patch: `undo()` ends it, and so does the end of a `with` block. Called again while it
        is in force, the same one.

    Raises:
        ImportError: transformers, or the PEFT whose layer is the head, of an unknown version.
        ValueError: another model, wrapper or head; prompt learning; an offloaded or tensor-parallel
            head; a function of the logits that no scale and softcap explain, naming both; another
            `impl` than that of the patch in force. When called: `target` with `labels`;
            `temperature` or `statistics` without `target`; a head replaced since; a weight that
            FSDP has not gathered.
    """
    require("transformers", "5.0", "6")
    causal_lm = _causal_lm(model)
    forward = _in_force(causal_lm)
    if forward is not None:
        if forward.head.impl != impl:
            raise ValueError(
                f"patch_lm_head(impl={forward.head.impl!r}) is in force; undo it before "
                f"impl={impl!r}"
            )
        return forward.patch
    head = causal_lm.get_output_embeddings()
    _check(causal_lm, head)
    head_forward = _HeadForward(head, *measure(causal_lm, head), impl)
    forward = _ModelForward(causal_lm, head_forward)
    forward.patch = Patch((causal_lm, _slot(causal_lm), forward), (head, _slot(head), head_forward))
    return forward.patch


class _HeadForward:
    """A head's forward: its own, or, once targets are set, what is asked about them.

    An object and not a closure, so that a deep copy of the model has a copy of it.
    """

    def __init__(self, head: nn.Module, scale: float, softcap: float | None, impl: str) -> None:
        self.head, self.original = head, getattr(head, _slot(head))
        self.scale, self.impl = scale, impl
        # c tanh(a z / c) = a (c / a) tanh(z / (c / a)): the scale is a temperature, exactly.
        self.softcap = None if softcap is None else softcap / scale
        self.asked: tuple[Tensor, float | Tensor, Collection[str]] | None = None
        self.found: LogprobEntropy | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.asked is None:
            return self.original(hidden)
        if self.found is not None:
            raise ValueError("the model called its head twice in one forward")
        target, temperature, statistics = self.asked
        if isinstance(temperature, Tensor):
            temperature = temperature.to(hidden.device)
        options: dict[str, Any] = {"statistics": statistics} if statistics else {}
        states, weight, bias = as_linear(self.head, hidden)
        found = linear_logprob_entropy(
            states,
            weight,
            target.to(hidden.device),
            bias=bias,
            temperature=temperature / self.scale,
            softcap=self.softcap,
            impl=self.impl,
            **options,
        )
        # FSDP gathers the weight again for backward when the gradient reaches what the head
        # returned. So all results come from that tensor, and are no views of it.
        packed = torch.stack(found[:3], -1)
        self.found = found._replace(
            logprob=packed[..., 0].clone(),
            entropy=packed[..., 1].clone(),
            logsumexp=packed[..., 2].clone(),
        )
        return packed


class _ModelForward:
    """A causal LM's forward with three more options, see `patch_lm_head`."""

    patch: Patch

    def __init__(self, model: Any, head: _HeadForward) -> None:
        self.model, self.head = model, head
        self.original = getattr(model, _slot(model))
        self.no_cache = "use_cache" in self.__signature__.parameters

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
        **options: Any,
    ) -> Any:
        if target is None:
            if statistics or isinstance(temperature, Tensor) or temperature != 1:
                raise ValueError("temperature and statistics are of targets; got target=None")
            return self.original(*args, **options)
        self._check(temperature, options)
        if self.no_cache and options.get("use_cache") is None:
            options["use_cache"] = False
        self.head.asked = target, temperature, statistics
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
        if options.get("labels") is not None:
            raise ValueError("labels ask for a loss of logits and target for none; give one")
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


def _causal_lm(model: Any) -> Any:
    """The transformers model itself."""
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        for name, adapter in model.peft_config.items():
            if adapter.is_prompt_learning:
                raise ValueError(f"adapter {name!r} adds tokens to the prompt, so targets shift")
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            "model must be a transformers model or a PeftModel of one, such as the one inside a "
            f"wrapper; got {type(model).__name__}"
        )
    return model


def _check(model: Any, head: Any) -> None:
    name = type(model).__name__
    if head is None or backbone(model) is None or model.config.is_encoder_decoder:
        raise ValueError(f"model must be a backbone and a head over its states; got {name}")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("FSDP1 is not supported; shard with torch.distributed.fsdp.fully_shard")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(f"tensor-parallel heads are not supported; got tp_size={model.tp_size}")
    hook = getattr(head, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook])):
        raise ValueError(f"the head of {name} is offloaded, and would get no gradient")
    parts(head)


def _slot(module: nn.Module) -> str:
    """Where forward is looked up; accelerate's hooks, of a device_map, keep it apart."""
    return "_old_forward" if "_hf_hook" in vars(module) else "forward"


def _in_force(model: nn.Module) -> _ModelForward | None:
    """The forward that `patch_lm_head` gave to this model."""
    kept = [vars(model).get(name) for name in ("forward", "_old_forward")]
    return next((forward for forward in kept if isinstance(forward, _ModelForward)), None)
