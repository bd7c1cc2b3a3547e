"""`python -m trainer analyze`: analyses of the entropies of a model's tokens.

patterns      histogram, percentiles, tokens by entropy, and a page of coloured responses
temperatures  two-temperature decoding: accuracy over both temperatures
evolution     changes by training: overlap of the top tokens, entropy by percentile
"""

import difflib
import os
import sys

USAGE = __doc__


def main(arguments: list[str]) -> int:
    """Run one analysis; returns the exit status. Raises ValueError for bad settings."""
    import tyro

    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"analyze runs in one process; torchrun has started {size}")
    what, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    prog = f"python -m trainer analyze {what}"
    if what == "patterns":
        from trainer.studies.analyze.patterns import Patterns, analyze_patterns

        analyze_patterns(tyro.cli(Patterns, args=rest, prog=prog))
    elif what == "temperatures":
        from trainer.studies.analyze.temperatures import Temperatures, analyze_temperatures

        analyze_temperatures(tyro.cli(Temperatures, args=rest, prog=prog))
    elif what == "evolution":
        from trainer.studies.analyze.evolution import Evolution, analyze_evolution

        analyze_evolution(tyro.cli(Evolution, args=rest, prog=prog))
    else:
        help_wanted = what in ("-h", "--help", "help")
        if what and not help_wanted:
            close = difflib.get_close_matches(what, ("patterns", "temperatures", "evolution"), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            print(f"error: no analysis {what!r}{hint}", file=sys.stderr)
        print(USAGE.strip() if USAGE else "", file=sys.stdout if help_wanted else sys.stderr)
        return 0 if help_wanted else 2
    return 0
