"""Time of one on-policy distillation step without pruning, against TRL's trainers: `make bench`.

Peers are DistillationTrainer and, from trl.experimental, GKDTrainer (lmbda 1: on policy) and GOLDTrainer, each with the
reverse KL over the whole vocabulary (beta 1). The same student, teacher, prompts, rollouts a step, longest response,
learning rate and optimiser, in one process: each of our arms, each peer, and again. Each is the whole step as its own
trainer runs it: sampling, teacher, update; theirs is what lies between their callbacks `on_step_begin` and
`on_step_end`. Ours also pays for its metrics and its rollout log; TRL's logging falls outside its step.

Student weights are put back before each step, so that every repeat is a first step: a student that learns to stop
would make the later ones shorter. Three cases: rollouts end where the student ends them, which few do before the
limit; rollouts that cannot end; and ragged ones, which end at a filler word that the student says once in a hundred
tokens. Ragged lengths are each arm's own draws, so its tokens are reported beside its seconds.

Our default loss is topk_reverse_kl; one of our arms has TRL's loss, one is compiled (`model.compile`). Gradient
checkpointing is off on both sides, though TRL's default is on and slower: --trl-checkpointing times that default.
Micro-batches are those that suit each peer best; --trl-accumulation takes others. --trl-compile has their student
compiled too, as their own setting does it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging

from prune_opd.config import Config, parse_config, with_settings
from prune_opd.models.loading import load_model, resolve_model
from prune_opd.timing import Stopwatch
from prune_opd.training.trainer import Trainer
from prune_opd.types import Prompt

Samples = dict[str, list[dict[str, float]]]

OURS: dict[str, dict[str, Any]] = {
    "prune-opd, compiled": {"model.compile": True},
    "prune-opd": {},
    "prune-opd, reverse_kl": {"objective.loss": "reverse_kl"},
}
PEERS = {  # micro-batches a step that suit each best
    "DistillationTrainer": 8,
    "GKDTrainer": 1,  # it samples anew for every micro-batch
    "GOLDTrainer": 1,  # likewise
}
PHASES = ("rollout", "teacher", "update")
CASES = {  # the token that ends a rollout
    "rollouts end by themselves": None,
    "rollouts run to the limit": "<never>",  # which has no logit
    "ragged rollouts": "well",
}


def summarise(samples: Mapping[str, Sequence[Mapping[str, float]]], peer: str) -> dict[str, dict[str, Any]]:
    """Median, least and greatest of every quantity of every arm, and each arm's share of the peer's time.

    samples: for each arm the repeats in the order they ran, all with the same quantities; the peer is one of the arms.
    `ratio` is the quotient of the median seconds; `ratio_min` and `ratio_max` are over repeats that ran side by side.
    """
    rows: dict[str, dict[str, Any]] = {}
    for arm, repeats in samples.items():
        row: dict[str, Any] = {}
        for name in repeats[0]:
            values = [repeat[name] for repeat in repeats]
            row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        rows[arm] = row
    for arm, repeats in samples.items():
        side_by_side = [
            ours["seconds"] / theirs["seconds"] for ours, theirs in zip(repeats, samples[peer], strict=True)
        ]
        rows[arm] |= {
            "ratio": rows[arm]["seconds"]["median"] / rows[peer]["seconds"]["median"],
            "ratio_min": min(side_by_side),
            "ratio_max": max(side_by_side),
        }
    return rows


class Clock:
    """Wall and processor seconds between `start` and `stop`. Processor time does not count what other programs took."""

    def start(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


class Ours:
    """Our trainer, one step at a time, from the same weights each time."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.trainer = Trainer(config, folder, console=Console(quiet=True))
        folder.mkdir(parents=True)  # as `train` would, for the logs of a step
        self.initial = {name: value.clone() for name, value in self.trainer.parts.student.state_dict().items()}

    def step(self, step: int) -> dict[str, float]:
        self.trainer.parts.student.load_state_dict(self.initial)
        clock = Clock()
        clock.start()
        record = self.trainer._step(step)
        return {
            **clock.stop(),
            **{phase: record[f"time/{phase}"] for phase in PHASES},
            "tokens": record["tokens/generated"],
        }


class Peer(TrainerCallback):
    """A trainer of TRL, one step at a time, from the same weights each time.

    batches: the prompts of each step, each as often as it has rollouts, with columns as the trainers want them.
    """

    def __init__(
        self,
        name: str,
        student: str,
        teacher: str,
        batches: Sequence[Dataset],
        config: Config,
        args: argparse.Namespace,
        folder: Path,
    ) -> None:
        cpu = torch.device("cpu")
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(student))
        tokenizer.padding_side = "left"
        accumulation = args.trl_accumulation or PEERS[name]
        trainer_class, settings_class, own = trl_classes(name, config.rollout.max_completion_length)
        self.trainer = trainer_class(
            model=load_model(student, config.model, dtype="float32", device=cpu),
            teacher_model=load_model(teacher, config.model, dtype="float32", device=cpu),
            args=settings_class(
                output_dir=str(folder),
                use_cpu=True,
                bf16=False,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
                dataloader_pin_memory=False,
                gradient_checkpointing=args.trl_checkpointing,
                torch_compile=args.trl_compile,
                per_device_train_batch_size=len(batches[0]) // accumulation,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                temperature=config.rollout.temperature,
                beta=1.0,
                learning_rate=config.training.learning_rate,
                lr_scheduler_type="constant",
                max_grad_norm=config.training.max_grad_norm,
                **own,
            ),
            train_dataset=batches[0],
            processing_class=tokenizer,
            callbacks=[self],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.batches, self.clock, self.watch = batches, Clock(), Stopwatch(cpu)
        model, teacher_body = self.trainer.model, self.trainer.teacher_model.base_model
        self.initial = {name: value.clone() for name, value in model.state_dict().items()}
        generate, read = model.generate, teacher_body.forward

        def timed_generate(*positional, **inputs):
            with self.watch.phase("rollout"):
                sequences = generate(*positional, **inputs)
            self.sampled.append((inputs["input_ids"], inputs["attention_mask"], sequences))
            return sequences

        def timed_read(*positional, **inputs):
            with self.watch.phase("teacher"):
                return read(*positional, **inputs)

        model.generate, teacher_body.forward = timed_generate, timed_read

    def step(self, step: int) -> dict[str, float]:
        """The teacher's head counts as update: it is projected by the loss."""
        self.trainer.model.load_state_dict(self.initial)
        self.trainer.train_dataset = self.batches[step]
        self.watch.seconds.clear()
        self.sampled: list[tuple[torch.Tensor, torch.Tensor, Any]] = []
        self.trainer.train()
        inside = self.watch.seconds
        update = self.took["seconds"] - inside["rollout"] - inside["teacher"]
        phases = {"rollout": inside["rollout"], "teacher": inside["teacher"], "update": update}
        return {**self.took, **phases, "tokens": self._tokens(step)}

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.took = self.clock.stop()

    def _tokens(self, step: int) -> int:
        """How many were sampled, each rollout up to its end. RuntimeError if from other prompts than ours were."""
        prompts, tokens, end = [], 0, self.trainer.processing_class.eos_token_id
        for input_ids, mask, sequences in self.sampled:
            prompts += [row[seen.bool()].tolist() for row, seen in zip(input_ids, mask, strict=True)]
            responses = getattr(sequences, "sequences", sequences)[:, input_ids.shape[1] :]
            before_end = (responses == end).cumsum(-1) - (responses == end).long() == 0
            tokens += int(before_end.sum())
        if sorted(prompts) != sorted(self.batches[step]["prompt_ids"]):
            raise RuntimeError(f"step {step}: TRL sampled from other prompts than ours did")
        return tokens


def trl_classes(name: str, longest: int) -> tuple[Any, Any, dict[str, Any]]:
    """A trainer of TRL, its settings, and those of them that only this trainer has, for on-policy distillation."""
    on_policy = {"lmbda": 1.0, "packing": False, "max_length": None}
    if name == "DistillationTrainer":
        from trl import DistillationConfig, DistillationTrainer

        own = {"max_completion_length": longest, "shuffle_dataset": False}
        return DistillationTrainer, DistillationConfig, own
    if name == "GKDTrainer":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        return GKDTrainer, GKDConfig, {**on_policy, "max_new_tokens": longest}
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    return GOLDTrainer, GOLDConfig, {**on_policy, "max_completion_length": longest, "top_p": 1.0}


def run_case(student: str, teacher: str, args: argparse.Namespace, folder: Path) -> Samples:
    """Alternate all arms on one pair; the samples of each arm in order, without the warm-up."""
    steps = args.warmup + args.repeats
    settings = {
        "model": {"model_name_or_path": student, "teacher_model_name_or_path": teacher},
        "data": {"train": "task:chain_sum", "max_prompt_length": 64},
        "rollout": {
            "prompts_per_step": args.prompts,
            "num_generations": args.generations,
            "max_completion_length": args.max_completion_length,
        },
        "objective": {"top_k": 8},
        "pruning": {"enable": False},
        "training": {"steps": steps, "learning_rate": 5e-5, "device": "cpu", "threads": args.threads},
    }
    config = parse_config(settings, where="benchmarks/step_time.py")
    arms: dict[str, Ours | Peer] = {
        name: Ours(with_settings(config, **changes), folder / name) for name, changes in OURS.items()
    }
    source = next(iter(arms.values())).trainer.parts.prompts
    batches = [
        [prompt for prompt in source.batch(step, args.prompts) for _ in range(args.generations)]
        for step in range(steps)
    ]
    for name in PEERS if args.peer is None else [args.peer]:
        arms[name] = Peer(name, student, teacher, [dataset_for(name, batch) for batch in batches], config, args, folder)
    samples: Samples = {name: [] for name in arms}
    gc.collect()
    gc.freeze()  # or whoever happens to start a collection would pay for the objects of all arms
    for step in range(steps):
        for name, arm in arms.items():
            sample = arm.step(step)
            if step >= args.warmup:
                samples[name].append(sample)
    if torch.get_num_threads() != args.threads:
        raise RuntimeError(f"asked for {args.threads} threads, but the steps ran with {torch.get_num_threads()}")
    return samples


def dataset_for(peer: str, prompts: Sequence[Prompt]) -> Dataset:
    """Prompts as TRL's trainers take them. GKD's and GOLD's want an answer behind each, never read on policy."""
    columns: dict[str, list[Any]] = {"prompt": [prompt.text for prompt in prompts]}
    columns["prompt_ids"] = [list(prompt.token_ids) for prompt in prompts]
    if peer != "DistillationTrainer":
        columns["input_ids"] = [[*ids, ids[-1]] for ids in columns["prompt_ids"]]
        columns["completion_mask"] = [[0] * len(ids) + [1] for ids in columns["prompt_ids"]]
    return Dataset.from_dict(columns)


def median_seconds(samples: Sequence[Mapping[str, float]]) -> float:
    return statistics.median(sample["seconds"] for sample in samples)


def ending_at(token: str, name: str, folder: Path) -> str:
    """A copy of a model whose EOS token is another: one that it says now and then, or a new one that it cannot say."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
    known = token in tokenizer.get_vocab()
    tokenizer.add_special_tokens({"eos_token": token})
    if known != (tokenizer.eos_token_id < model.get_output_embeddings().weight.shape[0]):
        raise RuntimeError(f"{name}: {token} is a token without a logit, or a new one with a logit")
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": {name: version(name) for name in ("prune-opd", "trl", "torch", "transformers", "accelerate")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": "cpu",
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def table_of(case: str, summary: Mapping[str, Mapping[str, Any]], repeats: int) -> Table:
    """One case as a table: medians, the spread of the seconds, and the share of the fastest peer's time."""
    table = Table(title=f"{case}: seconds of a step, median of {repeats}", title_justify="left")
    for column in ("", "step", "min-max", "cpu", *PHASES, "tokens", "ms/token", "of fastest", "min-max"):
        table.add_column(column, justify="left" if column == "" else "right")
    for arm, row in summary.items():
        seconds, tokens = row["seconds"], row["tokens"]["median"]
        table.add_row(
            arm,
            f"{seconds['median']:.2f}",
            f"{seconds['min']:.2f}-{seconds['max']:.2f}",
            f"{row['cpu_seconds']['median']:.2f}",
            *(f"{row[phase]['median']:.2f}" for phase in PHASES),
            f"{tokens:.0f}",
            f"{1000 * seconds['median'] / tokens:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="embedded:low-student", help="model of the embedded task's tokenizer")
    parser.add_argument("--teacher", default="embedded:teacher", help="model with the same tokenizer")
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step")
    parser.add_argument("--generations", type=int, default=4, help="rollouts of each prompt")
    parser.add_argument("--max-completion-length", type=int, default=340, help="most tokens of a response")
    parser.add_argument("--trl-accumulation", type=int, help="micro-batches that TRL splits a step into")
    parser.add_argument("--trl-checkpointing", action="store_true", help="gradient checkpointing, TRL's default")
    parser.add_argument("--trl-compile", action="store_true", help="torch_compile, off by default in TRL as in ours")
    parser.add_argument("--peer", choices=PEERS, help="a single peer, instead of all")
    parser.add_argument("--only", help="part of the name of a case: leave the others out")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each arm")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of each arm before them")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/step_time.json"))
    args = parser.parse_args()
    if args.prompts * args.generations % (args.trl_accumulation or math.lcm(*PEERS.values())):
        parser.error("the micro-batches of TRL's trainers must divide prompts × generations")
    if not any((args.only or "") in case for case in CASES):
        parser.error(f"--only {args.only}: no such case; there are {', '.join(CASES)}")

    logging.disable_progress_bar()
    console = Console(width=150)
    cases: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for case, end in CASES.items():
            if args.only and args.only not in case:
                continue
            work = folder / case.replace(" ", "-")
            student, teacher = args.student, args.teacher
            if end is not None:
                student, teacher = ending_at(end, student, work / "student"), ending_at(end, teacher, work / "teacher")
            samples = run_case(student, teacher, args, work)
            fastest = min(set(samples) & set(PEERS), key=lambda peer: median_seconds(samples[peer]))
            cases[case] = {"summary": summarise(samples, fastest), "samples": samples}
            console.print(table_of(case, cases[case]["summary"], args.repeats))
    about = environment(args)
    versions = {"python": about["python"], **about["versions"]}
    console.print(", ".join(f"{name} {number}" for name, number in versions.items()), highlight=False)
    console.print(
        f"{about['torch_threads']} threads, {about['cpus_allowed']} CPUs allowed: {about['command']}",
        highlight=False,
        soft_wrap=True,
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {args.output}")


if __name__ == "__main__":
    main()
