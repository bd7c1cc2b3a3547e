"""Where the final answer stands, in texts of any length."""

import time

import pytest

from trainer.tasks.answers import final_answer, is_cut, last_boxed, last_tagged, marked_answer


def test_final_answers_of_long_texts_take_no_time():
    """A policy that repeats itself to the length limit opens a box, or a tag, at every token."""

    def seconds(count: int) -> float:
        began = time.process_time()
        for text in ("\\boxed{" * count, "<answer>" * count, "<answer></answer" * count):
            assert last_boxed(text) is None
            assert last_tagged(text) is None
            assert final_answer(text) == text
        assert last_boxed("\\boxed{" * count + "1}") == "1"
        assert last_tagged("<answer>" * count + "1</answer>") == "1"
        return time.process_time() - began

    # Ten by right, and a hundred where each opening one looks for its end.
    assert min(seconds(40_000) for _ in "abc") < 40 * min(seconds(4_000) for _ in "abcde")


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{1} \\boxed{2} }", "2"),
        ("} \\boxed{a}", "a"),
        ("\\boxed{a \\boxed{b} c}", "b"),
        ("\\boxed{a \\boxed{b c}", "b c"),
        ("\\boxed{1} and {\\boxed{2", "1"),
        ("\\boxed{{}}{", "{}"),
        ("\\fbox{1}", "1"),
        ("\\boxed{1} \\fbox {2}", "2"),
        ("\\boxed 34$.", "34"),
        ("\\boxed{1} $\\boxed\\frac{1}{2}$", "\\frac{1}{2}"),
        ("\\boxed \\boxed{2}", "2"),
        ("\\boxed{\\{1, 2\\right.}", "\\{1, 2\\right."),
        ("\\boxed{1\\\\} 2", "1\\\\"),
        ("\\boxedx{1}", None),
        ("no box, \\boxed{open", None),
        ("\\boxed{}", ""),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "tagged"),
    [
        ("<answer>1</answer> <answer>2</answer> <answer>3", "2"),
        ("<answer>1</answer> </answer>", "1"),
        ("</answer><answer>1</answer>", "1"),
        ("</answer>", None),
        ("<answer></answer>", ""),
    ],
)
def test_last_tagged(text, tagged):
    assert last_tagged(text) == tagged


@pytest.mark.parametrize(
    ("response", "marked", "final"),
    [
        ("\\boxed{1} <answer> 2 </answer> \\boxed{3}", "2", "2"),
        ("<answer>1</answer> or <answer> 2\n3 </answer>\n\\boxed{4}", "2\n3", "2\n3"),
        ("so \\boxed{\\frac{1}{2}} or \\boxed{\\text{a {b}}} end\nlast", *["\\text{a {b}}"] * 2),
        ("<answer>so \\boxed{ 1 }</answer>", "1", "1"),
        ("<answer></answer> \\boxed{3}", "", ""),
        ("\\boxed{3} <answer>4", "3", "3"),
        ("first\n the last \n\n", None, "the last"),
        ("\n", None, ""),
    ],
)
def test_the_tag_comes_before_the_box(response, marked, final):
    assert marked_answer(response) == marked
    assert final_answer(response) == final


def test_an_open_mark_is_a_cut():
    assert all(map(is_cut, ("so \\boxed{3", "<answer>3", "\\fbox{")))
    assert not is_cut("unboxed, \\boxedx, answer")
