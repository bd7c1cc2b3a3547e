"""What recording entropies and kept sets costs vLLM per decode step, on a CPU.

python -m benchmarks.vllm_recording [--vocabulary 512 151936] [--requests 16] [--rounds 7]

A small model samples the same requests plainly, with entropies, with vLLM's own top-p and with our
cutting, which records sets too; they alternate. Prints medians of CPU milliseconds per step. To be
run with an interpreter that has vLLM (`make test-vllm` makes one).
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.tables import table

STEPS = 48
TOP_P = 0.9


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[512, 151_936])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    rows = []
    for vocabulary in options.vocabulary:
        found = measure(vocabulary, options.requests, options.rounds)
        rows.append([f"{vocabulary:,}", *(f"{found[name]:.2f}" for name in found)])
    print(table(["CPU ms per step, V", *found], rows))
    return 0


def measure(vocabulary: int, requests: int, rounds: int) -> dict[str, float]:
    """Medians of CPU milliseconds per decode step, by what is recorded."""
    runs = ways(vocabulary, requests)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            run()
            times[name].append((time.process_time() - began) / STEPS * 1000)
    return {name: median(values) for name, values in times.items()}


def ways(vocabulary: int, requests: int) -> dict[str, Callable[[], Any]]:
    """The runs of one engine, which is made here."""
    from vllm import LLM, SamplingParams

    from entropy_kernels.integrations import vllm as entropies

    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": requests}
    options |= {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**27}
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, vocabulary)
        mode = {"logprobs_mode": "processed_logprobs"}
        llm = LLM(folder, **entropies.options(**options, **mode))
    prompts: list[Any] = [{"prompt_token_ids": [5 + i, 6, 7]} for i in range(requests)]
    keys = itertools.count()

    def run(top_p: float, sets: bool | None) -> None:
        asking: Sequence[Any] = [
            SamplingParams(
                seed=i, top_p=top_p, max_tokens=STEPS, ignore_eos=True, logprobs=0, detokenize=False
            )
            for i in range(requests)
        ]
        named = [next(keys) for _ in asking]
        if sets is not None:
            asking = [
                entropies.recorded(x, key, sets) for x, key in zip(asking, named, strict=True)
            ]
        llm.generate(prompts, asking, use_tqdm=False)
        if sets is not None:
            entropies.take(llm, named, [STEPS] * requests)

    return {
        "plain": lambda: run(1.0, None),
        "entropies": lambda: run(1.0, False),
        "vLLM's top-p": lambda: run(TOP_P, None),
        "top-p, entropies and sets": lambda: run(TOP_P, True),
    }


def write_model(folder: str, vocabulary: int) -> None:
    """A Qwen3 of 2 layers and D = 64 with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        **heads,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
