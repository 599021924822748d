"""Reward functions by name: what they are called with, what they may return, and what is said when they do not."""

from __future__ import annotations

import functools
import math
import sys

import numpy as np
import pytest
import torch

from prune_opd.errors import ConfigError, RewardError
from prune_opd.evaluation import graders
from prune_opd.rewards import load_reward
from prune_opd.types import Prompt

PROMPTS = [
    Prompt("1 + 1 =", (1, 2), "2", "sums.jsonl:1"),
    Prompt("1 + 1 =", (1, 2), "2", "sums.jsonl:1"),
    Prompt("Name a bird.", (3,), None, "birds.jsonl:7"),
]
COMPLETIONS = [r"so \boxed{2}", r"so \boxed{3}", "a wren"]


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """Write a module of rewards into the folder that the program was started in; returns a loader of its functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path[:])
    count = iter(range(1000))

    def load(source: str, name: str = "f"):
        module = f"rewards_of_{tmp_path.name.replace('-', '_')}_{next(count)}"
        (tmp_path / f"{module}.py").write_text(source)
        return load_reward(f"{module}:{name}")

    return load


def test_it_is_called_by_keyword_with_three_lists(reward):
    function = reward("seen = []\ndef f(**kwargs):\n    seen.append(kwargs)\n    return [1, 0, 0.5]")
    assert function(PROMPTS, COMPLETIONS).tolist() == [1.0, 0.0, 0.5]
    (seen,) = function.args[1].__globals__["seen"]
    assert seen == {
        "prompts": ["1 + 1 =", "1 + 1 =", "Name a bird."],
        "completions": COMPLETIONS,
        "answers": ["2", "2", None],
    }


def test_a_function_in_the_form_of_trl_works(reward):
    function = reward("def f(completions, **kwargs):\n    return [float(len(c)) for c in completions]")
    assert function(PROMPTS, COMPLETIONS).tolist() == [12.0, 12.0, 6.0]


@pytest.mark.parametrize(
    "returned", ["[1, True, 2.0]", "(1, 1.0, 2)", "np.array([1, 1, 2])", "torch.tensor([1, 1, 2])", "iter([1, 1, 2])"]
)
def test_any_sequence_of_numbers_will_do(reward, returned):
    function = reward(f"import numpy as np, torch\ndef f(**kwargs):\n    return {returned}")
    got = function(PROMPTS, COMPLETIONS)
    assert got.tolist() == [1, 1, 2] and got.dtype == torch.float64


def test_none_is_no_reward(reward):
    got = reward("def f(**kwargs):\n    return [1, None, 0]")(PROMPTS, COMPLETIONS)
    assert got[0] == 1 and math.isnan(got[1]) and got[2] == 0


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-float('inf')", "'x'", "[1]", "1j"])
def test_a_reward_that_is_no_finite_number_is_named(reward, value):
    function = reward(f"def f(**kwargs):\n    return [0, 0, {value}]")
    with pytest.raises(RewardError, match=r"returned .* for an answer to birds.jsonl:7 that begins 'a wren'"):
        function(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1, 2]", "returned 2 rewards for 3 completions"),
        ("return None", "returned a NoneType"),
        ("return 1.0", "returned a float"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("raise KeyError('gold')", "raised KeyError: 'gold'"),
    ],
)
def test_other_failures_are_named(reward, body, said):
    with pytest.raises(RewardError, match=rf"^reward.function = 'rewards_of_.*:f' {said}"):
        reward(f"def f(**kwargs):\n    {body}")(PROMPTS, COMPLETIONS)


def test_a_function_that_does_not_take_the_keywords_is_told_which_there_are(reward):
    with pytest.raises(RewardError, match="TypeError.*keywords prompts, completions and answers"):
        reward("def f(data_source, solution_str):\n    return 1.0")(PROMPTS, COMPLETIONS)


def test_what_cannot_be_loaded(reward):
    with pytest.raises(ConfigError, match=r"module no_such_package.rewards cannot be imported \(ModuleNotFoundError"):
        load_reward("no_such_package.rewards:f")
    with pytest.raises(ConfigError, match="SyntaxError"):
        reward("def f(:")
    with pytest.raises(ConfigError, match="there is no lenght in rewards_of_.*; did you mean length?"):
        reward("def length(**kwargs):\n    return []", "lenght")
    with pytest.raises(ConfigError, match="is a int, no function"):
        reward("f = 5")


def test_a_dotted_name_reaches_into_a_class(reward):
    function = reward(
        "class A:\n    @staticmethod\n    def f(answers, **kw):\n        return [1] * len(answers)", "A.f"
    )
    assert function(PROMPTS, COMPLETIONS).tolist() == [1, 1, 1]


# ---- the built-in graders ----


def test_grade_is_the_grader_of_the_prompt():
    own = Prompt("Name a bird.", (3,), None, "birds.jsonl:7", grader=lambda response: "wren" in response)
    got = load_reward("grade")([*PROMPTS[:2], own], COMPLETIONS)
    assert got.tolist() == [1.0, 0.0, 1.0] and got.dtype == torch.float64


def test_grade_uses_the_verifiers_of_reasoning_gym():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: make setup-smollm")
    from prune_opd.evaluation.graders import grade_gym
    from prune_opd.evaluation.gym import gym_problem

    task = "reasoning_gym:letter_counting"
    prompts, golds = [], []
    for seed in range(3):
        entry = gym_problem(task, seed)[1]
        golds.append(entry["answer"])
        prompts.append(Prompt(entry["question"], (1,), None, task, functools.partial(grade_gym, task=task, seed=seed)))
    texts = [f"<answer>{golds[0]}</answer>", golds[1], "<answer>many</answer>"]
    assert load_reward("grade")(prompts, texts).tolist() == [1.0, 1.0, 0.0]


def test_a_hostile_answer_costs_that_answer(monkeypatch):
    monkeypatch.setattr(graders, "VERIFY_SECONDS", 0.5)
    prompts = [Prompt("2 + 3 =", (1,), "5", f"sums.jsonl:{i}") for i in range(3)]
    got = load_reward("grade")(prompts, [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\frac{10}{2}}", "\\boxed{" * 100_000])
    assert np.array_equal(got, [0.0, 1.0, 0.0])
