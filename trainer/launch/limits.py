"""Limits of every run, whatever its data; `train` and `plan` check them before anything else."""

from typing import Any

from trainer.config import Config, Engine


def check_ranks(settings: Config, on_machine: int, gpus: int | None = None) -> None:
    """Check what `settings` ask of machines with `on_machine` ranks each, and `gpus` GPUs.

    `gpus` is None where their number is not known, and 0 where ranks train on CPUs.

    Raises:
        ValueError: engine.devices are too few for the ranks, train a rank, or are not there.
    """
    engine = settings.engine
    if engine.kind != "vllm":
        return
    if gpus == 0:
        if engine.devices:
            raise ValueError(
                f"engine.devices names GPUs, but the device is cpu; got {engine.devices}"
            )
        return
    for rank in range(on_machine):
        devices_of(engine, rank, on_machine)
    named = engine.devices
    if len(set(named)) < len(named) or any(device < on_machine for device in named):
        raise ValueError(
            f"engine.devices must name GPUs that no rank trains on, each once; got {named}, and "
            f"the ranks of a machine train on the first {on_machine}"
        )
    if gpus is not None and any(device >= gpus for device in named):
        raise ValueError(
            f"engine.devices must be GPUs of the machine, which has {gpus}; got {named}"
        )


def devices_of(engine: Engine, rank: int, on_machine: int | None = None) -> list[int]:
    """GPUs of the engine of local rank `rank`: the trainer's, or its share of those set aside.

    Raises:
        ValueError: too few are set aside.
    """
    size = engine.tensor_parallel
    if not engine.devices and size == 1:
        return [rank]
    mine = list(engine.devices[rank * size : (rank + 1) * size])
    if len(mine) < size:
        ranks = "" if on_machine is None else f"{on_machine} "
        raise ValueError(
            f"engine.devices must name tensor_parallel, {size}, GPUs for each of the {ranks}ranks "
            f"of a machine; got {engine.devices}, which leaves local rank {rank} without"
        )
    return mine


def model_limits(config: Any) -> tuple[int, int, int | None]:
    """Heads, key-value heads and positions of a transformers configuration, for `check_model`.

    A model without heads, or with other heads in each layer, has 0, which any number divides.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        heads = 0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return (
        heads,
        kv_heads if isinstance(kv_heads, int) else heads,
        getattr(text, "max_position_embeddings", None),
    )


def check_model(
    settings: Config, heads: int, kv_heads: int, positions: int | None, prompt: int = 1
) -> None:
    """Check `settings` against a model with so many heads and positions.

    `prompt` is the length of the prompts, or of the shortest that there may be.

    Raises:
        ValueError: the engine cannot be spread over tensor_parallel GPUs, or sequences are longer
            than the model or the engine takes.
    """
    engine = settings.engine
    name, new = max(
        ("rollout.max_new_tokens", settings.rollout.max_new_tokens),
        ("eval.max_new_tokens", settings.eval.max_new_tokens),
        key=lambda asked: asked[1],
    )
    longest = engine.max_model_len if engine.kind == "vllm" else 0
    if positions is not None and longest > positions:
        raise ValueError(
            f"engine.max_model_len must be at most the model's positions, {positions}; got "
            f"{longest}"
        )
    check_length("the model's {} positions", positions, prompt, new, name)
    check_length("engine.max_model_len, {}", longest or None, prompt, new, name)
    size = engine.tensor_parallel if engine.kind == "vllm" else 1
    if heads % size:
        raise ValueError(
            f"engine.tensor_parallel must divide the model's {heads} heads; got {size}"
        )
    if kv_heads % size and size % max(kv_heads, 1):
        raise ValueError(
            f"engine.tensor_parallel must divide the model's {kv_heads} key-value heads, or be a "
            f"multiple of them; got {size}"
        )


def check_length(
    what: str, limit: int | None, prompt: int, new: int, name: str = "rollout.max_new_tokens"
) -> None:
    """Raise ValueError where a prompt of `prompt` tokens and `new` new ones exceed `limit`.

    `what` names the limit, with {} in the place of the number, and `name` the setting of `new`.
    """
    if limit is not None and prompt + new > limit:
        kept = name.startswith("rollout.")
        under_way = f" (a run that is under way takes it with --allow-changes {name})" * kept
        raise ValueError(
            f"a prompt of {prompt} tokens and up to {new} new ones do not fit into "
            f"{what.format(limit)}; lower {name}{under_way} or leave such prompts out"
        )
