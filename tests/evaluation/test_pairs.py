"""Pairs of a stated and a gold answer, and whether the one is the other: what the grader is held against.

pairs.tsv has a pair a line: right or wrong, group, answer, gold. All are written for it; none is copied from a data
set. "After" names the published convention that a group follows, or the benchmark in whose form its answers are:

  numbers      after GSM8K (Cobbe et al., arXiv 2110.14168: `#### N`, thousands separators) and AIME (000 to 999)
  latex        after MATH (Hendrycks et al., arXiv 2103.03874, math_equivalence.py: \\dfrac, \\left, \\!, \\$, units,
               percent and degree signs, a leading `x =` and a missing 0 before the point do not matter)
  fractions    after the same, and Minerva (Lewkowycz et al., arXiv 2206.14858, appendix D)
  verify       after the kinds of example in math-verify's README (sets, intervals, relations, matrices)
  choices      after AMC and the multiple choices in MATH: `\\textbf{(B)}~7`, `(B)`, `B`
  units, words, dates, typography: no published source; the forms are those in which people and models write
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prune_opd.evaluation import forms
from prune_opd.evaluation.graders import extract_answer, grade
from tests.evaluation.test_graders import boxed, needs_data, shared_golds

LINES = (Path(__file__).parent / "pairs.tsv").read_text(encoding="utf-8").splitlines()
PAIRS = [tuple(line.split("\t")) for line in LINES]
GROUPS = sorted({group for _, group, *_ in PAIRS})


def test_the_table_is_as_large_as_it_says():
    assert len(PAIRS) == len(set(PAIRS)) >= 300
    assert min(Counter(group for _, group, *_ in PAIRS).values()) >= 15


@pytest.mark.parametrize("group", GROUPS)
def test_pairs(group):
    table = [(verdict, answer, gold) for verdict, of, answer, gold in PAIRS if of == group]
    false = [row for row in table if grade(boxed(row[1]), row[2]) is not (row[0] == "right")]
    assert not false


def never(gold, answer):
    raise AssertionError(f"mathematics is asked about {answer!r} and {gold!r}")


LETTERS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=8)


@given(LETTERS, st.randoms(use_true_random=False))
def test_words_are_no_products_of_letters(word, random):
    """No anagram of a word is that word, and mathematics is not asked."""
    letters = list(word)
    random.shuffle(letters)
    other = "".join(letters)
    assume(other != word and not {word, other} & {"or", "and", "pi", "inf"})
    assert not forms.equal(other, word, never)
    assert forms.equal(word.upper(), rf"\text{{{word}}}.", never)
    assert forms.equal(f"the  {word}", word, never)


@given(LETTERS.filter(lambda w: len(w) > 2), st.integers(0, 99))
def test_words_beside_numbers_are_symbols_of_their_own(word, number):
    asked = []
    for letters in list(permutations(word))[1:4]:
        other = "".join(letters)
        if other != word:
            assert not forms.equal(f"{number} - {other}", f"{number} - {word}", lambda *pair: asked.append(pair))
    assert all(word not in text for pair in asked for text in pair)
    assert all(len(set(pair)) == 2 for pair in asked), "two words became one symbol"


@given(st.integers(-(10**6), 10**6), st.integers(0, 3))
def test_a_number_is_the_same_in_every_form(number, decimals):
    text = f"{number:,}.{'0' * decimals}" if decimals else f"{number:,}"
    for form in (
        "{}",
        "${}$",
        r"\text{{{}}}",
        r"\textbf{{{}}}",
        r"\color{{red}}{}",
        "{} apples",
        r"{}\text{{ cm}}",
        "{}°",
        "{}%",
    ):
        assert forms.equal(form.format(text), str(number), never), form
        assert not forms.equal(form.format(text), str(number + 1), never), form
    assert forms.equal(text.replace(",", r"\,"), str(number), never)
    assert forms.equal(text.replace(",", "{,}"), str(number), never)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_compared_and_equals_itself(answer, gold):
    forms.equal(answer, gold, lambda *_: False)
    if forms._plain(forms.tidy(answer)):
        assert forms.equal(answer, answer, never)


# ---- precision and recall against the gold answers of real benchmarks ----

SAME = {  # forms in which a model may state the gold answer
    "as it is": lambda gold: gold,
    "in dollars": lambda gold: f"${gold}$",
    "in parentheses of LaTeX": lambda gold: rf"\({gold}\)",
    "coloured": lambda gold: rf"\color{{blue}}{{{gold}}}",
    "full stop": lambda gold: f"{gold}.",
    "spaces": lambda gold: re.sub(r"([,+=])", r"\1 ", gold) if "," not in gold or "(" in gold else f" {gold} ",
    "display": lambda gold: rf"\displaystyle {gold.replace('frac', 'dfrac').replace('ddfrac', 'dfrac')}",
    "no left and right": lambda gold: gold.replace(r"\left", "").replace(r"\right", ""),
    "named": lambda gold: gold if "=" in gold or r"\text" in gold or r"\in" in gold else f"x = {gold}",
    "unit": lambda gold: rf"{gold}\text{{ cm}}" if re.fullmatch(r"-?\d+", gold) else gold,
    "decimal": lambda gold: f"{gold}.0" if re.fullmatch(r"-?\d+", gold) else gold,
    "thousands": lambda gold: f"{int(gold):,}" if re.fullmatch(r"-?\d+", gold) else gold,
}


def other_answers(golds: list[str], i: int) -> dict[str, str]:
    """Answers that are wrong: another gold of the benchmark, and the gold with one thing changed."""
    gold = golds[i]
    value = forms.tidy(gold).removeprefix("x=")
    found = {"another": next(g for g in golds[i + 1 :] + golds if forms.tidy(g).removeprefix("x=") != value)}
    if digits := re.search(r"\d", gold):
        changed = str((int(digits[0]) + 1) % 10)
        found["a digit"] = gold[: digits.start()] + changed + gold[digits.end() :]
        if gold.strip("0."):
            found["negated"] = gold[1:] if gold.startswith("-") else f"-{gold}"
        found["one more"] = f"{gold}, 987"
    else:
        found["a letter"] = f"not {gold}"
    return found


def measured(names: list[str], every: int):
    """(right ones called right, right ones, wrong ones called right, wrong ones), and the errors."""
    counts, errors = Counter(), []
    for name in names:
        golds = [extract_answer(gold) or gold for gold in map(str, shared_golds(name)) if gold]
        for i in range(0, len(golds), every):
            gold = golds[i]
            right = {form: say(gold) for form, say in SAME.items()}
            for kind, answers in ((True, right), (False, other_answers(golds, i))):
                for form, answer in answers.items():
                    verdict = grade(boxed(answer), gold)
                    counts[kind, verdict] += 1
                    if verdict is not kind:
                        errors.append((name, form, answer, gold))
    return counts, errors


def rates(counts):
    recall = counts[True, True] / (counts[True, True] + counts[True, False])
    precision = counts[True, True] / (counts[True, True] + counts[False, True])
    return precision, recall


@needs_data
def test_precision_and_recall_on_a_sample():
    counts, errors = measured(["math500", "gsm8k_test", "aime24", "amc23_40", "hmmt_feb25"], every=25)
    precision, recall = rates(counts)
    assert precision >= 0.995 and recall >= 0.98, (precision, recall, errors)


@needs_data
@pytest.mark.slow
def test_precision_and_recall(capsys):
    """With -s it prints the figures that docs/reliability.md has."""
    for name in ("math500", "hmmt_feb25", "aime24", "aime25", "amc23_40", "amc23_83", "gsm8k_test", "dapo-math-17k"):
        counts, errors = measured([name], every={"gsm8k_test": 10, "dapo-math-17k": 100}.get(name, 1))
        precision, recall = rates(counts)
        with capsys.disabled():
            print(
                f"{name}: precision {precision:.4f}, recall {recall:.4f} of {sum(counts.values())}", *errors, sep="\n  "
            )
        assert precision >= 0.99 and recall >= 0.97, (name, errors)
