"""Tables of the threshold, the ratio loss and trainers' steps."""

import math

from benchmarks.tables import (
    Run,
    about,
    cell,
    median_ratio,
    megabytes,
    named,
    quantile,
    seconds_table,
    table,
)

PARTS = ("weights", "gradients", "moments")


def threshold_in_short(runs: list[Run]) -> str:
    """One column per number of entropies."""
    runs = sorted(runs, key=lambda run: run["shape"]["entropies"])
    rows = [["time, ours / torch.kthvalue"], ["MB beyond them, ours"], ["MB, torch.kthvalue"]]
    for run in runs:
        ours, other = named(run, "ours"), named(run, "kthvalue")
        rows[0].append(cell(median_ratio(ours, other)))
        rows[1].append(megabytes(ours, 1))
        rows[2].append(megabytes(other, 1))
    return table(["threshold of", *(f"{r['shape']['entropies']:,} entropies" for r in runs)], rows)


def ratio_loss_in_short(runs: list[Run]) -> str:
    """One column per number of tokens."""
    runs = sorted(runs, key=_tokens)
    row = ["time, ours / eager with its metrics"]
    row += [cell(median_ratio(named(run, "cpu"), run["contestants"][0])) for run in runs]
    return table(["ratio loss of", *(f"{_tokens(run):,} tokens" for run in runs)], [row])


def _tokens(run: Run) -> int:
    return math.prod(run["shape"].values())


def threshold_tables(runs: list[Run]) -> str:
    """Everything about the threshold."""
    runs = sorted(runs, key=lambda run: run["shape"]["entropies"])
    parts = [f"{r['shape']['entropies']:,} entropies\n\n{seconds_table(r)}" for r in runs]
    return "\n\n".join(["**Threshold**", *parts, about(runs[-1])])


def ratio_loss_tables(runs: list[Run]) -> str:
    """Everything about the ratio loss."""
    runs = sorted(runs, key=_tokens)
    parts = [
        f"{r['shape']['sequences']:,} x {r['shape']['length']:,} tokens\n\n{seconds_table(r)}"
        for r in runs
    ]
    return "\n\n".join(["**Ratio loss, its gradient and its metrics**", *parts, about(runs[-1])])


def trl_step_tables(runs: list[Run]) -> str:
    """Everything about the step of TRL's trainer."""
    parts = []
    for run in runs:
        shape = "{sequences:,} prompts of {prompt:,} tokens, completions of {completion:,}".format(
            **run["shape"]
        )
        size = "hidden size {hidden:,}, vocabulary {vocabulary:,}".format(**run["shape"])
        parts.append(f"{shape}, {size}\n\n{seconds_table(run)}")
    title = "**TRL's GRPOTrainer: loss and backward of a micro-batch, one layer**"
    return "\n\n".join([title, *parts, about(runs[-1])])


def train_step_tables(runs: list[Run]) -> str:
    """Everything about the trainer's step."""
    title = (
        "**The trainer's step: forward, loss, backward, clipping, AdamW; checkpointed layers.** "
        "MB beyond is the peak minus all weights, gradients and moments. With logits the peak is "
        "in the head's backward, before the layers have gradients."
    )
    parts = [title]
    for run in sorted(runs, key=lambda run: run["shape"]["layers"]):
        parts += [_train_step_table(run), about(run)]
    return "\n\n".join(parts)


def _train_step_table(run: Run) -> str:
    shape = run["shape"]
    tokens = shape["sequences"] * (shape["prompt"] + shape["response"])
    model = "{layers} layers, hidden size {hidden:,}, vocabulary {vocabulary:,}".format(**shape)
    timed = run["rounds"] > 1  # One round is for memory: nothing alternates.
    columns = ["", *(["tokens/s", "time / eager", "head's share"] if timed else [])]
    columns += [*(f"MB {part}" for part in PARTS), "MB beyond"]
    rows = []
    for entry in run["contestants"]:
        if "refused" in entry:
            refused = f"refused: {entry['refused']}"
            rows.append([entry["label"], refused, *[""] * (len(columns) - 2)])
            continue
        cells = [entry["label"], *(_speed(run, entry, tokens) if timed else [])]
        cells += [f"{entry[f'{part}_bytes'] / 1e6:,.0f}" for part in PARTS]
        state = sum(entry[f"{part}_bytes"] for part in PARTS)
        rows.append([*cells, f"{(entry['peak_bytes'] - state) / 1e6:,.0f}"])
    return f"Qwen3 of {model}; {tokens:,} tokens\n\n{table(columns, rows)}"


def _speed(run: Run, entry: Run, tokens: int) -> list[str]:
    """Tokens per second, the time against the first contestant's, and the head's share of it."""
    rate, share = tokens / quantile(entry["wall_s"], 0.5), quantile(_shares(entry), 0.5)
    return [f"{rate:,.1f}", cell(median_ratio(entry, run["contestants"][0])), f"{share:.1%}"]


def _shares(entry: Run) -> list[float]:
    """The head's seconds over the step's, for each round."""
    return [head / step for head, step in zip(entry["head_s"], entry["wall_s"], strict=True)]
