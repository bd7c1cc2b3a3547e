"""One shape: every contestant checked and its peak memory found, then all timed in alternation."""

import gc
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from .contestant import Contestant, RefusedError, WrongResultError, check
from .entrants import is_ours
from .rounds import Sample, alternate, peak_of, why_no_peak
from .step import Problem, make_problem, our_forward, truth


@dataclass
class Measured:
    """What is known of one contestant so far."""

    contestant: Contestant
    refused: str = ""
    """Why it is not timed."""
    failed: bool = False
    """Whether that is an error of ours."""
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    samples: list[Sample] = field(default_factory=list)

    def as_entry(self) -> dict[str, Any]:
        """As in the result files of the benchmarks."""
        about = self.contestant
        found: dict[str, Any] = {"name": about.name, "label": about.label}
        found["computes"] = about.computes
        if self.refused:
            return found | {"refused": self.refused}
        columns = {key: [getattr(x, key) for x in self.samples] for key in Sample._fields}
        worst = max(self.errors.values(), default=None)
        return (
            found | {"errors": self.errors, "error": worst, "peak_bytes": self.peak_bytes} | columns
        )


def measure(problem: Problem, everyone: list[Measured], rounds: int) -> None:
    """Fills `everyone` in, so that what there is outlives an interruption."""
    device = problem.hidden.device
    settings = [x.contestant.setting for x in everyone if not x.refused]
    for fraction in dict.fromkeys(setting["fraction"] for setting in settings):
        wanted = truth(problem, fraction)
        for one in everyone:
            if not one.refused and one.contestant.setting["fraction"] == fraction:
                _look(one, problem, wanted)
        del wanted
        gc.collect()
    runs = {x.contestant.name: partial(x.contestant.run, problem) for x in everyone if x.errors}
    of = {x.contestant.name: x for x in everyone}
    for name, sample in alternate(runs, device, rounds):
        of[name].samples.append(sample)


def _look(one: Measured, problem: Problem, wanted: dict[str, torch.Tensor]) -> None:
    """Its errors and peak memory, or why it is not timed."""
    contestant, device, dtype = one.contestant, problem.hidden.device, problem.hidden.dtype
    run = partial(contestant.run, problem)
    try:
        missing = [name for name in contestant.needs if find_spec(name) is None]
        if missing:
            raise RefusedError(f"needs {' and '.join(missing)}")
        if device.type == "cpu" and contestant.uncompiled is None:
            # Libraries are loaded and threads started at a small size, and nothing else.
            contestant.run(_small(problem))
        else:
            # A compiler's own memory is not the step's.
            run()
        if why_no_peak(device) is None:
            results, one.peak_bytes = peak_of(run, device)
        else:
            results = run()
        if is_ours(contestant):
            # The loss hides its log-probabilities and entropies.
            results |= our_forward(problem, impl=contestant.name.split("-")[0])
        one.errors = check(results, wanted, dtype, exact=contestant.exact)
    except WrongResultError as wrong:
        one.refused, one.failed = f"WRONG, not timed: {wrong}", is_ours(contestant)
    except RefusedError as reason:
        one.refused, one.failed = f"not timed: {reason}", is_ours(contestant)
    except Exception as error:
        # What does not import, compile or fit is a result.
        text = " ".join(str(error).split()).partition(" Set TORCHDYNAMO_VERBOSE")[0]
        one.refused, one.failed = (
            f"not timed: {type(error).__name__}: {text[:200]}",
            is_ours(contestant),
        )
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _small(like: Problem) -> Problem:
    return make_problem(64, 32, 256, like.hidden.dtype, tuple(like.selected))
