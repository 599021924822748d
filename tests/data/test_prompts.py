from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prune_opd.config import DataSection
from prune_opd.data.prompts import PromptSet, load_prompts
from prune_opd.data.rows import _hub_rows
from prune_opd.errors import DataError, MissingColumnError
from prune_opd.types import Prompt

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('tools are not supported') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if not thinking | default(true) %}<think></think>{% endif %}{% endif %}"
)
SUFFIX = r"Reason step by step, and put the answer within \boxed{}."


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, one token a byte, that puts <bos> in front by itself; no chat template."""
    symbols = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def chatty(plain: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE
    )


@pytest.fixture
def write(tmp_path: Path):
    """write(name, rows or text): a JSONL or parquet file in tmp_path, and its path."""

    def write(name: str, content: list[dict[str, Any]] | str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(path)

    return write


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def load_set(source: str | Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> PromptSet:
    return load_prompts(DataSection(train=str(source), **{"max_prompt_length": 10_000} | settings), tokenizer)


def load(source: str | Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> tuple[Prompt, ...]:
    return load_set(source, tokenizer, **settings).prompts


# ---- what is recognised ----


def test_string_without_a_template_is_tokenised_as_it_is(write, plain) -> None:
    path = write("a.jsonl", [{"prompt": "1+1 é"}])
    (prompt,) = load(path, plain)
    assert prompt.text == "1+1 é"
    assert prompt.token_ids[0] == plain.bos_token_id
    assert plain.decode(prompt.token_ids, skip_special_tokens=True) == "1+1 é"
    assert (prompt.answer, prompt.source) == (None, f"{path}:1")


@pytest.mark.parametrize("row", [{"prompt": "1+1"}, {"prompt": user("1+1")}, {"messages": user("1+1")}])
def test_template_writes_the_turns_and_its_special_tokens_once(write, chatty, row) -> None:
    (prompt,) = load(write("a.jsonl", [row]), chatty)
    assert prompt.text == "<bos>[user]1+1[assistant]"
    assert prompt.token_ids.count(chatty.bos_token_id) == 1
    assert chatty.decode(prompt.token_ids) == prompt.text


def test_template_options_are_passed_on(write, chatty) -> None:
    (prompt,) = load(write("a.jsonl", [{"prompt": "1+1"}]), chatty, chat_template_kwargs={"thinking": False})
    assert prompt.text == "<bos>[user]1+1[assistant]<think></think>"


def test_assistant_turns_at_the_end_are_not_part_of_the_prompt(write, chatty) -> None:
    turns = [{"role": "system", "content": "s"}, *user("q"), {"role": "assistant", "content": "a"}]
    path = write("a.jsonl", [{"messages": turns}, {"messages": [*turns, *user("q2")]}])
    first, second = load(path, chatty)
    assert first.text == "<bos>[system]s[user]q[assistant]"
    assert second.text == "<bos>[system]s[user]q[assistant]a[user]q2[assistant]"


def test_verl_parquet(write, chatty) -> None:
    rows = [
        {"data_source": "d", "prompt": user(f"q{i}"), "reward_model": {"ground_truth": str(i), "style": "s"}}
        for i in range(3)
    ]
    path = write("a.parquet", rows)
    found = load(path, chatty)
    assert [p.text for p in found] == [f"<bos>[user]q{i}[assistant]" for i in range(3)]
    assert [p.answer for p in found] == ["0", "1", "2"]
    assert [p.source for p in found] == [f"{path}[{i}]" for i in range(3)]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("2 + 2 = <<2+2=4>>4\n#### 4", "4"),
        ("so\n#### 1,234,567", "1234567"),
        ("#### -5.5 ", "-5.5"),
        ("1,2", "1,2"),  # thousands separators go from worked answers only: this may be a pair
        ("  \\frac12 ", "\\frac12"),
        (7, "7"),
        (0, "0"),
        (0.5, "0.5"),
        ("", None),
        (None, None),
        (["7"], None),
    ],
)
def test_gold_answers(write, plain, answer, gold) -> None:
    (prompt,) = load(write("a.jsonl", [{"question": "q", "answer": answer}]), plain)
    assert prompt.answer == gold


def test_named_columns(write, plain) -> None:
    row = {"prompt": "no", "body": "yes", "answer": "no", "meta": {"gold": "8"}, "a.b": "9"}
    path = write("a.jsonl", [row])
    (prompt,) = load(path, plain, prompt_column="body", answer_column="meta.gold")
    assert (prompt.text, prompt.answer) == ("yes", "8")
    assert load(path, plain, answer_column="a.b")[0].answer == "9"


def test_column_that_is_null_gives_way_to_the_next(write, plain) -> None:
    path = write("a.parquet", [{"prompt": None, "question": "q"}, {"prompt": "p", "question": None}])
    assert [p.text for p in load(path, plain)] == ["q", "p"]


def test_order_duplicates_and_line_numbers_are_kept(write, plain) -> None:
    path = write("a.jsonl", '\ufeff{"prompt": "b"}\r\n\n{"prompt": "a"}\n{"prompt": "b"}')
    found = load(path, plain)
    assert [(p.text, p.source) for p in found] == [("b", f"{path}:1"), ("a", f"{path}:3"), ("b", f"{path}:4")]


# ---- suffix ----


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [
        ("What is 1+1?", SUFFIX, f"What is 1+1? {SUFFIX}"),
        ("What is 1+1?\n", SUFFIX, f"What is 1+1?\n{SUFFIX}"),
        ("What is 1+1?", f"\n\n{SUFFIX}", f"What is 1+1?\n\n{SUFFIX}"),
        (f"What is 1+1? {SUFFIX}", f"\n{SUFFIX}", f"What is 1+1? {SUFFIX}"),
        (f"What is 1+1?\n{SUFFIX}\n", SUFFIX, f"What is 1+1?\n{SUFFIX}\n"),
        ("q " + SUFFIX.replace("{}", "{{}}"), SUFFIX, "q " + SUFFIX.replace("{}", "{{}}")),
        ("What is 1+1?", "\n", "What is 1+1?\n"),
        ("What is 1+1?", "", "What is 1+1?"),
    ],
)
def test_suffix_is_there_exactly_once(write, plain, text, suffix, expected) -> None:
    (prompt,) = load(write("a.jsonl", [{"prompt": text}]), plain, prompt_suffix=suffix)
    assert prompt.text == expected


def test_suffix_of_a_chat_goes_to_its_last_user_turn(write, chatty) -> None:
    first, second = ({"role": "assistant", "content": text} for text in ("a1", "a2"))
    turns = [*user("q1"), first, *user("q2"), second]
    (prompt,) = load(write("a.jsonl", [{"messages": turns}]), chatty, prompt_suffix="Go.")
    assert prompt.text == "<bos>[user]q1[assistant]a1[user]q2 Go.[assistant]"


# ---- length ----


def test_long_prompts_are_dropped_and_counted(write, plain) -> None:
    path = write("a.jsonl", [{"prompt": "x" * n} for n in (4, 5, 3, 9)])
    found = load_set(path, plain, max_prompt_length=5)  # <bos> counts
    assert [len(p.token_ids) for p in found.prompts] == [5, 4]
    assert (len(found.prompts), found.dropped_too_long) == (2, 2)


def test_nothing_left_says_how_short_the_shortest_is(write, plain) -> None:
    path = write("a.jsonl", [{"prompt": "x" * 7}, {"prompt": "x" * 6}])
    with pytest.raises(DataError, match=r"all 2 prompts have more than 5 tokens, the shortest 7; raise"):
        load(path, plain, max_prompt_length=5)


# ---- sources ----


def test_folder_of_files(write, plain, tmp_path) -> None:
    write("b.jsonl", [{"prompt": "b"}])
    write("a.parquet", [{"prompt": "a"}])
    write("README.md", "not data")
    write(".cache/c.jsonl", "not data")
    assert [p.text for p in load(tmp_path, plain)] == ["a", "b"]


def test_folder_with_splits(write, plain, tmp_path) -> None:
    write("data/train-00000-of-00002.parquet", [{"prompt": "a"}])
    write("data/train-00001-of-00002.parquet", [{"prompt": "b"}])
    write("data/test-00000-of-00001.parquet", [{"prompt": "c"}])
    assert [p.text for p in load(tmp_path, plain)] == ["a", "b"]
    assert [p.text for p in load(tmp_path, plain, split="test")] == ["c"]
    with pytest.raises(DataError, match="no file of split 'dev'; there are: data.test-00000-of-00001"):
        load(tmp_path, plain, split="dev")


def test_save_to_disk(plain, tmp_path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a", "answer": "1"}])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "dict"))
    (prompt,) = load(tmp_path / "one", plain)
    assert (prompt.text, prompt.answer, prompt.source) == ("a", "1", f"{tmp_path / 'one'}[0]")
    assert load(tmp_path / "dict", plain, split="test")[0].text == "a"
    with pytest.raises(DataError, match="no split 'train'; there are: test; set data.split"):
        load(tmp_path / "dict", plain)
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="save_to_disk folder cannot be read"):
        load(tmp_path / "one", plain)


def test_hub_rows_come_through_datasets(write, tmp_path, monkeypatch) -> None:
    """Without a network: `load_dataset` takes a folder too, through the same code."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write("hub/test.jsonl", [{"question": "q"}])
    folder = str(tmp_path / "hub")
    assert list(_hub_rows(folder, "test")) == [(f"{folder}[0]", {"question": "q"})]
    with pytest.raises(DataError, match=r"does not load as a Hub data set either.*data.split \('train'\)"):
        list(_hub_rows(folder, "train"))


def test_hub_id_that_cannot_be_reached(plain, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/nothing: no such file or folder here, and it does not load"):
        load("nobody/nothing", plain)


# ---- what is refused ----


@pytest.mark.parametrize("source", ["absent.jsonl", "/absent/folder", "./absent", "a/b/c", "~/a.parquet"])
def test_absent(plain, source) -> None:
    with pytest.raises(DataError, match="no such file or folder .looked for .*check the path"):
        load(source, plain)


def test_empty_folder(plain, tmp_path) -> None:
    with pytest.raises(DataError, match=r"no \.jsonl, \.ndjson, \.json or \.parquet file in this folder"):
        load(tmp_path, plain)


def test_unknown_kind_of_file(write, plain) -> None:
    with pytest.raises(DataError, match=r"a\.csv: expected a \.jsonl or \.parquet file"):
        load(write("a.csv", "prompt\nx\n"), plain)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_no_rows(write, plain, name) -> None:
    path = write(name, "")
    if name == "a.parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match=rf"{name}: there is no row in it"):
        load(path, plain)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', r"not valid JSON \(Expecting value.*repair the line"),
        (b'{"prompt": "\xff"}', r"not valid JSON \('utf-8' codec"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["q"]', "expected a JSON object .* got a list"),
        (b"null", "expected a JSON object .* got null"),
        (b'{"prompt": 7}', r"column 'prompt': expected text or a chat list .* got int 7"),
        (b'{"prompt": null}', "column 'prompt': expected text .* got null"),
        (b'{"prompt": ""}', "column 'prompt': the prompt is empty"),
        (b'{"prompt": " \\n"}', "the prompt is empty"),
        (b'{"prompt": []}', "its roles: none"),
        (b'{"prompt": ["q"]}', "turn 0: expected an object with role and content, both text, got text"),
        (b'{"prompt": [{"role": "user"}]}', "turn 0: expected an object .* got role: text"),
        (b'{"prompt": [{"role": "user", "content": [1]}]}', "turn 0: .* got role: text, content: a list"),
        (b'{"prompt": [{"role": "user", "content": ""}]}', "the prompt is empty"),
        (b'{"prompt": [{"role": "assistant", "content": "a"}]}', "its roles: assistant"),
        (b'{"prompt": [{"role": "user", "content": "q"}, {"role": "x", "content": "s"}]}', "roles: user, x"),
    ],
)
def test_broken_line_is_named(write, chatty, line, message) -> None:
    path = write("a.jsonl", b'{"prompt": "fine"}\n\n' + line + b'\n{"prompt": "fine"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:3.*{message}"):
        load(path, chatty)


def test_template_that_refuses_a_chat(write, chatty) -> None:
    turns = [{"role": "tool", "content": "t"}, *user("q")]
    with pytest.raises(DataError, match=r"a\.jsonl:1.*refuses .* roles tool, user \(tools are not supported\)"):
        load(write("a.jsonl", [{"messages": turns}]), chatty)


def test_chat_without_a_template(write, plain) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1, column 'messages': .*no chat template"):
        load(write("a.jsonl", [{"messages": user("q")}]), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"a\.jsonl:1: no prompt; .*are: promts, gold; is it 'promts'\? Then set data\.prompt_column"),
        ({"prompt_column": "promt"}, r"no column 'promt' .*there are: promts, gold; did you mean 'promts'\?"),
        ({"prompt_column": "zzz"}, r"no column 'zzz' .*there are: promts, gold; set data\.prompt_column"),
        (
            {"prompt_column": "promts", "answer_column": "golden"},
            r"no column 'golden' \(data\.answer_column\); there are: promts, gold; did you mean 'gold'\?",
        ),
    ],
)
def test_missing_column(write, plain, settings, message) -> None:
    path = write("a.jsonl", [{"promts": "q", "gold": "1"}])
    with pytest.raises(MissingColumnError, match=message):
        load(path, plain, **settings)


def test_named_answer_of_a_wrong_type(write, plain) -> None:
    path = write("a.jsonl", [{"prompt": "q", "answer": ["1"]}])
    with pytest.raises(DataError, match=r"a\.jsonl:1, column 'answer': .* got a list; set data\.answer_column"):
        load(path, plain, answer_column="answer")


def test_damaged_parquet(write, plain) -> None:
    path = write("a.parquet", [{"prompt": "q" * 100, "answer": "1"} for _ in range(50)])
    whole = Path(path).read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"", b"PAR1 not really"):
        Path(path).write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file .*again"):
            load(path, plain)


# ---- the real files ----

ROWS = {
    "aime24.parquet": 30,
    "aime25.parquet": 30,
    "amc23_40.parquet": 40,
    "amc23_83.parquet": 83,
    "hmmt_feb25.parquet": 30,
    "math500.parquet": 500,
    "gsm8k_test.jsonl": 1319,
    "dapo-math-17k.parquet": 17917,
}


OWN_SUFFIX = r"Please reason step by step, and put your final answer within \boxed{}."


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
@pytest.mark.parametrize(("name", "rows"), ROWS.items())
def test_real_files(chatty, name, rows) -> None:
    found = load_set(DATA / name, chatty, prompt_suffix=f"\n{OWN_SUFFIX}")
    assert (len(found.prompts), found.dropped_too_long) == (rows, 0)
    for prompt in found.prompts:
        assert prompt.answer and prompt.answer == prompt.answer.strip()
        assert prompt.text.endswith(f"{OWN_SUFFIX}[assistant]")
        assert prompt.text.count(OWN_SUFFIX) == 1  # amc23_83 brings it along
        if name.startswith(("dapo", "gsm8k", "aime25")):
            float(prompt.answer)  # refuses 1,000 and a worked answer
    if name.startswith("dapo"):
        assert len({prompt.text for prompt in found.prompts}) < rows  # duplicates stay


def test_what_a_data_frame_has_for_nothing_is_no_gold_answer(write, plain) -> None:
    path = write("a.parquet", [{"question": "q", "answer": 7.5}, {"question": "q", "answer": float("nan")}])
    first, second = load(path, plain)
    assert (first.answer, second.answer, second.lack) == ("7.5", None, "column 'answer' holds NaN")


@pytest.mark.parametrize("name", ["train.json", "train.ndjson", "data/train.json"])
def test_a_folder_with_any_name_that_a_file_alone_may_have(plain, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"prompt": "1+1="}\n')
    (tmp_path / "dataset_info.json").write_text('{"description": "no row"}')
    (prompt,) = load(tmp_path, plain)
    assert prompt.text == "1+1=" and prompt.source == f"{tmp_path / name}:1"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_objects_over_several_lines(plain, tmp_path, indent):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
    (tmp_path / "a.json").write_text("\ufeff\n" + json.dumps(rows, indent=indent), encoding="utf-8")
    found = load(tmp_path / "a.json", plain)
    assert [(p.text, p.answer, p.source) for p in found] == [
        ("1+1=", "2", f"{tmp_path / 'a.json'}[0]"),
        ("2+2=", "4", f"{tmp_path / 'a.json'}[1]"),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[\n{"prompt": "x"},\n{"prompt": }]', r"a\.json:3: not valid JSON"),
        ('[{"prompt": "x"}, 3]', r"a\.json\[1\]: expected a JSON object"),
        ('[{"prompt": "x", "prompt": "y"}]', "stands in it twice"),
        ("[" * 100_000, r"a\.json: not valid JSON"),
        ("[]", "there is no row"),
    ],
)
def test_a_list_that_is_none_is_named(plain, tmp_path, content, says):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=says):
        load(tmp_path / "a.json", plain)


def test_a_decimal_is_a_gold_answer(plain, tmp_path):
    golds = [Decimal("142.50"), Decimal("1E+3"), Decimal("-0.10"), None]
    table = pa.table({"prompt": ["a", "b", "c", "d"], "answer": pa.array(golds, pa.decimal128(10, 2))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [p.answer for p in load(tmp_path / "a.parquet", plain)] == ["142.50", "1000.00", "-0.10", None]


def test_white_space_that_the_tokenizer_drops_makes_no_prompt_too_long(tmp_path):
    symbols = ["<eos>", "<unk>", *"0123456789+="]
    backend = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    rows = ["1 + 1" + " " * 3000 + "=", "1 " * 3000, " " * 2_000_000 + "1"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    found = load_set(tmp_path / "a.jsonl", tokenizer, max_prompt_length=100)
    assert [p.text for p in found.prompts] == rows[:1] and found.dropped_too_long == 2
