"""Does it run on this GPU, and what does a step take there? `make gpu-check`, at most 8 minutes on one card of 80 GB.

A student and a teacher of the shape of Qwen3-1.7B with random weights, float32 masters and bfloat16 autocast, 16
rollouts of 4,096 tokens that nobody ends. Each arm is a process of its own, so that its memory is its own: our trainer
with stops in flight off and on, TRL's DistillationTrainer, and ours once more under a dense mask. Rollouts come from
vLLM in the process where it is installed, else from our own engine, and the record says which. In flight each rollout
is stopped halfway: two random models agree on nothing, so every token is a drift event, and half as many as there are
tokens end it. The first step of ours is a short one, to warm up; of TRL's, whose length is fixed, a whole one.

By part: seconds, the most that torch had allocated, and what was taken of the device when it ended (vLLM's own memory
is in that, not in torch's). Beside it stands what `--dry-run` says of the same run. Arms for which no time was left, or
that failed, are in the record with the reason; a failed one is an exit code of 1.

Without a CUDA device it says so and ends with code 0: nothing was measured, nothing is written. --tiny runs the same
code with a small shape on the CPU, which is how it is tested.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from prune_opd.config import Config, parse_config, with_settings
from prune_opd.models.loading import load_model, resolve_model
from prune_opd.models.packed_attention import packed_attention_of
from prune_opd.preflight.memory import estimate_memory
from prune_opd.timing import Stopwatch
from prune_opd.training.trainer import Trainer

QWEN3_1_7B = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
TINY = QWEN3_1_7B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ARMS: dict[str, dict[str, Any] | None] = {  # settings of ours; None is TRL's trainer
    "in flight off": {},
    "in flight on": {"pruning.in_flight.enable": True, "pruning.in_flight.audit_share": 0.0},
    "TRL": None,
    "dense mask": {"model.attn_implementation": "sdpa"},
}
PHASES = ("rollout", "teacher", "update", "total")


def config_of(folder: Path, changes: dict[str, Any], *, prompts: int, length: int, device: str, vllm: bool) -> Config:
    """A recipe of two steps on the models in `folder`: a short one, and one whose rollouts have `length` tokens."""
    half = length // 2
    settings: dict[str, dict[str, Any]] = {
        "model": {
            "model_name_or_path": str(folder / "student"),
            "teacher_model_name_or_path": str(folder / "teacher"),
            "teacher_dtype": "bfloat16" if device != "cpu" else "float32",
        },
        "data": {"train": "task:chain_sum", "max_prompt_length": 64},
        "rollout": {"prompts_per_step": prompts, "num_generations": 4, "max_completion_length": length},
        "objective": {"top_k": 16},
        "pruning": {"threshold": 1.0, "w_drop": 1 / half, "dynamic_response_length": {"enable": False}},
        "control": {"lengths": [max(1, length // 32), length]},
        "training": {"steps": 2, "device": device, "bf16": device != "cpu", "gradient_checkpointing": True},
        "tracking": {"rollouts_per_step": 0},
    }
    settings["pruning"]["in_flight"] = {"chunk": max(1, length // 32)}
    settings["rollout"] |= {"slots": 4 * prompts, "use_vllm": vllm, "dtype": "bfloat16" if device != "cpu" else None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_settings(parse_config(settings, where="benchmarks/gpu_check.py"), **changes)


def make_models(folder: Path, shape: dict[str, Any], device: str) -> None:
    """Random weights with the embedded task's tokenizer, in bfloat16; masters are made of them when they are loaded."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded:teacher"))
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=torch.bfloat16)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


# ---- memory ----


def peak_bytes() -> int:
    """The most that torch had allocated since `forget_peak`; on a CPU, that the process ever had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def taken_bytes() -> int | None:
    """What is taken of the device, by whomever."""
    if not torch.cuda.is_available():
        return None
    free, whole = torch.cuda.mem_get_info()
    return whole - free


@contextmanager
def watched(parts: dict[str, dict[str, Any]]) -> Iterator[None]:
    """While inside, each phase of the stopwatch leaves its memory in `parts`."""
    phase = Stopwatch.phase

    @contextmanager
    def with_memory(watch: Stopwatch, name: str) -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with phase(watch, name):
            yield
        found = parts.setdefault(name, {"peak_bytes": 0})
        found |= {"peak_bytes": max(found["peak_bytes"], peak_bytes()), "taken_bytes": taken_bytes()}

    Stopwatch.phase = with_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stopwatch.phase = phase  # type: ignore[method-assign]


# ---- arms ----


def ours(config: Config, folder: Path) -> dict[str, Any]:
    """Seconds and memory by part of the second step of our trainer."""
    parts: dict[str, dict[str, Any]] = {}
    trainer = Trainer(config, folder, console=Console(quiet=True))
    folder.mkdir(parents=True)  # as `train` would, for the logs of a step
    try:
        trainer._step(0)
        with watched(parts):
            record = trainer._step(1)
    finally:
        trainer.close()
    for name in PHASES:
        parts.setdefault(name, {})["seconds"] = record[f"time/{name}"]
    parts["total"] |= {"peak_bytes": max(part.get("peak_bytes", 0) for part in parts.values())}
    return {
        "sampler": "vLLM" if config.rollout.use_vllm else "slot engine",
        "attention": packed_attention_of(trainer.parts.student),
        "tokens": record["tokens/generated"],
        "scored": record["tokens/scored"],
        "stopped": record.get("completions/stopped_by_drift", 0.0),
        "loss": record["loss"],
        "parts": parts,
        "planned_bytes": estimate_memory(config).peak,
    }


def theirs(config: Config, folder: Path) -> dict[str, Any]:
    """The second step of TRL's DistillationTrainer, as it is set up for one GPU: seconds and the peak."""
    from trl import DistillationConfig, DistillationTrainer

    model, rollout, device = config.model, config.rollout, torch.device(config.training.device)
    batch = rollout.prompts_per_step * rollout.num_generations
    own = {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "vllm_gpu_memory_utilization": 0.3}
    own["vllm_max_model_length"] = config.longest_row

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.began = time.perf_counter()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds, self.peak, self.taken = time.perf_counter() - self.began, peak_bytes(), taken_bytes()

    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, padding_side="left")
    questions = [f"{a} + {b} =" for a in range(2, 2 + 2 * rollout.prompts_per_step) for b in (3,)]
    trainer = DistillationTrainer(
        model=load_model(model.model_name_or_path, model, dtype="float32", device=device),
        teacher_model=load_model(model.teacher_model_name_or_path, model, dtype=model.teacher_dtype, device=device),
        args=DistillationConfig(
            output_dir=str(folder),
            use_cpu=device.type == "cpu",
            bf16=config.training.bf16,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=True,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=batch,
            max_steps=2,
            beta=1.0,
            learning_rate=config.training.learning_rate,
            max_completion_length=rollout.max_completion_length,
            use_vllm=rollout.use_vllm,
            **(own if rollout.use_vllm else {}),
        ),
        train_dataset=Dataset.from_dict({"prompt": [q for q in questions for _ in range(rollout.num_generations)]}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    total = {"seconds": clock.seconds, "peak_bytes": clock.peak, "taken_bytes": clock.taken}
    sampler = "vLLM" if rollout.use_vllm else "transformers"
    tokens = batch * rollout.max_completion_length
    return {"sampler": sampler, "attention": "sdpa", "tokens": tokens, "parts": {"total": total}}


def one_arm(name: str, folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Run it in this process, and say what it took."""
    changes = ARMS[name]
    config = config_of(folder, changes or {}, vllm=find_spec("vllm") is not None, **sizes)
    run = folder / name.replace(" ", "-")
    return theirs(config, run) if changes is None else ours(config, run)


def in_a_process(name: str, folder: Path, tiny: bool, seconds: float) -> dict[str, Any]:
    """`one_arm` in a process of its own, or why there is nothing of it."""
    if ARMS[name] is None and find_spec("trl") is None:
        return {"left_out": "TRL is not installed: make setup-trl"}
    if seconds <= 0:
        return {"left_out": "no time was left"}
    found = folder / "found.json"
    found.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), *(["--tiny"] if tiny else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"left_out": f"it was not done within the {seconds:.0f} s that were left"}
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    return dict(json.loads(found.read_text(encoding="utf-8")))


# ---- shown ----


def table_of(arms: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="one step", title_justify="left")
    for column in ("", "sampler", "attention", "tokens", *(f"{p}, s" for p in PHASES), "peak GiB", "planned GiB"):
        table.add_column(column, justify="left" if column in ("", "sampler", "attention") else "right")
    for name, arm in arms.items():
        if "parts" not in arm:
            table.add_row(name, arm.get("left_out") or "failed")
            continue
        seconds = [arm["parts"].get(phase, {}).get("seconds") for phase in PHASES]
        planned = arm.get("planned_bytes")
        table.add_row(
            name,
            arm["sampler"],
            arm["attention"],
            f"{arm['tokens']:,.0f}",
            *("" if s is None else f"{s:.2f}" for s in seconds),
            f"{arm['parts']['total']['peak_bytes'] / 2**30:.1f}",
            "" if planned is None else f"{planned / 2**30:.1f}",
        )
    return table


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "vllm", "trl", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--minutes", type=float, default=6.5, help="for all arms; pytest -m gpu comes before them")
    parser.add_argument("--tiny", action="store_true", help="a small shape on the CPU, to test this script")
    parser.add_argument("--output", type=Path, default=Path("docs/gpu.json"))
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    console = Console(width=150)
    if not (args.tiny or torch.cuda.is_available()):
        console.print("no CUDA device on this machine: not measured")
        return
    disable_progress_bar()
    sizes = {"prompts": 2 if args.tiny else 4, "length": 32 if args.tiny else 4096}
    sizes["device"] = device = "cpu" if args.tiny else "cuda"
    if args.one:
        found = one_arm(args.one, args.folder, sizes)
        (args.folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
        return
    began = time.perf_counter()
    arms = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder, TINY if args.tiny else QWEN3_1_7B, device)
        for name in args.arms:
            left = 60 * args.minutes - (time.perf_counter() - began)
            arms[name] = in_a_process(name, folder, args.tiny, left)
            console.print(f"{name}: done after {time.perf_counter() - began:.0f} s", style="dim", highlight=False)
    console.print(table_of(arms))
    record = {
        "command": " ".join(["python", *sys.argv]),
        "device": "cpu" if args.tiny else torch.cuda.get_device_name(),
        "sizes": sizes,
        "versions": versions(),
        "arms": arms,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {args.output}")
    failed = [name for name, arm in arms.items() if "failed" in arm]
    for name in failed:
        console.print(f"{name} failed:\n{arms[name]['failed']}", highlight=False, markup=False)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
