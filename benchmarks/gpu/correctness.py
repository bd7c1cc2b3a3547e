"""Stage `correctness`: every kernel and variant against fp64, before anything is timed.

New random numbers each run; uninitialised memory is NaN, so that what is not written shows. A
failure refuses its kernels alone: op, variant and dtype.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.gpu import candidates, ours
from benchmarks.gpu.rows import Row, Rows, is_fatal, reason
from benchmarks.gpu.setting import setting_of
from entropy_kernels import backends
from entropy_kernels._triton.common import tiles
from entropy_kernels._triton.common.tiles import Tile
from entropy_kernels.verification import (
    head_cases,
    logit_cases,
    offset_cases,
    pair_cases,
    token_cases,
)
from entropy_kernels.verification.head_cases import Case

STAGE = "correctness"
QUICK_EVERY = 6
DTYPES = ("bfloat16", "float16", "float32")


class Group(NamedTuple):
    """Cases of the same kernels."""

    name: str
    dtype: str
    forward: Tile | None = None
    dlogits: Tile | None = None
    impl: str = ""
    """Whose selection and loss, or products of pairs and entropies; empty for the head."""
    large: bool = False
    """Tensors of more than 2^31 elements."""


def groups(architecture: str, quick: bool) -> Iterator[Group]:
    """In the order to run them: what people use first, what may hang last."""
    if ours.has_triton():
        pairs = candidates.pairs(architecture, quick)
        first, *others = pairs
        last = [pair for pair in others if pair[0].variant == "tma_ws"]
        dtypes = ("float32",) if quick else DTYPES
        yield _head_group(first, dtypes[0])
        yield _head_group(first, dtypes[0], large=True)
        yield from (Group(f"tokens {impl}", "", impl=impl) for impl in ("triton", "torch"))
        yield from (Group(f"sampler {dtype}", dtype, impl="triton") for dtype in dtypes)
        yield from (_head_group(first, dtype) for dtype in dtypes[1:])
        yield from (_head_group(pair, dtypes[0]) for pair in others if pair not in last)
        if "cuda" in backends.available():
            yield Group("tokens cuda", "", impl="cuda")
        yield from (_head_group(pair, dtypes[0]) for pair in last)
    else:
        yield Group("tokens torch", "", impl="torch")


def _head_group(pair: tuple[Tile | None, Tile | None], dtype: str, large: bool = False) -> Group:
    name = f"{candidates.name(pair[0])} + {candidates.name(pair[1])} {dtype}"
    return Group(name + " 2^31" * large, dtype, *pair, large=large)


def run(rows: Rows, job: Row) -> None:
    """A part of the cases of one group."""
    setting = setting_of(rows, job)
    seed = 0 if setting.quick else torch.seed() % (1 << 31)
    torch.manual_seed(seed)
    architecture = rows.about["architecture"]
    group = next(x for x in groups(architecture, setting.quick) if x.name == job["group"])
    found = cases(group, setting.device, setting.quick)
    # pytest runs all of the small ones.
    every = QUICK_EVERY if setting.quick else 1
    for case in found[job["part"] * every :: job["parts"] * every]:
        run_case(rows, setting.device, case, _kernels(group, case, architecture), seed)


def refusal(rows: Rows, kernels: Collection[str]) -> str:
    """Why these are not timed; empty where none of them has failed."""
    for row in rows.of(STAGE):
        failed = {*row["kernels"]} & {*kernels} if "error" in row else set()
        if failed:
            return f"{', '.join(sorted(failed))} failed correctness: {row['name']}"
    return ""


def kernel(op: str, variant: str, dtype: str) -> str:
    """How rows name a kernel of the head."""
    return f"{op} {variant} {dtype}"


def _kernels(group: Group, case: Case, architecture: str) -> list[str]:
    """What a case runs, unless its matrices do not fit: what is blamed where it hangs."""
    if group.impl:
        return [f"{case.name.split()[0]} {group.impl}"]
    found = []
    for op, tile in (("forward", group.forward), ("dlogits", group.dlogits)):
        if tile is None:
            dtype, usable = getattr(torch, group.dtype), tiles.variants(architecture)
            tile = tiles.row(op, architecture, dtype, 128, 128, usable)[0]
        found.append(kernel(op, tile.variant, group.dtype))
    return found


def cases(group: Group, device: torch.device, quick: bool) -> list[Case]:
    """Names are unique; `quick` makes them small."""
    if group.impl and group.dtype:
        dtype = getattr(torch, group.dtype)
        found = pair_cases.support_cases(dtype, device, quick)
        found += logit_cases.entropy_cases(dtype, device)
    elif group.impl:
        found = token_cases.ratio_loss_cases(group.impl, device, quick)
        found += token_cases.selection_cases(group.impl, device, quick)
    else:
        make = offset_cases.offset_cases if group.large else head_cases.head_cases
        dtype = getattr(torch, group.dtype)
        found = make((group.forward, group.dlogits), dtype, device, quick)
        found = [case._replace(name=f"{group.name}: {case.name}") for case in found]
    return found


def run_case(rows: Rows, device: torch.device, case: Case, kernels: list[str], seed: int) -> None:
    memory = 0
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    if memory and case.bytes > 0.8 * memory:
        if not rows.has(STAGE, case.name):
            wanted = f"wants {case.bytes:.1e} bytes"
            rows.add(STAGE, case.name, kernels=kernels, left_out=wanted)
        return

    def run() -> Row:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with _launched(kernels) as launched:
                case.run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except torch.OutOfMemoryError as error:
            # That says nothing of a kernel: others may use this GPU.
            return {"left_out": reason(error), "seed": seed}
        except Exception as error:
            if is_fatal(error):
                raise
            # A wrong result names its op; what does not compile or run was launched last.
            wrong = [x for x in launched if f"{x.split()[0]}: " in str(error)]
            blamed = (wrong or launched) if isinstance(error, AssertionError) else launched[-1:]
            return {"error": reason(error), "kernels": blamed or kernels, "seed": seed}
        finally:
            torch.use_deterministic_algorithms(False)
        return {"passed": True, "seed": seed}

    rows.measure(STAGE, case.name, run, kernels=kernels)


@contextmanager
def _launched(kernels: list[str]) -> Iterator[list[str]]:
    """The kernels of the head that run inside: a tile that does not fit gives way to another."""
    found: list[str] = []

    def noting(op: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **named: Any) -> Any:
            made = make(*arguments, **named)
            if made.tile is not None:
                found.append(kernel(op, made.tile.variant, kernels[0].split()[-1]))
            return made

        return noted

    if not ours.has_triton():
        yield found
        return
    from entropy_kernels._triton.head_backward import launch as backward
    from entropy_kernels._triton.head_forward import launch as forward

    with (
        mock.patch.object(forward, "Work", noting("forward", forward.Work)),
        mock.patch.object(backward, "Dlogits", noting("dlogits", backward.Dlogits)),
    ):
        yield found
