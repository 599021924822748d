from __future__ import annotations

import dataclasses
import pickle
from itertools import islice

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prune_opd.config import DataSection
from prune_opd.data.source import held_out_prompts, training_prompts
from prune_opd.errors import ConfigError, DataError
from prune_opd.evaluation import gym
from prune_opd.evaluation.graders import is_right
from prune_opd.evaluation.gym import HELD_OUT_SEEDS

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: make setup-smollm")

TASK = "reasoning_gym:spell_backward?min_word_len=3&max_word_len=9"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def data(**changes: object) -> DataSection:
    return DataSection(**{"train": TASK, **changes})


def test_training_prompts_are_a_function_of_seed_and_step(tokenizer):
    def texts(seed: int, step: int, count: int = 6) -> list[str]:
        return [p.text for p in training_prompts(data(), tokenizer, seed=seed).batch(step, count)]

    assert texts(0, 3) == texts(0, 3)
    assert texts(0, 3, 4) == texts(0, 3)[:4]
    assert len({*texts(0, 0), *texts(0, 1), *texts(1, 0)}) >= 16  # 18 but for words drawn twice


def test_held_out_problems_have_seeds_of_their_own(tokenizer):
    def seed_of(prompt) -> int:
        return int(prompt.source.rsplit(" ", 1)[1])

    held_out = held_out_prompts(TASK, data(), tokenizer, count=20)
    source = training_prompts(data(), tokenizer, seed=0)
    trained = [prompt for step in range(20) for prompt in source.batch(step, 8)]
    assert [seed_of(p) for p in held_out] == list(range(20))
    assert min(map(seed_of, trained)) >= HELD_OUT_SEEDS
    assert [p.text for p in held_out_prompts(TASK, data(), tokenizer, count=5)] == [p.text for p in held_out[:5]]


def test_prompts_carry_the_question_the_suffix_and_the_verifier(tokenizer):
    (prompt,) = training_prompts(data(prompt_suffix="Be brief."), tokenizer, seed=0).batch(0, 1)
    assert prompt.text.endswith(" Be brief.")
    assert prompt.token_ids == tuple(tokenizer(prompt.text)["input_ids"])
    assert is_right(prompt, f"It is \\boxed{{{prompt.answer}}}.")
    assert is_right(prompt, prompt.answer)
    assert not is_right(prompt, f"{prompt.answer}{prompt.answer}")
    copy = pickle.loads(pickle.dumps(prompt))  # as a worker process would get it
    assert copy == prompt and is_right(copy, prompt.answer)
    assert dataclasses.replace(prompt, grader=None) == prompt  # what makes two prompts equal is the text and its source


def test_settings_of_the_task_are_followed(tokenizer):
    """Words of 9 letters need longer prompts than words of 3."""
    lengths = [
        {len(p.answer) for p in training_prompts(data(train=task), tokenizer, seed=0).batch(0, 12)}
        for task in (TASK, TASK.replace("max_word_len=9", "max_word_len=3"), TASK.replace("=3", "=9"))
    ]
    assert lengths[1:] == [{3}, {9}]
    assert len(lengths[0]) > 1


def test_prompts_that_are_too_long_are_replaced(tokenizer):
    whole = training_prompts(data(), tokenizer, seed=0).batch(0, 12)
    limit = sorted(len(p.token_ids) for p in whole)[6]
    kept = training_prompts(data(max_prompt_length=limit), tokenizer, seed=0).batch(0, 12)
    short = [p for p in whole if len(p.token_ids) <= limit]
    assert len(kept) == 12 and list(islice(kept, len(short))) == short
    assert max(len(p.token_ids) for p in kept) <= limit
    with pytest.raises(DataError, match="of 110 prompts only 0 have at most data.max_prompt_length = 5 tokens"):
        training_prompts(data(max_prompt_length=5), tokenizer, seed=0)


def test_mistakes_are_found_before_the_first_step(tokenizer):
    with pytest.raises(ConfigError, match="no task 'spell_backwards'; there are spell_backward"):
        training_prompts(data(train="reasoning_gym:spell_backwards"), tokenizer, seed=0)
    with pytest.raises(ConfigError, match="does not take these settings.*word_length"):
        training_prompts(data(train="reasoning_gym:spell_backward?word_length=3"), tokenizer, seed=0)


@pytest.mark.parametrize("task", ["list_functions", "acre", "knights_knaves", "pool_matrix", "gsm_symbolic"])
def test_a_problem_depends_on_task_and_seed_alone(task):
    """Those tasks draw from numpy, from an order made beforehand, or from a state that later calls change."""
    questions = []
    for order in ((7, 9, 2**32 - 1), (2**32 - 1, 9, 7)):
        gym._data_set.cache_clear()
        gym._entry.cache_clear()
        questions.append({seed: gym.gym_problem(task, seed)[1]["question"] for seed in order})
    assert questions[0] == questions[1]
    assert len(set(questions[0].values())) == 3
