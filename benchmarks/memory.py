"""Peak resident memory of PPO on the default model, with a reward model of its size, by offload level and with LoRA.

    python -m benchmarks.memory [--json FILE] [--folder DIRECTORY] [--only NAME ...] [--key value ...]

Every row of VARIANTS is a run of alignment/ppo/run_ppo.py in a process of its own, all four models float32 and all
layers trained, or with LoRA adapters beside all. Shown are the largest VmHWM that Linux reports of it, files that it
has mapped included, its ratio to the first row, and seconds of its last iteration. With --json, FILE gets all of it
and the resident memory over time, which a PNG beside it draws. --folder, for models and runs, must be on a disk:
10 GB. More pairs go to every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe_machine

CHECKOUT = Path(__file__).resolve().parents[1]
ALL = "freeze_model optimizer train_model"
LORA = {"lora": True, "num_layers_unfrozen": None}
VARIANTS = {  # name: arguments of the run
    "none": {},
    "freeze_model": {"offload_level": "freeze_model"},
    "optimizer": {"offload_level": "optimizer"},
    "train_model": {"offload_level": "train_model"},
    "freeze_model optimizer": {"offload_level": "freeze_model optimizer"},
    "freeze_model train_model": {"offload_level": "freeze_model train_model"},
    "optimizer train_model": {"offload_level": "optimizer train_model"},
    ALL: {"offload_level": ALL},
    "recompute": {"recompute": True},
    "lora": LORA,
    "lora, recompute": LORA | {"recompute": True},
}
ARGUMENTS = {
    "actor_model_name_or_path": "smollm2-135m-instruct",
    "train_datasets": "hh-excerpt/train",
    "max_length": 160,
    "max_prompt_len": 80,
    "max_new_tokens": 32,
    "per_device_prompt_batch_size": 16,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "num_layers_unfrozen": -1,
    "max_steps": 2,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "logging_steps": 1,
    "seed": 1,
    "disable_tqdm": True,
}
INTERVAL_S = 0.1  # between two looks at a process
MEASURED = ("timing_s/", "memory_gb/", "perf/")  # metrics that are times and memory
WRITE_REWARD_MODELS = """
import sys
from alignment.ppo.models.loading import resolve_model_directory
from alignment.ppo.models.lora import Base, LoRASettings, add_adapters
from alignment.ppo.models.saving import save_model
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.ppo.models.value import load_value
from alignment.ppo.models.weights import weights_sha256
model, directory = load_value("default", "reward", seed=1), resolve_model_directory("default").resolve()
save_model(model, load_tokenizer("default"), sys.argv[1])
add_adapters(model, LoRASettings(rank=8, alpha=16), Base(directory, weights_sha256(directory)), seed=1)
save_model(model, load_tokenizer("default"), sys.argv[1] + "_lora")
"""


def look_at(process: int) -> tuple[float, float]:
    """(VmRSS, VmHWM) of a process in MB."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))


def watch(command: list[str], log: Path) -> tuple[float, list[tuple[float, float]]]:
    """Run a command; returns its peak in MB, and (seconds since the start, resident MB) over its time."""
    started, peak, timeline = time.perf_counter(), 0.0, []
    with log.open("w") as shown:
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=shown, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                resident, highest = look_at(process.pid)
            except (OSError, KeyError):  # it ends just now: no file any more, or one without memory
                continue
            peak = max(peak, highest)
            timeline.append((round(time.perf_counter() - started, 2), round(resident)))
            time.sleep(INTERVAL_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return peak, timeline


def measure(name: str, folder: Path, overrides: list[str]) -> dict:
    """One row: a run and what it left behind."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        reward_model = folder / ("rm_lora" if "lora" in VARIANTS[name] else "rm")
        values = ARGUMENTS | {"reward_model_name_or_path": str(reward_model), "output_dir": f"{run}/out"}
        file = Path(run, "arguments.json")
        file.write_text(json.dumps(values | VARIANTS[name]))
        command = [sys.executable, "-u", "alignment/ppo/run_ppo.py", str(file), *overrides]
        peak, timeline = watch(command, Path(run, "log"))
        rows = [json.loads(line) for line in Path(run, "out", "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    return {
        "name": name,
        "peak_mb": round(max(peak, 1000 * last["perf/max_memory_gb"])),  # Linux's mark starts anew with each phase
        "iteration_s": last["perf/iteration_s"],
        "offload_s": last.get("timing_s/offload", 0.0),
        "timeline": timeline,
        "metrics": [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows],
    }


def draw(rows: list[dict], file: Path) -> None:
    """Resident memory over time, a line for each row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for row in rows:
        seconds, resident = zip(*row["timeline"], strict=True)
        axes.plot(seconds, [mb / 1e3 for mb in resident], label=f"{row['name']}: {row['peak_mb'] / 1e3:.2f} GB", lw=1)
    axes.set(xlabel="seconds since the start", ylabel="resident memory, GB", ylim=(0, None))
    axes.legend(title="row: peak", fontsize="small", loc="lower right")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options, overrides = parser.parse_known_args()
    facts, rows = describe_machine(), []
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'row':<36} {'peak MB':>8} {'ratio':>6} {'iteration s':>12} {'offload s':>10}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder.resolve()) as folder:
        subprocess.run([sys.executable, "-c", WRITE_REWARD_MODELS, f"{folder}/rm"], cwd=CHECKOUT, check=True)
        for name in options.only:
            row = measure(name, Path(folder), overrides)
            row["ratio"] = round(row["peak_mb"] / (rows[0] if rows else row)["peak_mb"], 3)
            rows.append(row)
            if options.json:
                options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
                draw(rows, options.json.with_suffix(".png"))
            times = f"{row['iteration_s']:12.2f} {row['offload_s']:10.3f}"
            print(f"{name:<36} {row['peak_mb']:8} {row['ratio']:6.2f} {times}", flush=True)
    levels = [row["metrics"] for row in rows if VARIANTS[row["name"]].keys() <= {"offload_level"}]
    same = all(metrics == levels[0] for metrics in levels)
    print(f"metrics of all steps at every offload level equal, bit for bit: {'yes' if same else 'no'}")


if __name__ == "__main__":
    main()
