"""DPO by TRL on our head, switched over in one line.

    pip install -e ".[integrations]"            # TRL 1.16, on Python 3.11 or newer
    python examples/dpo_trl.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized
    python examples/dpo_trl.py --unpatched      # TRL's head: the same losses

Policy and reference run on our head; so do the metrics logits/* and mean_token_accuracy, and the
weights of WPO (`use_weighting=True`).
"""

import argparse

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from entropy_kernels.integrations.trl import patch_trl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--dataset", default="trl-lib/ultrafeedback_binarized")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", default="runs/dpo-trl", help="where checkpoints go")
    parser.add_argument("--unpatched", action="store_true", help="TRL's own head")
    options = parser.parse_args()

    if not options.unpatched:
        patch_trl()

    gpu = torch.cuda.is_available()
    trainer = DPOTrainer(
        model=options.model,
        args=DPOConfig(
            output_dir=options.folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            max_length=1024,
            learning_rate=1e-6,
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
                *(f"{x} {row[x]:.6g}" for x in ("step", "loss", "rewards/margins", "logits/chosen"))
            )


if __name__ == "__main__":
    main()
