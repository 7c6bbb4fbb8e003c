"""Output directories as runs leave them, and a reader of pages, for the tests of the report."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
from PIL import Image


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


def rows(step, rewards):
    return [
        {"step": step, "prompt_id": i, "prompt": "p", "answer": "a", "reward": reward} for i, reward in rewards.items()
    ]


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
