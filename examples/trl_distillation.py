"""Prune-OPD inside of TRL's DistillationTrainer: your data set, your loop, TRL's logs and checkpoints.

    pip install 'prune-opd[trl]'
    python examples/trl_distillation.py
    python examples/trl_distillation.py --student Qwen/Qwen3-1.7B-Base --teacher Qwen/Qwen3-4B --data prompts.jsonl \
        --length 12288 --window 1024

Without arguments it trains the embedded pair for twenty steps on a CPU, a minute or two.
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch
from datasets import Dataset, load_dataset
from trl import DistillationConfig

from prune_opd.config import ObjectiveSection, PruningSection
from prune_opd.data.tasks import problems
from prune_opd.integrations.trl import PruneDistillationTrainer
from prune_opd.models.loading import resolve_model


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="embedded:low-student")
    parser.add_argument("--teacher", default="embedded:teacher")
    parser.add_argument("--data", help="JSONL with a column prompt; without it, sums of digits")
    parser.add_argument("--length", type=int, default=322, help="most tokens of a response")
    parser.add_argument("--window", type=int, default=48, help="most tokens at first; drift steers it from there")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--output-dir", default="runs/trl")
    args = parser.parse_args()

    if args.data:
        dataset = load_dataset("json", data_files=args.data, split="train")
    else:
        dataset = Dataset.from_list([{"prompt": p.prompt} for p in islice(problems("train", 0), 2000)])
    step = max(1, args.length // 80)
    trainer = PruneDistillationTrainer(
        model=resolve_model(args.student),  # a folder or Hub id stays what it is
        teacher_model=resolve_model(args.teacher),
        args=DistillationConfig(
            output_dir=args.output_dir,
            max_completion_length=args.length,
            per_device_train_batch_size=args.batch,
            max_steps=args.steps,
            learning_rate=5e-5,
            logging_steps=1,
            report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=dataset,
        objective=ObjectiveSection(top_k=8),
        pruning=PruningSection(
            threshold=0.6,
            w_drop=0.02,
            dynamic_response_length={
                "init_len": args.window,
                "min_len": args.window,
                "max_len": args.length,
                "step": step,
                "margin": step,
            },
        ),
    )
    trainer.train()
    trainer.save_model()
    for record in trainer.state.log_history:
        if window := record.get("prune_opd/next_max_response_length"):
            print(f"step {record['step']}: overlap {record['distillation/overlap_ratio']:.3f}, window {window:.0f}")


if __name__ == "__main__":
    main()
