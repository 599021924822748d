"""What run directories hold, read back: for the report and the model card. Loads no model and changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prune_opd.config import Config
from prune_opd.config.load import merged
from prune_opd.errors import RunLogError
from prune_opd.reporting.records import Comparison, Environment, Settings, read_lines, read_object

# A token of the Hub, or user:password in an address, wherever someone may have put it; and settings named like one.
SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=://)[^/@\s]+(?=@)")
SECRET_NAME = re.compile(r"(api_key|token|secret|password)$")

PHASES = {"rollout": "tokens/generated", "teacher": "tokens/scored", "update": "tokens/trained"}
"""Where a step's time goes (`time/NAME`), and the tokens that each part handled."""


@dataclass(frozen=True)
class Run:
    """One run directory. steps: metrics of the training steps so far · evaluations: records with `eval/accuracy`,
    step 0 being before training · config, env: without secrets · name: unique within a report · arm: what the run is
    compared as.
    """

    path: Path
    name: str
    arm: str
    seed: int
    config: dict[str, Any]
    env: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def planned(self) -> int:
        """Steps that the recipe asks for."""
        return self.config["training"]["steps"]

    def total(self, key: str) -> float:
        """Sum of a metric over the steps so far; 0 where a step did not log it."""
        return sum(step.get(key, 0) for step in self.steps)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of each path: a run directory, or the output directory of `compare` with one of them per arm and seed.

    Raises RunLogError where there is none, or a log cannot be read.
    """
    runs: list[Run] = []
    for path in paths:
        found = [path] if os.path.isfile(path / "config.json") else sorted(p.parent for p in path.glob("*/config.json"))
        if not found:
            raise RunLogError(
                f"{path} holds no run: expected a run directory, with config.json and metrics.jsonl, or the output "
                "directory of `prune-opd compare`"
            )
        order = _arms_in_order(path)
        of_path = [_read_run(folder, order) for folder in found]
        ranks = list(order.values())
        runs += sorted(of_path, key=lambda r: (ranks.index(r.arm) if r.arm in ranks else len(ranks), r.arm, r.seed))
    names = [run.name for run in runs]
    for name in set(names):
        if names.count(name) > 1:
            raise RunLogError(f"two runs are called {name}; give each once, or rename a directory")
    return runs


def read_config(run_dir: Path) -> Config:
    """The settings that a run was made with, checked; those that this version does not know are left out.

    Raises RunLogError.
    """
    path = run_dir / "config.json"
    settings = read_object(path, Settings)
    while True:
        try:
            config = Config.model_validate(settings)
            break
        except ValidationError as error:
            wrong = [e for e in error.errors() if e["type"] != "extra_forbidden"]
            if wrong:
                name, message = ".".join(map(str, wrong[0]["loc"])), wrong[0]["msg"]
                raise RunLogError(
                    f"{path}: field {name}: {message}; it was edited or damaged: restore it from a checkpoint's "
                    "trainer_state.json, which has it too"
                ) from None
            for mistake in error.errors():
                *parents, last = mistake["loc"]
                section: Any = settings
                for key in parents:
                    section = section[key]
                del section[last]
    if config.pruning.threshold == "auto":
        raise RunLogError(f"{path}: field pruning.threshold: a run has a number there; restore it")
    return config


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and env.json of a run directory, without secrets; {} for no env.json. Raises RunLogError.

    Settings that the run did not know have their defaults, and those that this version does not know are kept.
    """
    env, known = path / "env.json", read_config(path).model_dump()
    return (
        without_secrets(merged(known, read_object(path / "config.json", Settings))),
        without_secrets(read_object(env, Environment)) if env.is_file() else {},
    )


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a run directory's metrics.jsonl so far; none where it has not been written yet."""
    log = path / "metrics.jsonl"
    yield from read_lines(log) if log.is_file() else ()


def trained(record: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is of a step that trained: not of the evaluation before step 1, not skipped."""
    return record["step"] > 0 and "skipped" not in record


def without_secrets(value: Any, name: str = "") -> Any:
    """Settings as they may be shown to others: every text that is, or holds, a secret is masked."""
    if isinstance(value, dict):
        return {key: without_secrets(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner, name) for inner in value]
    if isinstance(value, str):
        return "…" if SECRET_NAME.search(name) else SECRET.sub("…", value)
    return value


def _read_run(path: Path, arm_names: dict[str, str]) -> Run:
    path = path.resolve()
    found = re.fullmatch(r"(.+)-seed\d+", path.name)
    arm = found[1] if found else path.name
    config, env = read_settings(path)
    lines = list(read_metrics(path))
    return Run(
        path=path,
        name=path.name,
        arm=arm_names.get(arm, arm),
        seed=config["training"]["seed"],
        config=config,
        env=env,
        steps=[line for line in lines if trained(line)],
        evaluations=[line for line in lines if "eval/accuracy" in line],
    )


def _arms_in_order(path: Path) -> dict[str, str]:
    """Arms of a comparison as it names them, by the name that their directories have."""
    if not (path / "compare.json").is_file():
        return {}
    arms = [arm["arm"] for arm in read_object(path / "compare.json", Comparison)["arms"]]
    return {arm.replace(":", "-"): arm for arm in arms}
