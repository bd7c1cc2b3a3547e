"""Which settings a run keeps when it resumes, and which may differ.

A run keeps the settings that shape it: data, objective, model, seeds. Settings that only shape how
it runs may differ, and each difference is noted. Every setting is in one of the two tables, by
itself or by its group; a test holds this.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config.files import close_names, fill, leaves
from trainer.config.run import Config
from trainer.config.sources import sources

_ROUNDING = "sums are rounded otherwise"
_JUDGED = "answers near the limit may be judged otherwise"

FREE: Mapping[str, str] = {
    "name": "",
    "root": "",
    "steps": "",
    "threads": _ROUNDING,
    "device": _ROUNDING,
    "checkpoint_every": "",
    "keep_checkpoints": "",
    "keep_every": "",
    "samples_every": "",
    "samples": "",
    "eval": "evaluations before and after may not compare",
    "model.attention": _ROUNDING,
    "model.impl": _ROUNDING,
    "model.gradient_checkpointing": _ROUNDING,
    "warm_start.cache": "",
    "engine": "",
    "engine.kind": "another engine draws other random numbers",
    "engine.max_model_len": "positions that longrope or dynamic NTK scale are scaled otherwise",
    "engine.tensor_parallel": _ROUNDING,
    "engine.enforce_eager": _ROUNDING,
    "engine.dtype": _ROUNDING,
    "rollout.batch_size": _ROUNDING,
    "reward.seconds": _JUDGED,
    "reward.gigabytes": _JUDGED,
    "reward.workers": "",
    "algorithm.compare_every": _ROUNDING,
    "optimizer.tokens_per_micro_batch": _ROUNDING,
    "optimizer.max_nonfinite": "",
    "tracking": "",
}
"""Settings that may differ, and the effect; "" if the run is the same."""

KEPT = frozenset(
    [
        "seed",
        "model.path",
        "model.dtype",
        "model.compute_dtype",
        *(f"data.{n}" for n in ("task", "prompt_field", "answer_field", "template", "instruction")),
        *(f"data.{n}" for n in ("demonstration_field", "test_fraction", "max_prompt_tokens")),
        *(f"warm_start.{n}" for n in ("steps", "traces", "batch_size", "learning_rate")),
        *(f"warm_start.{n}" for n in ("warmup_steps", "weight_decay")),
        *(f"rollout.{n}" for n in ("prompts", "group_size", "max_new_tokens", "temperature")),
        *(f"rollout.{n}" for n in ("top_k", "top_p", "min_p")),
        *(f"reward.{n}" for n in ("function", "right", "failed", "format", "format_weight")),
        "reward.drop_truncated",
        "reward.keep_special_tokens",
        *(f"algorithm.{n}" for n in ("loss_type", "fraction", "which")),
        *(f"algorithm.{n}" for n in ("old_logprob", "entropy_source")),
        *(f"algorithm.{n}" for n in ("denominator", "clip_low", "clip_high", "dual_clip")),
        *(f"algorithm.{n}" for n in ("correction", "correction_cap", "correction_floor")),
        *(f"algorithm.entropy_{n}" for n in ("coef", "target", "band", "delta", "bounds", "over")),
        *(f"algorithm.{n}" for n in ("advantage", "max_rounds", "min_groups")),
        *(f"algorithm.{n}" for n in ("overlong_cache", "overlong_factor")),
        *(f"optimizer.{n}" for n in ("learning_rate", "warmup_steps", "betas", "weight_decay")),
        *(f"optimizer.{n}" for n in ("grad_clip", "mini_batches")),
    ]
)
"""Settings that may differ only if they are allowed by name."""

# Settings that a run uses before its first step and never again.
_USED = {
    "model.path": "the run goes on with its own weights",
    "warm_start": "its warm start was before",
}
_PATHS = ("root", "warm_start.cache", "data.task", "model.path")


@dataclass(frozen=True)
class Change:
    """A setting that has changed, or the contents of what it names."""

    name: str
    was: Any
    now: Any
    effect: str | None = None
    """What comes of it; None where it needs leave."""

    @property
    def note(self) -> str:
        """What comes of it, where there is something to say."""
        return self.effect or _USED.get(self.name, _USED.get(self.name.partition(".")[0], ""))

    def __str__(self) -> str:
        return f"{self.name} was {_shown(self.was)}, now {_shown(self.now)}"


def effect(name: str) -> str | None:
    """What comes of another value of setting `name`; None where a run keeps it."""
    return FREE.get(name, FREE.get(name.partition(".")[0]))


def differences(before: Mapping[str, Any], now: Config, directory: Path) -> list[Change]:
    """The settings of `now` that differ from `before`, a run's recorded ones, by name.

    A setting that `before` lacks, as of a run that began before there was one, had its default.
    Paths are the same where they lead to the same place; those of `before` began in `directory`.
    Sources of log-probs and entropies are compared by what "auto" stands for.
    """
    old, new = _standing(recorded(before)), _standing(now)
    return [
        Change(name, old[name], new[name], effect(name))
        for name in sorted(new)
        if old[name] != new[name] and not _same_place(name, old[name], new[name], directory)
    ]


def recorded(values: Mapping[str, Any]) -> Config:
    """The settings in a run.json, by name; defaults for those that it lacks. They are unchecked."""
    return fill(Config(), dict(_flat(values)))


def known_names(names: Sequence[str]) -> tuple[str, ...]:
    """`names` of settings and groups of them, with dashes as options have them or without.

    Raises:
        ValueError: one is neither.
    """
    found = tuple(name.replace("-", "_") for name in names)
    known = leaves()
    known |= {name.partition(".")[0]: None for name in known if "." in name}
    for name in found:
        if name not in known:
            raise ValueError(f"no setting {name!r} to be changed{close_names(name, known)}")
    return found


def _standing(config: Config) -> dict[str, Any]:
    """The settings by name, those of `sources` with what "auto" stands for."""
    resolved = {f"algorithm.{name}": value for name, value in asdict(sources(config)).items()}
    return dict(_flat(asdict(config))) | resolved


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def _same_place(name: str, was: Any, now: Any, directory: Path) -> bool:
    if name not in _PATHS or "tiny" in (was, now):  # the built-in model
        return False
    if name == "data.task":
        (kind, _, was), (other, _, now) = was.partition(":"), now.partition(":")
        if not kind == other == "file":
            return False
    return (directory / was).resolve() == Path(now).resolve()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
