"""How far each loss is from the implementation it comes from, value and gradient, in fp64.

python -m tests.loss_parity            prints the table
python -m tests.loss_parity --write    puts it into docs/losses.md

Against the written formula always; against TRL and verl where they are installed.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_kernels import losses
from tests import loss_formulas, peer_losses
from tests.loss_cases import B, gradient, make_case

DOCS = Path(__file__).parents[1] / "docs" / "losses.md"
BEGIN, END = "<!-- parity:begin -->\n", "<!-- parity:end -->\n"
SEEDS = (0, 1, 2)


class Pair(NamedTuple):
    """Two losses of a case and a leaf that should be the same."""

    loss_type: str
    against: str
    ours: Callable
    theirs: Callable


def ours(loss_type: str, **options) -> Callable:
    own = {"loss_type": loss_type, "selected": None} | options
    return lambda c, x: c._replace(advantage=c.advantage_B).loss(x, **own)


def _formulas() -> Iterator[Pair]:
    for name in losses.LOSSES:
        options = {"denominator": loss_formulas.LENGTH} if name == "dr_grpo" else {}
        yield Pair(
            name,
            "written formula",
            lambda c, x, n=name, o=options: c.loss(x, loss_type=n, **o),
            lambda c, x, n=name: loss_formulas.loss(n, x, c.old, c.advantage, c.mask, c.selected),
        )


def _trl() -> Iterator[Pair]:
    """TRL's mean over sequences counts those without a token."""
    by_sequence = {"num_sequences": float(B)}
    gspo = {"loss_type": "grpo", "level": "sequence", "epsilon": (3e-4, 4e-4)}
    luspo = {"loss_type": "luspo", "level": "sequence", "epsilon": (2e-3, 2.5e-3)}
    for name, options, theirs in [
        ("dapo", {}, {}),
        ("bnpo", {}, {}),
        ("grpo", by_sequence, {}),
        ("dr_grpo", by_sequence | {"denominator": 16}, {}),
        ("gspo", by_sequence, gspo),
        ("luspo", by_sequence, luspo),
        ("gmpo", by_sequence, {"epsilon": (0.4, 0.4)}),
        ("cispo", {}, {"epsilon": (0.2, 5.0)}),
        ("sapo", by_sequence, {}),
        ("vespo", {}, {}),
    ]:
        keywords = {"loss_type": name} | theirs
        yield Pair(
            name,
            "TRL",
            ours(name, **options),
            lambda c, x, k=keywords: peer_losses.trl(x, c.old, c.advantage_B, c.mask, **k),
        )
    yield Pair(
        "dapo, dual_clip 4",
        "TRL, delta 4",
        ours("dapo", dual_clip=4.0),
        lambda c, x: peer_losses.trl(x, c.old, c.advantage_B, c.mask, loss_type="dapo", delta=4.0),
    )


def _verl() -> Iterator[Pair]:
    for name, options, theirs in [
        ("dapo", {"dual_clip": 10.0}, {"loss_mode": "vanilla"}),
        ("gspo", {}, {"loss_mode": "gspo", "clip": (3e-4, 4e-4)}),
        ("gspo_token", {}, {"loss_mode": "gspo", "clip": (3e-4, 4e-4)}),
        ("gmpo", {"num_sequences": float(B)}, {"loss_mode": "geo_mean", "clip": (0.4, 0.4)}),
        ("cispo", {}, {"loss_mode": "cispo", "clip": (10.0, 4.0)}),
        ("sapo", {}, {"loss_mode": "sapo"}),
        ("dppo_tv", {}, {"loss_mode": "dppo_tv", "clip": (0.15, 0.15), "clip_ratio_c": 20.0}),
        ("dppo_kl", {}, {"loss_mode": "dppo_kl", "clip": (0.05, 0.05), "clip_ratio_c": 20.0}),
        ("gpg", {}, {"loss_mode": "gpg"}),
    ]:
        how = losses.LOSSES[name][1]
        yield Pair(
            name,
            "verl",
            ours(name, **options),
            lambda c, x, k=theirs, h=how: peer_losses.verl(
                x, c.old, c.advantage_B, c.mask, loss_agg_mode=h, **k
            ),
        )


def pairs() -> list[Pair]:
    found = list(_formulas())
    found += _trl() if peer_losses.has("trl") else []
    return found + list(_verl() if peer_losses.has("verl") else [])


def differences(pair: Pair) -> tuple[float, float]:
    """The worst of value and gradient over the seeds, relative to the largest of the peer's."""
    worst = [0.0, 0.0]
    for seed in SEEDS:
        # TRL's GMPO gives a sequence without a token the loss -A.
        c = make_case(seed, empty=pair[:2] != ("gmpo", "TRL"))
        losses_of = (functools.partial(f, c) for f in (pair.ours, pair.theirs))
        both = (gradient(c.logprob, f) for f in losses_of)
        for i, (g, w) in enumerate(zip(*both, strict=True)):
            worst[i] = max(worst[i], _relative(g, w))
    return worst[0], worst[1]


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def table() -> str:
    named = {p: f"{p} {version(p)}" for p in ("trl", "verl") if peer_losses.has(p)}
    lines = ["| loss_type | against | value | gradient |", "|---|---|--:|--:|"]
    for pair in pairs():
        value, slope = differences(pair)
        lines.append(f"| {pair.loss_type} | {pair.against} | {value:.0e} | {slope:.0e} |")
    return (
        "\n".join(lines)
        + f"\n\n<sub>torch {torch.__version__}, {', '.join(named.values())}</sub>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.loss_parity", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/losses.md")
    write = parser.parse_args().write
    text = table()
    print(text)
    if write:
        before, rest = DOCS.read_text().split(BEGIN)
        DOCS.write_text(before + BEGIN + text + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
