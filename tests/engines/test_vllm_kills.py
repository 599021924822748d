"""A run that samples with vLLM, killed and resumed: tests/reliability/kills.py and kill_ranks.py with that sampler."""

from __future__ import annotations

import pytest

from tests.reliability.kills import IN_FLIGHT
from tests.reliability.test_kills import check, kill
from tests.reliability.test_ranks import strike

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-engines installs it")


@pytest.mark.slow
def test_killed_at_three_moments_and_resumed():
    rows = kill(3, ["rollout.use_vllm=true", *IN_FLIGHT])
    check(rows)
    assert sum(row["signals"][0] != 0 for row in rows) == 3


@pytest.mark.slow
def test_a_rank_with_an_engine_is_killed_and_the_run_is_the_same():
    """On a CPU, and as prune-opd starts it, the engine has no process of its own: it dies with its rank."""
    (row,) = strike("--victims", "1", "--moments=1", "--settings", "rollout.use_vllm=true")
    assert row["difference"] is None and row["exit"] == 1


@pytest.mark.slow
def test_real_servers_die_in_the_middle_of_a_run():
    """One replica, the engine behind it, then both: with one left nothing is lost; with none all ranks save."""
    rows = strike("--vllm", "--victims", "replica", "engine", "servers", "--moments=1")
    assert [row["difference"] for row in rows] == [None] * 3
    assert rows[2]["exit"] != 0 or rows[2]["late"]
