"""What GRPO with LoRA needs on one GPU: the planner's parts, less those of weights that are frozen.

    python -m trainer.plan.lora [--gpu 4090] [--rank 16]

prints the table in the header of examples/grpo_lora_24gb.py. One process samples by transformers
and trains, as TRL does by default. Weights are bf16, adapters, their gradients and AdamW's moments
fp32; there is no reference model.
"""

import argparse
import sys
from dataclasses import dataclass, replace

from trainer.config import Rollout
from trainer.plan.architectures import Architecture, find_architecture
from trainer.plan.devices import find_device
from trainer.plan.job import Assumptions, Job
from trainer.plan.memory import Memory, peak, step_memory
from trainer.presets import PRESETS

SIZES = ("qwen3-0.6b", "qwen3-1.7b")
# Parts that exist for weights which are trained, or grow with their number.
_OF_TRAINED = {
    *("AdamW's moments", "gradients", "gradient of the head", "embedding's gradient"),
}
ADAPTERS = "adapters, gradients and moments"


@dataclass(frozen=True)
class Lora:
    """One step of GRPO with LoRA on all matrices of the layers.

    `sequences` are sampled at once and trained on `micro_batch` at a time.
    """

    rank: int = 16
    sequences: int = 64
    group: int = 8
    micro_batch: int = 8
    prompt: int = 256
    completion: int = 1024
    fraction: float = 0.2


def lora_parameters(model: Architecture, rank: int) -> int:
    """Parameters of A and B of each matrix: q, k, v, o, gate, up and down."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    D, wide = model.hidden, model.intermediate
    sides = 2 * (D + q) + 2 * (D + kv) + 3 * (D + wide)
    return model.layers * rank * sides


def lora_job(size: str, gpu: str, options: Lora) -> Job:
    """The planner's job with the same sequences, in bf16 and on one GPU.

    Raises:
        ValueError: an unknown size or GPU, or numbers that cannot be meant.
    """
    config = PRESETS[size]()
    longest = options.prompt + options.completion
    config = replace(
        config,
        model=replace(config.model, dtype="bfloat16", compute_dtype=None),
        engine=replace(config.engine, kind="transformers"),
        rollout=Rollout(
            prompts=options.sequences // options.group,
            group_size=options.group,
            max_new_tokens=options.completion,
            batch_size=options.sequences,
        ),
        algorithm=replace(
            config.algorithm, fraction=options.fraction, min_groups=1, overlong_cache=0
        ),
        optimizer=replace(
            config.optimizer, mini_batches=1, tokens_per_micro_batch=options.micro_batch * longest
        ),
    )
    assumptions = Assumptions(prompt=options.prompt)
    return Job(config, find_architecture(size), find_device(gpu, {}), assumptions=assumptions)


def lora_memory(job: Job, rank: int) -> Memory:
    """Bytes of each part in every phase, of the job's model frozen and adapters trained."""
    adapters = {ADAPTERS: 16.0 * lora_parameters(job.architecture, rank)}
    return {
        phase: {name: x for name, x in parts.items() if name not in _OF_TRAINED} | adapters
        for phase, parts in step_memory(job).items()
    }


def lora_table(gpu: str, options: Lora) -> str:
    """Gigabytes of each size, a line per part: at the peak of sampling and of training."""
    columns: list[dict[str, float]] = []
    for size in SIZES:
        memory = lora_memory(job := lora_job(size, gpu, options), options.rank)
        sample = memory.pop("sample")
        training = memory[peak(memory)[0]]
        always = {"weights": sample["weights"], ADAPTERS: sample[ADAPTERS]}
        always["CUDA, assumed"] = sample["reserved"]
        rest = sum(always.values())
        columns.append(
            always
            | {
                "cache and logits, sampling": sum(sample.values()) - rest,
                "activations and head, training": sum(training.values()) - rest,
                "most at once": max(sum(sample.values()), sum(training.values())),
            }
        )
    least = f"GB of {job.device.memory / 1e9:.1f}"
    lines = [f"{least:<32}" + "".join(f"{size.capitalize():>12}" for size in SIZES)]
    for name in columns[0]:
        lines.append(f"{name:<32}" + "".join(f"{column[name] / 1e9:12.1f}" for column in columns))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", default="4090", help="as in `python -m trainer plan`")
    for name in ("rank", "sequences", "micro_batch", "prompt", "completion"):
        default = getattr(Lora(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    print(lora_table(options.pop("gpu"), Lora(**options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
