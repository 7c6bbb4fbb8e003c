"""The report on realistic output directories, and on incomplete and corrupt ones."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from alignment.report.answers import choose_steps, lay_out
from alignment.report.plots import draw_stage, smooth
from alignment.report.reading import Stage, read_stages
from alignment.report.render import write_report
from alignment.report.tables import compare_rewards, headline, verdict, with_error
from alignment.runtime.faults import UsageError


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_ppo(directory, iterations=60, prompts=32):
    """What a PPO run leaves: reward rises and saturates, KL grows, answers shorten, values start off badly."""
    rng = np.random.default_rng(0)
    skill, level = rng.normal(0, 0.8, prompts), lambda step: 1.1 * (1 - np.exp(-step / 25))
    metrics, samples = [], []
    for step in range(iterations + 1):
        if step % 10 == 0:
            rewards = skill + level(step) + rng.normal(0, 0.25, prompts)
            metrics.append(
                {
                    "step": step,
                    "eval/reward_mean": rewards.mean(),
                    "eval/reward_sem": rewards.std(ddof=1) / prompts**0.5,
                    "eval/kl_mean": 0.06 * step + 0.01,
                    "eval/length_mean": 42 - 0.2 * step,
                    "eval/truncated_rate": 0.4 - 0.004 * step,
                }
            )
            samples += [
                {
                    "step": step,
                    "prompt_id": 100 + i,
                    "prompt": f"<|user|> What about <b>case {i}</b> | or *not*?\n<|assistant|>",
                    "answer": f"Step {step} says\nhello & goodbye to {i} <script>alert(1)</script>",
                    "reward": float(rewards[i]),
                    "length": 40 - i % 7,
                    "finished": i % 3 > 0,
                }
                for i in range(prompts)
            ]
        if step:
            noise = rng.normal(0, 1, 8)
            metrics.append(
                {
                    "step": step,
                    "rollout/reward_mean": level(step) + 0.2 * noise[0],
                    "objective/kl": 0.06 * step + 0.3 * abs(noise[1]),
                    "rollout/length_mean": 42 - 0.2 * step + noise[2],
                    "rollout/truncated_rate": np.clip(0.4 - 0.004 * step + 0.05 * noise[3], 0, 1),
                    "loss/policy_avg": -0.02 + 0.01 * noise[4],
                    "loss/value_avg": 0.6 * np.exp(-step / 12) + 0.05 * abs(noise[5]),
                    "policy/entropy_avg": 2.1 - 0.012 * step + 0.03 * noise[6],
                    "rewards/helpful": level(step) + 0.1 * noise[7],
                    "rewards/length": -0.1 + 0.02 * noise[0],
                    "timing_s/rollout": 4.1 + 0.2 * noise[1],
                    "timing_s/score": 0.8,
                    "memory_gb/score": 1.5,
                    "timing_s/update": 2.6 + 0.1 * noise[2],
                    "lr": 1e-5 * (1 - step / iterations),
                }
            )
    write_lines(directory / "metrics.jsonl", metrics)
    write_lines(directory / "samples.jsonl", samples)
    run = {
        "command": "run_ppo.py",
        "arguments": {"kl_coeff": 0.05, "critic": {"lr": 1e-5}},
        "versions": {"numpy": "1"},
    }
    (directory / "run.json").write_text(json.dumps(run))
    return samples


def write_rm(directory):
    rows = [
        {"step": s, "loss": 0.7 - 0.004 * s, "accuracy": 0.5 + 0.004 * s, "margin": 0.02 * s} for s in range(1, 51)
    ]
    rows += [{"step": s, "eval/accuracy": 0.5 + 0.003 * s, "eval/margin": 0.01 * s} for s in (0, 25, 50)]
    write_lines(directory / "metrics.jsonl", rows)


def write_sft(directory):
    write_lines(directory / "metrics.jsonl", [{"step": s, "train/loss": 3 / s, "lr": 1e-4} for s in range(1, 11)])


class Page(HTMLParser):
    """Collects text, tags and image bytes; fails on tags that do not nest."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.alts, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            named = dict(attributes)
            kind, _, data = named["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.images.append(Image.open(io.BytesIO(base64.b64decode(data))))
            assert (int(named["width"]), int(named["height"])) == self.images[-1].size
            self.alts.append(named["alt"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


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


def test_a_judge_has_its_rows_and_plots(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {
                "step": step,
                "eval/reward_mean": 0.5,
                "eval/judge_reward_mean": 0.25 * step,
                "eval/judge_reward_sem": 0.125,
                "eval/win_rate": 0.5 + 0.1 * step,
                "eval/win_rate_sem": 0.05 * step,
            }
            for step in range(3)
        ],
    )
    (stage,) = read_stages(tmp_path)
    assert [picture.key for picture in draw_stage(stage)] == ["reward", "judge", "win_rate"]
    judge, wins = headline(stage)[1:]
    assert (judge["start"], judge["final"], judge["change"]) == ("0.00 ± 0.12", "0.50 ± 0.12", "+0.5")
    assert wins["label"].startswith("Win rate") and (wins["start"], wins["final"]) == ("0.5 ± 0", "0.70 ± 0.10")


def rows(step, rewards):
    return [
        {"step": step, "prompt_id": i, "prompt": "p", "answer": "a", "reward": reward} for i, reward in rewards.items()
    ]


def test_paired_standard_error_by_hand():
    """Differences 1, 2, 3: mean 2, std(ddof=1) 1, standard error 1/sqrt(3), ratio 2 sqrt(3)."""
    samples = rows(0, {1: 0.0, 2: 10.0, 3: -5.0}) + rows(5, {1: 9.0, 2: 9.0}) + rows(9, {3: -2.0, 2: 12.0, 1: 1.0})
    paired = compare_rewards(samples)
    assert (paired.count, paired.difference) == (3, 2.0)
    assert paired.standard_error == pytest.approx(3**-0.5)
    assert paired.ratio == pytest.approx(2 * 3**0.5)


def test_paired_prompts_are_those_of_both_steps_and_answers_are_averaged():
    samples = rows(0, {1: 0.0, 2: 0.0, 8: 100.0}) + rows(4, {1: 2.0, 2: 1.0, 9: 100.0}) + rows(4, {1: 4.0})
    paired = compare_rewards(samples)
    assert (paired.count, paired.difference) == (2, 2.0)  # prompt 1: (2 + 4) / 2 - 0 = 3, prompt 2: 1


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([], ""),
        (rows(0, {1: 1.0}), ""),
        (rows(0, {1: 1.0}) + rows(1, {2: 1.0}), ""),
        (rows(0, {1: 1.0}) + rows(1, {1: float("nan")}), ""),
        (rows(0, {1: 1.0}) + rows(1, {1: 3.0}), "changed by +2; a standard error cannot be computed."),
        (rows(0, {1: 1.0, 2: 2.0}) + rows(1, {1: 3.0, 2: 4.0}), "changed by +2; a standard error cannot be computed."),
        (rows(0, {1: 1.0, 2: 2.0}) + rows(1, {1: 0.0, 2: -1.0}), "of 1: 2 standard errors below the start."),
    ],
)
def test_verdict_claims_no_more_than_the_samples_allow(samples, sentence):
    assert verdict(compare_rewards(samples)).endswith(sentence)
    assert bool(verdict(compare_rewards(samples))) == bool(sentence)


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


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(1.5569, 0.1165, "1.56 ± 0.12"), (24.95, 1.23, "24.9 ± 1.2"), (8e-5, 7e-6, "8e-05 ± 7e-06"), (2, 0, "2 ± 0")],
)
def test_a_value_is_as_precise_as_its_standard_error(value, error, text):
    assert with_error(value, error) == text


def test_resumed_run_counts_each_step_once_and_gaps_are_skipped(tmp_path):
    metrics = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 9.5}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}]
    write_lines(tmp_path / "metrics.jsonl", metrics)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": NaN}\n{"step": 5, "lo')
    (stage,) = read_stages(tmp_path)
    steps, values = stage.series("loss")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [9.0, 2.0])
    assert any("last line of metrics.jsonl is incomplete" in note for note in stage.notes)
    assert headline(stage) == [
        {"label": "Training loss (nats per token)", "start": "9", "final": "2", "change": "-7"},
    ]


def test_smoothing_neither_lags_nor_invents():
    line = np.arange(100.0)
    np.testing.assert_allclose(smooth(line)[5:-5], line[5:-5])
    jitter = np.where(np.arange(100) % 2, 1.0, -1.0)
    assert np.abs(smooth(jitter)).max() < 0.4
    assert smooth(line)[0] == 2.5  # the mean of the first six


def test_only_what_exists_is_drawn(tmp_path):
    assert draw_stage(Stage(tmp_path, "ppo", {"eval/unknown": {1: 1.0}})) == []
    pictures = draw_stage(Stage(tmp_path, "ppo", {"timing_s/rollout": {7: 1.0}, "eval/kl_mean": {0: 0.0}}))
    assert [picture.key for picture in pictures] == ["kl", "timing"]


GOOD = '{"step": 1, "loss": 1}\n'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no metrics.jsonl here or one level below"),
        ({"metrics.jsonl": ""}, "metrics.jsonl: no metrics yet"),
        ({"run.json": "{}"}, "metrics.jsonl: no metrics yet; metrics.jsonl is missing"),
        ({"metrics.jsonl": "[1]\n"}, "metrics.jsonl: no metrics yet; metrics.jsonl is damaged: line 1 skipped"),
        ({"metrics.jsonl": b"\xff\xfe\n"}, "no metrics yet; metrics.jsonl cannot be read: 'utf-8' codec"),
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
        ({"run.json": b"\xff"}, "run.json cannot be read: 'utf-8' codec"),
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


def test_logged_answers(tmp_path):
    """A run on logged answers is told from an online one, with and without answers of its own."""
    rows = [
        {"step": 0, "eval/loss": 3.0, "eval/reward_mean": 0.1, "eval/reward_sem": 0.05, "eval/kl_mean": 0.0},
        {"step": 1, "loss/value_avg": 0.9, "logged/score_mean": 0.4},
        {"step": 2, "loss/policy_avg": 2.5, "logged/answers": 8, "logged/score_mean": 0.4, "lr": 1e-4},
        {"step": 2, "eval/loss": 2.0, "eval/reward_mean": 0.3, "eval/reward_sem": 0.05, "eval/kl_mean": 0.7},
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (stage,) = read_stages(tmp_path)
    assert stage.kind == "offline" and stage.title.startswith("Logged answers")
    assert {picture.key for picture in draw_stage(stage)} == {
        *("reward", "kl", "policy_loss", "value_loss", "lr", "frontier")
    }
    changes = {row["label"]: row["change"] for row in headline(stage)}
    assert changes["Held-out reward"] == "+0.2" and changes["Loss on held-out logged answers"] == "-1"


def test_policy_updates(tmp_path):
    """DPO and RRHF are told by their metrics, RJS, which is supervised tuning, by what run.json says."""
    for update, names in {
        "dpo": ("loss", "accuracy", "rewards/chosen", "rewards/margin", "logps/chosen", "log_ratio"),
        "rrhf": ("loss", "accuracy", "rank_loss", "sft_loss", "logps/chosen", "logps/rejected"),
        "rjs": ("loss", "perplexity"),
    }.items():
        held_out = [{"step": step, **{f"eval/{name}": 1.0 + step for name in names}} for step in (0, 2)]
        write_lines(tmp_path / update / "metrics.jsonl", [*held_out, {"step": 1, **dict.fromkeys(names, 0.5)}])
    (tmp_path / "rjs" / "run.json").write_text(json.dumps({"stage": "update"}))
    drawn = {}
    for stage in read_stages(tmp_path):
        assert stage.title == f"Policy update ({stage.directory.name})"
        drawn[stage.directory.name] = [picture.key for picture in draw_stage(stage)]
    assert drawn == {
        "dpo": ["loss", "accuracy", "margin", "rewards", "logps", "log_ratio"],
        "rrhf": ["loss", "accuracy", "logps", "rank_loss", "sft_loss"],
        "rjs": ["loss"],
    }
    changes = {row["label"]: row["change"] for row in headline(read_stages(tmp_path / "dpo")[0])}
    assert changes["Held-out accuracy"] == changes["Held-out margin of the implicit reward"] == "+2"
