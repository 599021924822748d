"""Peak memory and time of the objective's loss and gradient: chunked output head against full logits.

Both compute the same from hidden states (N, H) and an output embedding (V, H), float32: the student's top-k with
log-probabilities, the log-probability of the sampled token, the paper's loss, and the gradient of both inputs.

  plain            logits (N, V), logsumexp, torch.topk, gather, autograd
  plain, own top-k the same with the chunked head's top-k, which is faster than torch.topk: how much of a difference
                   in time comes from that alone
  chunked          prune_opd.core.head

Memory is the resident set of a fresh process for each number, from the kernel: the peak while loss and gradient are
computed (VmHWM, reset just before), less what was resident before (inputs, libraries), less the bytes of the two
gradients. It holds whatever the process really took: temporaries inside kernels and the allocator's too. Linux only.
The plain computation is measured at the first of --positions and at half of it. Beyond, its need would not fit most
machines: it is computed from the bytes of a position between these two, and marked.

Time is taken in one process, the arms in turn, medians; processor seconds stand beside, as they leave out what other
programs took.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prune_opd.core.head import CHUNK_BYTES, OutputHead, _topk, differentiable_head_statistics
from prune_opd.core.objective import topk_reverse_kl

MIB = 2**20


class Problem:
    """Inputs of one size. The teacher's log-probs depend on the id alone, so that the order of ties is no matter."""

    def __init__(self, positions: int, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        self.top_k, self.chunk_bytes = args.top_k, args.chunk_mib * MIB
        self.hidden = torch.empty(positions, args.hidden).normal_(generator=generator).requires_grad_()
        self.weight = torch.empty(args.vocabulary, args.hidden).normal_(std=0.25, generator=generator).requires_grad_()
        self.sampled = torch.randint(args.vocabulary, (positions, 1), generator=generator)
        self.teacher = torch.empty(args.vocabulary).normal_(mean=-8, generator=generator)
        self.mask = torch.ones(1, positions, dtype=torch.bool)

    def run(self, arm: str) -> tuple[Tensor, ...]:
        """Gradients of the loss in the hidden states and the embedding."""
        if arm == "chunked":
            found = differentiable_head_statistics(
                self.hidden, OutputHead(self.weight), top_k=self.top_k, ids=self.sampled, chunk_bytes=self.chunk_bytes
            )
            ids, logprobs = found.topk_ids, torch.cat([found.topk_logprobs, found.logprobs], dim=-1)
        else:
            logits = self.hidden @ self.weight.t()
            log_z = logits.logsumexp(-1, keepdim=True)
            detached = logits.detach()
            ids = detached.topk(self.top_k).indices if arm == "plain" else _topk(detached, self.top_k)
            logprobs = logits.gather(-1, torch.cat([ids, self.sampled], dim=-1)) - log_z
        loss = topk_reverse_kl(logprobs[None, :, :-1], self.teacher[ids][None], self.mask)[0]
        # The sampled token's share stands for what a policy-gradient loss would add.
        return torch.autograd.grad(loss - 0.1 * logprobs[:, -1].mean(), (self.hidden, self.weight))


ARMS = ("plain", "plain, own top-k", "chunked")


def measure_memory(arm: str, positions: int, args: argparse.Namespace) -> dict[str, float]:
    """MiB beyond inputs and gradients at the peak, in a fresh process."""
    command = [sys.executable, __file__, "--measure", arm, "--positions", str(positions)]
    for name in ("vocabulary", "hidden", "top_k", "chunk_mib", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"measuring {arm} at N = {positions} failed with code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def memory_of_this_process(arm: str, positions: int, args: argparse.Namespace) -> dict[str, float]:
    problem = Problem(positions, args)
    warm = Problem(2, argparse.Namespace(**vars(args) | {"vocabulary": 4096}))
    warm.run(arm)  # libraries and their work space belong to neither arm
    del warm
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    gradients = problem.run(arm)
    peak = status("VmHWM")
    wanted = sum(gradient.nbytes for gradient in gradients)
    return {
        "beyond_mib": (peak - before - wanted) / MIB,
        "peak_mib": peak / MIB,
        "before_mib": before / MIB,
        "gradients_mib": wanted / MIB,
    }


def status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}; this benchmark needs Linux")


def measure_time(positions: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Wall and processor seconds of each arm, in turn, after one untimed round that also compares the gradients."""
    problem = Problem(positions, args)
    reference = problem.run("plain")
    errors = {
        arm: [
            ((ours - theirs).norm() / theirs.norm()).item()
            for ours, theirs in zip(problem.run(arm), reference, strict=True)
        ]
        for arm in ARMS[1:]
    }
    del reference
    samples: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for _ in range(args.repeats):
        for arm in ARMS:
            wall, cpu = time.perf_counter(), time.process_time()
            gradients = problem.run(arm)
            samples[arm].append((time.perf_counter() - wall, time.process_time() - cpu))
            del gradients
    rows = {}
    for arm, pairs in samples.items():
        side_by_side = [a[0] / b[0] for a, b in zip(pairs, samples["plain"], strict=True)]
        rows[arm] = {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}
            for name, values in zip(("seconds", "cpu_seconds"), zip(*pairs, strict=True), strict=True)
        }
        rows[arm] |= {"ratio_min": min(side_by_side), "ratio_max": max(side_by_side)}
        rows[arm]["gradient_error"] = dict(zip(("hidden", "weight"), errors.get(arm, (0.0, 0.0)), strict=True))
    for name, ratio in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
        for row in rows.values():
            row[ratio] = row[name]["median"] / rows["plain"][name]["median"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="N, ascending")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V")
    parser.add_argument("--hidden", type=int, default=256, help="H")
    parser.add_argument("--top-k", type=int, default=16, help="K")
    parser.add_argument("--chunk-mib", type=int, default=CHUNK_BYTES // MIB, help="bound on a chunk of logits")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds at the first N")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/head_memory.json"))
    parser.add_argument("--measure", choices=ARMS, help=argparse.SUPPRESS)  # what the fresh processes are called with
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    first, *more = args.positions
    if args.measure:
        print(json.dumps(memory_of_this_process(args.measure, first, args)))
        return

    memory = {
        "plain": {n: measure_memory("plain", n, args) for n in (first // 2, first)},
        "chunked": {n: measure_memory("chunked", n, args) for n in (first, *more)},
    }
    halves = [memory["plain"][n]["beyond_mib"] for n in (first // 2, first)]
    plain_per_position = (halves[1] - halves[0]) / (first - first // 2)
    scaling = []
    for n in args.positions:
        beyond = memory["chunked"][n]["beyond_mib"]
        growth = (beyond - memory["chunked"][first]["beyond_mib"]) * MIB / (n - first) if n > first else None
        plain = halves[1] + plain_per_position * (n - first)
        scaling.append(
            {
                "positions": n,
                "chunked_mib": beyond,
                "plain_mib": plain,
                "plain_is_computed": n > first,
                "ratio": beyond / plain,
                "growth_bytes_per_position": growth,
                "growth_over_h_plus_k_float32": growth and growth / (4 * (args.hidden + args.top_k)),
            }
        )
    timing = measure_time(first, args)

    about = {
        "command": " ".join(["python", *sys.argv]),
        "sizes": {"V": args.vocabulary, "H": args.hidden, "K": args.top_k, "chunk_mib": args.chunk_mib},
        "device": "cpu",
        "machine": platform.processor() or platform.machine(),
        "threads": args.threads,
        "repeats": args.repeats,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }
    console = Console(width=110)
    console.print(f"V = {args.vocabulary}, H = {args.hidden}, K = {args.top_k}, chunk {args.chunk_mib} MiB, float32")
    console.print(time_table(timing, first, args.repeats))
    console.print(memory_table(scaling, args))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    record = {**about, "timing": {"positions": first, "arms": timing}, "scaling": scaling, "memory": memory}
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"{about['command']}, torch {about['versions']['torch']}, {args.threads} thread(s); {args.output}")


def time_table(timing: dict[str, dict[str, Any]], positions: int, repeats: int) -> Table:
    table = Table(title=f"N = {positions}: seconds of loss + gradient, median of {repeats}", title_justify="left")
    for name in ("arm", "seconds", "spread", "of plain", "cpu s", "of plain", "error of ∂h", "error of ∂W"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm, row in timing.items():
        error = row["gradient_error"]
        table.add_row(
            arm,
            f"{row['seconds']['median']:.2f}",
            f"{row['seconds']['min']:.2f}-{row['seconds']['max']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['cpu_seconds']['median']:.2f}",
            f"{row['cpu_ratio']:.2f}",
            f"{error['hidden']:.1e}",
            f"{error['weight']:.1e}",
        )
    return table


def memory_table(scaling: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    table = Table(title="MiB at the peak, beyond inputs and gradients", title_justify="left")
    for name in (
        "N",
        "chunked",
        "plain",
        "ratio",
        "bytes per further N",
        f"of 4 (H + K) = {4 * (args.hidden + args.top_k)}",
    ):
        table.add_column(name, justify="right")
    for row in scaling:
        growth = row["growth_bytes_per_position"]
        table.add_row(
            str(row["positions"]),
            f"{row['chunked_mib']:.0f}",
            f"{row['plain_mib']:.0f}" + (" (computed)" if row["plain_is_computed"] else ""),
            f"1/{1 / row['ratio']:.0f}",
            "" if growth is None else f"{growth:.0f}",
            "" if growth is None else f"{row['growth_over_h_plus_k_float32']:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
