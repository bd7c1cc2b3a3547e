"""Responses that would run code where a verifier evaluates them, and what reaches an evaluator.

As a program it verifies them all and prints, as JSON, the texts given to Python's compiler, the
events that only running code raises, and the number of verdicts.
"""

import json
import sys

# Compared by solving, as a formula, and as a number.
GOLDS = ("x^5-x-1=0", "x^5-x-1", "5")
PLACES = (
    "CODE",
    "$CODE$",
    "\\[ x = CODE \\]",
    "The answer is CODE",
    "answer: 1 + CODE",
    "answer is 2*(3)*CODE",
    "The final answer is 1-CODE. I hope it is correct.",
    "\\boxed{CODE}",
    "\\boxed{1 + CODE}",
    "\\boxed{x = CODE}",
    "\\boxed{x < CODE}",
    "\\boxed{CODE, 2}",
    "\\boxed{\\{CODE, 2\\}}",
    "\\boxed{(CODE, 2)}",
    "\\boxed{x_{CODE}}",
    "\\boxed{x^{CODE}}",
    "\\boxed{f(CODE)}",
    "\\boxed{\\CODE}",
    "\\boxed{\\text{CODE}}",
    "\\boxed{\\text{CODE}(2)}",
    "\\boxed{\\text{CODE}^5 - \\text{CODE} - 1 = 0}",
    "\\boxed{\\mathrm{CODE}}",
    "\\boxed{\\mbox{CODE}}",
    "\\boxed{\\variable{CODE}}",
    "\\boxed{\\operatorname{CODE}(1)}",
    "\\boxed{\\operatorname{CODE}}",
    "\\boxed{\\gcd(CODE, 2)}",
    "\\boxed{\\max(CODE, 2)}",
    "\\boxed{\\sqrt[CODE]{2}}",
    "\\boxed{\\frac{d}{d CODE} x}",
    "\\boxed{\\int CODE dx}",
    "\\boxed{\\sum_{i=CODE}^{2} i}",
    "\\boxed{\\begin{pmatrix}CODE\\\\2\\end{pmatrix}}",
)
CALLS = (
    "__import__('os').system('touch FILE')",
    '__import__("os").system("touch FILE")',
    "exec(\"open('FILE','w')\")",
    "open('FILE','w')",
    "[open('FILE','w')]",
    "(lambda:open('FILE','w'))()",
    "\\_\\_import\\_\\_('os').system('touch FILE')",
    "{}.__class__.__base__.__subclasses__()",
    "system('touch FILE')",
    "exit",
)
ARITHMETIC = (
    *("34/2*3", "(1+2)(3)", "7*(8", "1,234.5e7", "the answer is 2*(3)+4", "\\boxed{1{,}000}"),
    *(
        "\\boxed{x^{34}+1}",
        "\\boxed{50\\%}",
        "\\boxed{1.5E10}",
        "\\boxed{0,5}",
        "12 percent",
        "1.",
        "\u0663\u0664",
    ),
)
# What code that runs raises, and nothing that a verifier does.
EFFECTS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"}


def responses(file: str) -> list[str]:
    """Each call in each place, and arithmetic, which may be evaluated."""
    calls = [call.replace("FILE", file) for call in CALLS]
    return [place.replace("CODE", call) for place in PLACES for call in calls] + list(ARITHMETIC)


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
