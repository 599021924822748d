"""Cost of a token as responses get longer (T) and as a step has more rollouts (B), against what the machine could do.

A whole step of plain OPD (nothing pruned, every rollout as long as T) with student and teacher of the embedded models'
shape, random weights and enough positions: sampling, teacher, update with AdamW. One process; every round visits all
points in turn, after a warm-up of each; medians. The clock of the tables is processor seconds of this process, which
leave out what other programs took; wall seconds stand in the JSON and in the first table, and if they are much more,
the machine was busy.

Beside the measured time stands the least that the step must do:

  operations  2 for each multiply-add of the matrix products, causal attention counted at the pairs it needs. The update
              is three times a forward, and the chunked head four products with the vocabulary (core/head.py).
  bytes       each product reads its operands once and writes its result once, float32: in sampling, the weights at
              every decode step and each slot's keys and values; in teacher and update, the weights at every
              micro-batch and the tensors between the products; AdamW reads four numbers a weight and writes three.

Ceilings are measured in every round of the same process: the best of three matrix products of 1024 x 1024, and of
three copies of 256 MiB (read and written bytes both count). `bound` is the greater of operations / matmul ceiling and
bytes / copy ceiling, the roofline; `of bound` is bound / measured: 1 is a step that wastes nothing. Keys and values of
a short context stay in the processor's cache and may beat the copy ceiling.

The run ends within --minutes, by the clock: a repeat that would not fit is not begun, and the table says how many a
point got. A point that got none is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig, Qwen3Config, Qwen3ForCausalLM

from prune_opd.config import Config, parse_config
from prune_opd.models.loading import resolve_model
from prune_opd.models.packing import default_token_budget
from prune_opd.rollout.local import LocalSampler
from prune_opd.step import StepResult, prune_opd_step
from prune_opd.teachers.local import LocalTeacher
from prune_opd.training.build import build_optimizer, build_run
from prune_opd.types import Prompt

PHASES = ("rollout", "teacher", "update")
PROMPT_TOKENS = 16
COPY_BYTES = 256 * 2**20
MATMUL_SIZE = 1024


# ---- the least that a step must do ----


@dataclass(frozen=True)
class Work:
    """Operations (a multiply-add is two) and bytes to and from memory."""

    operations: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def seconds(self, ceilings: Ceilings) -> float:
        """The roofline: whichever of the two takes longer at the machine's own ceiling."""
        return max(self.operations / ceilings.operations_per_second, self.bytes / ceilings.bytes_per_second)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached on one matrix product and on one copy."""

    operations_per_second: float
    bytes_per_second: float


def least_work(
    shape: PretrainedConfig, *, rollouts: int, length: int, micro_batch_tokens: int, slots: int, width: int
) -> dict[str, Work]:
    """Of each phase of a step whose rollouts have `length` tokens after PROMPT_TOKENS; `width` bytes a number."""
    H, V, layers = shape.hidden_size, shape.vocab_size, shape.num_hidden_layers
    queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    matrices = [(H, queries), (H, keys), (H, keys), (queries, H)] + [(H, shape.intermediate_size)] * 2
    matrices.append((shape.intermediate_size, H))
    body = layers * sum(a * b for a, b in matrices)  # multiply-adds of a token, and weights
    between = layers * sum(a + b for a, b in matrices)  # numbers read and written around these products
    head = V * H
    tokens, fed = rollouts * length, rollouts * (PROMPT_TOKENS + length - 1)
    # Attention: a token at position c looks at c + 1 keys and values, its own among them.
    pairs = rollouts * (PROMPT_TOKENS + length - 1) * (PROMPT_TOKENS + length) / 2
    generated_pairs = pairs - rollouts * PROMPT_TOKENS * (PROMPT_TOKENS - 1) / 2
    decode_steps = length * -(-rollouts // slots)
    per_pair = layers * 4 * queries  # q·k and a·v, for all heads
    micro_batches = -(-fed // micro_batch_tokens)
    forward = Work(
        2 * fed * body + per_pair * pairs,
        width * (fed * (between + layers * 2 * (queries + keys)) + micro_batches * body),
    )
    vocabulary = Work(2 * tokens * head, width * (tokens * H + micro_batches * head))
    sampling = Work(
        2 * tokens * (body + head) + per_pair * generated_pairs,
        width * (decode_steps * (body + head) + tokens * (between + H + V) + layers * 2 * keys * generated_pairs),
    )
    weights = body + head
    update = Work(3 * forward.operations + 4 * vocabulary.operations, 3 * forward.bytes + 4 * vocabulary.bytes)
    return {
        "rollout": sampling,
        "teacher": forward + vocabulary,
        "update": update + Work(0, 7 * 4 * weights),
    }


# ---- measured ----


class Bench:
    """Student and teacher of one shape, and steps on them."""

    def __init__(self, shape: PretrainedConfig, *, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        torch.manual_seed(0)
        self.shape, self.device, self.threads = shape, device, threads
        with torch.device(device):
            self.student = Qwen3ForCausalLM(shape).to(dtype)
            self.teacher = LocalTeacher(Qwen3ForCausalLM(shape).to(dtype), vocab_size=shape.vocab_size)

    def config(self, rollouts: int, length: int, **settings: Any) -> Config:
        """Plain OPD with `rollouts` responses of `length` tokens."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parse_config(
                {
                    "model": {"model_name_or_path": "random", "teacher_model_name_or_path": "random"},
                    "data": {"train": "random"},
                    "rollout": {"max_completion_length": length, "slots": rollouts},
                    "objective": {"top_k": 16},
                    "pruning": {"enable": False},
                    "training": {"threads": self.threads, "learning_rate": 1e-9, **settings},
                },
                where="scaling",
            )

    def step(self, config: Config, rollouts: int) -> tuple[StepResult, dict[str, float]]:
        """One step; nobody can end a rollout, so each has the full length. Seconds: {wall, cpu and each phase's}."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.shape.vocab_size, (rollouts, PROMPT_TOKENS), generator=generator).tolist()
        prompts = [Prompt("", tuple(prompt), None, "random") for prompt in ids]
        sampler = LocalSampler(self.student, pad_id=0, eos_ids=[], slots=config.rollout.slots)
        wall, cpu = time.perf_counter(), time.process_time()
        run = build_run(
            config,
            student=self.student,
            sampler=sampler,
            teacher=self.teacher,
            optimizer=build_optimizer(self.student, config)[0],
            window=None,
            vocab_size=self.shape.vocab_size,
        )
        result = prune_opd_step(run, 0, prompts)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        assert int(result.rollouts.lengths.sum()) == rollouts * config.rollout.max_completion_length
        return result, seconds | {phase: result.seconds[phase] for phase in PHASES}


def measured_ceilings(device: torch.device, dtype: torch.dtype, clock: Callable[[], float], size: int) -> Ceilings:
    """The best of three of each: a ceiling is what was possible, not what was usual."""

    def fastest(work: Callable[[], Any]) -> float:
        work()
        times = []
        for _ in range(3):
            synchronise(device)
            began = clock()
            work()
            synchronise(device)
            times.append(clock() - began)
        return min(times)

    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        2 * size**3 / fastest(lambda: torch.mm(a, b, out=out)),
        2 * COPY_BYTES / fastest(lambda: target.copy_(source)),
    )


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def summarise(
    samples: Sequence[dict[str, float]], ceilings: Ceilings, work: dict[str, Work], tokens: int
) -> dict[str, Any]:
    """One row: medians a token in microseconds, the bound, and the shares of the ceilings.

    samples: wall and processor seconds of each repeat, and wall seconds of each phase. Phases are scaled to processor
    seconds with their step's own ratio of the two.
    """
    total = Work(0, 0)
    for phase in PHASES:
        total += work[phase]
    cpu = statistics.median(s["cpu"] for s in samples)
    scaled = {p: statistics.median(s[p] * s["cpu"] / s["wall"] for s in samples) for p in PHASES}
    per_token = 1e6 / tokens
    return {
        "repeats": len(samples),
        "tokens": tokens,
        "wall_us_per_token": statistics.median(s["wall"] for s in samples) * per_token,
        "us_per_token": cpu * per_token,
        "us_per_token_min": min(s["cpu"] for s in samples) * per_token,
        "us_per_token_max": max(s["cpu"] for s in samples) * per_token,
        "operations_per_token": total.operations / tokens,
        "bytes_per_token": total.bytes / tokens,
        "bound_us_per_token": sum(work[p].seconds(ceilings) for p in PHASES) * per_token,
        "of_matmul_ceiling": total.operations / cpu / ceilings.operations_per_second,
        "of_copy_ceiling": total.bytes / cpu / ceilings.bytes_per_second,
        "of_bound": sum(work[p].seconds(ceilings) for p in PHASES) / cpu,
        "phases": {
            p: {
                "us_per_token": scaled[p] * per_token,
                "bound_us_per_token": work[p].seconds(ceilings) * per_token,
                "of_bound": work[p].seconds(ceilings) / scaled[p],
                **asdict(work[p]),
            }
            for p in PHASES
        },
        "samples": list(samples),
    }


def measure(args: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], Ceilings]:
    """All points, round by round. The longest points run last in a round, so that time runs out for them first."""
    began = time.perf_counter()
    device, dtype = torch.device("cpu"), torch.float32
    shape = embedded_shape(positions=PROMPT_TOKENS + max(args.lengths) + 1)
    bench = Bench(shape, device=device, dtype=dtype, threads=args.threads)
    points = {(args.rollouts_fixed, n) for n in args.lengths} | {(b, args.length_fixed) for b in args.rollouts}
    order = sorted(points, key=lambda point: (point[0] * point[1], point[1]))
    samples: dict[tuple[int, int], list[dict[str, float]]] = {point: [] for point in order}
    ceilings: list[Ceilings] = []
    bench.step(bench.config(2, 16), 2)
    for repeat in range(args.repeats):
        ceilings.append(measured_ceilings(device, dtype, time.process_time, MATMUL_SIZE))
        for rollouts, length in order:
            done = samples[rollouts, length]
            left = 60 * args.minutes - (time.perf_counter() - began)
            if max((s["wall"] for s in done), default=0.0) > left or left < 0:
                continue
            seconds = bench.step(bench.config(rollouts, length), rollouts)[1]
            done.append(seconds)
            console.print(f"round {repeat + 1}: B {rollouts}, T {length}: {seconds['wall']:.1f} s", style="dim")
    ceiling = Ceilings(*(max(getattr(c, name) for c in ceilings) for name in asdict(ceilings[0])))
    rows = []
    for rollouts, length in [point for point in order if samples[point]]:
        config = bench.config(rollouts, length)
        work = least_work(
            shape,
            rollouts=rollouts,
            length=length,
            micro_batch_tokens=default_token_budget(torch.device("cpu")),
            slots=config.rollout.slots,
            width=4,
        )
        summary = summarise(samples[rollouts, length], ceiling, work, rollouts * length)
        rows.append({"rollouts": rollouts, "length": length, **summary})
    return rows, ceiling


def embedded_shape(positions: int) -> PretrainedConfig:
    """The embedded models' shape with more positions."""
    shape = Qwen3Config.from_pretrained(resolve_model("embedded:teacher"))
    shape.max_position_embeddings = positions
    return shape


# ---- shown ----


def table_of(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("B", "T", "repeats", "wall µs/token", "CPU µs/token", "spread", *PHASES, "Mop/token", "kB/token"):
        table.add_column(name, justify="right")
    for name in ("bound µs", "of matmul", "of copy", "of bound"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["rollouts"]),
            f"{row['length']:,}",
            str(row["repeats"]),
            f"{row['wall_us_per_token']:.0f}",
            f"{row['us_per_token']:.0f}",
            f"{row['us_per_token_min']:.0f}-{row['us_per_token_max']:.0f}",
            *(f"{row['phases'][phase]['us_per_token']:.0f}" for phase in PHASES),
            f"{row['operations_per_token'] / 1e6:.1f}",
            f"{row['bytes_per_token'] / 1e3:.0f}",
            f"{row['bound_us_per_token']:.0f}",
            f"{row['of_matmul_ceiling']:.2f}",
            f"{row['of_copy_ceiling']:.2f}",
            f"{row['of_bound']:.2f}",
        )
    return table


def plot(axes_rows: Sequence[tuple[str, str, Sequence[dict[str, Any]]]], path: Path) -> None:
    """One panel an axis: measured time of each phase and of the step, and the roofline below it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(axes_rows), figsize=(10, 4), sharey=True, layout="constrained")
    for panel, (key, title, rows) in zip(panels, axes_rows, strict=True):
        x = [row[key] for row in rows]
        spread = [[row["us_per_token"] - row["us_per_token_min"] for row in rows]]
        spread.append([row["us_per_token_max"] - row["us_per_token"] for row in rows])
        panel.errorbar(x, [row["us_per_token"] for row in rows], yerr=spread, marker="o", capsize=3, label="step")
        for phase in PHASES:
            panel.plot(x, [row["phases"][phase]["us_per_token"] for row in rows], marker=".", label=phase)
        panel.plot(x, [row["bound_us_per_token"] for row in rows], "k--", label="roofline of the step")
        panel.set(xscale="log", yscale="log", xlabel=title, xticks=x, xticklabels=[f"{value:,}" for value in x])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("processor µs per token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="T")
    parser.add_argument("--rollouts-fixed", type=int, default=8, help="B while T grows")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="B")
    parser.add_argument("--length-fixed", type=int, default=256, help="T while B grows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="no repeat starts that would end after this")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/scaling.json"))
    parser.add_argument("--plot", type=Path, default=Path("build/benchmarks/scaling.png"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=150)
    load = os.getloadavg()[0]
    rows, ceilings = measure(args, console)
    by_length = [row for row in rows if row["rollouts"] == args.rollouts_fixed and row["length"] in args.lengths]
    by_rollouts = [row for row in rows if row["length"] == args.length_fixed and row["rollouts"] in args.rollouts]
    console.print(table_of(by_length, f"T grows, {args.rollouts_fixed} rollouts"))
    console.print(table_of(by_rollouts, f"rollouts grow, T = {args.length_fixed}"))
    record = {
        "command": " ".join(["python", *sys.argv]),
        "device": "cpu",
        "machine": platform.processor() or platform.machine(),
        "threads": args.threads,
        "load_average": {"before": load, "after": os.getloadavg()[0], "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
        "ceilings": asdict(ceilings),
        "rows": rows,
    }
    for path in (args.output, args.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot((("length", "T, tokens of a response", by_length), ("rollouts", "B, rollouts", by_rollouts)), args.plot)
    console.print(
        f"ceilings {ceilings.operations_per_second / 1e9:.0f} Gop/s, {ceilings.bytes_per_second / 1e9:.1f} GB/s; "
        f"{record['command']}; torch {record['versions']['torch']}, {args.threads} thread(s), "
        f"load {load:.1f} on {os.cpu_count()} cores; {args.output}, {args.plot}"
    )


if __name__ == "__main__":
    main()
