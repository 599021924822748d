"""What a run costs in hours, where they go, and what pruning saves: a model, not a measurement.

    python benchmarks/cost_model.py [--json FILE]

Every step is rollout, teacher, update and network, one after another on the same GPUs. Three constants and three mean
lengths are fitted to the hours of six runs of the paper (arXiv 2605.07804); four other runs are predicted, and the
error is printed. The GPUs are taken for 8 H100: what is wrong with that, the fitted constants absorb. Nothing here was
measured on a GPU of ours.

Assumptions, all of them: response lengths are exponential up to the cap, with one mean for each pair; base models, of
which no cut run is known, never end by themselves; reliability ends after an exponential time (`Drift`), so that the
window (ρ = 0.1) settles at its 90th percentile; weights are read once a decode step, keys and values once a token; FSDP
gathers weights twice and scatters gradients once in each micro-batch, hidden behind compute where it fits.

Units: seconds, bytes, FLOPs, tokens. Rollouts are tokens of responses unless the name says otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

HOUR = 3600.0
PROMPT = 200.0  # mean tokens of a DAPO-Math prompt with its suffix, assumed


@dataclass(frozen=True)
class Model:
    """matmul_parameters: all that a token is multiplied with, the output head included, the input embedding not."""

    name: str
    matmul_parameters: float
    layers: int
    attention_width: int
    kv_heads: int
    head_size: int = 128

    @property
    def weight_bytes(self) -> float:
        """In bfloat16."""
        return 2 * self.matmul_parameters

    @property
    def kv_bytes(self) -> float:
        """Of one token's keys and values in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size

    def forward_flops(self, tokens: float, context: float) -> float:
        """Of `tokens` tokens, each of which looks at `context` tokens on average (causal: half of the sequence)."""
        return tokens * (2 * self.matmul_parameters + 4 * self.layers * self.attention_width * context)


@dataclass(frozen=True)
class Gpu:
    """flops: dense bfloat16 a second · memory_rate, link_rate (inside a node), network_rate: bytes a second one way."""

    flops: float
    memory_bytes: float
    memory_rate: float
    link_rate: float
    network_rate: float


@dataclass(frozen=True)
class Cluster:
    """gpus of one kind, `per_node` of them in a node."""

    gpu: Gpu
    gpus: int
    per_node: int = 8

    @property
    def rate(self) -> float:
        """Bytes a second that one GPU exchanges with all others."""
        return self.gpu.link_rate if self.gpus <= self.per_node else self.gpu.network_rate


@dataclass(frozen=True)
class Lengths:
    """Response lengths: exponential with mean `mean` tokens (infinite: never ends by itself), cut at `cap`."""

    mean: float
    cap: float

    @property
    def expected(self) -> float:
        """E[L]"""
        return self.cap if math.isinf(self.mean) else self.mean * -math.expm1(-self.cap / self.mean)

    @property
    def expected_square(self) -> float:
        """E[L²]"""
        if math.isinf(self.mean):
            return self.cap**2
        x = self.cap / self.mean
        if x < 1e-3:  # the closed form cancels; L is the cap but for a share x
            return self.cap**2 * (1 - 2 * x / 3)
        return 2 * self.mean**2 * (1 - math.exp(-x) * (1 + x))

    def longest(self, rollouts: float) -> float:
        """Expected length of the longest of so many, at most the cap."""
        if math.isinf(self.mean):
            return self.cap
        return min(self.cap, self.mean * (math.log(max(rollouts, 1.0)) + 0.577))


@dataclass(frozen=True)
class Drift:
    """Reliability is spent after an exponential time of mean `mean` tokens; infinite: the pair is compatible."""

    mean: float

    def window(self, lengths: Lengths, minimum: float = 1024.0) -> Lengths:
        """Window-only pruning: every rollout may run to the 90th percentile of the effective length."""
        return replace(lengths, cap=min(lengths.cap, max(minimum, self.mean * math.log(10))))

    def in_flight(self, lengths: Lengths, minimum: float = 1024.0) -> Lengths:
        """And each rollout ends where its own reliability does: the earlier of two exponential times."""
        return replace(self.window(lengths, minimum), mean=1 / (1 / lengths.mean + 1 / self.mean))


@dataclass(frozen=True)
class Constants:
    """decode_step: seconds of a decode step beside reading memory · train_share, score_share: of the peak FLOPs reached
    by the update and by the teacher · memory_share: of the memory bandwidth, assumed."""

    decode_step: float
    train_share: float
    score_share: float
    memory_share: float = 0.7


@dataclass(frozen=True)
class Run:
    """rescoring: how often the teacher scores a token on average, 1 where each is scored once · student_rescoring: the
    same for the student (verl's stop by overlap) · micro_batch: tokens of one forward and backward on a GPU."""

    student: Model
    teacher: Model
    rollouts: int = 256
    steps: int = 203
    top_k: int = 16
    micro_batch: float = 16384.0
    rescoring: float = 1.0
    student_rescoring: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Seconds of one step by part, and what they were made of."""

    decode_steps: float
    decode_weights: float
    decode_cache: float
    teacher: float
    update: float
    network: float
    tokens: float
    concurrent: float  # rollouts that one replica decodes at a time
    replicas: float
    log_prob_bytes: float

    SECONDS = ("decode_steps", "decode_weights", "decode_cache", "teacher", "update", "network")

    @property
    def seconds(self) -> float:
        return sum(getattr(self, name) for name in self.SECONDS)

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(self.SECONDS, key=lambda name: getattr(self, name))


def step_cost(run: Run, lengths: Lengths, cluster: Cluster, constants: Constants) -> Cost:
    """One training step. Raises ValueError where the student does not fit into one node's memory to roll out."""
    gpu, student, teacher = cluster.gpu, run.student, run.teacher
    tokens = run.rollouts * lengths.expected
    # Every token of prompt and response goes through; on average it looks at E[S²] / 2 E[S] tokens before it.
    sequence = PROMPT + lengths.expected
    squares = PROMPT**2 + 2 * PROMPT * lengths.expected + lengths.expected_square
    context = squares / (2 * sequence)
    everything = run.rollouts * sequence

    width = 1  # GPUs of a replica: half of their memory may hold weights
    while student.weight_bytes > 0.5 * width * gpu.memory_bytes:
        width *= 2
    if width > min(cluster.per_node, cluster.gpus):
        raise ValueError(f"{student.name} does not fit into {min(cluster.per_node, cluster.gpus)} GPUs to roll out")
    replicas = min(cluster.gpus / width, run.rollouts)  # more would have nothing to do
    each = run.rollouts / replicas
    room = (0.9 * width * gpu.memory_bytes - student.weight_bytes) / student.kv_bytes
    concurrent = min(each, room / (PROMPT + lengths.expected))
    steps = max(lengths.longest(run.rollouts), each * lengths.expected / concurrent)
    memory_rate = width * gpu.memory_rate * constants.memory_share
    read = each * (PROMPT * lengths.expected + lengths.expected_square / 2) * student.kv_bytes

    scored = run.rescoring * teacher.forward_flops(everything, context)
    scored += run.student_rescoring * student.forward_flops(everything, context)
    trained = 4 * student.forward_flops(everything, context)  # forward, recomputed forward, twice that backward
    update = trained / (cluster.gpus * gpu.flops * constants.train_share)
    micro_batches = math.ceil(everything / cluster.gpus / run.micro_batch)
    exchanged = 0.0 if cluster.gpus == 1 else 3 * student.weight_bytes * micro_batches / cluster.rate
    log_prob_bytes = 2 * run.top_k * 8 * tokens
    sync = student.weight_bytes / cluster.rate + log_prob_bytes / cluster.gpus / gpu.network_rate
    return Cost(
        decode_steps=steps * constants.decode_step,
        decode_weights=steps * student.weight_bytes / memory_rate,
        decode_cache=read / memory_rate,
        teacher=scored / (cluster.gpus * gpu.flops * constants.score_share),
        update=update,
        network=max(0.0, exchanged - update) + sync,
        tokens=tokens,
        concurrent=concurrent,
        replicas=replicas,
        log_prob_bytes=log_prob_bytes,
    )


def hours(run: Run, lengths: Iterable[Lengths], cluster: Cluster, constants: Constants) -> float:
    """A whole run; `lengths` stand for equal parts of its steps."""
    costs = [step_cost(run, some, cluster, constants).seconds for some in lengths]
    return run.steps * sum(costs) / len(costs) / HOUR


# ---- what is known ----

H100 = Gpu(flops=989e12, memory_bytes=80e9, memory_rate=3.35e12, link_rate=450e9, network_rate=50e9)
R1_1B = Model("R1-Distill-Qwen-1.5B", 1.54e9, 28, 1536, 2)
R1_7B = Model("R1-Distill-Qwen-7B", 7.07e9, 28, 3584, 4)
QWEN3_1B = Model("Qwen3-1.7B", 1.72e9, 28, 2048, 8)
QWEN3_4B = Model("Qwen3-4B", 4.02e9, 36, 4096, 8)
SIZES = (
    replace(R1_1B, name="1.5B"),
    replace(R1_7B, name="7B"),
    Model("14B", 13.99e9, 48, 5120, 8),
    Model("32B", 31.98e9, 64, 5120, 8),
    Model("70B", 71.46e9, 80, 8192, 8),
)
BUDGET, SHORT = 12288.0, 4096.0
RESCORED = 3.5  # (n + 1) / 2 for n = 6 chunks
SHOWN = {(4096, 8), (16384, 8), (16384, 64), (65536, 512)}


@dataclass(frozen=True)
class Pair:
    """Hours of the paper (method.md §5): plain OPD, OPD cut at 4,096 tokens where it was run, and Prune-OPD."""

    name: str
    run: Run
    opd: float
    cut: float | None
    prune: float


PAIRS = (
    Pair("JustRL", Run(R1_1B, R1_1B), 6.9, 4.8, 4.1),
    Pair("R1-7B", Run(R1_1B, R1_7B), 12.5, 6.6, 4.0),
    Pair("Skywork", Run(R1_7B, R1_7B), 17.5, 11.3, 17.0),
    Pair("Qwen3-1.7B-Base", Run(QWEN3_1B, QWEN3_4B), 16.5, None, 10.3),
    Pair("Qwen3-4B-Base", Run(QWEN3_4B, QWEN3_4B), 28.5, None, 13.5),
)
PAPER = Cluster(H100, 8)


def published_windows(pair: str) -> list[float]:
    """The window of the two runs whose course the paper tells, in 203 parts: JustRL 1K for 50 steps, then to 7K ·
    Skywork 6K to 12K. Straight lines are ours."""
    if pair == "JustRL":
        return [1024.0] * 50 + list(np.linspace(1024, 7168, 153))
    return list(np.linspace(6144, 12288, 203))


def fit(pairs: Iterable[Pair], cluster: Cluster = PAPER) -> tuple[Constants, dict[str, float]]:
    """Constants, and each pair's mean length, from the pairs that have both an OPD and a cut run; at least three.

    In turn, until nothing moves: the mean lengths that give the OPD hours, and by non-negative least squares the
    constants that give the hours of both. No other number of the paper is used.
    """
    pairs = [pair for pair in pairs if pair.cut is not None]
    if len(pairs) < 3:
        raise ValueError(f"three constants need at least three pairs with a cut run, got {len(pairs)}")
    constants = Constants(decode_step=0.004, train_share=0.3, score_share=0.3)
    means: dict[str, float] = {}
    for _ in range(200):
        means = {pair.name: _mean_length(pair, cluster, constants) for pair in pairs}
        rows, wanted = [], []
        for pair in pairs:
            for cap, measured in ((SHORT, pair.cut), (BUDGET, pair.opd)):
                unit = Constants(1.0, 1.0, 1.0, constants.memory_share)
                cost = step_cost(pair.run, Lengths(means[pair.name], cap), cluster, unit)
                scale = pair.run.steps / HOUR / measured  # errors are relative
                rows.append([cost.decode_steps * scale, cost.update * scale, cost.teacher * scale])
                wanted.append(1 - (cost.decode_weights + cost.decode_cache + cost.network) * scale)
        found = _least_squares_positive(np.array(rows), np.array(wanted))
        new = Constants(found[0], 1 / max(found[1], 1e-9), 1 / max(found[2], 1e-9), constants.memory_share)
        step = 0.5  # damped: lengths and constants answer to each other
        constants = Constants(
            *(
                math.exp((1 - step) * math.log(max(old, 1e-9)) + step * math.log(max(fresh, 1e-9)))
                for old, fresh in zip(astuple(constants), astuple(new), strict=True)
            )
        )
    return constants, means


def astuple(constants: Constants) -> tuple[float, float, float, float]:
    return constants.decode_step, constants.train_share, constants.score_share, constants.memory_share


def _mean_length(pair: Pair, cluster: Cluster, constants: Constants) -> float:
    """The mean length under which OPD takes the pair's hours, by bisection: hours grow with it."""
    low, high = 300.0, 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        taken = hours(pair.run, [Lengths(middle, BUDGET)], cluster, constants)
        low, high = (middle, high) if taken < pair.opd else (low, middle)
    return math.sqrt(low * high)


def _least_squares_positive(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with every unknown >= 0: the best of all choices of unknowns that are 0."""
    count = rows.shape[1]
    best, answer = math.inf, np.zeros(count)
    for mask in range(1, 2**count):
        used = [i for i in range(count) if mask >> i & 1]
        found = np.linalg.lstsq(rows[:, used], wanted, rcond=None)[0]
        if (found >= 0).all():
            error = float(((rows[:, used] @ found - wanted) ** 2).sum())
            if error < best:
                best, answer = error, np.zeros(count)
                answer[used] = found
    return answer


@dataclass(frozen=True)
class Check:
    """One of the paper's runs and the model's hours for it. held_out: no number of this run was used."""

    pair: str
    arm: str
    measured: float
    predicted: float
    held_out: bool

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def check(constants: Constants, means: dict[str, float], cluster: Cluster = PAPER) -> list[Check]:
    """The runs that were fitted and those that were not; of base models' lengths nothing is known, so both extremes."""
    found = []
    for pair in PAIRS:
        if pair.name in means:
            mean = means[pair.name]
            arms = [("opd", [Lengths(mean, BUDGET)], pair.opd, False)]
            if pair.cut is not None:
                arms.append(("opd cut at 4K", [Lengths(mean, SHORT)], pair.cut, False))
            if pair.name in ("JustRL", "Skywork"):
                arms.append(("prune", [Lengths(mean, cap) for cap in published_windows(pair.name)], pair.prune, True))
        else:
            typical = sum(means.values()) / len(means)
            arms = [
                ("opd, if it never ends by itself", [Lengths(math.inf, BUDGET)], pair.opd, True),
                ("opd, if as long as the others", [Lengths(typical, BUDGET)], pair.opd, True),
            ]
        for arm, lengths, measured, held_out in arms:
            found.append(Check(pair.name, arm, measured, hours(pair.run, lengths, cluster, constants), held_out))
    return found


@dataclass(frozen=True)
class Prediction:
    """Hours of 203 steps of 256 rollouts by arm; `bottleneck` of the in-flight arm, `next` once that part is free.

    in_flight_verl: the same stops through verl's servers, in six chunks that each score the whole prefix again.
    """

    model: str
    cap: int
    gpus: int
    opd: float
    window: float
    in_flight: float
    in_flight_verl: float
    bottleneck: str
    next: str


def predict(
    model: Model, cap: float, gpus: int, constants: Constants, *, mean: float | None = None, drift: float | None = None
) -> Prediction | None:
    """Student and teacher of one size; None where it does not fit. Default: mean length cap/2, reliability cap/8."""
    lengths, drift_of = Lengths(mean or cap / 2, cap), Drift(drift or cap / 8)
    cluster, run = Cluster(H100, gpus), Run(model, model)
    again = replace(run, rescoring=RESCORED, student_rescoring=RESCORED)
    stopped = drift_of.in_flight(lengths)
    arms = ((run, lengths), (run, drift_of.window(lengths)), (run, stopped), (again, stopped))
    try:
        taken = [hours(some, [its_lengths], cluster, constants) for some, its_lengths in arms]
    except ValueError:
        return None
    cost = step_cost(run, stopped, cluster, constants)
    rest = [name for name in Cost.SECONDS if name != cost.bottleneck]
    following = max(rest, key=lambda name: getattr(cost, name))
    return Prediction(model.name, int(cap), gpus, *taken, cost.bottleneck, following)


def predictions(constants: Constants) -> list[Prediction]:
    """1.5B-70B, 4K-64K tokens, 8-512 GPUs."""
    found = [
        predict(model, cap, gpus, constants) for model in SIZES for cap in (4096, 16384, 65536) for gpus in (8, 64, 512)
    ]
    return [one for one in found if one is not None]


# ---- output ----


def tables(constants: Constants, means: dict[str, float], checks: list[Check], rows: list[Prediction]) -> str:
    """The tables of docs/scaling.md: `check`, and of the predictions those in SHOWN."""
    known = ", ".join(f"{name} {mean:,.0f}" for name, mean in means.items())
    lines = [
        f"Fitted: {1000 * constants.decode_step:.2f} ms a decode step beside memory, {constants.train_share:.1%} of "
        f"the peak in the update, {constants.score_share:.1%} in the teacher; mean lengths {known} tokens.",
        "",
        "| pair | run | paper, h | model, h | error | |",
        "|---|---|---|---|---|---|",
    ]
    for one in checks:
        kind = "**held out**" if one.held_out else "fitted"
        lines.append(
            f"| {one.pair} | {one.arm} | {one.measured:.1f} | {one.predicted:.1f} | {one.error:+.0%} | {kind} |"
        )
    lines += [
        "",
        "| both models | tokens | GPUs | OPD, h | window, h | in flight, h | through verl, h | bottleneck | then |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if (row.cap, row.gpus) in SHOWN:
            arms = " | ".join(
                f"{taken:,.1f} (−{1 - taken / row.opd:.0%})"
                for taken in (row.window, row.in_flight, row.in_flight_verl)
            )
            lines.append(
                f"| {row.model} | {row.cap:,} | {row.gpus} | {row.opd:,.1f} | {arms} | {row.bottleneck} | {row.next} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    arguments = parser.parse_args()
    constants, means = fit(PAIRS)
    checks, rows = check(constants, means), predictions(constants)
    print(tables(constants, means, checks, rows))
    if arguments.json:
        content = {
            "constants": asdict(constants),
            "mean_lengths": means,
            "checks": [asdict(one) for one in checks],
            "predictions": [asdict(one) for one in rows],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
