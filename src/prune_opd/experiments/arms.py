"""The arms of `compare`, each one a change of the recipe's settings.

Controls follow a finished Prune-OPD run of the same seed, their reference. What they take from it is written into their
own settings (`control.lengths`, `control.kept_tokens`), so that an arm's config.json is complete and a resume needs
no other run.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_opd.config import Config, with_settings
from prune_opd.errors import ConfigError, RunLogError
from prune_opd.reporting.records import THIS_WINDOW, read_lines
from prune_opd.reporting.run_logs import read_config, trained

PRUNE = {"pruning.enable": True, "pruning.reweight": True, "pruning.in_flight.enable": False}
WINDOW = {"pruning.dynamic_response_length.enable": True}
IN_FLIGHT_ONLY = {"pruning.in_flight.enable": True, "pruning.dynamic_response_length.enable": False}
OFF = {"pruning.enable": False}
DISTINCT = {"data.end_tokens": "distinct"}

SETTINGS: dict[str, dict[str, Any]] = {
    "opd": OFF,  # whole budget, every token weighs 1
    "prune": PRUNE,  # weights and window, nothing stopped in flight: the paper
    "prune-inflight": PRUNE | {"pruning.in_flight.enable": True},
    "inflight-only": PRUNE | IN_FLIGHT_ONLY,
    "prune-budget": PRUNE,  # what is saved pays for further prompts, up to the recipe's rollout.token_budget
    "inflight-budget": PRUNE | IN_FLIGHT_ONLY,
    "prune-topp": PRUNE | {"pruning.metric": "teacher_top_p_accept"},  # the nucleus control
    "weights-only": PRUNE | {"pruning.dynamic_response_length.enable": False},
    "window-only": PRUNE | WINDOW | {"pruning.reweight": False},
    "opd-distinct": OFF | DISTINCT,  # ids that end a response are compared like any other: the paper
    "prune-distinct": PRUNE | DISTINCT,
    "ramp": OFF,  # lengths on a straight line
    "replay": OFF,  # lengths of the reference
    "random": OFF | {"objective.weight_normalization": "weight_mean"},  # the mean is over the tokens that are kept
}
WITH_BUDGET = ("prune-budget", "inflight-budget")  # the others have the same prompts at every step
FOLLOWED = "prune"  # the arm that controls follow, unless a reference is given
NEED_REFERENCE = ("replay", "random")
FOLLOW_REFERENCE = ("ramp", *NEED_REFERENCE)


@dataclass(frozen=True)
class Reference:
    """What controls take from a finished run, one entry a step: longest response allowed, tokens with R > ε."""

    run_dir: Path
    lengths: list[int]
    kept_tokens: list[int]


def arm_config(config: Config, arm: str, seed: int, reference: Reference | None = None) -> Config:
    """The recipe as one arm runs it with one seed.

    ramp goes from the first to the last length of the reference; without one, from init_len to max_len of the recipe.
    replay takes all of its lengths. random trains on as many tokens of each step as the reference kept, at random
    positions of responses that use the whole budget. Raises ConfigError for an unknown arm, a cut out of range, and an
    arm without the reference that it needs.
    """
    settings: dict[str, Any] = {"training.seed": seed, **SETTINGS.get(arm, OFF)}
    if arm not in WITH_BUDGET:
        settings["rollout.token_budget"] = None
    elif config.rollout.token_budget is None:
        raise ConfigError(f"arm {arm!r} needs rollout.token_budget: set it to the response tokens of a step")
    if found := re.fullmatch(r"fixed:(\d+)", arm):
        length, budget = int(found[1]), config.rollout.max_completion_length
        if not 1 <= length <= budget:
            raise ConfigError(f"arm {arm!r}: the cut must lie in 1..{budget} (rollout.max_completion_length)")
        settings["rollout.max_completion_length"] = length
    elif arm not in SETTINGS:
        raise ConfigError(f"unknown arm {arm!r}; there are {', '.join(SETTINGS)} and fixed:N (N tokens, as fixed:256)")
    if arm in NEED_REFERENCE and reference is None:
        raise ConfigError(f"arm {arm!r} follows a finished Prune-OPD run of the same seed, and there is none")
    window, steps = config.pruning.dynamic_response_length, config.training.steps
    match arm:
        case "ramp":
            ends = (reference.lengths[0], reference.lengths[-1]) if reference else (window.init_len, window.max_len)
            settings["control.lengths"] = linear_ramp(*ends, steps)
        case "replay" if reference:
            settings["control.lengths"] = reference.lengths
        case "random" if reference:
            settings["control.kept_tokens"] = reference.kept_tokens
        case "prune" | "prune-inflight" | "prune-budget" | "prune-topp" if not window.enable:
            warnings.warn(
                f"arm {arm}: pruning.dynamic_response_length.enable is false; the next batch is never cut", stacklevel=2
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pruning settings have no effect in the other arms, on purpose
        return with_settings(config, **settings)


def check_arms(config: Config, arms: Sequence[str], references: bool) -> None:
    """Everything about the arms that can be wrong before the first one runs; `references`: --reference was given."""
    if len(set(arms)) < len(arms):
        raise ConfigError(f"an arm is named twice in {','.join(arms)}; name each once")
    for arm in arms:
        if arm in NEED_REFERENCE:
            if not references and FOLLOWED not in arms:
                raise ConfigError(
                    f"arm {arm!r} follows a finished Prune-OPD run of the same seed: name prune among the arms, or "
                    "give such a run as --reference RUN_DIR"
                )
            if not references and not config.window_is_dynamic:
                raise ConfigError(
                    f"arm {arm!r} follows the window of arm prune, which is off: "
                    "set pruning.enable and pruning.dynamic_response_length.enable to true"
                )
        else:
            arm_config(config, arm, seed=0)


def run_order(arms: Sequence[str]) -> list[str]:
    """The arms as they can be run: those that follow arm prune after it, else as they were named."""
    return sorted(arms, key=lambda arm: arm in FOLLOW_REFERENCE)


def read_reference(run_dir: Path, config: Config, seed: int) -> Reference:
    """The lengths and kept tokens of a finished run with a training window, for `config` with `seed`.

    Raises ConfigError when it is no such run: another seed, other prompts a step, too few steps, no window.
    """
    try:
        theirs = read_config(run_dir).model_dump()
        records = list(read_lines(run_dir / "metrics.jsonl"))
        metrics = {row["step"]: row for row in records if trained(row)}
        drift = {row["step"]: row for row in read_lines(run_dir / "drift.jsonl")}
    except RunLogError as error:
        raise ConfigError(f"{run_dir} is no run to follow ({error}); give a run directory as --reference") from None
    steps, ours = config.training.steps, with_settings(config, **{"training.seed": seed}).model_dump()
    same = [("rollout", name) for name in ("prompts_per_step", "num_generations", "token_budget")]
    for section, name in [("training", "seed"), *same]:
        if theirs[section][name] != ours[section][name]:
            raise ConfigError(
                f"{run_dir} cannot be followed: its {section}.{name} is {theirs[section][name]}, here it is "
                f"{ours[section][name]}; give a run of the same {name}"
            )
    if not (theirs["pruning"]["enable"] and theirs["pruning"]["dynamic_response_length"]["enable"]):
        raise ConfigError(f"{run_dir} has no training window to follow; give a run of arm prune")
    done = records[-1]["step"] if records else 0
    if done < steps:
        raise ConfigError(
            f"{run_dir} has {done} of the {steps} steps to follow; finish it with `prune-opd train RECIPE "
            "--resume auto`, or set training.steps to what it has"
        )
    lengths = {step: row[THIS_WINDOW] for step, row in metrics.items()}
    kept = {step: max(1, sum(row["effective_length"])) for step, row in drift.items()}  # a step must train on something
    return Reference(run_dir, _each_step(lengths, steps), _each_step(kept, steps))


def _each_step(found: dict[int, int], steps: int) -> list[int]:
    """One number a step, from step 1 on. A step that was skipped for NaN has none, and takes that of its neighbour."""
    numbers, last = [], found[min(found)]
    for step in range(1, steps + 1):
        last = found.get(step, last)
        numbers.append(last)
    return numbers


def linear_ramp(start: int, end: int, steps: int) -> list[int]:
    """`steps` lengths from `start` to `end`, both included, in equal increments rounded to whole tokens."""
    return [round(start + (end - start) * i / max(steps - 1, 1)) for i in range(steps)]
