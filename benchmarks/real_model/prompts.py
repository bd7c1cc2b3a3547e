"""The prompts of the studies on a pretrained model: sums with worked responses, and four kinds of
text for it to go on with.

python -m benchmarks.real_model.prompts FOLDER    writes FOLDER/sums.jsonl and FOLDER/KIND.jsonl

A sum is of three numbers of two digits. Its worked responses go four ways, at random: the answer at
once, from left to right, the largest number first, or tens and ones apart. So the first words of a
response are a decision, on which its chances depend, and most of what follows is not.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from trainer.log import replace_text

SUMS = 6000
PROMPTS = 300
NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stones")
PLACES = ("a box", "a garden", "a market", "a school", "a shop", "a small town", "the kitchen")
# What a function of the prompts of code does, and its name.
FUNCTIONS = (
    ("is_prime(n)", "Return True if n is a prime number."),
    ("factorial(n)", "Return the product of all positive integers up to n."),
    ("fibonacci(n)", "Return the n-th Fibonacci number."),
    ("reverse(text)", "Return the text backwards."),
    ("count_vowels(text)", "Return how many vowels there are in the text."),
    ("is_palindrome(text)", "Return True if the text reads the same backwards."),
    ("gcd(a, b)", "Return the greatest common divisor of a and b."),
    ("maximum(values)", "Return the largest of the values."),
    ("mean(values)", "Return the mean of the values."),
    ("median(values)", "Return the median of the values."),
    ("unique(values)", "Return the values without repetitions, in their order."),
    ("flatten(lists)", "Return one list with the elements of all lists."),
    ("word_counts(text)", "Return how often each word occurs in the text."),
    ("transpose(matrix)", "Return the matrix with rows and columns exchanged."),
    ("binary_search(values, wanted)", "Return the place of wanted in the sorted values."),
    ("merge(left, right)", "Return one sorted list of two sorted lists."),
    ("read_lines(path)", "Return the lines of a file without their line ends."),
    ("celsius(fahrenheit)", "Return the temperature in degrees Celsius."),
    ("digits(n)", "Return the list of the decimal digits of n."),
    ("caesar(text, shift)", "Return the text with each letter moved by shift."),
)
SUBJECTS = (
    *("the history of bread", "how rivers shape valleys", "the life of bees", "old clocks"),
    *("learning to swim", "the winter of a small village", "why the sky is blue", "trains"),
    *("the first astronomers", "growing tomatoes", "a letter to a friend", "the price of salt"),
    *("a lost dog", "building a bridge", "the music of the sea", "how paper is made"),
    *("a walk in the forest", "the invention of the telephone", "a school without books"),
    *("the oldest tree in the park",),
)
OPENINGS = (
    "Here is a short text about {}.\n\n",
    "This article explains {}.\n\n",
    "Once upon a time there was a story about {}. It began like this: ",
    "My grandmother often spoke of {}. She said that ",
    "What do we know about {}? ",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real_model.prompts", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where the files go")
    write(parser.parse_args().folder)


def write(folder: Path) -> None:
    """Write the files of all kinds; the same ones each time."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, count in {"sums": SUMS, **dict.fromkeys(KINDS, PROMPTS)}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows(kind, count))
        replace_text(folder / f"{kind}.jsonl", text)


def rows(kind: str, count: int) -> list[dict[str, str]]:
    """The first `count` rows of a kind, "sums" or one of KINDS."""
    make = KINDS.get(kind, _sum)
    return [make(random.Random(f"{kind}/{i}")) for i in range(count)]


def _sum(rng: random.Random, at_once: int = 2) -> dict[str, str]:
    """A sum, its answer and a response: a share for each way to work it, `at_once` for no work."""
    numbers = [rng.randint(11, 99) for _ in range(3)]
    question = " + ".join(map(str, numbers))
    way = rng.choice((*at_once * (_at_once,), _in_order, _largest_first, _tens_and_ones))
    answer = sum(numbers)
    return {
        "prompt": f"Question: What is {question}?\nAnswer:",
        "answer": str(answer),
        "worked": f"{way(numbers)} The answer is {answer}.",
    }


def _at_once(numbers: list[int]) -> str:
    return ""


def _in_order(numbers: list[int]) -> str:
    a, b, c = numbers
    return f" Start with {a}. {a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."


def _largest_first(numbers: list[int]) -> str:
    a, b, c = sorted(numbers, reverse=True)
    return f" The largest is {a}. {a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."


def _tens_and_ones(numbers: list[int]) -> str:
    tens, ones = [10 * (n // 10) for n in numbers], [n % 10 for n in numbers]
    t, o = " + ".join(map(str, tens)), " + ".join(map(str, ones))
    return (
        f" Tens: {t} = {sum(tens)}. Ones: {o} = {sum(ones)}. "
        f"{sum(tens)} + {sum(ones)} = {sum(numbers)}."
    )


def _few_shot_sum(rng: random.Random) -> dict[str, str]:
    """A sum after three worked ones, for a model that has seen none."""
    shown, asked = [_sum(rng, at_once=0) for _ in range(3)], _sum(rng)
    before = "\n\n".join(row["prompt"] + row["worked"] for row in shown)
    return {"prompt": f"{before}\n\n{asked['prompt']}", "answer": asked["answer"]}


def _word_problem(rng: random.Random) -> dict[str, str]:
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    other = rng.choice([x for x in NAMES if x != name])
    have, more, times = rng.randint(4, 30), rng.randint(2, 20), rng.randint(2, 5)
    question = (
        f"{name} finds {have} {thing} in {place}. {other} gives {name} {more} more on each of "
        f"{times} days. How many {thing} does {name} have then?"
    )
    return {
        "prompt": f"Question: {question}\nLet us think step by step.\nAnswer:",
        "answer": str(have + more * times),
    }


def _code(rng: random.Random) -> dict[str, str]:
    (name, purpose), (other, does) = rng.sample(FUNCTIONS, 2)
    first = f'def {other}:\n    """{does}"""\n    ...\n\n\n'
    return {"prompt": f'{first}def {name}:\n    """{purpose}"""\n', "answer": "0"}


def _prose(rng: random.Random) -> dict[str, str]:
    opening = rng.choice(OPENINGS).format(rng.choice(SUBJECTS))
    return {"prompt": opening + rng.choice(("In", "The", "It", "There")), "answer": "0"}


KINDS: dict[str, Callable[[random.Random], dict[str, str]]] = {
    "few-shot-sums": _few_shot_sum,
    "word-problems": _word_problem,
    "code": _code,
    "prose": _prose,
}
"""What the model goes on with in the study of its entropies. Code and prose have no answer."""


if __name__ == "__main__":
    main()
