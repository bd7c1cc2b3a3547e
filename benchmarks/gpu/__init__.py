"""What one GPU has to show: floors, correctness, tiles, peers, memory. `python -m benchmarks.gpu`.

GPU machines without a network may lack jaxtyping, which the package uses for annotations alone;
there a stand-in takes its place before the package is imported.
"""

import sys
import types
from importlib.util import find_spec


class _Shape:
    """Float[Tensor, "T D"] is Tensor."""

    def __class_getitem__(cls, item: tuple[type, str]) -> type:
        return item[0]


if find_spec("jaxtyping") is None:
    stand_in = types.ModuleType("jaxtyping")
    stand_in.__dict__.update(dict.fromkeys(("Bool", "Float", "Int"), _Shape))
    sys.modules["jaxtyping"] = stand_in
