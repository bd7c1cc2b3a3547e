r"""Pairs as in answer_pairs.py: what answers are dressed in, other names of units, near misses."""

from tests.trainer.answer_pairs import Pairs

BOXED: dict[str, Pairs] = {
    "dress": [
        (
            "34",
            [r"34\ ", r"34\\", r"\Huge 34", r"\color{red}{34}", r"\color{blue}34", r"34 ✓"]
            + [r"\textcolor{blue}{34}", r"\underline{34}", r"34\;\checkmark", r"\large 34"],
            [r"\color{34}{35}", r"\underline{35}", r"\textcolor{34}{43}"],
        ),
        (r"\frac{1}{2}", [r"{1 \over 2}", r"\nicefrac{1}{2}", r"\sfrac12"], [r"\sfrac21"]),
        (
            r"\left(\begin{array}{c}1\\2\end{array}\right)",
            [r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\[2pt] 2 \end{bmatrix}"],
            [r"\left(\begin{array}{c}2\\1\end{array}\right)", r"\begin{pmatrix}1&2\end{pmatrix}"],
        ),
        (
            r"\begin{pmatrix} 0 & 1 \\ 1 & 0 \end{pmatrix}",
            [r"\left[\begin{array}{cc}0&1\\1&0\end{array}\right]"],
            [r"\left[\begin{array}{cc}1&0\\0&1\end{array}\right]"],
        ),
        ("6,3,2", [r"2, 3, \text{ and } 6", "2, 3, and 6"], [r"2, 3, 6, \text{ and } 7"]),
        ("204_5", ["(204)_5", r"(204)_{5}"], ["(204)_6", "(402)_5"]),
        ("13", [r"{\bf 13}"], ["13_{x}", "13_n"]),
    ],
    "units by other names": [
        ("£20", ["20", "£20", r"20\text{ pounds}"], [r"\$20", "€20", "£2"]),
        ("€12.50", ["12.5", "€12.5", r"12.50\text{ euros}"], ["€125", "£12.50"]),
        ("£1,250", ["1250", "£1250"], ["125", "£1.25"]),
        ("60 mph", [r"60\text{ miles per hour}", r"60\text{ mi/h}"], [r"60\text{ kph}"]),
        (r"60\text{ km/h}", [r"60\text{ kph}", "60"], [r"60\text{ mph}", r"60\text{ km}"]),
        ("4", [r"4\text{ ways}"], [r"4\text{ dozen}", r"4\text{ trillion}"]),
        ("3:2", [r"3\text{ to }2", r"3 \colon 2", "3 to 2"], [r"2\text{ to }3", r"32"]),
    ],
    "formulas by other names": [
        (r"\sqrt{51}", ["√51", "√ 51"], ["√5", "√(15)"]),
        (r"\binom{5}{2}", [r"{5 \choose 2}", r"\tbinom52", r"\dbinom{5}{2}"], [r"{5 \choose 1}"]),
        (r"\sqrt[3]{4}", [r"\sqrt[3]4", r"2^{2/3}"], [r"\sqrt[4]3", r"\sqrt4"]),
        (r"\ln 5", [r"\log_e 5", r"\log_{e}(5)"], [r"\log_5 e", r"\log_{10} 5"]),
        (r"f^{-1}(x)=2x", ["2x", "f^{-1}(x) = 2x"], ["x^{-1}=2x", "f(x) = 2x"]),
        (r"(3, \frac{\pi}{2})", [r"(r,\theta) = (3, \frac{\pi}{2})"], [r"(\theta,r)=(3,\pi)"]),
    ],
    "capitals": [
        ("k", ["k"], ["K", r"\text{K}"]),
        ("2k", ["k+k"], ["2K", "K+k"]),
        ("12a^2b", ["12ba^2"], ["12a^2B", "12A^2b"]),
    ],
    "equations": [
        (
            "x+y=3",
            ["y+x=3", "y=3-x", "2x+2y=6", "x+y-3=0"],
            ["3", "x-y=3", "x+y=4", "x=3"],
        ),
        ("AB = 12", ["12"], ["21", "AC=12"]),
    ],
}

WHOLE: dict[str, Pairs] = {
    "no mark": [
        (
            "34",
            ["The correct answer is **34**.", "**Answer: 34**", "It is not 33.\nSo it is 34"],
            ["It can't be 34", "x > 34", r"so $x$ is $\geq 34$", "It costs 34 million"]
            + ["The answer is 34 thousand.", "34 dozen", "x ≤ 34", r"x \leq 34"],
        ),
        (
            "B",
            ["The correct option is (B).", "The correct choice is: B", "**Answer: B**"],
            ["The correct option is C.", "The option is B or C", "choice B"],
        ),
        (r"\frac{3}{4}", [r"It is $\frac{3}{4}$."], [r"$\frac{3}{4}$ is not it"]),
    ],
}
