"""What a response is worth: its answer, its format, its length, and what follows for the group it belongs to.

    group_rewards       P prompts of G judged responses each -> Rewards: bonus, weight w(d), weighted advantages
    format_reward       are the tags there, in order, each once?
    extract_answer      what the response gives as its answer
    answer_matches      the one judge of answers, for training and evaluation alike; plain: the one spelling it compares
    read_gold           what a gold must be, for a rule to judge by it; gold_fault: why math-verify cannot read one

Departures from the official code (zrguo/Observe-R1), each with its reason:
 1. No correct answer, no bonus: there, all lengths of an all-wrong group are inf, inf > 100, and a WRONG one is paid.
 2. A gold that no rule can read is refused when data is loaded or a run starts: there, it pays 1.0 for any answer.
 3. Accuracy is kept apart from the sum: there, "correct" is `rewards.trunc()`, wrong once format + bonus reach 1.
 4. Answers are read without their tags: there, `<answer>1/2</answer>` for $\\frac{1}{2}$, `<answer>1,000</answer>` for
    1000 and `<answer>42 ft</answer>` for 42 score 0.
 5. Golds and letters are read whole: there, gold "1228 142.67" is its last number, and a letter is a substring
    ("B. 10 m" passes, "B. 10 cm" fails because of the c, "that" passes for gold A).
 6. Format is strict: there, text around the tags, empty tags, repeated tags and <observe> inside of <think> pass.
 7. math-verify gets the gold first: it is asymmetric, and there the two are swapped.
 8. Equal rewards give an advantage of exactly 0: there, float noise over 1e-9 makes 0.9 out of eight rewards of 0.7.
 9. What is logged as the reward is the whole of it: there, the bonus is left out.
10. Without an <answer>, only what is given as the final answer is read (final_answers): there, any text is searched,
    and "blah 7 blah 42" and a cut-off "<answer>42" score 1. Nothing at all would be too strict: a model that never
    writes tags would be right 0 times in 8, its weight 0, and so never learn to write them.
11. The last <answer> counts, and another one that differs makes a hedge, which is wrong: there, the first counts.

Shapes: P prompts, G responses of a group.
"""
from __future__ import annotations

import contextlib
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
from fractions import Fraction
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Protocol

import torch
from pebble import ProcessExpired, ProcessPool

if sys.version_info < (3, 11):  # (hashlib.file_digest, of eval.py)
    raise SystemExit(f"error: this code needs Python 3.11 or newer, and this is {sys.version.split()[0]}")

Texts = tuple[str, ...]


class Problem(Protocol):
    """What is asked of a data.Record here: this file is the ground, and imports none of the others."""

    @property
    def id(self) -> str: ...
    @property
    def golds(self) -> Texts: ...  # all accepted answers
    @property
    def choices(self) -> Texts: ...  # texts of the options, in the order A, B, C, ...
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
    if it is longer than min_length tokens; else to none."""
    lengths = lengths.double().masked_fill(~correct, torch.inf)  # [P, G]
    first = lengths.argmin(dim=1, keepdim=True)  # [P, 1]
    shortest = lengths.gather(1, first)  # [P, 1]
    paid = (shortest > min_length) & shortest.isfinite()  # inf: nobody is right
    return torch.zeros_like(lengths, dtype=torch.float32).scatter(1, first, coef * paid.float())


def group_advantages(rewards: torch.Tensor, normalize_std: bool = True) -> torch.Tensor:
    """[P, G] -> [P, G]: A_i = (r_i - mean(r)) / (std(r) + 1e-6), std unbiased; exactly 0 where all r_i are equal.

    Raises ValueError for groups of one."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: advantages need groups of two responses or more")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-6)
    # Tested on the rewards themselves: their mean and std are noisy even where all are equal.
    return advantages.masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0)


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
    advantage 1, all others 0, with neither weight nor baseline."""
    assert lengths.shape == (len(responses), len(responses[0])), "a length for each response"
    accuracy = torch.tensor([[r.accuracy for r in group] for group in responses])
    formatted = torch.tensor([[r.format for r in group] for group in responses])
    observed = [[math.nan if r.observation is None else r.observation for r in group] for group in responses]

    bonus = shortest_correct_bonus(accuracy > 0, lengths, bonus_coef, bonus_min_length)
    total = accuracy + format_weight * formatted + bonus  # r_i = accuracy_i + 0.5 format_i + bonus_i
    pass_rate = accuracy.mean(dim=1)  # d = (1/G) sum_i accuracy_i
    weight = torch.ones_like(pass_rate) if sigma is None else difficulty_weight(pass_rate, sigma)  # w(d)
    advantages = weight[:, None] * group_advantages(total, normalize_std)  # adv_i = w(d) A_i; (the std would undo it)
    if rejection_sampling:
        weight, advantages = torch.ones_like(pass_rate), accuracy
    signal = advantages.any(dim=1)
    return Rewards(accuracy, formatted, bonus, total, weight, advantages, signal, torch.tensor(observed))


# --- format -----------------------------------------------------------------------------------------------------------

# System prompts by style. A style's format is the tags that its prompt names, in their order: a new style is a line
# here. The paper's own wording was never released; what is known is the order of the tags, and of "steps", by which it
# measured difficulty, the text (its figure).
PROMPTS: dict[str, str] = {
    "none": "Answer the question about the image. Write only the final answer, inside <answer> </answer>.",
    "steps": "You should think the problem step by step and give the reasoning process and the final answer.",
    "think": "Answer the question about the image. First reason step by step inside <think> </think>, "
             "then write only the final answer inside <answer> </answer>.",
    "observe": "Answer the question about the image. First describe what you see inside <observe> </observe>, "
               "then reason step by step inside <think> </think>, "
               "then write only the final answer inside <answer> </answer>.",
}
TAGS: dict[str, Texts] = {
    style: tuple(dict.fromkeys(re.findall(r"<(\w+)>", prompt))) for style, prompt in PROMPTS.items()}
SECTIONS = tuple(dict.fromkeys([*TAGS["observe"], *(tag for tags in TAGS.values() for tag in tags)]))  # of all styles
TAG = re.compile(rf"(<\s*(?:/\s*)?(?:{'|'.join(SECTIONS)})\b[^<>]*>)", re.IGNORECASE)  # misspelt ones count too


def format_reward(text: str, style: str = "observe") -> float:
    """1.0 when the text is the style's tags, each once and in order, none empty, and white space around them;
    where the style has none, of a text without tags."""
    if not TAGS[style]:
        return float(bool(text.strip()) and not TAG.search(text))
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
    full stop (2.5 may stand in one). None where none are known or none were asked for."""
    facts = record.meta.get("facts")
    if not facts or style != "observe":
        return None
    true = Counter(" ".join(fact.casefold().split()) for fact in facts)
    phrases = re.split(r"[,;\n|]|\.(?!\d)", (section(text, "observe") or "").casefold())
    stated = Counter(" ".join(phrase.split()) for phrase in phrases if phrase.strip())
    return (true & stated).total() / max(true.total(), stated.total())


# --- the judge: what the answer is, and whether it is right -----------------------------------------------------------

def extract_answer(text: str, choices: Texts = ()) -> str | None:
    """The answer that counts: the last <answer>, read within if it is prose; without tags the last of `\\boxed{}`, "the
    answer is X", a response or last line that is nothing but an answer, "So ... is 12."; else None."""
    answers = final_answers(text, choices)
    return answers[-1] if answers else None


def answer_matches(answer: str, record: Problem) -> bool:
    """Is what extract_answer found right? The one judge, by the rule of the record's answer type.

    Every rule reads an answer whole or not at all, so hedges are wrong: "A or B", all options listed, "not A"."""
    return _all_right(stated(answer) or [answer], record)  # "The answer is B" is B


def accuracy_reward(text: str, record: Problem) -> float:
    """1.0 when the response's answer is right, else 0.0; two different ones given as final are a hedge, and wrong."""
    return float(_all_right(final_answers(text, record.choices), record))


def _all_right(answers: Sequence[str], record: Problem) -> bool:
    """Is the last one right, and no other one different? With options, what names none of them is the working."""
    if not answers or any(len(answer) > MAX_ANSWER for answer in answers):
        return False
    rule, (*others, last) = RULES[record.answer_type], answers
    if record.answer_type == "choice":
        others = [answer for answer in others if named_option(answer, record.choices) is not None]
    return all(any(rule(answer, gold, record) for gold in record.golds) for answer in (last, *others))


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


def score(text: str, record: Problem, style: str) -> Response:
    """Score one response to a record in a prompt style, for training and evaluation alike."""
    answers = final_answers(text, record.choices)
    return Response(answers[-1] if answers else None, float(_all_right(answers, record)), format_reward(text, style),
                    observation_accuracy(text, record, style), text)


def score_groups(texts: list[list[str]], records: Sequence[Problem], style: str) -> list[list[Response]]:
    """Judge G texts to each of P records, some groups at a time: several workers then check formulas."""
    assert len(texts) == len(records), f"{len(texts)} groups of responses to {len(records)} records"
    with ThreadPoolExecutor(VERIFIER.workers) as pool:
        return list(pool.map(lambda group, record: [score(text, record, style) for text in group], texts, records))


# === the fold: below, how each type of answer is compared, how golds and answers are spelled, and who asks sympy ======

# --- where a response gives its answer --------------------------------------------------------------------------------

CLOSING = re.compile(r"""(?xi)  # what announces a final answer
    (?: \b(?:answer|ans|r[ée]ponse|respuesta|resposta|risposta|antwort|ответ)\b | 答案|选项|结果|答え|正解|정답
      | \b(?:correct|right|best|final|suitable|appropriate|matching)\s+(?:option|choice|figure|letter|number)\b
      | \bfinal\s+(?:value|result)\b ) (?:\s+corr\w+)? \]?
    (?:,?\s+(?:to|for|of|in|we|here|that|then|choice|option)\b[^.:=\n]{0,40}?)? [*_"'\s]*
    (?: (?:(?:would|should|must|will|can|has\ to|turns\ out\ to)(?:\ (?!not)\w+)?\ be|is|are|becomes)(?!\w)
      | (?:es|est|ist|é|è)(?!\w) | 应?[该当]?[是为] | [は은] | (?=[:=]) ) \s*[:=]?[*_\s]*
    (?:(?:therefore|thus|hence|then|just|also|still|of\ course|equal\ to|(?:the\ )?number|a\ total\ of|\w+ly)\b,?\s*)*
  | ^[#*_\ ]* (?:the\ )? (?:(?:final|correct)\ )? answer [*_\ ]*$
  | ^[#*_\ ]* (?:(?:result|conclusion|output|total|choice|solution|correct)\W{0,3}:|答:|=>|→) [\s*]*(?=\S{1,20}\W*$)
  | \banswer\W{1,6} (?=\(?(?:[A-J]|\d[\d.,]*)\b\W*$)
  | <answer>\s*: | 答案\]
  | (?<![不误能应])选择?(?:选项)? [:\s]* (?=\(?[A-J](?![A-Za-z\u4e00-\u9fff]))
  | \b(?:hence|thus|therefore|so|this\ is|answer|option),?:?\ (?:option\ |choice\ )?(?=\**\(?[B-J]\)?\**[.\s]*$)
  | \b(?:I|we)(?:'d|'ll|\ will|\ would)?\ (?:choose|select|pick|go\ with)\b""", re.MULTILINE)
NAMED = re.compile(r"""(?xm)(?:(?i:\b(?:option|choice|answer|so|thus|hence|therefore),?\ |选项)[^\w\n]*|^[^\w\n]*)
    (\(?[A-J]\b\)?)(?:\W*\ is\ (?:indeed\ )?(?:(?:the|our)\ )?(?:correct|right|best|answer)\b|\W*是?正确)(?!\ only)""")
CONCLUDED = re.compile(r"""(?xi)(?!.*(?:\b(?:not?|wrong|incorrect|whether|if|far|doubt|guess|intermediate)\b|n't))
    (?:.*(?:\b(?:is|are|equals)\b|=|[为是]):?\s*(?:approximately|about|around)?\s*(?!\([A-J]\))(\S.*)
    |.*\ (?:is|are)\ (\([A-J]\).*))""")  # a last sentence, "... is 12."
SUPPOSED = re.compile(r"""(?xi)(?:\b(?:if|whether|unless|suppose|assuming|false|wrong|incorrect|neither|doubt\w*|says?
    |said|not|worst|thinks?|claims?|impossible|unlikely|cannot)\b|n't|错误|^is)\b[^.,\n]*$""")  # before an answer
RETRACTED = re.compile(r"""(?xi)(?:^|[.?!\n。,(])[ \t*-]*(?:(?:but\ )?wait|hmm+|oops|er,|nope|scratch|strike|edit:
    |correction|update:|rather,|on\ (?:second\ thought|reflection)|(?:after\ )?re(?:count|check|consider)|the\ above
    |looking\ again|oh\ no|never\ ?mind|hold\ on|my\ mistake|i\ (?:made|was|take)|let\ me\ (?:re|correct)|either|maybe
    |perhaps|not?,?\ (?:wait|that|it|i|\d+|\(?[A-J]\b)|or\ (?:perhaps|\(?(?:[A-J]|\d+)\b)|no\.$
    |(?:that|this|it)(?:'s|\ is|\ was)\ (?:not(?!\ \w+\ to\b)|wrong|incorrect|a\ mistake)|actually,?\ (?:it|no|th))
    |\b(?:could|might|may)\ (?:also\ )?be\b|\bshould\ be\ \(?(?:[A-J]|\d+)\b|\binstead\b
    |不对|错了|应该是|更正|等[等一]|可能|或者|\A\W*(?:is|was|would\ be)\ (?:wrong|not|in|a\ trap)
    |\A[^\w\n]*\n[^\w\n]*(?-i:(?![AI]\ [a-z])[A-J]\b(?:[).:\s*]|$)|-?[\d.]+[^\w\n]*(?:\n|$))""")  # or after it
REFUSED = re.compile(r"(?i)\?|^(?:no idea|i|sorry|unable|as an|please|let|it is not|cannot (?:see|tell))\b")
NEGATED = re.compile(r"""(?xi)\b(?:not?|but|think|maybe|other|impossible|eliminate|exclude|false|nobody|neither|nor
    |never|except|unlike|without|instead|rather|either|whether|hardly|ruled|first|or|wrong|incorrect|cannot)\b
    |unlikely|n't|\?|^(?:i|sorry|let)\b""")
SENTENCE_END = re.compile(r"""(?x)(?<=[\w)}\]$°%*]{2}[.!?])(?=\s+[A-Z][a-z]|\s+I\b|\s*$|\s*[^\W\d_a-zA-Z])|です|입니다
    |(?<=[A-J][.!])(?=\ (?:I|A|The|It|This|Let)\ )|,?\ ?(?=(?:because|since|as|due\ to|which)\ |因为)""")
FAREWELL = re.compile(r"(?i)\s*(?:i hope|let me know|is there|do you|feel free|thank|if you|please let)")
MARKS = (  # of thoughts, answers and ends, as other models write them
    (r"<\|begin_of_box\|>", r"\\boxed{"), (r"<\|end_of_box\|>", "}"), (r"```(?:json)?", " "),
    (r"(?i)[<◁](/?)(?:think|thinking)[>▷]", r"<\1think>"),
    (r"(?i)<(/?)(?:answer|final_answer|conclusion) ?>(?! ?:)", r"<\1answer>"),
    (r"(?i)</?(?:s|b|br|strong|u|eos|end_of_turn)/?>|<\|[^|<>]*\|>|<｜[^<>]*｜>|\[EOS\]", " "),
    (r"""\{[^{}]*["']answer["']\s*:\s*["']?([^"'{}]*)["']?\s*\}""", r"<answer>\1</answer>"))
NEAR, TAIL, MOST = 300, 1000, 50  # characters between answers given together, and after the last; answers that are read


def final_answers(text: str, choices: Texts = ()) -> list[str]:
    """All that a response gives as its final answer, in order: the last counts, and no other may differ."""
    lines = [re.sub(r"[ \t]+", " ", line) for line in respelt(text, MARKS).split("\n")]
    text = "\n".join(line for line in lines if line.strip())
    after = text.rpartition("</think>")[2]
    text = after if after.strip() else text
    tags = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", text, re.DOTALL)[-MOST:]
    if tags:
        return [answer for inside in tags for answer in stated(inside) or [inside.strip()]] if tags[-1].strip() else []
    lines = text.translate(LOOKALIKES).strip().split("\n")
    while len(lines) > 1 and FAREWELL.match(lines[-1]):
        lines.pop()
    text = "\n".join(lines)
    if not text or re.search(r"<(?:think|/?answer)>(?! ?:)", text):  # cut off
        return []
    if len(text) <= MAX_ANSWER and re.match(r"\(?[A-J][).:] ", text) and named_option(text, choices) is not None:
        return [text]  # (an option may have several lines)
    return stated(text, whole=False) or lone_answer(text) or only_option(text, choices)


def stated(text: str, whole: bool = True) -> list[str]:
    """What boxes and closing phrases give as final answers. whole: of a text that may be one answer, box and all."""
    def supposed(start: int) -> bool:
        return bool(SUPPOSED.search(text[max(0, start - 80):start]))

    boxes = boxed(text)[-MOST:]
    found = [box for box in boxes if not re.search(r"(?i)\bnot[\s$]*$", text[max(0, box[0] - 9):box[0]])]
    closings = list(CLOSING.finditer(text))[-MOST:]
    for match, after in zip(closings, [*(match.start() for match in closings[1:]), len(text)]):
        answer, end = following(text[:after], match.end())
        if answer and not (boxes and "boxed" in answer) and not supposed(match.start()):
            found.append((match.start(), end, answer))
    for match in list(NAMED.finditer(text))[-MOST:]:
        if not supposed(match.start()):
            found.append((match.start(), match.end(), match[1]))
    if not found or whole and found == boxes and not re.search(r"[A-Za-z]{2}\s+[A-Za-z]{2}", text):
        return []
    start, end, last = max(found)
    closing = len(text) - end < TAIL or "\n" not in text[:start] or (start, end, last) in boxes
    if not closing or RETRACTED.search(text[end:]):
        return []
    rivals = [answer for at, _, answer in sorted(found)[:-1] if at >= start - NEAR and (whole or is_value(answer))]
    return [answer.strip() for answer in (*rivals, last) if answer.strip()]


def is_value(answer: str) -> bool:
    """Is it a letter, a quantity or a formula, rather than words?"""
    return bool(re.match(r"\W*[A-J]\b(?!')", answer) or quantity(answer, nouns=True) or MATH.search(plain(answer[:99])))


def following(text: str, start: int) -> tuple[str, int]:
    """What a closing phrase announces, on its line or the next one -> it, and where it ends; "" for none."""
    start = re.compile(r"(?:[\s*#:]|---)*(?:\\\[|\$\$)?\s*").match(text, start).end()  # type: ignore[union-attr]
    answer = SENTENCE_END.split(text[start:start + MAX_ANSWER + 1].partition("\n")[0], maxsplit=1)[0]
    asked = answer.endswith(("?", ":")) and not answer.startswith("(")
    said = re.match(r"(?i)(?:correct|right|wrong|incorrect|clear|obvious|given|not sure)\b", answer)
    bare = re.sub(r"^[\s*_\"']+|[\s*_\"']+(?=\W*$)| \((?!or\b|mod\b)[^()]*[a-z=][^()]*\)(?=\W*$)", "", answer)
    return "" if asked or said else bare, start + len(answer)


def lone_answer(text: str) -> list[str]:
    """The answer of a response without closing phrase that is nothing else, or whose first or last line is, or which
    ends "So the sum is 12."; a sentence, a question, a refusal or a list of options is none."""
    lines = [line.strip() for line in text.split("\n")]
    first, last = lines[0], lines[-1]
    lettered = [line for line in lines if re.match(r"\W*[A-J](?:[).:]|\W*$)", line)]
    letter = r"\W*[A-J]\W*"
    if "boxed" in text or len(last) > MAX_ANSWER or REFUSED.search(last):
        return []
    listed = [line for line in lettered if not re.fullmatch(letter, line)]
    if len(lettered) > 1 and not (len(listed) == len(lettered) - 1 and re.fullmatch(letter, last)):
        return []
    concluded = CONCLUDED.fullmatch(re.split(r"(?<=[.。])\s+(?=[A-Z])", last)[-1].strip("*"))
    so = len(lines) > 1 or re.match(r"(?i)(?:.*\. )?(?:so|therefore|thus|hence|因此|所以)\b", text)
    if concluded and (concluded[2] or so and (quantity(concluded[1], nouns=True) or formula(concluded[1]))):
        return [concluded[2] or re.sub(r"^(?:\$+|\\[(\[])|\s*(?:\$+|\\[)\]])?[.\s]*$", "", concluded[1])]
    if len(lines) == 1 or re.match(r"\\\[|\$\$", text):
        count = len(text.split())
        return [text] if lettered or count < 5 or count < 9 and not text.endswith(".") else []
    goes_on = re.fullmatch(letter, first) and lines[1][0].islower()  # "B\nis wrong"
    if (lettered == [first] or quantity(first)) and not goes_on:
        return [] if RETRACTED.search("\n".join(["", *lines[1:]])) else [first]
    alone = rf"{letter}|\W*\(?[A-J][).:] .+|\$[^$]+\$|\\\(.+\\\)"
    if quantity(last):
        return [] if quantity(lines[-2]) else [last]
    return [last] if re.fullmatch(alone, last) else []


def formula(text: str) -> bool:
    """Has it a formula's signs, and no word?"""
    return bool(MATH.search(text)) and not re.search(r"[^\W\d]{2}", re.sub(r"\\[a-zA-Z]+", " ", text))


def only_option(text: str, choices: Texts) -> list[str]:
    """The one option that prose begins with, "No, it is not.", or whose text it holds, "It is a plant cell.", where it
    holds no other's and denies nothing."""
    first = re.split(r"[.,;:!\n]", text)[0][:MAX_ANSWER]
    begun = [choice for choice in choices if len(plain(choice)) > 1 and same_text(choice, first)]
    if begun:
        prose = words(text)
        others = [choice for choice in choices if choice not in begun and words(choice) in prose]
        return [] if others or re.search(r"(?i)\?|\b(?:maybe|or|hmm|wait|but)\b", text) else begun[:1]
    named = mentioned(text, choices)
    if len(named) != 1 or NEGATED.search(text) or text[-1] not in '.!*"':
        return []
    sentences = [re.sub(r"^ (?:the|an?) ", " ", words(sentence)) for sentence in re.split(r"[.!\n]", text)]
    subject = any(sentence.startswith(words(named[0])) for sentence in sentences)  # "The Moon is too small."
    return [] if subject else named


def words(text: str) -> str:
    """The words of a text, a space on both sides of each."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])


def mentioned(text: str, choices: Texts) -> list[str]:
    """The options whose text stands in a text, but those that are a part of another."""
    prose = words(text)
    found = [choice for choice in choices if re.search(r"[^\W\d]{3}", choice) and words(choice) in prose]
    return [choice for choice in found if not any(words(choice) in words(other) for other in found if other != choice)]


def boxed(text: str) -> list[tuple[int, int, str]]:
    """Every outermost \\boxed{...} whose braces balance: where it starts and ends, and what it holds."""
    found: list[tuple[int, int, str]] = []
    opened: list[re.Match] = []
    for brace in re.finditer(r"(\\f?box(?:ed)?\s*|\bboxed)?\{|\}", text):
        if brace[0] != "}":
            opened.append(brace)
        elif opened:
            opening = opened.pop()
            if opening[1]:
                found = [box for box in found[-MOST:] if box[0] < opening.start()]  # (those inside of it)
                found.append((opening.start(), brace.end(), text[opening.end():brace.start()]))
    return found


# --- the rules, by answer type ----------------------------------------------------------------------------------------

def _value(answer: str, gold: str, record: Problem) -> bool:
    """A number or a formula; of `x = 24*24 = 576` every side but the name, and the last one worked out."""
    number, parts = record.answer_type == "number", [answer] if "=" in plain(gold) else sides(answer)
    if number and UNFINISHED.search(parts[-1]):
        return False
    judged = [equal(part, gold, record.precision, nouns=number) for part in parts]
    decimals = re.fullmatch(r"-?\d*\.(\d+)", parts[-1])
    if "≈" in plain(answer) and len(parts) == 2 and decimals and any(judged):
        return equal(parts[0], parts[1], len(decimals[1]))  # 2√3 ≈ 3.46
    return all(judged)


def _text(answer: str, gold: str, record: Problem) -> bool:
    return same_text(answer, gold) or same_quantity(quantity(answer), quantity(gold), record.precision)


def _list(answer: str, gold: str, record: Problem) -> bool:
    """Item by item, in order; brackets may be left out but not swapped. So are ratios, for 12:30 is not 6:15."""
    gold_mark, gold_items = parse_items(gold) or ("", ())
    answer, *more = sides(FRACTION.sub(r"\1\2/\3", plain(answer)) if gold_mark == ":" else answer)
    mark, items = parse_items(answer.replace("/", ":") if gold_mark == ":" else answer) or ("", ())
    if more or len(items) != len(gold_items) or mark != gold_mark and (":" in mark + gold_mark or mark and gold_mark):
        return False
    return all(_text(item, gold_item, record) or equal(item, gold_item, record.precision)
               for item, gold_item in zip(items, gold_items))


def _choice(answer: str, gold: str, record: Problem) -> bool:
    wanted = chosen(gold, record.choices)
    return (chosen(answer, record.choices) if len(wanted) > 1 else {named_option(answer, record.choices)}) == wanted


RULES = {"choice": _choice, "number": _value, "list": _list, "text": _text, "math": _value}


def equal(answer: str, gold: str, precision: int | None = None, nouns: bool = False) -> bool:
    """Are two answers one text (small letters are not capital ones), one quantity, or one formula?"""
    if spaceless(answer) == spaceless(gold):
        return True
    a, g = quantity(answer, nouns), quantity(gold, nouns)
    if g and (a or "," in answer or not (MATH.search(plain(answer)) or UNFINISHED.search(answer))):
        return same_quantity(a, g, precision)
    return same_formula(answer, gold, precision)


def sides(answer: str) -> list[str]:
    """`x = 24*24 = 576` -> 24*24 and 576: the sides of an equation but names in front; each is to be right."""
    parts = [part.strip() for part in re.split(r"[=≈]|\b(?:is|are|equals)\b", plain(answer))]
    while len(parts) > 1 and NAME.fullmatch(parts[0]):
        parts = parts[1:]
    return [ABOUT.sub("", part) for part in parts]


def named_option(answer: str, choices: Texts) -> int | None:
    """The option that an answer names: by letter, by the option's text or value, or by a letter and then that text."""
    index = option_index(answer, choices)
    if index is not None:
        return index
    answer = re.sub(r"(?i)^(?:option|choice|选项) ?", "", plain(answer))
    lettered = re.fullmatch(r"[(\[]?([A-Z]|[a-z](?=[).:]))(?=\W)([)\].:,]+ ?| [-=] | ?)(\S.*)", answer)
    if not lettered:
        return next((option_index(choice, choices) for choice in only_option(answer, choices)), None)
    letter, mark, rest = lettered.groups()
    index = option_index(letter, choices)
    set_off = (len(mark) > 1 or rest[0] == "(") and not LISTED.search(rest)
    if choices and choices != tuple(ascii_uppercase[:len(choices)]) and index is not None:
        own, within = choices[index], rest[1:-1] if rest[0] + rest[-1] == "()" else rest.strip(", ")
        parts = (rest, within, re.split(r"[.,;:] |,? (?:because|since|as|which) ", within, maxsplit=1)[0])
        named = next((found for part in parts if (found := option_index(part, choices)) is not None), None)
        doubted = LISTED.search(rest) or [choice for choice in mentioned(rest, choices) if choice != own]
        restated = [word for word in words(own).split() if len(word) > 2 and f" {word} " in words(rest)]
        prose = set_off and restated and named is None and not re.search(r"\d", rest) and not NEGATED.search(rest)
        whole = same_option(rest, own) or same_option(within, own)
        return index if whole or (named == index or prose) and not doubted else None
    # The options stand where we cannot read them: the letter must be set off, and be the only one.
    alone = set_off and not re.search(r"\b[B-HJ]\b", rest) and not NEGATED.search(rest)
    return index if alone or rest.strip("()") == letter else None


def option_index(text: str, choices: Texts) -> int | None:
    """Which option a text names, by its letter alone, `(B)`, `B.` or `B**`, or by its whole text or value."""
    offered = ascii_uppercase[:len(choices)] or LETTERS
    letter = re.fullmatch(r"(?:(?i:option|choice|letter|选项) *)?[(\[{<\s]*([A-Za-z])[)\]}>.:;,!\s]*", plain(text))
    if letter and letter[1] in offered:
        return offered.index(letter[1])
    for same in (same_text, same_option):
        found = [i for i, choice in enumerate(choices) if same(text, choice)]
        if len(found) == 1 or found and same is same_text:
            return found[0]
    return offered.index(letter[1].upper()) if letter and letter[1].upper() in offered else None


def chosen(text: str, choices: Texts) -> set[int]:
    """The options that a gold names: one, see option_index, or those of a multi-select, `A, C` in any order; else none.
    Letters that touch, `AC`, are several only where the options are known: they may be a line's name."""
    index = option_index(text, choices)
    if index is not None:
        return {index}
    offered = ascii_uppercase[:len(choices)] or LETTERS
    named = re.sub(r"\band\b|[\s,;&()\[\]]+", " ", plain(text)).split()
    named = list("".join(named)) if choices else named
    several = len(named) > 1 and len(set(named)) == len(named) and all(len(letter) == 1 for letter in named)
    return {offered.index(letter) for letter in named} if several and set(named) <= set(offered) else set()


def same_option(answer: str, option: str) -> bool:
    """Is it the option's text, or its value or formula otherwise written? A ratio may be a fraction."""
    if same_text(answer, option):
        return True
    ratio, fraction = plain(option).replace(":", "/"), plain(answer).replace(":", "/")
    a, g = quantity(fraction, nouns=True), quantity(ratio, nouns=True)
    if a and g:
        return same_quantity(a, g, None)
    return bool(MATH.search(plain(option)) and MATH.search(plain(answer))) and same_formula(answer, option)


# --- the grammar of answers, one for all rules ------------------------------------------------------------------------

LISTED = re.compile(r"\b[A-J][).:]|\b(?:or|and|not) \(?(?:[A-J]|\d+)\b|(?i:\b(?:either|perhaps|maybe|possibly)\b)")
MAX_ANSWER = 1000  # characters; a longer answer is wrong unread
LETTERS = "ABCDEFGHIJ"  # what a choice may be when its options stand in the question or in the picture

FUNCTION = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|lg|exp"
SIGNS = {macro: sign for sign, *macros in map(str.split, """× times|· cdot|÷ div|± pm|≤ leq le leqslant|≥ geq ge
    |≠ neq ne|≈ approx|∞ infty|∠ angle|△ triangle|° circ degree degrees|∪ cup|∩ cap|∈ in|⊥ perp|∥ parallel|≅ cong|√ sqrt
    |⊙ odot|α alpha|β beta|γ gamma|δ delta|ε epsilon|θ theta|λ lambda|μ mu|ρ rho|σ sigma|φ phi|ω omega|π pi|Δ Delta
    |Ω Omega|\\frac dfrac tfrac cfrac|\\text mathrm textbf mathbf textrm textit mathit mbox underline operatorname
    """.split("|")) for macro in macros}  # LaTeX's names -> the sign that stands for them here
SIGNS |= dict.fromkeys("left right displaystyle textstyle big Big bigl bigr Bigl Bigr rm bf therefore".split(), "")
SIGNS |= {name: f" {name} " for name in FUNCTION.split("|")}
MACROS = str.maketrans({sign: rf"\{macro} " for macro, sign in reversed(SIGNS.items()) if len(sign) == 1})
LOOKALIKES = str.maketrans("−–—‐‑⋅∙⁄∕∶：⩽⩾“”’‘。．、，◦º˚（）【】", "-----··//::≤≥\"\"''..,,°°°()[]", "✓✔✅∎")
UNICODE = (  # what NFKC would make ambiguous
    (r"\x0c", r"\\f"), ("([⁰¹²³⁴-⁹⁺⁻ⁿ]+)", r"^{\1}"), ("([₀-₉]+)", r"_{\1}"), (r"(\d)([¼-¾⅐-⅞])", r"\1 \2"))
SPELLINGS = (  # LaTeX and markdown -> plain text, in order
    (r"(?<![\w)}])\*\*(?!\s)([^*\n]+)\*\*(?![\w({])", r"\1"), (r"(?<=[\w)}])\*\*(?=[\w({])", "^"), (r"\*\*|`|^#+", ""),
    (r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3}(?!\d))", ","), (r"\\[,;:! >]|\\q?quad|~", " "), (r"\\([%&#$_{}]|$)", r"\1"),
    (r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1"), (r"\{\s*\}|\\(?:text)?color *\{\w+\}", ""),
    (r"(?i)\btriangle (?=[A-Z]{3})|Δ(?=[A-Z]{3})", "△"), (r"(?i)\bangle (?=[A-Z\d])", "∠"),
    (r"([∠△]) *\{([A-Z]+)\}", r"\1\2"), (r"(?<=[A-Z]) ?// ?(?=[A-Z])", "∥"),
    (r" ?(?:\* ?)?(?:\^ ?\{? ?[°o] ?\}?(?![a-z])|\{degrees?\}|°)", "°"), (r"° ?(?=[CF]\b)", "°"),
    (r"(?i)(?:degrees? |°)(celsius|fahrenheit)", r" \1"), (r"(?i)\bper cent\b", "%"),
    (r"(?i)(?:(?<![A-Za-z])(?:square |sq\. ?|sq )|平方)([^\W\d_]+)", r" \1^{2}"), (r"(?<=[a-z]{2}) squared\b", "^{2}"),
    (r"(?i)(?:\bcubic |立方)([^\W\d_]+)", r" \1^{3}"), (r"(?<=[a-z]{2}) cubed\b", "^{3}"),
    (r"(?<=\d) ?\{ ?([A-Za-z]{2,}) ?\}", r" \1"), (r"(?<=\d)E(?=[+-]?\d)", "e"),
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"), (r"\\frac\s*([^\s{])", r"\\frac{\1}"),
    (r"(\\frac\s*\{(?:[^{}]|\{[^{}]*\})*\})\s*([^\s{])", r"\1{\2}"), (r"(?<![A-Za-z])sqrt(?![A-Za-z])", "√"),
    (r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))", r"√{\1\2}"), (r"√\s+(?=\{)", "√"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", "π"), (r" ?\^ ?(?:\(([^()]*)\)|(-?\d+(?:\.\d+)?|-?[A-Za-z]))", r"^{\1\2}"),
    (r"\s*_\s*(\w)", r"_{\1}"), (r"(\d)\s*[×·*x]\s*10\s*\^\{\s*([+-]?\d+)\s*\}", r"\1e\2"), ("<=", "≤"),
    (">=", "≥"), ("!=", "≠"), (r"^(?:negative|minus) (?=\d)", "-"), (r"\s+", " "),
    (rf"^ ?(?!{FUNCTION}|[^=]*\b(?:not?|or|is|if|that|wrong)\b)"  # the label of `Area = 12`, `Total S.A. = 12`
     r"(?:[A-Za-z. ]*(?:[a-z]{3}|[A-Z]\.)[A-Za-z. ]*)?[=≈] ?", ""))
AS_LATEX = (  # a plain formula -> as math-verify reads it; then come the SIGNS
    (r"(?<=\d)e([+-]?\d+)", r" \\times 10^{\1}"),
    (r"(\d+)(?: (\d+)/(\d+)| *\\frac\{(\d+)\}\{(\d+)\})", r"(\1+\\frac{\2\4}{\3\5})"),  # 2 1/3
    (r"(\d+)/(\d+) (?=[A-Za-zπ√])", r"\\frac{\1}{\2}"), (rf"(?<!\\)({FUNCTION})", r"\\\1 "),
    ("°", r"\\frac{\\pi}{180}"), (r"^\{(.*)\}$", r"\\{\1\\}"), (r"\*", r" \\cdot "))

UNFINISHED = re.compile(r"[\d)]\s*[+*×·÷-]\s*[\d(]|/\s*\d+\s*/")  # 3*4 is no answer, 3*4 = 12 is
ABOUT = re.compile(r"(?i)(?:equal to|approximately|approx\.?|about|around|roughly|exactly) ")
NAME = re.compile(r"(?!.*\b(?:or|not?|and|whether|if|wrong|doubt|question)\b)(?:(?=[^\W\d]|[∠△|\\])"  # the x of x = 12
                  r"(?:[^\W\d]|\(\w+\)|_\{[^{}]*\}|\\\w+ *\{[^{}\d]*\}|∠ *\d+|[\s∠△|+/·'-])*)?")
MATH = re.compile(rf"""[\\^_=+*<>{{}}\[\]|√π∞≤≥≠≈×÷·±∠△∪∩∈]|[a-z\d]!|(?<![A-Za-z])\d[a-zA-Zα-ω]\b
    |\d(?!st|nd|rd|th|am|pm)[a-z]{{2,3}}\b|\b[a-z]\s*-\s*(?:\d|[a-z]\b)|\d\s*-\s*[a-z]\b|\b[a-z]\(|\b[a-z]{{1,2}}/[a-z\d]{{1,2}}\b|\d/[a-z]\b
    |\b(?:{FUNCTION})\b""", re.VERBOSE)  # signs that a text is a formula
GEOMETRY = re.compile(r"[∠△⊙∥⊥≅]|\\(?:over\w+|vec|widehat)|[A-Z]{3}")  # names, of which no letter may change its place

# Units: names, then what they are in units above, if anything. LONG take the prefixes; of the short only those here.
PREFIXES = {"": "1", "kilo 千": "1000", "centi 厘": ".01", "milli 毫": ".001", "deci 分": ".1", "mega": "1e6",
            "giga": "1e9", "micro 微": "1e-6", "nano": "1e-9"}
LONG = set("meter metre 米 gram gramme 克 second liter litre 升 newton joule watt pascal hertz volt ampere".split())
UNIT_TABLE = """m meter metre 米|g gram gramme 克|s sec second 秒|km 公里=1000 m|dm=.1 m|cm=.01 m|mm=.001 m
    μm um=.001 mm|nm=.001 μm|kg 公斤=1000 g|mg=.001 g|min minute 分钟=60 s|h hr hour 小时=60 min|day 天=24 h
    week 周=7 day|month|year yr 年=12 month|inch in inches 英寸=.0254 m|ft foot feet 英尺=12 inch|yd yard=3 ft
    mile mi=1760 yd|海里 nmi=1852 m|L l liter litre 升=.001 m^{3}|ml mL=.001 L|cl cL=.01 L|dl dL=.1 L|gallon gal
    hectare ha=10000 m^{2}|acre=4840 yd^{2}|tonne ton 吨=1000 kg|pound lb|oz ounce|° degree deg 度|rad radian
    °C celsius|°F fahrenheit|K kelvin|N newton=1 kg·m/s^{2}|kN=1000 N|J joule=1 N·m|kJ=1000 J|MJ=1000 kJ
    W watt=1 J/s|kW kw=1000 W|MW=1000 kW|mW=.001 W|Wh|kWh kwh=1000 Wh|byte|Pa pascal=1 N/m^{2}|kPa=1000 Pa
    MPa=1000 kPa|GPa=1000 MPa|Hz hertz|kHz=1000 Hz|MHz=1000 kHz|GHz=1000 MHz|V volt|mV=.001 V|kV=1000 V|H henry
    A amp ampere|mA=.001 A|μA=.001 mA|C coulomb|μC=.000001 C|nC=.001 μC|F farad|μF=.000001 F|nF=.001 μF|atm|bar
    Ω ohm|pF=.001 nF|kΩ=1000 Ω|mH=.001 H|mol mole|mmol=.001 mol|cal calorie|kcal=1000 cal|eV|keV=1000 eV
    MeV=1000 keV|T tesla|ms=.001 s|mph=.44704 m/s|kmh kph kmph=1 km/h|% percent|$ dollar usd 美元|€ euro|£ gbp
    ¥ yuan yen rmb 元|cent ¢=.01 $"""
NEUTRAL = frozenset("unit units total long tall wide high deep each altogether 个 只 人 次 件 本 张 块 条".split())
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
NOT_UNITS = re.compile(rf"""(?ix)and|but|not|nor|than|plus|minus|times|over|out|root|squared?|cubed?|factorial|point
    |negative|below|above|under|without|less|more|fewer|never|wrong|maybe|perhaps|assuming|if|percent|halved|doubled|.*分之.*
    |neither|none|false|incorrect|impossible|inverse|reciprocal|twice|tripled|\w+fold|ppm|basis|或者.*|{FUNCTION}|(?:co)?sine|alpha|beta|gross|possibly|too|off|etc
    |tens|hundreds?|thousands?|\w+illion\w*|mln|bln|mrd|dozens?|couples?|pairs?|score|grand|lakhs?|crores?|hal(?:f|ves)
    |thirds?|quarters?|{"|".join(NUMBER_WORDS)}|\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty
    |(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand|million)ths?""")
DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
NUMBER = re.compile(rf"""([+-]?)\s*([$€£¥]?)\s*(?:(?:([0-9]+)\s+)?({DECIMAL})\s*/\s*(-?{DECIMAL})   # 7/3, 2 1/3
    |((?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]*)?|{DECIMAL})(?:e[+-]?[0-9]{{1,3}})?))            # 1,234.5e-8
    (\s*)([^0-9\s].*)?""", re.VERBOSE | re.DOTALL)                                             # its unit
FRACTION = re.compile(rf"(-?)\\frac\s*\{{\s*(-?{DECIMAL})\s*\}}\s*\{{\s*(-?{DECIMAL})\s*\}}")
UNIT = re.compile(r"(/|\bper\b)|(°[CF]?|[%$€£¥]|[^\W\d_]+)(?:\^?\{?(-?[1-4])\}?)?|[\s·.*-]+")
Dimensions = tuple[tuple[str, int], ...]  # (("m", 1), ("s", -1)); () is no unit
THINGS: Dimensions = (("things", 1),)  # any nouns
Unit = tuple[Fraction, Dimensions]  # its size, in what the dimensions name
Quantity = tuple[Fraction, Fraction, Dimensions]  # the number, its unit's size, its unit's dimensions


def respelt(text: str, spellings: Iterable[tuple[str, str]]) -> str:
    for pattern, form in spellings:
        text = re.sub(pattern, form, text)
    return text


@lru_cache(20_000)
def plain(text: str) -> str:
    """An answer in its one spelling, without the LaTeX, markdown and unicode it may be dressed in, its formulas in
    LaTeX with unicode signs: `$\\dfrac12 \\mathrm{~cm}^2$` -> `\\frac{1}{2} cm^{2}`, `2*sqrt(3)` -> `2*√{3}`."""
    text = unicodedata.normalize("NFKC", respelt(text, UNICODE).translate(LOOKALIKES))
    text = " ".join(text.translate(LOOKALIKES).split())
    while boxes := boxed(text):
        start, end, inside = boxes[-1]
        text = f"{text[:start]} {inside} {text[end:]}"
    text = re.sub(r"\\[()\[\]]", "$", text).replace("\\boxed{", "")  # (one that is cut off)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # (else it is a currency)
        text = re.sub(r"(?<!\\)\$", "", re.sub(r"(?<=[^\s$])\$\s+\$(?=[^\s$])", " ; ", text))  # ;: several formulas
    text = re.sub(r"\\([A-Za-z]+) *", lambda macro: SIGNS.get(macro[1], macro[0]), text)
    text = respelt(text, SPELLINGS).strip(" *").rstrip(".,;").strip()
    return text[1:-1].strip() if re.fullmatch(r"\{(?:[^{},]|\{[^{}]*\})*\}", text) else text


def spaceless(text: str) -> str:
    """`S 23.5 ^\\circ W` is S23.5°W, 1 2 is not 12."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"_\{(\w+)\}(?!\d)", r"\1", plain(text)))


def same_text(answer: str, gold: str) -> bool:
    """Are they one text, but for case, spaces, punctuation around and articles?"""
    same_case = spaceless(answer).casefold() == spaceless(gold).casefold()
    return same_case or normal_text(answer) == normal_text(gold)


def normal_text(text: str) -> str:
    """What two texts are compared by. A capital A in front may be an option's letter."""
    return spaceless(re.sub(r"^(?:a|[Aa]n|[Tt]he) ", "", plain(text))).casefold().strip(".,;:!?\"'")


def quantity(text: str, nouns: bool = False) -> Quantity | None:
    """`$1,234.5 cm^2$` -> 1234.5, 1/10000, (("m", 2),); None where it is anything but one number and perhaps its unit.

    nouns: what stands there for a unit may be any words of a noun's length ("3 red cars")."""
    if len(text) > MAX_ANSWER:
        return None
    text = FRACTION.sub(r" \1\2/\3", plain(text)).strip()
    text = text[1:-1] if text[:1] + text[-1:] == "()" and "," not in text else text
    first, _, rest = text.partition(" ")
    match = NUMBER.fullmatch(f"{NUMBER_WORDS.index(first.lower())} {rest}" if first.lower() in NUMBER_WORDS else text)
    if not match:
        return None
    sign, currency, whole, top, bottom, digits, space, after = match.groups()
    spaced = bool(space or currency)
    attached = not spaced and len(digits or "") < 2  # 500g is no variable
    unit = read_unit(currency or after or "", nouns and (spaced or not (after or "").isascii()), attached)
    if unit is None or currency and after or bottom and not Fraction(bottom):
        return None
    value = Fraction(top) / Fraction(bottom) + int(whole or 0) if top else Fraction(digits.replace(",", ""))
    return -value if sign == "-" else value, *unit


def read_unit(text: str, nouns: bool = False, attached: bool = False) -> Unit | None:
    """A unit's size and dimensions, of products and powers of units; size 1 and () for none; None: it is no unit.

    nouns: any words of a noun's length are one. attached: it stands at its number without a space.
    Where letters may as well be variables, they are: 3s, 6 s^2, 4 l h, mn^2."""
    size, powers, noun, sign, above = Fraction(1), Counter[str](), False, 1, 0
    if UNIT.sub("", text):
        return None
    for per, name, exponent in UNIT.findall(text):
        known = unit_named(name)
        if per:
            sign = -1
        elif known:
            power, sign = sign * int(exponent or 1), 1
            above += power > 0
            variable = name in set("sghl") and attached or power > 1 and known[1][0][0] != "m"
            if variable or above > 1 and not re.search("[·*-]|[a-z]{2}", text):
                return None
            size *= known[0] ** power
            powers.update({base: power * n for base, n in known[1]})
        elif name and name not in NEUTRAL:
            if not nouns or NOT_UNITS.fullmatch(name) or len(name) < 3:
                return None
            noun = True
    dimensions = tuple(sorted((base, n) for base, n in powers.items() if n))
    return size, dimensions or (THINGS if noun else ())


def unit_named(name: str) -> Unit | None:
    """A unit by its name, in singular or plural; of three letters and more in capitals or small ones."""
    small = name.lower() if len(name) > 2 else name
    return UNITS.get(name) or UNITS.get(small) or (UNITS.get(small[:-1]) if small[2:] and small[-1] == "s" else None)


UNITS: dict[str, Unit] = {}  # by name: its size and dimensions


def _fill_units() -> None:
    for entry in UNIT_TABLE.replace("\n", "|").split("|"):
        names, _, definition = entry.partition("=")
        factor, _, base = definition.partition(" ")
        size, dimensions = read_unit(base) or (Fraction(1), ())
        for name in names.split():
            for prefixes, scale in PREFIXES.items():
                for prefix in (prefixes.split() or [""]) if name in LONG or not prefixes else ():
                    unit = size * Fraction(factor or 1) * Fraction(scale), dimensions or ((names.split()[0], 1),)
                    UNITS[prefix + name] = unit
    UNITS.update({name.lower(): unit for name, unit in UNITS.items() if len(name) > 2})


_fill_units()


def same_quantity(answer: Quantity | None, gold: Quantity | None, precision: int | None) -> bool:
    """Are they equal, to so many decimals if given? A unit left out is overlooked, one that contradicts is wrong."""
    if answer is None or gold is None:
        return False
    (a, a_size, a_unit), (g, g_size, g_unit) = answer, gold
    if a_unit and g_unit:
        if a_unit != g_unit:
            return False
        a *= a_size / g_size
    values = [a]
    if (("%", 1),) in (a_unit, g_unit) and a_unit != g_unit:  # 50% is 50, and is 0.5
        values.append(a / 100 if a_unit else a * 100)
    if precision is not None:
        return any(round(value, precision) == round(g, precision) for value in values)
    decimal = any(10**300 % value.denominator == 0 for value in (a, g))  # .333333 is 1/3, .33 is not; 1/3 is no other
    tolerance = min(Fraction(1), abs(g)) / 500_000 if decimal else 0
    return any(abs(value - g) <= tolerance for value in values)


def parse_number(text: str) -> float | None:
    """The number that a text is: `-.5`, `- 3`, `1,234`, `4.9e-8`, `7/3`, `145°`, `12 cm`, `50%` (as 50); else None."""
    found = quantity(text)
    return float(found[0]) if found and abs(found[0]) < 10**308 else None


def parse_items(text: str) -> tuple[str, Texts] | None:
    """`[2013, 2014]`, `(1, 2)`, `1, 2`, `1:2` -> its mark (the bracket, "" or ":") and its items; else None."""
    text = plain(text)
    if ":" in text:
        items = tuple(item.strip() for item in text.split(":"))
        return (":", items) if all(quantity(item) for item in items) else None
    mark = text[0] if text[:1] + text[-1:] in ("[]", "()") else ""
    inner = re.sub(r",?\s+and\s+", ", ", text[1:-1] if mark else text)
    items = tuple(item.strip(" '\"") for item in inner.split(","))
    listed = all(items) and not re.search(r"[\[\]()]", inner) and (len(items) > 1 or mark == "[")
    return (mark, items) if listed else None


def infer_answer_type(golds: Texts, choices: Texts) -> str:
    """The answer type of all accepted answers together; text takes in mixtures such as 12 and twelve."""
    if choices:
        return "choice"
    kinds = set()
    for gold in map(plain, golds):
        items = parse_items(gold)
        if re.fullmatch(r"[(\[]*[A-J][)\].:]*", gold):
            kinds.add("choice")  # its options stand in the question (SceMQA, MathVerse) or in the picture
        elif quantity(gold) and gold.lower() not in NUMBER_WORDS:
            kinds.add("number")
        elif items and all(quantity(item) or items[0] == "[" and not MATH.search(item) for item in items[1]):
            kinds.add("list")
        else:
            kinds.add("math" if MATH.search(gold) else "text")
    return kinds.pop() if len(kinds) == 1 else "math" if "math" in kinds else "text"


# --- golds ------------------------------------------------------------------------------------------------------------

def read_gold(answer: Any, choices: Iterable, kind: str = "") -> tuple[str | Texts, Texts, str]:
    """A gold and its options as data has them -> (gold, or all accepted ones; options; answer type, inferred if empty).

    Raises ValueError that says why no rule could judge by it. (Whether math-verify can: gold_fault, for that is slow.)
    """
    if isinstance(answer, dict):
        raise ValueError("its answer is an object; write a text, a number, or a list of which any is right")
    several = isinstance(answer, (list, tuple))
    if several and len(answer) > 1 and all(type(gold) in (int, float) for gold in answer):
        answer, several = str(list(answer)), False  # a list of numbers, such as a box, is one answer
    golds = tuple("" if gold is None else str(gold) for gold in (answer if several else [answer]))
    if not golds or not all(plain(gold) for gold in golds):
        raise ValueError(f"its answer is empty: {answer!r}")
    options = tuple(str(choice) for choice in choices)
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"it has {len(options)} choices, more than there are letters")
    kind = kind or infer_answer_type(golds, options)
    if kind not in RULES:
        raise ValueError(f"answer type {kind!r} is none of {', '.join(RULES)}")
    can_be_read, unread = READS[kind]
    for gold in golds:
        if not can_be_read(gold, options):
            raise ValueError(f"its answer {gold[:80]!r} {unread.format(list(options) or LETTERS)}")
        if kind != "choice" and len(gold) > MAX_ANSWER:
            raise ValueError(f"its answer is {len(gold)} characters long; no rule can judge more than {MAX_ANSWER}")
    return golds if several else golds[0], options, kind


READS = {  # can a gold of this type be read? And what it is where it cannot
    "choice": (lambda gold, options: bool(chosen(gold, options)), "names none of the options {}"),
    "number": (lambda gold, _: parse_number(gold) is not None, "is no number"),
    "list": (lambda gold, _: parse_items(gold) is not None, "is no list, tuple or ratio"),
    "text": (lambda gold, _: normal_text(gold) != "", "holds nothing but punctuation"), "math": (lambda *_: True, "")}


def gold_fault(record: Problem) -> str | None:
    """Why a gold that read_gold took does not even judge its own text right (a formula that math-verify cannot parse);
    None: all do."""
    for gold in record.golds:
        formula = record.answer_type == "math" and not GEOMETRY.search(plain(gold))
        if not (same_formula(gold, gold) if formula else RULES[record.answer_type](gold, gold, record)):
            why = "math-verify cannot read" if formula else "no rule reads"
            return f"record {record.id}: {why} its answer {gold!r}; is it a text?"
    return None


# --- math-verify ------------------------------------------------------------------------------------------------------

# What sympy would compute for minutes: towers of powers, huge powers and factorials, deep nesting.
ENDLESS = re.compile(r"\^[\s{(]*-?\d{5,}|(?:\^[\s{(]*\d+[\s})]*){2,}|\d{3,}[\s})]*!|![\s})]*!|(?:[({\[]\s*){8}"
                     r"|\)\^\{\d{3}|binom\{\d{3}|-{4}")
AMBIGUOUS = re.compile(r";|\\text|\d_|\d\s+\d|[\d)]\s+\\frac\{\d+\}\{\d+\}\s*\d|\\[(\[]")  # several formulas, or none
BODY = re.compile(r"((?:\\frac|[\d\s.,{}()\[\]+\-*/^×·÷π√±e]|°(?![CF]))*?[\d)}π])\s*((?:°[CF]?|[%$€£¥]|[^\W\d_π]).*)")
WORDED = re.compile(r"(.+\S)\s([A-Za-z]{2,}(?:\^\{[1-3]\})?)")  # 2x cm


def measured(text: str) -> tuple[str, tuple]:
    """`12√{2} cm` -> 12√{2} and its unit. Beside variables a letter is no unit: `\\frac{1}{2} b h`."""
    for pattern in (BODY, WORDED):
        if (match := pattern.fullmatch(text)) and (unit := read_unit(match[2], attached=True)):
            return match[1], unit if unit[1] else ()
    return text, ()


def same_formula(answer: str, gold: str, precision: int | None = None) -> bool:
    """Are two formulas equal? What math-verify would misread is settled before it is asked: units, names of angles,
    words, several formulas; and other letters than the gold's."""
    (a, a_unit), (g, g_unit) = [measured(re.sub(r",? and ", ", ", plain(text))) for text in (answer, gold)]
    contradicts = a_unit != g_unit and (a_unit and g_unit or re.search("[°%]", f"{a_unit} {g_unit}"))
    relations = ("=", "'", "≠", "[<>]", "[≤≥]")
    if contradicts or any(len(re.findall(sign, a)) > len(re.findall(sign, g)) for sign in relations):
        return False
    misread = any(pattern.search(a) for pattern in (ENDLESS, AMBIGUOUS, GEOMETRY))
    if misread or not a or not letters(a) <= letters(g) | {"e", "i"}:
        return False
    return VERIFIER(latex(g), latex(a), precision)


def letters(formula: str) -> set[str]:
    """The variables of a plain formula."""
    return set(re.findall(r"[^\W\d_]", re.sub(rf"\\[A-Za-z]+|{FUNCTION}|(?<=\d)e(?=[+-]?\d)|π", "", formula)))


def latex(formula: str) -> str:
    """A plain formula as math-verify reads it."""
    return " ".join(respelt(formula, AS_LATEX).translate(MACROS).replace(r"\sqrt ", r"\sqrt").split())


class Verifier:
    """Asks math-verify, in worker processes of which pebble kills those that take longer than `timeout` seconds.

    math-verify's own time-out is SIGALRM, which raises in every thread but the main one, and a sympy that hangs
    cannot be stopped from a thread. The workers start at the first question: a run without math golds never pays."""

    def __init__(self, timeout: float = 5.0, memory: int = 1 << 30, workers: int = 0):
        """memory: bytes that a worker may take beyond its imports. workers: 0 for 2 to 8, by the cores of a rank."""
        self.timeout, self.memory = timeout, memory
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.workers = workers or max(2, min(8, cores))
        self.timeouts = 0  # for the log
        self._asked = lru_cache(10_000)(self._ask)  # the answers of a group repeat themselves
        self._pool: ProcessPool | None = None
        self._starting = threading.Lock()

    def __call__(self, gold: str, answer: str, precision: int | None = None) -> bool:
        """Does the answer equal the gold, to so many decimals if given?

        False too when one cannot be parsed, takes too long, or takes too much memory. May be asked from many threads.
        """
        return self._asked(gold, answer, precision)

    def close(self) -> None:
        """End the workers; the next question starts others."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _ask(self, gold: str, answer: str, precision: int | None) -> bool:
        cause: Exception | None = None
        for _ in range(3):
            try:
                pool = self._running()
                asked = pool.schedule(_verify, args=[gold, answer, precision, self.timeout], timeout=self.timeout)
                while not wait([asked], timeout=1).done:
                    if not pool.active:  # it broke while the question was on its way, and will never answer
                        raise BrokenProcessPool
                return asked.result()
            except TimeoutError:
                self.timeouts += 1
                return False
            except ProcessExpired as death:  # over this answer, or by a SIGTERM that a cluster sends to all processes
                if abs(death.exitcode) not in (signal.SIGTERM, 255):  # of a job (255: to the one who forks as well),
                    return False  # which says nothing of the answer: ask again
            except (BrokenProcessPool, RuntimeError) as error:  # a worker was killed between two questions: no pool
                cause = error
        raise RuntimeError("the math-verify workers do not start, or are killed (see above): is math-verify installed, "
                           'and does the program start under `if __name__ == "__main__":`?') from cause

    def _running(self) -> ProcessPool:
        with self._starting:
            if self._pool is None or not self._pool.active:
                context = get_context("forkserver")  # (a plain fork would copy CUDA's state, and locks)
                # What workers import, the program's other files too, is imported once: heirs of killed ones need not.
                ours = [name for name, module in sys.modules.copy().items() if name != "__main__" and
                        Path(getattr(module, "__file__", None) or "/").parent == Path(__file__).parent]
                context.set_forkserver_preload([*ours, "math_verify"])
                self._pool = ProcessPool(self.workers, initializer=_start_worker, initargs=[self.memory],
                                         context=context)
            return self._pool


def _start_worker(memory: int) -> None:
    import resource

    logging.disable(logging.CRITICAL)  # math-verify warns at length that its own time-outs are off
    _verify("1", "1", None, 60)  # the first call loads its grammar
    with contextlib.suppress(OSError, ValueError):  # no /proc on macOS, or a lower limit: the time-out alone must do
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))


def _verify(gold: str, answer: str, precision: int | None, timeout: float) -> bool:
    """In a worker: does math-verify find the two equal?

    Parsed by its own parser, but with letters as they are (it reads R^2 - r^2 as 0) and none taken for a unit (2ab as
    2). Numbers are compared here: it takes 3/10^20 and 4/10^20 for equal."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify import verify
    from sympy import Eq, Expr, FiniteSet

    def read(text: str) -> Any:
        return latex2sympy(text, normalization_config=NormalizationConfig(boxed="none"),
                           conversion_config=ConversionConfig(lowercase_symbols=False))

    signal.alarm(math.ceil(timeout) + 5)  # should the parent die meanwhile, nobody else would end a hung sympy
    try:
        g, a = read(gold), read(answer)
        if a == g:
            return True
        if isinstance(a, Expr) and isinstance(g, Expr) and not a.free_symbols | g.free_symbols:
            difference, size = abs((a - g).evalf(30, maxn=400)), abs(g.evalf(30, maxn=400))
            return bool(difference <= (10**-precision / 2 if precision is not None else min(1, size) / 500_000))
        sets = {isinstance(part, FiniteSet) for part in (a, g) if not isinstance(part, Eq)}  # none is an interval
        return len(sets) < 2 and bool(verify([g], [a], timeout_seconds=None))
    except Exception:  # sympy raises all there is, MemoryError and RecursionError among them
        return False
    finally:
        signal.alarm(0)


VERIFIER = Verifier()  # the one global: workers are dear, so all that judge share them. Its .timeouts go to the log.
