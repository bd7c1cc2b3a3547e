"""The table of what a GPU is expected to take, for as long as none has been measured."""

from benchmarks.gpu import predictions
from benchmarks.gpu.hardware import Gpu
from benchmarks.tables import table

LABELS = {
    "eager": "eager: all logits in fp32",
    "compile": "torch.compile of all logits",
    "torch-lce": "torch's linear_cross_entropy, without entropy",
    "trl": "TRL's chunked head",
    "cce-exact": "cut-cross-entropy, without entropy",
    "verl": "verl's kernel",
    "flsce": "Liger's FLSCE kernel, all tokens",
    "flsce-composed": "Liger's FLSCE without gradient, a selection, FLSCE on it",
    "triton-0.2": "ours (triton), 20% of the tokens",
    "triton-threshold": "ours (triton), 20%, threshold known beforehand, logits stored up to 1 GiB",
    "triton-known": "ours (triton), 20%, known beforehand",
}
TOKENS = 8192
HEADING = (
    "**These numbers for a GPU are predictions: no GPU has run the kernels yet.** The cost model "
    f"`benchmarks/gpu/predictions.py` is for an {predictions.GPU.name}, {TOKENS:,} tokens, "
    f"vocabulary {predictions.VOCABULARY:,} and bf16. The columns are milliseconds of forward and "
    "backward by hidden size."
)


def predicted() -> str:
    rows = [
        [label, *(predicted_ms(name, hidden, predictions.GPU) for hidden in predictions.HIDDEN)]
        for name, label in LABELS.items()
    ]
    return f"{HEADING}\n\n{table(['predicted ms', *map(str, predictions.HIDDEN)], rows)}"


def predicted_ms(name: str, hidden: int, gpu: Gpu) -> str:
    found = predictions.milliseconds(name, TOKENS, hidden, gpu)
    return "" if found is None else f"{found:.3g}"
