"""Bounds that the settings share."""


def at_least(settings: object, low: int, *names: str) -> None:
    """ValueError, naming the first of `names` in `settings` that is below `low`."""
    for name in names:
        if getattr(settings, name) < low:
            raise ValueError(f"{name} must be at least {low}; got {getattr(settings, name)}")
