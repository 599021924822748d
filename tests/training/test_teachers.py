"""Teachers of a run: one that moves, several, and what of them contradicts itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from prune_opd.config import LoraSection, load_config
from prune_opd.data.tasks import problems
from prune_opd.errors import CheckpointError, ConfigError
from prune_opd.models.loading import add_adapters
from prune_opd.preflight.memory import estimate_memory
from prune_opd.training.moving_teacher import MovingTeacher
from tests.families import tiny_model
from tests.training.test_trainer import HINTED, IN_FLIGHT, RECIPE, SMALL, records, run


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_moving_teacher_is_the_running_average(family, lora):
    """By the formula in float64, with the adapters' product worked out by hand."""
    student = tiny_model(family, seed=3)
    teacher = copy.deepcopy(student)
    expected = {name: weight.detach().double().clone() for name, weight in teacher.named_parameters()}
    if lora:
        torch.manual_seed(0)
        student = add_adapters(student, LoraSection(r=2, alpha=6))
    mover = MovingTeacher(teacher, 0.75)
    for _ in range(3):
        trained = [(name, weight) for name, weight in student.named_parameters() if weight.requires_grad]
        with torch.no_grad():
            for _, weight in trained:
                weight += torch.randn_like(weight) / 10
        plain = {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): weight.detach().double()
            for name, weight in student.named_parameters()
            if ".lora_" not in name
        }
        for name, weight in trained if lora else ():
            if ".lora_B." in name:
                product = weight.double() @ student.get_parameter(name.replace("lora_B", "lora_A")).double()
                plain[name.removeprefix("base_model.model.").replace(".lora_B.default", "")] += 6 / 2 * product
        mover.follow(student)
        expected = {name: 0.75 * expected[name] + 0.25 * plain[name] for name in expected}
    for name, weight in teacher.named_parameters():
        torch.testing.assert_close(weight.double(), expected[name], atol=1e-6, rtol=1e-5)


def test_with_a_decay_of_zero_it_is_the_student_of_the_step_before(tmp_path):
    trainer = run(tmp_path / "run", *HINTED, "model.teacher_ema_decay=0", "training.steps=2")
    weights, teacher = dict(trainer.parts.student.named_parameters()), trainer.parts.moving_teacher.state_dict()
    assert weights.keys() == teacher.keys() and all(torch.equal(weights[name], teacher[name]) for name in weights)
    saved = load_file(tmp_path / "run/checkpoints/step_2/teacher.safetensors")
    assert all(torch.equal(saved[name], teacher[name]) for name in teacher)


def test_a_checkpoint_without_its_moving_teacher_is_refused(tmp_path):
    """As one that was edited, manifest and all."""
    run(tmp_path / "run", *HINTED, "training.steps=2")
    checkpoint = tmp_path / "run/checkpoints/step_2"
    (checkpoint / "teacher.safetensors").unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["teacher.safetensors"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not fit this model or is damaged.*teacher.safetensors"):
        run(tmp_path / "run", *HINTED, "training.steps=2", resume="auto")


TWO = """
[[model.teachers]]
name = "a"
model_name_or_path = "embedded:teacher"
[[model.teachers]]
name = "b"
model_name_or_path = "embedded:{second}"
"""


@pytest.fixture
def two(tmp_path):
    """two(second, settings): a recipe with two teachers, whose prompts say by turns which."""
    rows = [
        {"prompt": p.prompt, "answer": p.answer, "teacher": "ab"[i % 2]}
        for i, p in zip(range(12), problems("train", 1), strict=False)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(second):
        recipe = tmp_path / "two.toml"
        base = RECIPE.read_text().replace('teacher_model_name_or_path = "embedded:teacher"', "")
        recipe.write_text(base + TWO.format(second=second))
        return recipe, [*SMALL, f"data.train={tmp_path / 'rows.jsonl'}"]

    return write


@pytest.mark.parametrize("settings", [[], IN_FLIGHT], ids=["window", "in-flight"])
def test_two_teachers_that_are_one_train_what_one_trains(tmp_path, two, monkeypatch, settings):
    recipe, small = two("teacher")
    monkeypatch.setattr("tests.training.test_trainer.RECIPE", recipe)
    monkeypatch.setattr("tests.training.test_trainer.SMALL", small)
    run(tmp_path / "two", *settings)
    monkeypatch.setattr("tests.training.test_trainer.RECIPE", RECIPE)
    run(tmp_path / "one", *settings)
    both, alone = (records(tmp_path / name) for name in ("two", "one"))
    for mine, theirs in zip(both[1:], alone[1:], strict=True):
        for name, value in theirs.items():
            if isinstance(value, float):
                assert mine[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
        asked = [mine[f"teacher/{name}/rollouts"] for name in "ab"]
        assert sum(asked) == 4
        for name, key in (("overlap_ratio", "distillation/overlap_ratio"), ("mean_length", "completions/mean_length")):
            weight = [
                mine.get(f"teacher/{t}/mean_length", 0) * n if name != "mean_length" else n
                for t, n in zip("ab", asked, strict=True)
            ]
            each = [mine.get(f"teacher/{t}/{name}", 0) for t in "ab"]
            mean = sum(w * v for w, v in zip(weight, each, strict=True)) / sum(weight)
            assert mean == pytest.approx(theirs[key]), name


def test_each_teacher_has_its_own_say(tmp_path, two, monkeypatch):
    """The second teacher is the student itself: its prompts have an overlap of one, and no event."""
    recipe, small = two("low-student")
    monkeypatch.setattr("tests.training.test_trainer.RECIPE", recipe)
    monkeypatch.setattr("tests.training.test_trainer.SMALL", small)
    run(tmp_path / "run", "training.steps=1", "training.learning_rate=1e-9", "rollout.prompts_per_step=6")
    step = records(tmp_path / "run")[1]
    assert step["teacher/b/overlap_ratio"] > 0.999 > 0.8 > step["teacher/a/overlap_ratio"]
    assert step["teacher/b/events"] < 1e-3 < 0.1 < step["teacher/a/events"]


def test_memory_has_room_for_each_teacher(two):
    recipe, small = two("high-student")
    both, alone = (estimate_memory(load_config(path, [*small, *IN_FLIGHT])) for path in (recipe, RECIPE))
    assert both.teacher == 2 * alone.teacher and both.cache_teacher == 2 * alone.cache_teacher
    longer = estimate_memory(load_config(RECIPE, [*SMALL, *HINTED]))
    assert longer.cache_teacher == alone.cache_teacher * (240 + 40) // (64 + 40)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.teacher_ema_decay=0.5"], "both must begin as the same model"),
        ([*HINTED, "model.teacher_dtype=bfloat16"], "rounds small moves to nothing"),
        ([*HINTED, "rollout.ahead=true"], "would move the teacher while rollout.ahead"),
        ([*HINTED, "model.teacher_placement=sharded"], "needs one teacher, whole in each process"),
        ([*HINTED, "objective.loss=jsd"], "was not built for a teacher that reads other prompts"),
        ([*HINTED, "data.teacher_prompt_column=x"], "both say what the teacher reads"),
        (["data.teacher_prompt_column=x"], "needs a data set with columns"),
        (["data.teacher_prompt_template={{"], "no Jinja template"),
        (["data.train=task:running_sum", "data.teacher_chat_template=teacher"], "has none; name a Jinja file"),
        (
            ["data.train=task:running_sum", "data.teacher_chat_template=/no/file"],
            "cannot be read.*path of a Jinja file",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "run", *settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["pruning.threshold=auto"], "was not built for model.teachers; set a number"),
        (["objective.loss=jsd"], "was not built for model.teachers"),
        (["model.teacher_model_server_url=http://127.0.0.1:9"], "give each of model.teachers a server_url"),
        (["model.teacher_model_name_or_path=embedded:high-student"], "name different teachers"),
        (
            [
                'model.teachers=[{name="a",model_name_or_path="x"},{name="a",model_name_or_path="y"}]',
                "model.teacher_model_name_or_path=x",
            ],
            "has the name 'a' twice",
        ),
    ],
)
def test_several_teachers_that_contradict_themselves(two, changes, said):
    recipe, small = two("high-student")
    with pytest.raises(ConfigError, match=said):
        load_config(recipe, [*small, *changes])
