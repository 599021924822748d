"""A guard on what a step does, counted and not timed: forward passes, tokens through each body and head, peak bytes.

Counted below the code that does it, at torch's matrix products and allocations, so that no rewrite can miscount itself.
The teacher is wider than the student, which tells the products of their heads apart.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from prune_opd.models.causal_lm import output_head
from prune_opd.rollout.local import LocalSampler
from prune_opd.teachers import local
from prune_opd.teachers.local import LocalTeacher
from prune_opd.training.build import build_optimizer, build_window
from prune_opd.update import losses
from tests.families import EOS, PAD, VOCAB, tiny_model, tiny_prompts
from tests.steps import step_of
from tests.test_step import IN_FLIGHT, M, config_of
from tests.update.test_correction import CAP

STUDENT, TEACHER = 32, 48  # hidden sizes
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.out)


class HeadProducts(TorchDispatchMode):
    """Rows of hidden states, by their size, that were multiplied with an embedding: what each head was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = {STUDENT: 0, TEACHER: 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            hidden, embedding = args[-2:]
            if embedding.shape == (hidden.shape[-1], VOCAB):
                self.rows[hidden.shape[-1]] += hidden.shape[0]
        return result


@dataclass
class Body:
    """Calls of one model's body: columns of each, and whether it was for the gradient."""

    columns: list[int] = field(default_factory=list)
    with_gradient: list[int] = field(default_factory=list)

    def count(self, module, args, kwargs) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"][..., 0] if ids is None else ids
        (self.with_gradient if torch.is_grad_enabled() else self.columns).append(ids.numel())


def counted_step(prompts=None, *, another_policy=False, **settings):
    """(result, student's body, teacher's body, rows of each head). another_policy: a copy samples, and says so."""
    config = config_of(**{"rollout.slots": 8} | settings)
    student = tiny_model("qwen3", seed=3).train()
    torch.manual_seed(0)
    teacher = type(student)(type(student.config)(**student.config.to_dict() | {"hidden_size": TEACHER})).eval()
    sampler = LocalSampler(student, pad_id=PAD, eos_ids=[EOS], vocab_size=VOCAB, slots=config.rollout.slots)
    if another_policy:
        sampler.model, sampler.keep_sampled_logprobs = copy.deepcopy(student), True
        output_head(sampler.model)
    bodies = Body(), Body()
    for model, body in zip((student, teacher), bodies, strict=True):
        output_head(model)  # held against the model's own logits once, not in each step
        model.base_model.register_forward_pre_hook(body.count, with_kwargs=True)
    optimizer = build_optimizer(student, config)[0]
    with HeadProducts() as products:
        result = step_of(
            step=0,
            prompts=prompts or tiny_prompts(),
            student=student,
            sampler=sampler,
            teacher=LocalTeacher(teacher, vocab_size=VOCAB),
            optimizer=optimizer,
            window=build_window(config),
            vocab_size=VOCAB,
            config=config,
        )
    return result, *bodies, products.rows


@pytest.mark.parametrize("settings", [{"pruning.enable": False}, {}, IN_FLIGHT], ids=["opd", "window", "in-flight"])
def test_no_token_is_fed_or_asked_for_twice(settings):
    result, student, teacher, rows = counted_step(**settings)
    prompts, lengths = result.rollouts.prompts, result.rollouts.lengths
    kept, generated = int(lengths.sum()), result.rollouts.generated
    before = {tuple(prompt[:-1]) for prompt in prompts} - {()}  # the last token of a prompt goes with the decode steps
    in_flight = settings is IN_FLIGHT

    # The student samples: each prompt once, however many rollouts answer it, and one forward for each decode step.
    assert student.columns[0] == max(map(len, before)) * len(before)
    assert len(student.columns) - 1 <= int(lengths.max()) + (3 if in_flight else 0)
    assert sum(student.columns[1:]) == result.rollouts.slot_steps == generated
    # It is trained by one forward with gradient over the packed rollouts, and by no other: no old log-probs.
    assert sum(student.with_gradient) == result.packed_tokens <= (kept + sum(map(len, prompts))) / 0.9

    # The teacher reads each token once, and never with a gradient.
    assert teacher.with_gradient == [] and result.scores.scored == generated
    if in_flight:
        looks = -(-(int(lengths.max()) + 3) // 3)
        assert len(teacher.columns) <= 2 * looks  # those who have a slot already, and newcomers
    else:
        assert teacher.columns == student.with_gradient

    # Heads see response positions alone: the teacher's once; the student's to sample, for the loss, and again in
    # backward, where its chunk is computed anew.
    assert rows[TEACHER] == generated
    assert rows[STUDENT] == generated + 2 * kept


def test_the_heads_pass_for_the_loss_also_says_how_far_another_policy_is():
    """What the trained policy says of tokens that it did not sample costs no pass over the vocabulary of its own."""
    _, *_, own = counted_step()
    result, *_, other = counted_step(another_policy=True, **{"rollout.ahead": True, CAP: 2.0})
    assert result.trainer_logprobs is not None and other == own


def test_a_divergence_over_the_vocabulary_takes_one_pass_of_each_head():
    """The sampled token's log-probs come of the same logits. One chunk holds them all, so none are made again."""
    result, *_, rows = counted_step(**{"objective.loss": "reverse_kl"})
    kept, scored = int(result.rollouts.lengths.sum()), result.scores.scored
    assert rows[STUDENT] == result.rollouts.generated + kept
    assert rows[TEACHER] == scored + kept  # scored for drift, and again for the loss


def test_rollouts_that_ended_before_a_look_are_read_packed_as_without_one():
    """Watching costs nothing where there is nothing to stop: the forwards of the teacher are those of the update."""
    settings = IN_FLIGHT | {"pruning.in_flight.chunk": 100, "pruning.in_flight.audit_share": 1.0}
    result, student, teacher, _ = counted_step(**settings)
    assert len(set(result.rollouts.lengths.tolist())) > 1
    assert teacher.columns == student.with_gradient


def test_a_stop_in_flight_spares_both_models_their_work():
    """Against the same rollouts uncut: fewer tokens in each body and head."""
    stop = IN_FLIGHT | {"pruning.in_flight.stop_after_events": 2}
    cut, *of_cut, rows = counted_step(**stop)
    uncut, *of_uncut, all_rows = counted_step(**stop | {"pruning.in_flight.audit_share": 1.0})
    assert cut.rollouts.stopped.sum() >= 4, "too few stops to tell"
    assert rows[TEACHER] < all_rows[TEACHER] and rows[STUDENT] < all_rows[STUDENT]
    for less, more in zip(of_cut, of_uncut, strict=True):
        assert sum(less.columns) + sum(less.with_gradient) < sum(more.columns) + sum(more.with_gradient)
    # What was sampled past a stop is at most what runs until the next look: a chunk for each stopped rollout.
    assert cut.scores.scored <= 1.02 * int(cut.rollouts.lengths.sum()) + 3 * int(cut.rollouts.stopped.sum())


def test_peak_memory_grows_by_far_less_than_the_vocabulary_a_token(monkeypatch):
    """Four times as many tokens: full logits would take 4 · V bytes more for each, and their gradient as much again."""
    vocab = 8192
    for module, name in ((losses, "candidate_logprobs"), (local, "head_statistics")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), chunk_bytes=2**19))
    student = tiny_model("qwen3", seed=3)
    student.resize_token_embeddings(vocab, mean_resizing=False)

    def peak_of(rollouts: int) -> tuple[int, int]:
        model = copy.deepcopy(student).train()
        config = config_of(**{"training.micro_batch_tokens": 10**6})
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = step_of(
                step=0,
                prompts=[[5, 6]] * rollouts,
                student=model,
                sampler=LocalSampler(model, pad_id=PAD, eos_ids=[], vocab_size=vocab, slots=8),
                teacher=LocalTeacher(copy.deepcopy(student), vocab_size=vocab),
                optimizer=build_optimizer(model, config)[0],
                window=None,
                vocab_size=vocab,
                config=config,
            )
        memory = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        here = peak = 0
        for event in sorted(memory, key=lambda e: e.start_ns()):
            here += event.nbytes()
            peak = max(peak, here)
        assert peak > 4 * student.get_output_embeddings().weight.nbytes, "the profiler saw no allocation"
        return int(result.rollouts.lengths.sum()), peak

    (few, low), (many, high) = peak_of(16), peak_of(64)
    assert many - few == 48 * M
    assert (high - low) / (many - few) < 2 * vocab
