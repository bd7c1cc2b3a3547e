"""`lm_head(model)`: what a causal LM's head is to the functions of this package.

D hidden, V vocabulary, r rank of a LoRA update.
"""

import inspect
import sys
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

from .._arguments import shown
from .._shapes import Float, Int
from ..head import Head
from ._head import as_linear, backbone, check_weight, measure, parts, slot
from ._patch import Patch, require


@dataclass(frozen=True, eq=False)
class LMHead:
    """A causal LM's head: `head.hidden_states(...)` runs the model up to it, and
    `head(hidden, target)` is a `Head` whose logits are the model's:

    logit = softcap * tanh(scale * (h W^T + b) / softcap)

    Each call reads weight and bias anew, so adapters may come, go, merge and be switched off.
    `lm_head` has measured scale and softcap.
    """

    model: Any
    """What `hidden_states` calls."""
    scale: float
    softcap: float | None
    """The softcap of the model's logits; None where they have no bound."""
    _tap: "_Tap" = field(init=False, repr=False, default_factory=lambda: _Tap())

    def __call__(
        self,
        hidden: Float[Tensor, "*tokens D"],
        target: Int[Tensor, "*tokens"],
        temperature: float | Float[Tensor, "..."] = 1.0,
    ) -> Head:
        """The head on any of the states that `hidden_states` gave: `Head`, as the losses take it.

        Its weight is the model's own parameter, so a tied embedding's gradient adds up. With LoRA
        on the head its hidden is [..., D + r] and its weight [V, D + r]: the update is multiplied
        apart from W, for a copy of W and a gradient of it that is dropped.

        Args:
            target: the token that each state predicts.
            temperature: as in `Head`, of the model's logits.

        Raises:
            ValueError: another head than `lm_head` takes; a weight that FSDP has not gathered.
        """
        states, weight, bias = as_linear(causal_lm(self.model).get_output_embeddings(), hidden)
        return Head(
            states,
            weight,
            target,
            bias=bias,
            temperature=temperature,
            softcap=self.softcap,
            logit_scale=self.scale,
        )

    def hidden_states(self, *args: Any, **options: Any) -> Float[Tensor, "*tokens D"]:
        """What the head is given in `model(*args, **options)`, differentiable; no logits are made.

        The model's own forward runs, so all that acts on it does, as do layers between the
        backbone and the head. `use_cache` is false unless given.

        Raises:
            ValueError: `labels`; a model that does not call its head once; the root of
                `fully_shard`, or a weight that it has not gathered.
        """
        model, tap = causal_lm(self.model), self._tap
        check_labels(options)
        if options.get("use_cache") is None and takes_use_cache(model.forward):
            options["use_cache"] = False
        if isinstance(self.model, FSDPModule) or isinstance(model, FSDPModule):
            raise ValueError(
                f"{type(model).__name__} is what fully_shard was given, which adds up gradients of "
                "what its own forward computes: use patch_lm_head, or call this and the loss in "
                "the forward of a module of your own, and shard that"
            )
        head = model.get_output_embeddings()
        check_weight(parts(head)[0].weight)
        try:
            with Patch((head, slot(head), tap)):
                self.model(*args, **options)
            if tap.found is None:
                raise ValueError(f"{type(model).__name__} did not call its head")
            return tap.found
        finally:
            tap.found = None


class _Tap:
    """Stands in for a head's forward and keeps what it is given."""

    found: Tensor | None = None

    def __call__(self, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        check_call(self.found, args, options)
        self.found = hidden
        return hidden.new_zeros(*hidden.shape[:-1], 1)


def lm_head(model: nn.Module) -> LMHead:
    """The head of a transformers causal LM, for a training loop that runs its own loss:

        head = lm_head(model)  # once
        hidden = head.hidden_states(input_ids, attention_mask=attention_mask)[:, :-1]
        loss, metrics = high_entropy_policy_loss(head(hidden, input_ids[:, 1:]), ...)

    It finds backbone, weight, bias, PEFT's LoRA on the head or `modules_to_save`, and tied
    embeddings. It also finds what the model does to its logits (Gemma's softcap, Cohere's and
    Granite's scale). That last is measured here, in milliseconds, on stand-ins for backbone and
    head, and not read again: configure the model before. Its weights may be sharded, or on "meta".

    DDP and FSDP2 add up the gradients of what is computed in the forward of the module that they
    were given. So give them a module of your own, whose forward calls `hidden_states` and the loss.
    Or use `patch_lm_head`, which runs the head inside of the model, and can have it as a unit of
    its own. DDP's gradients would silently stay those of each rank otherwise.

    Args:
        model: a transformers causal LM, or a PeftModel of one; not a wrapper of them.

    Raises:
        ImportError: transformers, or the PEFT whose layer is the head, of an unknown version.
        ValueError: another model, wrapper or head; prompt learning; an offloaded or tensor-parallel
            head; a function of the logits that no scale and softcap explain, naming both.
    """
    require("transformers", "5.0", "6")
    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    _check(inner, head)
    return LMHead(model, *measure(inner, head))


def causal_lm(model: Any) -> Any:
    """The transformers model itself."""
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        for name, adapter in model.peft_config.items():
            if adapter.is_prompt_learning:
                raise ValueError(f"adapter {name!r} adds tokens to the prompt, so targets shift")
        model = model.get_base_model()
    if isinstance(model, PreTrainedModel):
        return model
    inside = next((name for name in ("module", "_orig_mod") if hasattr(model, name)), None)
    raise ValueError(
        "model must be a transformers model or a PeftModel of one, such as the one inside a "
        f"wrapper; got {shown(model)}"
        + (f": give patch_lm_head its `{inside}` and call the wrapper" if inside else "")
    )


def check_labels(options: dict[str, Any]) -> None:
    """Check the options of a call of the model without logits."""
    if options.get("labels") is not None:
        raise ValueError("labels ask for a loss of logits, of which there are none here; drop them")


def check_call(found: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Check that a head whose forward is replaced is called once, with states alone."""
    if found is not None:
        raise ValueError("the model called its head twice in one forward")
    if args or options:
        more = ", ".join([*(type(x).__name__ for x in args), *options])
        raise ValueError(f"the head must be called with hidden states alone; got {more} too")


def takes_use_cache(forward: Any) -> bool:
    return "use_cache" in inspect.signature(forward).parameters


def _check(model: Any, head: Any) -> None:
    name = type(model).__name__
    if head is None or backbone(model, head) is None or model.config.is_encoder_decoder:
        raise ValueError(f"model must be a backbone and a head over its states; got {name}")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("FSDP1 is not supported; shard with torch.distributed.fsdp.fully_shard")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(f"tensor-parallel heads are not supported; got tp_size={model.tp_size}")
    hook = getattr(head, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook])):
        raise ValueError(f"the head of {name} is offloaded, and would get no gradient")
    parts(head)
