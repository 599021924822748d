"""`data.end_tokens`: which ids count as one end, and a run of a pair whose models end with different ones."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from prune_opd.config import load_config
from prune_opd.errors import ModelError
from prune_opd.models.loading import load_student, one_end
from prune_opd.reporting.saturation import STEPS, saturated, when_saturated
from prune_opd.training.build import build_ends, build_tokenizers
from prune_opd.training.build_teachers import build_teacher
from prune_opd.training.trainer import Trainer

PAD, EOS = 0, 1  # of the embedded tokenizer
SMALL = [
    "rollout.prompts_per_step=2",
    "rollout.num_generations=2",
    "training.steps=2",
    "evaluation.num_problems=4",
    "evaluation.k=1",
]


@pytest.fixture
def recipes(pytestconfig):
    return pytestconfig.rootpath / "recipes"


def ends_of(path, *settings):
    config = load_config(path, list(settings))
    student = load_student(config, torch.device("cpu"))
    return build_ends(config, student, *build_tokenizers(config)), student.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("recipe", "choice", "ends", "named"),
    [
        ("other-end", "auto", (PAD, EOS), [PAD, EOS]),
        ("other-end", "equivalent", (PAD, EOS), [PAD, EOS]),
        ("other-end", "distinct", (), PAD),
        ("high", "auto", (), EOS),
        ("high", "equivalent", (), EOS),
    ],
)
def test_which_ids_count_as_one(recipes, recipe, choice, ends, named):
    assert ends_of(recipes / f"{recipe}.toml", f"data.end_tokens={choice}") == (ends, named)


def test_lists_that_agree_are_merged_only_when_asked():
    assert one_end([3, 5], [5, 3], "auto", 5) == ()
    assert one_end([3, 5], [5, 3], "equivalent", 5) == (5, 3)
    assert one_end([3], [3, 5], "auto", 3) == (3, 5)
    assert one_end([3], [5], "distinct", 3) == ()


def test_what_cannot_be_merged_is_refused(recipes):
    config = load_config(
        recipes / "other-end.toml",
        ["model.teacher_model_server_url=http://127.0.0.1:9", "model.teacher_server.top_logprobs=8"],
    )
    student = load_student(config, torch.device("cpu"))
    parts = {"config": config, "student": student, "tokenizer": None, "run_dir": None, "device": torch.device("cpu")}
    with pytest.raises(ModelError, match="top_logprobs = 8 is too few.*so 9 are needed for the 8 likeliest"):
        build_teacher(**parts, ends=(PAD, EOS))
    with pytest.raises(ModelError, match='id 149 ends a response.*share 149 ids.*data.end_tokens = "distinct"'):
        build_teacher(**parts, ends=(PAD, 149))


@pytest.mark.parametrize(("choice", "ended"), [("auto", True), ("distinct", False)])
def test_a_run_in_which_the_two_end_differently(recipes, tmp_path, choice, ended):
    """Merged, the student's ends and the teacher's agree; apart, nearly all of the loss is the quarrel about them."""
    config = load_config(recipes / "other-end.toml", [*SMALL, f"data.end_tokens={choice}"])
    console = Console(record=True, width=200)
    trainer = Trainer(config, tmp_path, console=console)
    trainer.train()
    said = console.export_text()
    assert ("'<pad>' (0), '<eos>' (1) count as one action" in said) == ended
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert first["completions/eos_rate"] == 1.0
    assert (first["loss"] < 0.1) == ended, "about 16 nats at one position in 120"
    saved = json.loads((tmp_path / "checkpoints/step_2/generation_config.json").read_text())
    assert saved["eos_token_id"] == ([PAD, EOS] if ended else PAD)


# ---- a window that grows because nothing ends ----


def steps(clipped, *, grows=True):
    lengths = [100 + 4 * i * grows for i in range(len(clipped) + 1)]
    return [
        {
            "step": i + 1,
            "completions/clipped_ratio": share,
            "prune_opd/current_max_response_length": lengths[i],
            "prune_opd/next_max_response_length": lengths[i + 1],
        }
        for i, share in enumerate(clipped)
    ]


def test_a_saturated_window_is_named_once_for_each_stretch():
    full = steps([1.0] * (STEPS + 5))
    assert saturated(full[: STEPS - 1]) is None
    assert f"up to step {STEPS}, for {STEPS} steps at least 95%" in saturated(full[:STEPS])
    assert "grew from 100 to 140 tokens" in saturated(full[:STEPS])
    assert len(list(when_saturated(full))) == 1
    twice = steps([*[1.0] * STEPS, 0.5, *[0.97] * STEPS])
    assert len(list(when_saturated(twice))) == 2
    assert not list(when_saturated(steps([1.0] * STEPS, grows=False))) and not list(when_saturated([]))
    assert not list(when_saturated(steps([*[1.0] * (STEPS - 1), 0.9] * 3)))
