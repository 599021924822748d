"""Prune-OPD inside of TRL's `DistillationTrainer` (extra `trl`, 1.16): for those who have their data and loop there.

    from prune_opd.config import InFlightSection, ObjectiveSection, PruningSection
    from prune_opd.integrations.trl import PruneDistillationTrainer

    trainer = PruneDistillationTrainer(
        model="Qwen/Qwen3-1.7B-Base",
        teacher_model="Qwen/Qwen3-4B",
        args=DistillationConfig(max_completion_length=12288, ...),
        train_dataset=dataset,
        objective=ObjectiveSection(),
        pruning=PruningSection(in_flight=InFlightSection(enable=True)),
    )

TRL keeps its own: prompts, batches, `generate`, optimiser, logging, checkpoints. Ours are the teacher's scores, the
weights, the loss (`update.losses.loss_sums`), the window, and the stop in flight. A logits processor keeps the
student's top-k as it samples, so that no second pass of the student is needed; `max_new_tokens` is the window; a
stopping criterion lets the teacher score each rollout while it is generated.

Not here: vLLM generation and tools (TRL gives no log-probabilities with either), images, and sharded models.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from trl import DistillationConfig, DistillationTrainer

from prune_opd.config import ObjectiveSection, PruningSection
from prune_opd.core.drift import DriftReport, drift_report
from prune_opd.core.window import TrainingWindow
from prune_opd.errors import ConfigError
from prune_opd.models.causal_lm import output_head
from prune_opd.models.loading import check_token_maps, end_ids, shared_vocab_size
from prune_opd.models.packed_attention import packed_states, packing_of
from prune_opd.models.packing import pack
from prune_opd.reporting.metrics import distillation_metrics, distillation_sums
from prune_opd.rollout.base import Progress
from prune_opd.rollout.events import drift_events
from prune_opd.rollout.in_flight import InFlightStop, audited
from prune_opd.teachers.local import LocalTeacher
from prune_opd.timing import Stopwatch
from prune_opd.types import Rollouts, TeacherPrompt, TeacherScores, TopK
from prune_opd.update.losses import loss_sums, student_terms

WINDOW_FILE = "prune_opd_window.json"


@dataclass(frozen=True)
class Pruned:
    """A generation batch of B rollouts, scored and weighed; weight (B, T)."""

    rollouts: Rollouts
    scores: TeacherScores
    drift: DriftReport
    weight: Tensor


class Recorder(Progress):
    """The logits processor and the stopping criterion of `generate`: keeps the top-k, ends rollouts that drifted."""

    def __init__(
        self,
        batch: int,
        prompt_width: int,
        cap: int,
        *,
        top_k: int,
        vocab_size: int,
        eos_ids: Sequence[int],
        in_flight: InFlightStop | None,
        device: torch.device,
    ) -> None:
        super().__init__(batch)
        self.prompt_width, self.cap, self.vocab_size, self.in_flight = prompt_width, cap, vocab_size, in_flight
        self.eos_ids = torch.tensor(list(eos_ids), device=device)
        self.student = TopK.empty(batch, cap, top_k, device)

    def keep_topk(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor over logits (B, V) that no temperature has touched; ids that only one model has go."""
        position = input_ids.shape[1] - self.prompt_width
        scores = scores.index_fill(
            -1, torch.arange(self.vocab_size, scores.shape[-1], device=scores.device), -torch.inf
        )
        logprobs = scores[:, : self.vocab_size].float().log_softmax(-1)
        found = logprobs.topk(self.student.ids.shape[-1], dim=-1)
        self.student.ids[:, position], self.student.logprobs[:, position] = found.indices, found.values
        self.student.entropy[:, position] = torch.special.entr(logprobs.exp()).sum(-1)
        return scores

    def ended(self, input_ids: Tensor, scores: Any) -> Tensor:
        """A stopping criterion: (B,) bool, rollouts that ended with EOS or whose reliability is spent."""
        response_ids = input_ids[:, self.prompt_width :]
        length = response_ids.shape[1]
        for b, eos in enumerate(torch.isin(response_ids[:, -1], self.eos_ids).tolist()):
            if not (self.finished[b] or self.stopped[b]):
                self.lengths[b], self.finished[b] = length, eos
        last = length == self.cap
        everyone = all(f or s for f, s in zip(self.finished, self.stopped, strict=True)) or last
        if self.in_flight is not None and (length % self.in_flight.every == 0 or everyone):
            # The teacher's scores are as wide as the longest response can get, from its first look on.
            padded = torch.nn.functional.pad(response_ids, (0, self.cap - length))
            going_on = [b for b, stopped in enumerate(self.stopped) if not stopped]
            self.show(self.in_flight, padded, self.student, going_on, [b for b in going_on if last or self.finished[b]])
        return torch.tensor([f or s for f, s in zip(self.finished, self.stopped, strict=True)], device=input_ids.device)


class PruneDistillationTrainer(DistillationTrainer):
    """TRL's trainer with drift, weights, window and stop in flight.

    `objective` and `pruning` are the sections of our recipes. Where `pruning.enable` is false every token weighs 1 and
    responses may use `max_completion_length`. Raises ConfigError for what is not supported here.
    """

    def __init__(
        self,
        *args: Any,
        objective: ObjectiveSection | None = None,
        pruning: PruningSection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.pruning = objective or ObjectiveSection(), pruning or PruningSection()
        if self.use_vllm or self.tools or self._is_vlm or self.teacher_model is None:
            raise ConfigError(
                "PruneDistillationTrainer needs a text model that answers through transformers' generate and a teacher "
                "in this process: leave out use_vllm, tools and images, and give teacher_model; "
                "`prune-opd train` has a vLLM sampler"
            )
        if self.beta != DistillationConfig.beta:
            warnings.warn(f"beta has no effect: the loss is objective.loss = {self.objective.loss}", stacklevel=2)
        dynamic = self.pruning.dynamic_response_length
        self.window: TrainingWindow | None = None
        if self.pruning.enable and dynamic.enable:
            if dynamic.max_len > self.max_completion_length:
                raise ConfigError(
                    f"pruning.dynamic_response_length.max_len = {dynamic.max_len} is above max_completion_length = "
                    f"{self.max_completion_length}; lower it or raise the other"
                )
            self.window = TrainingWindow(**dynamic.model_dump(exclude={"enable"}))
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        self._check_tokens(teacher)
        teacher_size = teacher.get_output_embeddings().weight.shape[0]
        self.shared_vocab = shared_vocab_size(self._student(), teacher_size, self.objective.top_k)
        self.teacher = LocalTeacher(teacher, vocab_size=self.shared_vocab)
        self.batch: Pruned | None = None
        self._recorder: Recorder | None = None

    def prune(self, rollouts: Rollouts, scores: TeacherScores | None = None) -> Pruned:
        """Score, find drift and weigh a generation batch; in training the window takes it as its next update."""
        assert rollouts.student is not None
        pruning, mask = self.pruning, rollouts.response_mask
        scores = scores or self.teacher.score(rollouts, top_k=self.objective.top_k)
        events = drift_events(rollouts.response_ids, mask, rollouts.student, scores.topk, pruning)
        drift = drift_report(events, mask, w_drop=pruning.w_drop, w_base=pruning.w_base, eps=pruning.positive_eps)
        if self.window is not None and self.model.training:
            change = self.window.update(self.accelerator.gather(drift.effective_length))
            found = self._metrics["train"]
            found["prune_opd/current_max_response_length"].append(change.previous_length)
            found["prune_opd/next_max_response_length"].append(change.length)
            found["prune_opd/effective_response_length_hit_ratio"].append(change.hit_ratio)
        return Pruned(rollouts, scores, drift, drift.weight if pruning.enable else mask.float())

    def denominator(self, batch: Pruned) -> Tensor:
        """What the loss sum is divided by, over all processes."""
        token_mean = self.objective.weight_normalization == "token_mean"
        counted = batch.rollouts.response_mask if token_mean else batch.weight
        return self.accelerator.gather(counted.sum()).sum()

    # ---- what TRL calls ----

    def _generate_single_turn(
        self, prompt_ids: Sequence[Sequence[int]], images: Any, multimodal_fields: Mapping[str, Any], **kwargs: Any
    ) -> list[list[int]]:
        device, batch = self.accelerator.device, len(prompt_ids)
        cap = self.window.length if self.window is not None else self.max_completion_length
        first = self.accelerator.process_index * batch
        in_flight = None
        if self.pruning.enable and self.pruning.in_flight.enable:
            asked = [TeacherPrompt(ids) for ids in prompt_ids]
            stream = self.teacher.stream(asked, cap, top_k=self.objective.top_k, slots=batch)
            audit = audited(self.args.seed, self._step, range(first, first + batch), self.pruning.in_flight.audit_share)
            in_flight = InFlightStop(stream, self.pruning, audit, Stopwatch(device))
        width = max(map(len, prompt_ids))
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        recorder = self._recorder = Recorder(
            batch,
            width,
            cap,
            top_k=self.objective.top_k,
            vocab_size=self.shared_vocab,
            eos_ids=self.eos_token_ids,
            in_flight=in_flight,
            device=device,
        )
        # TRL hands neither processors nor criteria on to `generate`, so it gets them from here.
        student = self.accelerator.unwrap_model(self.model_wrapped)
        generate = student.generate

        def recorded(*args: Any, **kwargs: Any) -> Any:
            return generate(*args, **kwargs, logits_processor=[recorder.keep_topk], stopping_criteria=[recorder.ended])

        self.generation_config.max_new_tokens = cap
        student.generate = recorded
        try:
            completions = super()._generate_single_turn(prompt_ids, images, multimodal_fields, **kwargs)
        finally:
            del student.generate
        return [ids[:n] for ids, n in zip(completions, recorder.lengths, strict=True)]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        rollouts = recorder.rollouts(
            prompts, output["completion_ids"], recorder.student, pad_id=self._tokenizer.pad_token_id
        )
        scores = recorder.in_flight.scores_of(rollouts.response_ids.shape[1]) if recorder.in_flight else None
        self.batch = self.prune(rollouts, scores)
        mode = "train" if self.model.training else "eval"
        for name, value in distillation_metrics(distillation_sums(rollouts, self.batch.scores)).items():
            if "/pos_" not in name:
                self._metrics[mode][name].append(value)
        effective = self.batch.drift.effective_length.double()
        self._metrics[mode]["prune_opd/effective_response_length_mean"].append(effective.mean().item())
        self._metrics[mode]["completions/stopped_by_drift"].append(rollouts.stopped.double().mean().item())
        # TRL shuffles and splits what is returned; `self.batch` stays as it is, and this index finds its rows again.
        rows = torch.arange(len(prompts), device=rollouts.stopped.device)
        return output | {"num_items_in_batch": self.denominator(self.batch), "rollout": rows}

    def _compute_loss(
        self, unwrapped_student: Any, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = self.batch
        assert batch is not None
        mask = batch.rollouts.response_mask
        chosen = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        chosen[inputs["rollout"]] = True
        mine = replace(batch.rollouts, response_mask=mask & chosen[:, None])
        loss = torch.zeros((), device=mask.device)
        budget = mask.numel() + sum(map(len, mine.prompts))
        for part in pack(mine, budget, **packing_of(unwrapped_student)):
            hidden = packed_states(unwrapped_student, part)[part.row, part.column]
            terms = student_terms(
                output_head(unwrapped_student),
                hidden,
                part,
                batch.rollouts,
                batch.scores,
                self.teacher,
                self.objective,
                vocab_size=self.shared_vocab,
            )
            sums, _ = loss_sums(terms, part, batch.scores, batch.weight, None, self.objective)
            loss = loss + sums.loss
        tokens = mine.response_mask.sum()
        assert batch.rollouts.student is not None
        entropy = (batch.rollouts.student.entropy * mine.response_mask).sum()
        return loss / (num_items_in_batch if num_items_in_batch is not None else tokens), entropy, tokens

    # ---- the window is part of a checkpoint ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.window is not None and self.accelerator.is_main_process:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            (folder / WINDOW_FILE).write_text(json.dumps(self.window.state_dict()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str | os.PathLike[str], model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = Path(resume_from_checkpoint) / WINDOW_FILE
        if self.window is not None and state.is_file():
            self.window.load_state_dict(json.loads(state.read_text()))

    def _check_tokens(self, teacher: PreTrainedModel) -> None:
        """Overlap compares ids, so the teacher's tokenizer must agree; TRL compares the sizes of vocabularies alone."""
        teacher_name = teacher.name_or_path
        try:
            theirs = AutoTokenizer.from_pretrained(teacher_name)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"the tokenizer of the teacher {teacher_name!r} cannot be loaded, so nobody checks that both models "
                f"give every token the same id: {error}",
                stacklevel=3,
            )
            return
        check_token_maps(self._tokenizer, theirs)
        ours, its = sorted(self.eos_token_ids), end_ids(teacher.generation_config, theirs)
        if ours != its:
            warnings.warn(
                f"the student ends a response with id {', '.join(map(str, ours))}, the teacher with "
                f"{', '.join(map(str, its))}: here they are compared like any other ids, and the student may "
                "unlearn to end. `prune-opd train` counts them as one (data.end_tokens)",
                stacklevel=3,
            )

    def _student(self) -> Any:
        return self.accelerator.unwrap_model(self.model)
