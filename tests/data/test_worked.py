from __future__ import annotations

import random
import re
from itertools import islice

import pytest
from transformers import AutoTokenizer

from prune_opd.config import DataSection
from prune_opd.data.source import held_out_prompts, training_prompts
from prune_opd.data.worked import ANIMALS, WORKED_TASKS, CountAnimals, RunningSum, worked_problems
from prune_opd.errors import ConfigError, DataError
from prune_opd.evaluation.graders import grade
from prune_opd.models.loading import resolve_model


@pytest.fixture
def tokenizer():
    found = AutoTokenizer.from_pretrained(resolve_model("embedded:teacher"))
    found.chat_template = "{% for m in messages %}Q {{ m.content }} :{% endfor %}"
    return found


@pytest.mark.parametrize("task", WORKED_TASKS)
def test_solutions_are_graded_right_in_every_phrasing_and_slips_wrong(task):
    rng = random.Random(0)
    for problem in islice(worked_problems(task, "train", 0), 50):
        texts = {problem.solution(rng) for _ in range(5)}
        assert len(texts) == 5
        assert all(grade(text, problem.answer) for text in texts)
        assert not any(grade(problem.solution(rng), str(int(problem.answer) + d)) for d in (-1, 1))
    slips = [grade(p.solution(rng, slip=0.3), p.answer) for p in islice(worked_problems(task, "train", 1), 100)]
    assert 0 < sum(slips) < 60


def test_every_running_total_is_the_sum_of_what_came_before():
    rng = random.Random(1)
    for problem in islice(worked_problems("running_sum", "train", 2), 50):
        said = [int(n) for n in re.findall(r"(\d+)(?=[.}])", problem.solution(rng))]
        totals = [sum(problem.numbers[: i + 1]) for i in range(len(problem.numbers))]
        assert said == [*totals, totals[-1]]
        assert all(str(n) in problem.question for n in problem.numbers)


def test_counting_says_of_each_word_whether_it_is_an_animal():
    for problem in islice(worked_problems("count_animals", "train", 0), 20):
        text = problem.solution(random.Random(0))
        for word in set(problem.words):
            denied = re.search(rf"{word}, (which is not|no animal)", text)
            assert (denied is None) == (word in ANIMALS)


@pytest.mark.parametrize("task", WORKED_TASKS)
def test_training_and_held_out_problems_never_coincide_and_streams_repeat(task):
    def keys(split, seed, count=800):
        return [p.key for p in islice(worked_problems(task, split, seed), count)]

    assert keys("train", 3) == keys("train", 3) != keys("train", 4)
    held_out = {key for seed in range(3) for key in keys("held_out", seed)}
    assert not held_out & {key for seed in range(3) for key in keys("train", seed)}


def test_the_question_belongs_to_the_problem():
    assert RunningSum((1, 2)).question == RunningSum((1, 2)).question
    assert (
        len({re.sub(r"[\d +]+", "", p.question) for p in islice(worked_problems("running_sum", "train", 0), 50)}) == 3
    )
    assert CountAnimals(("dog", "lamp")).question == "How many of these are animals: dog, lamp?"


def test_as_prompts_they_are_user_turns_with_fresh_ones_at_every_step(tokenizer):
    data = DataSection(train="task:running_sum", max_prompt_length=200)
    source = training_prompts(data, tokenizer, seed=0)
    first, second = source.batch(0, 4), source.batch(1, 4)
    assert [p.text for p in first] == [p.text for p in source.batch(0, 4)]
    assert not {p.text for p in first} & {p.text for p in second}
    for prompt in first:
        assert prompt.text.startswith("Q ") and prompt.text.endswith(" :")
        assert list(prompt.token_ids) == tokenizer(prompt.text)["input_ids"]
        assert prompt.is_gradable
    held_out = held_out_prompts("task:count_animals", data, tokenizer, count=3)
    assert [p.source for p in held_out] == [f"task:count_animals held_out[{i}]" for i in range(3)]


def test_prompts_that_are_too_long_are_replaced_and_none_that_fits_is_an_error(tokenizer):
    lengths = [
        len(p.token_ids) for p in training_prompts(DataSection(train="task:running_sum"), tokenizer, seed=0).batch(0, 9)
    ]
    limit = sorted(lengths)[4]
    fitting = training_prompts(DataSection(train="task:running_sum", max_prompt_length=limit), tokenizer, seed=0)
    assert max(len(p.token_ids) for p in fitting.batch(0, 9)) <= limit < max(lengths)
    with pytest.raises(DataError, match="the shortest has"):
        training_prompts(DataSection(train="task:running_sum", max_prompt_length=2), tokenizer, seed=0).batch(0, 1)


def test_an_unknown_task_names_those_there_are(tokenizer):
    with pytest.raises(ConfigError, match="task:chain_sum, task:running_sum, task:count_animals"):
        training_prompts(DataSection(train="task:walking_sum"), tokenizer, seed=0)
