"""One step of plain OPD at a real size on one accelerator: where the time goes, the memory, and the share of its peak.

Student and teacher have the shape of Qwen3-1.7B (random weights, bfloat16 autocast over float32 master weights for the
student, bfloat16 for the teacher); --rollouts responses of --length tokens that nobody can end. Work, ceilings and
the meaning of the columns are those of scaling.py; the clock is the wall's here, since the work is not the processor's.
Where Liger's kernels are installed, a step with `model.liger_head` follows each step without.

Without an accelerator it says so and ends with code 0: nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from gpu_check import QWEN3_1_7B
from rich.console import Console
from scaling import PHASES, Bench, least_work, measured_ceilings, summarise, table_of
from transformers import Qwen3Config

from prune_opd.config import with_settings
from prune_opd.models.packed_attention import choose_attention
from prune_opd.teachers.local import LocalTeacher

MATMUL_SIZE = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--length", type=int, default=12_288, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=5, help="after one untimed step")
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/gpu.json"))
    args = parser.parse_args()
    console = Console(width=150)
    if not torch.cuda.is_available():
        console.print("no CUDA device on this machine: not measured")
        return
    device = torch.device("cuda")
    shape = Qwen3Config(**QWEN3_1_7B)
    bench = Bench(shape, device=device, dtype=torch.float32, threads=1)
    bench.teacher.model.to(torch.bfloat16)
    for model in (bench.student, bench.teacher.model):
        choose_attention(model, "auto", device=device, half=True, compile=False)
    bench.teacher = LocalTeacher(bench.teacher.model, vocab_size=shape.vocab_size)
    settings = {"bf16": True, "micro_batch_tokens": args.micro_batch_tokens, "gradient_checkpointing": True}
    bench.student.gradient_checkpointing_enable({"use_reentrant": False})
    bench.student.train()
    heads = {"head of torch": False} | ({"head of Liger": True} if find_spec("liger_kernel") else {})
    short, config = (bench.config(args.rollouts, length, **settings) for length in (64, args.length))
    for liger in heads.values():
        bench.step(with_settings(short, **{"model.liger_head": liger}), args.rollouts)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in heads}
    peaks = dict.fromkeys(heads, 0)
    for _ in range(args.repeats):
        for name, liger in heads.items():
            torch.cuda.reset_peak_memory_stats()
            seconds = bench.step(with_settings(config, **{"model.liger_head": liger}), args.rollouts)[1]
            samples[name].append(seconds | {"cpu": seconds["wall"]})
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
            phases = ", ".join(f"{p} {seconds[p]:.1f}" for p in PHASES)
            console.print(f"{name}: {seconds['wall']:.1f} s: {phases}", style="dim")
    ceilings = measured_ceilings(device, torch.bfloat16, time.perf_counter, MATMUL_SIZE)
    work = least_work(
        shape,
        rollouts=args.rollouts,
        length=args.length,
        micro_batch_tokens=args.micro_batch_tokens,
        slots=config.rollout.slots,
        width=2,
    )
    found = {}
    for name in heads:
        row = {"rollouts": args.rollouts, "length": args.length}
        row |= summarise(samples[name], ceilings, work, args.rollouts * args.length)
        console.print(table_of([row], f"Qwen3-1.7B shape, {name}; CPU columns are the wall's"))
        seconds = statistics.median(s["wall"] for s in samples[name])
        console.print(f"{name}: {seconds:.1f} s a step, peak {peaks[name] / 2**30:.1f} GiB")
        found[name] = {"seconds": seconds, "peak_bytes": peaks[name], "row": row}
    record = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
        "ceilings": asdict(ceilings),
        "heads": found,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"{record['device']}: ceilings {ceilings.operations_per_second / 1e12:.0f} Top/s, "
        f"{ceilings.bytes_per_second / 1e9:.0f} GB/s; {args.output}"
    )


if __name__ == "__main__":
    main()
