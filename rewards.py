"""What a response is worth: its format, its answer, its length, and what follows for the group it belongs to.

    format_reward       are the tags there, in order, each once?
    extract_answer      what the response gives as its answer
    answer_matches      the one judge of answers, for training and evaluation alike
    group_rewards       all of it, for P prompts of G judged responses each -> Rewards, with the weighted advantages

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

import logging
import math
import multiprocessing
import re
import signal
import threading
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase

import torch

from data import (
    MAX_ANSWER,
    SYMBOLS,
    Dropped,
    Record,
    last_boxed,
    normal_text,
    option_index,
    parse_items,
    plain,
    settle,
    split_number,
    unwrap,
)

# --- format ----------------------------------------------------------------------------------------------------------

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


def observation_accuracy(text: str, record: Record, style: str) -> float | None:
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


# --- reading an answer -----------------------------------------------------------------------------------------------

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


def bare(answer: str, record: Record) -> str:
    """An answer without what judging overlooks: a "the answer is" and, where the rule does, the "x =" of "x = 12"."""
    answer = _after(PHRASE, plain(answer))
    formula = record.answer_type == "math" and not any("=" in gold for gold in record.golds)
    return _after(ASSIGNED, answer) if formula or record.answer_type in ("number", "list") else answer


# --- judging an answer -----------------------------------------------------------------------------------------------


def answer_matches(answer: str, record: Record) -> bool:
    """Is what extract_answer found right? The one judge, by the rule of the record's answer type.

    Every rule reads an answer whole or not at all, so hedges are wrong: "A or B", all options listed, "not A".
    """
    if len(answer) > MAX_ANSWER:
        return False
    rule = RULES[record.answer_type]
    forms = {answer, _after(PHRASE, plain(answer))}  # "The answer is B" is B
    return any(rule(form, gold, record) for form in forms for gold in record.golds)


def accuracy_reward(text: str, record: Record) -> float:
    """1.0 when the response's answer is right, else 0.0."""
    answer = extract_answer(text)
    return float(answer is not None and answer_matches(answer, record))


@dataclass(frozen=True)
class Score:
    """What one response is worth by itself."""

    answer: str | None  # as extracted; None: unreadable, and so wrong
    accuracy: float  # 1 or 0
    format: float  # 1 or 0
    observation: float | None  # see observation_accuracy


def score(text: str, record: Record, style: str) -> Score:
    """Score one response to a record in a prompt style, for training and evaluation alike."""
    return Score(extract_answer(text), accuracy_reward(text, record), format_reward(text, style),
                 observation_accuracy(text, record, style))


def check_golds(records: list[Record], skip_bad: bool = False) -> list[Record]:
    """Parse each math gold once, when a run or a build starts -> the records whose golds can be read.

    Raises one ValueError for all the others; skip_bad drops and prints them instead.
    """
    good, bad = [], []
    for record in records:
        unread = [gold for gold in record.golds if record.answer_type == "math"
                  and not VERIFIER(_latex(gold, dirty=True), None)]
        if unread:
            bad.append(f"record {record.id}: math-verify cannot read its answer {unread[0]!r}; is it a text?")
        else:
            good.append(record)
    return settle("golds", good, bad, skip_bad)


def judged(item: Record | Dropped) -> Record | Dropped:
    """The record, or why no rule can read its gold."""
    try:
        return item if isinstance(item, Dropped) else check_golds([item])[0]
    except ValueError as error:
        return Dropped(item.id, "unverifiable", str(error).split("\n")[1].strip(), item.images, item.meta)


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


def _number(answer: str, gold: str, record: Record) -> bool:
    answer = _after(ASSIGNED, plain(answer))
    return _same_number(split_number(answer, False), split_number(gold, False), record.precision)


def _text(answer: str, gold: str, record: Record) -> bool:
    def spaceless(text: str) -> str:
        return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", normal_text(text))  # `S 23.5 ^\circ W` is S 23.5° W, 1 2 is not 12

    return (spaceless(answer) == spaceless(gold)
            or _same_number(split_number(answer), split_number(gold), record.precision))


def _list(answer: str, gold: str, record: Record) -> bool:
    """Item by item, in order; brackets may be left out but not swapped. So are ratios, for 12:30 is not 6:15."""
    gold_mark, gold_items = parse_items(gold)
    answer = _after(ASSIGNED, plain(answer))
    mark, items = parse_items(answer.replace("/", ":") if gold_mark == ":" else answer) or ("", ())
    if len(items) != len(gold_items) or mark != gold_mark and (":" in mark + gold_mark or mark and gold_mark):
        return False
    return all(_text(item, gold_item, record) for item, gold_item in zip(items, gold_items))


def _choice(answer: str, gold: str, record: Record) -> bool:
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


def _math(answer: str, gold: str, record: Record) -> bool:
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


# --- math-verify, in a process that can be killed --------------------------------------------------------------------


class Verifier:
    """Asks math-verify, in a worker process that is killed when it takes longer than `timeout` seconds.

    math-verify's own time-out is SIGALRM, which raises in every thread but the main one, and a sympy that hangs
    cannot be stopped from a thread. The worker starts at the first question, so a run without math golds never pays.
    """

    def __init__(self, timeout: float = 5.0, memory: int = 1 << 30):
        """memory: bytes that the worker may take beyond what its imports took."""
        self.timeout, self.memory = timeout, memory
        self.timeouts = 0  # for the log
        self._asked = lru_cache(10_000)(self._ask)  # the answers of a group repeat themselves
        self._process = self._pipe = None
        self._lock = threading.Lock()

    def __call__(self, gold: str, answer: str | None) -> bool:
        """Does the answer equal the gold? answer None: can the gold be parsed?

        False too when it cannot be parsed, takes too long, or takes too much memory.
        """
        with self._lock:
            return self._asked(gold, answer)

    def close(self) -> None:
        """End the worker; the next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = self._pipe = None

    def _ask(self, gold: str, answer: str | None) -> bool:
        for _ in range(2):
            try:
                if self._process is None or not self._process.is_alive():
                    self._start()
                try:
                    self._pipe.send((gold, answer))
                    if self._pipe.poll(self.timeout):
                        return self._pipe.recv()
                    self.timeouts += 1
                    break
                except (EOFError, OSError):  # the worker died: over this answer, or by a SIGTERM that a cluster sends
                    self._process.join(5)  # to all processes of a job, which says nothing of the answer: ask again
                    if self._process.exitcode != -signal.SIGTERM:
                        break
            except BaseException:  # Ctrl-C: an answer left in the pipe would be taken for that to the next question
                self.close()
                raise
        self.close()
        return False

    def _start(self) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")  # a fork would copy CUDA's state and other threads' locks
        pipe, end = context.Pipe()
        process = context.Process(target=_work, args=(end, self.timeout, self.memory), daemon=True)
        process.start()
        self._process, self._pipe = process, pipe
        end.close()  # the worker's end is the worker's alone: its death is then seen as EOF
        try:
            ready = self._pipe.poll(120) and self._pipe.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.close()
            raise RuntimeError("the math-verify worker did not start (see above): is math-verify installed, and does "
                               'the program start under `if __name__ == "__main__":`?')


def _work(pipe, timeout: float, memory: int) -> None:
    """The worker: (gold, answer) in, verdict out; answer None asks whether the gold can be parsed."""
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # math-verify warns at length that its own time-outs are off
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    config = [LatexExtractionConfig(boxed_match_priority=-1)]

    def read(text: str) -> list:  # one formula, whole: no search for formulas in prose, no fallback to strings
        return parse(f"${text}$", config, fallback_mode="no_fallback", extraction_mode="first_match",
                     parsing_timeout=None)

    read("1")  # the first call loads its grammar
    try:
        with open("/proc/self/statm") as pages:
            taken = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    except (OSError, ValueError):
        pass  # no /proc on macOS, or a limit of the system's own that is lower: the time-out alone must do
    pipe.send(True)
    while True:
        try:
            gold, answer = pipe.recv()
        except EOFError:
            return
        signal.alarm(math.ceil(timeout) + 5)  # should the parent die meanwhile, nobody else would end a hung sympy
        try:
            gold = read(gold)
            verdict = bool(gold) if answer is None else bool(gold and verify(gold, read(answer), timeout_seconds=None))
        except Exception:  # sympy raises all there is, MemoryError and RecursionError among them
            verdict = False
        signal.alarm(0)
        pipe.send(verdict)


VERIFIER = Verifier()  # the one global: a worker is dear, so all that judge share one. Its .timeouts go to the log.


# --- groups ----------------------------------------------------------------------------------------------------------


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


def group_advantages(rewards: torch.Tensor, normalize_std: bool = True, eps: float = 1e-6) -> torch.Tensor:
    """[P, G] -> [P, G]: A_i = (r_i - mean(r)) / (std(r) + eps), std unbiased; exactly 0 where all r_i are equal."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: advantages need groups of two responses or more")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + eps)
    return advantages.masked_fill(_all_equal(rewards)[:, None], 0.0)


def _all_equal(rewards: torch.Tensor) -> torch.Tensor:
    """[P, G] -> [P] bool. Equal rewards are sums of the same terms, so the test is exact; their mean may be noisy."""
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
    signal: torch.Tensor  # [P] bool: is there anything to learn from the group?
    observation: torch.Tensor  # [P, G] accuracy of <observe>, nan where unknown
    answers: list[list[str | None]]  # [P][G] as extracted, None: unreadable


def score_groups(texts: list[list[str]], records: list[Record], style: str) -> list[list[Score]]:
    """Judge G responses to each of P records."""
    return [[score(text, record, style) for text in group] for group, record in zip(texts, records, strict=True)]


def group_rewards(scores: list[list[Score]], lengths: torch.Tensor, *, format_weight: float = 0.5,
                  bonus_coef: float = 0.2, bonus_min_length: int = 100, sigma: float | None = 1.8,
                  normalize_std: bool = True, rejection_sampling: bool = False) -> Rewards:
    """What P groups of G judged responses are worth; lengths [P, G] in tokens. sigma None: every group weighs 1.

    rejection_sampling: no GRPO at all but its control, supervised learning on the policy's own right answers: these
    have advantage 1, all others 0, with neither weight nor baseline.
    """
    assert lengths.shape == (len(scores), len(scores[0])), f"lengths {tuple(lengths.shape)} are not those of the scores"
    accuracy = torch.tensor([[s.accuracy for s in group] for group in scores])
    format = torch.tensor([[s.format for s in group] for group in scores])
    observation = torch.tensor([[math.nan if s.observation is None else s.observation for s in g] for g in scores])
    answers = [[s.answer for s in group] for group in scores]

    bonus = shortest_correct_bonus(accuracy > 0, lengths, bonus_coef, bonus_min_length)
    total = accuracy + format_weight * format + bonus  # r_i = accuracy_i + 0.5 format_i + bonus_i
    pass_rate = accuracy.mean(dim=1)  # d = (1/G) sum_i accuracy_i
    weight = torch.ones_like(pass_rate) if sigma is None else difficulty_weight(pass_rate, sigma)  # w(d)
    advantages = weight[:, None] * group_advantages(total, normalize_std)  # adv_i = w(d) A_i, weighted AFTER the std
    signal = (weight > 0) & ~_all_equal(total)
    if rejection_sampling:
        weight, advantages, signal = torch.ones_like(pass_rate), accuracy, pass_rate > 0
    return Rewards(accuracy, format, bonus, total, weight, advantages, signal, observation, answers)
