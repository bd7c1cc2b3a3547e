"""`python -m entropy_kernels`: what this machine has, and whether it computes rightly.

Versions, devices, then each backend with its self-check against the fp64 reference, or the reason
that it is missing. The exit status is 1 if a self-check fails. With --bench: what a step
costs here, eager, compiled by torch, and ours.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable

import torch

from . import (
    Head,
    __version__,
    _native,
    backends,
    linear_logprob_entropy,
    ratio_loss,
    reference,
    top_entropy_mask,
)
from . import device as gpu
from ._bench import command
from ._cuda_kernels import module as cuda
from .testing import mend_interpreter, peaked_head
from .verification import first_use

PACKAGES = ("torch", "triton")


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser("python -m entropy_kernels", description=__doc__)
    parser.add_argument("--bench", action="store_true", help="measures for about half a minute")
    parser.add_argument(
        "--verify",
        action="store_true",
        help='checks every kernel on each GPU and keeps the answers for impl="auto"',
    )
    command.add_options(parser)
    options = parser.parse_args(arguments)
    try:
        first_use.mode()
        gpu.persistent()
    except ValueError as error:  # of EK_VERIFY and EK_PERSISTENT
        parser.error(str(error))
    if options.verify:
        _refuse_others(options, parser)
        return _verify(options, parser)
    if _native.cpu() is not None:
        try:
            _native.instruction_set(torch.float32)
        except ValueError as error:  # of EK_CPU_ISA
            parser.error(str(error))
    if options.bench:
        return command.main(options, parser, __version__)
    for name in command.OPTIONS:
        if getattr(options, name) is not None:
            needed = "--bench or --verify" if name == "json" else "--bench"
            parser.error(f"argument --{name}: it needs {needed}")
    print(f"entropy_kernels {__version__}, Python {platform.python_version()}")
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    devices = ["cpu"]
    print(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        devices.append(f"cuda:{index}")
        major, minor = torch.cuda.get_device_capability(index)
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")

    checks: dict[str, Callable[[], str]] = {}
    for device in devices:
        for impl in ("torch", "cpu", "triton", "cuda"):
            if backends.why_not(impl, torch.device(device)) is not None:
                continue
            name = f"linear_logprob_entropy, {impl} on {device}"
            checks[name] = functools.partial(_check_head, impl, device)
            name = f"ratio_loss, {impl} on {device}"
            checks[name] = functools.partial(_check_ratio_loss, impl, device)
        checks[f"top_entropy_mask on {device}"] = functools.partial(_check_selection, device)
    failed = 0
    for name, check in checks.items():
        problem = check()
        failed += bool(problem)
        print(f"  {name}: {problem or 'ok'}")
    built = backends.why_not("cpu", torch.device("cpu")) or f"loaded, {_native.build('cpu')}"
    print(f"  compiled CPU kernels: {built}")
    for line in _instruction_sets():
        print(f"  {line}")
    last = torch.device(devices[-1])
    print(f"  CUDA kernels: {cuda.state()}")
    print(f"  Triton kernels: {backends.why_not('triton', last) or _triton_state(last)}")
    return int(failed > 0)


def _refuse_others(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Those of --bench beside --verify; --json is both's."""
    given = [name for name in command.OPTIONS if getattr(options, name) is not None]
    others = ["bench"] * options.bench + [name for name in given if name != "json"]
    if others:
        names = ", ".join(f"--{name}" for name in others)
        parser.error(f"argument --verify: it takes --json alone beside it; got {names}")


def _verify(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The kernels of each kind of GPU, or of the interpreter; 1 if one is wrong."""
    count = torch.cuda.device_count()
    kinds = {torch.cuda.get_device_name(x): torch.device("cuda", x) for x in range(count)}
    found = []
    for where in kinds.values() or [torch.device("cpu")]:
        if (why := backends.why_not("triton", where)) is not None:
            parser.error(f"argument --verify: {why}")
        from .verification.command import run

        if where.type == "cpu":
            mend_interpreter()
        say = (lambda line: None) if options.json is True else functools.partial(print, flush=True)
        found.append(run(where, say))
    if options.json is True:
        print(json.dumps(found, indent=1))
    elif options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return int(any(one["wrong"] for one in found))


def _instruction_sets() -> list[str]:
    """What heads of each dtype run on here, and what a processor with AMX loses without it."""
    module = _native.cpu()
    if module is None:
        return []
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    taken = {name: _native.instruction_set(dtype) for name, dtype in dtypes.items()}
    listed = ", ".join(f"{isa} for {name}" for name, isa in taken.items())
    lines = [f"instruction sets: {listed}; here are {', '.join(module.instruction_sets())}"]
    why = module.why_no_amx()
    if why is not None and taken["bf16"] != "amx":
        lines.append(
            "AMX: this processor has it, but bf16 heads do not run on it: "
            f"{why or 'it was measured to be slower'}. "
            "torch.mm in bf16 may use it and be faster, but rounds logits to bf16, "
            "and log-probs lose their digits: no impl takes it"
        )
    return lines


def _triton_state(device: torch.device) -> str:
    if not first_use.asks(device):
        return 'loaded; impl="auto" takes them on a GPU'
    answers = first_use.known(device).values()
    wrong = sum(not answer.right for answer in answers)
    return (
        f"loaded; {len(answers)} questions about them are answered on this GPU, {wrong} of them by "
        "a failure (--verify tells more)"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _check_head(impl: str, device: str) -> str:
    """Outputs and gradients of a peaked head against fp64; empty if all is well."""
    # The kernels of csrc/cuda take no other dtype, and round gradients to it.
    ours = torch.bfloat16 if impl == "cuda" else torch.float32
    hidden, weight, target = (x.to(device) for x in peaked_head(96, 48, 2500, dtype=ours))
    torch.manual_seed(0)
    grads = (torch.randn(3, 96) * (torch.rand(96) < 0.2)).to(device)
    found = []
    for dtype in (ours, torch.float64):
        h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        if dtype == torch.float64:
            outputs = list(reference.linear_logprob_entropy(Head(h, w, target)))
        else:
            computed = linear_logprob_entropy(Head(h, w, target), impl=impl)[:3]
            outputs = [x for x in computed if x is not None]
        torch.autograd.backward(outputs, list(grads.to(outputs[0].dtype)))
        found.append([*(x.detach() for x in outputs), h.grad, w.grad])
    for name, got, want in zip(
        ("logprob", "entropy", "logsumexp", "dh", "dW"), *found, strict=True
    ):
        error = float((got - want).abs().max() / want.abs().max())
        rounded = name in ("dh", "dW") and ours == torch.bfloat16
        if not error < (1e-2 if rounded else 1e-5):
            return f"FAILED: {name} is off by {error:.1e} of its largest value"
    return ""


def _check_ratio_loss(impl: str, device: str) -> str:
    """Loss and gradient against fp64 on ratios inside and outside of the clips; empty if well."""
    old, advantage = -torch.rand(4, 100, device=device) - 2, torch.randn(4, 100, device=device)
    mask = torch.rand(4, 100, device=device) < 0.5
    logprob = (old + 0.3 * torch.randn(4, 100, device=device)).requires_grad_()
    got = ratio_loss(logprob, old, advantage, mask, impl=impl)[0]
    want = reference.ratio_loss(logprob.double(), old.double(), advantage.double(), mask, mask)
    found = [(loss.detach(), torch.autograd.grad(loss, logprob)[0]) for loss in (got, want)]
    for name, x, y in zip(("loss", "gradient"), *found, strict=True):
        error = float((x - y).abs().max() / y.abs().max())
        if not error < 1e-4:
            return f"FAILED: the {name} is off by {error:.1e} of its largest value"
    return ""


def _check_selection(device: str) -> str:
    """The top 20% of heavily tied entropies against a sort."""
    entropy = torch.rand(10_007, device=device).mul(50).round() / 50
    got, want = top_entropy_mask(entropy), reference.top_entropy_mask(entropy)
    return "" if torch.equal(got, want) else f"FAILED: {int((got != want).sum())} tokens differ"


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has closed it; the interpreter's own flush at exit would tell again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
