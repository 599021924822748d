"""Are two answers the same? Words as words, quantities by value, choices by letter; the rest is mathematics.

A computer algebra system reads `on` as the product o·n, and so as `no`. So an answer gets to it only if both sides have
more in them than letters, and words within them are symbols of their own there.

This file is imported by the grader's process too, so it must not import torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

Holds = Callable[[str, str], bool]
"""(gold, answer) -> whether mathematics calls them equal."""

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sl|sc|up|md|normal)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|emph)\s*\{([^{}]*)\}"
)
_MARK = "\ue000"  # stands where \text{ began: what follows is a word, and `m` is metres
_SPACING = re.compile(r"(?<!\\)\\(?:[,;: ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|thinspace(?![A-Za-z]))|~")
_GROUPED = re.compile(r"(?<![\d.])(\d{1,3})((?:(?:\{,\}|\\[,;: ]|~|[ \u00a0\u2009\u202f])\d{3})+)(?![\d/])")
_LAYOUT = re.compile(
    r"(?<!\\)\\[()\[\]]|(?<!\\)\$|\\(?:left|right|[Bb]igg?[lr]?|displaystyle|textstyle|limits|bf|rm|it)(?![A-Za-z])\.?"
)
_COLOUR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}")
_SIGNS = {
    **dict.fromkeys("−–‒﹣－", "-"), **dict.fromkeys("’‘′", "'"), **dict.fromkeys("“”", '"'),
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "°": r"^\circ ", "±": r"\pm ", "%": r"\%", "％": r"\%",
}  # fmt: skip
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_RENAMED = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\([lg])eq(?:slant)?(?![A-Za-z])"), r"\\\1e "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"√\s*(\d+|\w)"), r"\\sqrt{\1}"),
    (re.compile(r"(?:√|(?<![\\A-Za-z])sqrt)\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|cot|csc|arcsin|arccos|arctan|ln)(?=\s*[\\(\d^])"), r"\\\1"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi"),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", re.IGNORECASE), r"\\infty"),
    (re.compile(r"\^\{\s*\\(?:circ|degree)\s*\}|\^\\(?:circ|degree)(?![A-Za-z])|\\degree(?![A-Za-z])"), r"^\\circ "),
    (re.compile(rf"[\s{_MARK}]+(?:and|or)(?![A-Za-z])[\s{_MARK}]*|,\s*(?:and|or)(?![A-Za-z])"), ", "),
    (re.compile(r",\s*,"), ","),
]

LONGEST_NUMBER = 1000  # characters; Python turns no text of more than 4,300 digits into a number
_NUMBER = r"[-+]?(?:(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE](?P<e>[-+]?\d{1,3})|\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*\{?(?P<p>[-+]?\d{1,3})\}?)?"
_DECIMAL = re.compile(rf"(?P<n>{_NUMBER}){_POWER}")
_RATIO = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)\s*(?:\s|(?=\\)))?\s*"
    r"(?:(?P<a>-?\d+)\s*/\s*(?P<b>\d+)|\\frac\s*(?:\{\s*(?P<c>-?\d+)\s*\}|(?P<c1>\d))\s*(?:\{\s*(?P<d>\d+)\s*\}|(?P<d1>\d)))"
)

_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\((?P<p>[A-Ja-j])\)[.:]?|(?P<b>[A-J])[).:]?)(?P<rest>(?<=[).:])\s*\S.*)?",
    re.IGNORECASE | re.DOTALL,
)
_NAME = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?\s*=\s*(?=[^=]*$)")
_RELATION = re.compile(r"[<>]|\\[lg]e(?![A-Za-z])")
_ARTICLES = {"a", "an", "the"}
_FUNCTIONS = set(
    "sin cos tan cot sec csc log ln exp arcsin arccos arctan sinh cosh tanh max min gcd lcm mod det".split()
)
_SHORT_WORDS = set("am an as at be by do go he if in is it me my no of on or so to up us we".split())
_RUN = re.compile(r"\\(?:begin|end|operatorname\*?|math[a-z]+)\s*\{[^{}]*\}|\\[A-Za-z]+|[^\W\d_]{2,}")
_TOKEN = re.compile(r"[^\W\d_]+|\d+(?:[.,]\d+)*")

_UNITS = {  # names -> (what is measured, factor); a name may be plural
    "mm millimeter millimetre": ("length", "1/1000"), "cm centimeter centimetre": ("length", "1/100"),
    "m meter metre": ("length", "1"), "km kilometer kilometre": ("length", "1000"),
    "in inch inche": ("length", "254/10000"), "ft foot feet": ("length", "3048/10000"),
    "yd yard": ("length", "9144/10000"), "mi mile": ("length", "1609344/1000"),
    "ms millisecond": ("time", "1/1000"), "s sec second": ("time", "1"), "min minute": ("time", "60"),
    "h hr hour": ("time", "3600"), "day": ("time", "86400"), "week": ("time", "604800"),
    "mg milligram": ("mass", "1/1000"), "g gram": ("mass", "1"), "kg kilogram": ("mass", "1000"),
    "oz ounce": ("weight", "1"), "lb pound": ("weight", "16"), "ton": ("tons", "1"),
    "ml milliliter millilitre": ("volume", "1/1000"), "l liter litre": ("volume", "1"),
    "cent ¢": ("money", "1"), "dollar usd": ("money", "100"), "euro eur €": ("euro", "1"), "£ gbp": ("any", "1"),
    "degree deg": ("degrees", "1"), "radian rad": ("radians", "1"),
    "month": ("months", "1"), "year yr": ("months", "12"),
    "celsius": ("celsius", "1"), "fahrenheit": ("fahrenheit", "1"), "percent": ("percent", "1"),
    "mph": ("mph", "1"), "kph": ("kph", "1"), "unit": ("any", "1"), "st": ("any", "1"), "nd": ("any", "1"),
    "rd": ("any", "1"), "th": ("any", "1"),
}  # fmt: skip
_UNIT = {name: (what, Fraction(factor)) for names, (what, factor) in _UNITS.items() for name in names.split()}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NO_UNITS = set(
    "or and to not no more less than least most about mod if is are i e pi half halves third thirds quarter quarters "
    "fourth fourths fifth fifths sixth sixths eighth eighths tenth tenths hundredth hundredths thousandth thousandths "
    "squared cubed factorial times plus minus over choose root roots of on in at from am pm bc ad x y z".split()
)
_WITH_UNIT = re.compile(
    rf"(?P<value>.*?[\d}})\]!.]|.*\\pi)(?P<gap>[\s{_MARK}]*)(?P<unit>\\%|\^\\circ\s*[CF]?|[^\W\d_€£¢][^\W\d_]*(?:[\s{_MARK}./-]+"
    rf"[^\W\d_]+)*[.]?|[€£¢])[\s{_MARK}]*(?:\^\s*\{{?(?P<power>[23])\}}?)?",
    re.DOTALL,
)
_MONEY = re.compile(r"(?P<sign>-?)\s*(?:\\\$|(?P<sign2>[€£]))\s*(?P<value>-?[\d.].*)", re.DOTALL)

_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = "|".join(f"{name}|{name[:3]}" for name in _MONTHS)
_DATE = re.compile(
    rf"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?(?:(?P<m1>{_MONTH})\.?\s+(?P<d1>\d{{1,2}})(?:st|nd|rd|th)?"
    rf"|(?P<d2>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<m2>{_MONTH})\.?)(?:,?\s+(?P<y>\d{{4}}))?",
    re.IGNORECASE,
)
_ISO = re.compile(r"(?P<y>\d{4})-(?P<m>\d{1,2})-(?P<d>\d{1,2})")
_SLASHES = re.compile(r"(?P<m>\d{1,2})/(?P<d>\d{1,2})/(?P<y>\d{4})")
_CLOCK = re.compile(r"(?P<h>\d{1,2}):(?P<m>\d\d)\s*(?:(?P<half>[ap])\.?m\.?)?", re.IGNORECASE)


def equal(answer: str, gold: str, holds: Holds) -> bool:
    """Whether both say the same. holds is asked only about what is mathematics on both sides."""
    answer, gold = tidy(answer), tidy(gold)
    if not _plain(answer) or not _plain(gold):
        return False
    return _equal(answer, gold, holds)


def _equal(answer: str, gold: str, holds: Holds) -> bool:
    if _compact(answer) == _compact(gold):
        return True
    if ("=" in answer) != ("=" in gold):
        answer, gold = (_NAME.sub("", text) for text in (answer, gold))  # x = 5 and 5
    mine, theirs = _choice(answer), _choice(gold)
    if mine and theirs:
        (letter, rest), (gold_letter, gold_rest) = mine, theirs
        return letter == gold_letter and (not rest or not gold_rest or _equal(rest, gold_rest, holds))
    if mine and mine[1]:
        return _equal(mine[1], gold, holds)
    if theirs and theirs[1]:
        return _equal(answer, theirs[1], holds)
    for decide in (_dates, _clocks, _phrases):
        if (decided := decide(answer, gold)) is not None:
            return decided
    decided = _quantities(answer, gold, holds)
    if decided is not None:
        return decided
    mathematics = _is_mathematics(answer) and _is_mathematics(gold)
    worded = _has_words(answer) or _has_words(gold)
    if worded and _folded(answer) == _folded(gold):
        return True
    if worded or not mathematics:
        parts, gold_parts = _parts(answer), _parts(gold)
        if len(parts) == len(gold_parts) > 1:
            return _matched(parts, gold_parts, holds)
    if not mathematics:
        return False
    answer, gold = _symbols(_without_exponent(answer), _without_exponent(gold))
    if _RELATION.search(answer) and gold.startswith(("(", "[")):
        return holds(answer, gold)  # math-verify takes an interval for an inequality, but not the other way round
    return holds(gold, answer)


# ---- one way to write it ----


def tidy(answer: str) -> str:
    """Without layout, colours, fonts and signs of typography: `\\color{red}7`, `\\text{7}` and `$7.$` are all 7."""
    if answer.count("$") == 1:  # no pair around mathematics, so it is money
        answer = re.sub(r"^\s*\$(?=\s*[\d.])", r"\\$", answer)
    text = _GROUPED.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), re.sub(r"(?<!\\)\\!\s*", "", answer))
    text = "".join(_sign(c) for c in re.sub(r"(?<!\\)\\%", "%", text))
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: "^{" + m[0].translate(_SUPER) + "}", text)
    text = unicodedata.normalize("NFKC", text.replace("{,}", ","))
    text = _SPACING.sub(" ", _COLOUR.sub("", _LAYOUT.sub("", text)))
    for _ in range(4):  # fonts within fonts
        text = _TEXT.sub(rf"{_MARK}\1 ", text)
    for pattern, better in _RENAMED:
        text = pattern.sub(better, text)
    text = " ".join(text.split()).strip(f" {_MARK}").rstrip(" .,;")
    while _is_group(text):
        text = text[1:-1].strip(f" {_MARK}").rstrip(" .,;")
    return text


def _is_group(text: str) -> bool:
    """Whether one pair of braces holds all of it."""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth <= 0:
            return brace[0] == "}" and brace.end() == len(text) and text.startswith("{")
    return False


def _sign(c: str) -> str:
    if c in _SIGNS:
        return _SIGNS[c]
    if c > "\x7f" and unicodedata.decomposition(c).startswith("<fraction>"):
        above, _, below = unicodedata.normalize("NFKC", c).partition("⁄")
        return rf"\frac{{{above}}}{{{below}}}" if below else c
    return c


def _plain(text: str) -> str:
    return " ".join(text.replace(_MARK, " ").split())


def _compact(text: str) -> str:
    """Without spaces, except between digits: 1 1/2 is not 11/2."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", _plain(text))


# ---- choices, words ----


def _choice(text: str) -> tuple[str, str] | None:
    """(letter, what is said beside it) of B, (B), B., (B) 7 or option B; None for anything else."""
    found = _CHOICE.fullmatch(_plain(text))
    if not found:
        return None
    return (found["p"] or found["b"]).upper(), (found["rest"] or "").strip()


def _is_phrase(text: str) -> bool:
    """Letters and punctuation alone, with a word of two letters or more."""
    plain = _plain(text)
    return bool(re.search(r"[^\W\d_]{2}", plain)) and not re.search(r"[\d\\{}\[\]^_=+*<>|]", plain)


def _phrases(answer: str, gold: str) -> bool | None:
    words = _is_phrase(answer), _is_phrase(gold)
    if not any(words):
        return None
    return all(words) and sorted(map(_folded, _parts(answer))) == sorted(map(_folded, _parts(gold)))


def _has_words(text: str) -> bool:
    return any(_is_word(run) for run in _RUN.findall(text))


def _is_word(run: str) -> bool:
    return not run.startswith("\\") and run not in _FUNCTIONS and (len(run) > 2 or run.lower() in _SHORT_WORDS)


def _folded(text: str) -> str:
    """Its words and numbers alone, in small letters and without articles."""
    words = _TOKEN.findall(_plain(text).casefold().replace("'", ""))
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _parts(text: str) -> list[str]:
    """What commas separate outside brackets, which are no thousands' separators."""
    if re.search(r"[(\[{]", text):
        return [text]
    return [part.strip() for part in re.split(r"[,;](?!\d{3}(?!\d))", text) if part.strip(f" {_MARK}")]


def _matched(parts: list[str], gold_parts: list[str], holds: Holds) -> bool:
    """Whether each part is one of the gold, in any order."""
    left = list(gold_parts)
    for part in parts:
        found = next((gold for gold in left if _equal(part, gold, holds)), None)
        if found is None:
            return False
        left.remove(found)
    return True


# ---- dates ----


def _date(text: str, *, slashes: bool) -> tuple[int, int, int | None] | None:
    plain = _plain(text)
    if found := _DATE.fullmatch(plain):
        month = next(i for i, name in enumerate(_MONTHS, 1) if (found["m1"] or found["m2"]).lower()[:3] == name[:3])
        return month, int(found["d1"] or found["d2"]), int(found["y"]) if found["y"] else None
    found = _ISO.fullmatch(plain) or (_SLASHES.fullmatch(plain) if slashes else None)
    if not found:
        return None
    month, day = int(found["m"]), int(found["d"])
    return (day, month, int(found["y"])) if month > 12 else (month, day, int(found["y"]))


def _dates(answer: str, gold: str) -> bool | None:
    if not (_date(answer, slashes=False) or _date(gold, slashes=False)):
        return None  # 3/4/2021 alone may be a fraction
    return _date(answer, slashes=True) == _date(gold, slashes=True)


def _clocks(answer: str, gold: str) -> bool | None:
    mine, theirs = _CLOCK.fullmatch(_plain(answer)), _CLOCK.fullmatch(_plain(gold))
    if not (mine and theirs) or not (mine["half"] or theirs["half"]):
        return None  # 3:45 alone may be a ratio
    if mine["half"] and theirs["half"] and mine["half"].lower() != theirs["half"].lower():
        return False
    half = (mine["half"] or theirs["half"]).lower()
    of_day = {
        (int(t["h"]) % 12 + 12 * (half == "p") if t["half"] or int(t["h"]) <= 12 else int(t["h"]), t["m"])
        for t in (mine, theirs)
    }
    return len(of_day) == 1


# ---- quantities ----


def _number(text: str) -> Fraction | None:
    """A decimal, a fraction or a mixed number; None for anything else."""
    plain = _plain(text)
    if len(plain) > LONGEST_NUMBER:
        return None
    if found := _DECIMAL.fullmatch(plain):
        return Fraction(found["n"].replace(",", "")) * Fraction(10) ** int(found["e"] or found["p"] or 0)
    if not (found := _RATIO.fullmatch(plain)):
        return None
    above, below = int(found["a"] or found["c"] or found["c1"]), int(found["b"] or found["d"] or found["d1"])
    if not below or found["whole"] and above < 0:
        return None
    value = Fraction(above, below) + int(found["whole"] or 0)
    return -value if found["sign"] == "-" else value


def _measured(text: str) -> tuple[str, tuple[str, Fraction] | None]:
    """(value, unit) of `5 cm`, `\\$5`, `90^\\circ`; the unit is None where there is none."""
    if found := _MONEY.fullmatch(text):
        return found["sign"] + found["value"], _UNIT[{"€": "euro", "£": "gbp"}.get(found["sign2"] or "", "dollar")]
    if not (found := _WITH_UNIT.fullmatch(text)):
        return text, None
    value, power = found["value"], int(found["power"] or 1)
    words = [word for word in re.split(rf"[\s{_MARK}]+", found["unit"].strip(". ")) if word]
    if found["unit"].startswith("\\%") or words in (["per", "cent"], ["percent"]):
        return value, _UNIT["percent"]
    if found["unit"].startswith("^"):
        return value, _UNIT[{"C": "celsius", "F": "fahrenheit"}.get(found["unit"][-1], "degree")]
    if words[0].lower() in ("degrees", "degree") and len(words) == 2:
        words = words[1:]
    if words[0].lower() in ("square", "cubic", "sq"):
        power, words = (3 if words[0].lower() == "cubic" else 2), words[1:]
    scale = _SCALES.get(words[0].lower().removesuffix("s")) if words else None
    if scale and _number(value) is not None:
        value, words = str(_number(value) * scale), words[1:]  # type: ignore[operator]
    if not words:
        return (value, None) if scale else (text, None)
    known = _UNIT.get(words[0] if len(words[0]) == 1 else words[0].lower().removesuffix("s") or words[0])
    known = known or _UNIT.get(words[0].lower())
    marked = _MARK in found["gap"]
    if len(words[0]) == 1 and not marked and words[0] not in "€£¢":
        return text, None  # 5 m may be five times m
    if any(word.lower() in _NO_UNITS for word in words) and not (known and len(words) == 1):
        return text, None
    if len(words) == 1 and known:
        return value, (known[0] if power == 1 else f"{known[0]}^{power}", known[1] ** power)
    if marked or (found["gap"] and _number(value) is not None):
        return value, (" ".join(word.lower().removesuffix("s") for word in words), Fraction(0))  # a unit, but which
    return text, None


def _quantities(answer: str, gold: str, holds: Holds) -> bool | None:
    """By value, and by unit where both have one that is known; None where neither is a quantity."""
    (value, unit), (gold_value, gold_unit) = _measured(answer), _measured(gold)
    factor = gold_factor = Fraction(1)
    if unit and gold_unit and unit[1] and gold_unit[1] and "any" not in (unit[0], gold_unit[0]):
        if unit[0] != gold_unit[0]:
            return False
        factor, gold_factor = unit[1], gold_unit[1]
    mine, theirs = _number(value), _number(gold_value)
    if mine is not None and theirs is not None:
        hundred = {unit and unit[0] == "percent", gold_unit and gold_unit[0] == "percent"}
        either = 100 if hundred in ({True, None}, {True, False}) else 1  # 50% is 50, and 0.5
        left, right = mine * factor, theirs * gold_factor
        return left == right or (left == right * either if unit and unit[0] == "percent" else left * either == right)
    if not unit and not gold_unit:
        return None
    if unit and gold_unit is None and _is_phrase(gold) or gold_unit and unit is None and _is_phrase(answer):
        return False
    if factor != gold_factor:
        value, gold_value = (
            rf"\frac{{{f.numerator}}}{{{f.denominator}}} \cdot ({v})"
            for f, v in ((factor, value), (gold_factor, gold_value))
        )
    elif (unit and unit[0]) == "percent" or (gold_unit and gold_unit[0]) == "percent":
        return None  # math-verify knows both readings
    return _equal(value, gold_value, holds)


# ---- mathematics ----


def _is_mathematics(text: str) -> bool:
    """More than a product of single letters."""
    return bool(re.search(r"[\d+\-/^=<>|!_\[\]]|\\", re.sub(r"\\(?:cdot|times|ast)(?![A-Za-z])", "", text)))


def _without_exponent(text: str) -> str:
    """5e3 as 5000: mathematics would read a product with Euler's number."""
    found = _DECIMAL.fullmatch(_plain(text))
    return str(_number(text)) if found and found["e"] else text


def _symbols(*texts: str) -> list[str]:
    """The texts with each word as a symbol, the same one in all of them."""
    names: dict[str, str] = {}

    def symbol(run: re.Match[str]) -> str:
        word = run[0].casefold()
        return rf"z_{{{names.setdefault(word, str(900 + len(names)))}}}" if _is_word(run[0]) else run[0]

    return [_RUN.sub(symbol, _plain(text)) for text in texts]
