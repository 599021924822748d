"""What each GPU holds, and whether a run fits: the five pairs of the paper, offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prune_opd.config import load_config
from prune_opd.errors import ConfigError
from prune_opd.preflight.memory import estimate_memory, model_shape, parameters_in_name
from prune_opd.preflight.plan import describe_plan
from prune_opd.preflight.topology import GPUs, parse_memory, per_gpu, topology_rows, verdict

ROOT = Path(__file__).parents[2] / "recipes"
PAIRS = ["justrl-1.5b", "r1-distill-7b-to-1.5b", "qwen3-4b-to-1.7b-base", "qwen3-4b-to-4b-base", "skywork-7b"]
CUDA = torch.device("cuda")  # which need not be here
NODE = GPUs(8, parse_memory("80GB"))


def rows(name: str, gpus: GPUs, *settings: str) -> dict[str, str]:
    config = load_config(ROOT / f"{name}.toml", settings)
    return dict(topology_rows(config, estimate_memory(config, CUDA), gpus))


@pytest.mark.parametrize("name", PAIRS)
def test_the_pairs_of_the_paper_fit_a_node_of_80_gb_and_no_number_is_missing(name):
    found = rows(f"paper/{name}", NODE)
    assert found["verdict"] == "fits"
    assert not any("unknown" in text for text in found.values())
    held = int(found["vLLM holds"].split()[0].replace(",", ""))
    assert held >= 8, "rollouts of the whole window"
    assert "unknown" not in describe_plan(load_config(ROOT / f"paper/{name}.toml"), NODE)


def test_what_does_not_fit_says_what_to_change():
    small = GPUs(8, parse_memory("24GB"))
    text = rows("paper/skywork-7b", small)["verdict"]
    assert "does not fit" in text and "rollout.vllm_gpu_memory_utilization" in text
    text = rows("paper/skywork-7b", small, "rollout.vllm_gpu_memory_utilization=0.8")["verdict"]
    assert "does not fit" in text and "GiB too much" in text and "model.teacher_model_server_url" in text
    whole = rows("paper/skywork-7b", NODE, "training.parallel=ddp")["verdict"]
    assert "does not fit" in whole and 'training.parallel = "fsdp2"' in whole


def test_shards_and_sleep_are_what_they_save():
    config = load_config(ROOT / "paper/skywork-7b.toml")
    memory = estimate_memory(config, CUDA)
    one, eight = per_gpu(config, memory, GPUs(1, 10**12)), per_gpu(config, memory, GPUs(8, 10**12))
    assert one is not None and eight is not None
    for name in ("student", "gradients", "AdamW state"):
        assert eight.resident[name] == one.resident[name] // 8
    awake = load_config(ROOT / "paper/skywork-7b.toml", ["rollout.vllm_enable_sleep_mode=false"])
    always = per_gpu(awake, memory, NODE)
    asleep = per_gpu(config, memory, NODE)
    assert always is not None and asleep is not None
    assert always.resident["vLLM's share"] == asleep.rollout["vLLM's share"] == int(0.4 * NODE.bytes)
    assert always.peak > asleep.peak and verdict(awake, always, NODE) != "fits"


def test_a_sharded_teacher_is_a_share_and_what_is_whole_while_it_scores():
    """A layer or two, embeddings and head of Skywork-OR1-7B in bfloat16, beside an eighth of it."""
    whole, shared = (
        rows("paper/skywork-7b", NODE, f"model.teacher_placement={placement}")
        for placement in ("replicated", "sharded")
    )
    assert (whole["teacher"], shared["teacher"]) == ("14.2 GiB", "1.8 GiB")
    assert "gathered teacher" not in whole and shared["gathered teacher"].startswith("2.9 GiB")
    cramped = GPUs(8, parse_memory("40GB"))
    text = rows("paper/skywork-7b", cramped, "rollout.vllm_gpu_memory_utilization=0.7")["verdict"]
    assert "does not fit" in text and 'model.teacher_placement = "sharded"' in text


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("74.5 GiB", int(74.5 * 2**30)), ("24gb", 24 * 10**9)]
)
def test_sizes_as_people_write_them(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "-1GB", "0GB", "80TB", ""])
def test_a_size_that_is_none_is_named(text):
    with pytest.raises(ConfigError, match="write it as 80GB"):
        parse_memory(text)


def test_the_shapes_in_the_table_have_as_many_parameters_as_the_names_say():
    """Of all models that recipes name: a wrong width or depth shows."""
    for name in PAIRS:
        config = load_config(ROOT / f"paper/{name}.toml")
        for model in (config.model.model_name_or_path, config.model.teacher_model_name_or_path):
            assert model_shape(model, config.model) is not None
            said = parameters_in_name(model) or 0
            memory = estimate_memory(load_config(ROOT / f"paper/{name}.toml", [f'model.model_name_or_path="{model}"']))
            assert (memory.student or 0) / 4 == pytest.approx(said, rel=0.2), model
