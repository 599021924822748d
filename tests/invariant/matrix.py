"""The settings that meet in pairs: what each changes, which pairs are refused, and which say that one has no effect.

tests/invariant/test_matrix.py runs them and compares with tests/invariant/plain.py; scripts/make_matrix.py writes them
out as docs/matrix.md. A case is a set of names, written `lora+served`; `` is what all of them start from: a tied
Qwen 3 of two layers in float32, rollouts packed by default, the teacher in the process, one process, the slot engine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

VOCABULARY = 149  # of the embedded tokenizer
WINDOW = 8  # tokens: less than the prompts have


@dataclass(frozen=True)
class Factor:
    """says: what it is, for the page · settings of the recipe, without those that need an address · model: changes of
    the models' configuration · wider: whose vocabulary has so many more rows than the tokenizer has ids."""

    says: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    wider: Mapping[str, int] = field(default_factory=dict)


LAYERS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FACTORS = {
    "compiled": Factor("`model.compile`", {"model.compile": True}),
    "autocast": Factor("`training.bf16`: bfloat16 autocast in the update", {"training.bf16": True}),
    "bfloat16": Factor(
        "`model.dtype`, `model.teacher_dtype`: weights in bfloat16",
        {"model.dtype": "bfloat16", "model.teacher_dtype": "bfloat16"},
    ),
    "segments": Factor(
        '`model.attn_implementation = "varlen"`: packed rows without a mask, each rollout with its own prompt',
        {"model.attn_implementation": "varlen"},
    ),
    "alone": Factor(
        "`training.micro_batch_tokens = 1`: a packed row at a time, where all others share a micro-batch",
        {"training.micro_batch_tokens": 1},
    ),
    "window": Factor(f"a sliding window of {WINDOW} tokens in the first layer", model=LAYERS),
    "softcap": Factor(
        "Gemma 2: soft-capped logits and attention scores",
        {"pruning.threshold": 0.6},  # capped models of this size part less
    ),
    "untied": Factor("an output head of its own", model={"tie_word_embeddings": False}),
    "student-rows": Factor("a student with 8 padding rows that the teacher lacks", wider={"student": 8}),
    "teacher-rows": Factor("a teacher with 4 padding rows that the student lacks", wider={"teacher": 4}),
    "lora": Factor(
        "`model.lora`, on all linear layers, scaled by 3",
        {"model.lora.r": 2, "model.lora.alpha": 6},
    ),
    "fsdp2": Factor('`training.parallel = "fsdp2"`, two processes', {"training.parallel": "fsdp2"}),
    "served": Factor(
        "`model.teacher_model_server_url`: the teacher over HTTP, which lists its 20 likeliest tokens",
    ),
    "named": Factor("the same from a server that scores ids that are named (`--enable-scale-out`)"),
    "vllm": Factor("`rollout.use_vllm`: rollouts from a vLLM engine", {"rollout.use_vllm": True}),
}

SERVED = {"served", "named"}


@dataclass(frozen=True)
class Refusal:
    """error: class of prune_opd.errors · match: words of the message · why: for the page."""

    error: str
    match: str
    why: str


REFUSED: dict[frozenset[str], Refusal] = {
    frozenset({"compiled", "fsdp2"}): Refusal(
        "ConfigError", r"model\.compile = true was not built for training\.parallel", "weights come and go in a forward"
    ),
    frozenset({"compiled", "segments"}): Refusal(
        "ConfigError", r"'varlen' was not built for model\.compile", "only sdpa and eager were built"
    ),
    frozenset({"segments", "softcap"}): Refusal(
        "ModelError", "caps its attention scores, which was built for eager alone", "flash attention has no such cap"
    ),
    frozenset({"vllm", "student-rows"}): Refusal(
        "EngineError", "vLLM could sample ids that the teacher does not have", "vLLM would sample the padding"
    ),
    frozenset({"vllm", "window"}): Refusal(
        "EngineError",
        "vLLM did not start with .*Sliding window for some but all layers",
        "vLLM windows all layers or none",
    ),
    **{
        frozenset({served, "teacher-rows"}): Refusal(
            "ServerError", "beyond the 149 that student and server share", "its padding is among the likeliest tokens"
        )
        for served in sorted(SERVED)
    },
}

NO_EFFECT: dict[frozenset[str], str] = {
    frozenset({served, "bfloat16"}): "model.teacher_dtype has no effect: the teacher is served" for served in SERVED
}
"""Pairs that run, one of whose settings nothing reads, and the warning that says so."""


def names(case: str) -> tuple[str, ...]:
    """The factors of a case."""
    return tuple(filter(None, case.split("+")))


def cases() -> Iterator[str]:
    """The base, each factor alone, and all pairs but that of the two kinds of served teacher."""
    yield ""
    yield from FACTORS
    yield from ("+".join(pair) for pair in combinations(FACTORS, 2) if set(pair) != SERVED)


def refusal(case: str) -> Refusal | None:
    """Why a case is refused; None where it runs."""
    return next((why for pair, why in REFUSED.items() if pair <= set(names(case))), None)


def no_effect(case: str) -> str | None:
    """The warning that a case gives of a setting that nothing reads."""
    return next((words for pair, words in NO_EFFECT.items() if pair <= set(names(case))), None)


def sample(seed: int = 0) -> list[str]:
    """Pairs for the ordinary suite: in an order drawn by the seed, those with two factors not seen yet, then with one.

    Left out are vLLM, whose environment is another, and compiled code, which takes half a minute of tracing a case
    (tests/models/test_compile.py has a case in the ordinary suite).
    """
    pairs = [case for case in cases() if len(names(case)) == 2 and not refusal(case)]
    pairs = [case for case in pairs if not {"vllm", "compiled"} & set(names(case))]
    random.Random(seed).shuffle(pairs)
    seen: set[str] = set()
    taken = []
    for new in (2, 1):
        for case in pairs:
            if len(set(names(case)) - seen) >= new:
                taken.append(case)
                seen |= set(names(case))
    return taken
