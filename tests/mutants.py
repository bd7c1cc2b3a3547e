"""Kernels that are broken on purpose, each by one edit of a source file of `_triton`.

`python -m tests.mutants` prints which case of the check refuses each, and why.
"""

import argparse
import contextlib
import importlib
import linecache
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

import entropy_kernels._triton as kernels
from entropy_kernels.testing import mend_interpreter
from entropy_kernels.verification.checks import check
from entropy_kernels.verification.offset_cases import far_cases
from entropy_kernels.verification.question import Question
from tests.concurrent_programs import at_once
from tests.mutant_cases import MUTANTS, Mutant

CPU = torch.device("cpu")
FOLDER = Path(kernels.__file__).parent
# They import every other file.
LAUNCHERS = [f"{op}.launch" for op in ("head_forward", "head_backward", "selection", "ratio_loss")]


@contextlib.contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """The package with the mutant's kernels, in place.

    Raises:
        ValueError: the text to replace does not occur once.
    """
    path = FOLDER / f"{mutant.file}.py"
    for user in LAUNCHERS:
        importlib.import_module(f"{kernels.__name__}.{user}")
    name = f"{kernels.__name__}.{mutant.file.replace('/', '.')}"
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} must occur once in {path.name}")
    before = dict(vars(sys.modules[name]))
    # The interpreter reads the source of a kernel again.
    text, file = source.replace(mutant.old, mutant.new), f"<{mutant.name}>"
    edited = dict(before)
    with contextlib.ExitStack() as stack:
        lines = {file: (len(text), None, text.splitlines(keepends=True), file)}
        stack.enter_context(mock.patch.dict(linecache.cache, lines))
        exec(compile(text, file, "exec"), edited)
        defined = {id(before.get(key)): x for key, x in edited.items() if x is not before.get(key)}
        for module in [x for key, x in sys.modules.items() if key.startswith(kernels.__name__)]:
            for key, x in list(vars(module).items()):
                if callable(x) and id(x) in defined:
                    stack.enter_context(mock.patch.object(module, key, defined[id(x)]))
        yield


def reason(mutant: Mutant, where: torch.device = CPU) -> str | None:
    """Why the check refuses the mutant, while programs run at once; None where it does not."""
    with broken(mutant), at_once():
        return refusal(mutant.question, where)


def refusal(question: Question, where: torch.device = CPU) -> str | None:
    """Why the check refuses the kernels of a question, offsets beyond 2^31 among its cases."""
    torch.manual_seed(0)
    if found := check(question, where):
        return found
    if question.op in ("forward", "dlogits"):
        pair = (question.tile, None) if question.op == "forward" else (None, question.tile)
        for case in far_cases(pair, question.dtype, where):
            try:
                case.run()
            except AssertionError as error:
                return f"{case.name}: {error}"
    return None


def main() -> None:
    """Prints a row per mutant."""
    argparse.ArgumentParser("python -m tests.mutants", description=__doc__).parse_args()
    warnings.simplefilter("ignore")
    mend_interpreter()
    torch.use_deterministic_algorithms(True, warn_only=True)
    print("| mutant | question | refused by |\n|---|---|---|")
    for mutant in MUTANTS:
        found = reason(mutant) or "nothing"
        print(f"| {mutant.name} | {mutant.question.text} | {found} |", flush=True)


if __name__ == "__main__":
    main()
