"""verl's own `main_ppo` with the plug-in, on the CPU, and what such a run leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas
import torch
from safetensors.torch import load_file

from prune_opd.config import load_config
from prune_opd.data.source import training_prompts
from prune_opd.models.loading import load_tokenizer, resolve_model
from tests.integrations.verl_e2e.cpu import FAIL_AT, RECORDS

ROOT = Path(__file__).parents[3]
HERE = "tests.integrations.verl_e2e"
MODULES = f"{HERE}.cpu,prune_opd.integrations.verl,{HERE}.recorder"
PROMPTS, ROLLOUTS_OF_A_PROMPT, TOP_K, TEACHER_TOP_K = 4, 2, 8, 16
PRUNING = {
    "threshold": 0.6,
    "w_drop": 0.2,
    "dynamic_response_length.init_len": 24,
    "dynamic_response_length.min_len": 16,
    "dynamic_response_length.max_len": 64,
    "dynamic_response_length.step": 4,
    "dynamic_response_length.margin": 4,
    "dynamic_response_length.hit_ratio": 0.5,
    "dynamic_response_length.shrink_patience": 1,
}
OWN = "actor_rollout_ref.rollout.custom.prune_opd"
ACTOR, ROLLOUT, LOSS = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "distillation.distillation_loss"


def write_data(folder: Path, *, steps: int = 4, prompts_per_step: int = PROMPTS) -> None:
    """The embedded models with a chat template, which is the question itself, and prompts of the quickstart."""
    config = load_config(str(ROOT / "recipes" / "quickstart.toml"))
    tokenizer = load_tokenizer("embedded:low-student", config.model)
    for name in ("low-student", "high-student", "teacher"):
        shutil.copytree(resolve_model(f"embedded:{name}"), folder / name)
        path = folder / name / "tokenizer_config.json"
        template = {"chat_template": "{{ messages[-1]['content'] }}"}
        path.write_text(json.dumps(json.loads(path.read_text()) | template))
    source = training_prompts(config.data, tokenizer, seed=0)
    prompts = [prompt for step in range(steps) for prompt in source.batch(step, prompts_per_step)]
    rows = [
        {
            "data_source": ("sums", "others")[number % 2],
            "prompt": [{"role": "user", "content": tokenizer.decode(prompt.token_ids)}],
            "reward_model": {"style": "rule", "ground_truth": "0"},
            "extra_info": {"index": number},
        }
        for number, prompt in enumerate(prompts)
    ]
    pandas.DataFrame(rows).to_parquet(folder / "train.parquet")
    (folder / "reward.py").write_text("def compute_score(*args, **kwargs):\n    return 0.0\n")


def documented() -> dict[str, object]:
    """The settings of the launch command of docs/scaling.md."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"python -m verl\.trainer\.main_ppo (.*?)^```", page, re.MULTILINE | re.DOTALL)
    words = text.replace("\\\n", " ").replace("$MORE", "").split()
    return dict(word.split("=", 1) for word in words)


def command(data: Path, out: Path, *, ranks: int, steps: int, changes: dict[str, object]) -> list[str]:
    """The documented command with a small pair, a CPU's numbers and float32, then the changes of a scenario.

    Ray's GPUs are made up. The student's server counts as being as large as there are ranks, so all hand over to one.
    """
    settings = documented() | {
        "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES": f"'{MODULES}'",
        "+ray_kwargs.ray_init.num_gpus": ranks + 2,
        "+ray_kwargs.ray_init.include_dashboard": "false",
        "+ray_kwargs.ray_init.object_store_memory": 500_000_000,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "transfer_queue.backend.SimpleStorage.total_storage_size": 1000,
        "trainer.n_gpus_per_node": ranks,
        "trainer.device": "cpu",
        "trainer.total_training_steps": steps,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.val_before_train": "false",
        "trainer.logger": "[console,file]",
        "trainer.default_local_dir": out / "checkpoints",
        "data.train_files": data / "train.parquet",
        "data.val_files": data / "train.parquet",
        "data.train_batch_size": PROMPTS,
        "data.max_prompt_length": 64,
        "data.max_response_length": 64,
        "data.dataloader_num_workers": 0,
        "reward.custom_reward_function.path": data / "reward.py",
        "reward.num_workers": 1,
        "actor_rollout_ref.model.path": data / "low-student",
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        f"{ACTOR}.ppo_mini_batch_size": PROMPTS,
        f"{ACTOR}.ppo_max_token_len_per_gpu": 256,
        f"{ACTOR}.optim.lr": 5e-5,
        f"{ACTOR}.fsdp_config.model_dtype": "fp32",
        f"+{ACTOR}.fsdp_config.mixed_precision": "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        f"{ACTOR}.fsdp_config.use_torch_compile": "false",
        f"{ROLLOUT}.n": ROLLOUTS_OF_A_PROMPT,
        f"{ROLLOUT}.tensor_model_parallel_size": ranks,
        f"{ROLLOUT}.val_kwargs.n": 1,
        f"{ROLLOUT}.val_kwargs.top_p": 1.0,
        f"{ROLLOUT}.agent.num_workers": 1,
        "distillation.n_gpus_per_node": 1,
        "distillation.teacher_models.teacher_model.model_path": data / "teacher",
        f"{LOSS}.topk": TEACHER_TOP_K,
        f"+{OWN}.objective.top_k": TOP_K,
    }
    settings |= {f"+{OWN}.pruning.{name}": value for name, value in PRUNING.items()}
    settings |= changes
    return [sys.executable, "-m", "verl.trainer.main_ppo", *(f"{name}={value}" for name, value in settings.items())]


@dataclass(frozen=True)
class Step:
    """One step of a run. metrics: as verl's file logger has them · rollouts: what recorder.py wrote, of all ranks ·
    weights: what the student's server had after it.
    """

    metrics: dict[str, float]
    rollouts: list[dict[str, object]]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class VerlRun:
    """A run that has ended. code: of the process · log: what it printed."""

    folder: Path
    code: int
    log: str

    @cached_property
    def weights(self) -> list[dict[str, torch.Tensor]]:
        """What the student's server was given: before the first step, and after each."""
        paths = sorted(self.folder.glob("student-0-*.safetensors"), key=lambda path: int(path.stem.split("-")[-1]))
        return [load_file(path) for path in paths]

    @cached_property
    def steps(self) -> list[Step]:
        """The steps that were logged."""
        found = []
        for number, line in enumerate((self.folder / "metrics.jsonl").read_text().splitlines()):
            rollouts = []
            for path in sorted(self.folder.glob(f"actor-*-{number}.pt")):
                for part in torch.load(path, weights_only=False):
                    rollouts += [dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)]
            found.append(Step(json.loads(line)["data"], rollouts, self.weights[number + 1]))
        return found


def train(
    data: Path,
    out: Path,
    *,
    ranks: int = 1,
    steps: int,
    fail_at: int | None = None,
    changes: dict[str, object] | None = None,
) -> VerlRun:
    """Run it to its end, which may be an error."""
    out.mkdir(parents=True)
    environment = os.environ | {
        "VERL_USE_EXTERNAL_MODULES": MODULES,
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_enable_worker_prestart": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "HYDRA_FULL_ERROR": "1",
        "HF_HUB_OFFLINE": "1",
        "VERL_FILE_LOGGER_PATH": str(out / "metrics.jsonl"),
        RECORDS: str(out),
    }
    if fail_at is not None:
        environment[FAIL_AT] = str(fail_at)
    arguments = command(data, out, ranks=ranks, steps=steps, changes=changes or {})
    with (out / "log").open("w") as log:
        code = subprocess.run(arguments, env=environment, cwd=out, stdout=log, stderr=subprocess.STDOUT).returncode
    return VerlRun(out, code, (out / "log").read_text(errors="replace"))
