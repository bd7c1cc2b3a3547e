"""The planner against a real run on this machine: bytes by part, and flops, of one update.

python -m benchmarks.plan_check                 measures every case, each in processes of its own,
                                                and writes benchmarks/results/plan_check.json
python -m benchmarks.plan_check NAME FOLDER     measures one in this process, with the model in
                                                FOLDER, and prints it as JSON

The run is `trainer.train` on a Qwen3 of random weights. Linux only. torch's hooks on optimizer
steps mark the ends of updates: the second is measured for memory, the third for flops, because
torch's FlopCounterMode holds tensors longer. Memory is resident memory by the kernel's counters,
which the code that is loaded on the way and what malloc keeps blur by some tens of MB. The counter
does not see into the head's operator: the flops are the layers'.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.sources import processes
from entropy_kernels._bench.result_text import result_text
from entropy_kernels._bench.rounds import status
from trainer.config import Algorithm, Config, Eval, Model, Optimizer, Rollout
from trainer.plan.architectures import Architecture
from trainer.plan.devices import cpu
from trainer.plan.job import Assumptions, Job
from trainer.plan.plan import plan

RESULT = Path(__file__).parent / "results" / "plan_check.json"
WORDS = ["<pad>", "<eos>", *"0123456789+="]
PROMPT = 32
SPREAD = 8.0
"""The weight of the last norm, by which logits spread."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained: three updates of 8 sequences, in micro-batches."""

    architecture: Architecture
    response: int
    checkpointing: bool = True
    entropy_source: str = "old"
    attention: str = "eager"
    micro_batches: int = 1
    ranks: int = 1
    """Processes that shard it."""

    def job(self) -> Job:
        """The same for the planner: every sequence reaches the limit."""
        length = PROMPT + self.response
        config = Config(
            name="run",
            steps=1,
            threads=1,
            device="cpu",
            eval=Eval(problems=1),
            samples=0,
            model=Model(
                path="model",
                attention=self.attention,
                gradient_checkpointing=self.checkpointing,
            ),
            rollout=Rollout(prompts=6, group_size=4, max_new_tokens=self.response, batch_size=24),
            algorithm=Algorithm(entropy_source=self.entropy_source, min_groups=1),  # type: ignore[arg-type]
            optimizer=Optimizer(
                mini_batches=3,
                learning_rate=1e-9,  # all updates find the same entropies
                tokens_per_micro_batch=8 * length // self.micro_batches // self.ranks,
            ),
        )
        assumptions = Assumptions(response_share=1.0, prompt=PROMPT, useful=1.0)
        return Job(config, self.architecture, cpu(), self.ranks, assumptions=assumptions)


# About 100 M parameters each: most of them in the embedding, or in the layers.
_WIDE = Architecture(151_936, 512, 8, 8, 4, 64, 1536, True)
_DEEP = Architecture(8192, 768, 12, 12, 4, 64, 2304, False)
_SMALL = Architecture(4096, 256, 6, 4, 2, 64, 768, True)
CASES = {
    "vocabulary 151,936": Case(_WIDE, 96),
    "vocabulary 151,936, current entropies": Case(_WIDE, 96, entropy_source="current"),
    "vocabulary 151,936, 2 micro-batches": Case(_WIDE, 96, micro_batches=2),
    "deep": Case(_DEEP, 96),
    "deep, activations kept": Case(_DEEP, 96, checkpointing=False),
    "deep, activations kept, sdpa": Case(_DEEP, 96, checkpointing=False, attention="sdpa"),
    "deep, 2 ranks": Case(_DEEP, 96, ranks=2),
    "small": Case(_SMALL, 64, checkpointing=False),
}


class Even:
    """A prompt of 32 tokens; every other response is right, so every group is useful."""

    name = "even"
    num_train = None
    num_test = 1

    def __init__(self) -> None:
        self._answers = 0

    def problem(self, split: str, index: int) -> Any:
        from trainer.tasks.problem import Problem

        return Problem(" ".join(["1", "+"] * (PROMPT // 2)), None)

    def reward(self, problem: Any, response: str) -> float:
        self._answers += 1
        return float(self._answers % 2)


def build(architecture: Architecture, folder: Path) -> None:
    """A transformers folder with random weights; its tokenizer knows a few of the tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    ).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=architecture.vocabulary,
        hidden_size=architecture.hidden,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        intermediate_size=architecture.intermediate,
        tie_word_embeddings=architecture.tied,
        max_position_embeddings=4096,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    # Else all entropies are next to that of the uniform distribution, and many tie at a threshold.
    model.model.norm.weight.data.fill_(SPREAD)
    model.save_pretrained(folder)


class Probe:
    """Reads memory at the ends of optimizer steps, and counts the flops of the third update."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        self.counter = FlopCounterMode(display=False)
        self.read: dict[str, int] = {"start": status("VmRSS")}
        self.steps = 0

    def before(self, *_: Any) -> None:
        """An optimizer step begins."""
        self.steps += 1
        if self.steps == 1:
            self.read["first gradients"] = status("VmRSS")
        elif self.steps == 2:
            self.read["update's peak"] = status("VmHWM") - self._at_reset
            self._reset()
        else:
            self.counter.__exit__(None, None, None)

    def after(self, *_: Any) -> None:
        """An optimizer step ends."""
        if self.steps == 1:
            self.read["first moments"] = status("VmRSS")
            self._reset()
        elif self.steps == 2:
            self.read["AdamW's peak"] = status("VmHWM") - self._at_reset
            self.counter.__enter__()

    def _reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts from what there is
        self._at_reset = status("VmRSS")


def measure(case: Case, folder: Path) -> dict[str, dict[str, float]]:
    """Part -> measured and predicted, bytes and flops, of this process."""
    from torch.optim import optimizer as hooks

    import trainer.run
    from trainer.train import train

    trainer.run.make_task = lambda *_: Even()  # type: ignore[assignment]
    job = case.job()
    model = replace(job.config.model, path=str(folder / "model"))
    probe = Probe()
    hooks.register_optimizer_step_pre_hook(probe.before)
    hooks.register_optimizer_step_post_hook(probe.after)
    train(replace(job.config, root=str(folder), model=model))
    if probe.steps != 3:
        raise RuntimeError(f"{probe.steps} of 3 updates were made; the others selected no token")
    return _compare(job, probe)


def _compare(job: Job, probe: Probe) -> dict[str, dict[str, float]]:
    found, read, updates = plan(job), probe.read, job.config.optimizer.mini_batches
    memory, state = found.memory, sum(found.memory["AdamW"].values())
    sums = {phase: sum(parts.values()) for phase, parts in memory.items()}
    backward = max(sums[phase] for phase in ("head", "last layer", "first layer", "end"))
    flops = found.flops
    layers = (flops.forward + flops.backward + flops.recompute) / updates / job.gpus
    pairs = {
        "weights and gradients": (
            read["first gradients"] - read["start"],
            state - memory["AdamW"]["AdamW's moments"],
        ),
        "AdamW's moments": (
            read["first moments"] - read["first gradients"],
            memory["AdamW"]["AdamW's moments"],
        ),
        "forward and backward, above them": (read["update's peak"], backward - state),
        "AdamW's temporaries": (read["AdamW's peak"], 0.0),
        "flops of the layers": (probe.counter.get_total_flops(), layers),
    }
    return {
        name: {"measured": float(got), "predicted": float(want)}
        for name, (got, want) in pairs.items()
    }


def in_processes(name: str) -> dict[str, dict[str, float]]:
    """`measure` of a case in processes of its own, whose malloc gives back what is freed."""
    program = [sys.executable, *processes(CASES[name].ranks)]
    with tempfile.TemporaryDirectory() as folder:
        build(CASES[name].architecture, Path(folder) / "model")
        done = subprocess.run(
            [*program, "benchmarks.plan_check", name, folder],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> None:
    """One case of this process, or all."""
    parser = argparse.ArgumentParser("python -m benchmarks.plan_check", description=__doc__)
    parser.add_argument("case", nargs="?", choices=[*CASES, None], metavar="NAME")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.case is not None:
        if options.folder is None:
            parser.error("a NAME needs the FOLDER with its model")
        found = measure(CASES[options.case], options.folder)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    results = {}
    for name in CASES:
        results[name] = in_processes(name)
        print(name)
        for part, pair in results[name].items():
            predicted = "none"
            if pair["predicted"]:
                predicted = f"{pair['predicted'] / pair['measured'] - 1:+.1%}"
            print(f"  {part}: measured {pair['measured']:.4g}, predicted {predicted}", flush=True)
    RESULT.write_text(result_text(results))


if __name__ == "__main__":
    main(sys.argv[1:])
