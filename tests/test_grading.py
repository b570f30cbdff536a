"""Graders against tables of cases: numbers, formulas, letters, votes, rewards."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest

from support.grading import (
    GRADERS,
    grade_answer,
    grade_values,
    normalize_formula,
    parse_number,
    pass_at_k,
    powers_of_two,
    read_flexible,
    read_gsm8k_key,
    read_letter,
    read_math,
    read_strict,
)


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("2 + 3 = 5\n#### 5", 5, 5),
        ("#### 1,234,567", 1234567, 1234567),
        ("#### $18.00", 18, 18),
        ("#### -7...", -7, -7),
        ("#### -$3.50", -3.5, -3.5),
        ("####12\nQuestion: of 3 apples", 12, 3),  # strict takes the first, flexible the last
        ("#### 1\n#### 2", 1, 2),
        ("so 16-3=13 are left", None, 13),
        ("5-3", None, 3),  # a minus sign between numbers is not part of the second
        ("f(5)-3 or x-3", None, 3),
        ("it fell to -4 degrees.", None, -4),
        ("she pays $1,250.75, or 10% more.", None, 10),
        (".5 of it", None, 0.5),
        ("#### x", None, None),
        ("#### 1.2.3", None, Fraction(3, 10)),
        ("## 5 is a heading", None, 5),
        ("", None, None),
    ],
)
def test_numbers_are_found_and_compared_as_numbers(text, strict, flexible):
    assert read_strict(text) == strict and read_flexible(text) == flexible


@pytest.mark.parametrize(
    "text, value",
    [
        ("-$1,234.50", Fraction(-2469, 2)),
        ("+3.", 3),
        (".25", Fraction(1, 4)),
        ("3/4", Fraction(3, 4)),
        ("1.5/-2", Fraction(-3, 4)),
        ("1/0", None),
        ("12_5", None),
        ("3 x", None),
        ("", None),
        ("1" * 5000, None),  # Python parses at most 4,300 digits
    ],
)
def test_a_text_is_a_number_as_a_whole_or_not_at_all(text, value):
    assert parse_number(text) == value


def test_the_key_of_gsm8k_is_the_number_after_the_last_mark():
    assert read_gsm8k_key("#### 1\n2 + 2 = 4\n#### 4.") == 4 and read_gsm8k_key("1,000") == 1000
    assert read_gsm8k_key("4 #### many") is None


@pytest.mark.parametrize("exponent", ["1e9999999", "1e99999999", "1E-9999999", "2/1e9999999"])
def test_a_huge_exponent_is_no_number_and_does_not_hang(exponent):
    """The exact value of 1e9999999 has ten million digits."""
    assert parse_number(exponent) is None and read_gsm8k_key(f"#### {exponent}") is None
    assert grade_values("math", "5", [rf"\boxed{{{exponent}}}"]) == {"math": 0.0}
    assert grade_values("gsm8k", "#### 5", [f"#### {exponent}"])["strict"] == 0.0
    assert grade_values("math", exponent, [rf"\boxed{{{exponent}}}"]) == {"math": 1.0}


@pytest.mark.parametrize(
    "left, right",
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", "1/2"),
        (r"-\tfrac{3}{4}", "-.75"),
        (r"-\frac{-1.5}{2}", "3/4"),
        (r"$1,000$", "1000"),
        (r"\text{B}", "B"),
        (r"5 \text{ cm}", "5"),
        (r"12\%", "12"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"x = 7", "7"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\$4.50", "9/2"),
    ],
)
def test_formulas_that_mean_the_same_are_equal(left, right):
    assert normalize_formula(left) == normalize_formula(right)


def test_formulas_that_differ_are_not_equal():
    different = [r"\frac13", r"\frac31", "-5", "5", r"\sqrt{2}", "2", "(1,2)", "(2,1)", "x"]
    different += ["12", "1,2", "2,1", "1/2/3", "3/2", "2 x", r"\frac123", r"\frac{1}{2}3"]
    assert len({normalize_formula(text) for text in different}) == len(different)
    assert normalize_formula("1/0") == "1/0"  # it is no number, and grading goes on
    for key, wrong in (("2x", "2x^2"), ("2x", "2y"), ("3", "3x"), ("3", "3i"), ("125", "12_5")):
        assert grade_values("math", key, [rf"\boxed{{{wrong}}}"]) == {"math": 0.0}


@pytest.mark.parametrize(
    "text, found",
    [
        (r"\boxed{3} no, \boxed{\frac{1}{\sqrt{2}}} it is", r"\frac{1}{\sqrt{2}}"),
        (r"The final answer is $\frac{6}{4}$. I hope it is correct.", Fraction(3, 2)),
        ("Final Answer: The final answer is 0.25.", Fraction(1, 4)),
        ("The final answer is 3. No. The final answer is 4.", 4),
        ("THE FINAL ANSWER IS: 7\nAre there questions?", 7),
        (r"so \fbox{5}", 5),
        (r"\boxed{3", None),
        ("it is 3", None),
    ],
)
def test_the_last_box_counts_with_its_braces_balanced(text, found):
    assert read_math(text) == found


def test_the_key_of_math_may_stand_in_a_box():
    assert grade_values("math", r"so \boxed{0.5}", [r"\boxed{\dfrac{1}{2}}"]) == {"math": 1.0}
    assert grade_values("math", "1/2", [r"\boxed{\dfrac{1}{2}}"]) == {"math": 1.0}


@pytest.mark.parametrize(
    "text, found",
    [
        ("The answer is (C).", "C"),
        ("the answer is B because A is wrong", "B"),
        ("Answer: **D**", "D"),
        ("(A)", "A"),
        ("C. ducks", "C"),
        ("B", "B"),
        ("C\nFor ducks swim", "C"),
        ("C: ducks", "C"),
        ("C) ducks", "C"),
        ("(C) because (B) flies", "C"),
        ("**C**", "C"),
        ("A. ducks\nB. geese\n**B**", "B"),
        ("So it must be option D", "D"),
        ("The correct choice is C.", "C"),
        ("**Correct option:** B, for option A cannot swim", "B"),
        ("**Answer**: D", "D"),
        ("the answer is (A). No: the answer is (B), not (C)", "B"),
        ("the answer is A because it swims", "A"),
        ("I", "I"),
        # A word is not a letter, and a later line does not begin the text.
        ("A duck is what it is, (D)", "D"),
        ("The answer is a duck: (B)", "B"),
        ("Answer: A duck, so (B)", "B"),
        ("The answer: I believe it is (C)", "C"),
        ("I'd say\nC. ducks", None),
        ("U.S. ducks", None),
        ("option a", None),
        ("An apple", None),
        ("", None),
    ],
)
def test_letters(text, found):
    assert read_letter(text) == found


def test_one_answer_is_right_or_not():
    assert grade_values("letter", "c", ["(C)"]) == {"letter": 1.0}
    assert grade_values("exact", " yes ", ["yes\n"]) == {"exact": 1.0}
    assert grade_values("exact", "yes", ["Yes"]) == {"exact": 0.0}
    assert grade_values("gsm8k", "4", ["it is 4"]) == {"strict": 0.0, "flexible": 1.0}
    assert list(GRADERS) == ["gsm8k", "math", "exact", "letter"]


def test_several_answers_give_pass_at_k_and_a_majority_vote():
    texts = ["#### 5", "it is 5", "#### 4", "#### 4", "no"]
    values = grade_values("gsm8k", "work\n#### 4", texts)
    names = ["pass@1", "pass@2", "pass@4", "pass@5", "maj@5"]
    assert list(values) == [f"{way} {name}" for way in ("strict", "flexible") for name in names]
    assert values["strict pass@1"] == pytest.approx(2 / 5)
    assert values["strict pass@2"] == pytest.approx(1 - math.comb(3, 2) / math.comb(5, 2))
    assert values["strict pass@5"] == 1 and values["strict maj@5"] == 1
    assert values["flexible maj@5"] == 0  # 4 and 5 have two votes each, and 5 comes first
    assert grade_values("gsm8k", "4", ["no", "none"])["strict maj@2"] == 0


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer():
    """Against all ways to draw k of n answers."""
    from itertools import combinations

    for correct in (0, 1, 3, 5):
        for k in range(1, 6):
            draws = list(combinations(range(5), k))  # answers 0, ..., correct - 1 are right
            share = sum(min(draw) < correct for draw in draws) / len(draws)
            assert pass_at_k(correct, 5, k) == pytest.approx(share)
    assert [powers_of_two(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


def test_a_right_answer_earns_its_reward_only_if_it_ends_with_a_stop_id():
    tokenizer = SimpleNamespace(stop_ids={257, 258}, decode=lambda ids: bytes(ids).decode())
    item = SimpleNamespace(grade="gsm8k", key="#### 42")
    right = list(b"6 * 7 = 42\n#### 42")
    assert grade_answer(item, tokenizer, [*right, 257]) == 1.0
    assert grade_answer(item, tokenizer, [*right, 258]) == 1.0
    assert (
        grade_answer(item, tokenizer, [*right, ord(" ")]) == 0.0
    )  # right, but max_new_tokens cut it
    assert grade_answer(item, tokenizer, [*b"#### 41", 257]) == 0.0
    # The first reading of gsm8k is the strict one.
    assert grade_answer(item, tokenizer, [*b"it is 42", 257]) == 0.0


def share(key: str, text: str) -> Fraction:
    """A grader of one's own: the share of the key's words that the text has."""
    words = key.split()
    return Fraction(sum(word in text.split() for word in words), len(words))


def test_a_grader_of_ones_own_scores_each_answer(monkeypatch):
    monkeypatch.setitem(GRADERS, "share", share)
    assert grade_values("share", "a b c d", ["b d x"]) == {"share": 0.5}
    assert grade_values("share", "a b c d", ["a", "no", "a b c d"]) == {
        "share": pytest.approx(5 / 12)  # the mean, without votes or pass@k
    }
    tokenizer = SimpleNamespace(stop_ids={257}, decode=lambda ids: bytes(ids).decode())
    item = SimpleNamespace(grade="share", key="a b c d")
    reward = grade_answer(item, tokenizer, [*b"c a x", 257])
    assert reward == 0.5 and type(reward) is float
    assert grade_answer(item, tokenizer, list(b"a b c d")) == 0.0  # cut off
