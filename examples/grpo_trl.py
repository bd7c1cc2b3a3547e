"""TRL's GRPOTrainer on high-entropy tokens, switched over in one line.

    pip install -e ".[integrations]"             # TRL 1.16, on Python 3.11 or newer
    python examples/grpo_trl.py                  # with our head
    python examples/grpo_trl.py --unpatched      # with TRL's: the same losses, slower

A small model learns sums. `top_entropy_quantile=0.2` is TRL's name for the fraction of "Beyond the
80/20 Rule" (arXiv 2506.01939): the loss keeps the fifth of the tokens with the highest entropy. TRL
multiplies the others by zero after their backward; with the patch they have none.
"""

import argparse
import re

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from entropy_kernels.integrations.trl import patch_trl


def nearness(completions: list[str], answer: list[int], **_: object) -> list[float]:
    """1 for the right sum, less the further off the first number is."""
    found = [re.search(r"\d+", text.replace(" ", "")) for text in completions]
    pairs = zip(found, answer, strict=True)
    return [1 / (1 + abs(int(guess[0][:9]) - right)) if guess else 0.0 for guess, right in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B-Base")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", default="runs/grpo-trl", help="where checkpoints go")
    parser.add_argument("--unpatched", action="store_true", help="TRL's own head")
    options = parser.parse_args()

    if not options.unpatched:
        patch_trl()

    gpu, pairs = torch.cuda.is_available(), [(i % 10, i // 10) for i in range(100)]
    sums = [{"prompt": f"{a} + {b} =", "answer": a + b} for a, b in pairs]
    lengths = {"per_device_train_batch_size": 32, "num_generations": 8, "max_completion_length": 8}
    quiet = {"logging_steps": 1, "disable_tqdm": True, "report_to": [], "save_strategy": "no"}
    where = {"use_cpu": not gpu, "bf16": gpu, "model_init_kwargs": {"dtype": "float32"}}
    rule = {"top_entropy_quantile": 0.2, "loss_type": "dapo", "epsilon_high": 0.28}
    run = {"output_dir": options.folder, "max_steps": options.steps, "learning_rate": 1e-5}
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=nearness,
        args=GRPOConfig(**run, **rule, **lengths, **where, **quiet),
        train_dataset=Dataset.from_list(sums),
    )
    trainer.train()
    for row in trainer.state.log_history:
        if "reward" in row:
            print(*(f"{x} {row[x]:.6g}" for x in ("step", "loss", "entropy", "reward")))


if __name__ == "__main__":
    main()
