"""Settings in pairs against the plain path in float64 (tests/invariant/plain.py): no wrong but plausible numbers.

The ordinary suite takes a sample that has every factor but vLLM and compiled code; `make test-engines` takes all, with
generated code, and with real vLLM in its own environment (tests/engines/test_vllm_matrix.py).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_distributed import torchrun
from tests.invariant.matrix import FACTORS, SERVED, cases, names, no_effect, refusal, sample
from tests.invariant.matrix_runs import config_of, make_models, run_case
from tests.invariant.plain import Plain, PlainRun
from tests.models.test_compile import no_compiler

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tests/invariant/matrix_runs.py")
ALL = "PRUNE_OPD_TEST_MATRIX" in os.environ
CASES = [case for case in cases() if "vllm" not in names(case)] if ALL else sample()


@dataclass(frozen=True)
class Tolerance:
    """scores: nats of a log-probability · loss: relative · gradient: of all parameters, norm of the difference over the
    norm · step: by how much of its step a weight may be elsewhere, but for a share `astray` of them (see `moves`)."""

    scores: float
    loss: float
    gradient: float
    step: float
    astray: float


# float32 has 24 bits (6e-8): some 100 roundings of hidden states between 1 and 10. Seen: 1e-5, 2e-7, 2e-6, 0.
EXACT = Tolerance(scores=3e-5, loss=2e-6, gradient=1e-5, step=0.02, astray=1e-3)
# bfloat16 has 8 bits (4e-3): some 30 roundings up to the head, as many on the way back, half of which cancel; where a
# gradient is about nothing, Adam steps the other way. Seen: 3e-3, 4e-2, 0.009 in autocast; 0.2, 2e-3, 4e-2, 0.011.
AUTOCAST = Tolerance(scores=3e-5, loss=1e-2, gradient=8e-2, step=0.3, astray=0.02)
HALF = Tolerance(scores=0.3, loss=1e-2, gradient=8e-2, step=0.3, astray=0.02)


def tolerance(case: str) -> Tolerance:
    if "bfloat16" in names(case):
        return HALF
    return AUTOCAST if "autocast" in names(case) else EXACT


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Any]:
    """What all cases did: here, in two processes, or in one where torch.compile meets no shape checks of the suite."""
    return run_all(CASES, tmp_path_factory.mktemp("matrix"))


def run_all(wanted: list[str], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"folder": folder}
    ranks = [case for case in wanted if "fsdp2" in names(case)]
    apart = [case for case in wanted if {"compiled", "vllm"} & set(names(case)) and case not in ranks]
    if ranks:
        torchrun(2, SCRIPT, str(folder / "ranks.pt"), str(folder), *ranks, timeout=3000)
        found |= torch.load(folder / "ranks.pt")
    if apart:
        backend = {} if "PRUNE_OPD_TEST_INDUCTOR" in os.environ else {"MATRIX_BACKEND": "eager"}
        path = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        command = [sys.executable, SCRIPT, str(folder / "apart.pt"), str(folder), *apart]
        done = subprocess.run(command, env=os.environ | backend | path, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found |= torch.load(folder / "apart.pt")
    return found | {case: run_case(case, folder) for case in wanted if case not in found}


def test_the_sample_has_every_factor_that_the_suite_can_run():
    assert {name for case in sample() for name in names(case)} == set(FACTORS) - {"vllm", "compiled"}
    assert len(set(cases())) == len(list(cases())) == 1 + len(FACTORS) + len(FACTORS) * (len(FACTORS) - 1) // 2 - 1


def test_the_page_has_the_table():
    spec = importlib.util.spec_from_file_location("make_matrix", ROOT / "scripts" / "make_matrix.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run `make docs`"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case or "base")
def test_pairs_give_the_numbers_of_the_plain_path(case, runs):
    if "compiled" in names(case) and no_compiler():
        pytest.skip("no C++ compiler on this machine")
    check(case, runs)


def check(case: str, runs: dict[str, Any]) -> None:
    found, expected = runs[case], refusal(case)
    if expected:
        assert found.get("refused"), "it ran, and the table says that it is refused"
        name, message = found["refused"]
        assert name == expected.error and re.search(expected.match, message), found["refused"]
        return
    assert "refused" not in found, found["refused"]
    words = no_effect(case)
    said = [warning for warning in found["warnings"] if "has no effect" in warning]
    assert [words in warning for warning in said] == ([True] if words else []), said
    served = SERVED & set(names(case))
    address = {"model.teacher_model_server_url": "http://127.0.0.1:1"} if served else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of(case, *make_models(case, runs["folder"]), **address)
    plain = PlainRun(config, listed="served" in names(case))
    for record in found["steps"]:
        compare(case, record, plain.step(record), tolerance(case))


def compare(case: str, record: dict[str, Any], want: Plain, allowed: Tolerance) -> None:
    events = sum(int(row["events"].sum()) for row in record["rollouts"])
    assert 0 < events < sum(len(row["events"]) for row in record["rollouts"]), "all or nothing drifted: tests little"
    for b, row in enumerate(record["rollouts"]):
        of_student = row["student_ids"], row["student_logprobs"]
        likeliest(want.student[b], *of_student, allowed.scores, f"student, rollout {b}")
        likeliest(want.teacher[b], row["teacher_ids"], row["teacher_logprobs"], allowed.scores, f"teacher, rollout {b}")
        near(row["candidate_logprobs"], want.candidates[b], allowed.scores, f"teacher at the candidates, rollout {b}")
        at_sampled = row["response"][:, None]
        near(row["teacher_sampled"][:, None], want.teacher[b].gather(-1, at_sampled), allowed.scores, "sampled tokens")
        # vLLM's own, and those of the update, which autocast rounds.
        for name, within in (("sampled_logprobs", allowed), ("trainer_logprobs", EXACT if allowed is EXACT else HALF)):
            if name in row:
                near(row[name][:, None], want.student[b].gather(-1, at_sampled), within.scores, name)
        assert row["events"].tolist() == want.events[b].tolist()
        assert row["weight"].tolist() == pytest.approx(want.weight[b].tolist(), abs=1e-6)
        assert row["effective_length"] == want.effective_length[b]
    assert [row["prompt"] for row in record["rollouts"]] == [list(prompt) for prompt in record["prompts"]]
    assert record["loss"] == pytest.approx(want.loss, rel=allowed.loss)
    assert record["grad_norm"] == pytest.approx(want.grad_norm, rel=allowed.gradient)
    assert record["gradients"].keys() == want.gradients.keys()
    apart = torch.cat([(record["gradients"][n].double() - g).flatten() for n, g in want.gradients.items()])
    whole = torch.cat([g.flatten() for g in want.gradients.values()])
    assert apart.norm() <= allowed.gradient * whole.norm(), f"gradients differ by {apart.norm() / whole.norm():.3g}"
    assert allowed is EXACT or apart.norm() > 100 * EXACT.gradient * whole.norm(), "nothing was rounded to bfloat16"
    moves(record, want, allowed)


def likeliest(logprobs: torch.Tensor, ids: torch.Tensor, said: torch.Tensor, allowed: float, what: str) -> None:
    """ids (n, K) are the K likeliest, but for ties within rounding, in order; `said` are their log-probs."""
    top_k = ids.shape[-1]
    assert all(len(set(row)) == top_k for row in ids.tolist()), what
    near(said, logprobs.gather(-1, ids), allowed, what)
    near(said, logprobs.topk(top_k).values, allowed, what)


def near(said: torch.Tensor, want: torch.Tensor, allowed: float, what: str) -> None:
    apart = (said.double() - want).abs().max().item() if said.numel() else 0.0
    assert apart <= allowed, f"{what}: off by {apart:.3g} nats"


def moves(record: dict[str, Any], want: Plain, allowed: Tolerance) -> None:
    """Where each weight is after the step, by the largest step of its tensor; in bfloat16, to the next number."""
    astray, count = 0, 0
    for name, after in want.after.items():
        before, there = record["before"][name].double(), record["after"][name]
        rounding = torch.finfo(there.dtype).eps * after.abs()
        apart = (there.double() - after).abs() - rounding
        astray += int((apart > allowed.step * (after - before).abs().max()).sum())
        count += after.numel()
    assert astray <= allowed.astray * count, f"{astray} of {count} weights are elsewhere after the step"
