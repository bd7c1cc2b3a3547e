"""A rollout_func for TRL that samples from the trainer's own model and tells what it knows."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from entropy_kernels import Support
from tests.integrations.small_grpo import build_trainer, columns

SEED = 5
ALL_FIELDS = ("sampling_entropies", "sampling_sets")


@dataclass
class SampleOneByOne:
    """Samples in fp64 from logits that the model computes one token at a time.

    `top` keeps so many ids of each token. `fields` are those that TRL's contract does not have.
    """

    fields: tuple[str, ...] = ("sampling_entropies",)
    top: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields that replace what was sampled."""

    @torch.no_grad()
    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(SEED + trainer.state.global_step)
        names = ("prompt_ids", "completion_ids", "logprobs", "sampling_entropies", "sampling_sets")
        found: dict[str, list[Any]] = {name: [] for name in names}
        for prompt in prompts:
            ids = trainer.processing_class(prompt).input_ids
            rows = self._completion(trainer, ids, generator)
            columns = [list(column) for column in zip(*rows, strict=True)]
            for name, value in zip(names, [ids, *columns], strict=True):
                found[name].append(value)
        keys = ("prompt_ids", "completion_ids", "logprobs", *self.fields)
        return {key: found[key] for key in keys} | self.changes

    def _completion(
        self, trainer: Any, prompt: list[int], generator: torch.Generator
    ) -> list[tuple[int, float, float, list[int]]]:
        """Id, log-prob, entropy and set of each token."""
        ids, rows = list(prompt), []
        for _ in range(trainer.max_completion_length):
            z_V = trainer.model(torch.tensor([ids])).logits[0, -1].double() / trainer.temperature
            kept = z_V.topk(self.top or len(z_V)).indices.sort().values
            logp = z_V[kept].log_softmax(0)
            place = int(torch.multinomial(logp.exp(), 1, generator=generator))
            entropy = -float((logp.exp() * logp).sum())
            rows.append((int(kept[place]), float(logp[place]), entropy, kept.tolist()))
            ids.append(rows[-1][0])
            if ids[-1] in trainer.eos_token_ids:
                break
        return rows


def as_supports(sets: list[list[list[int]]]) -> list[Support]:
    return [Support.of(rows) for rows in sets]


def build(folder: Any, rollout: Any, **options: Any) -> Any:
    """A trainer whose steps are aligned: each completion is used once, by the policy it is of."""
    return build_trainer(folder, rollout_func=rollout, **{"num_iterations": 1} | options)


def run(folder: Any, patch: Any, rollout: Any = None, **options: Any) -> Tensor:
    """Loss, grad_norm and entropy of each step of a run under the patch."""
    with patch:
        trainer = build(folder, rollout or SampleOneByOne(), top_entropy_quantile=0.2, **options)
        return columns(trainer)
