"""TRL's SFT, DPO, KTO and RLOO trainers on a model whose steps take a tenth of a second."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import trl
from datasets import Dataset
from trl.kernels import ChunkedLogProbFunction

from tests.integrations.small_grpo import distinct_tokens
from tests.trainer.small import build_model, build_tokenizer

KINDS = ("sft", "dpo", "kto", "rloo")
_SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "seed": 1,
}
_OWN: dict[str, dict[str, Any]] = {
    "sft": {"max_length": None},
    "dpo": {"max_length": None},
    "kto": {"max_length": None},
    "rloo": {"num_generations": 4, "max_completion_length": 12, "num_iterations": 2},
}


def digits(i: int, length: int) -> str:
    """Words with blanks between, `length` of them; another i gives others."""
    return " ".join(str((i * i + 3 * k) % 10) for k in range(length))


def rows(kind: str, count: int = 64, longest: int = 6) -> list[dict[str, Any]]:
    """A data set: prompts of 2 to 5 words, completions of up to `longest` and their end."""
    found = []
    for i in range(count):
        prompt = f"{digits(i, 1 + i % 4)} ="
        good, bad = (digits(7 * i + k, 1 + (i + k) % longest) for k in (1, 2))
        answers: dict[str, dict[str, Any]] = {
            "sft": {"completion": good},
            "dpo": {"chosen": good, "rejected": bad},
            "kto": {"completion": good if i % 2 else bad, "label": bool(i % 2)},
            "rloo": {},
        }
        found.append({"prompt": prompt} | answers[kind])
    return found


def build_trainer(
    kind: str, folder: Any, *, model: Any = None, data: Any = None, **options: Any
) -> Any:
    """A trainer of this kind. `options` are arguments of its class, or settings of its config."""
    name = kind.upper()
    trainer, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    classes = ("ref_model", "peft_config", "compute_metrics")
    own = {key: options.pop(key) for key in classes if key in options}
    if kind == "rloo":
        own["reward_funcs"] = distinct_tokens
    return trainer(
        model=build_model("qwen3") if model is None else model,
        args=config(output_dir=str(folder), **_SETTINGS | _OWN[kind] | options),
        train_dataset=Dataset.from_list(rows(kind) if data is None else data),
        processing_class=build_tokenizer(),
        **own,
    )


def train(kind: str, folder: Any, **options: Any) -> list[dict[str, float]]:
    """What is logged of each step, but times and sizes."""
    trainer = build_trainer(kind, folder, **options)
    trainer.train()
    return logged(trainer)


def logged(trainer: Any) -> list[dict[str, float]]:
    """The numbers of each step that do not depend on the machine's speed."""
    left_out = ("time", "second", "runtime", "flos", "memory", "mfu", "speed", "tps")
    return [
        {name: x for name, x in row.items() if not any(word in name for word in left_out)}
        for row in trainer.state.log_history
        if "loss" in row or "eval_loss" in row
    ]


@contextmanager
def theirs_counted() -> Iterator[list[int]]:
    """The rows of each call of TRL's own head."""
    calls: list[int] = []
    forward: Callable[..., Any] = ChunkedLogProbFunction.forward

    def counted(ctx: Any, hidden: Any, *rest: Any) -> Any:
        calls.append(len(hidden))
        return forward(ctx, hidden, *rest)

    with patch.object(ChunkedLogProbFunction, "forward", staticmethod(counted)):
        yield calls
