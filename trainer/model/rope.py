"""Rotary positions that depend on the sequence, and not on its batch.

Two kinds of them change their frequencies with the longest position they are given: longrope, from
short factors to long ones, and dynamic NTK, which grows. In transformers that is the longest of the
batch, and keys that are cached stay as they were. Here it is always the longest that the model is
used with, as vLLM has it (Phi3LongRoPEScaledRotaryEmbedding: `max_model_len`).
"""

from typing import Any

from torch import Tensor, nn


def settings_of(config: Any) -> list[dict[str, Any]]:
    """Each group of rope settings in a text configuration: one, or one for a type of layers."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [x for x in found.values() if isinstance(x, dict)]


def longest_sequence(config: Any, asked: int = 0) -> int | None:
    """The longest prompt and response together: `asked`, or the positions of `config`.

    Only dynamic NTK goes on beyond the positions. None: there is no limit.
    """
    positions = getattr(config, "max_position_embeddings", None)
    grows = any(rope.get("rope_type") == "dynamic" for rope in settings_of(config))
    if positions is None or (asked and grows):
        return asked or None
    return min(asked, positions) if asked else positions


def fix_rope(model: nn.Module, longest: int | None) -> list[str]:
    """Let each rotary embedding that depends on its batch see position `longest - 1` each time.

    Returns what it did, in words; empty for models without such embeddings.
    """
    fixed = []
    modules: Any = model.modules()
    for module in modules:
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if longest is None or not kinds & {"dynamic", "longrope"}:
            continue
        if not hasattr(module, "_last_position"):
            module.register_forward_pre_hook(_append, with_kwargs=True)
            module.register_forward_hook(_cut)
        module._last_position = longest - 1
        fixed += sorted(str(kind) for kind in kinds & {"dynamic", "longrope"})
    return fixed


def fixed_configuration(config: Any, longest: int) -> None:
    """Write into `config` what `fix_rope` does, if its reader would do otherwise.

    Dynamic NTK at one length is plain rope of another base; vLLM takes a length of its own.
    """
    for rope in settings_of(config):
        if rope.get("rope_type") == "dynamic":
            head_dim = getattr(config, "head_dim", None)
            head_dim = head_dim or config.hidden_size // config.num_attention_heads
            dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
            factor, positions = rope.pop("factor"), config.max_position_embeddings
            length = max(longest, positions)
            growth = factor * length / positions - (factor - 1)
            rope["rope_theta"] *= growth ** (dim / (dim - 2))
            rope["rope_type"] = "default"
            config.max_position_embeddings = length


def _append(module: Any, args: tuple, options: dict[str, Any]) -> tuple:
    last = module._last_position
    if "position_ids" in options:
        return args, options | {"position_ids": _with(options["position_ids"], last)}
    return (args[0], _with(args[1], last), *args[2:]), options


def _with(position_ids: Tensor, last: int) -> Tensor:
    return nn.functional.pad(position_ids, (0, 1), value=last)


def _cut(module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output[..., :-1, :]
    return tuple(part[..., :-1, :] for part in output)
