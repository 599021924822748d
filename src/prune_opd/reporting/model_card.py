"""The model card of a run, from the run's own logs."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from prune_opd.reporting.run_logs import PHASES, read_metrics, read_settings, trained
from prune_opd.reporting.wording import duration, percent

SUMMED = ("tokens/saved", "time/total", *PHASES.values(), *(f"time/{phase}" for phase in PHASES))


def model_card(run_dir: Path) -> ModelCard:
    """The card of a run directory as it stands. Needs its config.json and metrics.jsonl.

    Base model and data set become metadata where they are Hub ids, which a folder or `embedded:` is not. Secrets are
    masked (reporting/run_logs.py). Raises RunLogError.
    """
    config, env = read_settings(run_dir)
    # Line by line, for a card is made at every checkpoint, and the log of a long run is longer than anything else here.
    steps, sums, evaluations = 0, Counter[str](), []
    for record in read_metrics(run_dir):
        if trained(record):
            steps += 1
            sums.update({key: record.get(key, 0) for key in SUMMED})
        if "eval/accuracy" in record:
            evaluations.append(
                {key: value for key, value in record.items() if key == "step" or key.startswith("eval/")}
            )
    model, data, rollout, training = (config[name] for name in ("model", "data", "rollout", "training"))
    student, teacher = model["model_name_or_path"], model["teacher_model_name_or_path"]
    name = f"{student.rstrip('/').split('/')[-1].removeprefix('embedded:')}-prune-opd"
    saved, made = sums["tokens/saved"], sums["tokens/generated"]
    return ModelCard.from_template(
        card_data=_metadata(config, evaluations, name),
        template_str=(files("prune_opd.reporting") / "templates" / "model_card.md.j2").read_text("utf-8"),
        title=name,
        student=_named(student),
        teacher=_named(teacher),
        done=steps,
        planned=training["steps"],
        pruning=config["pruning"],
        data=f"{_named(data['train'])}, {rollout['prompts_per_step']} prompts × {rollout['num_generations']} rollouts "
        "a step",
        trained=f"LoRA adapters of rank {model['lora']['r']}" if model["lora"] else "all weights",
        rollouts=f"at most {rollout['max_completion_length']:,} tokens, temperature {rollout['temperature']:g}, "
        f"top-p {rollout['top_p']:g}",
        objective=f"{config['objective']['loss']}, top-{config['objective']['top_k']}"
        + (f", γ = {config['pruning']['threshold']:g}" if config["pruning"]["enable"] else ""),
        optimiser=f"AdamW at {training['learning_rate']:g}, {training['lr_scheduler_type']}",
        seed=training["seed"],
        scores=[
            {
                "step": e["step"],
                "accuracy": percent(e["eval/accuracy"]),
                "interval": " – ".join(percent(bound) for bound in e["eval/ci95"]),
                "length": f"{e['eval/mean_length']:,.0f} tokens",
                "ended": percent(e["eval/eos_rate"]),
            }
            for e in evaluations
        ],
        evaluation=_evaluation(config["evaluation"]),
        cost=[(phase, duration(sums[f"time/{phase}"]), f"{sums[key]:,}") for phase, key in PHASES.items()]
        + [("all of training", duration(sums["time/total"]), "")],
        saved=f"At most {saved / max(saved + made, 1):.0%} of the tokens were not generated ({saved:,} of "
        f"{saved + made:,}).",
        command=env.get("command"),
        versions=", ".join(f"{key} {value}" for key, value in env.items() if key != "command"),
        settings=json.dumps(config, indent=1, ensure_ascii=False),
    )


def _metadata(config: dict[str, Any], evaluations: list[dict[str, Any]], name: str) -> ModelCardData:
    model, data, settings = config["model"], config["data"]["train"], config["evaluation"]
    last = evaluations[-1] if evaluations and settings["data"] else None
    results = (
        [
            EvalResult(
                task_type="text-generation",
                dataset_type=settings["data"] if _is_hub_id(settings["data"]) else "held-out",
                dataset_name=f"{settings['data']}, {len(last['eval/per_problem'])} problems",
                metric_type="accuracy",
                metric_name=f"Avg@{settings['k']} after step {last['step']} of {config['training']['steps']}",
                metric_value=last["eval/accuracy"],
            )
        ]
        if last
        else None
    )
    return ModelCardData(
        base_model=model["model_name_or_path"] if _is_hub_id(model["model_name_or_path"]) else None,
        datasets=data if _is_hub_id(data) else None,
        library_name="peft" if model["lora"] else "transformers",
        pipeline_tag="text-generation",
        tags=["prune-opd", "on-policy-distillation"],
        model_name=name if results else None,
        eval_results=results,
    )


def _evaluation(settings: dict[str, Any]) -> str:
    if settings["data"] is None:
        return ""
    return (
        f"Avg@{settings['k']} on held-out problems of {_named(settings['data'])}, temperature "
        f"{settings['temperature']:g}, top-p {settings['top_p']:g}, at most {settings['max_tokens']:,} tokens."
    )


def _is_hub_id(name: str) -> bool:
    """Whether a name can be OWNER/NAME on the Hub, and is no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".") and not Path(name).exists()


def _named(name: str) -> str:
    """A name as Markdown: a link where the Hub has it, else code that nothing in it can end."""
    return f"[{name}](https://huggingface.co/{name})" if _is_hub_id(name) else "`" + re.sub(r"[`|\s]+", " ", name) + "`"
