"""SFT by TRL on our head, switched over in one line.

    pip install -e ".[integrations]"            # TRL 1.16, on Python 3.11 or newer
    python examples/sft_trl.py --model Qwen/Qwen3-0.6B-Base --dataset trl-lib/Capybara
    python examples/sft_trl.py --unpatched      # TRL's head: the same losses

Logits [T, V] are never made. In 16 bits the log-probs are those of fp32 logits, and metrics
(entropy, mean_token_accuracy) come from the same pass.
"""

import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from entropy_kernels.integrations.trl import patch_trl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B-Base")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", default="runs/sft-trl", help="where checkpoints go")
    parser.add_argument("--unpatched", action="store_true", help="TRL's own head")
    options = parser.parse_args()

    if not options.unpatched:
        patch_trl()

    gpu = torch.cuda.is_available()
    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(
            output_dir=options.folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            max_length=2048,
            learning_rate=2e-5,
            logging_steps=1,
            use_cpu=not gpu,
            bf16=gpu,
            model_init_kwargs={"dtype": "float32"},
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=load_dataset(options.dataset, split="train"),
    )
    trainer.train()
    for row in trainer.state.log_history:
        if "loss" in row:
            print(
                *(f"{x} {row[x]:.6g}" for x in ("step", "loss", "entropy", "mean_token_accuracy"))
            )


if __name__ == "__main__":
    main()
