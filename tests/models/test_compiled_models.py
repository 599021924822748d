"""`model.compile` with several models in one process: none is ever served the code of another.

Each pair of models has the same weights and shapes and differs in one field of the configuration. Code that
torch.compile made for the first would run for the second as well, and give wrong numbers without an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.families import PAD, tiny_model

ROPE = {"rope_type": "default", "rope_theta": 1e4}
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sliding window": ("mistral", {"sliding_window": 4}, {"sliding_window": None}),
    "wider sliding window": ("mistral", {"sliding_window": 4}, {"sliding_window": 6}),
    "kinds of layers": (
        "gemma3",
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "rope theta": ("llama", {"rope_parameters": ROPE}, {"rope_parameters": ROPE | {"rope_theta": 100.0}}),
    "rope scaling": (
        "llama",
        {"rope_parameters": ROPE},
        {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}},
    ),
    "rope's factor of attention": (  # a number of the module, no tensor
        "llama",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
        {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
    ),
    "norm eps": ("llama", {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1.0}),
    "activation": ("llama", {"hidden_act": "silu"}, {"hidden_act": "relu"}),
    "soft-cap of attention": ("gemma2", {"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": 0.5}),
    "soft-cap of logits": ("gemma2", {"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 1.0}),
    "attention scale": ("gemma2", {"query_pre_attn_scalar": 256}, {"query_pre_attn_scalar": 1}),
    "attention multiplier": ("granite", {"attention_multiplier": 1.0}, {"attention_multiplier": 0.1}),
    "scale of logits": ("granite", {"logits_scaling": 1.0}, {"logits_scaling": 8.0}),
}
OF_LOGITS = {"soft-cap of logits", "scale of logits"}  # of which hidden states know nothing
GREEDY, LENGTH, TOP_K = 0.0, 12, 4


def measure(name: str) -> dict[str, float]:
    """One pair: how far compiled code is from the plain, and the second model from the first by plain code.

    They take turns, as student and teacher do: the first is compiled first, and meets the code of the second later.
    """
    from prune_opd.models.causal_lm import compiled
    from prune_opd.models.packed_attention import packed_states
    from prune_opd.models.packing import pack
    from tests.models.test_packing import rollouts_of

    torch._dynamo.reset()  # or the pairs together would have more code than dynamo keeps of a function
    family, first, second = PAIRS[name]
    layers = {} if family.startswith("gemma") else {"num_hidden_layers": 1}  # dynamo takes as long as there are layers
    models = [tiny_model(family, **layers, **changes) for changes in (first, second)]
    (part,) = pack(rollouts_of([[2, 7, 3], [4, 5, 6]], [20, 20]), 10**6)
    plain = [(states(packed_states, model, part), answer(model, compile=False)) for model in models]
    packed_off = decoded_off = 0.0
    for model, (packed, decoded) in [*zip(models, plain, strict=True)] * 2:
        packed_off = max(packed_off, distance(states(compiled(packed_states), model, part), packed))
        decoded_off = max(decoded_off, distance(answer(model, compile=True), decoded))
    (packed, decoded), (other_packed, other_decoded) = plain
    return {
        "packed": packed_off,
        "decoded": decoded_off,
        "packed apart": distance(packed, other_packed),
        "decoded apart": distance(decoded, other_decoded),
    }


def states(function: Any, model: PreTrainedModel, part: Any) -> torch.Tensor:
    from prune_opd.models.packed_attention import use_packed_attention

    with torch.no_grad(), use_packed_attention(model):
        return function(model, part)[part.row, part.column]


def answer(model: PreTrainedModel, *, compile: bool) -> torch.Tensor:
    """The log-probs of the best tokens while one prompt is answered."""
    from prune_opd.rollout.local import LocalSampler

    sampler = LocalSampler(model, pad_id=PAD, eos_ids=[], slots=2, compile=compile)
    uniforms = torch.zeros(2, LENGTH, dtype=torch.float64)
    student = sampler.sample([[2, 7, 3], [4, 5]], uniforms, temperature=GREEDY, top_k=TOP_K).student
    assert student is not None
    return student.logprobs


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    """In a process of its own: the shape checks of the test suite would sit between torch.compile and the code."""
    script = """
import json, sys, torch
from functools import partial
torch.compile = partial(torch.compile, backend="eager")  # dynamo's guards and graphs, without generated code
from tests.models.test_compiled_models import PAIRS, measure
json.dump({name: measure(name) for name in PAIRS}, sys.stdout)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_no_model_is_served_the_code_of_another(measured, name):
    found = measured[name]
    assert found["decoded apart"] > 1e-2 and (name in OF_LOGITS or found["packed apart"] > 1e-2), "no pair to tell by"
    assert found["packed"] < 1e-4 and found["decoded"] < 1e-4
