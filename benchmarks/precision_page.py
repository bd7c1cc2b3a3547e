"""The tables of docs/precision.md, from the result of benchmarks/precision.py.

python -m benchmarks.precision_page [--check]    with --check it fails where the page is not current
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import between_markers
from benchmarks.tables import table

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "precision.json"
PAGE = ROOT / "docs" / "precision.md"
SAMPLERS = {
    "transformers bf16": "transformers, logits in bf16",
    "transformers fp32": "transformers, head in fp32",
    "vllm bf16": "vLLM, logits in bf16 (its default)",
    "vllm fp32": 'vLLM, `head_dtype` "float32"',
}
HEADS = {
    "trl": "TRL 1.16's chunked head",
    "eager": "eager: bf16 logits, bf16 log_softmax",
    "upcast": "eager: bf16 logits, cast to fp32",
    "ours": "ours",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    stale = PAGE.read_text() != render()
    if not check:
        write()
    elif stale:
        print("docs/precision.md is not current; run python -m benchmarks.precision_page")
    return int(check and stale)


def render() -> str:
    """The page with the tables of the result file."""
    return between_markers(PAGE, tables(json.loads(RESULT.read_text())), "precision")


def write() -> None:
    """Bring the page up to date."""
    PAGE.write_text(render())


def tables(result: Mapping[str, Any]) -> str:
    """Both tables of a result, and what it was measured with."""
    rows = []
    for row in result["mismatch"]:
        k3 = f"{row['k3']:.1e} ± {row['k3_error']:.0e}"
        k1, difference = f"{row['k1']:+.1e}", f"{row['difference']:.1e}"
        named = [SAMPLERS[row["sampler"]], HEADS[row["head"]]]
        rows.append([*named, k3, k1, difference, f"{row['max_ratio']:.3f}"])
    columns = ["sampler, bf16", "trainer's head", "KL (k3)", "k1", "mean of \\|log r\\|"]
    compared = table([*columns, "largest r"], rows)
    names = ("logprob", "logprob_max", "entropy", "entropy_max")
    of_fp64 = [
        [HEADS[name], *(f"{found[key]:.1e}" for key in names)]
        for name, found in result["errors"].items()
    ]
    columns = ["head", "log-prob: mean error, nats", "largest", "entropy: mean error", "largest"]
    model = (
        f"A Qwen3 of random weights in bf16: {result['layers']} layers, D = {result['width']:,}, "
        f"V = {result['vocabulary']:,}. Its logits have a standard deviation of "
        f"{result['spread']:g}, its tokens a mean entropy of {result['entropy']:.2f} nats. Each "
        f"sampler drew {result['sequences']} sequences of {result['tokens']} tokens."
    )
    named = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    measured = (
        f"<sub>{result['machine']}; {named}; commit {result['commit']}; {result['date']}.</sub>"
    )
    return "\n\n".join([model, compared, table(columns, of_fp64), measured])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
