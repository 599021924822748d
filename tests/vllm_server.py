"""How tests start a real vLLM server on a CPU; only where vLLM is installed (`make test-engines`)."""

from __future__ import annotations

import os
import sys

from prune_opd.models.loading import resolve_model
from prune_opd.rollout.vllm import ENVIRONMENT

VOCAB = 149  # of the embedded models


def command(port: int, *arguments: str) -> list[str]:
    """Its command line."""
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "400", "--max-logprobs", str(VOCAB), "--host", "127.0.0.1", "--port", str(port)]
    return [*words, *arguments]


def environment() -> dict[str, str]:
    """Its environment."""
    ours = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    return {**os.environ, **ours}


def student_arguments() -> list[str]:
    """As docs/scaling.md starts the student's server on a CPU."""
    words = ["--model", resolve_model("embedded:low-student"), "--served-model-name", "student"]
    words += ["--load-format", "dummy", "--hf-overrides", '{"tie_word_embeddings": false}']
    return [*words, "--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048", "--max-num-seqs", "8"]
