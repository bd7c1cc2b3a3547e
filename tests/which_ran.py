"""Which backend's own functions ran: of the head, the loss and the selection."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# Where the functions of each backend are, by what they compute.
BODIES = {
    "torch": {
        "forward": "_torch.head_forward",
        "backward": "_torch.head_backward",
        "ratio_loss": "_torch.ratio_loss",
        "radix_histogram": "_torch.selection",
    },
    "cpu": dict.fromkeys(("forward", "backward", "ratio_loss", "radix_histogram"), "_native"),
    "triton": {
        "forward": "_triton.head_forward.launch",
        "backward": "_triton.head_backward.launch",
        "ratio_loss": "_triton.ratio_loss.launch",
        "radix_histogram": "_triton.selection.launch",
    },
    # Its head is launched by Triton's, which says so.
    "cuda": {
        "ratio_loss": "_cuda_kernels.ratio_loss",
        "radix_histogram": "_cuda_kernels.selection",
        "top": "_cuda_kernels.selection",
    },
}
# What one launch does in the place of several.
NAMES = {"top": "radix_histogram"}
HEAD = {"forward", "backward"}
SELECTION = {"radix_histogram"}
LOSS = {"ratio_loss"}
ALL = HEAD | SELECTION | LOSS


class WhichRan:
    """{(what, backend)} of all that has run since `monkeypatch` was given."""

    def __init__(self, monkeypatch: Any):
        self.seen: set[tuple[str, str]] = set()
        for backend, places in BODIES.items():
            if backend == "triton" and find_spec("triton") is None:
                continue
            for what, place in places.items():
                module = import_module(f"entropy_kernels.{place}")
                body = self._counting(getattr(module, what), what, backend)
                monkeypatch.setattr(module, what, body)

    def _counting(self, body: Callable[..., Any], what: str, backend: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            self.seen.add((NAMES.get(what, what), options.get("impl", backend)))
            return body(*arguments, **options)

        return run

    def assert_only(self, backend: str, what: set[str]) -> None:
        """These and no others have run, all on that backend."""
        assert self.seen == {(name, backend) for name in what}
