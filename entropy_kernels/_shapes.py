"""Shapes in signatures: `Float[Tensor, "T D"]` is a tensor of floats, [T, D].

They are jaxtyping's where it is installed, which lets the tests check every call. Elsewhere, and
for type checkers, they are the plain type: jaxtyping is no requirement.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:

        class Bool:
            """`Bool[X, shape]` is X."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Float = Int = Bool

__all__ = ["Bool", "Float", "Int"]
