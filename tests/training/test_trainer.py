"""Whole runs on the embedded pair: files, resume, comparison, and what a user may get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_opd.config import load_config
from prune_opd.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    RunDirectoryError,
    TokenizerError,
)
from prune_opd.evaluation.graders import grade
from prune_opd.models import loading as models
from prune_opd.models.loading import resolve_model
from prune_opd.reporting.records import bytes_of_text
from prune_opd.training.trainer import Trainer
from tests.openai_server import serving

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
SMALL = [
    "training.steps=4",
    "training.save_every=2",
    "rollout.prompts_per_step=2",
    "rollout.num_generations=2",
    "rollout.max_completion_length=40",
    "pruning.dynamic_response_length.init_len=16",
    "pruning.dynamic_response_length.min_len=16",
    "pruning.dynamic_response_length.max_len=40",
    "evaluation.num_problems=3",
    "evaluation.every=2",
    "evaluation.k=1",
    "evaluation.max_tokens=30",
]
IN_FLIGHT = ["pruning.in_flight.enable=true", "pruning.in_flight.chunk=8", "pruning.w_drop=0.2"]
BUDGET = ["rollout.token_budget=100"]
CONTROLS = [
    "pruning.enable=false",
    "control.lengths=[16, 24, 20, 40]",
    "control.kept_tokens=[9, 30, 20, 50]",
    "objective.weight_normalization=weight_mean",
]
HINTED = [
    *IN_FLIGHT,
    "model.teacher_model_name_or_path=student",
    "model.teacher_ema_decay=0.5",
    "data.teacher_prompt_template={{ solution }} {{ prompt }}",
    "data.max_teacher_prompt_length=240",
    "training.learning_rate=1e-3",
]
SECONDS = ("time/", "eta_seconds")


def quiet() -> Console:
    return Console(quiet=True)


def run(folder, *settings, resume="never"):
    trainer = Trainer(load_config(RECIPE, [*SMALL, *settings]), folder, resume=resume, console=quiet())
    trainer.train()
    return trainer


def records(folder, name="metrics.jsonl"):
    """Without what a clock says."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(SECONDS)} for row in rows]


def copy_of_student(folder) -> Path:
    shutil.copytree(resolve_model("embedded:low-student"), folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [[], [*IN_FLIGHT, *BUDGET], CONTROLS, HINTED],
    ids=["window", "in-flight with a budget", "controls", "a moving teacher that sees more"],
)
def test_a_run_that_was_cut_off_and_resumed_is_the_run_that_was_not(tmp_path, settings):
    run(tmp_path / "whole", *settings)
    run(tmp_path / "cut", *settings, "training.steps=2")
    # As a killed process leaves them: a step logged past the checkpoint, and half a line.
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0}\n{"step": 4, "lo')
    run(tmp_path / "cut", *settings, resume="auto")
    for name in ("metrics.jsonl", "drift.jsonl", "rollouts.jsonl"):
        whole, cut = records(tmp_path / "whole", name), records(tmp_path / "cut", name)
        if name == "metrics.jsonl":  # the number of steps is part of a record, and the first half had two
            whole, cut = ([{k: v for k, v in r.items() if k != "steps"} for r in rows] for rows in (whole, cut))
        assert cut == whole, name
    weights = [load_file(tmp_path / x / "checkpoints/step_4/model.safetensors") for x in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_budget_of_tokens_pays_for_prompts_and_each_prompt_of_a_data_set_comes_once(tmp_path):
    names = [f"a {i // 10} b {i % 10} c {i * 7 % 10}" for i in range(60)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"prompt": f"Q {name} :"}) + "\n" for name in names))
    settings = [*BUDGET, f"data.train={tmp_path / 'own.jsonl'}", "tracking.rollouts_per_step=99"]
    trainer = run(tmp_path / "run", *settings, *IN_FLIGHT)
    steps = [row for row in records(tmp_path / "run") if row["step"] > 0]
    asked: dict[int, list[str]] = {}
    for row in records(tmp_path / "run", "rollouts.jsonl"):
        asked.setdefault(row["step"], []).append(row["prompt"])
    for this, following in zip(steps, steps[1:], strict=False):
        per_prompt = this["tokens/trained"] / this["rollout/prompts"]
        assert following["rollout/prompts"] == min(max(round(100 / per_prompt), 1), 16)
    assert len({row["rollout/prompts"] for row in steps}) > 1, "the budget changed nothing"
    once = [prompt for step in asked.values() for prompt in step[::2]]
    assert len(once) == len(set(once)) == trainer.run.budget.first == sum(row["rollout/prompts"] for row in steps)


def test_training_changes_the_student_and_the_window_moves(tmp_path):
    trainer = run(tmp_path / "run")
    before = load_file(Path(resolve_model("embedded:low-student")) / "model.safetensors")
    after = load_file(tmp_path / "run/checkpoints/step_4/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    rows = [r for r in records(tmp_path / "run") if r["step"] > 0]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert rows[1]["prune_opd/current_max_response_length"] == rows[0]["prune_opd/next_max_response_length"] != 16
    assert trainer.totals.student_tokens == sum(r["tokens/generated"] for r in rows)
    for name in ("config.json", "env.json", "drift.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    for row in records(tmp_path / "run", "drift.jsonl"):
        assert [len(bytes_of_text(shared)) for shared in row["shared"]] == row["length"]


def test_the_same_recipe_gives_the_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, "training.steps=1", f"training.seed={seed}")
    assert records(tmp_path / "a") == records(tmp_path / "b") != records(tmp_path / "c")


def test_lora_bf16_and_checkpointing_run(tmp_path):
    trainer = run(
        tmp_path / "run",
        "training.steps=2",
        "model.lora.r=4",
        "training.bf16=true",
        "training.gradient_checkpointing=true",
    )
    trained = {name for name, p in trainer.parts.student.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    run(tmp_path / "run", "training.steps=3", "model.lora.r=4", "training.bf16=true", resume="auto")


def test_a_run_directory_is_never_overwritten(tmp_path):
    run(tmp_path / "run", "training.steps=1")
    with pytest.raises(RunDirectoryError, match="--resume auto"):
        run(tmp_path / "run", "training.steps=1")


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    run(tmp_path / "run", "training.steps=2")
    with pytest.raises(CheckpointError, match=r"objective\.top_k was 8, is now 4"):
        run(tmp_path / "run", "objective.top_k=4", resume="auto")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        run(tmp_path / "run", resume=str(tmp_path / "nowhere"))
    (tmp_path / "run/checkpoints/step_2/model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        run(tmp_path / "run", resume="auto")


# ---- models and tokenizers that do not fit ----


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))


def test_token_maps_are_compared_not_sizes(tmp_path):
    student = copy_of_student(tmp_path / "student")
    vocabulary = json.loads((student / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["+"], words["="] = words["="], words["+"]
    (student / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(TokenizerError, match="2 tokens differ in id"):
        run(tmp_path / "run", f"model.model_name_or_path={student}")


@pytest.mark.parametrize("token, words", [("pad_token", "no pad token"), ("eos_token", "no EOS token")])
def test_missing_special_tokens(tmp_path, token, words):
    student = copy_of_student(tmp_path / "student")
    edit_json(student / "tokenizer_config.json", **{token: None})
    (student / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(TokenizerError, match=words):
        run(tmp_path / "run", f"model.model_name_or_path={student}")


def test_a_padded_embedding_is_fine(tmp_path):
    """Rows beyond the tokens, as many releases have: nothing of them may be sampled or scored."""
    from transformers import AutoModelForCausalLM

    student = copy_of_student(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(student)
    model.resize_token_embeddings(model.config.vocab_size + 13)
    with torch.no_grad():
        model.get_input_embeddings().weight[-13:] = 9.0
    model.save_pretrained(student)
    trainer = run(tmp_path / "run", f"model.model_name_or_path={student}", "training.steps=1")
    assert trainer.run.update.vocab_size == model.config.vocab_size - 13
    run(tmp_path / "plain", "training.steps=1")
    assert records(tmp_path / "run", "drift.jsonl") == records(tmp_path / "plain", "drift.jsonl")


def test_settings_that_do_not_fit_the_models(tmp_path):
    with pytest.raises(ModelError, match="top_k = 9999 is above the shared vocabulary"):
        run(tmp_path / "k", "objective.top_k=9999")
    with pytest.raises(ModelError, match="512 positions"):
        run(tmp_path / "long", "rollout.max_completion_length=500")
    with pytest.raises(ModelError, match="embedded:low-student"):
        run(tmp_path / "name", "model.model_name_or_path=embedded:lowstudent")
    with pytest.raises(DataError, match=r"prompts\.jsonl"):
        (tmp_path / "prompts.jsonl").write_text("")
        run(tmp_path / "data", f"data.train={tmp_path / 'prompts.jsonl'}")
    assert not any((tmp_path / name).exists() for name in ("k", "long", "name", "data")), "nothing was begun"


@pytest.mark.parametrize("settings", [[], IN_FLIGHT], ids=["window", "in-flight"])
def test_a_served_teacher_trains_the_same_student(tmp_path, settings):
    """Over HTTP with every token of the vocabulary listed, steps are those of the in-process teacher."""
    folder = resolve_model("embedded:teacher")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    steps = ["training.steps=2", "evaluation.every=2", "rollout.prompts_per_step=1"]
    run(tmp_path / "local", *settings, *steps)
    with serving(model, tokenizer, name="embedded:teacher", max_logprobs=149) as server:
        served = [f"model.teacher_model_server_url={server.url}", "model.teacher_server.top_logprobs=149"]
        run(tmp_path / "served", *settings, *steps, *served)
        server.model = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:high-student"))
        with pytest.raises(ModelError, match="serves another model than before"):
            run(tmp_path / "served", *settings, *steps, *served, "training.steps=3", resume="auto")
    for local, other in zip(records(tmp_path / "local"), records(tmp_path / "served"), strict=True):
        # Servers read a prefix again, and look more rarely; approx takes no lists.
        other_by_nature = (
            "tokens/scored",
            "tokens/generated",
            "rollout/slot_occupancy",
            "eval/ci95",
            "eval/per_problem",
        )
        local, other = ({k: v for k, v in r.items() if k not in other_by_nature} for r in (local, other))
        assert local == pytest.approx(other, abs=2e-4)


# ---- a reward of the task ----


@pytest.mark.slow
def test_a_run_with_the_built_in_grader_writes_its_rewards_and_resumes_exactly(tmp_path):
    """embedded:high-student is right often enough that groups differ."""
    settings = [
        "model.model_name_or_path=embedded:high-student",
        "reward.function=grade",
        "rollout.max_completion_length=200",
        "pruning.enable=false",
        "training.steps=2",
        "training.save_every=1",
        "tracking.rollouts_per_step=4",
    ]
    with pytest.warns(UserWarning, match="pruning.enable is false"):
        run(tmp_path / "whole", *settings)
        run(tmp_path / "cut", *settings, "training.steps=1")
        run(tmp_path / "cut", *settings, resume="auto")
    steps = [row for row in records(tmp_path / "whole") if "reward/mean" in row]
    texts = records(tmp_path / "whole", "rollouts.jsonl")
    assert len(steps) == 2 and len(texts) == 8
    for row in texts:
        assert row["reward"] == grade(row["response"], row["answer"])
    for step in steps:
        of_step = [row["reward"] for row in texts if row["step"] == step["step"]]
        assert step["reward/mean"] == pytest.approx(sum(of_step) / 4)
    assert 0 < sum(row["reward"] for row in texts) < 8
    assert records(tmp_path / "whole", "rollouts.jsonl") == records(tmp_path / "cut", "rollouts.jsonl")


def test_rollouts_that_were_cut_may_be_left_out(tmp_path):
    """The low student rarely ends within 16 tokens: its answers are cut, and then there is no reward."""
    run(tmp_path / "run", "reward.function=grade", "reward.mask_truncated_completions=true", "training.steps=1")
    (row,) = [row for row in records(tmp_path / "run") if "reward/missing" in row]
    assert row["reward/missing"] == pytest.approx(1 - row["completions/eos_rate"]) and row["reward/missing"] > 0.5
    texts = records(tmp_path / "run", "rollouts.jsonl")
    assert [row["reward"] is None for row in texts] == [not row["finished"] for row in texts]


def test_training_data_without_answers_cannot_be_graded(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "Q a 1 b 2 :", "answer": "3"}\n{"prompt": "Q a 2 b 2 :", "answer": null}\n')
    with pytest.raises(DataError, match="rows.jsonl:2.*no gold answer, which reward.function = 'grade' needs"):
        run(tmp_path / "run", f"data.train={data}", "reward.function=grade")
    assert not (tmp_path / "run").exists()


def test_an_unknown_reward_function_is_found_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="module nowhere cannot be imported"):
        run(tmp_path / "run", "reward.function=nowhere:f")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["3", "", "  "], r"rows.jsonl:2: no gold answer.*\(column 'answer' is empty\); 2 of 3 prompts have none"),
        (["3", None], r"rows.jsonl:2.*\(column 'answer' holds null\); 1 of 2"),
        ([["3"], ["4"]], r"rows.jsonl:1.*\(column 'answer' holds a list\); 2 of 2"),
        ([{"x": 1}], r"rows.jsonl:1.*\(column 'answer' holds an object\)"),
    ],
)
@pytest.mark.parametrize("use", ["reward", "evaluation"])
def test_a_wrong_gold_column_is_named_before_a_model_is_loaded(tmp_path, monkeypatch, rows, words, use):
    monkeypatch.setattr(models, "load_student", lambda *_: pytest.fail("a model was loaded"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "Q a 1 b 2 :", "answer": answer}) + "\n" for answer in rows))
    settings = {
        "reward": [f"data.train={data}", "reward.function=grade"],
        "evaluation": [f"evaluation.data={data}", "evaluation.num_problems=5"],
    }
    with pytest.raises(DataError, match=words):
        run(tmp_path / "run", *settings[use])
