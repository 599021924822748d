from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prune_opd.evaluation import graders
from prune_opd.evaluation.graders import extract_answer, grade, grade_gym
from prune_opd.evaluation.gym import gym_problem
from prune_opd.types import Prompt

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
VERL_FILES = ["aime24", "aime25", "amc23_40", "amc23_83", "dapo-math-17k", "math500"]
TOWER = "9^{9^{9^{9}}}"  # SymPy would work on it until memory is gone

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


def boxed(answer: str) -> str:
    return f"so it is \\boxed{{{answer}}}."


def shared_golds(name: str) -> list[str]:
    if name == "gsm8k_test":
        rows = map(json.loads, (DATA / "gsm8k_test.jsonl").read_text().splitlines())
        return [row["answer"].split("####")[1].strip() for row in rows]
    table = pq.ParquetFile(DATA / f"{name}.parquet").read().to_pylist()
    return [row["reward_model"]["ground_truth"] if name in VERL_FILES else row["answer"] for row in table]


# ---- extraction ----


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"b 3 + 5 = 8 \boxed{ 7 }", "7"),
        (r"first \boxed{1}, no: \boxed{2}. So 3", "2"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\\boxed{5}", "5"),  # escaped twice, as inside a JSON string
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),  # an escaped brace needs no partner
        (r"\boxed{a \\{b}}", r"a \\{b}"),  # a line break, then a group
        (r"\boxed{\boxed{5}}", "5"),
        (r"{ open \boxed{5}", "5"),
        (r"} stray \boxed{5}", "5"),
        (r"\boxed{5} and then \boxed{\frac{1}{2", "5"),  # the last one is cut off
        (r"\boxed{5}, as asked in \boxed{}", "5"),  # the instruction repeated
        (r"\boxed{5} #### 6", "5"),
        ("work\n#### 18", "18"),
        ("#### 1\n#### 1,234\n", "1,234"),
        ("so\nAnswer: $34$", "$34$"),
        ("**Answer:** 34", "34"),
        ("Final answer: 34\nanswer: 35", "35"),
        ("", None),
        ("the answer is 7", None),
        ("7", None),
        (r"\boxed{}", None),
        (r"\boxed{7", None),
        ("##### 7", None),
        ("the answer: 7", None),
    ],
)
def test_extract_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


# ---- grading ----


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1,234", "1234"),
        ("1{,}234", "1234"),
        (r"10,\!080", "10080"),
        ("11111", r"11,\! 111"),
        ("007", "7"),
        ("7.", "7"),
        (" 7.0 ", "7"),
        ("7", "7.00"),
        ("$7$", "7"),
        (r"\$18.9", r"\$18.90"),
        (r"\(7\)", "7"),
        ("+7", "7"),
        ("−7", "-7"),
        (".5", "0.50"),
        ("204", r"\boxed{204}"),
        ("18", "6 + 12 = 18\n#### 18"),
        ("1" * 400, "1" * 400 + ".0"),
    ],
)
def test_equal_numbers(answer: str, gold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graders, "_start", lambda: pytest.fail("plain numbers need no math-verify"))
    assert grade(boxed(answer), gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("7", "8"),
        ("-7", "7"),
        ("70", "7"),
        ("0.3333333", "0.3333334"),
        ("1,234", "1.234"),
        ("1" * 40, "1" * 39 + "2"),
    ],
)
def test_unequal_numbers(answer: str, gold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graders, "_start", lambda: pytest.fail("plain numbers need no math-verify"))
    assert not grade(boxed(answer), gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\sqrt{25}", "5"),
        ("x = 5", "5"),
        ("5", "x=5"),
        (r"18\text{ dollars}", "18"),
        ("864", r"864 \mbox{ inches}^2"),
        ("5.4", r"5.4 \text{ cents}"),
        ("90", r"90^\circ"),
        (r"\dfrac{1}{2}", r"\frac12"),
        ("0.5", r"\frac{1}{2}"),
        ("9/5", r"1\frac{4}{5}"),
        ("-q + p", "p - q"),
        ("(x-1)(x+1)", "x^2 - 1"),
        (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"1-\sqrt{19}, 1+\sqrt{19}", r"1 \pm \sqrt{19}"),
        ("7, 3, 5", "3, 5, 7"),
        ("Even.", r"\text{even}"),
        (r"\textbf{(C)}", r"\text{(C)}"),
        ("C", r"\text{(C)}"),
        (r"\text{Evelyn}", "Evelyn"),
        ("5\n", " 5"),
    ],
)
def test_equal_latex(answer: str, gold: str) -> None:
    assert grade(boxed(answer), gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\frac{10}{3}", "5"),
        ("0.333", r"\frac{1}{3}"),
        ("(2,1)", "(1,2)"),
        ("4, 5", "4"),
        ("4 or 5", "4"),
        (r"\frac{1}{2} \text{ or } \frac{1}{3}", r"\frac12"),
        ("1 1/2", "11/2"),
        ("q - p", "p - q"),
        ("odd", r"\text{even}"),
        ("vane", r"\text{Evan}"),
        ("B", r"\text{(C)}"),
        ("B", "C"),
        ("[1,2)", "(1,2)"),
        ("", "5"),
        ("5", ""),
    ],
)
def test_unequal_latex(answer: str, gold: str) -> None:
    assert not grade(boxed(answer), gold)


def test_only_a_stated_answer_counts() -> None:
    assert grade("it is 18\n#### 18", "18")
    assert grade("long work\nAnswer: 18", "18")
    assert not grade("18", "18")
    assert not grade("I think it is 18", "18")
    assert not grade(r"\boxed{18} or rather \boxed{19}", "18")


# ---- hostile responses ----


@pytest.mark.parametrize(
    "response",
    [
        "",
        "\0",
        boxed(""),
        boxed("{"),
        "\\boxed{" + "5",
        "\\boxed{" * 150_000,
        "\\" * 1_000_000,
        "{" * 300_000,
        "#" * 1_000_000,
        "####\n" * 200_000,
        " " * 1_000_000,
        "*" * 1_000_000,
        "\n" * 1_000_000,
        "\\boxed" + " " * 1_000_000,
        boxed("1" * 1_000_000),
        boxed("x+" * 500_000 + "1"),
        boxed("{" * 20 + "6" + "}" * 20),
        boxed('__import__("os").abort()'),
        boxed("exec('raise SystemExit')"),
        boxed("\\input{/etc/passwd}"),
        boxed("\ud800"),  # half a surrogate pair
        boxed("\\frac{1}{0}"),
        boxed("$5$ \x1b[2J \n\n $$ \\]"),
    ],
    ids=lambda response: repr(response[:12]),
)
def test_hostile_responses_are_wrong(response: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graders, "VERIFY_SECONDS", 0.5)  # some would use all of it
    assert not grade(response, "5")
    monkeypatch.undo()
    assert grade(boxed(r"\sqrt{25}"), "5")  # and the grader lives on


def wrong_answers() -> Iterator[str]:
    """Answers that are not 5: over 200 of them, most of a kind that breaks parsers."""
    for number in range(6, 56):
        yield str(number)
        yield rf"\frac{{{number}}}{{{number + 1}}}"
        yield rf"5 \text{{ or }} {number}"
    for depth in (1, 10, 100, 100_000):
        yield "{" * depth + "5"  # never closed
        yield "}" * depth + "5"  # an empty box
        yield r"\frac{1}{" * depth + "7" + "}" * depth
        yield r"\sqrt{" * depth + "7" + "}" * depth
        yield r"\left(" * depth + "7" + r"\right)" * depth
        yield "7" + "^{7" * depth + "}" * depth
    for filler in ("7", "x+", r"\frac", r"\left(", "^", "_", "[", "&", "\\\\", r"\text{a}", "é", "\u202e", "<b>", "\n"):
        yield filler * (1_000_000 // len(filler)) + "7"
    yield from (
        "import os; os._exit(0)",
        "__import__('os').system('true')",
        "exec('while True: pass')",
        "(lambda f: f(f))(lambda f: f(f))",
        "$(reboot)",
        "<script>alert(5)</script>",
        "'; DROP TABLE answers; --",
        r"\def\x{\x\x}\x",
        r"\write18{rm}",
        r"\catcode`\%=0",
        "9^{9^{9^{9}}}",
        "10^{10^{10}}!",
        r"\int_0^1 x^{x^{x^x}} dx",
        r"\sum_{n=1}^{10^{12}} \frac{1}{n}",
        r"\lim_{x \to 0} \frac{\sin(x)^{999}}{x^{1000}}",
        r"\prod_{i=1}^{99999999} i",
        r"\begin{pmatrix} 5 & 5 \\ 5 & 5 \end{pmatrix}^{9999999}",
        r"5 \neq 5",
        r"5\%5",
        "nan",
        r"\infty",
        "5i",
        "5x",
        "-5",
        "0x5",
        "5e5",
    )


@pytest.mark.slow
def test_two_hundred_wrong_and_hostile_answers() -> None:
    """With the time limit as it is in use: each takes a second of the processor at most."""
    answers = list(wrong_answers())
    assert len(set(answers)) >= 200
    for answer in answers:
        assert not grade(boxed(answer), "5"), answer[:80]
    assert grade(boxed(r"\sqrt{25}"), "5")


@pytest.fixture
def fresh_verifier() -> Iterator[graders._Verifier]:
    graders._verifier.cache_clear()
    yield graders._verifier(os.getpid(), "math_verify", 0)
    graders._verifier.cache_clear()


def test_time_out_is_wrong_logged_once_and_survived(
    fresh_verifier: graders._Verifier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graders, "VERIFY_SECONDS", 0.3)
    with caplog.at_level(logging.WARNING):
        assert not grade(boxed(TOWER), "5")
        assert not grade(boxed(TOWER), "5")
    (record,) = caplog.records
    assert f"grading '{TOWER}' took over 0.3 s" in record.getMessage()
    monkeypatch.undo()
    assert grade(boxed(r"\sqrt{25}"), "5")


def worker_of(verifier: graders._Verifier) -> int:
    (child,) = Path(f"/proc/{verifier.process.pid}/task/{verifier.process.pid}/children").read_text().split()
    return int(child)


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the children of another process")


@needs_proc
def test_a_hang_costs_a_worker_and_no_new_process(
    fresh_verifier: graders._Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process would import SymPy again, which takes longer than the hang."""
    monkeypatch.setattr(graders, "VERIFY_SECONDS", 0.3)
    starts = []
    start = graders._start
    monkeypatch.setattr(graders, "_start", lambda package: starts.append(package) or start(package))
    workers = []
    for _ in range(3):
        assert not grade(boxed(TOWER), "5")
        assert grade(boxed(r"\sqrt{25}"), "5")
        workers.append(worker_of(fresh_verifier))  # the one that hung is gone, with what it held
    assert len(set(workers)) == 3 and starts == ["math_verify"]


@needs_proc
def test_a_verifier_that_goes_leaves_no_worker(fresh_verifier: graders._Verifier) -> None:
    assert grade(boxed(r"\sqrt{25}"), "5")
    worker = worker_of(fresh_verifier)
    graders._stop(fresh_verifier.process)
    with pytest.raises(ProcessLookupError):
        for _ in range(600):  # until init has taken it away
            os.kill(worker, 0)
            if "Z" in Path(f"/proc/{worker}/stat").read_text().split(")")[1].split()[0]:
                raise ProcessLookupError
            time.sleep(0.05)


@needs_proc
def test_a_busy_machine_makes_no_answer_wrong(
    fresh_verifier: graders._Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grader's process gets no processor for three times its limit, as beside other programs."""
    assert grade(boxed(r"\sqrt{25}"), "5")
    process, worker = fresh_verifier.process, worker_of(fresh_verifier)
    os.kill(worker, signal.SIGSTOP)
    threading.Timer(1.5, os.kill, (worker, signal.SIGCONT)).start()
    monkeypatch.setattr(graders, "VERIFY_SECONDS", 0.5)
    assert grade(boxed(r"\sqrt{49}"), "7")
    assert fresh_verifier.process is process


@needs_proc
def test_a_process_that_waits_for_ever_is_killed_by_the_clock(
    fresh_verifier: graders._Verifier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert grade(boxed(r"\sqrt{25}"), "5")
    os.kill(worker_of(fresh_verifier), signal.SIGSTOP)
    monkeypatch.setattr(graders, "WALL_FACTOR", 0.3)
    with caplog.at_level(logging.WARNING):
        assert not grade(boxed(r"\sqrt{49}"), "7")
    assert "took over 1 s" in caplog.text
    monkeypatch.undo()
    assert grade(boxed(r"\sqrt{49}"), "7")


def test_a_verifier_that_died_is_replaced(fresh_verifier: graders._Verifier) -> None:
    assert grade(boxed(r"\sqrt{25}"), "5")
    fresh_verifier.process.kill()  # as the kernel does when memory runs out
    fresh_verifier.process.wait()
    assert grade(boxed(r"\sqrt{25}"), "5")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the limits of another process")
def test_memory_is_limited(fresh_verifier: graders._Verifier) -> None:
    import resource

    assert grade(boxed(r"\sqrt{25}"), "5")
    limit = resource.prlimit(fresh_verifier.process.pid, resource.RLIMIT_AS)
    assert limit == (graders.VERIFIER_BYTES, graders.VERIFIER_BYTES)


@needs_proc
def test_a_crash_during_grading_is_wrong_and_logged(
    fresh_verifier: graders._Verifier, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grade(boxed(r"\sqrt{25}"), "5")
    monkeypatch.setattr(graders, "VERIFY_SECONDS", 60.0)
    threading.Timer(0.3, os.kill, (worker_of(fresh_verifier), signal.SIGKILL)).start()
    with caplog.at_level(logging.WARNING):
        assert not grade(boxed(TOWER), "5")
    assert "died" in caplog.text


def test_grades_from_several_threads(fresh_verifier: graders._Verifier) -> None:
    """Signals would fail here; unsynchronised pipes would mix up the replies."""
    results: dict[int, bool] = {}

    def work(i: int) -> None:
        results[i] = grade(boxed(rf"\sqrt{{{(i % 3) ** 2}}}"), "1")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: i % 3 == 1 for i in range(24)}


def test_answers_are_graded_side_by_side_and_in_order(
    fresh_verifier: graders._Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that hang at a time: each waits for the other to be asked as well."""
    monkeypatch.setattr(graders, "AT_ONCE", 2)
    together = threading.Barrier(2, timeout=120)
    holds = graders._Verifier.holds

    def meet(verifier: graders._Verifier, *question: str) -> bool:
        together.wait()
        return holds(verifier, *question)

    monkeypatch.setattr(graders._Verifier, "holds", meet)
    texts = [boxed(rf"\sqrt{{{n}}}") for n in (25, 36, 25, 49)]
    prompts = [Prompt("q", (1,), "5", "here") for _ in texts]
    assert list(graders.are_right(prompts, texts)) == [True, False, True, False]


def test_math_verify_that_does_not_start_is_not_a_wrong_answer(
    fresh_verifier: graders._Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graders.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        grade(boxed(r"\sqrt{25}"), "5")


# ---- reasoning-gym ----

needs_gym = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="no reasoning-gym: make setup-smollm")
SUM = {"task": "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1", "seed": 0}
GRID = {"task": "reasoning_gym:rotate_matrix?min_n=2&max_n=2", "seed": 0}


def gym_answer(problem: dict) -> str:
    return gym_problem(**problem)[1]["answer"]


@needs_gym
@pytest.mark.parametrize(
    "response",
    [
        "{}",
        "so\n{}\n\n",
        "so \\boxed{{{}}} then",
        "so \\boxed{{\\text{{{}}}}} then",
        "Answer: {}",
        "<answer>{}</answer>",
        "<ANSWER>\n{}\n</ANSWER> and more",
        "<answer>\\boxed{{{}}}</answer>",
        "<answer>99</answer> no, <answer>{}</answer>",
        "Answer: in the tags\n<answer>{}</answer>",
        "<answer>99 <answer>{}</answer>",
        "<answer>{}</answer> <answer>cut off",
    ],
)
def test_gym_answers_are_found(response: str) -> None:
    assert grade_gym(response.format(gym_answer(SUM)), **SUM)
    assert not grade_gym(response.format("1000"), **SUM)


@needs_gym
def test_gym_answers_of_several_lines_need_the_tags() -> None:
    answer = gym_answer(GRID)
    assert "\n" in answer
    assert grade_gym(f"<answer>\n{answer}\n</answer>", **GRID)
    assert not grade_gym(answer, **GRID)


@needs_gym
@pytest.mark.parametrize("response", ["", "\0", "\ud800", "<answer></answer>", "<answer>" * 100_000, "7" * 1_000_000])
def test_hostile_gym_answers_are_wrong(response: str) -> None:
    assert not grade_gym(response, **SUM)


@needs_gym
def test_a_gym_verifier_that_raises_hangs_or_dies_costs_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    factors, binary = {"task": "prime_factorization", "seed": 3}, {"task": "binary_matrix", "seed": 3}
    assert grade_gym(gym_answer(factors), **factors)
    with pytest.raises(ValueError):  # or else it would no longer be a test of one that raises
        gym_problem(**factors)[0].score_answer("x", gym_problem(**factors)[1])
    assert not grade_gym("x", **factors)
    monkeypatch.setattr(graders, "GYM_VERIFY_SECONDS", 1.0)
    for code in ("__import__('os')._exit(0)", "__import__('time').sleep(60)"):  # this verifier evaluates answers
        assert not grade_gym(f"<answer>{code}</answer>", **binary)
        monkeypatch.undo()
        assert grade_gym(f"<answer>{gym_answer(binary)}</answer>", **binary)
        monkeypatch.setattr(graders, "GYM_VERIFY_SECONDS", 1.0)


@needs_gym
@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch {}')",
        "open('{}', 'w')",
        "__import__('pathlib').Path('{}').touch()",
        "__import__('os').open('{}', 65)",
        "__import__('subprocess').run(['touch', '{}'])",
    ],
)
def test_gym_answers_that_are_code_change_no_file(code: str, tmp_path: Path) -> None:
    problem = {"task": "binary_matrix", "seed": 3}
    assert not grade_gym(f"<answer>{code.format(tmp_path / 'made')}</answer>", **problem)
    assert not (tmp_path / "made").exists()
    data_set, entry = gym_problem(**problem)
    if "subprocess" not in code:  # unguarded, the same answer does it: so the guard is what stops it
        data_set.score_answer(code.format(tmp_path / "made"), entry)
        assert (tmp_path / "made").exists()


# ---- the golds of the real files ----


@needs_data
@pytest.mark.parametrize("name", [*VERL_FILES, "hmmt_feb25", "gsm8k_test"])
def test_every_gold_is_right_against_itself(name: str) -> None:
    """Without exception."""
    golds = shared_golds(name)
    assert golds
    for gold in dict.fromkeys(golds):
        assert grade(boxed(gold), gold), gold


@needs_data
@pytest.mark.parametrize("name", ["math500", "hmmt_feb25"])
def test_every_gold_is_wrong_with_other_numbers(name: str) -> None:
    """Every run of digits counted one up; most of the LaTeX goes through math-verify."""
    for gold in dict.fromkeys(shared_golds(name)):
        changed = re.sub(r"[0-9]+", lambda digits: str(int(digits[0]) + 1), gold)
        if changed != gold:
            assert not grade(boxed(changed), gold), (changed, gold)


@pytest.mark.parametrize("digits", [900, 4301, 100_000])
def test_a_gold_of_many_digits_is_compared(digits: int) -> None:
    """Python refuses to read more than 4,300 digits as a number."""
    gold = "7" * digits
    assert not grade(boxed("7"), gold)
    assert grade(boxed(f"{gold}.0"), gold) == (digits == 900)
