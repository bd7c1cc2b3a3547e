"""Responses that would run code where a verifier evaluates them, and what reaches an evaluator.

As a program it verifies them all and prints, as JSON, the texts given to Python's compiler, the
events that only running code raises, and the number of verdicts.
"""

import json
import sys
from pathlib import Path

import yaml

TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
GOLDS, PLACES, CALLS, ARITHMETIC = (
    TABLE[name] for name in ("golds", "places", "calls", "arithmetic")
)
# What code that runs raises, and nothing that a verifier does.
EFFECTS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"}


def responses(file: str) -> list[str]:
    """Each call in each place, and arithmetic, which may be evaluated."""
    calls = [call.replace("FILE", file) for call in CALLS]
    return [place.replace("CODE", call) for place in PLACES for call in calls] + ARITHMETIC


def main(file: str) -> None:
    from trainer.tasks.math_answers import math_reward

    for gold in GOLDS:  # what is imported and compiled once
        math_reward(gold, f"\\boxed{{{gold}+x}}")
    compiled: set[str] = set()
    effects: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "compile" and arguments[0] is not None:
            source = arguments[0]
            compiled.add(source.decode() if isinstance(source, bytes) else str(source))
        if event in EFFECTS or (event == "open" and set(arguments[1] or "") & set("wax+")):
            effects.append(f"{event} {arguments}")

    sys.addaudithook(watch)
    verdicts = [math_reward(gold, text) for gold in GOLDS for text in responses(file)]
    result = {"compiled": sorted(compiled), "effects": effects, "count": len(verdicts)}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
