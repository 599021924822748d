"""Prune-OPD inside verl 0.9, without a fork: verl rolls out, scores and trains; we define the loss and the lengths.

    export VERL_USE_EXTERNAL_MODULES=prune_opd.integrations.verl
    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=prune_opd distillation.enabled=true \
        distillation.distillation_loss.loss_mode=prune_opd ...                # all of it: docs/scaling.md

Importing this module registers a distillation loss, a trainer and an agent loop, all under the name `prune_opd`. verl's
entry point `verl.plugins` is not used, because verl swallows what goes wrong there.

    trainer (driver)        the window: sends M with each batch, steers it by the share of rollouts that hit
    agent loop (rollout)    generates at most M tokens; with `in_flight`, in chunks that the teacher reads along
    actor (training)        drift from the logits of the update, weights, the paper's objective

Settings are the sections `pruning` and `objective` of our recipes, under `actor_rollout_ref.rollout.custom.prune_opd`.

What differs from step.py, and why:

  * verl's teacher returns its K' most likely tokens (`distillation_loss.topk`) and nothing else. For candidates of the
    student outside of them log q is unknown; its upper bound is used (`logprobs_at`). With K' = vocabulary it is exact.
  * verl's own actor computes no student top-k: its top-k loss is forward KL over the teacher's. `prune_opd` therefore
    runs on `PruneActorWorker`, which computes the paper's reverse KL. `prune_opd_forward_kl` is verl's loss with our
    weights: another objective than the paper's.
  * S_t comes from the logits of the update, not from sampling: the same weights, but another kernel and dtype. Both
    models are compared at temperature 1, whatever the rollouts were sampled at.
  * verl's server returns no student top-k while it generates, so a stop by overlap scores the prefix again by
    `prompt_logprobs`, for student and teacher alike. `teacher_top_p_accept` needs the teacher only.
"""

from prune_opd.integrations.verl.agent_loop import PruneAgentLoop, PruneAgentLoopManager, PruneAgentLoopWorker
from prune_opd.integrations.verl.loss import PruneActorWorker, logprobs_at, prune_opd_loss, student_topk_outputs
from prune_opd.integrations.verl.settings import MAX_TOKENS, SETTINGS, WHERE, batch_settings, recipe_of
from prune_opd.integrations.verl.trainer import PruneTrainer

__all__ = [
    "MAX_TOKENS",
    "SETTINGS",
    "WHERE",
    "PruneActorWorker",
    "PruneAgentLoop",
    "PruneAgentLoopManager",
    "PruneAgentLoopWorker",
    "PruneTrainer",
    "batch_settings",
    "logprobs_at",
    "prune_opd_loss",
    "recipe_of",
    "student_topk_outputs",
]
