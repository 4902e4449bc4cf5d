"""What a response is worth: its answer, its format, its length, and what follows for the group it belongs to.

    group_rewards       P prompts of G judged responses each -> Rewards: bonus, weight w(d), weighted advantages
    format_reward       are the tags there, in order, each once?
    extract_answer      what the response gives as its answer
    answer_matches      the one judge of answers, for training and evaluation alike
    read_gold           what a gold must be, for a rule to judge by it; gold_fault: why math-verify cannot read one

Departures from the official code (zrguo/Observe-R1), each with its reason:
 1. No correct answer, no bonus: there, all lengths of an all-wrong group are inf, inf > 100, and a WRONG one is paid.
 2. A gold that no rule can read is refused when data is loaded or a run starts: there, it pays 1.0 for any answer.
 3. Accuracy is kept apart from the sum: there, "correct" is `rewards.trunc()`, wrong once format + bonus reach 1.
 4. Answers are read without their tags: there, `<answer>0.5</answer>` and `<answer>42 ft</answer>` score 0.
 5. Golds and letters are read whole: there, gold "1228 142.67" is its last number, and a letter is a substring
    ("B. 10 m" passes, "B. 10 cm" fails because of the c, "that" passes for gold A).
 6. Format is strict: there, text around the tags, empty tags, repeated tags and <observe> inside of <think> pass.
 7. math-verify gets the gold first: it is asymmetric, and there the two are swapped.
 8. Equal rewards give an advantage of exactly 0: there, float noise over 1e-9 makes 0.9 out of eight rewards of 0.7.
 9. What is logged as the reward is the whole of it: there, the bonus is left out.
10. Without an <answer>, `\\boxed{}` or a closing "the answer is X" is read: a model that never writes tags would
    otherwise be right 0 times in 8, its weight 0, and so never learn to write them.

Shapes: P prompts, G responses of a group.
"""
from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import re
import signal
import sys
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Protocol

import torch
from pebble import ProcessExpired, ProcessPool

if sys.version_info < (3, 11):  # (hashlib.file_digest, of eval.py)
    raise SystemExit(f"error: this code needs Python 3.11 or newer, and this is {sys.version.split()[0]}")


class Problem(Protocol):
    """What is asked of a data.Record here: this file is the ground, and imports none of the others."""

    @property
    def id(self) -> str: ...
    @property
    def golds(self) -> tuple[str, ...]: ...  # all accepted answers
    @property
    def choices(self) -> tuple[str, ...]: ...  # texts of the options, in the order A, B, C, ...
    @property
    def answer_type(self) -> str: ...  # choice | number | list | text | math
    @property
    def precision(self) -> int | None: ...  # decimals to which a number is compared
    @property
    def meta(self) -> dict: ...


# --- groups: what P x G judged responses teach ------------------------------------------------------------------------

def shortest_correct_bonus(correct: torch.Tensor, lengths: torch.Tensor, coef: float = 0.2,
                           min_length: int = 100) -> torch.Tensor:
    """[P, G] bool, [P, G] int -> [P, G]: `coef` to the shortest correct response (the first, of equals) of each group,
    if it is longer than min_length tokens; else to none.
    """
    lengths = lengths.double().masked_fill(~correct, torch.inf)  # [P, G]
    first = lengths.argmin(dim=1, keepdim=True)  # [P, 1]
    shortest = lengths.gather(1, first)  # [P, 1]
    paid = (shortest > min_length) & shortest.isfinite()  # inf: nobody is right
    return torch.zeros_like(lengths, dtype=torch.float32).scatter(1, first, coef * paid.float())


def group_advantages(rewards: torch.Tensor, normalize_std: bool = True) -> torch.Tensor:
    """[P, G] -> [P, G]: A_i = (r_i - mean(r)) / (std(r) + 1e-6), std unbiased; exactly 0 where all r_i are equal.

    Raises ValueError for groups of one.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: advantages need groups of two responses or more")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return advantages.masked_fill(_all_equal(rewards)[:, None], 0.0)


def _all_equal(rewards: torch.Tensor) -> torch.Tensor:
    """[P, G] -> [P] bool. Tested on the rewards themselves: their mean and std are noisy even where all are equal."""
    return (rewards == rewards[:, :1]).all(dim=1)


def difficulty_weight(pass_rate: torch.Tensor, sigma: float = 1.8) -> torch.Tensor:
    """[P] -> [P]: w(d) = 4 sigma d (1 - d); 0 for groups all right or all wrong, sigma where half are right."""
    return 4 * sigma * pass_rate * (1 - pass_rate)


@dataclass
class Rewards:
    """What P groups of G responses are worth, and how they are to be learned from."""

    accuracy: torch.Tensor  # [P, G] 1 or 0
    format: torch.Tensor  # [P, G] 1 or 0
    bonus: torch.Tensor  # [P, G]
    total: torch.Tensor  # [P, G] accuracy + format_weight * format + bonus
    weight: torch.Tensor  # [P] w(d)
    advantages: torch.Tensor  # [P, G] weighted
    signal: torch.Tensor  # [P] bool: is there anything to learn from the group? (weight > 0, and rewards that differ)
    observation: torch.Tensor  # [P, G] accuracy of <observe>, nan where unknown


def group_rewards(responses: list[list[Response]], lengths: torch.Tensor, *, format_weight: float = 0.5,
                  bonus_coef: float = 0.2, bonus_min_length: int = 100, sigma: float | None = 1.8,
                  normalize_std: bool = True, rejection_sampling: bool = False) -> Rewards:
    """What P groups of G judged responses are worth; lengths [P, G] in tokens. sigma None: every group weighs 1.

    rejection_sampling: GRPO's control in its place, supervised learning on the policy's own right answers: these have
    advantage 1, all others 0, with neither weight nor baseline.
    """
    assert lengths.shape == (len(responses), len(responses[0])), "a length for each response"
    accuracy = torch.tensor([[r.accuracy for r in group] for group in responses])
    formatted = torch.tensor([[r.format for r in group] for group in responses])
    observed = [[math.nan if r.observation is None else r.observation for r in group] for group in responses]

    bonus = shortest_correct_bonus(accuracy > 0, lengths, bonus_coef, bonus_min_length)
    total = accuracy + format_weight * formatted + bonus  # r_i = accuracy_i + 0.5 format_i + bonus_i
    pass_rate = accuracy.mean(dim=1)  # d = (1/G) sum_i accuracy_i
    weight = torch.ones_like(pass_rate) if sigma is None else difficulty_weight(pass_rate, sigma)  # w(d)
    advantages = weight[:, None] * group_advantages(total, normalize_std)  # adv_i = w(d) A_i; (the std would undo it)
    signal = (weight > 0) & ~_all_equal(total)
    if rejection_sampling:
        weight, advantages, signal = torch.ones_like(pass_rate), accuracy, pass_rate > 0
    return Rewards(accuracy, formatted, bonus, total, weight, advantages, signal, torch.tensor(observed))


# --- format -----------------------------------------------------------------------------------------------------------

TAGS: dict[str, tuple[str, ...]] = {
    "none": ("answer",), "think": ("think", "answer"), "observe": ("observe", "think", "answer")}
TAG = re.compile(r"(<\s*/?\s*(?:observe|think|answer)\b[^<>]*>)", re.IGNORECASE)  # misspelt ones count as tags too


def format_reward(text: str, style: str = "observe") -> float:
    """1.0 when the text is the style's tags, each once and in order, none empty, and white space around them."""
    expected = [tag for name in TAGS[style] for tag in (f"<{name}>", f"</{name}>")]
    parts = TAG.split(text)  # outside, <observe>, inside, </observe>, outside, <think>, ...
    if parts[1::2] != expected:
        return 0.0
    outside, inside = parts[0::4], parts[2::4]
    filled = all(any(unicodedata.category(char)[0] not in "ZC" for char in part) for part in inside)  # Z, C: unseen
    return float(filled and not any(part.strip() for part in outside))


def section(text: str, tag: str) -> str | None:
    """What stands inside the last `<tag>...</tag>`, or None."""
    found = re.findall(rf"<{tag}>((?:(?!</?{tag}>).)*)</{tag}>", text, re.DOTALL)
    return found[-1].strip() if found else None


def observation_accuracy(text: str, record: Problem, style: str) -> float | None:
    """Share of the picture's true facts that <observe> states, phrases it invents counted against it.

    True facts: record.meta["facts"], such as ["red 3", "blue 5"], without the marks that part phrases: , ; | and a
    full stop (2.5 may stand in one). None where none are known or none were asked for.
    """
    facts = record.meta.get("facts")
    if not facts or style != "observe":
        return None
    true = Counter(" ".join(fact.casefold().split()) for fact in facts)
    phrases = re.split(r"[,;\n|]|\.(?!\d)", (section(text, "observe") or "").casefold())
    stated = Counter(" ".join(phrase.split()) for phrase in phrases if phrase.strip())
    return (true & stated).total() / max(true.total(), stated.total())


# --- the judge: what the answer is, and whether it is right -----------------------------------------------------------

CLOSING = re.compile(r"\banswer\s*(?:is\b|:)\s*:?\s*", re.IGNORECASE)
PHRASE = re.compile(r"(?:so|thus|hence|therefore)?[,\s]*(?:the|my)?\s*(?:final|correct|best|right)?\s*"
                    r"\b(?:answer|option|choice)\b\s*(?:is\b)?\s*[:=]?\s*(?=\S)", re.IGNORECASE)
ASSIGNED = re.compile(r"(?:∠\s*|\\angle\s*)?\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\(\w\))?\s*[=≈]\s*")  # the "x =" of "x = 12"


def extract_answer(text: str) -> str | None:
    """The last <answer>; where there is no tag, the last \\boxed{}, else a closing "the answer is X"; else None."""
    answer = section(text, "answer")
    if answer is None:
        answer = last_boxed(text)
    if answer is None and text.strip():
        last_line = text.strip().rsplit("\n", 1)[-1]
        answer = CLOSING.split(last_line)[-1] if CLOSING.search(last_line) else None
    return answer.strip() or None if answer else None


def _after(opening: re.Pattern, text: str) -> str:
    match = opening.match(text)
    return text[match.end():] if match else text


def bare(answer: str, record: Problem) -> str:
    """An answer without what judging overlooks: a "the answer is" and, where the rule does, the "x =" of "x = 12"."""
    answer = _after(PHRASE, plain(answer))
    formula = record.answer_type == "math" and not any("=" in gold for gold in record.golds)
    return _after(ASSIGNED, answer) if formula or record.answer_type in ("number", "list") else answer


def answer_matches(answer: str, record: Problem) -> bool:
    """Is what extract_answer found right? The one judge, by the rule of the record's answer type.

    Every rule reads an answer whole or not at all, so hedges are wrong: "A or B", all options listed, "not A".
    """
    if len(answer) > MAX_ANSWER:
        return False
    rule = RULES[record.answer_type]
    forms = {answer, _after(PHRASE, plain(answer))}  # "The answer is B" is B
    return any(rule(form, gold, record) for form in forms for gold in record.golds)


def accuracy_reward(text: str, record: Problem) -> float:
    """1.0 when the response's answer is right, else 0.0."""
    answer = extract_answer(text)
    return float(answer is not None and answer_matches(answer, record))


@dataclass(frozen=True)
class Response:
    """One response and what it is worth by itself."""

    answer: str | None  # as extracted; None: unreadable, and so wrong
    accuracy: float  # 1: right, 0: wrong
    format: float  # 1 or 0
    observation: float | None  # see observation_accuracy
    text: str = ""
    tokens: int | None = None  # its length; None: another engine wrote it and did not say
    truncated: bool | None = None  # whether it was cut off at the limit; None: not said
    sections: dict[str, int] | None = None  # tokens inside <observe>, <think>, <answer>; None: not counted


def score(text: str, record: Problem, style: str, tokens: int | None = None,
          truncated: bool | None = None) -> Response:
    """Score one response to a record in a prompt style, for training and evaluation alike."""
    return Response(extract_answer(text), accuracy_reward(text, record), format_reward(text, style),
                    observation_accuracy(text, record, style), text, tokens, truncated)


def score_groups(texts: list[list[str]], records: Sequence[Problem], style: str) -> list[list[Response]]:
    """Judge G texts to each of P records, some groups at a time: several workers then check formulas."""
    def score_group(group: list[str], record: Problem) -> list[Response]:
        return [score(text, record, style) for text in group]

    assert len(texts) == len(records), f"{len(texts)} groups of responses to {len(records)} records"
    with ThreadPoolExecutor(VERIFIER.workers) as pool:
        return list(pool.map(score_group, texts, records))


# === the fold: below, how each type of answer is compared, how golds and answers are spelled, and who asks sympy ======

# --- the rules, by answer type ----------------------------------------------------------------------------------------

def _same_number(answer: tuple[float, str] | None, gold: tuple[float, str] | None, precision: int | None) -> bool:
    if answer is None or gold is None:
        return False
    (a, a_unit), (g, g_unit) = answer, gold
    if a_unit != g_unit and {a_unit, g_unit} <= SYMBOLS:
        return False  # 12 m is not 12 cm; a unit left out, or any other, goes unread
    pairs = [(a, g)]
    if (a_unit == "%") != (g_unit == "%"):  # 50% is 50, and is 0.5
        pairs.append((a / 100, g) if a_unit == "%" else (a, g / 100))
    if precision is not None:
        return any(round(a, precision) == round(g, precision) for a, g in pairs)
    return any(abs(a - g) <= 2e-6 * min(1, abs(g)) for a, g in pairs)  # .333333 is 1/3, .33 is not


def _number(answer: str, gold: str, record: Problem) -> bool:
    answer = _after(ASSIGNED, plain(answer))
    return _same_number(split_number(answer, False), split_number(gold, False), record.precision)


def _text(answer: str, gold: str, record: Problem) -> bool:
    def spaceless(text: str) -> str:
        return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", normal_text(text))  # `S 23.5 ^\circ W` is S 23.5° W, 1 2 is not 12

    return (spaceless(answer) == spaceless(gold)
            or _same_number(split_number(answer), split_number(gold), record.precision))


def _list(answer: str, gold: str, record: Problem) -> bool:
    """Item by item, in order; brackets may be left out but not swapped. So are ratios, for 12:30 is not 6:15."""
    gold_mark, gold_items = parse_items(gold) or ("", ())
    answer = _after(ASSIGNED, plain(answer))
    mark, items = parse_items(answer.replace("/", ":") if gold_mark == ":" else answer) or ("", ())
    if len(items) != len(gold_items) or mark != gold_mark and (":" in mark + gold_mark or mark and gold_mark):
        return False
    return all(_text(item, gold_item, record) for item, gold_item in zip(items, gold_items))


def _choice(answer: str, gold: str, record: Problem) -> bool:
    return named_option(answer, record.choices) == option_index(gold, record.choices)


def named_option(answer: str, choices: tuple[str, ...]) -> int | None:
    """The option that an answer names: by letter, by the option's text, or by a letter and then that option's text."""
    index = option_index(answer, choices)
    if index is not None:
        return index
    numbers = [split_number(choice, False) for choice in choices]
    same = [i for i, number in enumerate(numbers) if _same_number(split_number(answer), number, None)]
    if len(same) == 1:
        return same[0]
    lettered = re.fullmatch(r"[(\[]?([A-Z])(?=\W)([)\].:]*)(\s*)(?:-\s+)?(\S.*)", plain(answer), re.DOTALL)
    if not lettered:
        return None
    letter, mark, space, rest = lettered.groups()
    index = option_index(letter, choices)
    if choices and choices != tuple(ascii_uppercase[:len(choices)]) and index is not None:
        own = normal_text(rest) == normal_text(choices[index]) or _same_number(split_number(rest), numbers[index], None)
        return index if own else None
    # The options stand where we cannot read them: the letter must be set off, and be the only one.
    return index if mark and space and not re.search(r"\b[A-J]\b", rest) else None


def _math(answer: str, gold: str, record: Problem) -> bool:
    answer, gold = _latex(answer), _latex(gold, dirty=True)
    if answer == gold:
        return True
    if "=" not in gold:
        answer = _after(ASSIGNED, answer)  # "x = 2" is 2; "5 = 2" and "x = 5 = 2" hedge
    if answer.count("=") > gold.count("="):
        return False
    if not answer or ENDLESS.search(answer) or re.search(r"\$|\\boxed|\\[(\[]", answer):  # several formulas: a hedge
        return False
    return VERIFIER(gold, answer)


RULES = {"choice": _choice, "number": _number, "list": _list, "text": _text, "math": _math}


# --- the grammar of answers -------------------------------------------------------------------------------------------

MAX_ANSWER = 1000  # characters; a longer answer is wrong unread
LETTERS = "ABCDEFGHIJ"  # what a choice may be when its options stand in the question or in the picture

SPELLINGS = [(re.compile(pattern), plain_form) for pattern, plain_form in (  # LaTeX and unicode -> plain text, in order
    (r"[−–—]", "-"), (r"[\u00a0\u2009\u202f~]|\\quad|\\ ", " "), (r"\\(?:left|right|displaystyle|[,;:!])", ""),
    ("，", ","), ("[：∶]|\\\\colon", ":"), ("（", "("), ("）", ")"), ("％", "%"), (r"\{,\}", ","),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\{degrees?\}|[º˚]", "°"),
    (r"\\(?:text|mathrm|textbf|mathbf|textrm|textit|mbox)\s*\{([^{}]*)\}", r" \1"),
    (r"\\[dtc]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}", r" \1/\2"),
    (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2"),
    (r"(\d)\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?", r"\1e\2"),
    (r"\\([%$&#_])", r"\1"), (r"\s+", " "))]
WRAPPERS = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}"), (r"\text{", "}"), ("**", "**"), ("`", "`"))

# What may follow a number. SYMBOLS contradict each other (12 m is not 12 cm); NOT_UNITS change the number's value.
SYMBOLS = frozenset("mm cm dm m km mg g kg ml l s h °".split())
UNITS = SYMBOLS | frozenset("""% $ € £ ¥ in ft yd mi t lb oz ms min hr n j w v a k c f °c °f pa kpa hz mol rad ω kj kw
    degree degrees percent unit units square cubic sq per cent cents dollar dollars inch inches foot feet mile miles
    yard yards meter meters metre metres millimeters centimeter centimeters centimetres kilometer kilometers gram grams
    kilogram kilograms liter liters litres second seconds minute minutes hour hours day days week weeks month months
    year years""".split())
NOT_UNITS = frozenset("""and but not nor than plus minus times over root squared cubed hundred thousand million billion
    trillion dozen half halves third thirds quarter quarters fourths fifth fifths tenth tenths""".split())
DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
NUMBER = re.compile(rf"""([+-]?)\s*[$€£¥]?\s*
    (?:(?:([0-9]+)\s+)?({DECIMAL})\s*/\s*({DECIMAL})                                    # 7/3, 2 1/3
      |((?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]*)?|{DECIMAL})(?:e[+-]?[0-9]{{1,3}})?))  # 1,234.5 or 4.9e-8
    (\s*)([%°$€£¥a-zµμω][a-zµμω°²³0-9\s./·^{{}}-]*)?""", re.IGNORECASE | re.VERBOSE)
# Signs that a gold needs math-verify: operators, half-open intervals, a letter times or minus something, functions.
MATH = re.compile(r"[\\$^_=+*<>{}\[\]|√π∞≤≥×÷²³]|\d!|\d[a-zA-Z]\b|\b[a-z]\s*-\s*(?:\d|[a-z]\b)|\d\s*-\s*[a-z]\b|"
                  r"\b[a-z]\(|\b(?:pi|sqrt|sin|cos|tan|log|ln)\b")


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, its braces balanced; None without one."""
    _, box, tail = text.rpartition(r"\boxed{")
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(char, 0) for char in tail))
    return tail[:depth.index(-1)] if box and -1 in depth else None  # -1: where the box's own brace closes


def unwrap(text: str) -> str:
    """A short answer without white space, math delimiters, \\boxed{}, markdown and full stop around it."""
    text = text.replace("\x0c", "\\f")  # MathVision has a `\frac` whose `\f` became a form feed
    for _ in range(5):  # deep enough for `**$\boxed{\text{B}}$.**`
        text = text.strip().rstrip(".。,;").rstrip()
        for left, right in WRAPPERS:
            inner = text[len(left):len(text) - len(right)]
            whole = text.startswith(left) and text.endswith(right) and inner
            if whole and left not in inner and inner.count("{") == inner.count("}"):
                text = inner
    return text


def plain(text: str) -> str:
    """A short answer without the LaTeX, markdown and unicode it may be dressed in: `$\\frac{1}{2}$` -> `1/2`."""
    text = unwrap(text)
    for pattern, plain_form in SPELLINGS:
        text = pattern.sub(plain_form, text)
    return text.strip()


def normal_text(text: str) -> str:
    """What two texts are compared by: no case, no punctuation around, no article."""
    return re.sub(r"^(?:an?|the) ", "", plain(text).casefold().strip(" .,;:!?\"'"))


def split_number(text: str, known_units: bool = True) -> tuple[float, str] | None:
    """`$1,234.5 cm^2$` -> (1234.5, "cm"); None where the text is anything but one number and perhaps its unit.

    known_units: the unit is one of UNITS, else any words of a noun's length ("3 red cars").
    """
    text = plain(text)
    match = NUMBER.fullmatch(text[1:-1] if text[:1] + text[-1:] == "()" and "," not in text else text)
    if not match:
        return None
    sign, whole, top, bottom, digits, space, after = match.groups()
    unit = read_unit(after or "", any_noun=bool(space) and not known_units)
    if top:
        value = float(whole or 0) + float(top) / float(bottom) if float(bottom) else math.inf
    else:
        value = float(digits.replace(",", ""))
    return (-value if sign == "-" else value, unit) if unit is not None and math.isfinite(value) else None


def read_unit(text: str, any_noun: bool) -> str | None:
    """What stands after a number, without powers, as one unit; None where it is none. any_noun: "red cars" is one."""
    text = re.sub(r"(?<=[a-zµμω])(?:\^?\{?-?[1-3]\}?|[²³])(?![0-9])", "", text.lower())
    words = re.split(r"[\s/·.-]+", text.strip(" .")) if text else []
    for word in words:
        noun = len(word) > 2 and word.isalpha() and word not in NOT_UNITS
        if word not in UNITS and not (any_noun and noun):
            return None
    return "%" if words and words[0] in ("%", "percent") else " ".join(words)


def parse_number(text: str) -> float | None:
    """The number that a text is: `-.5`, `- 3`, `1,234`, `4.9e-8`, `7/3`, `145°`, `12 cm`, `50%` (as 50); else None."""
    number = split_number(text, known_units=False)
    return number and number[0]


def parse_items(text: str) -> tuple[str, tuple[str, ...]] | None:
    """`[2013, 2014]`, `(1, 2)`, `1, 2`, `1:2` -> its mark (the bracket, "" or ":") and its items; else None."""
    text = plain(text)
    if ":" in text:
        items = tuple(item.strip() for item in text.split(":"))
        return (":", items) if all(split_number(item) for item in items) else None
    mark = text[0] if text[:1] + text[-1:] in ("[]", "()") else ""
    inner = re.sub(r",?\s+and\s+", ", ", text[1:-1] if mark else text)
    items = tuple(item.strip(" '\"") for item in inner.split(","))
    listed = all(items) and not re.search(r"[\[\](){}]", inner) and (len(items) > 1 or mark == "[")
    return (mark, items) if listed else None


def option_index(text: str, choices: tuple[str, ...]) -> int | None:
    """Which option a text names, by its letter alone, `(B)`, `B.` or `B**`, or by its whole text."""
    letters = ascii_uppercase[:len(choices)] or LETTERS
    letter = re.fullmatch(r"[(\[{*#\s]*([A-Za-z])[)\]}.:;,!*#\s]*", plain(text))
    if letter and letter[1] in letters:
        return letters.index(letter[1])
    same = [i for i, choice in enumerate(choices) if normal_text(choice) == normal_text(text)]
    if same:
        return same[0]
    return letters.index(letter[1].upper()) if letter and letter[1].upper() in letters else None


def infer_answer_type(golds: tuple[str, ...], choices: tuple[str, ...]) -> str:
    """The answer type of all accepted answers together; text takes in mixtures such as 12 and twelve."""
    if choices:
        return "choice"
    kinds = set()
    for gold in golds:
        items = parse_items(gold)
        if re.fullmatch(r"[(\[]*[A-J][)\].:]*", plain(gold)):
            kinds.add("choice")  # its options stand in the question (SceMQA, MathVerse) or in the picture
        elif split_number(gold):
            kinds.add("number")
        elif items and all(split_number(item) or items[0] == "[" and not MATH.search(item) for item in items[1]):
            kinds.add("list")
        else:
            kinds.add("math" if MATH.search(plain(gold)) else "text")
    return kinds.pop() if len(kinds) == 1 else "math" if "math" in kinds else "text"


# --- golds ------------------------------------------------------------------------------------------------------------

def read_gold(answer: Any, choices: Iterable, kind: str = "") -> tuple[str | tuple[str, ...], tuple[str, ...], str]:
    """A gold and its options as data has them -> (gold, or all accepted ones; options; answer type, inferred if empty).

    Raises ValueError that says why no rule could judge by it. (Whether math-verify can: gold_fault, for that is slow.)
    """
    if isinstance(answer, dict):
        raise ValueError("its answer is an object; write a text, a number, or a list of which any is right")
    several = isinstance(answer, (list, tuple))
    golds = tuple("" if gold is None else str(gold) for gold in (answer if several else [answer]))
    if not golds or not all(plain(gold) for gold in golds):
        raise ValueError(f"its answer is empty: {answer!r}")
    options = tuple(str(choice) for choice in choices)
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"it has {len(options)} choices, more than there are letters")
    kind = kind or infer_answer_type(golds, options)
    if kind not in RULES:
        raise ValueError(f"answer type {kind!r} is none of {', '.join(RULES)}")
    for gold in golds:
        if not READS[kind](gold, options):
            of = f" {list(options) or LETTERS}" if kind == "choice" else ""
            raise ValueError(f"its answer {gold[:80]!r} {UNREAD[kind]}{of}")
        if kind != "choice" and len(gold) > MAX_ANSWER:
            raise ValueError(f"its answer is {len(gold)} characters long; no rule can judge more than {MAX_ANSWER}")
    return golds if several else golds[0], options, kind


READS = {  # can a gold of this type be read?
    "choice": lambda gold, options: option_index(gold, options) is not None,
    "number": lambda gold, _: parse_number(gold) is not None, "list": lambda gold, _: parse_items(gold) is not None,
    "text": lambda gold, _: normal_text(gold) != "", "math": lambda gold, _: True}
UNREAD = {"choice": "names none of the options", "number": "is no number", "list": "is no list, tuple or ratio",
          "text": "holds nothing but punctuation"}


def gold_fault(record: Problem) -> str | None:
    """Why no rule can judge by the record's gold (of a record that read_gold took: a formula that math-verify cannot
    parse); None: one can."""
    for gold in record.golds if record.answer_type == "math" else ():
        if not VERIFIER(_latex(gold, dirty=True), None):
            return f"record {record.id}: math-verify cannot read its answer {gold!r}; is it a text?"
    return None


# --- math-verify ------------------------------------------------------------------------------------------------------

# What sympy would compute for minutes: towers of powers, huge powers and factorials, deep nesting.
ENDLESS = re.compile(r"\^[\s{(]*-?\d{4,}|(?:\^[\s{(]*\d+[\s})]*){2,}|\d{3,}[\s})]*!|![\s})]*!|(?:[({\[]\s*){8}")
LATEX = [(re.compile(pattern), latex) for pattern, latex in (  # unicode and plain spellings that math-verify misreads
    (r"^\$([^$]*)\$\s*(?=[mcdk]m\b)", r"\1 "),  # $9$ cm
    (r"[−–]", "-"), (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"√\s*(?=\{)", r"\\sqrt"), ("×", r"\\times "), ("[·⋅]", r"\\cdot "), ("÷", "/"), (r"\*\*", "^"), ("²", "^{2}"),
    ("³", "^{3}"), (">=|≥", r"\\geq "), ("<=|≤", r"\\leq "), ("!=|≠", r"\\neq "), ("∞", r"\\infty "), ("π", r"\\pi "),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "), (r"(?<=[\s\d})])(?:mm|cm|dm|km)\s*(?:\^\s*\{?[23]\}?)?$", ""))]


def _latex(text: str, dirty: bool = False) -> str:
    """A formula as math-verify reads it. dirty: drop words around the only `$...$`, for golds like `Area $=9$`."""
    parts = text.split("$")
    text = unwrap(parts[1] if dirty and len(parts) == 3 else text)
    for pattern, latex in LATEX:
        text = pattern.sub(latex, text)
    return " ".join(text.split()).removeprefix("=").strip()


class Verifier:
    """Asks math-verify, in worker processes of which pebble kills those that take longer than `timeout` seconds.

    math-verify's own time-out is SIGALRM, which raises in every thread but the main one, and a sympy that hangs
    cannot be stopped from a thread. The workers start at the first question: a run without math golds never pays.
    """

    def __init__(self, timeout: float = 5.0, memory: int = 1 << 30, workers: int = 0):
        """memory: bytes that a worker may take beyond what its imports took. workers: 0 for up to four of the cores."""
        self.timeout, self.memory = timeout, memory
        self.workers = workers or min(4, os.cpu_count() or 1)
        self.timeouts = 0  # for the log
        self._asked = lru_cache(10_000)(self._ask)  # the answers of a group repeat themselves
        self._pool: ProcessPool | None = None
        self._starting = threading.Lock()

    def __call__(self, gold: str, answer: str | None) -> bool:
        """Does the answer equal the gold? answer None: can the gold be parsed?

        False too when it cannot be parsed, takes too long, or takes too much memory. May be asked from many threads.
        """
        return self._asked(gold, answer)

    def close(self) -> None:
        """End the workers; the next question starts others."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _ask(self, gold: str, answer: str | None) -> bool:
        for _ in range(3):
            pool = self._running()
            try:
                asked = pool.schedule(_verify, args=[gold, answer, self.timeout], timeout=self.timeout)
                while not wait([asked], timeout=1).done:
                    if not pool.active:  # it broke while the question was on its way, and will never answer
                        raise BrokenProcessPool
                return asked.result()
            except TimeoutError:
                self.timeouts += 1
                return False
            except ProcessExpired as death:  # over this answer, or by a SIGTERM that a cluster sends to all processes
                if abs(death.exitcode) != signal.SIGTERM:  # of a job, which says nothing of the answer: ask again
                    return False
            except (BrokenProcessPool, RuntimeError):  # a worker was killed between two questions, which ends its pool
                continue
        raise RuntimeError("the math-verify workers do not start, or are killed (see above): is math-verify installed, "
                           'and does the program start under `if __name__ == "__main__":`?')

    def _running(self) -> ProcessPool:
        with self._starting:
            if self._pool is None or not self._pool.active:
                self._pool = ProcessPool(self.workers, initializer=_start_worker, initargs=[self.memory],
                                         context=get_context("spawn"))  # (a fork would copy CUDA's state, and locks)
            return self._pool


def _start_worker(memory: int) -> None:
    import resource

    logging.disable(logging.CRITICAL)  # math-verify warns at length that its own time-outs are off
    _verify("1", None, 60)  # the first call loads its grammar
    with contextlib.suppress(OSError, ValueError):  # no /proc on macOS, or a lower limit: the time-out alone must do
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))


def _verify(gold: str, answer: str | None, timeout: float) -> bool:
    """In a worker: does math-verify find the two equal? answer None: can it parse the gold?"""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list:  # one formula, whole: no search for formulas in prose, no fallback to strings
        return parse(f"${text}$", [LatexExtractionConfig(boxed_match_priority=-1)], fallback_mode="no_fallback",
                     extraction_mode="first_match", parsing_timeout=None)

    signal.alarm(math.ceil(timeout) + 5)  # should the parent die meanwhile, nobody else would end a hung sympy
    try:
        parsed = read(gold)
        if answer is None:
            return bool(parsed)
        return bool(parsed and verify(parsed, read(answer), timeout_seconds=None))
    except Exception:  # sympy raises all there is, MemoryError and RecursionError among them
        return False
    finally:
        signal.alarm(0)


VERIFIER = Verifier()  # the one global: workers are dear, so all that judge share them. Its .timeouts go to the log.
