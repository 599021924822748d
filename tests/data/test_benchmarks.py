from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prune_opd.data.benchmarks import BENCHMARKS, BOXED_SUFFIX, load_benchmark
from prune_opd.data.tasks import problems
from prune_opd.errors import ConfigError, DataError
from prune_opd.evaluation.graders import grade, is_right

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FILES = ["amc23-40", "amc23-83", "aime24", "aime25", "hmmt-feb-25", "math-500", "gsm8k"]
ASKS_FOR_A_BOX = re.compile(r"final answer within \\boxed")

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template=template)


def write(path: Path, count: int, **columns: str) -> Path:
    rows = [{"problem": f"p{i}", "answer": str(i), **columns} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- the real files ----


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_real_files_have_their_problems_one_suffix_and_a_gold_answer(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = load_benchmark(name, tokenizer, data_dir=DATA)
    assert len(prompts) == BENCHMARKS[name].problems
    for prompt in prompts:
        assert len(ASKS_FOR_A_BOX.findall(prompt.text)) == 1, prompt.text
        assert prompt.answer
        assert str(DATA) in prompt.source


@needs_data
@pytest.mark.parametrize(
    ("name", "start", "gold"),
    [
        ("amc23-40", "Cities $A$ and $B$ are $45$ miles", "27"),
        ("amc23-83", r"$\frac{m}{n}$ is the Irreducible", "142.0"),
        ("aime24", "Every morning Aya", r"\boxed{204}"),
        ("aime25", "Find the sum of all integer bases", "70"),
        ("hmmt-feb-25", "Compute the sum of the positive divisors", "103"),
        ("math-500", "Convert the point", r"\left( 3, \frac{\pi}{2} \right)"),
        ("gsm8k", "Janet", "18"),
    ],
)
def test_first_problem(name: str, start: str, gold: str, tokenizer: PreTrainedTokenizerFast) -> None:
    (prompt,) = load_benchmark(name, tokenizer, data_dir=DATA, num_problems=1)
    assert prompt.text.startswith(start)
    assert prompt.answer == gold
    assert is_right(prompt, rf"so \boxed{{{gold}}}")
    assert not is_right(prompt, r"so \boxed{12345}")


@needs_data
def test_the_two_sets_called_amc23_are_not_mixed_up(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "amc23_40.parquet").write_bytes((DATA / "amc23_83.parquet").read_bytes())
    with pytest.raises(DataError, match="amc23_40.parquet: 83 problems, but amc23-40 has 40"):
        load_benchmark("amc23-40", tokenizer, data_dir=tmp_path)
    assert len(load_benchmark(str(tmp_path / "amc23_40.parquet"), tokenizer)) == 83  # a path is taken as it is
    with pytest.raises(DataError, match="amc23-40, amc23-83"):
        load_benchmark("amc23", tokenizer, data_dir=DATA)


# ---- finding ----


@pytest.mark.parametrize("spelling", ["aime24", "AIME24", "aime-24", "AIME_2024"])
@pytest.mark.parametrize("file", ["aime24.jsonl", "AIME-2024.json", "aime_24_test.jsonl"])
def test_names_in_any_spelling(spelling: str, file: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write(tmp_path / file, 30)
    write(tmp_path / "aime25.jsonl", 30)
    prompts = load_benchmark(spelling, tokenizer, data_dir=tmp_path, num_problems=4)
    assert [p.answer for p in prompts] == ["0", "1", "2", "3"]
    assert file in prompts[0].source
    assert prompts[0].text == f"p0 {BOXED_SUFFIX}"


def test_a_folder_in_the_data_dir(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "hmmt_feb_26").mkdir()
    write(tmp_path / "hmmt_feb_26" / "problems.jsonl", 33)
    assert len(load_benchmark("hmmt-feb-26", tokenizer, data_dir=tmp_path)) == 33


def test_two_candidates_are_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name in ("aime24.jsonl", "aime_24.jsonl"):
        write(tmp_path / name, 30)
    with pytest.raises(DataError, match="aime24.jsonl and aime_24.jsonl may both be aime24"):
        load_benchmark("aime24", tokenizer, data_dir=tmp_path)


@pytest.mark.parametrize("count", [29, 31])
def test_a_wrong_number_of_problems_is_an_error(count: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write(tmp_path / "aime24.jsonl", count)
    with pytest.raises(DataError, match=f"{count} problems, but aime24 has 30"):
        load_benchmark("aime24", tokenizer, data_dir=tmp_path, num_problems=3)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_comes_last_and_is_asked_for_the_right_columns(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is not reachable in tests: what stands in has each benchmark's columns and size, and decoys."""
    benchmark, asked = BENCHMARKS[name], []

    def hub(hub_id: str, config: str | None, *, split: str) -> list[dict[str, object]]:
        asked.append((hub_id, config, split))
        row = {"prompt": "decoy", benchmark.prompt_column: "real", benchmark.answer_column: 7, "solution": "8"}
        return [row] * benchmark.problems

    monkeypatch.setattr(datasets, "load_dataset", hub)
    prompts = load_benchmark(name, tokenizer, data_dir=tmp_path, prompt_suffix="")
    hub_id, _, config = benchmark.hub_id.partition(":")
    assert asked == [(hub_id, config or None, benchmark.split)]
    assert {(p.text, p.answer) for p in prompts} == {("real", "7")}


def test_unknown_names_list_what_there_is(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'aime99' is no benchmark.*aime24.*gsm8k"):
        load_benchmark("aime99", tokenizer)
    with pytest.raises(DataError, match="no such folder"):
        load_benchmark("aime24", tokenizer, data_dir=tmp_path / "none")
    with pytest.raises(DataError, match="missing.jsonl"):
        load_benchmark(str(tmp_path / "missing.jsonl"), tokenizer)


def test_files_get_no_suffix_of_their_own(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", 2)
    assert load_benchmark(str(path), tokenizer)[0].text == "p0"
    assert load_benchmark(str(path), tokenizer, prompt_suffix="Go.")[0].text == "p0 Go."


# ---- tasks without end ----


def test_the_embedded_task(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = load_benchmark("task:chain_sum", tokenizer)
    assert len(prompts) == 100
    expected = list(islice(problems("held_out", 0), 3))
    assert [p.text for p in prompts[:3]] == [problem.prompt for problem in expected]
    assert all(grade(problem.solution, p.answer) for problem, p in zip(expected, prompts, strict=False))
    assert len(load_benchmark("task:chain_sum", tokenizer, num_problems=7)) == 7


def test_a_task_of_reasoning_gym(tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: make setup-smollm")
    prompts = load_benchmark("reasoning_gym:knights_knaves", tokenizer, num_problems=3, prompt_suffix="Think.")
    assert len({p.text for p in prompts}) == 3
    assert all(p.text.endswith(" Think.") for p in prompts)
    for prompt, other in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
        assert is_right(prompt, f"<answer>{prompt.answer}</answer>")
        assert not is_right(prompt, "<answer>I cannot tell</answer>")
        assert is_right(prompt, f"<answer>{other.answer}</answer>") == (prompt.answer == other.answer)


def test_no_such_task_of_reasoning_gym(tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: make setup-smollm")
    with pytest.raises(ConfigError, match="no task 'knight_knaves'; there are knights_knaves"):
        load_benchmark("reasoning_gym:knight_knaves", tokenizer)
    with pytest.raises(ConfigError, match="does not take these settings.*knights"):
        load_benchmark("reasoning_gym:knights_knaves?knights=3", tokenizer)
