"""TRL's GRPOTrainer on high-entropy tokens, switched over in one line.

    pip install -e . trl
    python examples/grpo_trl.py                  # with our head
    python examples/grpo_trl.py --unpatched      # with TRL's: the same losses, slower

A Qwen3 of random weights learns to answer with even digits, on a CPU, in under a minute; nothing is
downloaded. `top_entropy_quantile=0.2` is TRL's name for the fraction of "Beyond the 80/20 Rule"
(arXiv 2506.01939): the loss keeps the fifth of the tokens with the highest entropy. TRL multiplies
the others by zero after their backward; with the patch they have none.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from entropy_kernels.integrations.trl import patch_trl

WORDS = ["<pad>", "<eos>", "<unk>", *"0123456789", "+", "="]


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def build_model(vocabulary: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=WORDS.index("<eos>"),
            pad_token_id=WORDS.index("<pad>"),
        )
    )


def even_digits(completions: list[str], **_: object) -> list[float]:
    """The share of even digits in each answer."""
    return [sum(c in "02468" for c in text) / max(len(text.split()), 1) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--unpatched", action="store_true", help="TRL's own head")
    options = parser.parse_args()

    if not options.unpatched:
        patch_trl()

    trainer = GRPOTrainer(
        model=build_model(len(WORDS)),
        reward_funcs=even_digits,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            top_entropy_quantile=0.2,
            loss_type="dapo",
            epsilon_high=0.28,
            max_steps=options.steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=8,
            learning_rate=3e-3,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": f"{i % 10} + {i // 10} ="} for i in range(100)]
        ),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    for row in trainer.state.log_history:
        if "reward" in row:
            print(
                f"step {row['step']}", *(f"{x} {row[x]:.6f}" for x in ("loss", "entropy", "reward"))
            )


if __name__ == "__main__":
    main()
