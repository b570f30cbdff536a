"""Reads results in answers, compares them with the right result, and computes pass@k and maj@n."""

import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from support.sampling import answer_text

# Accepts only plain decimal notation: the exact value of 1e9999999 takes minutes to compute.
DECIMAL = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
# Matches a capital letter by itself, but neither the pronoun I nor the article A.
CAPITAL = r"((?:[B-HJ-Z]|[AI](?!['’]|\s+(?!because|since|as\b|is\b)\w))\b)"
LETTERS = (  # they match: answer is (C), correct option: C; option C, **C**; C at the start; (C)
    rf"(?i:\banswer|\bcorrect (?:choice|option))\**(?i:\s+is\b\**:?|:)[\s*(]*{CAPITAL}",
    rf"(?:(?i:\boption)\s+[*(]*|\*\*\(?(?=\w[).]*\*\*)){CAPITAL}",
    rf"\A\W*{CAPITAL}(?:[.:)](?!\w)|[ \t]*(?:\n|\Z))",
    rf"\({CAPITAL}\)",
)


def parse_number(text: str) -> Fraction | None:
    """Returns the exact value of a text like "-$1,234.50" or "3/4", or None if it is no number."""
    found = re.fullmatch(rf"({DECIMAL})(?:/({DECIMAL}))?", re.sub(r"[$,\s]", "", text))
    try:
        return Fraction(found[1]) / Fraction(found[2] or 1) if found else None
    except (ValueError, ZeroDivisionError):  # thousands of digits, or a denominator of 0
        return None


def read_gsm8k_key(key: str) -> Fraction | None:
    return parse_number(key.rpartition("####")[2].strip().rstrip("."))


def read_strict(text: str) -> Fraction | None:
    """Returns the first number after ####, as the grader by GSM8K's authors does, or None."""
    found = re.search(r"####\s*(-?\$?\s?-?[\d.,]+)", text)
    return parse_number(found[1].rstrip(".,")) if found else None


def read_flexible(text: str) -> Fraction | None:
    """Returns the last number. After a letter, a digit or ")", a minus sign means subtraction."""
    found = re.findall(r"(?:(?<![\w)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", text)
    return parse_number(found[-1]) if found else None


def find_formula(text: str) -> str | None:
    """Returns the content of the last \\boxed{} or \\fbox{}, or what follows "final answer is"."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        found = re.findall(r"(?im)final answer is:?\s*(.+?)(?:\.?\s*I hope|\.?\s*$|\.\s)", text)
        return found[-1] if found else None
    depth, begin = 0, text.index("{", start)
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin + 1 : end]
    return None


def normalize_formula(text: str) -> Fraction | str:
    """Returns the value of a number, or the text of a formula normalized as in MATH and Minerva."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\left|\\right|\\[!,;: ]|\^\s*\{?\\circ\}?|\\?[%$]", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).strip().rstrip(".")
    text = re.sub(r"^\w\s*=\s*", "", text)  # x = 5
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)  # \frac12
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)  # \sqrt3
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 1,000
    unit = re.fullmatch(r"(-?[\d./]+)\s+[A-Za-z]{2}[A-Za-z .^\d]*", text)  # 5 cm, but not 2 x
    text = re.sub(r"\s+", "", unit[1] if unit else text)
    text = re.sub(r"^(-?)\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}$", r"\1\2/\3", text)
    value = None if "," in text else parse_number(text.replace("--", ""))
    return text if value is None else value


def read_math(text: str) -> Fraction | str | None:
    formula = find_formula(text)
    return None if formula is None else normalize_formula(formula)


def read_letter(text: str) -> str | None:
    """Returns the last letter found by the first pattern in LETTERS that matches, or None."""
    return next((found[-1] for form in LETTERS if (found := re.findall(form, text))), None)


# grade -> a function that reads the key, and named readers of an answer's result (None: not found).
# A grader of your own is a function of the key and an answer's text that returns a score from 0 to
# 1; add it here under its grade. Evaluation, --on_policy and rlhf then use it.
GRADERS: dict[str, tuple[Callable, dict[str, Callable]] | Callable[[str, str], float]] = {
    "gsm8k": (read_gsm8k_key, {"strict": read_strict, "flexible": read_flexible}),
    "math": (lambda key: normalize_formula(find_formula(key) or key), {"math": read_math}),
    "exact": (str.strip, {"exact": str.strip}),
    "letter": (lambda key: read_letter(key) or read_letter(key.upper()), {"letter": read_letter}),
}


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Estimates pass@k without bias if `correct` of n answers are right (arXiv 2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def powers_of_two(n: int) -> list[int]:
    """Returns the powers of two up to n, and n itself, in ascending order."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def grade_values(grade: str, key: str, texts: list[str]) -> dict[str, float]:
    """Grades the answers to a question with each function that GRADERS names for the grade. The
    value of a single answer is 1 if right, else 0. The values of n answers are pass@k for each k in
    powers_of_two(n), and maj@n: 1 if the most frequent result (the first if tied) is right. With a
    grader of your own, the value is the mean score."""
    if callable(GRADERS[grade]):
        return {grade: sum(float(GRADERS[grade](key, text)) for text in texts) / len(texts)}
    read_key, readings = GRADERS[grade]
    gold, n, values = read_key(key), len(texts), {}
    for name, read in readings.items():
        results = [result for text in texts if (result := read(text)) is not None]
        right = results.count(gold)
        if n == 1:
            values[name] = float(right)
        else:
            values |= {f"{name} pass@{k}": pass_at_k(right, n, k) for k in powers_of_two(n)}
            values[f"{name} maj@{n}"] = float(Counter(results).most_common(1) == [(gold, right)])
    return values


def grade_answer(item, tokenizer, answer: list[int]) -> float:
    """Returns the reward of an answer (ids) to a `questions.Item`: its first value (see above) if
    the answer ends with a stop id, otherwise 0."""
    text, ended = answer_text(tokenizer, answer)
    return next(iter(grade_values(item.grade, item.key, [text]).values())) if ended else 0.0
