"""Arbitrary recipes, prompts, manifests, logs and answers: taken or refused by an error of ours, nothing else."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prune_opd.config import DataSection, load_config, setting_names
from prune_opd.data.prompts import load_prompts
from prune_opd.errors import PruneOPDError
from prune_opd.evaluation.graders import extract_answer, grade
from prune_opd.training.checkpoint import MANIFEST, damage_of
from prune_opd.training.files import log_end

from .test_malformed import HEAD, tokenizer  # noqa: F401  # a fixture

bounded = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
TOML_VALUE = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.booleans().map(lambda b: str(b).lower()),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20).map(
        lambda t: json.dumps(t, ensure_ascii=False)
    ),
    st.just("[]"),
    st.just("{}"),
    st.just("2026-01-01"),
    st.text(max_size=10),
)


def taken_or_refused(action) -> bool:
    """Whether it was taken; anything but an error of ours is a failure of the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
        except PruneOPDError as error:
            assert str(error)
            return False
    return True


@bounded
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_a_recipe(tmp_path, content):
    (tmp_path / "recipe.toml").write_bytes(content)
    assert not taken_or_refused(lambda: load_config(tmp_path / "recipe.toml")), "no such bytes name two models"


@bounded
@given(chosen=st.dictionaries(st.sampled_from(sorted(setting_names())), TOML_VALUE, max_size=4))
def test_any_values_of_known_settings(tmp_path, chosen):
    lines = [f"{name} = {value}" for name, value in chosen.items()]
    (tmp_path / "recipe.toml").write_text("\n".join(lines) + "\n" + HEAD, encoding="utf-8")
    taken_or_refused(lambda: load_config(tmp_path / "recipe.toml"))
    (tmp_path / "plain.toml").write_text(HEAD)
    taken_or_refused(lambda: load_config(tmp_path / "plain.toml", [line.replace(" = ", "=", 1) for line in lines]))


def data(path):
    return DataSection(train=str(path), max_prompt_length=100)


@bounded
@given(rows=st.lists(JSON | st.fixed_dictionaries({"prompt": JSON}, optional={"answer": JSON}), max_size=3))
def test_any_json_as_prompts(tmp_path, tokenizer, rows):  # noqa: F811
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken_or_refused(lambda: load_prompts(data(tmp_path / "a.jsonl"), tokenizer))


@bounded
@given(content=st.binary(max_size=300))
def test_any_bytes_as_prompts(tmp_path, tokenizer, content):  # noqa: F811
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(content)
        taken_or_refused(lambda name=name: load_prompts(data(tmp_path / name), tokenizer))


@bounded
@given(content=JSON.map(json.dumps).map(str.encode) | st.binary(max_size=200))
def test_any_manifest_is_damage(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    assert damage_of(tmp_path)


@bounded
@given(
    step=st.integers(),
    files=st.dictionaries(
        st.text(max_size=12) | st.sampled_from(["../x", "/etc/passwd", "trainer_state.json", "a/../../b", "\0", "."]),
        st.fixed_dictionaries({"size": st.integers(), "sha256": st.text("0123456789abcdef", min_size=63, max_size=64)}),
        max_size=3,
    ),
)
def test_any_listing_is_damage_and_reads_nothing_outside(tmp_path, step, files):
    (tmp_path / MANIFEST).write_text(json.dumps({"step": step, "files": files}))
    (tmp_path / "trainer_state.json").write_text("{}")
    opened, take = [], Path.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *a, **k: opened.append(self) or take(self, *a, **k))
        assert damage_of(tmp_path)
    assert all(path.resolve().is_relative_to(tmp_path.resolve()) for path in opened)


@bounded
@given(
    content=st.binary(max_size=200) | st.lists(JSON, max_size=4).map(lambda v: "\n".join(map(json.dumps, v)).encode())
)
def test_any_log(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    if taken_or_refused(lambda: log_end(tmp_path / "metrics.jsonl", 3)):
        end, _ = log_end(tmp_path / "metrics.jsonl", 3)
        assert end <= len(content) and all(json.loads(line)["step"] <= 3 for line in content[:end].splitlines())


PIECES = st.sampled_from(
    [*("\\boxed{", "}", "{", "\\frac", "####", "Answer:", "$", "\\", "1", "/", "2", ",", "%", "\\text{", "^", "_", " ")]
    + [
        "\n",
        "\0",
        "\ud800",
        "x",
        "=",
        "\\left(",
        "\\right)",
        "\\sqrt",
        "π",
        "٣",
        "<answer>",
        "\\begin{matrix}",
        "&",
        "-",
    ]
)


@bounded
@given(pieces=st.lists(PIECES | st.text(max_size=5), max_size=30))
def test_an_answer_is_found_or_not_in_any_text(pieces):
    found = extract_answer("".join(pieces))
    assert found is None or found.strip()


@settings(max_examples=25)
@given(response=st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join), gold=st.text(max_size=8))
def test_the_grader_takes_any_text(response, gold):
    assert grade(f"\\boxed{{{response}}}", gold) in (True, False)
    assert grade(response, gold) in (True, False)
