"""Whether "auto" may take the Triton kernels for a call: answered from memory, from the record of
this machine, or by checking there and then.

The environment variable EK_VERIFY is "on", where this holds; "off", where nothing is checked and
"auto" takes what the record knows to be right; or "force", where each process checks again.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import ProcessGroup

from .. import device
from .._arguments import warn_caller
from . import machine
from .apart import apart
from .question import Question, ask
from .record import DIED, Answer, Record

VARIABLE, MODES = "EK_VERIFY", ("on", "off", "force")
Tile = Any
Options = tuple[str, ...]


class UnknownError(Exception):
    """A question that cannot be answered now: torch runs, and nothing is recorded."""


class _Known:
    """The answers that hold on one device, by text; `checked` are this process's own."""

    def __init__(self, where: torch.device) -> None:
        self.record = Record(machine.machine(where))
        self.answers = self.record.read()
        self.checked: set[str] = set()


_known: dict[torch.device, _Known] = {}
_calls: dict[tuple[Any, ...], Answer] = {}
_agreed: dict[tuple[Any, ...], Answer] = {}
_told: set[str] = set()
_lock = threading.RLock()


def asks(where: torch.device) -> bool:
    """Whether kernels have to prove themselves there: on a GPU, which no test here has seen."""
    return where.type == "cuda"


def mode() -> str:
    """The value of EK_VERIFY."""
    found = os.environ.get(VARIABLE) or "on"
    if found not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}; got {found!r}")
    return found


def forget() -> None:
    """Drops what this process knows, so that the record is read again."""
    for memory in (_known, _calls, _agreed, _told):
        memory.clear()


def right(
    op: str,
    where: torch.device,
    dtype: torch.dtype = torch.float32,
    hidden: int = 0,
    options: Options = (),
    tokens: int = 0,
    vocabulary: int = 0,
    group: ProcessGroup | None = None,
    *,
    impl: str = "triton",
) -> Answer:
    """Whether all kernels of a call are right on `where`, or why they are not taken.

    op: "linear_logprob_entropy", or one of `question.OPS` beside the head's.
    hidden, tokens, vocabulary: D, T and V; 0 where one is not known.
    options: of `question.call_of`.
    group: the ranks that share a vocabulary. They agree, by one all-reduce per kind of call: one
        rank's torch is every rank's.
    impl: whose kernels, "triton" or "cuda".
    """
    call = (op, dtype, hidden, options, impl)
    key, shared = (where, mode(), *call), (group, mode(), *call)
    if group is not None and shared in _agreed:
        return _agreed[shared]
    try:
        with _lock:
            if key not in _calls:
                _calls[key] = _decide(*call, where, tokens, vocabulary)
            found = _calls[key]
    except UnknownError as error:
        found = Answer(False, str(error))
    if group is None or _capturing(where):
        return found
    everywhere = torch.tensor(int(found.right), device=where)
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN, group)
    if found.right and not everywhere.item():
        found = Answer(False, "another rank of vocab_group has no right kernels")
    _agreed[shared] = found
    return found


def measured(
    op: str,
    where: torch.device,
    dtype: torch.dtype = torch.float32,
    hidden: int = 0,
    options: Options = (),
    *_sizes: int,
) -> bool:
    """Whether "auto" prefers csrc/cuda's kernels for a call: the table's first tiles were measured.

    Not where Triton's forward stores rows, which csrc/cuda's does not.
    """
    from .._triton.common import cutlass
    from .._triton.common.tiles import ANY

    if op != "linear_logprob_entropy":
        usable = {cutlass.VARIANT}
        rows = [cutlass.row(op, device.architecture(where), dtype, hidden, ANY, usable)]
    elif "stored" in options and _row("stored", where, dtype, hidden, options, "triton"):
        return False
    else:
        backward = "gradient" in options and "keep_logits" not in options
        kinds = ("forward", "dlogits") if backward else ("forward",)
        rows = [_row(kind, where, dtype, hidden, options, "cuda") for kind in kinds]
    return all(row and row[0].source != "predicted" for row in rows)


def known(where: torch.device) -> dict[str, Answer]:
    """The answers of this machine by their questions' texts."""
    return dict(_on(where).answers)


def refused(
    op: str, where: torch.device, dtype: torch.dtype, hidden: int, options: Options
) -> Callable[[Tile], bool] | None:
    """Which tiles of a call are known to be wrong, for launchers; None where none is."""
    if not asks(where):
        return None
    answers = _on(where).answers
    if all(answer.right for answer in answers.values()):
        return None

    def known_wrong(tile: Tile) -> bool:
        text = ask(op, dtype, hidden, options, tile).text
        return text in answers and not answers[text].right

    return known_wrong


def answer(
    question: Question,
    where: torch.device,
    sizes: tuple[int, int, int] = (0, 0, 0),
    forward: Tile | None = None,
) -> Answer:
    """The answer from memory, from the record or by checking now.

    Raises:
        UnknownError: there is none, and no check can be made now.
    """
    here, text = _on(where), question.text
    if text in here.answers and (mode() != "force" or text in here.checked):
        found = here.answers[text]
        if found.reason == DIED:
            _tell_refused(text, here, found)
        return found
    if mode() == "off":
        raise UnknownError(f"{VARIABLE}=off, and no check of its kernels is recorded")
    device.persistent()  # a mistake there is no kernel's
    _check_possible(where)
    from .checks import CannotCompileError, Sizes, check

    if where.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(where)  # an error of the caller's own kernels comes out here
    with marked(question, where):
        try:
            reason = apart(lambda: check(question, where, Sizes(*sizes), forward), where)
        except torch.OutOfMemoryError as error:
            raise UnknownError("there is no memory left to check its kernels") from error
        except CannotCompileError as error:
            raise UnknownError(f"its kernels cannot be compiled: {error}") from error
        found = keep(question, where, reason)
    if not found.right:
        _tell_refused(text, here, found)
    return found


def marked(question: Question, where: torch.device) -> contextlib.AbstractContextManager[None]:
    """While a question is being checked: the second process that dies within has answered it."""
    return _on(where).record.started(question.text)


def record(where: torch.device) -> Record:
    """The answers of this machine in files."""
    return _on(where).record


def keep(question: Question, where: torch.device, reason: str | None) -> Answer:
    """Records an answer: `reason` is None where the kernels of `question` are right."""
    here, found = _on(where), Answer(reason is None, reason or "")
    here.answers[question.text] = found
    here.checked.add(question.text)
    here.record.write(question.text, found)
    return found


def _on(where: torch.device) -> _Known:
    with _lock:
        if where not in _known:
            _known[where] = _Known(where)
        return _known[where]


def _decide(
    op: str,
    dtype: torch.dtype,
    hidden: int,
    options: Options,
    impl: str,
    where: torch.device,
    tokens: int,
    vocabulary: int,
) -> Answer:
    if op != "linear_logprob_entropy":
        return answer(Question(op, dtype, flags=("cuda",) * (impl == "cuda")), where)
    sizes = (hidden, tokens, vocabulary)
    forward = None
    if "stored" in options:
        row = _row("stored", where, dtype, hidden, options, impl)
        forward = _first_right("forward", row, where, dtype, options, sizes)
    if forward is None:
        options = tuple(name for name in options if name != "stored")
        row = _row("forward", where, dtype, hidden, options, impl)
        forward = _first_right("forward", row, where, dtype, options, sizes)
    if forward is None:
        return _none(row, "forward")
    if "gradient" not in options:
        return Answer(True)
    if "keep_logits" in options:
        return answer(ask("dlogits", dtype, hidden, options, None), where, sizes, forward)
    row = _row("dlogits", where, dtype, hidden, options, impl)
    if _first_right("dlogits", row, where, dtype, options, sizes, forward) is None:
        return _none(row, "backward")
    return Answer(True)


def _first_right(
    op: str,
    row: tuple[Tile, ...],
    where: torch.device,
    dtype: torch.dtype,
    options: Options,
    sizes: tuple[int, int, int],
    forward: Tile | None = None,
) -> Tile | None:
    for tile in row:
        question = ask(op, dtype, sizes[0], options, tile)
        if answer(question, where, sizes, forward).right:
            return tile
    return None


def _none(row: tuple[Tile, ...], direction: str) -> Answer:
    tried = ", ".join(tile.variant for tile in row)
    return Answer(
        False,
        f"no {direction} kernel is right on this GPU ({tried}); "
        "python -m entropy_kernels --verify checks them again and tells why",
    )


def _row(
    kind: str, where: torch.device, dtype: torch.dtype, hidden: int, options: Options, impl: str
) -> tuple[Tile, ...]:
    """The tiles of a call in order of preference, as its launchers find them; of "cuda" its own.

    kind: "stored" or "forward" of its forward; "dlogits" of its backward, whose rows are dense.
    """
    from .._triton.common import choice, cutlass, tiles

    arch = device.architecture(where)
    of_cuda: set[str] = set()
    if impl == "cuda" and "strided weight" not in options:
        of_cuda = cutlass.variants(
            "dlogits" if kind == "dlogits" else "forward", arch, dtype, hidden
        )
    strided = "strided weight" in options or hidden * dtype.itemsize % 16 != 0
    strided |= kind != "dlogits" and "strided hidden" in options
    usable = tiles.variants(arch) - ({*tiles.TMA} if strided else set())
    key = arch, dtype, hidden, tiles.ANY, usable | of_cuda
    softcap, stored = "softcap" in options, kind == "stored"
    if stored and not choice.stores_rows(where, dtype, hidden):
        return ()
    if kind == "dlogits":
        row = choice.dlogits_row(key, softcap=softcap)
    else:
        row = choice.forward_row(
            key,
            keep_logits="keep_logits" in options,
            stores_rows=stored,
            statistics="statistics" in options,
            softcap=softcap,
        )
    return row if impl == "triton" else tuple(x for x in row if x.variant == cutlass.VARIANT)


def _check_possible(where: torch.device) -> None:
    if _capturing(where):
        reason = "its kernels cannot be checked while a CUDA graph is captured; call it once before"
        _tell(f"torch is captured: {reason}")
        raise UnknownError(reason)
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    if fake or (where.type == "cuda" and not torch.cuda.is_available()):
        raise UnknownError("its kernels cannot be checked on tensors without memory")


def _capturing(where: torch.device) -> bool:
    if where.type != "cuda" or not torch.cuda.is_available():
        return False
    with torch.cuda.device(where):
        return torch.cuda.is_current_stream_capturing()


def _tell_refused(text: str, here: _Known, found: Answer) -> None:
    _tell(f"{text} is not taken on {here.record.gpu}: {found.reason}")


def _tell(what: str) -> None:
    if what not in _told:
        _told.add(what)
        warn_caller(what, RuntimeWarning)
