"""GRPO with LoRA on one GPU of 24 GB, for Qwen3-0.6B and Qwen3-1.7B, by TRL on our head.

    pip install -e ".[integrations]"  # TRL 1.16 and PEFT, on Python 3.11 or newer
    python examples/grpo_lora_24gb.py --model Qwen/Qwen3-1.7B

By the planner (`python -m trainer.plan.lora`), not measured:

    GB of 25.8                        Qwen3-0.6b  Qwen3-1.7b
    weights                                  1.2         3.4
    adapters, gradients and moments          0.2         0.3
    CUDA, assumed                            4.0         4.0
    cache and logits, sampling               9.5         9.5
    activations and head, training           1.7         2.7
    most at once                            14.8        17.2
"""

import argparse
import re

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from entropy_kernels.integrations.trl import patch_trl

RANK, MICRO_BATCH = 16, 8


def right(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Whether the last number is that after GSM8K's ####."""
    last = [re.findall(r"-?\d+", text.replace(",", ""))[-1:] for text in (*completions, *answer)]
    return [float(x == y) for x, y in zip(last, last[len(answer) :], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-1.7B")
    parser.add_argument("--dataset", nargs="+", default=["openai/gsm8k", "main"])
    parser.add_argument("--sequences", type=int, default=64, help="sampled and trained on per step")
    parser.add_argument("--completion", type=int, default=1024, help="tokens at the most")
    options = parser.parse_args()
    patch_trl()
    gpu, accumulate = torch.cuda.is_available(), options.sequences // MICRO_BATCH
    batch = {"per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": accumulate}
    run = {"output_dir": "runs/grpo-lora", "max_completion_length": options.completion}
    where = {"use_cpu": not gpu, "bf16": gpu, "model_init_kwargs": {"dtype": "bfloat16"}}
    data = load_dataset(*options.dataset, split="train").rename_column("question", "prompt")
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=right,
        train_dataset=data,
        args=GRPOConfig(top_entropy_quantile=0.2, **run, **batch, **where, report_to=[]),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
    )
    print(f"mean loss {trainer.train().training_loss:.6f}")


if __name__ == "__main__":
    main()
