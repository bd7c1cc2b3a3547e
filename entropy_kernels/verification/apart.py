"""Work that changes nothing of its caller's: not his modes, settings or random numbers."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Seconds that an interrupted check may need for the case at hand.
PATIENCE = 60


def apart(function: Callable[[], Any], where: torch.device) -> Any:
    """What `function` returns in a thread of its own, on the caller's device and stream.

    Nothing of the caller's holds there: no autocast, grad mode, hook, mode of dispatch or default
    device. `neutral` keeps what all threads share. An interrupt waits for `function` to end.
    """
    results: list[Any] = []
    ended = threading.Event()
    stream = torch.cuda.current_stream(where) if where.type == "cuda" else None

    def work() -> None:
        try:
            with contextlib.ExitStack() as stack:
                if stream is not None:
                    stack.enter_context(torch.cuda.device(where))
                    stack.enter_context(torch.cuda.stream(stream))
                stack.enter_context(neutral(where))
                results.append((function(), None))
        except BaseException as error:
            results.append((None, error))
        finally:
            ended.set()

    thread = threading.Thread(target=work, name="entropy_kernels check", daemon=True)
    try:
        thread.start()
        thread.join()
    except BaseException:
        ended.wait(PATIENCE)
        raise
    result, error = results[0]
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def neutral(where: torch.device) -> Iterator[None]:
    """Settings to check under, and random numbers of its own; the process's come back.

    Uninitialised memory is NaN, and products of fp32 are not cut to TF32.
    """
    dtype, products = torch.get_default_dtype(), torch.backends.cuda.matmul
    deterministic: Any = torch.utils.deterministic
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    name = "fp32_precision" if hasattr(products, "fp32_precision") else "allow_tf32"
    before = {x: getattr(products, x) for x in (*names, name)}
    was = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = deterministic.fill_uninitialized_memory
    devices = [where] if where.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices):
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        for x in names:
            setattr(products, x, False)
        setattr(products, name, "ieee" if name == "fp32_precision" else False)
        torch.default_generator.manual_seed(0)
        if where.type == "cuda":
            torch.cuda.default_generators[where.index or 0].manual_seed(0)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(was, warn_only=warns)
            deterministic.fill_uninitialized_memory = fills
            for x, value in before.items():
                setattr(products, x, value)
