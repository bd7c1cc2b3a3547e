"""A GRPOTrainer on a Qwen3 so small that a step takes a tenth of a second.

python -m tests.integrations.small_grpo prints, for each loss type of TRL's, by how much 20 steps on
our head differ from 20 on TRL's; and by how much TRL's do from its own with chunks of another size.
"""

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tests.trainer.small import build_model, build_tokenizer

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
COLUMNS = ("loss", "grad_norm", "entropy")
# Each generation is used twice, so that in every second step ratios differ from 1 and some are
# clipped; and a learning rate at which they do.
_SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "num_iterations": 2,
    "max_completion_length": 12,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "epsilon_high": 0.28,
    "gradient_checkpointing": False,
    "seed": 1,
}


def distinct_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs within most groups."""
    return [len(set(ids)) / 10 for ids in completion_ids]


def build_trainer(
    folder: Any, *, model: Any = None, peft: Any = None, rollout_func: Any = None, **changes: Any
) -> Any:
    """`changes` are settings of its GRPOConfig. Prompts have 1 to 7 words."""
    sums = [" + ".join("0123456789"[i % 7 : i % 7 + 1 + i % 4]) for i in range(64)]
    return GRPOTrainer(
        model=build_model("qwen3") if model is None else model,
        reward_funcs=distinct_tokens,
        args=GRPOConfig(output_dir=str(folder), **_SETTINGS | changes),
        train_dataset=Dataset.from_list([{"prompt": f"{text} ="} for text in sums]),
        processing_class=build_tokenizer(),
        peft_config=peft,
        rollout_func=rollout_func,
    )


def train(folder: Any, **options: Any) -> Tensor:
    """Loss, grad_norm and entropy [steps, 3] of a run."""
    return columns(build_trainer(folder, **options))


def columns(trainer: Any) -> Tensor:
    """The same of a trainer's own run."""
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return torch.tensor([[row[name] for name in COLUMNS] for row in rows], dtype=torch.float64)


def difference(got: Tensor, want: Tensor) -> Tensor:
    """The largest difference of each column [3], relative to its largest value in `want`.

    A loss is a sum of terms of both signs and can be near zero at any one step.
    """
    return ((got - want).abs().amax(0) / want.abs().amax(0)).nan_to_num(nan=torch.inf)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    from trl.trainer import utils

    from entropy_kernels.integrations._patch import Patch
    from entropy_kernels.integrations.trl import patch_trl

    def run(patch: Any, options: dict[str, Any]) -> Tensor:
        with patch, tempfile.TemporaryDirectory() as folder:
            return train(folder, model=build_model("qwen3", vocab_size=512), **options)

    for loss_type in LOSS_TYPES:
        for quantile in (1.0, 0.2):
            options = {"loss_type": loss_type, "top_entropy_quantile": quantile, "max_steps": 20}
            want = run(Patch(), options)
            chunks = run(Patch((utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 100)), options)
            for name, got in {"ours": run(patch_trl(), options), "chunks of 100": chunks}.items():
                found = zip(COLUMNS, difference(got, want).tolist(), strict=True)
                print(loss_type, quantile, name, *(f"{x} {worst:.1e}" for x, worst in found))


if __name__ == "__main__":
    main()
