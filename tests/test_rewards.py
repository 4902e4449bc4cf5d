"""What a response is worth: formats, answers that try to cheat, advantages by hand, and a verifier that hangs."""
import math
import os
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import rewards
from data import Record, check_records
from rewards import (
    TAGS,
    Verifier,
    accuracy_reward,
    answer_matches,
    difficulty_weight,
    extract_answer,
    format_reward,
    gold_fault,
    group_advantages,
    group_rewards,
    observation_accuracy,
    parse_number,
    score_groups,
    section,
    shortest_correct_bonus,
)

FOUR = ("10 cm", "10 m", "a red car", "$\\frac{1}{2}$")
FIVE = ("A", "B", "C", "D", "E")  # MathVision: the real options are in the picture


def gold(answer, choices=(), **fields) -> Record:
    return Record("r1", "What is it?", answer, choices=choices, **fields)


def tagged(answer: str) -> str:
    return f"<observe>o</observe><think>t</think><answer>{answer}</answer>"


# --- format ----------------------------------------------------------------------------------------------------------

GOOD = "<observe>two circles</observe>\n<think>1 + 1</think>\n<answer>2</answer>"


@pytest.mark.parametrize("style, text, expected", [
    ("observe", GOOD, 1),
    ("observe", f"\n  {GOOD}\n", 1),
    ("observe", "<observe>a < b</observe><think>x</think><answer>2</answer>", 1),
    ("observe", "Sure! " + GOOD, 0),  # text before
    ("observe", GOOD + " I hope that helps", 0),  # text behind
    ("observe", GOOD.replace("</think>\n", "</think> so "), 0),  # text between
    ("observe", GOOD + "<answer>3</answer>", 0),  # a tag twice
    ("observe", GOOD + GOOD, 0),
    ("observe", GOOD.replace("two circles", " \n "), 0),  # white space is no observation
    ("observe", GOOD.replace("two circles", "\u200b"), 0),  # nor is what cannot be seen
    ("observe", GOOD.replace(">2<", "><"), 0),  # an empty answer
    ("observe", GOOD.replace("</answer>", ""), 0),  # cut off
    ("observe", "<think>t</think><observe>o</observe><answer>2</answer>", 0),  # order
    ("observe", "<think>t <observe>o</observe></think><answer>2</answer>", 0),  # the official pattern takes this one
    ("observe", GOOD.replace("two circles", "two <think>"), 0),  # a tag inside another
    ("observe", GOOD.replace("two circles", "two <ANSWER>3</ANSWER>"), 0),  # nor in another spelling
    ("observe", "<think>t</think><answer>2</answer>", 0),
    ("observe", "", 0),
    ("think", "<think>t</think> <answer>2</answer>", 1),
    ("think", GOOD, 0),  # another style's tag is text outside
    ("think", "<answer>2</answer>", 0),
    ("none", "<answer>2</answer>", 1),
    ("none", "2", 0),
    ("none", "<think>t</think><answer>2</answer>", 0),
])
def test_format(style, text, expected):
    assert format_reward(text, style) == expected


def test_unknown_style_is_refused():
    with pytest.raises(KeyError):
        format_reward(GOOD, "obvserve")
    assert set(TAGS) == {"none", "steps", "think", "observe"}


# --- reading ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    (GOOD, "2"),
    ("<answer>1</answer> no, <answer> 2 </answer>", "2"),
    ("<answer>1\n2</answer>", "1\n2"),
    ("<answer>1</answer> or <answer>2", "1"),  # cut off: the last that is whole
    (r"\boxed{1} <answer>2</answer> \boxed{3}", "2"),
    (r"so \boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"so \boxed{\frac{1}{2}", None),
    ("It is clear.\nThe answer is 12.", "12."),
    ("The answer is 3, no: the final answer is: B", "B"),
    ("The answer is 12.\nBut wait, let me see", None),  # taken back
    ("The answer is 3.\nNow let me count the cubes.\n" + "One more cube stands behind them.\n" * 20, "3."),  # at first
    ("Let me see.\nThe answer is 3.\n" + "One more cube stands behind them.\n" * 40, None),  # neither first nor last
    ("12", "12"),
    ("<answer>42", None),  # cut off
    ("<think>so 12, or 13", None),
    ("<think>so \\boxed{12}?</think>\n**13**", "**13**"),  # after the thoughts
    (r"= \boxed{45 km}. The answer is: (E).", "(E)."),
    ("<answer>So the answer is C.\n\\boxed{C}</answer>", "C"),
    ("<Answer>B</Answer>", "B"),
    ("<|begin_of_box|>B<|end_of_box|>", "B"),
    ("Therefore, the correct answer is:\n\n(B) no", "(B) no"),
    ("正确答案是 (B) no。", "(B) no."),
    ("<answer></answer>", None),
    ("<answer> \n </answer> the answer is 3", None),  # an empty tag is an empty answer
    ("", None),
])
def test_extraction(text, expected):
    assert extract_answer(text) == expected


def test_section():
    assert section(GOOD, "observe") == "two circles" and section(GOOD, "think") == "1 + 1"
    assert section("<think>t</think>", "observe") is None


# --- judging ---------------------------------------------------------------------------------------------------------

RIGHT, WRONG = True, False
JUDGED = [
    # the table of shared/sources.md, section 3
    (gold("12"), "12", RIGHT),
    (gold("(A)"), "A", RIGHT),
    (gold("E"), "(E)", RIGHT),
    (gold("A"), "A. 12", RIGHT),
    (gold("A", ("12", "13")), "A. 12", RIGHT),
    (gold("B"), "B and C", WRONG),
    (gold("50%"), "50", RIGHT),
    (gold("50%"), "0.5", RIGHT),
    (gold("12 cm"), "12", RIGHT),
    (gold("145°"), "145", RIGHT),
    (gold("[2013, 2014]"), "2014", WRONG),
    (gold("(1,2)"), "(1, 2)", RIGHT),
    (gold("Yes"), "yes.", RIGHT),
    (gold("1:2"), "1", WRONG),
    (gold("1:2"), "1 : 2", RIGHT),
    (gold("4.9e-8"), "4.9", WRONG),
    (gold("4.9e-8"), r"$4.9 \times 10^{-8}$", RIGHT),
    (gold("2√3"), r"2\sqrt{3}", RIGHT),
    (gold(r"2\sqrt{3}"), "2", WRONG),
    (gold("1/3"), "0.33", WRONG),
    (gold("1/3", precision=2), "0.33", RIGHT),
    (gold("-.5"), "-0.5", RIGHT),
    (gold("- 3"), "−3", RIGHT),
    # dress that takes nothing away from an answer
    (gold("12"), "x = 12", RIGHT),
    (gold("12"), "(12)", RIGHT),
    (gold("12"), r"$\boxed{12}$", RIGHT),
    (gold("12"), "The answer is 12.", RIGHT),
    (gold("12"), "12 apples", RIGHT),
    (gold("1234.5"), "1,234.50", RIGHT),
    (gold(r"$\frac{1}{3}$"), "1/3", RIGHT),
    (gold("\x0crac{36}{13}"), "36/13", RIGHT),  # MathVision has one `\frac` whose `\f` became a form feed
    (gold("69{degrees}"), r"69^\circ", RIGHT),
    (gold("7/3"), r"2\frac{1}{3}", RIGHT),
    (gold("12 cm^2"), r"12\,\mathrm{cm}^2", RIGHT),
    (gold("B", FOUR), "The answer is (B)", RIGHT),
    (gold("B", FOUR), "**b**", RIGHT),
    (gold("B", FOUR), "B. 10 m", RIGHT),
    (gold("B", FOUR), "10 m", RIGHT),
    (gold("D", FOUR), "0.5", RIGHT),  # one option has this value
    (gold("a red car", FOUR), "C", RIGHT),  # MathVista: the gold is the option's text
    (gold("C", FOUR), "A red car", RIGHT),  # the text of option C, not the letter A
    (gold("B", FIVE), "B. 12", RIGHT),
    (gold("B"), "B**", RIGHT),  # of **Answer: B**
    (gold("B"), "{B}", RIGHT),
    (gold("B"), "# B;", RIGHT),
    (gold("blue"), "The Blue", RIGHT),
    (gold("[2013, 2014]"), "2013 and 2014", RIGHT),
    (gold(r"9\pi"), "9π", RIGHT),
    (gold("Area $=9 \\pi \\mathrm{cm}^{2}$"), "9π cm^2", RIGHT),
    (gold("Area $=9 \\pi \\mathrm{cm}^{2}$"), r"$9\pi$ cm^2", RIGHT),
    (gold("Area $=9 \\pi \\mathrm{cm}^{2}$"), r"$9\pi$ or $8\pi$ cm^2", WRONG),
    (gold(r"S 23.5 ^\circ W"), "S 23.5° W", RIGHT),  # MathVerse
    (gold(r"S 23.5 ^\circ W"), "$S23.5^\\circ W$", RIGHT),
    (gold(r"S 23.5 ^\circ W"), "N 23.5° W", WRONG),
    (gold("room 1 2"), "room 12", WRONG),
    (gold("x^2+1"), "$1 + x^2$", RIGHT),
    (gold("x=2"), "2", RIGHT),
    (gold(r"2\sqrt{3}"), r"x = \sqrt{12}", RIGHT),
    (gold("[1,3)"), "[1, 3)", RIGHT),
    (gold(r"x \geq 3"), "x >= 3", RIGHT),
    (gold("x^2"), "f(x) = x^2", RIGHT),
    (gold(r"2\sqrt{3}"), "$2\n\\sqrt{3}$", RIGHT),
    (gold(("12", "twelve")), "Twelve", RIGHT),  # any accepted answer
    (gold(("A", "C")), "C", RIGHT),
    # hedges and tricks
    (gold("A", FOUR), "A or B", WRONG),
    (gold("A", FOUR), "A, B, C, D", WRONG),
    (gold("A", FOUR), "A B C D", WRONG),
    (gold("A"), "A. or B.", WRONG),
    (gold("A", FOUR), "not A", WRONG),
    (gold("A", FOUR), "The answer is not A", WRONG),
    (gold("A", FOUR), "a red car", WRONG),
    (gold("A", FOUR), "that", WRONG),
    (gold("A", FOUR), "B. 10 cm", WRONG),  # letter and text of two options
    (gold("A", FOUR), "10", WRONG),  # two options have this value
    (gold("A", FOUR), "E", WRONG),
    (gold("B", ("x", "ed")), "Bed", WRONG),
    (gold(("A", "C")), "A, C", WRONG),
    (gold("A"), "[A]nything", WRONG),
    (gold("12"), "12 or 13", WRONG),
    (gold("12"), "not 12", WRONG),
    (gold("12"), "11, 12, 13", WRONG),
    (gold("12"), "12x", WRONG),
    (gold("12"), "12 million", WRONG),
    (gold("12"), "1 2", WRONG),
    (gold("12"), "2x = 12", WRONG),
    (gold("12"), "120/10/1", WRONG),
    (gold("12 cm"), "12 m", WRONG),
    (gold("0.5%"), "0.5", RIGHT),
    (gold("50%"), "0.5%", WRONG),
    (gold("12"), "1/0", WRONG),
    (gold("12"), "1e999", WRONG),
    (gold("1234567"), "1234568", WRONG),
    (gold("3.0001"), "3", WRONG),
    (gold("12:30"), "6:15", WRONG),  # a clock, for all we know
    (gold("[2013, 2014]"), "[2014, 2013]", WRONG),
    (gold("[2013, 2014]"), "[2013, 2014, 2015]", WRONG),
    (gold("(1,2)"), "[1,2]", WRONG),
    (gold("(1,2)"), "1:2", WRONG),
    (gold("yes"), "yes and no", WRONG),
    (gold("3 red cars"), "3 blue cars", WRONG),
    (gold("cat"), "act", WRONG),  # to math-verify both are a*c*t
    (gold(r"2\sqrt{3}"), r"5 or 2\sqrt{3}", WRONG),
    (gold(r"2\sqrt{3}"), r"2\sqrt{3}, 5", WRONG),
    (gold(r"2\sqrt{3}"), r"$5$ $2\sqrt{3}$", WRONG),
    (gold(r"2\sqrt{3}"), r"5 = 2\sqrt{3}", WRONG),
    (gold(r"2\sqrt{3}"), r"x = 5 = 2\sqrt{3}", WRONG),
    (gold("x=2"), "x = 5 = 2", WRONG),
    (gold("x=2"), "5 = 2", WRONG),
    (gold(r"x \geq 3"), "x > 3", WRONG),
    (gold(r"2\sqrt{3}"), r"5$ $2\sqrt{3}", WRONG),  # math-verify takes the last formula it finds
    (gold(r"2\sqrt{3}"), r"5 \boxed{2\sqrt{3}}", WRONG),
    (gold(r"2\sqrt{3}"), "5\n\\(2\\sqrt{3}\\)\n", WRONG),
    (gold(r"2\sqrt{3}"), r"\boxed{5}\boxed{2\sqrt{3}}", WRONG),
    (gold(r"2\sqrt{3}"), r"\pm 2\sqrt{3}", WRONG),
    (gold(r"2\sqrt{3}"), r"not 2\sqrt{3}", WRONG),
    (gold(r"2\sqrt{3}"), "3.46", WRONG),
    (gold(r"2\sqrt{3}"), "", WRONG),
    (gold("[1,3)"), "(1,3)", WRONG),
]


@pytest.mark.parametrize("record, answer, expected", JUDGED, ids=[f"{r.answer}<-{a}" for r, a, _ in JUDGED])
def test_judge(record, answer, expected):
    assert answer_matches(answer, record) is expected
    assert accuracy_reward(tagged(answer), record) == float(expected)


def test_answers_are_wrong_rather_than_slow():
    """Answers meant to break the parser; none may reach sympy and use up a time-out."""
    before = rewards.VERIFIER.timeouts
    hostile = ["9**9**9**9", "9^{9^{9^9}}", "10^{999999999}", "(99999!)", "(" * 30 + "1" + ")" * 30, "[" * 999,
               "(" * 100_000, "{" * 100_000, "9" * 100_000, "A " * 50_000, "1," * 400, "\\frac" * 150, "$" * 900,
               "<answer>" * 50_000, "\\boxed{" * 20_000, "answer is " * 20_000, "\x00", "\ud800"]
    for record in (gold("12"), gold("A", FOUR), gold("A"), gold("(1,2)"), gold("yes"), gold(r"2\sqrt{3}")):
        for answer in hostile:
            assert not answer_matches(answer, record), (record.answer, answer[:30])
            assert accuracy_reward(answer, record) == accuracy_reward(tagged(answer), record) == 0
            format_reward(answer)
    assert rewards.VERIFIER.timeouts == before


# --- faults of the official code that ours must not have -------------------------------------------------------------

def test_no_bonus_for_a_group_that_is_all_wrong():
    """Official: all lengths of an all-wrong group became inf, inf > 100, so response 0, a WRONG one, got the bonus."""
    lengths = torch.tensor([[150, 300, 200, 120]])
    assert shortest_correct_bonus(torch.zeros(1, 4, dtype=torch.bool), lengths).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("answer", ["E", "yes", "cat", "(1,2)"])
def test_no_gold_pays_for_any_answer(answer):
    """Official: a gold that math-verify could not parse paid 1.0 for anything, and E, yes, cat, (1,2) could not be."""
    assert accuracy_reward(tagged(answer), gold(answer)) == 1
    assert accuracy_reward(tagged("anything"), gold(answer)) == 0


def test_accuracy_is_not_read_off_the_sum():
    """Official: "correct" was the sum truncated, so with format worth 1 every well-formed answer was correct."""
    out = group_rewards(score_groups([[tagged("7"), tagged("8")]], [gold("12")], "observe"), torch.tensor([[200, 200]]),
                        format_weight=1.0)
    assert out.total.tolist() == [[1, 1]] and out.accuracy.tolist() == [[0, 0]]
    assert out.bonus.tolist() == [[0, 0]] and out.weight.tolist() == [0]


def test_tags_are_no_part_of_the_answer():
    """Official: answers were parsed with their tags on, and these scored 0."""
    assert accuracy_reward("<answer>1/2</answer>", gold(r"$\frac{1}{2}$")) == 1
    assert accuracy_reward("<answer>1,000</answer>", gold("1000")) == 1
    assert accuracy_reward("<answer>42 ft</answer>", gold("42")) == 1


def test_golds_are_read_whole():
    """Official: gold "1228 142.67" was its last number, and the letter rule a substring test."""
    assert not answer_matches("142.67", gold("1228 142.67"))
    assert answer_matches("1228 142.67", gold("1228 142.67"))
    options = ("10 m", "10 cm")
    assert answer_matches("B. 10 cm", gold("B", options))  # failed, because of the c
    assert not answer_matches("B. 10 m", gold("B", options))  # passed
    assert accuracy_reward("<answer>that</answer>", gold("A")) == 0  # passed


def test_gold_goes_first_into_math_verify():
    """Official: swapped. math-verify unwraps "x = 2" in what it is given second, so the two orders differ."""
    verifier = rewards.VERIFIER
    equation, value = "2x + z = 1", "1"
    assert verifier(value, equation) and not verifier(equation, value)
    assert not answer_matches(value, gold(equation))


def test_equal_rewards_give_exactly_zero():
    """Official: eight rewards of 0.7 have a std of float noise; over 1e-9 it made |A| = 0.9 out of nothing."""
    for value in (0.7, 0.1, 1.7, 0.0, 1 / 3):
        for normalize in (True, False):
            assert group_advantages(torch.full((3, 8), value), normalize).eq(0).all()


def test_the_logged_reward_holds_the_bonus():
    """Official: the reward that was logged left it out."""
    scores = score_groups([[tagged("12"), tagged("13")]], [gold("12")], "observe")
    out = group_rewards(scores, torch.tensor([[150, 150]]))
    assert torch.allclose(out.total, torch.tensor([[1.7, 0.5]]))


# --- golds -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, choices, kind", [
    ("C", (), "choice"), ("(C)", (), "choice"), ("a red car", FOUR, "choice"), ("12", (), "number"),
    ("2191.7 metres", (), "number"), ("33.31%", (), "number"), ("5/21", (), "number"), ("(3,-4)", (), "list"),
    ("[2013, 2014]", (), "list"), ("1:2", (), "list"), ("Yes", (), "text"), ("T-shirt", (), "text"),
    ("S 23.5 ^\\circ W", (), "text"), ("3 red cars", (), "text"), ("10-20", (), "text"), (r"2\sqrt{3}", (), "math"),
    ("2x+3", (), "math"), ("[1,3)", (), "math"), (("12", "twelve"), (), "text"), (("2√3", "3.46"), (), "math"),
])
def test_answer_types(answer, choices, kind):
    assert gold(answer, choices).answer_type == kind


@pytest.mark.parametrize("answer, choices, kind", [
    ("", (), ""), ("  ", (), ""), ((), (), ""), (("1", ""), (), ""), (None, (), ""), ("12", (), "numbr"),
    ("F", FOUR, ""), ("a blue car", FOUR, ""), ("cat", (), "choice"), ("cat", (), "number"), ("12", (), "list"),
    ("?!", (), "text"), (" $ $ ", (), "math"), ("x" * 1001, (), "text"),
])
def test_golds_that_no_rule_reads_are_refused_by_name(answer, choices, kind):
    with pytest.raises(ValueError, match="record r1: "):
        gold(answer, choices, answer_type=kind)


def test_numbers():
    for text, value in [("-.5", -0.5), ("- 3", -3), ("1,234.5", 1234.5), ("5/21", 5 / 21), ("12 cm", 12), ("145°", 145),
                        ("50%", 50), ("4.9e-8", 4.9e-8), ("−7", -7), ("1e999", None), ("1/0", None), ("12 or 13", None),
                        ("1,23", None), ("2 pi", None), ("", None)]:
        assert parse_number(text) == value, text


def test_golds_that_math_verify_cannot_read_are_named(processor):
    good = [gold(r"2\sqrt{3}"), gold("x^2"), gold("cat")]
    assert check_records(processor, good, "observe") == good and not any(map(gold_fault, good))
    bad = [Record(f"bad{i}", "?", "\\nonsense{", answer_type="math") for i in range(12)]
    assert gold_fault(bad[0]).startswith("record bad0: ")
    with pytest.raises(ValueError, match=r"12 of 15 records") as error:
        check_records(processor, good + bad, "observe")
    message = str(error.value)
    assert all(f"bad{i}:" in message for i in range(10)) and "bad10" not in message and "and 2 more" in message


# --- the verifier ----------------------------------------------------------------------------------------------------

HANGS = r"\frac{(x+y)^{300}}{(x-y)^{299}}"  # sympy goes on for minutes over this one
SLOW = "600x", "+".join(["x"] * 600)  # right, and sympy needs a second


@pytest.fixture
def started():
    """Starts a verifier -> it and its workers, all of them ready: the limit of memory is the last thing they set."""
    verifiers = []

    def start(**options) -> tuple[Verifier, list]:
        others, limit = active_children(), resource.getrlimit(resource.RLIMIT_AS)
        verifiers.append(Verifier(**options))
        assert verifiers[-1]("2", "2")
        workers = [child for child in active_children() if child not in others]
        while any(resource.prlimit(worker.pid, resource.RLIMIT_AS) == limit for worker in workers):
            time.sleep(0.01)
        return verifiers[-1], workers

    yield start
    for verifier in verifiers:
        verifier.close()


def test_a_hung_verifier_is_killed_and_counted(started):
    verifier, [worker] = started(timeout=1.0, workers=1)
    assert not verifier(r"2\sqrt{3}", HANGS) and verifier.timeouts == 1
    worker.join()  # (ends: it was killed)
    assert not verifier(r"2\sqrt{3}", HANGS) and verifier.timeouts == 1  # remembered: a group says the same 8 times
    assert verifier(r"2\sqrt{3}", r"\sqrt{12}") and verifier.timeouts == 1  # a fresh worker answers


def test_many_that_hang_cost_their_time_out_and_no_restart(started):
    """Eight took 56 s, for each worker that was killed had to import torch and all again."""
    others = active_children()
    verifier, workers = started(timeout=1.0, workers=4)
    with ThreadPoolExecutor(4) as threads:
        assert not any(threads.map(lambda n: verifier("2", f"{HANGS} + {n}"), range(8)))
    assert verifier.timeouts == 8 and len(workers) == 4
    assert verifier("3", "3")
    heirs = [child for child in active_children() if child not in others + workers]
    assert heirs and all(cpu(heir.pid) < 100 for heir in heirs), "heirs import nothing: that takes seconds"


def test_hangs_hold_up_nobody_else(started):
    """Two hang at once; a third question is answered meanwhile."""
    verifier, workers = started(timeout=3.0, workers=3)
    assert len(workers) == 3
    with ThreadPoolExecutor(2) as threads:
        hung = [threads.submit(verifier, r"2\sqrt{3}", f"{HANGS} + {n}") for n in range(2)]
        for n in range(5):
            assert verifier(f"{n}", f"{n}")
        assert not any(future.done() for future in hung)
        assert not any(future.result() for future in hung) and verifier.timeouts == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_killed_between_two_questions_makes_no_right_answer_wrong(started, workers):
    """As the kernel does when memory runs out."""
    verifier, found = started(workers=workers)
    found[0].kill()
    found[0].join()
    assert verifier("3", "3") and verifier("4", "4") and not verifier("4", "5") and verifier.timeouts == 0


def test_a_greedy_verifier_is_stopped_by_its_memory_limit(started):
    verifier, [worker] = started(timeout=60.0, memory=1 << 28, workers=1)
    assert not verifier(r"2\sqrt{3}", "2^{10^{10}}")  # 1.25 GB of digits
    assert verifier.timeouts == 0 and worker.is_alive()
    assert verifier("3", "3")


def cpu(pid: int) -> int:
    """Hundredths of a second that a process has worked."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


@pytest.mark.parametrize("sent, verdict, server", [(signal.SIGTERM, True, False), (signal.SIGTERM, True, True),
                                                   (signal.SIGKILL, False, False)])
def test_a_worker_ended_by_the_cluster_is_asked_again(started, sent, verdict, server):
    """srun and scancel send SIGTERM to all processes of a job, in the middle of whatever answer: a right one was then
    wrong, and the run trained on it and saved it. What kills for memory sends SIGKILL, and would do so again."""
    verifier, [worker] = started(timeout=60.0, workers=1)
    before = cpu(worker.pid)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(verifier, *SLOW)
        while cpu(worker.pid) < before + 5:
            time.sleep(0.01)
        if server:  # the process that forks workers is one of the job too
            os.kill(int(Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[1]), sent)
        os.kill(worker.pid, sent)
        assert asked.result() == verdict and verifier.timeouts == 0
    assert verifier("4", "4") and not verifier("4", "5")


def test_ctrl_c_leaves_no_answer_to_the_next_question(started):
    verifier, [worker] = started(workers=1)
    os.kill(worker.pid, signal.SIGSTOP)  # so that it happens over the next question
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            verifier("3", "3")
    finally:
        signal.signal(signal.SIGINT, handler)
    os.kill(worker.pid, signal.SIGCONT)
    assert not verifier("3", "4") and verifier("3", "3")


def test_verifier_works_from_a_thread():
    """math-verify's own time-out is SIGALRM, which raises in a thread; verl scored every MATH answer 0 that way."""
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(answer_matches(r"\sqrt{20}", gold(r"2\sqrt{5}"))))
    thread.start()
    thread.join(60)
    assert verdicts == [True]


def test_no_worker_without_math(monkeypatch):
    others = active_children()
    monkeypatch.setattr(rewards, "VERIFIER", Verifier())
    for record in (gold("12"), gold("A", FOUR), gold("(1,2)"), gold("yes")):
        answer_matches("12", record)
        assert gold_fault(record) is None
    assert active_children() == others


# --- groups, by hand -------------------------------------------------------------------------------------------------

def test_bonus():
    correct = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    lengths = torch.tensor([
        [300, 150, 200, 110],  # the shortest CORRECT one
        [180, 180, 50, 50],  # a tie: the first
        [500, 100, 400, 9],  # the shortest correct is at the floor: nobody, not the next one
        [90, 101, 300, 101],  # just over the floor
        [500, 500, 500, 500]])  # nobody is right
    expected = torch.tensor([[0, .2, 0, 0], [.2, 0, 0, 0], [0, 0, 0, 0], [0, .2, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(shortest_correct_bonus(correct, lengths), expected)
    assert shortest_correct_bonus(correct, lengths, coef=1, min_length=99)[2].tolist() == [0, 1, 0, 0]


def test_advantages():
    rewards_ = torch.tensor([[1.0, 0, 0, 0], [1.5, 1.5, 0.5, 0.5], [0.7, 0.7, 0.7, 0.7]])
    # mean 1/4, unbiased std 1/2; mean 1, std 1/sqrt(3)
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [3**.5 / 2, 3**.5 / 2, -(3**.5) / 2, -(3**.5) / 2], [0, 0, 0, 0]])
    assert torch.allclose(group_advantages(rewards_), expected, atol=1e-5)
    centred = torch.tensor([[.75, -.25, -.25, -.25], [.5, .5, -.5, -.5], [0, 0, 0, 0]])
    assert torch.allclose(group_advantages(rewards_, normalize_std=False), centred, atol=1e-6)


def test_groups_of_one_are_refused():
    with pytest.raises(ValueError, match="two responses"):
        group_advantages(torch.ones(4, 1))


def test_difficulty_weight():
    assert difficulty_weight(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, pytest.approx(1.8), 0]
    eighths = difficulty_weight(torch.arange(9) / 8)
    assert torch.allclose(eighths, torch.tensor([0, .7875, 1.35, 1.6875, 1.8, 1.6875, 1.35, .7875, 0]))
    assert difficulty_weight(torch.tensor([0.5]), sigma=1.0).item() == 1


def test_group_rewards():
    right, wrong, bare = tagged("12"), tagged("13"), r"\boxed{12}"
    texts = [[right, bare, wrong, "no idea"], [wrong] * 4, [right, right, right, bare]]
    lengths = torch.tensor([[200, 150, 300, 5], [200] * 4, [50, 150, 150, 150]])
    responses = score_groups(texts, [gold("12")] * 3, "observe")
    out = group_rewards(responses, lengths)
    assert [r.answer for r in responses[0]] == ["12", "12", "13", None]
    assert out.accuracy.tolist() == [[1, 1, 0, 0], [0] * 4, [1] * 4]
    assert out.format.tolist() == [[1, 0, 1, 0], [1] * 4, [1, 1, 1, 0]]
    assert torch.allclose(out.total, torch.tensor([[1.5, 1.2, .5, 0], [.5] * 4, [1.5, 1.5, 1.5, 1]]))
    assert torch.allclose(out.weight, torch.tensor([1.8, 0, 0])) and out.signal.tolist() == [True, False, False]
    mean, std = 0.8, math.sqrt((.7**2 + .4**2 + .3**2 + .8**2) / 3)
    by_hand = torch.tensor([1.8 * (r - mean) / std for r in (1.5, 1.2, .5, 0)])
    assert torch.allclose(out.advantages[0], by_hand, atol=1e-4) and out.advantages[1:].eq(0).all()
    assert out.observation.isnan().all()
    plain = group_rewards(score_groups(texts, [gold("12")] * 3, "observe"), lengths, sigma=None)
    assert plain.weight.tolist() == [1, 1, 1]
    assert plain.signal.tolist() == [True, False, True]  # the third by its format alone
    assert plain.advantages[2, 3] < -1
    control = group_rewards(score_groups(texts, [gold("12")] * 3, "observe"), lengths, rejection_sampling=True)
    assert control.advantages.tolist() == control.accuracy.tolist() and control.signal.tolist() == [True, False, True]


def test_format_alone_teaches_nothing():
    """A model that never answers right came to write perfect tags: its reward rose, and accuracy did not."""
    good, bare, wrong = tagged("12"), "12", tagged("13")
    texts = [[wrong, "13", wrong, "13"], [good, bare, good, bare], [good, bare, wrong, "13"]]
    responses, lengths = score_groups(texts, [gold("12")] * 3, "observe"), torch.full((3, 4), 50)
    out = group_rewards(responses, lengths)
    assert out.accuracy.tolist() == [[0] * 4, [1] * 4, [1, 1, 0, 0]] and out.format.tolist() == [[1, 0, 1, 0]] * 3
    assert out.advantages[:2].eq(0).all() and out.signal.tolist() == [False, False, True]
    first, second, third, fourth = out.advantages[2].tolist()
    assert first > second > 0 > third > fourth, "beside an answer it counts: half of what that does"
    assert first - second == pytest.approx((first - third) / 2, abs=1e-5)
    plain = group_rewards(responses, lengths, sigma=None).advantages
    assert plain[0, 0] > 0.8 and plain[0, 1] < -0.8, "without the weight, as elsewhere, it is all that is learned"


# --- observation -----------------------------------------------------------------------------------------------------

def test_observation_accuracy():
    record = gold("12", meta={"facts": ["red 3", "blue 5"]})

    def score(observed: str) -> float | None:
        return observation_accuracy(f"<observe>{observed}</observe><think>t</think>", record, "observe")

    assert score("Red  3, BLUE 5.") == 1
    assert score("red 3") == 0.5  # 1 of 2
    assert score("red 3, blue 4") == 0.5
    assert score("red 3; blue 5 | green 1\ngreen 2") == 0.5  # 2 of 4 stated: no use in stating everything
    assert score("red 3, red 3, red 3, red 3") == 0.25  # a fact counts once
    assert score("") == 0
    bars = gold("12", meta={"facts": ["bar 2.5", "bar 3"]})
    assert observation_accuracy("<observe>bar 2.5, bar 3.</observe>", bars, "observe") == 1, "no full stop in 2.5"
    assert observation_accuracy("<think>red 3</think>", record, "observe") == 0  # asked for, and not there
    assert observation_accuracy("<observe>red 3</observe>", record, "think") is None
    assert observation_accuracy("<observe>red 3</observe>", gold("12"), "observe") is None
    twice = gold("12", meta={"facts": ["red 3", "red 3", "blue 5"]})
    assert observation_accuracy("<observe>red 3, red 3</observe>", twice, "observe") == pytest.approx(2 / 3)
