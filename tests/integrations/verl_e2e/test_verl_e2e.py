"""verl's own `main_ppo` trains with the plug-in, and every step is held against ours: `make test-engines`.

On the CPU (cpu.py), on the embedded low pair, in float32; one launch a scenario, of one to three minutes on two cores.
Sampling is a function of weights and prompt, so one rank, two ranks and a resumed run have the same rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("verl", reason="verl is not installed here: make test-engines")
pytest.importorskip("transfer_queue", reason="verl's trainer needs TransferQueue: make test-engines")

from prune_opd.config import Config
from prune_opd.training.build import build_window
from tests.integrations.verl_e2e import launch
from tests.integrations.verl_e2e.launch import LOSS, OWN, ROLLOUT, Step, VerlRun
from tests.integrations.verl_e2e.replay import (
    Ours,
    logprobs_of,
    our_config,
    our_forward_kl_steps,
    our_steps,
    teachers_of,
)

pytestmark = pytest.mark.slow

STEPS, SAVED = 6, 3
IN_FLIGHT = {
    f"+{OWN}.pruning.in_flight.enable": "true",
    f"+{OWN}.pruning.in_flight.chunk": 8,
    f"+{OWN}.pruning.in_flight.audit_share": 0,
}
NUCLEUS = {"pruning.metric": "teacher_top_p_accept", "pruning.teacher_top_p": 0.5}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verl-data")
    launch.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verl-runs")


def finished(run: VerlRun) -> VerlRun:
    assert run.code == 0, run.log[-5000:]
    return run


@pytest.fixture(scope="session")
def two_ranks(data: Path, runs: Path) -> VerlRun:
    return finished(launch.train(data, runs / "two", ranks=2, steps=STEPS, changes={"trainer.save_freq": SAVED}))


@pytest.fixture(scope="session")
def one_rank(data: Path, runs: Path) -> VerlRun:
    changes = {"actor_rollout_ref.model.use_remove_padding": "false", "trainer.test_freq": 4}
    changes["trainer.validation_data_dir"] = str(runs / "one-validation")
    return finished(launch.train(data, runs / "one", steps=4, changes=changes))


@pytest.fixture(scope="session")
def resumed(data: Path, runs: Path, two_ranks: VerlRun) -> VerlRun:
    checkpoint = two_ranks.folder / "checkpoints" / f"global_step_{SAVED}"
    changes = {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": str(checkpoint)}
    return finished(launch.train(data, runs / "resumed", ranks=2, steps=STEPS, changes=changes))


@pytest.fixture(scope="session")
def in_flight(data: Path, runs: Path) -> VerlRun:
    """Stops in flight by overlap, at another temperature than 1, with a teacher for each of two kinds of prompts."""
    changes = {**IN_FLIGHT, f"{ROLLOUT}.temperature": 0.8, "distillation.n_gpus_per_node": 2}
    for name, (key, model) in {"one": ("sums", "teacher"), "two": ("others", "high-student")}.items():
        teacher = {"key": key, "model_path": data / model, "num_replicas": 1}
        teacher["inference"] = "{name:vllm,tensor_model_parallel_size:1,prompt_length:64,response_length:64}"
        changes |= {f"+distillation.teacher_models.{name}.{what}": value for what, value in teacher.items()}
    return finished(launch.train(data, runs / "in-flight", steps=4, changes=changes))


@pytest.fixture(scope="session")
def nucleus_until_it_fails(data: Path, runs: Path) -> VerlRun:
    """Stops in flight by the teacher's nucleus; at step 3 the student's server has no memory left."""
    changes = IN_FLIGHT | {f"+{OWN}.{name}": value for name, value in NUCLEUS.items()}
    return launch.train(data, runs / "nucleus", steps=3, fail_at=2, changes=changes)


@pytest.fixture(scope="session")
def forward_kl(data: Path, runs: Path) -> VerlRun:
    changes = {f"{LOSS}.loss_mode": "prune_opd_forward_kl", f"{LOSS}.topk": launch.TOP_K, f"{ROLLOUT}.temperature": 0.8}
    return finished(launch.train(data, runs / "forward-kl", steps=3, changes=changes))


# ---- what verl did, beside what our own code does ----


def model(data: Path, name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(data / name, dtype=torch.float32).eval()


def compare(
    data: Path,
    run: VerlRun,
    config: Config,
    ours: Callable[..., Iterator[Ours]] = our_steps,
    steps: Sequence[Step] | None = None,
) -> list[Ours]:
    """Every step of a run against ours, from verl's first weights on."""
    student, found = model(data, "low-student"), []
    for name, value in student.named_parameters():
        assert torch.equal(value, run.weights[0][name]), f"the server did not begin with the student's {name}"
    for step, our in zip(
        run.steps if steps is None else steps,
        ours(run.steps if steps is None else steps, student, config, build_window(config)),
        strict=True,
    ):
        check_step(step, our)
        found.append(our)
    return found


def check_step(step: Step, ours: Ours) -> None:
    """Loss, gradient, events, weights of tokens, effective lengths, window, and the student's weights after it."""
    metrics, mean = step.metrics, ours.drift.effective_length.double()
    assert metrics["distillation/loss"] == pytest.approx(ours.loss, abs=1e-5)
    assert metrics["actor/grad_norm"] == pytest.approx(ours.grad_norm, rel=1e-4)
    told = 0
    for b, row in enumerate(step.rollouts):
        n = len(row["weighted"])
        there = slice(-n - 1, -1)
        terms = row["prune_opd_terms" if "prune_opd_terms" in row else "distillation_losses"].squeeze()[there]
        large = terms.abs() > 1e-3  # enough to tell the weight
        told += int(large.sum())
        torch.testing.assert_close((row["weighted"] / terms)[large], ours.weight[b, :n][large], atol=1e-5, rtol=0)
        if "prune_opd_events" in row:
            assert torch.equal(row["prune_opd_events"].squeeze()[there] > 0, ours.events[b, :n])
    assert told > 50
    tokens = sum(len(row["weighted"]) for row in step.rollouts)
    assert metrics["prune_opd/loss_weight_mean"] == pytest.approx(float(ours.weight.sum()) / tokens, abs=1e-5)
    for name, value in {"mean": mean.mean(), "max": mean.max(), "min": mean.min()}.items():
        assert metrics[f"prune_opd/effective_response_length_{name}"] == pytest.approx(value.item())
    assert metrics["prune_opd/effective_response_length_hit_ratio"] == ours.window.hit_ratio
    assert metrics["prune_opd/current_max_response_length"] == ours.window.previous_length
    assert metrics["prune_opd/next_max_response_length"] == ours.window.length
    for name, value in ours.weights.items():
        torch.testing.assert_close(step.weights[name], value, atol=1e-5, rtol=0)


def check_teacher(step: Step, teachers: dict[str, PreTrainedModel]) -> None:
    """What the actor was given is what the teacher of each prompt says of the tokens of the response."""
    for row in step.rollouts:
        ids, logprobs = teachers_of(row)
        said = logprobs_of(teachers[row["source"]], row["input_ids"], len(ids))
        best = said.topk(ids.shape[-1]).values
        torch.testing.assert_close(logprobs, best, atol=1e-5, rtol=0)
        torch.testing.assert_close(said.gather(-1, ids), best, atol=1e-5, rtol=0)


def rollouts_of(step: Step) -> list[tuple[int, ...]]:
    return sorted(tuple(row["input_ids"].tolist()) for row in step.rollouts)


def check_same(step: Step, other: Step) -> None:
    """Two runs of verl did the same: the rollouts, and all that came of them."""
    assert rollouts_of(step) == rollouts_of(other)
    for name, value in step.metrics.items():
        if name.startswith(("prune_opd/", "distillation/")):
            assert other.metrics[name] == pytest.approx(value, abs=1e-5), name
    for name, value in step.weights.items():
        torch.testing.assert_close(other.weights[name], value, atol=1e-5, rtol=0)


def test_every_step_on_two_ranks_is_ours(data: Path, two_ranks: VerlRun) -> None:
    """verl's FSDP2, packed rows, micro-batches, gradient clipping and AdamW; our loss, events, weights and window."""
    assert len(compare(data, two_ranks, our_config())) == STEPS
    first, last = two_ranks.weights[0], two_ranks.weights[-1]
    moved = {name: (last[name] - first[name]).abs().max() for name in first}
    assert min(moved.values()) > 2e-5  # the student learnt, and its server was told; far more than what is tolerated
    assert len({rollout for step in two_ranks.steps for rollout in rollouts_of(step)}) > 40  # of 48: real samples


def test_the_window_moves_both_ways_and_is_kept_to(two_ranks: VerlRun) -> None:
    lengths = [step.metrics["prune_opd/current_max_response_length"] for step in two_ranks.steps]
    after = [step.metrics["prune_opd/next_max_response_length"] for step in two_ranks.steps]
    assert lengths[1:] == after[:-1]
    assert any(b > a for a, b in zip(lengths, after, strict=True))
    assert any(b < a for a, b in zip(lengths, after, strict=True))
    for step, length in zip(two_ranks.steps, lengths, strict=True):
        assert max(len(row["weighted"]) for row in step.rollouts) == length


def test_the_teachers_scores_reach_the_actor(data: Path, two_ranks: VerlRun) -> None:
    teacher = model(data, "teacher")
    for step in two_ranks.steps:
        check_teacher(step, {"sums": teacher, "others": teacher})


def test_one_rank_does_what_two_do(one_rank: VerlRun, two_ranks: VerlRun) -> None:
    """One of them pads its rows, the other packs them."""
    for one, two in zip(one_rank.steps, two_ranks.steps, strict=False):
        check_same(one, two)


def test_validation_runs_past_the_window(runs: Path, one_rank: VerlRun) -> None:
    (path,) = (runs / "one-validation").glob("*.jsonl")
    lengths = [len(json.loads(line)["output"].split()) for line in path.read_text().splitlines()]
    assert max(lengths) > max(step.metrics["prune_opd/current_max_response_length"] for step in one_rank.steps)
    assert any(name.startswith("val-") for name in one_rank.steps[-1].metrics)


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(resumed: VerlRun, two_ranks: VerlRun) -> None:
    assert len(resumed.steps) == STEPS - SAVED
    assert (
        resumed.steps[0].metrics["prune_opd/current_max_response_length"]
        != launch.PRUNING["dynamic_response_length.init_len"]
    )  # else a window that was not restored would look the same
    for step, unbroken in zip(resumed.steps, two_ranks.steps[SAVED:], strict=True):
        check_same(step, unbroken)


# ---- in flight ----


def check_stops(step: Step, ours: Ours, end: int) -> int:
    """Every rollout ended by itself, at the window, or at the token that spent its reliability. Returns the latter."""
    stops = 0
    for b, row in enumerate(step.rollouts):
        n = len(row["weighted"])
        spent = (ours.drift.reliability[b, :n] <= 1e-8).nonzero().flatten().tolist()
        if spent:
            assert spent == [n - 1]
            stops += 1
        else:
            assert n == step.metrics["prune_opd/current_max_response_length"] or row["input_ids"][-1] == end
    return stops


def test_in_flight_rollouts_end_where_their_reliability_does(data: Path, in_flight: VerlRun) -> None:
    end = model(data, "low-student").generation_config.eos_token_id
    found = compare(data, in_flight, our_config())
    stops = [check_stops(step, ours, end) for step, ours in zip(in_flight.steps, found, strict=True)]
    assert 0 < sum(stops) < sum(len(step.rollouts) for step in in_flight.steps)


def test_each_prompt_has_its_own_teacher_and_drift_is_told_by_teacher(data: Path, in_flight: VerlRun) -> None:
    teachers = {"sums": model(data, "teacher"), "others": model(data, "high-student")}
    for step, ours in zip(in_flight.steps, compare(data, in_flight, our_config()), strict=True):
        check_teacher(step, teachers)
        for name in teachers:
            rows = [b for b, row in enumerate(step.rollouts) if row["source"] == name]
            expected = ours.drift.effective_length[rows].double().mean().item()
            assert step.metrics[f"prune_opd/effective_response_length_mean/{name}"] == pytest.approx(expected)


def test_in_flight_by_the_teachers_nucleus(data: Path, nucleus_until_it_fails: VerlRun) -> None:
    run = nucleus_until_it_fails
    assert len(run.steps) == 2
    end = model(data, "low-student").generation_config.eos_token_id
    found = compare(data, run, our_config(**NUCLEUS))
    assert sum(check_stops(step, ours, end) for step, ours in zip(run.steps, found, strict=True)) > 0


def test_failed_rollouts_stop_the_run_and_say_why(nucleus_until_it_fails: VerlRun) -> None:
    run = nucleus_until_it_fails
    assert run.code != 0
    (said,) = {line for line in run.log.splitlines() if "EngineError: step 3: 8 of 8 rollouts failed" in line}
    assert "8 times MemoryError: the server has no memory left" in run.log


# ---- other losses ----


def test_forward_kl_is_verls_with_our_weights(data: Path, forward_kl: VerlRun) -> None:
    compare(data, forward_kl, our_config(), our_forward_kl_steps)


def test_task_rewards_are_refused_by_name(data: Path, runs: Path) -> None:
    run = launch.train(data, runs / "refused", steps=1, changes={f"{LOSS}.use_task_rewards": "true"})
    assert run.code != 0
    assert "ConfigError: verl cannot run Prune-OPD with these settings" in run.log
    assert f"{LOSS}.use_task_rewards = True, expected False: the objective is distillation alone" in run.log
    assert not list(run.folder.glob("*.safetensors"))  # no server was started


# ---- a comparison that would not notice is none ----


def weights_of_one(step: Step) -> Step:
    rows = [
        row | {"weighted": row["prune_opd_terms"].squeeze()[-len(row["weighted"]) - 1 : -1]} for row in step.rollouts
    ]
    return replace(step, rollouts=rows)


def frozen_window(step: Step) -> Step:
    current = step.metrics["prune_opd/current_max_response_length"]
    return replace(step, metrics=step.metrics | {"prune_opd/next_max_response_length": current})


def shifted_teacher(step: Step) -> Step:
    rows = [row | {name: row[name].roll(1, 0) for name in ("teacher_ids", "teacher_logprobs")} for row in step.rollouts]
    return replace(step, rollouts=rows)


@pytest.mark.parametrize("broken", [weights_of_one, frozen_window, shifted_teacher])
def test_the_comparison_notices(broken: Callable[[Step], Step], data: Path, two_ranks: VerlRun) -> None:
    with pytest.raises(AssertionError):
        compare(data, two_ranks, our_config(), steps=[broken(two_ranks.steps[0])])
    if broken is shifted_teacher:
        teacher = model(data, "teacher")
        with pytest.raises(AssertionError):
            check_teacher(broken(two_ranks.steps[0]), {"sums": teacher, "others": teacher})
