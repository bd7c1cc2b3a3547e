"""python -m entropy_kernels --verify: checks each kernel that "auto" may take here, and records it.

Each row is one question: an op, a tile of this GPU's table, a dtype and the options that it is
compiled for. The answers go into the record that "auto" reads, whatever it held before. Offsets
beyond 2^31 elements are checked as well, where the memory is there. The exit status is 1 if a
kernel is wrong: "auto" then takes the next tile, or torch. Without a GPU the kernels run in the
interpreter of Triton (TRITON_INTERPRET=1), with fewer dtypes and combinations of options.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from .. import device
from .._cuda_kernels import module as cuda_module
from .._triton.common import choice, cutlass, tiles
from . import first_use, machine
from .apart import apart
from .checks import CannotCompileError, Sizes, check, reason_of
from .cost import Cost
from .offset_cases import far_cases, offset_cases
from .question import Question, ask

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# D of the questions, which descriptors fit: one of each row of the table.
HIDDEN = (1024, 4096)
# In the interpreter.
SMALL_HIDDEN = 32
# What a head's call may add, each alone and all together.
ADDED = ("bias", "temperature", "softcap")
ALL = (*ADDED, "statistics")
FORWARDS: tuple[tuple[str, ...], ...] = ((), *((x,) for x in ALL), ADDED, ALL)
BACKWARDS: tuple[tuple[str, ...], ...] = ((), *((x,) for x in ADDED), ADDED)


# What a forward does with its logits, and how its row of tiles is asked for.
STORING: dict[str, dict[str, bool]] = {
    "": {},
    "keep_logits": {"keep_logits": True},
    "stored": {"stores_rows": True},
}


class Asked(NamedTuple):
    """A question, D of its check, and the tile whose forward its backward follows."""

    question: Question
    hidden: int = 0
    forward: Any = None


def run(where: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """The answers to every question of `where`, and what they cost; `say` is given each row."""
    started, rows = time.monotonic(), []
    answers = (_answered(asked, where) for asked in questions(where))
    for row in itertools.chain(answers, _offsets(where)):
        rows.append(row)
        say(_line(row))
    wrong = sum(row["right"] is False for row in rows)
    seconds, record = round(time.monotonic() - started, 1), first_use.record(where)
    kept = f"not all are kept: {record.problem}" if record.problem else f"kept in {record.folder}"
    say(f"{len(rows)} rows in {seconds} s; {wrong} are wrong; {kept}")
    about = machine.machine(where)
    return {
        "machine": about,
        "record": None if record.problem else str(record.folder),
        "seconds": seconds,
        "wrong": wrong,
        "rows": rows,
    }


def questions(where: torch.device) -> Iterator[Asked]:
    """Every op, tile, dtype and set of options that a call may meet, each once."""
    impls: tuple[tuple[str, ...], ...] = ((),)
    impls += (("cuda",),) * (cuda_module.why_missing() is None)
    for flags, op in itertools.product(impls, ("selection", "ratio_loss")):
        yield Asked(Question(op, torch.float32, flags=flags))
    small = device.interpreting()
    for op in ("support", "entropy_from_logits"):
        yield from (Asked(Question(op, dtype)) for dtype in DTYPES[-1 if small else 0 :])
    head, sizes = (_of_head_interpreted, (SMALL_HIDDEN,)) if small else (_of_head, HIDDEN)
    seen: set[Question] = set()
    for dtype, hidden in itertools.product(DTYPES, sizes):
        for op, options, tile, *forward in head(where, dtype, hidden):
            question = ask(op, dtype, hidden, options, tile)
            if question not in seen:
                seen.add(question)
                yield Asked(question, hidden, *forward)


def _of_head(where: torch.device, dtype: torch.dtype, hidden: int) -> Iterator[tuple[Any, ...]]:
    key, with_cuda = _keys(where, dtype, hidden)
    for options in FORWARDS:
        plain = {"statistics": "statistics" in options, "softcap": "softcap" in options}
        for name, kind in STORING.items():
            for tile in choice.forward_row(with_cuda["forward"], **plain, **kind):
                yield ("forward", (*options, name), tile)
    forward, keeps, stores = (choice.forward_row(key, **kind)[0] for kind in STORING.values())
    for options in BACKWARDS:
        for tile in choice.dlogits_row(with_cuda["dlogits"], softcap="softcap" in options):
            yield ("dlogits", options, tile, forward)
            yield ("dlogits", (*options, "stored"), tile, stores)
        yield ("dlogits", (*options, "keep_logits"), None, keeps)


def _keys(where: torch.device, dtype: torch.dtype, hidden: int) -> tuple[Any, dict[str, Any]]:
    """What rows of tiles are asked for by; then the same for the ops of csrc/cuda as well."""
    arch = device.architecture(where)
    usable = tiles.variants(arch)
    more = {op: cutlass.variants(op, arch, dtype, hidden) for op in ("forward", "dlogits")}
    key = arch, dtype, hidden, tiles.ANY
    return (*key, usable), {op: (*key, usable | found) for op, found in more.items()}


def _of_head_interpreted(
    where: torch.device, dtype: torch.dtype, hidden: int
) -> Iterator[tuple[Any, ...]]:
    """Every tile once, and every way to store logits: milliseconds per program add up."""
    arch = device.architecture(where)
    key = arch, dtype, hidden, tiles.ANY, tiles.variants(arch)
    forward, keeps, stores = (choice.forward_row(key, **kind)[0] for kind in STORING.values())
    if dtype != torch.float32:
        yield ("forward", (), forward)
        return
    for tile in choice.forward_row(key):
        yield ("forward", ALL, tile)
    yield ("forward", ("keep_logits",), keeps)
    yield ("forward", ("stored",), stores)
    for tile in choice.dlogits_row(key):
        yield ("dlogits", ADDED, tile, forward)
    yield ("dlogits", ("keep_logits",), None, keeps)
    yield ("dlogits", ("stored",), choice.dlogits_row(key)[0], stores)


def _answered(asked: Asked, where: torch.device) -> dict[str, Any]:
    question = asked.question

    def work() -> str | None:
        return check(question, where, Sizes(asked.hidden), asked.forward, thorough=True)

    with first_use.marked(question, where):
        row = _row(question.text, where, work)
    if row["right"] is not None:
        first_use.keep(question, where, row["reason"] or None)
    return row


def _row(name: str, where: torch.device, work: Callable[[], str | None]) -> dict[str, Any]:
    """Whether it is right (None: not known), why not, and what the check cost."""

    def counted() -> tuple[str | None, Cost]:
        with Cost() as cost:
            return work(), cost

    started = time.monotonic()
    try:
        reason, cost = apart(counted, where)
    except torch.OutOfMemoryError:
        return {"question": name, "right": None, "reason": "there is no memory for it"}
    except CannotCompileError as error:
        return {"question": name, "right": None, "reason": f"it cannot be compiled: {error}"}
    return {
        "question": name,
        "right": reason is None,
        "reason": reason or "",
        "seconds": round(time.monotonic() - started, 2),
        "launches": cost.launches,
        "kernels": len(cost.kernels),
        "bytes": cost.bytes,
        "predicted_seconds_on_an_h200": round(cost.predicted_seconds, 2),
    }


def _offsets(where: torch.device) -> Iterator[dict[str, Any]]:
    """Offsets beyond 2^31, by every tile of the plain forward and backward in one dtype."""
    interpreting = device.interpreting()
    dtype, hidden = (torch.float32, SMALL_HIDDEN) if interpreting else (torch.bfloat16, HIDDEN[-1])
    _, keys = _keys(where, dtype, hidden)
    rows = choice.forward_row(keys["forward"]), choice.dlogits_row(keys["dlogits"])
    pairs = itertools.zip_longest(*rows)
    room = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else 0
    for forward, dlogits in pairs:
        pair = (forward, dlogits)
        cases = far_cases(pair, dtype, where) if interpreting else offset_cases(pair, dtype, where)
        for case in cases:
            name = f"{case.name} {' and '.join(x.variant for x in pair if x is not None)}"
            if case.bytes > 0.8 * room and not interpreting:
                why = f"it wants {case.bytes:.1e} bytes of memory"
                yield {"question": name, "right": None, "reason": why}
                continue
            row = _row(name, where, partial(reason_of, case))
            yield row
            if row["right"] is False:
                # The first error names the op.
                for op, tile in (("forward", forward), ("dlogits", dlogits)):
                    if tile is not None:
                        first_use.keep(ask(op, dtype, hidden, (), tile), where, row["reason"])


def _line(row: dict[str, Any]) -> str:
    state = {True: "ok", False: f"WRONG: {row['reason']}", None: f"not checked: {row['reason']}"}
    seconds = f"{row['seconds']:6.1f} s" if "seconds" in row else " " * 8
    return f"{seconds}  {row['question']:<64}  {state[row['right']]}"
