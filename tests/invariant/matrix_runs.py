"""Two steps of a case of tests/invariant/matrix.py by the product's own functions, and all that they said.

python tests/invariant/matrix_runs.py OUT FOLDER CASE...                  in this process
torchrun ... tests/invariant/matrix_runs.py OUT FOLDER CASE...            in several
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from prune_opd.config import Config, parse_config
from prune_opd.config.load import set_value
from prune_opd.distributed.sharding import launched
from prune_opd.distributed.world import ALONE, World, full_tensor
from prune_opd.errors import PruneOPDError
from prune_opd.models.loading import load_tokenizer
from prune_opd.rollout.vllm import VLLMSampler
from prune_opd.step import StepResult, prune_opd_step
from prune_opd.training.build import Parts, build_parts, prompts_of
from tests.families import EOS, tiny_model
from tests.invariant.matrix import FACTORS, SERVED, VOCABULARY, names
from tests.openai_server import serving
from tests.test_step import related

STEPS = 2  # the second with what the first left: weights, adapters that are not zero, moments, copies that may be stale
ENDS = [EOS, 5, 12, 30, 44, 61, 77, 93]  # so that random models end here and there
SETTINGS = {
    "data.train": "task:chain_sum",
    "data.max_prompt_length": 64,
    "rollout.prompts_per_step": 4,
    "rollout.num_generations": 2,
    "rollout.max_completion_length": 24,
    "rollout.slots": 3,
    "objective.top_k": 6,
    "pruning.threshold": 0.3,
    "pruning.w_drop": 0.1,
    "pruning.dynamic_response_length.enable": False,
    "training.steps": STEPS,
    "training.learning_rate": 1e-2,
    "training.weight_decay": 0.1,
    "training.max_grad_norm": 0.5,
    "training.device": "cpu",
}
# With a head size that vLLM and the compiled kernels take.
SIZE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
MOST_ROWS = VOCABULARY + 8  # models of other vocabularies have the first of the same rows
CAPS = {"final_logit_softcapping": 4.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 32}


def make_models(case: str, folder: Path) -> tuple[Path, Path]:
    """Folders of the case's student and teacher, with the embedded tokenizer; made once for all cases like it."""
    factors = [FACTORS[name] for name in names(case)]
    family = "gemma2" if "softcap" in names(case) else "qwen3"
    changes: dict[str, Any] = {**SIZE, "initializer_range": 0.2, "tie_word_embeddings": True}
    changes |= CAPS if family == "gemma2" else {"use_sliding_window": "window" in names(case)}
    if family == "gemma2":
        changes |= {"layer_types": ["full_attention"] * 2}
    for factor in factors:
        changes |= factor.model
    kind = [family, *(name for name in ("window", "untied") if name in names(case))]
    made = []
    for role in ("student", "teacher"):
        rows = VOCABULARY + sum(factor.wider.get(role, 0) for factor in factors)
        path = folder / "-".join([role, *kind, str(rows)])
        if not path.exists():
            model = first_rows(tiny_model(family, seed=3, **changes, vocab_size=MOST_ROWS), rows)
            model = related(model) if role == "teacher" else model
            model.generation_config.eos_token_id = ENDS
            load_tokenizer("embedded:teacher", config_of("", path, path).model).save_pretrained(path)
            model.save_pretrained(path)
        made.append(path)
    return made[0], made[1]


def first_rows(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The model with a vocabulary of its first rows alone."""
    model.resize_token_embeddings(rows)
    return model


def config_of(case: str, student: Path, teacher: Path, **more: Any) -> Config:
    """The recipe of a case."""
    settings: dict[str, Any] = {}
    changes = {"model.model_name_or_path": str(student), "model.teacher_model_name_or_path": str(teacher)} | SETTINGS
    for name in names(case):
        changes |= FACTORS[name].settings
    for name, value in (changes | more).items():
        set_value(settings, name, value)
    return parse_config(settings, where="case")


def run_case(case: str, folder: Path, world: World = ALONE) -> dict[str, Any]:
    """What a case did: `warnings`, and `steps` or the `refused` error, as (class, message)."""
    with warnings.catch_warnings(record=True) as caught, ExitStack() as open_until_done:
        warnings.simplefilter("always")
        try:
            found = {"steps": _steps(case, folder, world, open_until_done)}
        except PruneOPDError as error:
            found = {"refused": (type(error).__name__, str(error))}
    return found | {"warnings": [str(warning.message) for warning in caught]}


def _steps(case: str, folder: Path, world: World, stack: ExitStack) -> list[dict[str, Any]]:
    student, teacher = make_models(case, folder) if world.rank == 0 else (None, None)
    student, teacher = world.gather((student, teacher))[0]
    address = {}
    if SERVED & set(names(case)):
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, attn_implementation="eager").eval()
        tokenizer = load_tokenizer(str(teacher), config_of("", student, teacher).model)
        server = serving(model, tokenizer, name=str(teacher), scale_out="named" in names(case))
        address = {"model.teacher_model_server_url": stack.enter_context(server).url}
    parts = build_parts(config_of(case, student, teacher, **address), folder, console=Console(quiet=True), world=world)
    if isinstance(parts.sampler, VLLMSampler):
        stack.callback(parts.sampler.close)
    return [_recorded(parts, step, world) for step in range(STEPS)]


def _recorded(parts: Parts, step: int, world: World) -> dict[str, Any]:
    prompts = prompts_of(parts.prompts, parts.config, step, None)
    before = _trained(parts.student)
    result = prune_opd_step(parts.run, step, prompts)
    gradients = _trained(parts.student, gradients=True)
    of_ranks = world.gather(_rows(result))
    return {
        "rollouts": sorted((row for rows in of_ranks for row in rows), key=lambda row: row["number"]),
        "prompts": [prompt.token_ids for prompt in prompts],
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "before": before,
        "after": _trained(parts.student),
        "gradients": gradients,
        "ranks": [len(rows) for rows in of_ranks],
    }


def _trained(student: torch.nn.Module, *, gradients: bool = False) -> dict[str, torch.Tensor]:
    """What is trained, or its gradient, whole, by the names that the plain model has for it."""
    found = {}
    for name, value in student.named_parameters():
        if value.requires_grad:
            whole = full_tensor(value.grad if gradients else value.detach())
            found[name.removeprefix("base_model.model.")] = whole.clone()
    return found


def _rows(result: StepResult) -> list[dict[str, Any]]:
    """Each rollout of this rank: its kept tokens and what was said of them."""
    rollouts, scores = result.rollouts, result.scores
    assert rollouts.student is not None
    of_tokens = {
        "response": rollouts.response_ids,
        "student_ids": rollouts.student.ids,
        "student_logprobs": rollouts.student.logprobs,
        "teacher_ids": scores.topk.ids,
        "teacher_logprobs": scores.topk.logprobs,
        "candidate_logprobs": scores.candidate_logprobs,
        "teacher_sampled": scores.sampled_logprobs,
        "events": result.events,
        "weight": result.weight,
    }
    if result.trainer_logprobs is not None:
        of_tokens |= {"trainer_logprobs": result.trainer_logprobs, "sampled_logprobs": rollouts.sampled_logprobs}
    return [
        {
            "number": number,
            "prompt": list(rollouts.prompts[b]),
            "finished": bool(rollouts.finished[b]),
            "effective_length": int(result.drift.effective_length[b]),
            **{name: values[b, : int(rollouts.lengths[b])].clone() for name, values in of_tokens.items()},
        }
        for b, number in enumerate(result.numbers)
    ]


def main(out: Path, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    if backend := os.environ.get("MATRIX_BACKEND"):
        torch.compile = partial(torch.compile, backend=backend)
    with launched() as world:
        found = {}
        for case in cases:
            found[case] = run_case(case, folder, world)
            print(case or "base", found[case].get("refused", "ran"), flush=True)
    if world.rank == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
