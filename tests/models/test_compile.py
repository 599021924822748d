"""`model.compile`: the same steps from compiled code, and no new code for every length."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch._inductor import cpp_builder

from prune_opd.config import parse_config, with_settings
from prune_opd.errors import ConfigError, ModelError
from prune_opd.models.causal_lm import COMPILED_VARIANTS, check_compiler, compiled

RECIPE = {"model": {"model_name_or_path": "a", "teacher_model_name_or_path": "b"}, "data": {"train": "task:chain_sum"}}
STEPS, SLOTS = 3, 4
SEEDS = 14, 15  # of models whose first step meets all kinds of code
GRAPHS = 5  # decoding; the teacher reading on, one rollout and several; teacher and update over packed rows


def no_compiler() -> bool:
    try:
        check_compiler(torch.device("cpu"))
    except ModelError:
        return True
    return False


needs_compiler = pytest.mark.skipif(no_compiler(), reason="no C++ compiler on this machine")


def steps(*, compile: bool) -> list[dict[str, float]]:
    """Some steps with a growing length, a stop in flight, and a loss over packed rows; and the code compiled so far."""
    from torch._dynamo.utils import counters

    from prune_opd.models.kernels import attend_one, attend_rows
    from prune_opd.rollout.local import LocalSampler
    from prune_opd.teachers.local import LocalTeacher
    from prune_opd.training.build import build_optimizer
    from tests.families import EOS, PAD, VOCAB, tiny_model, tiny_prompts
    from tests.steps import step_of
    from tests.test_step import IN_FLIGHT, config_of

    student, teacher = (tiny_model("qwen3", seed, head_dim=16) for seed in SEEDS)
    for model in (student, teacher):
        del model.model.layers[1:]
        model.config.num_hidden_layers = 1
    config = config_of(
        **IN_FLIGHT, **{"rollout.slots": SLOTS, "model.compile": compile, "training.learning_rate": 1e-2}
    )
    optimizer, _ = build_optimizer(student, config)
    sampler = LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB, slots=SLOTS, compile=compile)
    kernels = {"attend_one": attend_one._kernel, "attend_rows": attend_rows._kernels}
    done, before = [], {name: kernel.cache_info().hits for name, kernel in kernels.items()}  # of other tests
    graphs = counters["stats"]["unique_graphs"]  # likewise
    for step in range(STEPS):
        length = 16 + 5 * step
        result = step_of(
            step=step,
            prompts=tiny_prompts(),
            student=student,
            sampler=sampler,
            teacher=LocalTeacher(teacher, vocab_size=VOCAB, compile=compile),
            optimizer=optimizer,
            window=None,
            vocab_size=VOCAB,
            config=with_settings(config, **{"rollout.max_completion_length": length}),
        )
        done.append(
            {
                "tokens": result.rollouts.response_ids.tolist(),
                "overlap": result.events.sum().item(),
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "graphs": counters["stats"]["unique_graphs"] - graphs,
                **{name: kernel.cache_info().hits - before[name] for name, kernel in kernels.items()},
            }
        )
    return done


@needs_compiler  # whatever the backend: compiled decoding attends by a kernel
@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "eager",  # all but the generated code
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                "PRUNE_OPD_TEST_INDUCTOR" not in os.environ, reason="minutes of a C++ compiler: make test-engines"
            ),
        ),
    ],
)
def test_compiled_steps_are_the_same_steps(backend, tmp_path):
    """Same tokens, events, loss and gradient; and after the first step, whatever the lengths, nothing is compiled.

    In a process of its own: the shape checks of the test suite would sit between torch.compile and the code.
    """
    plain = steps(compile=False)
    script = f"""
import json, sys, torch
from functools import partial
torch.compile = partial(torch.compile, backend={backend!r})
from tests.models.test_compile import steps
json.dump(steps(compile=True), sys.stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    for theirs, ours in zip(plain, compiled, strict=True):
        assert ours["tokens"] == theirs["tokens"] and ours["overlap"] == theirs["overlap"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert plain[-1]["graphs"] == 0
    for kernel in ("attend_one", "attend_rows"):
        assert plain[-1][kernel] == 0 and 0 < compiled[0][kernel] < compiled[-1][kernel]
    assert compiled[0]["graphs"] == compiled[-1]["graphs"] == GRAPHS


def test_without_a_compiler_it_says_so_before_anything_is_loaded(monkeypatch):
    def nothing(*_):
        raise cpp_builder.exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    with pytest.raises(ModelError, match=r"model\.compile.*install g\+\+"):
        check_compiler(torch.device("cpu"))
    check_compiler(torch.device("meta"))  # a CPU's need


def test_sharded_weights_are_refused():
    settings = copy.deepcopy(RECIPE)
    settings["model"]["compile"] = True
    settings["training"] = {"parallel": "fsdp2"}
    with pytest.raises(ConfigError, match=r"model\.compile.*fsdp2"):
        parse_config(settings, where="recipe")


def test_settings_of_the_compiler_are_those_of_compiled_calls_alone(monkeypatch):
    """In any thread, and only there: torch keeps them for each thread, so setting them once would not do."""

    def settings() -> tuple[object, ...]:
        dynamo = torch._dynamo.config
        return dynamo.recompile_limit, dynamo.specialize_float, torch.fx.experimental._config.use_duck_shape

    seen = []

    def backend(graph, _inputs, **_options):
        seen.append(settings())
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    before, function = settings(), compiled.__wrapped__(lambda x, factor: factor * x)
    threads = [Thread(target=function, args=(torch.ones(2), factor)) for factor in (2.0, 3.0)]
    for thread in threads:
        thread.start()
        thread.join()
    assert seen == [(COMPILED_VARIANTS, True, False)] * 2
    assert settings() == before != seen[0]
