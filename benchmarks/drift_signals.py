"""How well signals of drift see a derailment whose place is known: `python benchmarks/drift_signals.py`.

On the embedded task the first wrong word of a response is known exactly, and so is the first one past the answer
(`data/tasks.py`, sound_words). For each pair the student answers held-out problems, and every signal of
`experiments/signals.py` is read along. An alarm is a token on which a signal reaches its threshold.

    AUC            chance that the loudest of the 16 tokens from a derailment on is louder than the loudest of 16 sound
                   ones; 0.5 is none. Sound stretches end at the derailment, and do not overlap
    seen, false    at the threshold that sees 90% of the derailments of the even-numbered problems within 16 tokens:
                   derailments seen on the odd-numbered ones, and alarms per 100 sound tokens there
    γ              that threshold as the metric has it: an overlap of so much or less is an alarm

The pairs' facts stand above each table: overlap before and after, and what the teacher rescues (`prune-opd probe`
measures that with intervals, and against length).
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from prune_opd.config import load_config, with_settings
from prune_opd.core.overlap import topk_overlap
from prune_opd.data.tasks import Problem, sound_words
from prune_opd.evaluation.evaluate import response_texts
from prune_opd.evaluation.graders import are_right
from prune_opd.experiments.probe import Cuts, Pair, build_pair, right_continuations, scored_rollouts
from prune_opd.experiments.rescue import auc
from prune_opd.experiments.signals import drift_signals
from prune_opd.training.build import build_problems, build_tokenizers
from prune_opd.training.calibration import teacher_written
from prune_opd.types import Prompt, Rollouts

RECIPES = Path(__file__).parent.parent / "recipes"
PAIRS = {"low": "quickstart", "high": "high", "derail": "derail", "derail-2": "derail-2"}
WITHIN = 16  # tokens
SEEN = 0.9  # of derailments, at the threshold that is chosen
BEHIND = (0, 4, 8, 16, 32)  # tokens behind a derailment, from where the teacher goes on


def sound_lengths(pair: Pair, prompts: list[Prompt], rollouts: Rollouts) -> list[int]:
    """Of each response, how many tokens are sound; all of them where it is sound to its end."""
    found = []
    for prompt, ids, n in zip(prompts, rollouts.response_ids.tolist(), rollouts.lengths.tolist(), strict=True):
        problem = Problem(tuple(int(word) for word in prompt.text.split() if word.isdigit()))
        found.append(sound_words(problem, pair.tokenizer.convert_ids_to_tokens(ids[:n])))
    return found


def stretches(lengths: list[int], sound: list[int]) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """(rollout, start, end) of the tokens in which each derailment must be seen, and of stretches of sound ones.

    A stretch of sound tokens ends where the rollout derails, or at its end, and others lie before it, side by side.
    """
    derailed, fine = [], []
    for b, (n, s) in enumerate(zip(lengths, sound, strict=True)):
        if s < n:
            derailed.append((b, s, min(s + WITHIN, n)))
        fine += [(b, end - WITHIN, end) for end in range(s, WITHIN - 1, -WITHIN)]
    return derailed, fine


def detection(values: np.ndarray, lengths: list[int], sound: list[int]) -> dict[str, float | None]:
    """AUC, and what the threshold of half of the problems does on the others. values (B, T): higher for more drift."""
    derailed, fine = stretches(lengths, sound)
    if not derailed or not fine:
        return {"auc": None, "threshold": None, "seen": None, "false_alarms": None}
    loud, quiet = (np.array([values[b, start:end].max() for b, start, end in group]) for group in (derailed, fine))
    of_derailed = np.array([b for b, *_ in derailed])
    scores = np.concatenate([loud, quiet])
    is_derailed = np.arange(len(scores)) < len(loud)
    (area,) = auc(scores, ~is_derailed + 0, is_derailed + 0, np.ones((1, len(scores))))
    threshold = float(np.quantile(loud[of_derailed % 2 == 0], 1 - SEEN, method="lower"))
    sound_values = np.concatenate([values[b, :s] for b, s in enumerate(sound) if b % 2])
    return {
        "auc": float(area),
        "threshold": threshold,
        "seen": float((loud[of_derailed % 2 == 1] >= threshold).mean()),
        "false_alarms": float(100 * (sound_values >= threshold).mean()),
    }


def rescues(pair: Pair, prompts: list[Prompt], rollouts: Rollouts, sound: list[int], n: int) -> dict[str, Any]:
    """Share of right continuations by the teacher: halfway to the derailment, and so many tokens behind it."""
    lengths, found = rollouts.lengths.tolist(), {}
    places = {"sound": [(b, s // 2) for b, s in enumerate(sound) if s > 1]}
    places |= {f"{d} behind": [(b, s + d) for b, s in enumerate(sound) if s + d < lengths[b]] for d in BEHIND}
    for name, cuts in places.items():
        if cuts:
            of, at = (np.array(column) for column in zip(*cuts, strict=True))
            right, _ = right_continuations(
                pair,
                pair.teacher_sampler,
                prompts,
                rollouts,
                Cuts(of, at, of, {}),
                n,
                seed=1,
                on_progress=lambda _: None,
            )
            found[name] = {"cuts": len(cuts), "rescued": float(right.mean() / n)}
    return found


def facts(
    pair: Pair, prompts: list[Prompt], rollouts: Rollouts, overlap: torch.Tensor, sound: list[int]
) -> dict[str, Any]:
    """Of a pair: how often and where it derails, and its overlap before, after and on the teacher's own text."""
    lengths = rollouts.lengths.tolist()
    before = torch.cat([overlap[b, :s] for b, s in enumerate(sound)])
    behind = [overlap[b, s + 1 : n] for b, (s, n) in enumerate(zip(sound, lengths, strict=True)) if s + 1 < n]
    places = [s for s, n in zip(sound, lengths, strict=True) if s < n]
    student = pair.sampler.model  # type: ignore[attr-defined]  # a recipe of the embedded pairs samples in this process
    own = teacher_written(pair.config, prompts, student, pair.teacher, pair.tokenizer)
    return {
        "right": float(np.mean(list(are_right(prompts, list(response_texts(rollouts, pair.tokenizer)))))),
        "derailed": len(places) / len(lengths),
        "place_quartiles": np.quantile(places, [0.25, 0.5, 0.75]).tolist() if places else None,
        "overlap_sound": before.mean().item(),
        "overlap_behind": torch.cat(behind).mean().item() if behind else None,
        "overlap_teachers_text": own.compatibility("overlap_ratio")[own.rollouts.response_mask].mean().item(),
    }


def measure(recipe: Path, problems: int, continuations: int, console: Console) -> dict[str, Any]:
    """Facts and signals of one pair."""
    config = with_settings(load_config(recipe), **{"evaluation.num_problems": problems})
    k = config.objective.top_k
    tokenizers = build_tokenizers(config)
    prompts = list(build_problems(config, tokenizers[0]))
    pair = build_pair(with_settings(config, **{"objective.top_k": 16}), prompts, tokenizers, console)
    rollouts, scores = scored_rollouts(pair, prompts, seed=0)
    sound, lengths = sound_lengths(pair, prompts, rollouts), rollouts.lengths.tolist()
    assert rollouts.student is not None
    overlap = topk_overlap(rollouts.student.ids[..., :k], scores.topk.ids[..., :k])
    signals = {name: detection(v.numpy(), lengths, sound) for name, v in drift_signals(rollouts, scores).items()}
    pair = build_pair(config, prompts, tokenizers, console)
    return {
        "facts": facts(pair, prompts, rollouts, overlap, sound),
        "rescued": rescues(pair, prompts, rollouts, sound, continuations),
        "signals": signals,
    }


def say(name: str, found: dict[str, Any], console: Console) -> None:
    """One pair's facts and table."""
    texts = {key: "-" if v is None else v if isinstance(v, list) else f"{v:.3f}" for key, v in found["facts"].items()}
    console.print(f"[bold]{name}[/]: " + ", ".join(f"{key.replace('_', ' ')} {text}" for key, text in texts.items()))
    console.print(
        "teacher rescues: " + ", ".join(f"{key} {row['rescued']:.2f}" for key, row in found["rescued"].items())
    )
    table = Table()
    for heading in ("signal", "AUC", "seen", "false per 100", "threshold", "γ"):
        table.add_column(heading, justify="left" if heading == "signal" else "right")
    for signal, row in found["signals"].items():
        numbers = [
            "-" if row[key] is None else f"{row[key]:.2f}" for key in ("auc", "seen", "false_alarms", "threshold")
        ]
        gamma = f"{1 - row['threshold']:.3f}" if signal.startswith("1 - ") and row["threshold"] is not None else "-"
        table.add_row(signal, *numbers, gamma)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=[*PAIRS])
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--continuations", type=int, default=2, help="of each prefix, by the teacher")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/drift_signals.json"))
    args = parser.parse_args()
    logging.disable_progress_bar()
    console, found = Console(width=130), {}
    for name in args.pairs:
        found[name] = measure(RECIPES / f"{PAIRS[name]}.toml", args.problems, args.continuations, console)
        say(name, found[name], console)
    about = {
        "problems": args.problems,
        "versions": {name: version(name) for name in ("prune-opd", "torch", "transformers")},
        "platform": platform.platform(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**about, "pairs": found}, indent=1) + "\n", encoding="utf-8")
    console.print(f"{about['versions']}; written to {args.output}", highlight=False)


if __name__ == "__main__":
    main()
