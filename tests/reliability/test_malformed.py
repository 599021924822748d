"""Malformed recipes, prompts, checkpoints and run directories: each a named error that says where and what to do.

The corpus is the tables below. After each the disk is as it was: no file made, changed or removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import re
import shutil
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prune_opd.config import DataSection, load_config
from prune_opd.data.prompts import load_prompts
from prune_opd.errors import CheckpointError, ConfigError, DataError, PruneOPDError, RunDirectoryError, StorageError
from prune_opd.training import checkpoint as checkpoint_module
from prune_opd.training.checkpoint import MANIFEST, RANDOM, STATE, damage_of
from prune_opd.training.optimizer_state import FIRST_ROWS
from prune_opd.training.trainer import Trainer

from .kills import RECIPE, SMALL

REMEDY = re.compile(
    r"change|remove|repair|use |give |put |add |did you mean|there are|there is|see |set |check|choose|write |download"
    r"|resume|fill in|convert|continue|bring|raise|lower|quote|expected",
    re.IGNORECASE,
)


def snapshot(folder: Path) -> dict[str, str]:
    """Every path in a folder with what it holds."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


def refused(action, kind, folder, *names) -> str:
    """`action` raises `kind` with a message that names the place and a remedy, and leaves `folder` alone."""
    before = snapshot(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PruneOPDError) as caught:
            action()
    assert type(caught.value) in (kind if isinstance(kind, tuple) else (kind,)), repr(caught.value)
    message = str(caught.value)
    for name in names:
        assert name in message, message
    assert REMEDY.search(message), f"no remedy in: {message}"
    assert len(message) < 3000, "the message repeats what it was given"
    assert snapshot(folder) == before
    return message


# ---- recipes ----

HEAD = '[model]\nmodel_name_or_path = "a"\nteacher_model_name_or_path = "b"\n[data]\ntrain = "x.jsonl"\n'
# Lines after HEAD, whose last line is 5: the fault stands in line 7.
SETTINGS = {
    "training": [
        *("steps = 0", "steps = -1", "steps = 1.5", 'steps = "many"', "steps = true", "steps = []", "steps = {}"),
        *("steps = nan", "steps = 2026-01-01", "learning_rate = 0", "learning_rate = -1", "learning_rate = inf"),
        *("learning_rate = nan", 'learning_rate = "fast"', "warmup_steps = -1", "weight_decay = -0.1", "seed = -1"),
        *("adam_beta1 = 1", "adam_beta2 = 1.0", "max_grad_norm = 0", "micro_batch_tokens = 0", "threads = -1"),
        *("save_every = 0", "keep_last = 0", "keep_every = 0", "max_skipped_steps = -1", 'bf16 = "perhaps"'),
        *('lr_scheduler_type = "cosine"', "stepz = 3", "device = 3", "lr = 1", '"" = 1', '"a b" = 1', "é = 1"),
        *("optimizer.lr = 1", "steps.x = 1"),
    ],
    "rollout": [
        *("prompts_per_step = 0", "num_generations = 0", "max_completion_length = 0", "temperature = 0"),
        *("temperature = -1", "top_p = 0", "top_p = 1.1", "slots = 0", "slots = 1.5", "n = 4", "temperature = []"),
    ],
    "pruning": [
        *("threshold = -0.1", "threshold = 1.1", 'metric = "overlap"', "w_drop = -1", "w_drop = 2", "w_base = -1"),
        *("positive_eps = 1", 'enable = "maybe"', "teacher_top_p = 0", "in_flight = true", "in_flight.chunk = 0"),
        *("in_flight.audit_share = 2", "in_flight.stop_after_events = 0", "repetition.max_period = 0"),
        *("dynamic_response_length.hit_ratio = 0", "dynamic_response_length.step = 0", "gamma = 0.7"),
        *("dynamic_response_length.margin = -1", "dynamic_response_length = 5", "threshold = nan"),
    ],
    "objective": [
        *('loss = "kl"', "top_k = 0", 'top_k_strategy = "both"', 'reward_weight_mode = "p"', "jsd_beta = 0"),
        *("jsd_beta = 1", 'weight_normalization = "sum"', "loss = 1", "top_k = -3", "beta = 1"),
    ],
    "evaluation": [
        *("every = 0", "k = 0", "num_problems = 0", "temperature = -1", "top_p = 0", "max_tokens = 0", "data = 1"),
    ],
    "tracking": ['report_to = "wandb"', 'report_to = ["mlflow"]', "rollouts_per_step = -1", "report_to = [1]"],
}
TOML = {  # whole files
    "a bare word": (HEAD + "[training]\nsteps = many\n", 7),
    "no value": (HEAD + "[training]\nsteps =\n", 7),
    "no equals": (HEAD + "[training]\nsteps\n", 7),
    "an open string": (HEAD + '[training]\ndevice = "cpu\n', 7),
    "an open table": (HEAD + "[training\nsteps = 1\n", 6),
    "a key twice": (HEAD + "[training]\nsteps = 1\nsteps = 2\n", 8),
    "a table twice": (HEAD + "[training]\n[training]\n", 7),
    "a backslash": (HEAD + '[training]\ndevice = "c:\\q"\n', 7),
    "a NUL": (HEAD + '[training]\ndevice = "\0"\n', 7),
    "JSON": ('{"model": {}}', 1),
    "YAML": ("model:\n  name: a\n", 1),
    "a tab in a key": ("a\tb = 1\n", 1),
    "a section as a value": ("model = 3\n" + HEAD.partition("[data]")[1] + '\ntrain = "x"\n', 1),
    "a list of sections": (HEAD + "[[training]]\nsteps = 1\n", 6),
    "no section": ("steps = 3\n" + HEAD, 1),
    "an unknown section": (HEAD + "[trainning]\nsteps = 3\n", 6),
    "endless nesting": (HEAD + "[training]\nsteps = " + "[" * 5000 + "\n", None),
    "an endless number": (HEAD + "[training]\nsteps = " + "9" * 5000 + "\n", None),
    "nothing": ("", None),
    "a missing model": ('[data]\ntrain = "x"\n', None),
    "extends a number": ("extends = 3\n", None),
    "extends itself": ('extends = "recipe.toml"\n', None),
    "extends nothing": ('extends = "nowhere.toml"\n', None),
    "extends a folder": ('extends = "."\n', None),
    "extends NUL": ('extends = "a\\u0000b"\n', None),
    "extends a very long name": (f'extends = "{"x" * 300}"\n', None),
    "a window upside down": (
        HEAD + "[pruning.dynamic_response_length]\nmin_len = 9\nmax_len = 3\ninit_len = 5\n",
        None,
    ),
    "a window above the budget": (HEAD + "[rollout]\nmax_completion_length = 3000\n", None),
    "all warm-up": (HEAD + "[training]\nsteps = 3\nwarmup_steps = 3\n", None),
    "keep what is never saved": (HEAD + "[training]\nsave_every = 4\nkeep_every = 6\n", None),
    "a token": (HEAD.replace('"x.jsonl"', f'"hf_{"a1B2" * 9}"'), 5),
    "a password": (HEAD.replace('"a"', '"https://me:secret@host/x"'), 2),
    "a key": (HEAD + f'[data.chat_template_kwargs]\nkey = "sk-{"a1B2" * 9}"\n', 7),
}
SETS = [
    *("training.steps", "=", "=3", ".=3", "training..steps=3", "training.steps=", "training.steps=x", "steps=3"),
    *("model=3", "training=[]", "training.steps.x=1", "training.steps=[[", "model.lora=1", "training.steps=9e99"),
    *(f"training.steps={'9' * 5000}", "training.\0=1", "data.train="),
]


@pytest.mark.parametrize(
    ("section", "line"),
    [(section, line) for section, lines in SETTINGS.items() for line in lines],
    ids=lambda v: v[:40],
)
def test_a_wrong_setting_is_named_with_its_line(tmp_path, section, line):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"{HEAD}[{section}]\n{line}\n")
    refused(lambda: load_config(recipe), ConfigError, tmp_path, f"{recipe}:7: ")


@pytest.mark.parametrize("name", TOML)
def test_a_broken_recipe_is_named_with_its_line(tmp_path, name):
    text, line = TOML[name]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    message = refused(lambda: load_config(recipe), ConfigError, tmp_path, str(tmp_path))
    assert line is None or f"{recipe}:{line}: " in message
    assert not re.search("a1B2a1B2|secret", message), "the message repeats a secret"


@pytest.mark.parametrize("content", [b"\xff\xfe[model]", b"\x80", b"PK\x03\x04", bytes(64)], ids=repr)
def test_a_recipe_that_is_no_text(tmp_path, content):
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(content)
    refused(lambda: load_config(recipe), ConfigError, tmp_path, str(recipe))


@pytest.mark.parametrize("override", SETS, ids=lambda v: v[:30])
def test_a_wrong_override(tmp_path, override):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(HEAD)
    refused(lambda: load_config(recipe, [override]), ConfigError, tmp_path)


def test_a_fault_of_an_inherited_recipe_is_placed_in_its_file(tmp_path):
    (tmp_path / "base.toml").write_text(HEAD + "[training]\nsteps = 0\n")
    (tmp_path / "mine.toml").write_text('extends = "base.toml"\n[training]\nseed = 1\n')
    refused(lambda: load_config(tmp_path / "mine.toml"), ConfigError, tmp_path, f"{tmp_path / 'base.toml'}:7: ")


def test_a_recipe_that_is_right_is_not_refused(tmp_path):
    (tmp_path / "recipe.toml").write_text(HEAD + "[training]\nsteps = 3\n")
    assert load_config(tmp_path / "recipe.toml").training.steps == 3


# ---- prompts ----


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, no chat template."""
    symbols = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


GOOD = '{"prompt": "1+1=", "answer": "2"}'
LINES = [  # the second line of a JSONL file
    *("{", "}", "[", "null", "1", '"text"', "[]", "true", "NaN", "{'prompt': 'x'}", '{"prompt": "x"', '{"prompt": x}'),
    *('{"prompt": "x",}', '{"prompt"}', '{"prompt": "x"} {"prompt": "y"}', '{"prompt": "x"}]', "<html>", "prompt"),
    *('{"prompt": null}', '{"prompt": 1}', '{"prompt": 1.5}', '{"prompt": true}', '{"prompt": {}}', '{"prompt": []}'),
    *('{"prompt": ""}', '{"prompt": " "}', '{"prompt": "\\n\\t"}', '{"prompt": "\\u00a0"}', '{"prompt": {"a": 1}}'),
    *('{"prompt": [1]}', '{"prompt": [{}]}', '{"prompt": ["x"]}', '{"prompt": [null]}', '{"prompt": [[]]}'),
    *('{"prompt": [{"role": "user"}]}', '{"prompt": [{"content": "x"}]}', '{"prompt": [{"role": 1, "content": "x"}]}'),
    *('{"prompt": [{"role": "user", "content": 1}]}', '{"prompt": [{"role": "user", "content": null}]}'),
    *('{"prompt": [{"role": "assistant", "content": "x"}]}', '{"prompt": [{"role": "system", "content": "x"}]}'),
    *('{"prompt": [{"role": "user", "content": ""}]}', '{"prompt": [{"role": "user", "content": "hello"}]}'),
    *('{"prompt": "\\ud800"}', '{"prompt": "a\\udfffb"}', '{"prompt": "x\\u0000"}', '{"prompt": "\\ud83d x"}'),
    *('{"prompt": [{"role": "user", "content": "\\ud800"}]}', '{"prompt": [{"role": "\\ud800", "content": "x"}]}'),
    *('{"prompt": "x", "answer": "\\ud800"}', '{"prompt": "x", "answer": NaN}', '{"prompt": "x", "answer": Infinity}'),
    *('{"prompt": "x", "prompt": "y"}', '{"prompt": "x", "answer": "1", "answer": "2"}', '{"prompt": "\\x"}'),
    *(
        "{}",
        '{"text": "x"}',
        '{"Prompt": "x"}',
        '{"promt": "x"}',
        '{"prompt ": "x"}',
        '{"": "x"}',
        '{"prompts": ["x"]}',
    ),
    *(
        '{"prompt": "tab\there"}',
        "\\",
        "[" * 100_000,
        '{"a":' * 100_000,
        f'{{"prompt": {"9" * 5000}}}',
        '{"prompt": 01}',
    ),
]
BYTES = {
    "a.jsonl": [
        b"",
        b"\n\n",
        b" ",
        b"\xff\xfe",
        b"\x00",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b"PAR1",
    ],
    "a.parquet": [b"", b"PAR1", b"PAR1PAR1", b"PAR1" + bytes(100) + b"PAR1", b"{}", bytes(1000)],
    "a.csv": [b"prompt\nx\n"],
    "a.txt": [b"x"],
    "a": [b'{"prompt": "x"}'],
}
TABLES = {
    "no row": pa.table({"prompt": pa.array([], pa.string())}),
    "numbers": pa.table({"prompt": [1, 2]}),
    "nothing": pa.table({"prompt": pa.array([None, None], pa.string())}),
    "null in the second": pa.table({"prompt": ["x", None]}),
    "bytes": pa.table({"prompt": [b"x"]}),
    "lists": pa.table({"prompt": [["x"]]}),
    "structs": pa.table({"prompt": [{"a": 1}]}),
    "empty chats": pa.table(
        {"prompt": pa.array([[]], pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})))}
    ),
    "dates": pa.table({"prompt": pa.array([1], pa.timestamp("s"))}),
    "other columns": pa.table({"text": ["x"]}),
    "no column": pa.table({}),
    "one name twice": pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"]),
    "no UTF-8": pa.table({"prompt": pa.array([b"\xff"], pa.binary()).view(pa.string())}),
    "empty text": pa.table({"prompt": ["x", ""]}),
    "NUL": pa.table({"prompt": ["x", "a\0b"]}),
}


def load(path, tokenizer):
    data = DataSection(train="any", max_prompt_length=1000)
    return load_prompts(data.model_copy(update={"train": str(path)}), tokenizer)  # past what a recipe refuses


@pytest.mark.parametrize("line", LINES, ids=lambda v: v[:50])
def test_a_wrong_prompt_is_named_with_its_line(tmp_path, tokenizer, line):
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    refused(
        lambda: load(tmp_path / "a.jsonl", tokenizer), (DataError, *DataError.__subclasses__()), tmp_path, "a.jsonl:2"
    )


@pytest.mark.parametrize(
    ("name", "content"), [(n, c) for n, cs in BYTES.items() for c in cs], ids=lambda v: repr(v)[:30]
)
def test_a_file_that_holds_no_prompts(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_bytes(content)
    refused(lambda: load(tmp_path / name, tokenizer), DataError, tmp_path, str(tmp_path / name))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_holds_no_prompts(tmp_path, tokenizer, name):
    pq.write_table(TABLES[name], tmp_path / "a.parquet")
    kinds = (DataError, *DataError.__subclasses__())
    refused(lambda: load(tmp_path / "a.parquet", tokenizer), kinds, tmp_path, str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_parquet_file_that_was_cut_off(tmp_path, tokenizer, share):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": [f"{i} + {i}" for i in range(500)]}), buffer)
    whole = buffer.getvalue()
    (tmp_path / "a.parquet").write_bytes(whole[: int(share * len(whole))])
    refused(lambda: load(tmp_path / "a.parquet", tokenizer), DataError, tmp_path, str(tmp_path / "a.parquet"))


def test_a_parquet_file_with_a_spoilt_page(tmp_path, tokenizer):
    pq.write_table(pa.table({"prompt": [f"{i} + {i}" for i in range(500)]}), tmp_path / "a.parquet", compression="zstd")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[40:200] = bytes(160)
    (tmp_path / "a.parquet").write_bytes(content)
    refused(lambda: load(tmp_path / "a.parquet", tokenizer), DataError, tmp_path, str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "source", ["nowhere.jsonl", "a\0b", "x" * 300, "~nobody-of-that-name/x", "/", "../../nowhere/", ""]
)
def test_a_source_that_is_no_file(tmp_path, tokenizer, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    where = str(tmp_path / "empty") if source in ("/", "") else source
    refused(lambda: load(where, tokenizer), DataError, tmp_path)


def test_a_prompt_of_ten_megabytes_is_counted_not_trained_on(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(f'{GOOD}\n{{"prompt": "{"1 + " * 2_500_000}"}}\n')
    found = load(tmp_path / "a.jsonl", tokenizer)
    assert len(found.prompts) == 1 and found.dropped_too_long == 1


# ---- checkpoints and run directories ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with both checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = [*SMALL, "training.steps=2", "training.keep_last=2", "evaluation.num_problems=1"]
    Trainer(load_config(RECIPE, settings), folder, console=Console(quiet=True)).train()
    return folder


@pytest.fixture
def resume(run, tmp_path, monkeypatch):
    """resume(spoil): `spoil` a copy of the run, then resume it; models are not loaded before a fault is found."""

    def act(spoil, how="auto"):
        folder = tmp_path / "run"
        shutil.copytree(run, folder)
        spoil(folder)
        settings = [*SMALL, "training.steps=3", "training.keep_last=2", "evaluation.num_problems=1"]
        return lambda: Trainer(load_config(RECIPE, settings), folder, resume=how, console=Console(quiet=True))

    return act


def on_every_checkpoint(change):
    def spoil(folder):
        for checkpoint in (folder / "checkpoints").iterdir():
            change(checkpoint)

    return spoil


def edited_manifest(edit):
    def change(checkpoint):
        content = json.loads((checkpoint / MANIFEST).read_text())
        edit(content)
        (checkpoint / MANIFEST).write_text(json.dumps(content))

    return change


def bit_flipped(name):
    def change(checkpoint):
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return change


def cut(name):
    return lambda checkpoint: (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-3])


OPTIMIZER = "optimizer-00000.safetensors"
NEEDED = ("model.safetensors", OPTIMIZER, RANDOM, STATE, "config.json", "tokenizer.json", MANIFEST)
DAMAGE = {
    **{f"{name} is gone": lambda c, n=name: (c / n).unlink() for name in NEEDED},
    **{f"{name} is empty": lambda c, n=name: (c / n).write_bytes(b"") for name in NEEDED},
    **{f"{name} is cut off": cut(name) for name in NEEDED},
    **{f"{name} has one bit flipped": bit_flipped(name) for name in NEEDED[:-1]},
    **{f"{name} is a folder": lambda c, n=name: ((c / n).unlink(), (c / n).mkdir()) for name in NEEDED},
    **{
        f"the manifest is {text[:20]!r}": lambda c, t=text: (c / MANIFEST).write_text(t)
        for text in ("null", "[]", "{}", "3", '"x"', '{"step": 1}', '{"files": {}}', "[" * 100_000, "\0", "{" * 100)
    },
    "the manifest is no UTF-8": lambda c: (c / MANIFEST).write_bytes(b'{"step": "\xff"}'),
    "the manifest leaves it": edited_manifest(lambda m: m["files"].update({"../../../x": m["files"][STATE]})),
    "the manifest names a root": edited_manifest(lambda m: m["files"].update({"/etc/passwd": m["files"][STATE]})),
    "the manifest names NUL": edited_manifest(lambda m: m["files"].update({"a\0b": m["files"][STATE]})),
    "the manifest has a short hash": edited_manifest(lambda m: m["files"][STATE].update(sha256="ab")),
    "the manifest has a hash of another case": edited_manifest(lambda m: m["files"][STATE].update(sha256="A" * 64)),
    "the manifest has a negative size": edited_manifest(lambda m: m["files"][STATE].update(size=-1)),
    "the manifest has a size as text": edited_manifest(lambda m: m["files"][STATE].update(size="3")),
    "the manifest has more": edited_manifest(lambda m: m.update(extra=1)),
    "the manifest has no state": edited_manifest(lambda m: m["files"].pop(STATE)),
    "the manifest has no step": edited_manifest(lambda m: m.update(step=None)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path, resume, name):
    action = resume(on_every_checkpoint(DAMAGE[name]))
    refused(action, CheckpointError, tmp_path, str(tmp_path / "run/checkpoints"), "none is whole")
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        assert damage_of(checkpoint)


def test_a_damaged_checkpoint_that_was_asked_for_by_its_path_is_refused(tmp_path, resume):
    """An earlier one that is whole does not come in its place unasked."""
    last = tmp_path / "run/checkpoints/step_2"
    action = resume(lambda folder: DAMAGE[f"{OPTIMIZER} has one bit flipped"](last), str(last))
    refused(action, CheckpointError, tmp_path, f"{last} is damaged or incomplete", f"{OPTIMIZER} has changed")


def resigned(name, content):
    """A file of a checkpoint replaced by another, with a manifest that fits it: what only a person can make."""

    def change(checkpoint):
        (checkpoint / name).write_bytes(content if isinstance(content, bytes) else content(checkpoint / name))
        entry = {
            "size": (checkpoint / name).stat().st_size,
            "sha256": hashlib.sha256((checkpoint / name).read_bytes()).hexdigest(),
        }
        edited_manifest(lambda m: m["files"].update({name: entry}))(checkpoint)

    return change


class Hostile:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def rows_of(tensors, first=0):
    """A share of an optimiser as a rank would write it, whose rows begin at `first`."""
    return save(tensors, {FIRST_ROWS: json.dumps(dict.fromkeys(tensors, first))})


def edited_state(**changes):
    return lambda path: json.dumps(json.loads(path.read_text()) | changes).encode()


FORGED = {
    "a state of no fields": resigned(STATE, b"{}"),
    "a state that is a list": resigned(STATE, b"[]"),
    "a state with more": resigned(STATE, edited_state(more=1)),
    "a state without totals": resigned(STATE, edited_state(totals=None)),
    "totals of another version": resigned(STATE, edited_state(totals={"apples": 3})),
    "a negative step": resigned(STATE, edited_state(step=-1)),
    "a window as text": resigned(STATE, edited_state(window={"length": "x", "misses": 0})),
    "a window outside its limits": resigned(STATE, edited_state(window={"length": 9999, "misses": 0})),
    "a window without length": resigned(STATE, edited_state(window={"misses": 0})),
    "a config of nothing": resigned(STATE, edited_state(config={})),
    "a config of another version": resigned(STATE, edited_state(config={"model": {"new": 1}})),
    "an optimiser of nothing": resigned(OPTIMIZER, rows_of({})),
    "an optimiser without its header": resigned(OPTIMIZER, save({"a/step": torch.ones(())})),
    "an optimiser of another model": resigned(OPTIMIZER, rows_of({"another.weight/exp_avg": torch.ones(2, 2)})),
    "an optimiser with a row too few": resigned(OPTIMIZER, rows_of({"model.norm.weight/exp_avg": torch.ones(3)})),
    "an optimiser whose rows lie elsewhere": resigned(
        OPTIMIZER, rows_of({"model.norm.weight/exp_avg": torch.ones(3)}, 999)
    ),
    "an optimiser that is text": resigned(OPTIMIZER, b"not a safetensors file"),
    "a random state of nothing": resigned(RANDOM, save({})),
    "weights of another model": resigned("model.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
    "weights that are text": resigned("model.safetensors", b"hello"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_checkpoint_that_was_made_by_hand(tmp_path, resume, name):
    action = resume(on_every_checkpoint(FORGED[name]))
    refused(action, CheckpointError, tmp_path)


@pytest.mark.parametrize("name", [OPTIMIZER, RANDOM, "model.safetensors", STATE, "config.json", "tokenizer.json"])
def test_a_pickle_in_the_place_of_a_file_is_not_run(tmp_path, resume, name):
    trap = tmp_path / "trap"
    action = resume(on_every_checkpoint(resigned(name, saved({"optimizer": Hostile(str(trap))}))))
    with contextlib.suppress(PruneOPDError):  # a resume does not read all of them
        action()
    assert not trap.exists()


@pytest.mark.parametrize("name", ["optimizer/.metadata", "optimizer.pt", "pytorch_model.bin", "training_args.bin"])
def test_a_pickle_beside_the_files_is_not_run(tmp_path, resume, name):
    """Whoever added it also wrote it into the manifest; an optimiser in shards, torch reads its .metadata by pickle."""
    trap = tmp_path / "trap"

    def add(checkpoint):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        resigned(name, pickle.dumps(Hostile(str(trap))))(checkpoint)

    resume(on_every_checkpoint(add))()
    assert not trap.exists()


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


LOG_LINES = [
    "{}",
    "3",
    "null",
    "[]",
    "x",
    '{"step": null}',
    '{"step": "x"}',
    '{"step": 1',
    "\0",
    '{"step": []}',
    "[" * 9999,
]


@pytest.mark.parametrize("name", ["metrics.jsonl", "drift.jsonl", "rollouts.jsonl"])
@pytest.mark.parametrize("line", LOG_LINES, ids=lambda v: v[:20])
def test_a_damaged_line_within_a_log(tmp_path, resume, name, line):
    def spoil(folder):
        first, *rest = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join([first, line, *rest]) + "\n")

    refused(resume(spoil), CheckpointError, tmp_path, f"{tmp_path / 'run' / name}:2: ")


def without_checkpoints(spoil):
    def change(folder):
        shutil.rmtree(folder / "checkpoints")
        spoil(folder)

    return change


DIRECTORIES = {
    "config.json is cut off": (without_checkpoints(write("config.json", '{"model": ')), CheckpointError),
    "config.json is a list": (without_checkpoints(write("config.json", "[]")), CheckpointError),
    "config.json is null": (without_checkpoints(write("config.json", "null")), CheckpointError),
    "config.json is no UTF-8": (without_checkpoints(write("config.json", b"\xff")), CheckpointError),
    "config.json is of nothing": (without_checkpoints(write("config.json", "{}")), CheckpointError),
    "config.json is gone": (without_checkpoints(lambda f: (f / "config.json").unlink()), RunDirectoryError),
    "only somebody's notes": (lambda f: (shutil.rmtree(f), f.mkdir(), write("notes.txt", "x")(f)), RunDirectoryError),
    "a file in its place": (lambda f: (shutil.rmtree(f), f.write_text("x")), (StorageError, RunDirectoryError)),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_cannot_be_continued(tmp_path, resume, name):
    spoil, kind = DIRECTORIES[name]
    refused(resume(spoil), kind, tmp_path, str(tmp_path / "run"))


@pytest.mark.parametrize("how", ["nowhere", "checkpoints", "", ".", "/", "x" * 300, "a\0b"])
def test_a_path_to_resume_from_that_is_no_checkpoint(tmp_path, resume, how):
    refused(resume(lambda folder: None, how), CheckpointError, tmp_path)


def test_the_corpus_is_as_large_as_it_should_be():
    counts = [
        *(sum(map(len, SETTINGS.values())), len(TOML), 4, len(SETS), len(LINES), sum(map(len, BYTES.values()))),
        *(len(TABLES), 4, 1, 7, len(DAMAGE), len(FORGED), 1, 3 * len(LOG_LINES), len(DIRECTORIES), 7),
    ]
    assert sum(counts) >= 350


@pytest.mark.parametrize("how", ["auto", "path"])
def test_a_whole_copy_is_resumed_and_its_bytes_are_hashed_once(tmp_path, resume, monkeypatch, how):
    hashed, sha256 = [], checkpoint_module.sha256
    monkeypatch.setattr(checkpoint_module, "sha256", lambda path, **kw: hashed.append(path) or sha256(path, **kw))
    last = tmp_path / "run/checkpoints/step_2"
    assert resume(lambda folder: None, str(last) if how == "path" else how)().steps_done == 2
    assert sorted(hashed) == sorted(path for path in last.rglob("*") if path.is_file() and path.name != MANIFEST)
