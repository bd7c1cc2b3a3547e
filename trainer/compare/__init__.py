"""`python -m trainer compare`: placeholder."""


def main(arguments: list[str]) -> int:
    """placeholder"""
    return 2
