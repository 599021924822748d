"""`prune-opd probe` on the embedded pairs: what it finds is so, and what it continues is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from prune_opd.cli import app
from prune_opd.config import load_config
from prune_opd.errors import ConfigError
from prune_opd.experiments import probe as module
from prune_opd.experiments.probe import Cuts, build_pair, cut_rollouts, probe, right_continuations, scored_rollouts
from prune_opd.training.build import build_problems, build_tokenizers

RECIPES = Path(__file__).parents[2] / "recipes"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def derail():
    """The derail pair, 12 problems and the student's scored rollouts."""
    config = load_config(RECIPES / "derail.toml", ["evaluation.num_problems=12"])
    tokenizers = build_tokenizers(config)
    prompts = build_problems(config, tokenizers[0])
    pair = build_pair(config, prompts, tokenizers, QUIET)
    return pair, prompts, *scored_rollouts(pair, prompts, seed=0)


def test_drift_is_real_on_the_derail_pair(tmp_path):
    done = CliRunner().invoke(
        app,
        ["probe", str(RECIPES / "derail.toml"), "--problems", "24", "--lengths", "4", "--continuations", "1"]
        + ["--json", str(tmp_path / "new" / "probe.json")],
        catch_exceptions=False,
    )
    assert done.exit_code == 0 and "drift is real here" in done.output and "prefixes; about" in done.output
    found = json.loads((tmp_path / "new" / "probe.json").read_text())
    assert found["rescued_behind"]["value"] < 0.4 and found["signals"][0]["auc_at_equal_length"]["low"] > 0.6
    whole, *_ = found["by_reliability"]
    assert whole["teacher"]["value"] > 0.9 > whole["student"]["value"]
    assert len(found["cuts"]) == sum(row["cuts"] for row in found["by_reliability"])
    assert found["recipe"]["pruning"]["w_drop"] == 0.05 and found["environment"]["torch"]


def test_the_same_model_has_nothing_to_tell_apart():
    config = load_config(RECIPES / "derail.toml", ["model.model_name_or_path=embedded:teacher"])
    found = probe(config, problems=4, lengths=2, continuations=1, json_path=None, console=QUIET)
    assert found["verdict"].startswith("nothing to tell apart")


def test_cuts_are_the_same_lengths_in_all_rollouts_and_never_a_whole_one(derail):
    pair, _, rollouts, scores = derail
    cuts = cut_rollouts(rollouts, scores, pair.config, lengths=6)
    lengths = rollouts.lengths.numpy()
    assert (cuts.length < lengths[cuts.prompt]).all() and len(np.unique(cuts.length)) == 6
    for b, n in enumerate(lengths):
        assert set(cuts.length[cuts.prompt == b]) == {t for t in np.unique(cuts.length) if t < n}
    surprise = -scores.sampled_logprobs.double().numpy()
    for i, (b, t) in enumerate(zip(cuts.prompt, cuts.length, strict=True)):
        assert cuts.signals["teacher's surprise"][i] == pytest.approx(surprise[b, max(0, t - 16) : t].mean(), abs=1e-5)
    assert cuts.reliability.min() == 0 and cuts.reliability.max() == 1


def test_continuations_go_on_from_the_prefix_and_are_graded_with_it(derail):
    """A prefix that holds the answer is right whatever follows; cut before the box, the teacher has to write it."""
    pair, prompts, rollouts, _ = derail
    right = [b for b, n in enumerate(rollouts.lengths.tolist()) if rollouts.finished[b] and n < 200][:2]
    at = rollouts.lengths[right].numpy() - 1  # all but the end token
    of = np.array([*right, *right])
    cuts = Cuts(of, np.concatenate([at, at - 3]), np.ones(4), {})
    seen = []
    found, tokens = right_continuations(
        pair, pair.teacher_sampler, prompts, rollouts, cuts, 2, seed=0, on_progress=seen.append
    )
    assert found.tolist() == [2] * 4 and sum(seen) == 4
    assert tokens == 2 * (2 * 1 + 2 * 4), "the end token alone, or the box and the end token"


def test_continuations_leave_room_in_the_positions(derail, monkeypatch):
    pair, prompts, rollouts, _ = derail
    asked = []
    sample = pair.teacher_sampler.sample

    def watched(prefixes, uniforms, **settings):
        asked.append((max(map(len, prefixes)), uniforms.shape[1]))
        return sample(prefixes, uniforms, **settings)

    monkeypatch.setattr(pair.teacher_sampler, "sample", watched)
    longest = int(rollouts.lengths.argmax())
    cuts = Cuts(np.array([longest]), np.array([int(rollouts.lengths[longest]) - 1]), np.ones(1), {})
    right_continuations(pair, pair.teacher_sampler, prompts, rollouts, cuts, 1, seed=0, on_progress=lambda _: None)
    ((prefix, room),) = asked
    assert prefix + room == pair.positions == 512


def test_a_served_teacher_cannot_write():
    config = load_config(RECIPES / "derail.toml", ["model.teacher_model_server_url=http://127.0.0.1:9"])
    with pytest.raises(ConfigError, match="has the teacher write"):
        probe(config, problems=2, lengths=2, continuations=1, json_path=None, console=QUIET)


@pytest.mark.filterwarnings("ignore:.*")
def test_a_threshold_is_calibrated_first(monkeypatch):
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: {"threshold": 0.25})
    monkeypatch.setattr(module, "calibration_text", lambda found: "")
    config = load_config(RECIPES / "derail.toml", ["pruning.threshold=auto", "evaluation.num_problems=1"])
    tokenizers = build_tokenizers(config)
    pair = build_pair(config, build_problems(config, tokenizers[0]), tokenizers, QUIET)
    assert pair.config.pruning.threshold == 0.25


def test_doctor_asks_the_same(monkeypatch):
    asked = {}
    monkeypatch.setattr(module, "probe", lambda config, **settings: asked.update(settings))
    done = CliRunner().invoke(app, ["doctor", str(RECIPES / "derail.toml"), "--prompts", "0", "--probe"])
    assert done.exit_code == 0 and asked["problems"] == 32 and asked["json_path"] is None
