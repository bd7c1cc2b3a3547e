"""What a caller can get wrong in choosing tokens."""

from torch import Tensor

from ._arguments import check_choice, check_fraction, check_group, check_threshold


def check_selection_options(
    *,
    fraction: float = 0.2,
    threshold: float | Tensor | None = None,
    which: str = "top",
    scope: str = "batch",
    group: object = None,
) -> None:
    """Each option of a selection by itself."""
    check_fraction(fraction)
    check_threshold("threshold", threshold)
    check_choice("which", which, ("top", "bottom", "random"))
    check_choice("scope", scope, ("batch", "sequence"))
    check_group("group", group)


def check_selection(
    selected: Tensor | None,
    threshold: float | Tensor | None,
    which: str,
    scope: str,
    group: object,
    vocab_group: object,
) -> None:
    if vocab_group is not None and which == "random":
        raise ValueError(
            'which="random" draws on each rank by itself, but those of vocab_group must select the '
            "same tokens; draw once and give selected="
        )
    if selected is not None and threshold is not None:
        raise ValueError("selected and threshold both name the tokens; give one of them")
    check_threshold("threshold", threshold)
    chosen = (which, scope, group) != ("top", "batch", None)
    if chosen and (selected is not None or threshold is not None):
        name = "selected" if selected is not None else "threshold"
        raise ValueError(
            f"which, scope and group choose tokens by `fraction`; with {name}= they have no "
            f"meaning; got which={which!r}, scope={scope!r}, group={group!r}"
        )
