"""What the teacher reads of a prompt, and which teacher reads it."""

from __future__ import annotations

import json

import pytest

from prune_opd.config import DataSection, TeacherSection
from prune_opd.data.prompts import load_prompts
from prune_opd.data.source import training_prompts
from prune_opd.data.teacher_prompts import TeacherView
from prune_opd.errors import ConfigError, DataError, MissingColumnError
from tests.data.test_prompts import chatty, plain  # noqa: F401  # fixtures

TWO = [
    TeacherSection(name="math", model_name_or_path="embedded:teacher", data_sources=["gsm8k", "dapo"]),
    TeacherSection(name="code", model_name_or_path="embedded:teacher"),
]


@pytest.fixture
def rows(tmp_path):
    def write(*found):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        return str(path)

    return write


def read(train, tokenizer, teachers=(), chat_templates=None, **settings):
    """(what the student reads, what the teacher reads, which teacher) of each prompt, as text."""
    data = DataSection(train=train, **settings)
    view = TeacherView(data, tokenizer, teachers, chat_templates or [None] * max(1, len(teachers)))
    loaded = load_prompts(data, tokenizer, view)
    return [
        (tokenizer.decode(p.token_ids), tokenizer.decode(p.for_teacher.token_ids), p.for_teacher.teacher)
        for p in loaded.prompts
    ], loaded.dropped_too_long


def test_a_template_has_prompt_answer_and_columns(rows, plain):  # noqa: F811
    train = rows({"prompt": "1 + 1?", "answer": 2, "hint": "count"}, {"prompt": "{{ x }}", "answer": "3", "hint": "no"})
    found, _ = read(train, plain, teacher_prompt_template="{{ prompt }} ({{ hint }}: {{ answer }})")
    assert found == [
        ("<bos>1 + 1?", "<bos>1 + 1? (count: 2)", 0),
        ("<bos>{{ x }}", "<bos>{{ x }} (no: 3)", 0),
    ], "what a row says is text, not a template"


def test_a_chat_keeps_its_other_turns(rows, chatty):  # noqa: F811
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    train = rows({"messages": chat, "answer": "7"})
    found, _ = read(train, chatty, teacher_prompt_template="{{ prompt }}={{ answer }}", prompt_suffix="!")
    assert found == [("<bos>[system]S[user]Q ![assistant]", "<bos>[system]S[user]Q=7 ![assistant]", 0)]


def test_a_column_holds_the_prompt(rows, chatty):  # noqa: F811
    train = rows(
        {"prompt": "Q", "for_teacher": "more Q"}, {"prompt": "R", "for_teacher": [{"role": "user", "content": "T"}]}
    )
    found, _ = read(train, chatty, teacher_prompt_column="for_teacher")
    assert [theirs for _, theirs, _ in found] == ["<bos>[user]more Q[assistant]", "<bos>[user]T[assistant]"]


def test_a_chat_template_of_the_teachers_own(rows, plain, chatty):  # noqa: F811
    """Each teacher's own; its special tokens are not put in front a second time."""
    train, template = (
        rows({"prompt": "Q", "teacher": "code"}, {"prompt": "R", "teacher": "math"}),
        "<bos>#{{ messages[0].content }}#",
    )
    found, _ = read(train, plain, TWO, [None, template])
    assert found == [("<bos>Q", "<bos>#Q#", 1), ("<bos>R", "<bos>R", 0)]
    found, _ = read(train, chatty, TWO, [template, None])
    assert [theirs for _, theirs, _ in found] == ["<bos>[user]Q[assistant]", "<bos>#R#"]


def test_a_view_that_changes_nothing_gives_the_students_tokens(rows, chatty):  # noqa: F811
    found, _ = read(rows({"prompt": "Q", "teacher": "math"}), chatty, TWO)
    assert [ours == theirs for ours, theirs, _ in found] == [True]


def test_a_teacher_by_its_column_or_by_the_data_source(rows, plain):  # noqa: F811
    train = rows(
        {"prompt": "a", "teacher": "code", "data_source": "dapo"},
        {"prompt": "b", "data_source": "dapo"},
        {"prompt": "c", "teacher": None, "data_source": "gsm8k"},
    )
    assert [teacher for *_, teacher in read(train, plain, TWO)[0]] == [1, 0, 0]
    assert [t for *_, t in read(rows({"prompt": "a", "who": "code"}), plain, TWO, teacher_column="who")[0]] == [1]


def test_prompts_that_are_too_long_for_the_teacher_are_left_out(rows, plain):  # noqa: F811
    train, template = rows({"prompt": "Q", "hint": "h" * 20}, {"prompt": "Q", "hint": "h"}), "{{ hint }}{{ prompt }}"
    limits = {"max_prompt_length": 4, "max_teacher_prompt_length": 10}
    found, dropped = read(train, plain, teacher_prompt_template=template, **limits)
    assert [theirs for _, theirs, _ in found] == ["<bos>hQ"] and dropped == 1
    with pytest.raises(DataError, match="of all 2 prompts the teacher would read more than 2 tokens.*max_teacher"):
        read(train, plain, teacher_prompt_template=template, max_prompt_length=4, max_teacher_prompt_length=2)


@pytest.mark.parametrize(
    ("row", "settings", "error", "said"),
    [
        (
            {},
            {"teacher_prompt_template": "{{ answer }}"},
            MissingColumnError,
            "rows.jsonl:1.*'answer' is undefined.*prompt",
        ),
        ({"hint": None}, {"teacher_prompt_template": "{{ hint }}"}, MissingColumnError, "'hint' is undefined"),
        ({"n": 1}, {"teacher_prompt_template": "{{ 1 / (n - 1) }}"}, DataError, "rows.jsonl:1.*ZeroDivisionError"),
        ({}, {"teacher_prompt_template": "{{ prompt.__class__ }}"}, DataError, "cannot be filled in"),
        ({}, {"teacher_prompt_template": "{{ prompt"}, ConfigError, "is no Jinja template.*{{ prompt }}"),
        (
            {"prmpt": "x"},
            {"teacher_prompt_column": "prompt2"},
            MissingColumnError,
            "no column 'prompt2' .*teacher_prompt",
        ),
        ({"x": 1}, {"teacher_prompt_column": "x"}, DataError, "rows.jsonl:1: expected text or a chat"),
    ],
)
def test_what_cannot_be_written_is_named(rows, plain, row, settings, error, said):  # noqa: F811
    with pytest.raises(error, match=said):
        read(rows({"prompt": "Q", **row}), plain, **settings)


@pytest.mark.parametrize(
    ("row", "error", "said"),
    [
        ({"teacher": "maths"}, DataError, "rows.jsonl:1: column 'teacher' names teacher 'maths'.*did you mean 'math'"),
        ({"teacher": 3}, DataError, "names teacher 3; model.teachers has math, code"),
        ({}, MissingColumnError, "nothing says which teacher.*no column 'teacher'.*math, code; there are: prompt"),
        ({"data_source": "aime"}, MissingColumnError, "none of model.teachers has 'aime' among its data_sources"),
    ],
)
def test_a_prompt_without_a_teacher_is_named(rows, plain, row, error, said):  # noqa: F811
    with pytest.raises(error, match=said):
        read(rows({"prompt": "Q", **row}), plain, TWO)


@pytest.mark.parametrize("task", ["task:chain_sum", "task:running_sum"])
def test_tasks_have_a_solution(task, plain):  # noqa: F811
    data = DataSection(
        train=task,
        max_prompt_length=300,
        max_teacher_prompt_length=3000,
        teacher_prompt_template="{{ solution }}|{{ prompt }}",
    )
    prompts = training_prompts(data, plain, seed=0, view=TeacherView(data, plain)).batch(0, 3)
    assert [p.token_ids for p in training_prompts(data, plain, seed=0).batch(0, 3)] == [p.token_ids for p in prompts]
    for prompt in prompts:
        solution, _, question = plain.decode(prompt.for_teacher.token_ids).removeprefix("<bos>").partition("|")
        assert question == prompt.text and prompt.answer in solution
