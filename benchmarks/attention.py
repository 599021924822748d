"""A decode step with the slots' attention and with transformers' `sdpa`, where heads share keys; and the kernels alone.

    python benchmarks/attention.py

A model in the shape of SmolLM2-135M with random weights in float32: 30 layers, nine query heads on three heads of keys.
16 rows decode one token each, all at the same context, through the same cache; the two alternate.

Then the attention alone, in the shape of the embedded pair (64 rows, two layers of four heads of 32): torch's kernel,
the one for compiled code (`attend_one`), and a sum over the same keys and values, which is what reading them takes.

And that of packed rows in the same shape, forward and backward, one layer: torch's kernel, the same with queries in
blocks (what an update does that is not compiled), and the one for compiled code (`attend_rows`).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from prune_opd.models.causal_lm import output_head
from prune_opd.models.kernels.attend_one import attend_one
from prune_opd.models.kernels.attend_rows import attend_rows
from prune_opd.models.packed_attention import packed_attention, seen_columns
from prune_opd.models.slot_cache import SLOT_ATTENTION, SlotCache
from prune_opd.rollout.local import Generation, decode
from prune_opd.types import TopK

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--repeats", type=int, default=7, help="of three steps each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMOLLM2_135M).eval()
    head = output_head(model)
    rows = arguments.rows
    cache = SlotCache(model, slots=rows, capacity=max(arguments.contexts))
    tokens, where = torch.full((rows,), 5), (torch.arange(rows), torch.zeros(rows, dtype=torch.long))
    uniforms = torch.full((rows, 1), 0.5, dtype=torch.float64)
    generation = Generation(uniforms, torch.zeros(rows, 1, dtype=torch.long), TopK.empty(rows, 1, 8), None)

    def milliseconds(attention: str, context: int) -> float:
        model.config._attn_implementation = attention
        began = time.perf_counter()
        for _ in range(3):
            decode(
                model,
                head,
                cache,
                tokens,
                torch.full((rows,), context - 1),
                context,
                None,
                generation,
                where,
                vocab_size=None,
                temperature=1.0,
                top_p=1.0,
                top_k=8,
            )
        return (time.perf_counter() - began) / 3 * 1e3

    print(
        f"torch {torch.__version__}, one thread, {rows} rows; medians of {arguments.repeats}, ms a decode step (range)"
    )
    for context in arguments.contexts:
        taken: dict[str, list[float]] = {"sdpa": [], SLOT_ATTENTION: []}
        for repeat in range(arguments.repeats + 1):
            for attention, found in taken.items():
                found += [milliseconds(attention, context)][: repeat > 0]  # the first is warm-up
        columns = "   ".join(
            f"{name} {statistics.median(found):.0f} ({min(found):.0f}-{max(found):.0f})"
            for name, found in taken.items()
        )
        ratio = statistics.median(a / b for a, b in zip(*taken.values(), strict=True))
        print(f"context {context:5}: {columns}   ratio {ratio:.2f}")
    attention_of_one(arguments.repeats)
    with torch.enable_grad():
        attention_of_rows(arguments.repeats)


def attention_of_one(repeats: int, rows: int = 64, heads: int = 4, size: int = 32, columns: int = 386) -> None:
    """Milliseconds of two layers' attention of one token a row, by context."""
    layers = [[torch.randn(rows, heads, columns, size) for _ in range(2)] for _ in range(2)]
    query = torch.randn(rows, heads, size)
    for context in (100, 215, 380):
        seen = torch.ones(rows, context, dtype=torch.bool)
        seen_by_heads = seen[:, None, None]
        arms = {
            "sdpa": lambda k, v, m=seen_by_heads: scaled_dot_product_attention(query[:, :, None], k, v, attn_mask=m),
            "attend_one": lambda k, v, m=seen: attend_one(query, k, v, m, size**-0.5),
            "reading": lambda k, v: (k.sum(), v.sum()),
        }
        taken: dict[str, list[float]] = {name: [] for name in arms}
        for repeat in range(10 * repeats + 3):
            for name, arm in arms.items():
                began = time.perf_counter()
                for key, value in layers:
                    arm(key[:, :, :context], value[:, :, :context])
                taken[name] += [(time.perf_counter() - began) * 1e3][: repeat > 2]
        text = "   ".join(f"{name} {statistics.median(found):.2f}" for name, found in taken.items())
        ratio = statistics.median(a / b for a, b in zip(taken["sdpa"], taken["attend_one"], strict=True))
        print(f"attention of one, context {context:5}: {text} ms   sdpa / attend_one {ratio:.2f}")


def attention_of_rows(repeats: int, rows: int = 5, heads: int = 4, size: int = 32) -> None:
    """Milliseconds forward and backward, for rows of one rollout and of several."""
    module = torch.nn.Module()
    for rollouts in ([385], [150, 120, 115]):
        length = sum(rollouts)
        states = [torch.randn(rows, length, heads, size).transpose(1, 2).requires_grad_() for _ in range(3)]
        rollout = torch.arange(len(rollouts)).repeat_interleave(torch.tensor(rollouts))
        begin = torch.searchsorted(rollout, rollout).int()  # rollouts without a prompt that others share
        key_ranges = begin[None, :, None].expand(rows, -1, 3)
        seen = seen_columns(key_ranges)[:, None]
        gradient = torch.randn(rows, length, heads, size)
        arms = {
            "sdpa": lambda q, k, v, m=seen: scaled_dot_product_attention(q, k, v, attn_mask=m).transpose(1, 2),
            "in blocks": lambda q, k, v, m=seen: packed_attention(module, q, k, v, m)[0],
            "attend_rows": lambda q, k, v, s=key_ranges: attend_rows(q, k, v, s, size**-0.5),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for repeat in range(5 * repeats + 3):
            for name, arm in arms.items():
                began = time.perf_counter()
                out = arm(*states)
                halfway = time.perf_counter()
                torch.autograd.grad(out, states, gradient)
                both = (halfway - began) * 1e3, (time.perf_counter() - halfway) * 1e3
                taken[name] += [both][: repeat > 2]
        columns = [
            f"{name} {statistics.median(f for f, _ in found):.2f} + {statistics.median(b for _, b in found):.2f}"
            for name, found in taken.items()
        ]
        print(f"attention of {rows} rows of rollouts {rollouts}, forward + backward: {'   '.join(columns)} ms")


if __name__ == "__main__":
    main()
