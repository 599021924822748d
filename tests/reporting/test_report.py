"""The report of real runs, opened in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from prune_opd.config import load_config
from prune_opd.errors import RunLogError
from prune_opd.experiments.compare import compare
from prune_opd.reporting.records import bytes_of_text
from prune_opd.reporting.report import arm_rows, page_run, render, write_report
from prune_opd.reporting.run_logs import read_runs

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
SMALL = [
    "training.steps=3",
    "rollout.prompts_per_step=2",
    "rollout.num_generations=2",
    "rollout.max_completion_length=40",
    "pruning.dynamic_response_length.init_len=16",
    "pruning.dynamic_response_length.min_len=16",
    "pruning.dynamic_response_length.max_len=40",
    "evaluation.num_problems=3",
    "evaluation.every=2",
    "evaluation.k=1",
    "evaluation.max_tokens=30",
]
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<!--<script>\u2028\u2029]]> {{ 7 * 7 }} \"'&amp;"
)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "comparison"
    config = load_config(RECIPE, SMALL)
    compare(config, arms=["opd", "prune", "fixed:20"], seeds=[0, 1], output_dir=folder, console=Console(quiet=True))
    return folder


@pytest.fixture
def run(comparison, tmp_path) -> Path:
    """A copy of one pruned run that a test may damage."""
    return Path(shutil.copytree(comparison / "prune-seed0", tmp_path / "run"))


@pytest.fixture
def page(browser):
    def open_page(path: Path):
        browser.get(path.as_uri())
        return browser

    yield open_page
    assert [entry["message"] for entry in browser.get_log("browser")] == [], "errors in the browser's console"


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return Array.from(document.querySelectorAll(arguments[0]), (e) => e.textContent.replace(/\\s+/g, ' ').trim())",
        selector,
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def chart(browser, name: str) -> list[str]:
    """The outlines that a figure draws."""
    return browser.execute_script(
        "return Array.from(document.querySelectorAll(`#${arguments[0]} path.line`), (p) => p.getAttribute('d'))", name
    )


def select_rollout(browser, index: int) -> None:
    browser.execute_script(
        "const s = document.getElementById('rollout'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
        index,
    )


def hover(browser, element) -> None:
    from selenium.webdriver import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(browser).move_to_element(element).perform()


def until(browser, condition) -> None:
    """The browser delivers the pointer's events after `perform` has returned when the machine is busy."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(lambda _: condition())


# ---- what the page shows ----


def test_the_headline_has_the_numbers_of_the_logs(comparison, page):
    browser = page(write_report([comparison]))
    rows = [[cell for cell in row.split("|")] for row in texts(browser, "table.headline tbody tr")]
    assert [row[0].split()[0] for row in rows] == ["opd", "prune", "fixed:20"], "in the order of the comparison"
    results = {arm["arm"]: arm for arm in json.loads((comparison / "compare.json").read_text())["arms"]}
    for row in rows:
        arm = results[row[0].split()[0]]
        assert f"{arm['accuracy']['mean']:.1%}" in row[0]
        assert f"{arm['student_tokens']['mean']:,.0f}" in row[0]
        low, high = arm["accuracy"]["ci95"]
        assert f"{100 * low:.1f}–{100 * high:.1f}" in row[0]
        if "difference" in arm:
            found = arm["difference"]["accuracy"]
            low, high = found["ci95"] or found["ci95_problems"]
            shown = f"{100 * found['mean']:+.1f} {100 * low:.1f} to {100 * high:.1f}".replace("-", "−")
            assert shown in row[0]
    saved = results["prune"]["train_seconds_saving"]
    assert f"{'−' if saved >= 0 else '+'}{abs(100 * saved):.0f}%" in rows[1][0]


def test_every_chart_draws_and_the_arm_selector_changes_them(comparison, page):
    browser = page(write_report([comparison]))
    charts = ["window", "weights", "overlap", "reverse_kl", "entropy_gap"]

    def everything():
        return {name: chart(browser, name) for name in charts} | {
            "heat": browser.execute_script("return document.querySelector('#heat image').getAttribute('href')"),
            "onset": browser.execute_script("return document.querySelector('#onset svg').outerHTML"),
            "rollouts": texts(browser, "#rollout option"),
            "tokens": texts(browser, ".tokens"),
        }

    assert texts(browser, "#arms button") == ["opd", "prune", "fixed:20"]
    assert texts(browser, "#arms button[aria-checked=true]") == ["prune"]
    pruned = everything()
    assert all(pruned.values()) and len(chart(browser, "accuracy")) == 3 * (2 + 1)  # each seed, and their mean
    browser.execute_script("document.querySelector('#arms button[data-value=opd]').click()")
    plain = everything()
    assert texts(browser, "#arms button[aria-checked=true]") == ["opd"]
    assert all(plain[name] != pruned[name] for name in plain if name not in ("onset", "reverse_kl", "entropy_gap"))
    assert len(plain["weights"]) == 3, "weight 1 everywhere is drawn too"
    browser.execute_script("document.querySelectorAll('#seeds button')[1].click()")
    assert texts(browser, "#seeds button[aria-checked=true]") == ["1"]
    assert everything()["heat"] != plain["heat"]
    written = lines(comparison / "opd-seed1/rollouts.jsonl")
    shown = browser.execute_script("return document.querySelector('.prompt').textContent")
    assert shown in {record["prompt"] for record in written}


def test_hover_shows_the_candidates_of_both_models(comparison, page):
    browser = page(write_report([comparison]))
    records = lines(comparison / "prune-seed0/rollouts.jsonl")
    select_rollout(browser, 1)
    record, t = records[1], 5
    panel = browser.find_element("id", "token")
    assert not panel.is_displayed()
    hover(browser, browser.find_element("css selector", f".tokens span[data-t='{t}']"))
    until(browser, panel.is_displayed)
    for side in ("student", "teacher"):
        cells = browser.execute_script(
            "return Array.from(document.querySelectorAll(`#token .${arguments[0]} tbody tr`), "
            "(r) => [r.cells[0].title, r.cells[1].textContent.replace('−', '-')])",
            side,
        )
        ids, logprobs = record[side]["ids"][t], record[side]["logprobs"][t]
        assert cells == [[record["texts"][str(v)], f"{p:.2f}"] for v, p in zip(ids, logprobs, strict=True)]
        shared = set(record["student"]["ids"][t]) & set(record["teacher"]["ids"][t])
        marked = texts(browser, f"#token .{side} tr.shared td:first-child")
        assert len(marked) == len(shared)
    assert f"weight {record['weight'][t]}" in panel.text and f"{record['shared'][t]} of 8 shared" in panel.text
    hover(browser, browser.find_element("css selector", "h1"))
    until(browser, lambda: not panel.is_displayed())


def test_a_tap_and_the_arrow_keys_show_them_too(comparison, page):
    from selenium.webdriver import Keys

    browser = page(write_report([comparison]))
    browser.execute_script("document.querySelector('.tokens span[data-t=\"3\"]').click()")
    panel = browser.find_element("id", "token")
    assert panel.is_displayed() and "position 3 " in panel.text
    browser.find_element("css selector", ".tokens").send_keys(Keys.ARROW_RIGHT)
    assert "position 4 " in panel.text
    browser.find_element("css selector", ".tokens").send_keys(Keys.ESCAPE)
    assert not panel.is_displayed()


def test_tokens_are_coloured_by_weight_and_events_underlined(comparison, page):
    browser = page(write_report([comparison]))
    select_rollout(browser, 0)
    record = lines(comparison / "prune-seed0/rollouts.jsonl")[0]
    classes = browser.execute_script("return Array.from(document.querySelectorAll('.tokens span'), (s) => s.className)")
    assert len(classes) == len(record["token_ids"])
    assert [t for t, name in enumerate(classes) if "event" in name] == record["events"]
    assert [int(name[1]) for name in classes] == [int(9 * (1.5 - w) + 0.5) for w in record["weight"]]
    browser.execute_script("document.querySelector('#colour button[data-value=overlap]').click()")
    recoloured = browser.execute_script(
        "return Array.from(document.querySelectorAll('.tokens span'), (s) => s.className[1])"
    )
    assert [int(level) for level in recoloured] == [int(9 * (1 - s / 8) + 0.5) for s in record["shared"]]


def test_a_phone_has_no_sideways_scroll(comparison, page):
    report = write_report([comparison])
    browser = page(report)
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page(report)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        wide = browser.execute_script(
            "return Array.from(document.querySelectorAll('figure'), (f) => f.getBoundingClientRect().right)"
        )
        assert max(wide) <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_heat_map_is_the_mean_overlap_of_its_cell(comparison):
    (run,) = read_runs([comparison / "prune-seed0"])
    heat = page_run(run, 10**6)["heat"]
    assert (heat["height"], heat["width"]) == (1, 1)
    for column, record in enumerate(lines(run.path / "drift.jsonl")):
        for row in range(len(heat["columns"][0]) // 2):
            found = [shared[row] / 8 for shared in map(bytes_of_text, record["shared"]) if len(shared) > row]
            cell = int(heat["columns"][column][2 * row : 2 * row + 2], 16)
            assert cell == 255 if not found else abs(cell / 250 - np.mean(found)) <= 0.5 / 250 + 1e-9


def test_mean_weights_are_those_of_the_drift_rule(comparison):
    """Recomputed in plain Python from the overlaps: weight 1.5, less 0.02 an event below γ = 0.6."""
    for record in lines(comparison / "prune-seed0/drift.jsonl"):
        by_rollout = []
        for shared in map(bytes_of_text, record["shared"]):
            events = np.cumsum([s / 8 < 0.6 for s in shared])
            by_rollout.append(np.clip(1 - 0.02 * events, 0, 1) + 0.5)
        for t, mean in enumerate(record["weight_by_position"]):
            assert mean == pytest.approx(np.mean([w[t] for w in by_rollout if len(w) > t]), abs=1e-4)


# ---- hostile completions ----


def hostile(record: dict) -> dict:
    return record | {
        "prompt": HOSTILE,
        "answer": HOSTILE,
        "response": HOSTILE,
        "texts": {token: HOSTILE for token in record["texts"]},
    }


def test_hostile_completions_are_shown_and_do_not_run(run, page):
    log = run / "rollouts.jsonl"
    log.write_text("".join(json.dumps(hostile(record), ensure_ascii=False) + "\n" for record in lines(log)))
    config = json.loads((run / "config.json").read_text())
    config["data"]["prompt_suffix"] = config["model"]["model_name_or_path"] = HOSTILE
    (run / "config.json").write_text(json.dumps(config))
    report = write_report([run])
    source = report.read_text(encoding="utf-8")
    assert len(re.findall(r"<script", source)) == 2 and "<img" not in source
    assert not re.search("[\u2028\u2029]", re.findall(r"<script.*?</script>", source, re.DOTALL)[0])
    browser = page(report)
    browser.execute_script("document.querySelector('.tokens span').click()")
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelector('.prompt').textContent") == HOSTILE
    assert browser.execute_script("return document.querySelector('#token td').title") == HOSTILE
    assert texts(browser, ".tokens span")[0].startswith("</script><script>window.hacked")
    assert "{{ 7 * 7 }}" in browser.find_element("css selector", "h1").text


def test_the_policy_stops_a_script_that_got_into_the_page_and_every_request(run, browser):
    """The second wall, tried without the first: markup pasted into the finished file."""
    report = write_report([run])
    source = report.read_text(encoding="utf-8")
    inserted = "<script>window.hacked = 1</script><img src='http://127.0.0.1:9/x' onerror='window.hacked = 2'>"
    report.write_text(source.replace("<footer>", inserted + "<footer>"), encoding="utf-8")
    browser.get(report.as_uri())
    assert browser.execute_script("return window.hacked") is None
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert sum("Content Security Policy" in message for message in refused) == len(refused) >= 2
    assert texts(browser, "#arms button") == ["run"], "the page's own script still ran"


def test_the_page_asks_for_nothing(comparison):
    source = write_report([comparison]).read_text()
    assert set(re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", source)) <= {"data:,"}
    assert set(re.findall(r"https?://[^\s\"'<]+", source)) == {"http://www.w3.org/2000/svg"}


# ---- runs that lack something ----


def test_a_run_that_still_goes_on(run, page):
    """Half a line in each log, and a step in drift.jsonl that metrics.jsonl has not."""
    metrics = lines(run / "metrics.jsonl")[:-1]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics) + '{"step": 3, "lo')
    with (run / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 4, "prom')
    browser = page(write_report([run]))
    assert "run 2 of 3 steps are done; the rest is not in this page." in texts(browser, ".missing li")
    assert len(texts(browser, "#rollout option")) == 6
    assert chart(browser, "window")


@pytest.mark.parametrize("gone", ["metrics.jsonl", "drift.jsonl", "rollouts.jsonl", "env.json"])
def test_a_log_that_is_not_there(run, page, gone):
    (run / gone).unlink()
    browser = page(write_report([run]))
    notes = " ".join(texts(browser, ".missing li"))
    expected = {
        "metrics.jsonl": "0 of 3 steps are done",
        "drift.jsonl": "drift.jsonl is not there",
        "rollouts.jsonl": "rollouts.jsonl is not there",
        "env.json": "",
    }
    assert expected[gone] in notes
    if gone == "drift.jsonl":
        assert texts(browser, "#heat .none") == ["drift.jsonl has nothing of this run."]


def test_no_evaluation_and_no_candidates(comparison, tmp_path, page):
    """An arm by itself, whose logs an earlier version wrote."""
    run = Path(shutil.copytree(comparison / "opd-seed0", tmp_path / "alone"))
    for name, keep in (
        ("metrics.jsonl", lambda key: not key.startswith("eval/")),
        (
            "rollouts.jsonl",
            lambda key: key in ("step", "prompt", "answer", "response", "finished", "effective_length", "onset"),
        ),
        ("drift.jsonl", lambda key: key != "weight_by_position"),
    ):
        kept = [{key: value for key, value in record.items() if keep(key)} for record in lines(run / name)]
        (run / name).write_text("".join(json.dumps(record) + "\n" for record in kept if record != {"step": 0}))
    browser = page(write_report([run]))
    notes = " ".join(texts(browser, ".missing li"))
    assert "there is no accuracy" in notes and "Pruning is off" in notes
    assert texts(browser, "#accuracy .none") and texts(browser, "#weights .none")
    assert "One arm alone shows no saving" in " ".join(texts(browser, "p.note"))
    assert texts(browser, ".tokens")[0] == re.sub(r"\s+", " ", lines(run / "rollouts.jsonl")[-1]["response"])


def test_what_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(RunLogError, match="holds no run"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(RunLogError, match="two runs are called run"):
        write_report([run, run], tmp_path / "report.html")
    log = run / "metrics.jsonl"
    log.write_text("not json\n" + log.read_text())
    with pytest.raises(RunLogError, match=r"metrics\.jsonl:1: no JSON"):
        write_report([run])


# ---- numbers ----


def test_a_probe_beside_the_runs_is_shown_and_a_damaged_one_is_named(comparison, run):
    def estimate(*values):
        return dict(zip(("value", "low", "high"), values, strict=True))

    row = {"reliability": "R = 0", "cuts": 7, "teacher": estimate(0.25, 0.1, 0.4), "student": estimate(0.5, None, None)}
    unseen = {"reliability": "R = 1", "cuts": 0, "teacher": estimate(*[None] * 3), "student": estimate(*[None] * 3)}
    found = {"verdict": f"drift is {HOSTILE}", "problems": 3, "continuations": 2, "by_reliability": [unseen, row]}
    assert "Is it drift?" not in render(read_runs([run]))
    (run / "probe.json").write_text(json.dumps(found))
    text = render(read_runs([run]))
    assert "Is it drift?" in text and "drift is &lt;/script&gt;" in text and "<script>window.hacked" not in text
    assert "<td>7</td><td>25.0% <small>10–40</small></td><td>50.0%</td>" in re.sub(r"\s*\n\s*", "", text)
    assert "R = 1" not in text.split("Is it drift?")[1].split("</section>")[0]
    (run / "probe.json").write_text(json.dumps(found | {"by_reliability": [row | {"cuts": "many"}]}))
    with pytest.raises(RunLogError, match=r"probe.json: field by_reliability.0.cuts"):
        render(read_runs([run]))


def test_savings_are_stated_only_where_arms_ran_alike(comparison):
    runs = read_runs([comparison])
    rows = {row["arm"]: row for row in arm_rows(runs)}
    assert rows["opd"]["is_baseline"] and rows["opd"]["saved"] is None
    seconds = {arm: [r["time/rollout"] for run in runs if run.arm == arm for r in run.steps] for arm in rows}
    expected = 1 - sum(seconds["prune"]) / sum(seconds["opd"])
    assert rows["prune"]["saved"]["seconds"]["rollout"] == pytest.approx(expected)
    tokens = {arm: sum(r["tokens/scored"] for run in runs if run.arm == arm for r in run.steps) for arm in rows}
    assert rows["prune"]["saved"]["tokens"]["teacher"] == pytest.approx(1 - tokens["prune"] / tokens["opd"])
    without_a_seed = [run for run in runs if (run.arm, run.seed) != ("prune", 1)]
    assert {row["arm"]: row["saved"] for row in arm_rows(without_a_seed)}["prune"] is None
    alone = arm_rows([run for run in runs if run.arm == "prune"])
    assert alone[0]["baseline"] is None and alone[0]["saved"] is None


def test_a_long_run_of_many_arms_stays_below_five_megabytes(run, tmp_path):
    """Three runs of 200 steps; rollouts of 512 tokens, all of whose characters take six bytes."""
    metrics, drift, rollouts = (lines(run / f"{name}.jsonl")[1] for name in ("metrics", "drift", "rollouts"))
    metrics |= {"prune_opd/current_max_response_length": 4096}
    drift |= {name: drift[name][:1] for name in ("finished", "stopped", "effective_length", "onset")}
    text = b64encode(zlib.compress(bytes([3, 1, 8, 6, 5, 2, 4, 7]) * 512)).decode()
    drift |= {name: [text] for name in ("shared", "mass", "above")}
    drift |= {"length": [4096], "weight_by_position": [1.2345] * 4096}
    times = 512 // len(rollouts["token_ids"])
    rollouts |= {name: rollouts[name] * times for name in ("token_ids", "weight", "shared", "teacher_logprob")}
    for side in ("student", "teacher"):
        rollouts[side] = {name: values * times for name, values in rollouts[side].items()}
    rollouts |= {"texts": {token: "<" * 40 for token in rollouts["texts"]}, "prompt": "<" * 9_000, "length": 9_000}
    for i in range(3):
        folder = tmp_path / "many" / f"arm{i}-seed0"
        folder.mkdir(parents=True)
        shutil.copy(run / "config.json", folder)
        for name, record, count in (("metrics", metrics, 200), ("drift", drift, 200), ("rollouts", rollouts, 60)):
            written = "".join(json.dumps(record | {"step": step + 1}) + "\n" for step in range(count))
            (folder / f"{name}.jsonl").write_text(written)
    page = render(read_runs([tmp_path / "many"]))
    assert len(page.encode()) <= 5_000_000
    assert len(page.encode()) > 2_000_000 and page.count('"token_ids"') > 6, "it is used for rollouts"
