"""PruneDistillationTrainer inside TRL's own loop, against our step on the very same rollouts."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: make setup-trl")

from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig

from prune_opd.config import InFlightSection, ObjectiveSection, PruningSection, with_settings
from prune_opd.errors import ConfigError
from prune_opd.integrations.trl import WINDOW_FILE, PruneDistillationTrainer
from prune_opd.models.causal_lm import output_head
from prune_opd.models.packed_attention import packed_states
from prune_opd.models.packing import pack
from prune_opd.teachers.local import LocalTeacher
from prune_opd.training.build import build_optimizer, build_window
from prune_opd.types import TopK
from tests.families import VOCAB
from tests.steps import step_of
from tests.test_step import config_of, related, tiny_model

STEPS, BATCH, LENGTH = 5, 4, 16


def tokenizer():
    """Of the tiny models: 67 ids, one word each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w2"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="w2", padding_side="left"
    )


def prune_trainer(folder, student, teacher, *, objective, pruning, length=LENGTH, accumulation=1, **settings):
    prompts = [" ".join(f"w{2 + (7 * i + j) % 60}" for j in range(2 + i % 4)) for i in range(STEPS * BATCH)]
    for name, model in (("student", student), ("teacher", teacher)):
        tokenizer().save_pretrained(folder / name)
        model.name_or_path = str(folder / name)
    return PruneDistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            per_device_train_batch_size=BATCH // accumulation,
            gradient_accumulation_steps=accumulation,
            shuffle_dataset=False,
            max_completion_length=length,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            **{"max_steps": STEPS, "save_strategy": "no"} | settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
        objective=objective,
        pruning=pruning,
    )


class Replay:
    """A sampler that says what TRL's generation said, with the student's top-k from a forward of our own."""

    def __init__(self, student, rollouts):
        self.student, self.rollouts = student, rollouts

    @torch.no_grad()
    def sample(self, prompts, uniforms, *, top_k, **settings):
        found = TopK.empty(*self.rollouts.response_ids.shape, top_k)
        for part in pack(self.rollouts, 10**6):
            hidden = packed_states(self.student, part)[part.row, part.column]
            logprobs = output_head(self.student).logits(hidden).log_softmax(-1)
            top = logprobs.topk(top_k, dim=-1)
            where = part.rollout, part.position
            found.ids[where], found.logprobs[where] = top.indices, top.values
            found.entropy[where] = torch.special.entr(logprobs.exp()).sum(-1)
        torch.testing.assert_close(
            found.logprobs[self.rollouts.response_mask],
            self.rollouts.student.logprobs[self.rollouts.response_mask],
            rtol=1e-4,
            atol=1e-4,
        )
        return replace(self.rollouts, student=found)


SETTINGS = {
    "pruning.dynamic_response_length.init_len": 10,
    "pruning.dynamic_response_length.hit_ratio": 0.5,
    "pruning.dynamic_response_length.shrink_patience": 1,
    "training.max_grad_norm": 1.0,
}


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("in_flight", [False, True], ids=["window", "in-flight"])
def test_five_steps_are_five_of_ours(tmp_path, in_flight, accumulation):
    stop = {"pruning.in_flight.enable": in_flight, "pruning.in_flight.chunk": 3, "pruning.in_flight.audit_share": 0.0}
    config = config_of(**SETTINGS, **stop)
    first = tiny_model("qwen3", seed=3)
    teacher = related(first)
    trainer = prune_trainer(
        tmp_path,
        copy.deepcopy(first),
        copy.deepcopy(teacher),
        objective=config.objective,
        pruning=config.pruning,
        accumulation=accumulation,
    )
    batches, prune = [], trainer.prune

    def recorded(rollouts, scores=None):
        batches.append(prune(rollouts, scores))
        return batches[-1]

    trainer.prune = recorded
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]

    student = copy.deepcopy(first).train()
    optimizer, window = build_optimizer(student, config)[0], build_window(config)
    windows = []
    for step, (batch, row) in enumerate(zip(batches, logged, strict=True)):
        rollouts = batch.rollouts
        result = step_of(
            step=step,
            prompts=rollouts.prompts,
            student=student,
            sampler=Replay(student, rollouts),
            teacher=LocalTeacher(teacher, vocab_size=VOCAB),
            optimizer=optimizer,
            window=window,
            vocab_size=VOCAB,
            config=with_settings(config, **{"pruning.in_flight.enable": False}),
        )
        assert int(rollouts.lengths.max()) <= result.window.previous_length
        assert row["prune_opd/next_max_response_length"] == result.window.length
        assert row["loss"] == pytest.approx(result.loss, rel=1e-3, abs=1e-4)  # TRL rounds what it logs
        torch.testing.assert_close(batch.weight, result.weight, rtol=1e-5, atol=1e-6)
        windows.append(result.window.length)
        spent = (result.events.cumsum(-1) >= 5) & rollouts.response_mask  # w_drop 0.2
        first_spent = torch.where(spent.any(-1), spent.long().argmax(-1) + 1, 10**6)
        assert bool((rollouts.lengths <= first_spent).all()) or not in_flight, "a rollout ran on past its stop"
        assert not rollouts.stopped.any() or in_flight
    assert len(batches) == STEPS and len(set(windows)) > 1
    assert in_flight == any(bool(batch.rollouts.stopped.any()) for batch in batches), "nothing was stopped, or all was"
    trained = dict(trainer.model.named_parameters())
    for name, parameter in student.named_parameters():
        difference = (parameter - trained[name]).abs()
        # Adam turns a gradient that is zero but for rounding into a whole step, so a few entries may differ.
        assert (difference > 1e-4).double().mean() < 1e-3, name


def test_the_window_is_part_of_a_checkpoint(tmp_path):
    config = config_of(**SETTINGS)
    student = tiny_model("qwen3", seed=3)
    build = {"objective": config.objective, "pruning": config.pruning, "max_steps": 1, "save_strategy": "steps"}
    trainer = prune_trainer(tmp_path, student, related(student), **build, save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "out/checkpoint-1"
    assert json.loads((checkpoint / WINDOW_FILE).read_text())["length"] == trainer.window.length != 10
    again = prune_trainer(tmp_path, tiny_model("qwen3", seed=3), related(student), **build)
    begins_with = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begins_with.append(again.window.length)

    again.add_callback(Look())
    again.train(resume_from_checkpoint=str(checkpoint))
    assert begins_with == [trainer.window.length]


def test_what_is_not_supported_is_said(tmp_path):
    student = tiny_model("qwen3", seed=3)
    with pytest.raises(ConfigError, match="max_completion_length = 16"):
        prune_trainer(
            tmp_path, student, related(student), objective=ObjectiveSection(top_k=4), pruning=PruningSection()
        )
    with pytest.warns(UserWarning, match="beta has no effect"):
        prune_trainer(
            tmp_path,
            student,
            related(student),
            objective=ObjectiveSection(top_k=4),
            pruning=PruningSection(enable=False, in_flight=InFlightSection()),
            beta=0.5,
        )
    teacher = related(student)
    teacher.generation_config.eos_token_id = [1, 5]
    with pytest.warns(UserWarning, match="ends a response with id 1, the teacher with 1, 5"):
        prune_trainer(
            tmp_path, student, teacher, objective=ObjectiveSection(top_k=4), pruning=PruningSection(enable=False)
        )
