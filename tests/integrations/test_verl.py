"""The plug-in on the real verl package, on the CPU: its registries, data structures, engine, trainer and agent loop.

verl's engines train on GPUs only. So a bare FSDP engine without FSDP runs the tiny model here; everything between the
batch and the gradient, and between the actors' metrics and the window, is verl's own code: `make test-engines`.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("verl", reason="verl is not installed here: make test-engines")
pytest.importorskip("transfer_queue", reason="verl's trainer needs TransferQueue: make test-engines")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    import verl.workers.engine_workers as workers
    from hydra import compose, initialize_config_module
    from tensordict import TensorDict
    from transfer_queue import KVBatchMeta
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap, _agent_loop_registry
    from verl.trainer.distillation import distillation_ppo_loss
    from verl.trainer.distillation.losses import DISTILLATION_SETTINGS_REGISTRY, get_distillation_loss_fn
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.utils import tensordict_utils
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.engine.utils import postprocess_batch_func
    from verl.workers.rollout.replica import TokenOutput

    import prune_opd.integrations.verl as plugin
    import prune_opd.integrations.verl.loss as loss_module

from prune_opd.config import PruningSection, load_config, with_settings
from prune_opd.errors import CheckpointError, ConfigError, DataError, EngineError, NonFiniteError
from prune_opd.models.loading import load_tokenizer
from prune_opd.step import StepResult
from prune_opd.teachers.local import LocalTeacher
from prune_opd.training.build import build_optimizer, build_window
from prune_opd.types import TeacherScores
from tests import engines_fixture as fixture
from tests.engines_fixture import OBJECTIVE, PRUNING, TOP_K
from tests.families import EOS, PAD, VOCAB
from tests.steps import step_of
from tests.test_step import config_of

ROLLOUTS = 4
BASE = {
    "algorithm.adv_estimator": "grpo",  # no critic
    "data.train_files": "none",
    "data.train_batch_size": ROLLOUTS,
    "data.max_response_length": 16,
    "actor_rollout_ref.model.path": "none",
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.use_dynamic_bsz": "true",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": "true",
    "actor_rollout_ref.actor.ppo_mini_batch_size": ROLLOUTS,
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.agent.default_agent_loop": "prune_opd",
    "trainer.v1.trainer_mode": "prune_opd",
    "distillation.enabled": "true",
    "distillation.n_gpus_per_node": 1,
    "distillation.nnodes": 1,
    "distillation.teacher_models.teacher_model.model_path": "none",
    "distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size": 1,
    "distillation.distillation_loss.loss_mode": "prune_opd",
    "distillation.distillation_loss.topk": VOCAB,
    "distillation.distillation_loss.use_task_rewards": "false",
    f"+{plugin.WHERE}.objective.top_k": TOP_K,
}
IN_FLIGHT = {
    f"+{plugin.WHERE}.pruning.in_flight.enable": "true",
    f"+{plugin.WHERE}.pruning.in_flight.chunk": 3,
    f"+{plugin.WHERE}.pruning.in_flight.audit_share": 0,
}


def flat(settings: dict, prefix: str) -> dict:
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}.{name}") if isinstance(value, dict) else {f"{prefix}.{name}": value}
    return found


def verl_config(changes: dict | None = None):
    settings = BASE | flat(PRUNING.model_dump(exclude_unset=True), f"+{plugin.WHERE}.pruning") | (changes or {})
    return copy.deepcopy(composed(tuple(f"{name}={value}" for name, value in settings.items())))


@functools.cache
def composed(overrides: tuple[str, ...]):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", list(overrides))


# ---- the shared fixture through our own step ----


@dataclass(frozen=True)
class OurStep:
    """A step of the fixture, the student of it, and what our step makes of both.

    scores: the teacher's whole distribution, most likely first (K = VOCAB), since verl's teacher gives top-k alone.
    """

    expected: fixture.EngineStep
    prompts: Sequence[Sequence[int]]
    student: PreTrainedModel
    result: StepResult
    gradients: dict[str, torch.Tensor]
    scores: TeacherScores


class Given:
    """Sampler and teacher that say what the fixture says."""

    def __init__(self, step: fixture.EngineStep) -> None:
        self.step = step

    def sample(self, prompts, uniforms, **settings):
        return self.step.rollouts

    def score(self, rollouts, *, top_k):
        return self.step.scores


@functools.cache
def our_steps() -> tuple[OurStep, ...]:
    config = config_of().model_copy(update={"pruning": PRUNING, "objective": OBJECTIVE})
    config = with_settings(config, **{"training.learning_rate": 1e-12, "training.max_grad_norm": 1e9})
    student, teacher = fixture.models()
    window, steps = build_window(config), []
    for number, step in enumerate(fixture.engine_steps()):
        trained = copy.deepcopy(student).train()
        result = step_of(
            step=number,
            prompts=step.rollouts.prompts,
            student=trained,
            sampler=Given(step),
            teacher=Given(step),
            optimizer=build_optimizer(trained, config)[0],
            window=window,
            vocab_size=VOCAB,
            config=config,
        )
        gradients = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
        scores = LocalTeacher(teacher, vocab_size=VOCAB).score(step.rollouts, top_k=VOCAB)
        steps.append(OurStep(step, step.rollouts.prompts, student, result, gradients, scores))
    return tuple(steps)


# ---- registration ----


def test_verl_loads_the_plugin_by_its_environment_variable():
    code = (
        "import verl; from verl.trainer.ppo.v1 import get_trainer_cls; print(get_trainer_cls('prune_opd').__module__)"
    )
    env = os.environ | {"VERL_USE_EXTERNAL_MODULES": "prune_opd.integrations.verl"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip().endswith("prune_opd.integrations.verl.trainer"), done.stderr


def test_loss_trainer_and_agent_loop_are_in_verls_registries():
    assert get_trainer_cls("prune_opd") is plugin.PruneTrainer
    assert _agent_loop_registry["prune_opd"]["_target_"] == "prune_opd.integrations.verl.agent_loop.PruneAgentLoop"
    for name in ("prune_opd", "prune_opd_forward_kl"):
        assert get_distillation_loss_fn(name) is plugin.prune_opd_loss
        assert DISTILLATION_SETTINGS_REGISTRY[name].use_topk


def test_workers_can_be_made_ray_actors():
    """verl wraps its worker as an actor, which cannot be subclassed; ours must still be one."""
    methods = ray.remote(plugin.PruneAgentLoopWorker).__ray_metadata__.method_meta.methods
    assert {"generate_sequences", "_compute_teacher_logprobs"} <= set(methods)
    assert "init_model" in ray.remote(plugin.PruneActorWorker).__ray_metadata__.method_meta.methods
    registered = {name for name in dir(plugin.PruneActorWorker.init_model) if "MAGIC" in name.upper()}
    assert registered == {name for name in dir(workers.ActorRolloutRefWorker.init_model) if "MAGIC" in name.upper()}


# ---- settings ----


def test_settings_of_the_recipe_arrive():
    recipe = plugin.recipe_of(verl_config({f"+{plugin.WHERE}.objective.reward_weight_mode": "none"}))
    assert recipe.pruning == PRUNING
    assert recipe.objective.reward_weight_mode == "none"
    assert (recipe.rollout.prompts_per_step, recipe.rollout.max_completion_length) == (ROLLOUTS, 16)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distillation.enabled", "false"),
        ("distillation.distillation_loss.loss_mode", "k3"),
        ("distillation.distillation_loss.use_task_rewards", "true"),
        ("distillation.distillation_loss.use_policy_gradient", "true"),
        ("distillation.distillation_loss.loss_max_clamp", "10.0"),
        ("distillation.distillation_loss.topk", TOP_K - 1),
        ("actor_rollout_ref.actor.loss_agg_mode", "seq-mean-token-mean"),
        ("actor_rollout_ref.actor.strategy", "megatron"),
        ("actor_rollout_ref.actor.ppo_epochs", 2),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", ROLLOUTS // 2),
        ("actor_rollout_ref.model.use_fused_kernels", "true"),
        ("distillation.distillation_loss.log_prob_min_clamp", "-10.0"),
        ("algorithm.rollout_correction.rollout_rs", "token_k1"),
        ("algorithm.filter_groups.enable", "true"),
        ("actor_rollout_ref.rollout.agent.default_agent_loop", "single_turn_agent"),
        ("+actor_rollout_ref.rollout.agent.agent_loop_manager_class", "somebody.elses.Manager"),
    ],
)
def test_what_verl_cannot_honour_is_refused_by_name(name, value):
    config = verl_config({name: value})
    with pytest.raises(ConfigError, match=re.escape(name.lstrip("+"))):
        plugin.recipe_of(config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({f"+{plugin.WHERE}.pruning.treshold": 0.6}, "threshold"),
        ({f"+{plugin.WHERE}.pruning.threshold": "auto"}, "set a number"),
        ({f"+{plugin.WHERE}.training.steps": 3}, "training"),
        ({f"+{plugin.WHERE}.objective.weight_normalization": "weight_mean"}, "token_mean"),
        ({"distillation.distillation_loss.loss_mode": "prune_opd_forward_kl"}, "topk"),
        (IN_FLIGHT | {"actor_rollout_ref.rollout.full_determinism": "true"}, "full_determinism"),
        (IN_FLIGHT | {"actor_rollout_ref.rollout.name": "sglang"}, "rollout.name"),
    ],
)
def test_settings_of_ours_that_do_not_fit_are_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        plugin.recipe_of(verl_config(changes))


def shell(text: str) -> str:
    """MORE after some lines of bash."""
    environment = os.environ | {"TEACHER": "a/teacher", "OTHER": "another/teacher"}
    done = subprocess.run(["bash", "-c", f'{text}; echo "$MORE"'], env=environment, capture_output=True, text=True)
    return done.stdout


def documented_commands() -> list[list[str]]:
    """The launch command of docs/scaling.md for each pair of its table, for several nodes and for several teachers."""
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"python -m verl\.trainer\.main_ppo (.*?)^```", page, re.MULTILINE | re.DOTALL)
    pairs = re.findall(r"^\| (\S+/\S+) \| (\S+/\S+) \| (?:`(.*)`)? ?\|$", page, re.MULTILINE)
    assert len(pairs) == 5
    others = [shell(text) for text in re.findall(r'^(?:T=.*\n)?export MORE="[^"]*"', page, re.MULTILINE)]
    assert len(others) == 2  # several nodes, several teachers
    found = []
    for student, teacher, more in [*pairs, *((*pairs[0][:2], more) for more in others)]:
        text = command.replace("\\\n", " ").replace("$STUDENT", student).replace("$TEACHER", teacher)
        found.append(text.replace("$MORE", more).split())
    return found


@pytest.mark.parametrize("overrides", documented_commands(), ids=lambda o: o[-1] if "=" in o[-1] else "plain")
def test_the_documented_command_is_valid_and_has_the_papers_settings(overrides):
    last = {override.partition("=")[0]: override for override in overrides}  # a later one replaces an earlier one
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", list(last.values()))
    recipe = plugin.recipe_of(config)
    omega_conf_to_dataclass(config.distillation)  # its pool holds its teachers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        validate_config(config, use_reference_policy=False, use_critic=False)
    paper = load_config(Path(__file__).parents[2] / "recipes" / "paper" / "justrl-1.5b.toml")
    window = recipe.pruning.dynamic_response_length
    assert window.init_len == (6144 if "6144" in overrides[-1] else 1024)
    assert (
        recipe.pruning.model_copy(update={"dynamic_response_length": window.model_copy(update={"init_len": 1024})})
        == paper.pruning
    )
    assert recipe.objective == paper.objective
    for name in ("prompts_per_step", "num_generations", "temperature", "top_p"):
        assert getattr(recipe.rollout, name) == getattr(paper.rollout, name)
    gpus = config.trainer.n_gpus_per_node * config.trainer.nnodes
    assert config.data.train_batch_size * config.actor_rollout_ref.rollout.n % gpus == 0
    assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu >= config.data.max_prompt_length + window.max_len
    environment = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert plugin.__name__ == environment.VERL_USE_EXTERNAL_MODULES


# ---- the loss, through verl's engine ----


def micro_batch(step, rows, sent: str) -> TensorDict:
    """verl's nested batch of some rollouts of a step, with the teacher's answer as verl's teacher manager shapes it."""
    rollouts, topk = step.result.rollouts, step.scores.topk
    fields: dict[str, list] = {}
    for row in rows:
        prompt, length = torch.tensor(step.prompts[row]), int(rollouts.lengths[row])
        response = rollouts.response_ids[row, :length]
        ids = torch.zeros(len(prompt) + length, VOCAB, dtype=torch.int32)  # verl's dummy where nothing is asked for
        logprobs = torch.zeros(len(prompt) + length, VOCAB)
        there = slice(len(prompt) - 1, -1)
        ids[there], logprobs[there] = topk.ids[row, :length].int(), topk.logprobs[row, :length]
        for name, value in {
            "prompts": prompt,
            "responses": response,
            "input_ids": torch.cat([prompt, response]),
            "position_ids": torch.arange(len(prompt) + length),
            "response_mask": torch.ones(length, dtype=torch.long),
            "loss_mask": torch.ones(length, dtype=torch.long),
            "teacher_ids": ids,
            "teacher_logprobs": logprobs,
        }.items():
            fields.setdefault(name, []).append(value)
    data = TensorDict(
        {name: torch.nested.as_nested_tensor(parts, layout=torch.jagged) for name, parts in fields.items()},
        batch_size=len(rows),
    )
    tensordict_utils.assign_non_tensor(
        data,
        temperature=1.0,
        distillation_use_topk=True,
        distillation_only=True,
        use_remove_padding=False,
        use_dynamic_bsz=False,
        pad_token_id=PAD,
        batch_num_tokens=int(rollouts.lengths.sum()),
        dp_size=1,
        global_batch_size=ROLLOUTS,
        **{plugin.SETTINGS: sent},
    )
    return data


def bare_engine(model) -> FSDPEngineWithLMHead:
    """verl's engine around a model that no FSDP has sharded: its own reading of batches and logits."""
    engine = FSDPEngineWithLMHead.__new__(FSDPEngineWithLMHead)
    engine.module, engine.pad_to_length, engine.use_ulysses_sp = model, False, False
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False)
    return engine


def loss_of(config):
    """The loss function that our worker sets on verl's engine, built as `init_model` builds it."""
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    distillation = omega_conf_to_dataclass(config.distillation)
    stock = functools.partial(distillation_ppo_loss, config=actor, distillation_config=distillation)
    worker = plugin.PruneActorWorker.__new__(plugin.PruneActorWorker)
    found: list = []
    worker.role, worker.loss_fn, worker.actor = "actor", stock, SimpleNamespace(set_loss_fn=found.append)
    worker.distillation_config = config.distillation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.ActorRolloutRefWorker, "init_model", lambda self: None)
        worker.init_model()
    return found[-1] if found else stock


def forward_backward(engine, loss_function, micro_batches):
    """What `FSDPEngine.forward_backward_batch` does with its micro-batches."""
    outputs = []
    for data in micro_batches:
        inputs, arguments = engine.prepare_model_inputs(micro_batch=data)
        model_output = engine.prepare_model_outputs(
            output=engine.module(**inputs, use_cache=False),
            output_args=arguments,
            micro_batch=data,
            logits_processor_func=loss_function,
        )
        loss, metrics = loss_function(model_output=model_output, data=data, dp_group=None)
        loss.backward()
        outputs.append({"loss": loss.item(), "metrics": metrics})
    return outputs, model_output


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("parts", [[range(ROLLOUTS)], [[3, 1], [0], [2]]], ids=["whole", "micro-batches"])
def test_weights_loss_gradient_and_window_are_those_of_our_step(index, parts, monkeypatch):
    """The shared fixture through verl's engine: everything to 1e-6, however the batch is cut."""
    step = our_steps()[index]
    config = verl_config()
    recipe, window = plugin.recipe_of(config), window_at(step)
    sent = plugin.batch_settings(recipe, window)
    engine, loss_function = bare_engine(copy.deepcopy(step.student)), loss_of(config)
    reports = []
    report = loss_module.drift_report
    monkeypatch.setattr(
        loss_module, "drift_report", lambda *args, **kw: reports.append(report(*args, **kw)) or reports[-1]
    )
    batches = [micro_batch(step, list(rows), sent) for rows in parts]
    outputs, _ = forward_backward(engine, loss_function, batches)

    drift, lengths, expected = step.result.drift, step.result.rollouts.lengths, step.expected
    for rows, found in zip(parts, reports, strict=True):
        for place, row in enumerate(rows):
            n = int(lengths[row])
            np.testing.assert_allclose(found.weight[place, :n], expected.weight[row, :n], atol=1e-6)
            assert int(found.effective_length[place]) == expected.effective_length[row]
    assert sum(output["loss"] for output in outputs) == pytest.approx(expected.loss, abs=1e-6)
    for name, parameter in engine.module.named_parameters():
        torch.testing.assert_close(parameter.grad, step.gradients[name], atol=1e-6, rtol=1e-5)

    metrics = through_verls_worker(engine, outputs)
    trainer = trainer_with(config, window, metrics)
    logged: dict = {}
    trainer._update_actor(KVBatchMeta(partition_id="train", keys=["a"], tags=[{}]), logged)
    change = step.result.window
    assert logged["prune_opd/effective_response_length_hit_ratio"] == change.hit_ratio
    assert logged["prune_opd/current_max_response_length"] == change.previous_length
    assert logged["prune_opd/next_max_response_length"] == trainer.window.length == expected.window_after
    assert trainer.window.misses == change.misses
    effective = drift.effective_length.double()
    assert logged["prune_opd/effective_response_length_mean"] == pytest.approx(effective.mean().item())
    assert logged["prune_opd/effective_response_length_max"] == effective.max()
    assert logged["prune_opd/effective_response_length_min"] == effective.min()
    weight_mean = (step.result.weight.sum() / lengths.sum()).item()
    assert logged["prune_opd/loss_weight_mean"] == pytest.approx(weight_mean, abs=1e-6)
    assert logged["distillation/covered_mass"] == pytest.approx(1)


def window_at(step):
    window = build_window(plugin.recipe_of(verl_config()))
    window.length = step.result.window.previous_length
    return window


def test_the_window_trace_over_all_steps_is_ours():
    """One trainer over the fixture's steps, its window carried on: as `prune_opd_step` carried its own."""
    config = verl_config()
    trainer = trainer_with(config, None, {})
    trace = []
    for step in our_steps():
        sent = plugin.batch_settings(trainer.recipe, trainer.window)
        engine = bare_engine(copy.deepcopy(step.student))
        outputs, _ = forward_backward(engine, loss_of(config), [micro_batch(step, range(ROLLOUTS), sent)])
        metrics = through_verls_worker(engine, outputs)
        trainer.actor_rollout_wg.update_actor = lambda batch, metrics=metrics: {"metrics": metrics}
        trainer._update_actor(KVBatchMeta(partition_id="train", keys=["a"], tags=[{}]), {})
        trace.append((trainer.window.length, trainer.window.misses))
    assert trace == [(step.result.window.length, step.result.window.misses) for step in our_steps()]
    assert len({length for length, _ in trace}) > 2  # it moved


def through_verls_worker(engine, outputs) -> dict:
    """The metrics of some micro-batches as the driver gets them from two ranks that saw the same."""
    worker = workers.TrainingWorker.__new__(workers.TrainingWorker)
    worker.device_name, worker.flops_counter = "cpu", None
    group = object()
    engine.get_data_parallel_group = lambda: group
    worker.engine = engine
    joined = postprocess_batch_func(
        [{**output, "model_output": {}} for output in outputs], None, TensorDict({}, batch_size=())
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.torch.distributed, "all_reduce", lambda *args, **kwargs: None)
        patch.setattr(
            workers, "allgather_dict_into_dict", lambda data, group: {name: [value] for name, value in data.items()}
        )
        done = worker._postprocess_output(
            joined, global_token_num=None, delta_time=1.0, forward_only=False, images_seqlens=None
        )
    found = tensordict_utils.get(done, "metrics")
    for name, value in found.items():  # as in TrainingWorker.train_mini_batch
        if isinstance(value, list):
            first = isinstance(value[0], workers.Metric)
            found[name] = workers.Metric.aggregate_dp(value) if first else list(itertools.chain.from_iterable(value))
    metrics: dict = {}
    workers.append_to_dict(metrics, found)
    return {**metrics, "mfu": [0.0]}


def trainer_with(config, window, metrics):
    """The real trainer, with an actor group that answers at once."""
    trainer = plugin.PruneTrainer(config)
    trainer.window = window or trainer.window
    trainer.global_steps = 1
    trainer.distillation_config = omega_conf_to_dataclass(config.distillation)
    trainer.actor_rollout_wg = SimpleNamespace(update_actor=lambda batch: {"metrics": dict(metrics)})
    return trainer


def test_forward_kl_on_verls_own_actor_gets_our_weights():
    """Another objective than the paper's, by name: verl's forward KL over the teacher's top-k, times w_t."""
    step = our_steps()[0]
    config = verl_config(
        {
            "distillation.distillation_loss.loss_mode": "prune_opd_forward_kl",
            "distillation.distillation_loss.topk": TOP_K,
        }
    )
    sent = plugin.batch_settings(plugin.recipe_of(config), window_at(step))
    data = micro_batch(step, range(ROLLOUTS), sent)
    for name in ("teacher_ids", "teacher_logprobs"):
        data[name] = torch.nested.as_nested_tensor([t[:, :TOP_K] for t in data[name].unbind()], layout=torch.jagged)
    engine = bare_engine(copy.deepcopy(step.student))
    outputs, _ = forward_backward(engine, loss_of(config), [data])
    rollouts, topk, total = step.result.rollouts, step.scores.topk, 0.0
    for row, prompt in enumerate(step.prompts):
        length = int(rollouts.lengths[row])
        sequence = torch.tensor([[*prompt, *rollouts.response_ids[row, :length].tolist()]])
        with torch.no_grad():
            log_p = step.student(sequence).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        ids, log_q = topk.ids[row, :length, :TOP_K], topk.logprobs[row, :length, :TOP_K]
        kl = (log_q.exp() * (log_q - log_p.gather(-1, ids))).sum(-1).clamp(min=0)
        total += float((step.result.drift.weight[row, :length] * kl).sum())
    assert outputs[0]["loss"] == pytest.approx(total / int(rollouts.lengths.sum()), abs=1e-6)
    assert any(parameter.grad.abs().sum() > 0 for parameter in engine.module.parameters())


@pytest.mark.parametrize(
    ("setting", "changed"),
    [
        ({"enable": False}, True),
        ({"repetition": {"enable": True, "max_period": 9, "min_run": 1}}, True),
        ({"metric": "overlap_mass", "threshold": 0.9}, True),
        ({"metric": "teacher_top_p_accept", "teacher_top_p": 0.5}, True),
        ({"w_base": 0.25}, True),
        ({}, False),
    ],
    ids=str,
)
def test_every_drift_setting_reaches_the_actor(setting, changed):
    """The loss under other settings is that of our core on the same events, and differs from the default's."""
    from prune_opd.core.drift import drift_report
    from prune_opd.core.objective import topk_reverse_kl
    from prune_opd.rollout.events import drift_events

    step, config = our_steps()[0], verl_config()
    recipe = plugin.recipe_of(config)
    pruning = PruningSection.model_validate(PRUNING.model_dump(exclude_unset=True) | setting)
    sent = plugin.batch_settings(recipe.model_copy(update={"pruning": pruning}), None)
    outputs, _ = forward_backward(
        bare_engine(copy.deepcopy(step.student)), loss_of(config), [micro_batch(step, range(ROLLOUTS), sent)]
    )
    rollouts, scores = step.result.rollouts, step.result.scores
    mask = rollouts.response_mask
    events = drift_events(rollouts.response_ids, mask, rollouts.student, scores.topk, pruning)
    drift = drift_report(events, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
    weight = drift.weight if pruning.enable else mask.float()
    expected = topk_reverse_kl(rollouts.student.logprobs, scores.candidate_logprobs, mask, weight)[0].item()
    assert outputs[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert (abs(expected - step.result.loss) > 1e-3) == changed
    assert "prune_opd/effective_response_length_hit_ratio" not in outputs[0]["metrics"]


def test_a_batch_of_another_trainer_and_another_actor_are_refused():
    step, config = our_steps()[0], verl_config()
    data = micro_batch(step, range(ROLLOUTS), plugin.batch_settings(plugin.recipe_of(config), None))
    with pytest.raises(EngineError, match="does not compute"):
        plugin.prune_opd_loss(None, config.distillation, {}, data)
    del data[plugin.SETTINGS]
    with pytest.raises(EngineError, match="trainer_mode=prune_opd"):
        plugin.prune_opd_loss(None, config.distillation, {}, data)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    step, config = our_steps()[0], verl_config()
    student = copy.deepcopy(step.student)
    with torch.no_grad():
        student.lm_head.weight[5] = float("nan")
    sent = plugin.batch_settings(plugin.recipe_of(config), None)
    with pytest.raises(NonFiniteError):
        forward_backward(bare_engine(student), loss_of(config), [micro_batch(step, range(ROLLOUTS), sent)])
    assert all(parameter.grad is None for parameter in student.parameters())


def test_an_unknown_logprob_is_bounded_from_above():
    """q over 6 tokens, of which 3 are known: exact on those, and on the others never below the truth."""
    torch.manual_seed(0)
    log_q = torch.randn(200, 6).mul(2).log_softmax(-1)
    known = log_q.topk(3)
    everything = torch.arange(6).expand(200, 6)
    found = plugin.logprobs_at(everything, known.indices, known.values)
    is_known = (everything.unsqueeze(-1) == known.indices.unsqueeze(-2)).any(-1)
    assert torch.equal(found[is_known], log_q[is_known])
    assert (found[~is_known] >= log_q[~is_known] - 1e-5).all()
    left = (1 - known.values.exp().sum(-1, keepdim=True)).expand(200, 6)
    assert (found.exp()[~is_known] <= left[~is_known] + 1e-5).all()
    assert (found <= torch.where(is_known, found, known.values.amin(-1, keepdim=True))).all()


# ---- the trainer ----


def test_each_batch_carries_the_window_of_its_step():
    trainer = trainer_with(verl_config(), None, {})
    trainer._fetch_one_gen_batch = lambda: tensordict_utils.get_tensordict({"raw_prompt": ["a"] * ROLLOUTS})
    assert tensordict_utils.get(trainer._next_train_batch(), plugin.MAX_TOKENS) == 10
    trainer.window.steer(1.0)
    batch = trainer._next_train_batch()
    assert tensordict_utils.get(batch, plugin.MAX_TOKENS) == 12
    assert [tensordict_utils.get(part, plugin.MAX_TOKENS) for part in batch.chunk(2)] == [12, 12]


def test_without_a_window_the_whole_budget_is_sent():
    config = verl_config({f"+{plugin.WHERE}.pruning.dynamic_response_length.enable": "false"})
    trainer = trainer_with(config, None, {})
    trainer._fetch_one_gen_batch = lambda: tensordict_utils.get_tensordict({"raw_prompt": ["a"] * ROLLOUTS})
    assert tensordict_utils.get(trainer._next_train_batch(), plugin.MAX_TOKENS) == 16


def test_our_actor_is_put_in_place_of_verls():
    trainer = trainer_with(verl_config(), None, {})
    trainer._init_resource_pool_mgr()
    (worker,) = trainer.role_worker_mapping.values()
    assert worker.__ray_metadata__.modified_class.__mro__[1] is plugin.PruneActorWorker


def test_the_update_is_at_temperature_1_whatever_the_rollouts_were_sampled_at():
    seen: list = []
    train = SimpleNamespace(train_mini_batch=lambda data: seen.append(tensordict_utils.get(data, "temperature")))
    worker = plugin.PruneActorWorker.__new__(plugin.PruneActorWorker)
    worker.actor, worker.enable_routing_replay, worker.profiler = train, False, None
    data = TensorDict({}, batch_size=())
    tensordict_utils.assign_non_tensor_data(data, "temperature", 0.7)
    worker.update_actor(data)
    assert seen == [1.0]


def test_failed_rollouts_stop_the_run_and_say_why(monkeypatch):
    """verl logs the error, pads the batch and goes on; where not one is left it says nothing of the cause."""
    trainer = trainer_with(verl_config(), None, {})
    trainer.agent_loop_manager = SimpleNamespace(failures=lambda: ["MemoryError: none left"] * 2)
    batch = KVBatchMeta(partition_id="train", keys=["a", "b"], tags=[{}, {}])
    with pytest.raises(EngineError, match="(?s)2 of 4 rollouts failed.*2 times MemoryError: none left"):
        trainer._balance_batch(batch, metrics={})

    def nothing_left(self, *args):
        raise RuntimeError("Sync replay buffer selected terminal groups with no materializable trajectories.")

    monkeypatch.setattr(plugin.PruneTrainer.__mro__[2], "_step_once", nothing_left)
    with pytest.raises(EngineError, match="(?s)4 of 4 rollouts failed.*2 times MemoryError: none left"):
        trainer._step_once({}, {}, 4)


def test_prompts_that_name_another_agent_loop_are_refused():
    trainer = trainer_with(verl_config(), None, {})
    fields = {"raw_prompt": ["a"] * ROLLOUTS, "agent_name": np.array(["prune_opd", "tool_agent"] * 2, dtype=object)}
    trainer._fetch_one_gen_batch = lambda: tensordict_utils.get_tensordict(fields)
    with pytest.raises(DataError, match="tool_agent"):
        trainer._next_train_batch()


def test_an_actor_that_reports_no_hits_stops_the_run():
    trainer = trainer_with(verl_config(), None, {"mfu": [0.0]})
    with pytest.raises(EngineError, match="cannot be steered"):
        trainer._update_actor(KVBatchMeta(partition_id="train", keys=["a"], tags=[{}]), {})


def test_the_window_is_part_of_the_checkpoint(tmp_path):
    config = verl_config({"trainer.default_local_dir": str(tmp_path), "trainer.resume_mode": "auto"})

    def trainer():
        made = trainer_with(copy.deepcopy(config), None, {})
        made.train_dataloader = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
        made.actor_rollout_wg.save_checkpoint = made.actor_rollout_wg.load_checkpoint = lambda *args, **kwargs: None
        return made

    first = trainer()
    first.window.steer(1.0), first.window.steer(0.0)
    first.window.length, first.window.misses, first.global_steps = 13, 0, 3
    first._save_checkpoint()
    second = trainer()
    assert second.window.length == 10
    second._load_checkpoint()
    assert (second.global_steps, second.window.length) == (3, 13)
    (tmp_path / "global_step_3" / "prune_opd_window.json").write_text("{}")
    with pytest.raises(CheckpointError, match="prune_opd_window"):
        trainer()._load_checkpoint()


# ---- the agent loop ----


class Servers:
    """verl's client of the student's server and its teacher manager, over tiny models; replays a step's rollouts."""

    def __init__(self, step) -> None:
        self.step, self.requests, self.scored = step, [], 0
        self.student, self.teacher_model = step.student, fixture.models()[1]
        self.teacher = self

    async def generate(self, request_id, *, prompt_ids, sampling_params, priority=0, **kwargs) -> TokenOutput:
        extra = {"global_steps": 1, "min_global_steps": 1, "max_global_steps": 1}
        if "prompt_logprobs" in sampling_params:
            ids, logprobs = self.scores(self.student, prompt_ids, sampling_params["prompt_logprobs"])
            answer = {"prompt_ids": ids.tolist(), "prompt_logprobs": logprobs.tolist()}
            return TokenOutput(token_ids=[0], stop_reason="completed", extra_fields=extra | answer)
        rollouts = self.step.result.rollouts
        size = sampling_params.get("max_tokens", 10**9)
        for row, prompt in enumerate(self.step.prompts):
            whole = [*prompt, *rollouts.response_ids[row, : rollouts.lengths[row]].tolist()]
            if whole[: len(prompt_ids)] == prompt_ids and len(prompt_ids) >= len(prompt) and row == self.row:
                self.requests.append((request_id, sampling_params))
                rest = whole[len(prompt_ids) :][:size]
                assert rest, "asked on after the end"
                return TokenOutput(token_ids=rest, log_probs=[-1.0] * len(rest), extra_fields=extra)
        raise AssertionError(f"no rollout begins with {prompt_ids}")

    async def compute_teacher_logprobs_single(self, sequence_ids, routing_key=None, **kwargs):
        self.scored += 1
        ids, logprobs = self.scores(self.teacher_model, sequence_ids, VOCAB)
        return ids.int(), logprobs

    @torch.no_grad()
    def scores(self, model, sequence, k):
        """Row i speaks of token i + 1; the last row is verl's dummy."""
        top = model(torch.tensor([sequence])).logits[0].log_softmax(-1).topk(k)
        top.indices[-1], top.values[-1] = 0, 0.0
        return top.indices, top.values


def run_loop(servers, row, changes=None, **kwargs):
    config = verl_config(changes)
    tokenizer = load_tokenizer("embedded:teacher", config_of().model)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(EOS)
    servers.row = row
    prompt = servers.step.prompts[row]

    async def go():
        import hydra

        loop = hydra.utils.instantiate(
            config=_agent_loop_registry["prune_opd"],
            trainer_config=DictConfigWrap(config),
            server_manager=servers,
            tokenizer=tokenizer,
            processor=None,
            hf_model_type=None,
            dataset_cls=None,
            data_config=DictConfigWrap(config.data),
        )

        async def initial_tokens(messages, **kw):
            return list(prompt)

        loop.ct_build_initial_tokens = initial_tokens
        fields = {"raw_prompt": [{"role": "user", "content": "?"}], "uid": "u", "session_id": 0, "global_steps": 1}
        return await loop.run({"temperature": 1.0}, **fields, **kwargs)

    return asyncio.run(go())


@pytest.mark.parametrize("row", range(ROLLOUTS))
@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_a_rollout_ends_where_its_reliability_does(row, chunk):
    """At the very token where our step says that reliability is spent, whatever the chunk; its scores come along."""
    servers = Servers(our_steps()[0])
    result = servers.step.result
    output = run_loop(
        servers, row, IN_FLIGHT | {f"+{plugin.WHERE}.pruning.in_flight.chunk": chunk}, **{plugin.MAX_TOKENS: 10}
    )
    kept = min(int(result.drift.effective_length[row]) + 1, int(result.rollouts.lengths[row]))
    assert output.response_ids == result.rollouts.response_ids[row, :kept].tolist()
    assert output.response_mask == [1] * kept and len(output.response_logprobs) == kept
    assert output.prompt_ids == servers.step.prompts[row]
    assert len({request for request, _ in servers.requests}) == 1
    assert len(servers.requests) == servers.scored == -(-kept // chunk)
    assert all(params["max_tokens"] <= chunk for _, params in servers.requests)
    there = len(output.prompt_ids) - 1 + torch.arange(kept)
    ids, logprobs = output.extra_fields["teacher_ids"], output.extra_fields["teacher_logprobs"]
    assert len(ids) == len(logprobs) == len(output.prompt_ids) + kept
    torch.testing.assert_close(logprobs[there], servers.step.scores.topk.logprobs[row, :kept], atol=1e-5, rtol=0)


def test_some_rollouts_are_stopped_and_some_are_not():
    """Otherwise the test above would pass without stopping."""
    result = our_steps()[0].result
    spent = result.drift.effective_length < result.rollouts.lengths - 1
    assert spent.any() and not spent.all()


def test_a_rollout_that_ends_itself_is_not_asked_on():
    """Its last token fills the chunk exactly, and verl's server does not say why it stopped."""
    servers, row = Servers(our_steps()[1]), 3
    length = int(servers.step.result.rollouts.lengths[row])
    assert servers.step.result.rollouts.finished[row]
    output = run_loop(
        servers, row, IN_FLIGHT | {f"+{plugin.WHERE}.pruning.in_flight.chunk": length}, **{plugin.MAX_TOKENS: 10}
    )
    assert len(output.response_ids) == length and len(servers.requests) == 1


def test_audit_rollouts_run_uncut():
    servers = Servers(our_steps()[0])
    audit = IN_FLIGHT | {f"+{plugin.WHERE}.pruning.in_flight.audit_share": 1}
    assert len(run_loop(servers, 3, audit, **{plugin.MAX_TOKENS: 10}).response_ids) == 10


def test_by_the_teachers_nucleus_only_the_teacher_is_asked():
    servers = Servers(our_steps()[0])
    nucleus = IN_FLIGHT | {f"+{plugin.WHERE}.pruning.metric": "teacher_top_p_accept"}
    nucleus |= {f"+{plugin.WHERE}.pruning.teacher_top_p": 0.3, f"+{plugin.WHERE}.pruning.threshold": "null"}
    del nucleus[f"+{plugin.WHERE}.pruning.threshold"]
    asked = []
    scores = servers.scores
    servers.scores = lambda model, *args: asked.append(model) or scores(model, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the threshold has no effect under this metric
        run_loop(servers, 0, nucleus, **{plugin.MAX_TOKENS: 10})
    assert asked and all(model is servers.teacher_model for model in asked)


def test_the_window_caps_training_prompts_and_validation_is_left_alone():
    servers = Servers(our_steps()[0])
    assert len(run_loop(servers, 0, None, **{plugin.MAX_TOKENS: 6}).response_ids) == 6
    assert servers.requests[-1][1]["max_tokens"] == 6
    for changes in (None, IN_FLIGHT):
        assert len(run_loop(servers, 0, changes).response_ids) == 10  # all that there is
        assert "max_tokens" not in servers.requests[-1][1]
    assert servers.scored == 0


def test_what_was_scored_in_flight_is_not_scored_again(monkeypatch):
    worker = plugin.PruneAgentLoopWorker.__new__(plugin.PruneAgentLoopWorker)
    servers = Servers(our_steps()[0])
    worker.distillation_enabled, worker.teacher_key, worker.teacher_server_manager = True, "data_source", servers
    output = run_loop(servers, 0, None, **{plugin.MAX_TOKENS: 6})
    arguments = dict(prompt_ids=output.prompt_ids, response_ids=output.response_ids, validate=False)
    asyncio.run(worker._compute_teacher_logprobs(output, **arguments))
    asyncio.run(worker._compute_teacher_logprobs(output, **arguments))
    assert servers.scored == 1 and len(output.extra_fields["teacher_ids"]) == len(output.prompt_ids) + 6


def test_the_worker_hands_the_teacher_to_its_agent_loops(monkeypatch):
    def init(self):
        self.llm_client, self.teacher_server_manager = SimpleNamespace(), object()

    monkeypatch.setattr(plugin.PruneAgentLoopWorker.__mro__[1], "__init__", init)
    worker = plugin.PruneAgentLoopWorker()
    assert worker.llm_client.teacher is worker.teacher_server_manager
