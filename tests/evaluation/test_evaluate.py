from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from prune_opd.cli import app
from prune_opd.config import DataSection, EvaluationSection
from prune_opd.data.source import task_prompts
from prune_opd.data.tasks import VOCABULARY
from prune_opd.errors import DataError, RunDirectoryError
from prune_opd.evaluation.evaluate import ci95, evaluate, pass_at_k
from prune_opd.experiments.evaluate_model import evaluate_model
from prune_opd.rollout.local import LocalSampler
from prune_opd.types import Prompt, Rollouts

POSITIONS = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="\0", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")


TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model_dir(model: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-1.5b"
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


class Scripted:
    """Gives sample j of every problem the answer `texts[problem][j]`; the end of a text without <eos> is cut off."""

    def __init__(self, texts: list[list[str]]) -> None:
        self.texts, self.calls = [text for row in texts for text in row], []

    def sample(self, prompts, uniforms, *, temperature=1.0, top_p=1.0, top_k=0, watcher=None) -> Rollouts:
        self.calls.append((len(prompts), temperature, top_p, uniforms))
        texts, self.texts = self.texts[: len(prompts)], self.texts[len(prompts) :]
        rows = [TOKENIZER(text)["input_ids"] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [TOKENIZER.pad_token_id] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return Rollouts(
            prompts=prompts,
            response_ids=ids,
            response_mask=torch.arange(width) < lengths[:, None],
            finished=torch.tensor([row[-1] == EOS for row in rows]),
            stopped=torch.zeros(len(rows), dtype=torch.bool),
        )


def settings(**changes: float) -> EvaluationSection:
    return EvaluationSection(**{"k": 4, "max_tokens": 12, "top_p": 1.0, **changes})


def problem(answer: str | None, **more) -> Prompt:
    return Prompt("Q a 1 :", tuple(TOKENIZER("Q a 1 :")["input_ids"]), answer, f"here:{answer}", **more)


RIGHT, WRONG, CUT = "b 3 \\boxed{ 7 } <eos>", "\\boxed{ 8 } <eos>", "so so so"


# ---- pass@k ----


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int) -> None:
    for right in range(n + 1):
        answers = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = list(combinations(answers, k))
            exact = Fraction(sum(map(any, subsets)), len(subsets))
            assert pass_at_k(n, right, k) == pytest.approx(float(exact), rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_pass_at_k_is_unbiased(k: int) -> None:
    """Its mean over the binomial of right answers is 1 - (1-p)^k exactly; that of 1 - (1-c/n)^k is not."""
    n, p = 8, Fraction(1, 5)
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = float(1 - (1 - p) ** k)
    assert sum(float(chance[c]) * pass_at_k(n, c, k) for c in range(n + 1)) == pytest.approx(truth, rel=1e-12)
    plug_in = sum(float(chance[c]) * (1 - (1 - c / n) ** k) for c in range(n + 1))
    assert (k == 1) == (plug_in == pytest.approx(truth, rel=1e-12))


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    assert 0 < pass_at_k(2048, 1, 1024) == 0.5


# ---- bootstrap ----


def at_most(right: int, n: int, p: float) -> float:
    """The chance of at most so many right of n."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(right + 1))


@pytest.mark.parametrize("n", [1, 8, 30, 500])
def test_all_or_none_right_is_the_interval_of_clopper_and_pearson(n: int) -> None:
    """Its end is where so few right, or fewer, has a chance of 2.5%: the definition, by the binomial's sum."""
    low, high = ci95([0.0] * n)
    assert low == 0 and at_most(0, n, high) == pytest.approx(0.025)
    low, high = ci95([1.0] * n)
    assert high == 1 and 1 - at_most(n - 1, n, low) == pytest.approx(0.025)


def test_0_of_8_is_0_to_37_percent() -> None:
    assert ci95([0.0] * 8) == pytest.approx((0.0, 0.369), abs=1e-3)


def test_equal_scores_and_equal_differences_have_a_width_too() -> None:
    low, high = ci95([0.25] * 30)
    assert 0 < low < 0.25 < high < 0.4
    low, high = ci95([0.0] * 8, least=-1.0)
    assert low == -high and high == pytest.approx(0.369, abs=1e-3)
    assert ci95(np.mean([[0.1, 0.2], [0.2, 0.1]], axis=0)) == pytest.approx(ci95([0.15, 0.15]))


def test_intervals_of_a_hard_benchmark_cover_the_truth() -> None:
    """Of 8 problems, each right once in 20: mostly none is right, and resampling alone would cover 1 in 3."""
    rng = np.random.default_rng(2)
    intervals = [ci95(rng.random(8) < 0.05, resamples=400) for _ in range(400)]
    assert np.mean([low <= 0.05 <= high for low, high in intervals]) > 0.95


def test_bootstrap_agrees_with_the_normal_interval_of_many_problems() -> None:
    scores = np.random.default_rng(1).random(2000)
    low, high = ci95(scores)
    half = 1.96 * scores.std() / math.sqrt(len(scores))
    assert low == pytest.approx(scores.mean() - half, abs=half / 10)
    assert high == pytest.approx(scores.mean() + half, abs=half / 10)


def test_bootstrap_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    intervals = [ci95(rng.random(40) < 0.4, resamples=400) for _ in range(400)]
    assert 0.90 <= np.mean([low <= 0.4 <= high for low, high in intervals]) <= 0.98


def test_bootstrap_narrows_with_the_number_of_problems_and_is_repeatable() -> None:
    scores = [0.0, 1.0] * 8
    width = [high - low for low, high in (ci95(scores), ci95(scores * 16))]
    assert width[0] / width[1] == pytest.approx(4, rel=0.15)
    assert ci95(scores) == ci95(scores)


# ---- evaluate ----


def test_scores_lengths_and_rates() -> None:
    texts = [[RIGHT, WRONG, RIGHT, CUT], [WRONG, CUT, CUT, WRONG], [RIGHT, RIGHT, RIGHT, RIGHT]]
    found = evaluate(Scripted(texts), TOKENIZER, [problem("7")] * 3, settings())
    assert found.per_problem == [0.5, 0.0, 1.0]
    assert found.accuracy == 0.5
    assert found.pass_at_k == pytest.approx({1: 0.5, 2: (5 / 6 + 0 + 1) / 3, 4: 2 / 3})
    assert found.ci95 == ci95([0.5, 0.0, 1.0]) == found.pass_at_k_ci95[1]
    assert found.pass_at_k_ci95[4] == ci95([1.0, 0.0, 1.0])
    counted = sum(len(text.split()) for row in texts for text in row)  # one token a word
    assert found.tokens == counted
    assert found.mean_length == counted / 12
    assert found.eos_rate == 9 / 12
    assert 0 <= found.sample_seconds <= found.seconds


@pytest.mark.parametrize(("k", "ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_pass_at_powers_of_two_and_k(k: int, ks: list[int]) -> None:
    found = evaluate(Scripted([[WRONG] * (k - 1) + [RIGHT]]), TOKENIZER, [problem("7")], settings(k=k))
    assert found.pass_at_k == pytest.approx({j: j / k for j in ks})


def test_settings_reach_the_sampler() -> None:
    sampler = Scripted([[RIGHT] * 4])
    evaluate(sampler, TOKENIZER, [problem("7")], settings(temperature=0.6, top_p=0.9, max_tokens=9))
    ((count, temperature, top_p, uniforms),) = sampler.calls
    assert (count, temperature, top_p, tuple(uniforms.shape)) == (4, 0.6, 0.9, (4, 9))


def test_going_in_steps_changes_no_random_number_and_shows_progress(tmp_path: Path) -> None:
    texts = [[RIGHT, WRONG, RIGHT, CUT], [WRONG, CUT, CUT, WRONG], [RIGHT, RIGHT, RIGHT, RIGHT]]
    whole, steps, shown = Scripted(texts), Scripted(texts), []
    results = [
        evaluate(whole, TOKENIZER, [problem("7")] * 3, settings(), responses_path=tmp_path / "a"),
        evaluate(
            steps,
            TOKENIZER,
            [problem("7")] * 3,
            settings(),
            responses_path=tmp_path / "b",
            problems_at_once=2,
            on_progress=lambda *done: shown.append(done),
        ),
    ]
    assert [call[0] for call in steps.calls] == [8, 4]
    assert torch.equal(whole.calls[0][3], torch.cat([call[3] for call in steps.calls]))
    assert shown == [(2, 2), (3, 6)]
    assert results[0].per_problem == results[1].per_problem
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_the_seed_changes_the_random_numbers() -> None:
    samplers = [Scripted([[RIGHT] * 4]) for _ in range(3)]
    for sampler, seed in zip(samplers, (0, 0, 1), strict=True):
        evaluate(sampler, TOKENIZER, [problem("7")], settings(), seed=seed)
    numbers = [sampler.calls[0][3] for sampler in samplers]
    assert torch.equal(numbers[0], numbers[1]) and not torch.isclose(numbers[0], numbers[2]).any()


def test_responses_are_saved(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    evaluate(
        Scripted([[RIGHT, CUT], [WRONG, RIGHT]]), TOKENIZER, [problem("7")] * 2, settings(k=2), responses_path=path
    )
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["problem"], r["sample"], r["right"], r["finished"]) for r in records] == [
        (0, 0, True, True),
        (0, 1, False, False),
        (1, 0, False, True),
        (1, 1, True, True),
    ]
    assert records[0]["response"].split() == RIGHT.removesuffix("<eos>").split()
    assert records[1] | {"source": "here:7", "gold": "7", "length": 3} == records[1]


def test_what_was_graded_before_a_crash_is_saved(tmp_path: Path) -> None:
    def crash(response: str) -> bool:
        raise KeyboardInterrupt

    path = tmp_path / "responses.jsonl"
    with pytest.raises(KeyboardInterrupt):
        prompts = [problem("7"), problem("7", grader=crash)]
        evaluate(Scripted([[RIGHT], [RIGHT]]), TOKENIZER, prompts, settings(k=1), responses_path=path)
    assert len(path.read_text().splitlines()) == 1


def test_a_prompt_with_a_grader_is_graded_by_it() -> None:
    prompt = problem(None, grader=lambda response: response.startswith("so"))
    assert evaluate(Scripted([[RIGHT, CUT]]), TOKENIZER, [prompt], settings(k=2)).per_problem == [0.5]


def test_without_a_gold_answer_nothing_is_sampled() -> None:
    sampler = Scripted([[RIGHT]])
    with pytest.raises(DataError, match="here:None.*gold answer"):
        evaluate(sampler, TOKENIZER, [problem("7"), problem(None)], settings())
    with pytest.raises(DataError, match="no problem"):
        evaluate(sampler, TOKENIZER, [], settings())
    assert not sampler.calls


def test_a_real_model_is_repeatable_and_its_graded_texts_are_those_saved(
    model: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    """An untrained model: 10 digits and a box are rare, so a grader that likes every second token stands in."""
    prompts = [
        Prompt(p.text, p.token_ids, p.answer, p.source, grader=lambda response: len(response.split()) % 2 == 0)
        for p in task_prompts(
            "task:chain_sum", "held_out", DataSection(train="task:chain_sum"), TOKENIZER, seed=0, count=3
        )
    ]
    sampler = LocalSampler(model, pad_id=TOKENIZER.pad_token_id, eos_ids=[EOS])
    path = tmp_path / "responses.jsonl"
    found = [evaluate(sampler, TOKENIZER, prompts, settings(), responses_path=path) for _ in range(2)]
    assert found[0].per_problem == found[1].per_problem
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 12
    assert sum(r["right"] for r in records) / 12 == pytest.approx(found[0].accuracy)
    assert all(r["right"] == (len(r["response"].split()) % 2 == 0) for r in records)
    assert sum(r["length"] for r in records) == found[0].tokens
    assert len({r["response"] for r in records}) > 6  # samples differ


# ---- prune-opd eval ----


def test_eval_command(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = "--benchmark task:chain_sum --k 2 --num-problems 3 --max-tokens 8 --seed 5".split()
    done = CliRunner().invoke(app, ["eval", str(model_dir), *options, "--output-dir", str(out)])
    assert done.exit_code == 0, done.output
    for shown in ("Avg@2", "pass@1", "pass@2", "mean length", "ended by itself", "tokens/s"):
        assert shown in done.output
    record = json.loads((out / "eval.json").read_text())
    responses = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert len(responses) == 6
    assert record["accuracy"] == np.mean([r["right"] for r in responses])
    assert (record["problems"], record["k"], record["max_tokens"], record["seed"]) == (3, 2, 8, 5)

    again = CliRunner().invoke(app, ["eval", str(model_dir), *options, "--output-dir", str(out)])
    assert isinstance(again.exception, RunDirectoryError)
    assert json.loads((out / "eval.json").read_text()) == record


def test_answers_are_fitted_to_the_positions_of_the_model(model_dir: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    evaluate_model(
        str(model_dir), "task:chain_sum", settings(k=1, max_tokens=31744), tmp_path, console=console, num_problems=2
    )
    longest = max(
        len(p.token_ids)
        for p in task_prompts(
            "task:chain_sum", "held_out", DataSection(train="task:chain_sum"), TOKENIZER, seed=0, count=2
        )
    )
    assert f"answers may have {POSITIONS - longest} tokens instead of 31744" in console.export_text()
    assert json.loads((tmp_path / "eval.json").read_text())["max_tokens"] == POSITIONS - longest
