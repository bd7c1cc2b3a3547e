r"""Further pairs, as in answer_pairs.py: formulas, words and choices, and whole responses."""

from tests.trainer.answer_pairs import Pairs

BOXED: dict[str, Pairs] = {
    "formulas": [
        ("pi/4", [r"\frac{\pi}{4}", r"\pi/4", "π/4", "pi/4"], [r"\pi", r"\frac{\pi}{2}", "0.785"]),
        ("2pi", [r"2\pi", r"2 \cdot \pi", "2π"], [r"\pi", "2", "6.28", r"\pi^2"]),
        ("log(2)", [r"\log(2)", r"\log 2"], [r"\log(3)", "2", r"\log_2 3"]),
        (
            r"\sqrt2",
            [r"\sqrt{2}", "√2", "sqrt(2)", "2^{1/2}", "1.414214"],
            ["1.41421", "2", "1.414"],
        ),
        (r"2\sqrt{3}", [r"\sqrt{12}", r"2\sqrt3", r"\frac{6}{\sqrt3}"], [r"3\sqrt2", r"\sqrt6"]),
        (
            r"\frac{1+\sqrt5}{2}",
            [r"\frac12+\frac{\sqrt{5}}2", "1.6180340"],
            [r"\frac{1-\sqrt5}{2}"],
        ),
        ("x^2+1", ["1+x^2", "x^{2}+1", "x²+1"], ["x^2", "x^2-1", "x+1", "y^2+1", "2"]),
        ("x^2+2x+1", ["(x+1)^2", "(x+1)(x+1)", "x(x+2)+1"], ["(x+1)^3", "x^2+x+1"]),
        ("y = 2x+1", ["2x+1", "y=2x+1", "y = 1+2x", "y-2x=1"], ["y=2x", "x=2y+1", "2x-1"]),
        (r"\frac{x}{2}", ["x/2", "0.5x", r"\dfrac x2"], [r"\frac{2}{x}", "2x"]),
        ("e^2", [r"\mathrm{e}^2", "e^{2}"], ["2e", "e", "7.389"]),
        (r"\binom{10}{3}", ["120", r"\frac{10!}{3!7!}"], ["720", "30"]),
        ("5!", ["120", r"5\cdot4\cdot3\cdot2"], ["5", "24"]),
        ("x^2+y^2=1", ["x^2+y^2=1", "y^2+x^2=1"], ["x^2+y^2", "1", "x^2+y^2=2"]),
        ("f(x) = 3x", ["3x", "f(x)=3x"], ["3", "f(x)=x"]),
    ],
    "equations for a number": [
        ("5", ["x=5", "x = 10/2 = 5", "m+n=5", r"\theta = 5", "f(2)=5"], ["2x=5", "5=6", "x=5=6"]),
        ("x=3 or x=-1", ["-1, 3", r"x=-1 \text{ or } x=3"], ["x=3", "3", "1, -3"]),
        ("7", ["x=y=7", "N = 3+4"], ["7=N+1", "x=7=8"]),
        ("x=5", ["5", "x = 5"], ["y=5", "x=-5", "2x=10", "x>5", "x"]),
        ("1", ["P(A)=1"], ["x^2+y^2=1", r"\sin^2x+\cos^2x", "0=1"]),
        (r"\frac{\pi}{2}", [r"\frac{\pi}{2} \approx 1.57"], [r"x \approx 1.57", "1.57"]),
    ],
    "complex numbers and infinity": [
        ("3+4i", ["4i+3", r"3+4\mathrm{i}", "3 + 4 i"], ["3-4i", "4+3i", "7", "5"]),
        ("2i", ["(1+i)^2", "2i"], ["-2i", "2", "i"]),
        ("-1", ["i^2", "-1"], ["i", "1"]),
        (r"\infty", [r"\infty", "∞", r"+\infty"], [r"-\infty", "0", r"10^{100}", "1/0"]),
        (r"-\infty", [r"-\infty"], [r"\infty"]),
    ],
    "bases, times and ratios": [
        ("101_2", ["101_2", "101_{2}", "101"], ["101_3", "5", "1010_2", "110_2"]),
        (r"2516_8", [r"2516_{8}"], ["2516_7", "1358"]),
        ("3F_{16}", ["3F_{16}"], ["F3_{16}", "3F_8"]),
        ("3:30", ["3:30", r"3:30\text{ PM}", r"\text{3:30 p.m.}"], ["3.5", "6:60", "4:30", "330"]),
        (r"3:30\text{ p.m.}", ["3:30", r"3\!:\!30 \text{ PM}"], [r"3:30\text{ a.m.}", "15:30"]),
        ("3:4", ["3:4", r"\frac34"], ["4:3", "3.4", "34"]),
    ],
    "words": [
        (
            r"\text{even}",
            [r"\textit{even}", "even", r"\text{Even}", r"\mathrm{even}."],
            ["odd", "", r"\text{even}\text{odd}", r"\text{not even}", "even or odd", "uneven"],
        ),
        (
            "Evelyn",
            [r"\text{Evelyn}", r"\textbf{Evelyn}"],
            ["Debra", "E", r"\text{Evelyn or Debra}"],
        ),
        ("yes", [r"\text{Yes}", "YES"], ["no", r"\text{yes and no}", "yes, no"]),
        ("New York", [r"\text{ new york }", "New  York"], ["York", "New"]),
        (r"\text{June 20}", [r"\text{June }20", "June 20"], ["June 21", "20", "July 20"]),
        (r"\text{no solution}", ["No solution", r"\text{no solution}."], ["0", r"\text{solution}"]),
    ],
    "choices": [
        (
            "E",
            ["E", "(E)", r"\text{E}", "E: text", r"\text{E. a dog}", "E)", r"\text{(E) all}"],
            ["A", "A: E", "A, B, C, D, E", "D, E", "E, D", r"\text{D or E}", "E: x, D: y"],
        ),
        (
            "B",
            [r"(B)\ 12", r"\textbf{(B) }12", r"\text{(B)}", "B.", r"\text{B}", r"\mathrm{(B)}\ 12"],
            ["12", r"(A)\ 12", r"(A)\ 1\ (B)\ 12", "AB", "(B), (C)", "Blue", r"(B)\ 1 (C)\ 2", "b"],
        ),
        (r"\text{(C)}", ["C", "(C)", r"\text{(C)}"], ["D", "(A)(C)", r"C \text{ and } D"]),
        ("A", [r"\text{Option A}"], ["A, B, C, D", "ABCD", "A/B", "(A) x or B"]),
        ("A, C", ["C, A", "(A), (C)"], ["A", "AC", "A, B, C"]),
    ],
}

WHOLE: dict[str, Pairs] = {
    "boxes": [
        (
            "34",
            [
                r"\boxed{33}. Wait, \boxed{34}",
                r"So \fbox{34}.",
                r"It is $\boxed 34$.",
                r"$\boxed{\boxed{34}}$",
                r"\boxed {34}",
                "The answer:\n\\[\\boxed{34}\\]\nDone.",
                r"\boxed{\text{The answer is } 34}",
            ],
            [
                r"\boxed{34}. Wait, \boxed{33}",
                r"\boxed{33} and \boxed{34} or \boxed{35}",
                r"\boxed{34}\boxed{}",
                r"It is 34, so \boxed{34",
                r"\boxed{}",
                "34, no: \\boxed{33}",
                "",
            ],
        ),
        (r"\{1,2\}", [r"$\boxed{\left\{1,2\right.\}}$", r"\boxed{\{2,1\}}"], [r"\boxed{\{1,2}"]),
        (r"[0,1)", [r"\boxed{[0,1)}"], [r"\boxed{(0,1)}"]),
    ],
    "tags": [
        (
            "34",
            [
                "<answer>34</answer>",
                "<answer> $34$ </answer>",
                r"<answer>\boxed{34}</answer>",
                "<answer>33</answer> no: <answer>34</answer>",
                r"\boxed{33} <answer>34</answer>",
            ],
            [
                "<answer>34",
                "<answer>33</answer>",
                r"<answer>33</answer> \boxed{34}",
                "<answer>33, 34</answer>",
                "<answer></answer> 34",
            ],
        ),
    ],
    "golds in marks": [
        ("3 + 4 = 7, so\n#### 42", [r"\boxed{42}", "so\n#### 42", "42"], [r"\boxed{7}", "7"]),
        ("$42$", [r"\boxed{42}"], [r"\boxed{24}"]),
        (r"\(\frac{1}{2}\)", [r"\boxed{\frac12}"], [r"\boxed{12}"]),
        (r"\[ x = 5 \]", [r"\boxed{5}"], [r"\boxed{-5}"]),
        (r"The sum is $3 + 4 = \boxed{7}$.", [r"\boxed{7}"], [r"\boxed{3}"]),
        ("#### 1,250", [r"\boxed{1250}", "#### 1,250", r"\boxed{\$1,250}"], [r"\boxed{1.25}"]),
    ],
    "no mark": [
        (
            "34",
            ["The answer is 34.", "so $x = 34$.", "It costs $34.", "Answer: 34", "thus 34"],
            ["34 is wrong, it is 33", "The answer is 33. I had 34.", "3 4", "thirty-four"],
        ),
        (
            "2",
            ["**Answer:** 2", "#### 2 apples", "the answer is therefore $x=2$"],
            [
                "so $1$ or $2$",
                "so 2x",
                "so 2^3",
                "x = 1, 2",
                "The answer is 2 or 1.",
                "The answer is not 2.",
            ],
        ),
        ("B", ["The answer is (B).", "Answer: B) 12"], ["The answer is A or B", "B"]),
        ("0.5", ["the answer is 1/2", r"the answer is $\frac12$"], ["the answer is 12"]),
        (r"10\%", ["It is 10%.", "The final answer is 0.1"], ["It is 100%."]),
        ("Paris", [], ["It is Paris", "Paris"]),
    ],
}
