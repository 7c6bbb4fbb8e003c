"""The game's data sets do not overlap, and its argument files are read and differ as they should."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from alignment.apo.round_arguments import RoundArguments
from alignment.runtime.arguments import parse
from alignment.runtime.faults import UsageError
from benchmarks.apo_game import GOLDEN, SIZES, choose_pairs, main


def row(query, good, bad, scores=(1, 0), other=None):
    texts = [f"\n\nHuman: {query}\n\nAssistant: {good}", f"\n\nHuman: {other or query}\n\nAssistant: {bad}"]
    return {"text": texts, "score": list(scores)}


ROWS = [row(f"Say {number}", f"{number}", "no") for number in range(sum(SIZES.values()))]


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["apo_game", *map(str, words)])
    main()


def test_pairs_that_fit():
    kept = row("a", "good", "bad")
    others = [
        row("a", "better", "worse"),  # the query has come
        row("b", "good", "bad", (1, 1)),
        row("c", "good", "bad", other="d"),
        row("e", "good" * 101, "bad"),
        row("f" * 721, "good", "bad"),
        row("g", " ", "bad"),
    ]
    turned = row("h", "bad", "good", (0, 1))
    assert choose_pairs([kept, *others, turned]) == [
        {"chosen": kept["text"][0], "rejected": kept["text"][1]},
        {"chosen": turned["text"][1], "rejected": turned["text"][0]},
    ]


def test_files_of_the_game(tmp_path, monkeypatch, capsys):
    source, folder = tmp_path / "helpful.test.json.gz", tmp_path / "game"
    source.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    call(monkeypatch, source, folder)
    assert f"python alignment/apo/run_apo.py {folder}/apo.json\n" in capsys.readouterr().out
    sets = {path.stem: path.read_text().splitlines() for path in folder.glob("*.jsonl")}
    assert {name: len(sets[name]) for name in SIZES} == SIZES
    assert len({line for name in SIZES for line in sets[name]}) == sum(SIZES.values())
    assert sets["golden"] == sets["pairs"][:GOLDEN] and sets["all"] == sets["pairs"] + sets["policy"]
    apo, rm_only = (vars(*parse([f"{folder}/{name}.json"], [RoundArguments])) for name in ("apo", "rm_only"))
    unlike = {key for key in apo if apo[key] != rm_only[key]}
    testing = {"testing_reward_datasets", "testing_reward_model_name_or_path"}
    assert unlike == {"adversarial", "golden_datasets", "output_dir", "reward_arguments"} | testing
    weights = apo["reward_arguments"].items() - rm_only["reward_arguments"].items()
    assert dict(weights) == {"apo_loss_coeff": 0.75, "apo_sample_num": 4}


@pytest.mark.parametrize("content", [b"{", b"[1]", b'[{"text": []}]', json.dumps(ROWS[:9]).encode()])
def test_other_files_are_refused(tmp_path, monkeypatch, content):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(UsageError, match="FILE: "):
        call(monkeypatch, tmp_path / "rows.json", tmp_path)
