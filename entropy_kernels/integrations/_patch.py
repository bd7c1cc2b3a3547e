"""Attributes of other libraries' modules, classes and objects, replaced and put back."""

from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

from packaging.version import Version


class _Inherited:
    """Stands for an attribute that its owner had from its class alone."""


class Patch:
    """Replacements of attributes that are in force until `undo`, or until a `with` block ends.

    Undoing twice does nothing. What somebody else has replaced since is left as it is: `undo` then
    raises, naming the attribute, and puts nothing back.
    """

    def __init__(self, *replacements: tuple[Any, str, Any]) -> None:
        """replacements: (owner, name of the attribute, what replaces it)."""
        for owner, name, _ in replacements:
            getattr(owner, name)
        self._active = [
            (owner, name, vars(owner).get(name, _Inherited), new)
            for owner, name, new in replacements
        ]
        for owner, name, _, new in self._active:
            setattr(owner, name, new)

    @property
    def active(self) -> bool:
        """Whether the replacements are in force."""
        return bool(self._active)

    def undo(self) -> None:
        """Put back what was there before."""
        for owner, name, _, new in self._active:
            found = vars(owner).get(name)
            # Somebody may have bound it to its owner, as if it were a function.
            if found is not new and getattr(found, "__func__", None) is not new:
                of = getattr(owner, "__name__", type(owner).__name__)
                raise RuntimeError(f"{of}.{name} was replaced again since; undo that patch first")
        for owner, name, old, _ in reversed(self._active):
            if old is _Inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        self._active = []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def require(package: str, least: str, below: str) -> None:
    """ImportError unless `package` is installed in a version that the adapter was tested with."""
    wanted = f"{package}>={least},<{below}"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"this adapter needs {wanted}, which is not installed") from None
    if not Version(least) <= Version(found) < Version(below):
        raise ImportError(f"this adapter needs {wanted}, whose internals it patches; got {found}")
