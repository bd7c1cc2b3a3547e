"""What crosses a file: the rollouts of a step.

B sequences, P prompt width, L response width.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from trainer.tasks.problem import Problem


@dataclass
class Rollouts:
    """Sampled responses: prompts padded on the left to P, responses on the right to L."""

    problems: list[Problem]  # B
    responses: list[str]  # B, without end-of-sequence
    group_B: Tensor  # int64: the prompt a row answers
    prompt_BP: Tensor  # int64 token ids
    prompt_mask_BP: Tensor  # bool
    response_BL: Tensor  # int64 token ids, end-of-sequence included
    mask_BL: Tensor  # bool: response tokens, end-of-sequence included
    sampler_logprob_BL: Tensor  # fp32: as the engine sampled them
    truncated_B: Tensor  # bool: stopped by the length limit
    reward_B: Tensor  # fp32: the verdict, without terms
    timed_out_B: Tensor  # bool: the verifier took too long
    crashed_B: Tensor  # bool: the verifier failed

    def __len__(self) -> int:
        return len(self.problems)

    def rows(self, index: Tensor) -> "Rollouts":
        """The rollouts at `index`, an int64 tensor of row numbers, in its order."""
        picked: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            picked[field.name] = (
                value[index] if isinstance(value, Tensor) else [value[i] for i in index.tolist()]
            )
        return Rollouts(**picked)

    def to(self, device: torch.device) -> "Rollouts":
        """The same on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: x.to(device) for k, x in values.items() if torch.is_tensor(x)}
        return replace(self, **moved)

    @staticmethod
    def concatenate(parts: "list[Rollouts]", pad_id: int) -> "Rollouts":
        """One batch of all `parts`, widened to the widest prompt and response."""
        prompt = max(part.prompt_BP.shape[1] for part in parts)
        response = max(part.response_BL.shape[1] for part in parts)

        def left(x: Tensor, fill: int) -> Tensor:
            return torch.nn.functional.pad(x, (prompt - x.shape[1], 0), value=fill)

        def right(x: Tensor, fill: int) -> Tensor:
            return torch.nn.functional.pad(x, (0, response - x.shape[1]), value=fill)

        return Rollouts(
            problems=[problem for part in parts for problem in part.problems],
            responses=[text for part in parts for text in part.responses],
            group_B=torch.cat([part.group_B for part in parts]),
            prompt_BP=torch.cat([left(part.prompt_BP, pad_id) for part in parts]),
            prompt_mask_BP=torch.cat([left(part.prompt_mask_BP, False) for part in parts]),
            response_BL=torch.cat([right(part.response_BL, pad_id) for part in parts]),
            mask_BL=torch.cat([right(part.mask_BL, False) for part in parts]),
            sampler_logprob_BL=torch.cat([right(part.sampler_logprob_BL, 0) for part in parts]),
            truncated_B=torch.cat([part.truncated_B for part in parts]),
            reward_B=torch.cat([part.reward_B for part in parts]),
            timed_out_B=torch.cat([part.timed_out_B for part in parts]),
            crashed_B=torch.cat([part.crashed_B for part in parts]),
        )
