"""Data and arguments of the game in docs/apo.md: ``python -m benchmarks.apo_game FILE FOLDER`` says how to play it.

FILE: helpful.test.json, also gzipped, of the HH data as cleaned for APO (arXiv:2311.08045; CC BY-NC 4.0): rows of two
texts and their scores.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

from alignment.runtime.faults import UsageError, run_main
from benchmarks.options import Parser
from benchmarks.paired import CHECKOUT
from data.builtin.apo import split_text

MARK = "\n\nAssistant:"
LONGEST_QUERY, LONGEST_ANSWER = 720, 400  # characters
SIZES = {"test": 160, "spare": 40, "sft": 320, "pairs": 360, "policy": 240}  # in this order; spare: not used
GOLDEN = 48  # the first of the pairs
SFT = {
    "model_name_or_path": "smollm2-135m-instruct", "max_length": 288, "num_layers_unfrozen": 4, "num_train_epochs": 1,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 8,
    "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "evaluation_strategy": "epoch",
    "logging_steps": 5, "save_strategy": "no", "seed": 1,
}  # fmt: skip
CHANGES = {  # of config/smollm2/apo*_argument.json
    "sample_arguments": {"max_new_tokens": 64},
    "reward_arguments": {"max_length": 320},
    "policy_arguments": {"max_length": 320},
}
COMMANDS = """python alignment/sft/run_sft.py {0}/sft.json
python alignment/apo/run_apo.py {0}/apo.json
python alignment/apo/run_apo.py {0}/rm_only.json
python -m alignment.apo.compare {0}/apo {0}/rm_only"""


def choose_pairs(rows: Sequence[dict]) -> list[dict]:
    """Short pairs of one query, each query once: {"chosen", "rejected"}, whole dialogues."""
    found: dict[str, dict] = {}
    for row in rows:
        if row["score"][0] == row["score"][1]:
            continue
        best = row["score"].index(max(row["score"]))
        texts = row["text"][best], row["text"][1 - best]
        parts = [split_text(text) for text in texts]
        if None in parts or parts[0][0] != parts[1][0]:
            continue
        (query, good), (other, bad) = (text.rsplit(MARK, 1) for text in texts)
        if query == other and len(query) <= LONGEST_QUERY and max(len(good), len(bad)) <= LONGEST_ANSWER:
            if good.strip() and bad.strip():
                found.setdefault(query, {"chosen": texts[0], "rejected": texts[1]})
    return list(found.values())


def write_sets(pairs: list[dict], folder: Path) -> None:
    """The sets of the game as JSON lines. Raises UsageError if there are too few pairs."""
    if len(pairs) < sum(SIZES.values()):
        raise UsageError(f"FILE: {len(pairs)} pairs that fit are too few; the game needs {sum(SIZES.values())}")
    random.Random(0).shuffle(pairs)
    sets, start = {}, 0
    for name, size in SIZES.items():
        sets[name], start = pairs[start : start + size], start + size
    sets |= {"golden": sets["pairs"][:GOLDEN], "all": sets["pairs"] + sets["policy"]}
    for name, part in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))


def write_arguments(folder: Path) -> None:
    """sft.json, apo.json and rm_only.json, whose runs are the directories of the same names."""
    data = {name: f"local:1:{folder}/{name}.jsonl" for name in (*SIZES, "golden", "all")}
    sft = {"train_datasets": data["sft"], "eval_datasets": data["test"], "output_dir": f"{folder}/sft"}
    shared = {"model_name_or_path": f"{folder}/sft", "reward_model_base": SFT["model_name_or_path"]}
    shared |= {f"{name}_datasets": data[own] for name, own in
               (("preference", "pairs"), ("policy", "policy"), ("eval", "test"))}  # fmt: skip
    own = {
        "apo": {"golden_datasets": data["golden"], "testing_reward_datasets": data["all"]},
        "rm_only": {"testing_reward_datasets": None, "testing_reward_model_name_or_path": f"{folder}/apo/testing_rm"},
    }
    games = {"apo": "apo_argument", "rm_only": "apo_baseline_argument"}
    files = {"sft": SFT | sft}
    for name, preset in games.items():
        values = json.loads((CHECKOUT / f"config/smollm2/{preset}.json").read_text())
        values |= {key: values[key] | change for key, change in CHANGES.items()}
        files[name] = values | shared | own[name] | {"output_dir": f"{folder}/{name}"}
    files["apo"]["reward_arguments"]["apo_loss_coeff"] = 0.75  # so all golden prompts weigh a tenth of people's pairs
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    """Write the files and print the commands."""
    parser = Parser(prog="python -m benchmarks.apo_game", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        content = options.file.read_bytes()
        rows = json.loads(gzip.decompress(content) if options.file.suffix == ".gz" else content)
        pairs = choose_pairs(rows)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as fault:
        raise UsageError(f"FILE: {options.file}: no comparisons as cleaned for APO: {fault}") from None
    options.folder.mkdir(parents=True, exist_ok=True)
    write_sets(pairs, options.folder)
    write_arguments(options.folder)
    print(COMMANDS.format(options.folder))


if __name__ == "__main__":
    run_main(main)
