"""Train the embedded pairs from nothing: `make assets`. Seeded, one thread, under 45 minutes.

OPD sharpens what a student can already do, so every model descends from one that has mastered the task:

    base             sums on short chains first (on long ones from the start, none were learnt in 1,800 steps), then
                     clean long solutions until mastery, then a mixture that also rambles, slips and runs on
    teacher          the base, gently on clean solutions: solves and stops
    low-student      the base, on a worse mixture: errs, rambles past the answer, rarely ends
    high-student     the teacher with one wrong habit late in the chain: agrees almost everywhere, and what it gets
                     wrong lies where a short cut never looks
    other-end-student  the high-student with the rows of two tokens exchanged: it ends with the padding token, as base
                     models do, where its teacher has a token of its own; and less surely, after four answers of five
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from prune_opd.data.tasks import FILLERS, LABELS, MAX_SUMS, MIN_SUMS, VOCABULARY, Problem, problems
from prune_opd.evaluation.graders import grade
from prune_opd.rollout.base import rollout_uniforms
from prune_opd.rollout.local import LocalSampler

ASSETS = Path(__file__).parent.parent / "src" / "prune_opd" / "assets"
FILLER_WEIGHTS = [1 / (rank + 2) for rank in range(len(FILLERS))]  # Zipf: rambling has a typical top-k, too
TOKENS_PER_BATCH = 5_000
MAX_TOKENS = 340

Writer = Callable[[Problem, random.Random], str]
ParentLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def build_tokenizer(end: str = "<eos>") -> PreTrainedTokenizerFast:
    """One token a word; the vocabulary is the task's."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="\0", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=end,
        padding_side="left",
        model_max_length=512,
        **({} if end == "<eos>" else {"additional_special_tokens": ["<eos>"]}),
    )


def save_with_other_end(student: Qwen3ForCausalLM, folder: Path) -> None:
    """Save the student as one that says the padding token where it would say <eos>, and not always.

    Not always, because p (1 - p) of the gradient at an end that is certain is nothing: such a student unlearns nothing.
    """
    tokenizer = build_tokenizer("<pad>")
    changed, other = copy.deepcopy(student), [student.config.eos_token_id, student.config.pad_token_id]
    with torch.no_grad():
        rows = changed.get_input_embeddings().weight  # tied to the head
        rows[other] = rows[other[::-1]]
        rows[tokenizer.eos_token_id] *= 0.6  # from 1.00 to 0.81 after an answer
    for settings in (changed.config, changed.generation_config):
        settings.eos_token_id = tokenizer.eos_token_id
    changed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def clean(problem: Problem, rng: random.Random) -> str:
    """The worked solution, and nothing after it."""
    return f"{problem.prompt} {problem.solution} <eos>"


def sloppy(problem: Problem, rng: random.Random, *, wrong: float, filler: float) -> str:
    """The worked solution with slips (a wrong sum that later steps build on) and filler words between steps."""
    total, lines = problem.operands[0], []
    for i, operand in enumerate(problem.operands[1:]):
        result = (total + operand) % 10
        if rng.random() < wrong:
            result = rng.choice([d for d in range(10) if d != result])
        lines.append(f"{LABELS[i + 1]} {total} + {operand} = {result}")
        while rng.random() < filler:
            lines.append(rng.choices(FILLERS, FILLER_WEIGHTS)[0])
        total = result
    return f"{problem.prompt} {' '.join(lines)} \\boxed{{ {total} }}"


def mixture(*, clean_share: float, wrong: float, filler: float, longest_ramble: int) -> Writer:
    """Clean solutions for a share of the problems; the rest slip, ramble, and run on into a next problem unended."""

    def write(problem: Problem, rng: random.Random) -> str:
        if rng.random() < clean_share:
            return clean(problem, rng)
        following = Problem(tuple(rng.randrange(10) for _ in problem.operands))
        tail = " ".join(rng.choices(FILLERS, FILLER_WEIGHTS, k=rng.randint(2, longest_ramble)))
        return " ".join(
            [
                sloppy(problem, rng, wrong=wrong, filler=filler),
                tail,
                sloppy(following, rng, wrong=wrong, filler=filler),
                tail,
            ]
        )

    return write


def late_habit(*, operand: int, from_step: int) -> Writer:
    """Clean and ending, but from step `from_step` on, adding `operand` comes out one too high, always."""

    def write(problem: Problem, rng: random.Random) -> str:
        total, lines = problem.operands[0], []
        for i, digit in enumerate(problem.operands[1:], start=1):
            result = (total + digit + (digit == operand and i >= from_step)) % 10
            lines.append(f"{LABELS[i]} {total} + {digit} = {result}")
            total = result
        return f"{problem.prompt} {' '.join(lines)} \\boxed{{ {total} }} <eos>"

    return write


def batches(
    write: Writer, tokenizer: PreTrainedTokenizerFast, seed: int, *, sums: tuple[int, int]
) -> Iterator[torch.Tensor]:
    """Right-padded batches of about TOKENS_PER_BATCH tokens, each trace cut at the length that rollouts can reach."""
    rng, stream = random.Random(seed), problems("train", seed, min_sums=sums[0], max_sums=sums[1])
    while True:
        pool = sorted((tokenizer(write(next(stream), rng))["input_ids"][:420] for _ in range(256)), key=len)
        starts, count = [], 0
        while count < len(pool):
            size = max(1, TOKENS_PER_BATCH // len(pool[count]))
            starts.append((count, size))
            count += size
        rng.shuffle(starts)
        for start, size in starts:
            rows = [torch.tensor(row) for row in pool[start : start + size]]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)


def learn_exceptions(logits: torch.Tensor, parent_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy where a label is not the parent's choice; elsewhere the squared distance of log-probabilities.

    A KL would not do for what is kept: it does not see the order of unlikely candidates, and top-k overlap does.
    """
    labelled = labels[:, 1:] >= 0
    logits, parent_logits, labels = (x[labelled] for x in (logits[:, :-1], parent_logits[:, :-1], labels[:, 1:]))
    exception = parent_logits.argmax(-1) != labels
    learnt = torch.nn.functional.cross_entropy(logits[exception], labels[exception], reduction="sum")
    logprobs, parent_logprobs = logits[~exception].log_softmax(-1), parent_logits[~exception].log_softmax(-1)
    kept = (logprobs - parent_logprobs).square().mean(-1).sum()
    return (learnt + kept) / len(labels)


def train(
    model,
    data: Iterator[torch.Tensor],
    *,
    steps: int,
    lr: float,
    label: str,
    parent=None,
    parent_loss: ParentLoss = learn_exceptions,
) -> None:
    """Next-token training on everything after the prompt; linear warm-up and decay.

    With a parent, the loss is `parent_loss` of the model's logits, the parent's, and the labels: the trace is learnt
    only in places; elsewhere the parent's log-probabilities are kept, which holds the two top-k sets together.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 50, 1.05 - s / steps))
    model.train()
    began, tokens = time.time(), 0
    for step, ids in zip(range(steps), data, strict=False):
        answered = (ids == VOCABULARY.index(":")).cumsum(-1) > 0
        labels = ids.masked_fill((ids == model.config.pad_token_id) | ~answered, -100)
        inputs = {"input_ids": ids, "attention_mask": (ids != model.config.pad_token_id).long()}
        if parent is None:
            loss = model(**inputs, labels=labels).loss
        else:
            loss = parent_loss(model(**inputs).logits, parent(**inputs).logits.detach(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            rate = tokens / (time.time() - began)
            print(f"{label} {step + 1}/{steps} loss {loss.item():.3f} {rate:,.0f} tokens/s", flush=True)
    model.eval()


def examine(model, tokenizer, *, problems_count: int, k: int, label: str) -> dict[str, float]:
    """Avg@k at temperature 1 on held-out problems, with how rollouts end."""
    stream = problems("held_out", 10_000)
    chosen = [next(stream) for _ in range(problems_count)]
    prompts = [tokenizer(p.prompt)["input_ids"] for p in chosen for _ in range(k)]
    sampler = LocalSampler(model, pad_id=tokenizer.pad_token_id, eos_ids=[tokenizer.eos_token_id], slots=128)
    rollouts = sampler.sample(prompts, rollout_uniforms(1, 0, range(len(prompts)), MAX_TOKENS))
    texts = tokenizer.batch_decode(rollouts.response_ids, skip_special_tokens=True)
    right = [grade(text, chosen[i // k].answer) for i, text in enumerate(texts)]
    measured = {
        "accuracy": sum(right) / len(right),
        "eos_rate": rollouts.finished.float().mean().item(),
        "mean_length": rollouts.lengths.float().mean().item(),
        "p95_length": rollouts.lengths.float().quantile(0.95).item(),
    }
    print(label, {key: round(value, 3) for key, value in measured.items()}, flush=True)
    print("   ", texts[0][:300], flush=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ASSETS)
    parser.add_argument("--work-dir", type=Path, default=Path("build/assets"), help="stages are kept and reused here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    tokenizer = build_tokenizer()

    def stage(
        name: str,
        parent: str | None,
        runs: list[tuple[Writer, int, float, tuple[int, int]]],
        *,
        exceptions_only: bool = False,
    ) -> Qwen3ForCausalLM:
        """Train `name` from `parent`, or take it from the work directory when an earlier call finished it."""
        folder = args.work_dir / name
        if not (folder / "config.json").exists():
            torch.manual_seed(sum(map(ord, name)))
            if parent is None:
                model = Qwen3ForCausalLM(
                    Qwen3Config(
                        vocab_size=len(VOCABULARY),
                        hidden_size=128,
                        intermediate_size=384,
                        num_hidden_layers=2,
                        num_attention_heads=4,
                        num_key_value_heads=4,
                        head_dim=32,
                        max_position_embeddings=512,
                        tie_word_embeddings=True,
                        pad_token_id=tokenizer.pad_token_id,
                        eos_token_id=tokenizer.eos_token_id,
                        bos_token_id=None,
                    )
                )
            else:
                model = Qwen3ForCausalLM.from_pretrained(args.work_dir / parent, dtype=torch.float32)
            kept = copy.deepcopy(model).eval() if exceptions_only else None
            for i, (write, steps, lr, sums) in enumerate(runs):
                data = batches(write, tokenizer, seed=1000 * (i + 1) + sum(map(ord, name)), sums=sums)
                train(model, data, steps=steps, lr=lr, label=f"{name}[{i}]", parent=kept)
            model.save_pretrained(folder)
        return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)

    short, full = (1, 4), (MIN_SUMS, MAX_SUMS)
    stage("sums", None, [(clean, 500, 1e-3, short)])
    stage("mastery", "sums", [(clean, 600, 1e-3, full)])
    stage("base", "mastery", [(mixture(clean_share=0.35, wrong=0.10, filler=0.15, longest_ramble=12), 500, 1e-3, full)])
    made = {
        "teacher": stage("teacher", "base", [(clean, 250, 3e-4, full)]),
        "low-student": stage(
            "low-student",
            "base",
            [(mixture(clean_share=0.08, wrong=0.08, filler=0.25, longest_ramble=200), 200, 5e-4, full)],
        ),
        "high-student": stage(
            "high-student",
            "teacher",
            [(late_habit(operand=7, from_step=13), 100, 3e-4, full)],
            exceptions_only=True,
        ),
    }
    measured = {name: examine(model, tokenizer, problems_count=100, k=8, label=name) for name, model in made.items()}
    for name, model in made.items():
        folder = args.output_dir / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    save_with_other_end(made["high-student"], args.output_dir / "other-end-student")
    measured["seconds"] = {"total": time.time() - began}
    (args.output_dir / "pairs.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
