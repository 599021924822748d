"""The benchmark's counted work against torch's own counter, and what it makes of samples. No times are asserted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
SHAPE = Qwen3Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


def work_of(scaling, **changes):
    settings = {"rollouts": 3, "length": 12, "micro_batch_tokens": 16384, "slots": 3, "width": 4}
    return scaling.least_work(SHAPE, **settings | changes)


def test_operations_are_those_that_torch_counts(scaling):
    """Torch counts attention over the whole square, ours over the causal half: compared with the square put back."""
    B, T, P = 3, 12, scaling.PROMPT_TOKENS
    model = scaling.Qwen3ForCausalLM._from_config(SHAPE, attn_implementation="eager")  # torch does not count sdpa's
    S = P + T - 1
    ids = torch.randint(SHAPE.vocab_size, (B, S))
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, P - 1 :]
        _ = hidden @ model.lm_head.weight.t()
    square = SHAPE.num_hidden_layers * 4 * SHAPE.num_attention_heads * SHAPE.head_dim * B * (S * S - S * (S + 1) / 2)
    assert work_of(scaling)["teacher"].operations == pytest.approx(counter.get_total_flops() - square)


def test_sampling_does_the_work_of_a_forward_over_what_it_says(scaling):
    """Decoding token by token needs the same products as one causal forward, less the prompt that is prefilled."""
    work, P = work_of(scaling), scaling.PROMPT_TOKENS
    per_token = SHAPE.num_hidden_layers * 2 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 64)
    prefill = 3 * (P - 1) * per_token + SHAPE.num_hidden_layers * 4 * 64 * 3 * P * (P - 1) / 2
    assert work["teacher"].operations - prefill == pytest.approx(work["rollout"].operations)


def test_more_rollouts_share_the_weights_of_a_decode_step(scaling):
    one, all_ = work_of(scaling, slots=1)["rollout"], work_of(scaling, slots=3)["rollout"]
    weights = sum(p.numel() for n, p in scaling.Qwen3ForCausalLM(SHAPE).named_parameters() if p.dim() == 2)
    assert one.operations == all_.operations
    assert one.bytes - all_.bytes == 2 * 12 * weights * 4


def test_attention_alone_grows_with_the_square(scaling):
    """Second differences of the operations are those of the pairs, and nothing else."""
    lengths = (10, 20, 30)
    a, b, c = (work_of(scaling, length=n)["teacher"].operations for n in lengths)
    assert c - 2 * b + a == pytest.approx(SHAPE.num_hidden_layers * 4 * 64 * 3 * 10 * 10)


def test_a_row_is_medians_and_shares_of_the_ceilings(scaling):
    ceilings = scaling.Ceilings(operations_per_second=100.0, bytes_per_second=10.0)
    work = {"rollout": scaling.Work(50, 10), "teacher": scaling.Work(100, 1), "update": scaling.Work(50, 1)}
    samples = [
        {"wall": 20.0, "cpu": 10.0, "rollout": 10.0, "teacher": 6.0, "update": 4.0},
        {"wall": 10.0, "cpu": 8.0, "rollout": 5.0, "teacher": 3.0, "update": 2.0},
        {"wall": 90.0, "cpu": 9.0, "rollout": 45.0, "teacher": 27.0, "update": 18.0},
    ]
    row = scaling.summarise(samples, ceilings, work, tokens=1000)
    assert (row["us_per_token"], row["us_per_token_min"], row["us_per_token_max"]) == (9000, 8000, 10000)
    assert row["wall_us_per_token"] == 20000
    assert row["bound_us_per_token"] == pytest.approx(1e3 * (1.0 + 1.0 + 0.5))  # the first: its bytes
    assert row["of_bound"] == pytest.approx(2.5 / 9)
    assert row["of_matmul_ceiling"] == pytest.approx(200 / 9 / 100)
    assert row["of_copy_ceiling"] == pytest.approx(12 / 9 / 10)
    assert row["phases"]["rollout"]["us_per_token"] == pytest.approx(4500)  # half of each step


def test_a_real_step_of_every_phase_is_full_length(scaling):
    bench = scaling.Bench(SHAPE, device=torch.device("cpu"), dtype=torch.float32, threads=1)
    result, seconds = bench.step(bench.config(2, 5), 2)
    assert result.rollouts.lengths.tolist() == [5, 5]
    assert set(seconds) == {"wall", "cpu", *scaling.PHASES}
