"""The report's pages on realistic output directories, and on incomplete and corrupt ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from alignment.report.answers import choose_steps, lay_out
from alignment.report.reading import read_stage, read_stages
from alignment.report.render import write_report
from alignment.report.tables import compare_rewards
from alignment.runtime.faults import UsageError
from tests.report_runs import Page, rows, write_lines, write_ppo, write_rm, write_sft


def test_ppo_page_is_self_contained_and_complete(tmp_path):
    samples = write_ppo(tmp_path / "ppo")
    path = write_report(tmp_path / "ppo")
    text = path.read_text()
    page = Page(text)
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # nothing is fetched
    assert "script" not in page.tags and "b" not in page.tags  # a model's answer is text, not markup
    assert "hello & goodbye to 0 <script>alert(1)</script>" in page.text
    # reward, kl, length, truncated, two losses, entropy, components, lr, frontier, two distributions, timing, memory
    assert len(page.images) == 14 and page.alts[0].startswith("Reward: training from ")
    for image in page.images:
        pixels = np.asarray(image.convert("L"))
        assert image.width > 700 and pixels.std() > 5  # something is drawn
    paired = compare_rewards(samples)
    assert f"{paired.ratio:.4g} standard errors above the start" in page.text
    for expected in ("kl_coeff", "critic.lr", "1e-05", "step 0 ·", "step 20 ·", "step 60 ·", "truncated"):
        assert expected in page.text


def test_markdown_shows_the_same_and_its_images_exist(tmp_path):
    write_ppo(tmp_path / "my run")
    write_report(tmp_path / "my run")
    text = (tmp_path / "my run" / "report.md").read_text()
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(links) == 14 and all((tmp_path / "my run" / link).is_file() for link in links)
    assert "<script>" not in text and "<b>" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.sub(r"\\\|", "", row).split("|")) for row in rows if "hello" in row}
    assert widths == {7}  # the run's label and four steps: pipes and line breaks in answers do not break the table


def test_pipeline_has_a_section_per_stage_in_order(tmp_path):
    write_ppo(tmp_path / "ppo", iterations=10)
    write_rm(tmp_path / "rm")
    write_sft(tmp_path / "sft")
    (tmp_path / "rm" / "run.json").write_text("{}")
    page = Page(write_report(tmp_path).read_text())
    titles = re.findall(r"(Supervised fine-tuning|Reward model|Online RL) \((\w+)\)", page.text)
    assert titles[:3] == [("Supervised fine-tuning", "sft"), ("Reward model", "rm"), ("Online RL", "ppo")]
    assert len(page.images) == 14 + 3 + 2
    assert page.text.count("run.json is missing") == 1 and "samples.jsonl is missing" not in page.text
    (tmp_path / "ppo" / "samples.jsonl").unlink()
    assert "samples.jsonl is missing" in Page(write_report(tmp_path).read_text()).text
    assert "0.65" in page.text  # the reward model's last held-out accuracy


def test_a_game_has_a_section_for_each_model_of_each_round(tmp_path):
    for place in ("testing_rm", "round-10/rm", "round-2/rm"):
        write_rm(tmp_path / place)
    for place in ("round-2/policy", "round-10/policy"):
        write_lines(tmp_path / place / "metrics.jsonl", [{"step": 1, "loss": 1.0, "rewards/margin": 0.5}])
    write_lines(tmp_path / "start" / "answers.jsonl", [{"answer": "no run"}])
    write_lines(tmp_path / "round-2/policy/checkpoint-1" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])  # of that run
    runs = [stage.name for stage in read_stages(tmp_path)]
    assert runs == ["testing_rm", "round-2/rm", "round-2/policy", "round-10/rm", "round-10/policy"]
    text = Page(write_report(tmp_path).read_text()).text
    assert all(f"({name})" in text for name in runs)
    assert "Reward model: 3 runs compared" in text and "Policy update: 2 runs compared" in text


def test_the_same_prompts_are_shown_at_several_steps_and_of_several_runs():
    assert choose_steps([0, 8, 2, 4, 6, 8], 4) == [0, 2, 6, 8] and choose_steps([3], 4) == [3]
    own = rows(0, {7: 0.1, 3: 0.2, 5: 0.3}) + rows(1, {7: 9.0}) + rows(2, {5: 0.4, 3: 0.5, 7: 0.6})
    shown = lay_out({"one": own, "other": rows(0, {3: 1.0}), "none": []})
    cells = [[[cell and cell["reward"] for cell in run["cells"]] for run in item["runs"]] for item in shown]
    assert cells == [[[0.1, 9.0, 0.6], [None]], [[0.2, None, 0.5], [1.0]], [[0.3, None, 0.4], [None]]]


def test_what_a_template_puts_around_all_prompts_is_left_out_and_long_texts_are_cut():
    texts = [f"<s>\nBe kind.\n<user> {name}?<end>\n<bot>" for name in ("Adele", "Bach")]
    samples = [{"step": 0, "prompt_id": i, "prompt": text, "answer": "x" * 1500} for i, text in enumerate(texts)]
    assert lay_out({"": [row | {"decoding": "steered"} for row in samples]}) == []  # the policy's own are shown
    items = lay_out({"": samples})
    assert [item["prompt"] for item in items] == ["<user> Adele?", "<user> Bach?"]
    assert items[0]["runs"][0]["cells"][0]["answer"] == "x" * 1200 + " … (300 more characters)"


GOOD = '{"step": 1, "loss": 1}\n'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no metrics.jsonl here or up to two levels below"),
        ({"metrics.jsonl": ""}, "metrics.jsonl: no metrics yet"),
        ({"run.json": "{}"}, "metrics.jsonl: no metrics yet; metrics.jsonl is missing"),
        ({"metrics.jsonl": "[1]\n"}, "metrics.jsonl: no metrics yet; metrics.jsonl is damaged: line 1 skipped"),
        ({"metrics.jsonl": b"\xff\xfe\n"}, "no metrics yet; metrics.jsonl is damaged: line 1 skipped"),
    ],
)
def test_a_directory_without_metrics_is_one_clear_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as error:
        write_report(tmp_path)
    assert str(tmp_path) in str(error.value) and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("files", "note"),
    [
        ({"metrics.jsonl": GOOD + "not json\n" + GOOD}, "metrics.jsonl is damaged: line 2 skipped."),
        ({"metrics.jsonl": GOOD + '{"loss": 1}\n{"step": "one"}\n' + GOOD}, "damaged: line 2 and 1 more skipped."),
        ({"metrics.jsonl": GOOD + "[" * 100_000 + "\n" + GOOD}, "metrics.jsonl is damaged: line 2 skipped."),
        ({"metrics.jsonl": GOOD + '{"step": 2, "loss": 1' + "0" * 400 + "}\n" + GOOD}, "run.json is missing."),
        ({"run.json": "{"}, "run.json is damaged and was skipped."),
        ({"run.json": "[]"}, "run.json is damaged and was skipped."),
        ({"run.json": '{"arguments": [1], "versions": 3, "topology": {"layout": 1}, "command": "x"}'}, "Settings"),
        ({"run.json": b"\xff"}, "run.json is damaged and was skipped."),
        ({"samples.jsonl": '{"step": 1}\n'}, "samples.jsonl is damaged: line 1 skipped."),
        ({"samples.jsonl": '{"step": 1, "prompt_id": [], "prompt": {}, "answer": 5}\n'}, "samples.jsonl is damaged"),
        ({"samples.jsonl": '{"step": 1, "prompt_id": 1, "prompt": "\\ud800", "answer": "\\ud800"}\n'}, "step 1 ·"),
        ({"alerts.jsonl": '{"step": 1, "alert": "kl"}\n'}, "alerts.jsonl is damaged: line 1 skipped."),
    ],
)
def test_what_is_damaged_is_noted_and_the_rest_is_shown(tmp_path, files, note):
    for name, content in ({"metrics.jsonl": GOOD} | files).items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    page = Page(write_report(tmp_path).read_text())
    assert note in page.text and "Training loss" in page.text


def test_of_samples_only_a_torn_last_line_is_lost(tmp_path):
    """It is torn inside a character; those before it hold what Python takes for the end of a line."""
    (tmp_path / "metrics.jsonl").write_text(GOOD)
    row = {"step": 1, "prompt_id": 1, "prompt": "p", "answer": "one\u2028two\u2029three\x85four"}
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    (tmp_path / "samples.jsonl").write_bytes(line * 2 + line[: line.index("\u2029".encode()) + 1])
    stage = read_stage(tmp_path)
    assert stage.samples == [row] * 2
    assert "The last line of samples.jsonl is incomplete and was skipped." in stage.notes


def test_alerts_stand_at_the_top_and_in_the_curves(tmp_path):
    write_ppo(tmp_path, iterations=10)
    plain = Page(write_report(tmp_path).read_text())
    alerts = [{"step": 3, "alert": "kl-exploding", "message": f"KL {kl}: raise kl_coeff"} for kl in (8, 9)]
    write_lines(tmp_path / "alerts.jsonl", [*alerts, alerts[0] | {"step": 7, "alert": "<i>", "message": "<script>"}])
    page = Page(write_report(tmp_path).read_text())
    assert "kl-exploding (2 times, step 3 to 3): KL 9: raise kl_coeff" in page.text and "<i> (step 7)" in page.text
    assert page.text.index("kl-exploding") < page.text.index("Held-out reward") and "i" not in page.tags
    assert page.images[0].tobytes() != plain.images[0].tobytes()


def test_command(tmp_path):
    write_sft(tmp_path)
    command = [sys.executable, "-m", "alignment.report"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "report.html"))
    failed = subprocess.run([*command, str(tmp_path / "absent")], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr == f"error: {tmp_path / 'absent'}: no such directory\n"
