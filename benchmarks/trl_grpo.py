"""TRL's GRPOTrainer, without generation: for benchmarks of the training part of its step."""

import tempfile
from typing import Any

from torch import nn


def grpo_trainer(model: nn.Module, tokenizer: Any, sequences: int, **options: Any) -> Any:
    """A GRPOTrainer of `model` on a CPU in fp32, with DAPO's loss; its batch is of `sequences`.

    `options` are those of GRPOConfig. The prompts and the reward are never used.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.gettempdir(),
            use_cpu=True,
            bf16=False,
            report_to=[],
            num_generations=2,
            per_device_train_batch_size=sequences,
            # Where layers are checkpointed, the model comes so.
            gradient_checkpointing=False,
            loss_type="dapo",
            **options,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * sequences),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer
