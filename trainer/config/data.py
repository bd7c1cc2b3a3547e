"""Problems, and the verdict on a response."""

import math
import re
from dataclasses import dataclass
from typing import Any

from trainer.config.checks import at_least


@dataclass(frozen=True)
class Data:
    """Where problems come from."""

    task: str = "ladder"
    """The number "ladder" or "ladder:long", a reasoning-gym task as "gym:NAME", or a prompt set as
    "file:PATH" or "hub:NAME[:CONFIGURATION]"."""
    prompt_field: str = "prompt"
    """Prompt sets: the column of the question, text or chat messages."""
    answer_field: str = "answer"
    """Prompt sets: the column of the answer."""
    demonstration_field: str = ""
    """Prompt sets: the column of a worked response, which `warm_start` trains on; "" for none."""
    template: str = "auto"
    """"auto" applies the tokenizer's chat template where it has one, "none" nothing. Any other
    text stands for itself, with the question in the place of {question}."""
    instruction: str = ""
    """Appended to every question of a prompt set or reasoning-gym task."""
    test_fraction: float = 0.05
    """Prompt sets without a test split: the share held out, by hash of the prompt."""
    max_prompt_tokens: int = 0
    """Prompt sets: longer prompts are left out, and counted at the start. With 0 none is left out,
    and a prompt that does not fit into the model's positions is refused at the start."""

    def __post_init__(self) -> None:
        at_least(self, 0, "max_prompt_tokens")
        if self.template not in ("auto", "none") and "{question}" not in self.template:
            raise ValueError(
                'template must be "auto", "none" or a text with {question} in it; '
                f"got {self.template!r}"
            )


@dataclass(frozen=True)
class Reward:
    """The verdict on a response, and what is added to it."""

    function: str = ""
    """A verifier of your own, "module:function", in place of the task's. It is called in processes
    of its own as `function(prompt=..., response=..., answer=...)`, the answer as the data has it,
    and returns a number or a truth value, finite in fp32. Any sign and scale will do, such as 0 and
    2, -1 and 1, or partial credit. A group teaches where its verdicts differ."""
    right: float = 1.0
    """The least verdict on a right answer; accuracies count right answers."""
    failed: float | None = None
    """The verdict when such a process takes too long, crashes or runs out of memory. It must not be
    better than that on a wrong answer, such as -1 for a function of -1 and 1. By default 0, or a
    number below `right` if 0 would be right."""
    seconds: float = 10.0
    """Seconds per answer in such a process; after them the verdict is `failed`, and counted."""
    gigabytes: float = 4.0
    """Gigabytes that such a process may allocate after its imports; enforced on Linux."""
    workers: int = 4
    """The largest number of such processes on each rank."""
    format: str = "boxed"
    """What a response of the right form has: "boxed", a closed \\boxed{...}; "answer",
    <answer>...</answer>; or a regular expression, searched for (in the trainer's process, without
    a time limit)."""
    format_weight: float = 0.0
    """Added to the reward of a response of the right form."""
    keep_special_tokens: bool = False
    """Give the verifier the special tokens of a response too, such as an <answer> that was added
    as one. Those that begin, end or pad a text are left out."""
    drop_truncated: bool = False
    """Leave truncated responses out of the loss (overlong filtering). They still count in their
    group's mean."""

    def __post_init__(self) -> None:
        at_least(self, 1, "workers")
        for name in ("seconds", "gigabytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"reward.{name} must be > 0; got {getattr(self, name)}")
        if not math.isfinite(self.right):
            raise ValueError(f"reward.right must be a finite number; got {self.right}")
        if not math.isfinite(self.verdict_on_failure) or self.is_right(self.verdict_on_failure):
            raise ValueError(
                f"reward.failed must be a finite number below reward.right, {self.right}, or "
                f"failures of the verifier would count as right; got {self.verdict_on_failure}"
            )
        try:
            re.compile(self.format)
        except re.error as error:
            raise ValueError(
                'reward.format must be "boxed", "answer" or a regular expression; got '
                f"{self.format!r}: {error}"
            ) from error

    @property
    def verdict_on_failure(self) -> float:
        """`failed`, or what stands for it."""
        if self.failed is not None:
            return self.failed
        return 0.0 if self.right > 0 else self.right - max(1.0, -self.right)

    def is_right(self, verdict: Any) -> Any:
        """Whether `verdict`, a number or a tensor of some, is that on a right answer."""
        # Verdicts are kept in fp32, where 0.7 is a little less.
        return verdict >= self.right - 1e-6 * abs(self.right)
