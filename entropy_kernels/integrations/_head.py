"""What the head of a transformers model computes: its product, and what the model makes of it.

D hidden, V vocabulary, r rank of a LoRA update.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ._patch import require

# Where the model's function of a logit is measured: near 0, far beyond any bound, and between.
_NEAR, _FAR, _SPREAD = 2.0**-20, 1e30, 60.0


def parts(head: Any) -> tuple[nn.Linear, list[str]]:
    """The linear layer at the heart of a head, and its active LoRA adapters.

    Raises:
        ValueError: a head that is more than a linear layer with plain LoRA updates.
        ImportError: a PEFT layer of a version that is not known.
    """
    if type(head).forward is nn.Linear.forward:
        return head, []
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(head, peft.utils.ModulesToSaveWrapper):
        require("peft", "0.18", "1")
        active = head.active_adapters
        saved = not head.disable_adapters and active and set(active) <= head._adapters
        return parts(head.modules_to_save[active[0]] if saved else head.original_module)
    if peft is not None and type(head).forward is peft.tuners.lora.Linear.forward:
        require("peft", "0.18", "1")
        linear, _ = parts(head.base_layer)
        if head.disable_adapters and head.merged:
            head.unmerge()
        if head.disable_adapters or head.merged:
            return linear, []
        adapters = [name for name in head.active_adapters if name in head.lora_A]
        for name in adapters:
            variant = head.lora_variant.get(name)
            if variant is not None or head.lora_B[name].bias is not None:
                raise ValueError(
                    f"the head's adapter {name!r} must be plain LoRA, W + scaling B A; got "
                    f"{'a bias' if variant is None else type(variant).__name__}"
                )
        return linear, adapters
    raise ValueError(
        "the head must be a torch.nn.Linear, alone, with PEFT's LoRA or in its modules_to_save; "
        f"got {type(head).__name__}"
    )


def as_linear(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden' [..., D + r], weight' [V, D + r] and bias with head(hidden) = hidden' weight'^T + b.

    hidden' = [h, s dropout(h) A^T] and weight' = [W, B] of a LoRA head: the update is multiplied
    apart from W, as in PEFT. Added to W, 16 bits would round most of it away.
    """
    linear, adapters = parts(head)
    check_weight(linear.weight)
    hiddens, weights = [hidden], [linear.weight]
    for name in adapters:
        down = head.lora_A[name]
        low = down(head.lora_dropout[name](hidden.to(down.weight.dtype))) * head.scaling[name]
        hiddens.append(low.to(hidden.dtype))
        weights.append(head.lora_B[name].weight.to(linear.weight.dtype))
    if adapters:
        return torch.cat(hiddens, -1), torch.cat(weights, 1), linear.bias
    return hidden, linear.weight, linear.bias


def check_weight(weight: Tensor) -> None:
    if isinstance(weight, DTensor):
        raise ValueError(
            f"the head's weight is a DTensor ({weight.placements}) during forward: call the module "
            "that fully_shard was given, whose hooks gather it, not a module inside it; where the "
            "head is a unit of its own, use patch_lm_head; tensor-parallel heads are not supported"
        )
    if hasattr(weight, "ds_id"):
        raise ValueError("DeepSpeed ZeRO-3 is not supported: it takes the head's weight apart")
    if type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(f"the head's weight must be a plain tensor; got {type(weight).__name__}")


@torch.no_grad()
def measure(model: Any, head: Any) -> tuple[float, float | None]:
    """The scale a and the bound c of what the model makes of each z that its head returns.

    logit = c tanh(a z / c), or a z, where c is None. The model's own forward runs, as it stands on
    the model, with stand-ins for its backbone and its head. No weight is read and no hook runs, so
    the model may be sharded or without values yet. What is compiled runs uncompiled.

    Raises:
        ValueError: any other function, or one that differs by token or by word.
    """
    name = type(model).__name__
    linear, _ = parts(head)
    z = torch.empty(1, 3, linear.out_features, dtype=torch.float64, device=_place(linear))
    z[0, 0], z[0, 1] = _NEAR, _FAR
    z[0, 2] = torch.linspace(-_SPREAD, _SPREAD, linear.out_features, dtype=torch.float64)
    try:
        dtype, device = linear.weight.dtype, linear.weight.device
        states = torch.zeros(1, 3, _width(model, linear), dtype=dtype, device=device)
        logits = _run(model, head, z, states)[0].double()
        scale = float(logits[0, 0, 0]) / _NEAR
        bound = float(logits[0, 1, 0])
        # An error of fp32 must not make the plainest of heads look scaled.
        scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale
        softcap = None if math.isclose(bound, scale * _FAR, rel_tol=1e-6) else bound
        want = scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)
        error = ((logits - want).abs() / want.abs().clamp_min(1e-30)).flatten()
    except Exception as problem:
        raise ValueError(f"what {name} does to its logits cannot be measured: {problem}") from (
            problem
        )
    if scale > 0 and (softcap is None or softcap > 0) and (error <= 1e-5).all():
        return scale, softcap
    worst = int(error.nan_to_num(torch.inf).argmax())
    raise ValueError(
        f"{name} does to its logits what no scale and softcap do: of {z.flatten()[worst]:.6g} it "
        f"makes {logits.flatten()[worst]:.6g}; scale={scale:.6g} and softcap={softcap}, which fit "
        f"its ends, make {want.flatten()[worst]:.6g}"
    )


@torch.no_grad()
def factor_of_states(model: Any, head: Any) -> float:
    """By how much the model multiplies its backbone's states before the head has them.

    For who computes h W^T of the backbone's states himself. Measured as `measure` does.

    Raises:
        ValueError: layers between the backbone and the head.
    """
    linear, _ = parts(head)
    problem: object = None
    z = torch.zeros(1, 3, linear.out_features, dtype=torch.float64, device=_place(linear))
    try:
        width = _width(model, linear)
        states = torch.linspace(1, 2, 3 * width).view(1, 3, width).to(z)
        factors = _run(model, head, z, states)[1].double() / states
        factor = float(factors.mean())
        if not ((factors - factor).abs() <= 1e-6 * factor).all():
            problem = "they differ"
    except Exception as error:
        problem = error
    if problem is not None:
        raise ValueError(
            f"{type(model).__name__} must give its head its backbone's states, times one positive "
            f"number, for a fused head; it has layers of its own between the two ({problem})"
        )
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-6) else factor


def _place(linear: nn.Linear) -> torch.device:
    """On "meta" the weights have no values yet; what is measured must have."""
    device = linear.weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _width(model: Any, linear: nn.Linear) -> int:
    """The width of the backbone's states; some heads have another."""
    return getattr(model.config.get_text_config(), "hidden_size", linear.in_features)


def _run(model: Any, head: Any, z: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a head that returns z over a backbone that returns states; what it was given."""
    tokens = torch.zeros(1, 3, dtype=torch.int64, device=parts(head)[0].weight.device)
    body, embedding = backbone(model, head), model.get_input_embeddings()
    stand_in = _Head(head, z)
    stand_ins: dict[nn.Module, Any] = {
        body: _Backbone(body, states, embedding),
        head: stand_in,
        embedding: _Head(embedding, states),
    }
    with _replaced(model, stand_ins), _uncompiled():
        logits = getattr(model, slot(model))(input_ids=tokens).logits
    return logits, stand_in.given


def backbone(model: Any, head: Any) -> Any:
    """The part of the model that gives the hidden states, or None.

    It is the child with the embedding; where that holds the head too, as a causal LM inside of a
    multimodal model does, the backbone of that.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # of a model that transformers knows none of
        return None
    children = (x for x in model.children() if x is not head and _holds(x, embedding))
    found = next(children, None)
    return backbone(found, head) if found is not None and _holds(found, head) else found


def slot(module: nn.Module) -> str:
    """Where forward is looked up; accelerate's hooks, of a device_map, keep it apart."""
    return "_old_forward" if "_hf_hook" in vars(module) else "forward"


def _holds(module: Any, part: nn.Module) -> bool:
    return any(inner is part for inner in module.modules())


def _uncompiled() -> Any:
    """In the stance in which torch.compile's functions run as they were written."""
    loaded = "torch._dynamo" in sys.modules  # else there is none of them, and this would import it
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


class _StandIn:
    """Answers calls; its attributes are those of the module whose place it takes."""

    _module: Any
    _answer: Tensor

    def __init__(self, module: nn.Module, answer: Tensor) -> None:
        self._module, self._answer = module, answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Head(_StandIn):
    given: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.given = args[0] if args else None
        # A copy: some models write to their logits.
        return self._answer.clone()


class _Backbone(_StandIn):
    """So is the part of it that holds its embedding, which some models call instead."""

    def __init__(self, module: nn.Module, answer: Tensor, embedding: nn.Module) -> None:
        super().__init__(module, answer)
        self._embedding = embedding

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        inner = isinstance(found, nn.Module) and _holds(found, self._embedding)
        return _Backbone(found, self._answer, self._embedding) if inner else found

    def __call__(self, *args: Any, **kwargs: Any) -> "_Output":
        return _Output(self._answer)


class _Output:
    """Hidden states, and None for whatever else a backbone may return."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


@contextmanager
def _replaced(model: nn.Module, stand_ins: dict[nn.Module, Any]) -> Iterator[None]:
    """With other objects in the place of some modules, and without their hooks."""
    slots = [
        (parent._modules, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in stand_ins
    ]
    for children, name, child in slots:
        children[name] = stand_ins[child]
    try:
        yield
    finally:
        for children, name, child in slots:
            children[name] = child
