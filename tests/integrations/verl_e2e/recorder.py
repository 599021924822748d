"""What verl's actor was given in each step, and what the plug-in made of it, written down. For tests alone.

verl's processes import this module after the plug-in. One file a rank and update, `actor-{rank}-{n}.pt`: a list with a
dict for each micro-batch, whose tensors are rows (one for each rollout) of unpadded positions.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from verl.trainer.distillation import losses
from verl.workers.engine_workers import TrainingWorker

from tests.integrations.verl_e2e.cpu import RECORDS

GIVEN = ("input_ids", "response_mask", "teacher_ids", "teacher_logprobs")
MADE = ("prune_opd_terms", "prune_opd_events", "distillation_losses", "overlap_count")
updates, micro_batches = itertools.count(), []
find_loss, train_batch = losses.get_distillation_loss_fn, TrainingWorker.train_batch


def _rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [row.detach().clone() for row in tensor.unbind()]


def _recording(name: str) -> Any:
    loss = find_loss(name)

    def recording(config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any) -> Any:
        weighted, metrics = loss(config, distillation_config, model_output, data)
        lengths = [int(mask.sum()) for mask in data["response_mask"].unbind()]
        micro_batches.append(
            {name: _rows(data[name]) for name in GIVEN}
            | {"source": list(data["data_source"])}
            | {name: _rows(value) for name, value in model_output.items() if name in MADE}
            | {"weighted": [row[:length].clone() for row, length in zip(weighted.detach(), lengths, strict=True)]}
        )
        return weighted, metrics

    return recording


def _train_batch(self: Any, data: Any) -> Any:
    done = train_batch(self, data)
    path = Path(os.environ[RECORDS]) / f"actor-{os.environ['RANK']}-{next(updates)}.pt"
    torch.save(list(micro_batches), path)
    micro_batches.clear()
    return done


losses.get_distillation_loss_fn = _recording
TrainingWorker.train_batch = _train_batch
