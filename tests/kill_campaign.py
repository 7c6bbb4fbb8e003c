"""Kills runs at random moments, resumes them, and compares the end with an uninterrupted run's, bit by bit.

    python tests/kill_campaign.py [--kills 30] [--seed 0] [--cases sft ppo-tp2 ...]

A kill is SIGKILL to all processes of a run at once; every other one waits for a checkpoint that is being written.
Every run is resumed by ``--resume_from_checkpoint auto`` and may be killed again. Prints a line a kill and a table.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests.stages import SCRIPTS, read_rows, write_project
from tests.warm import Job, Warm

UNLIKE = ("timing_s/", "perf/", "memory_gb/")
STEPS = ("--max_steps", 6, "--save_strategy", "steps", "--save_steps", 1, "--lr_scheduler_type", "cosine")
CASES = {  # name: (stage, processes, arguments)
    "sft": ("sft", 1, ("--evaluation_strategy", "steps", "--eval_steps", 2, "--load_best_model_at_end", "true")),
    "rm": ("rm", 1, ()),
    "ppo": ("ppo", 1, ("--kl_controller", "adaptive", "--kl_target", 0.01, "--kl_horizon", 50)),
    "ppo-dp2": ("ppo", 2, ("--per_device_prompt_batch_size", 2)),
    "ppo-tp2": ("ppo", 2, ("--tensor_parallel_degree", 2)),
    "ppo-pp2": ("ppo", 2, ("--pipeline_parallel_degree", 2)),
    "offline": ("offline", 1, ("--critic_refresh", 3)),
}
PARTS = ("", "policy", "value")
SAVE_SECONDS = 0.05  # about what a tiny model's checkpoint takes
AGAIN = 0.25  # of the resumed runs are killed once more


class Campaign:
    """folder: with a project of tests.stages; moments: draws when to kill."""

    def __init__(self, warm: Warm, folder: Path, moments: random.Random) -> None:
        self.warm, self.folder, self.moments = warm, folder, moments
        self.counts: dict[str, Counter] = {}
        self._whole: dict[str, tuple[Path, float]] = {}

    def kill(self, case: str, in_save: bool) -> None:
        """One run of ``case`` that is killed, once at least; AssertionError unless it ends as the whole one."""
        (whole, seconds), counts = self._run_whole(case), self.counts.setdefault(case, Counter())
        output = self.folder / "killed"
        shutil.rmtree(output, ignore_errors=True)
        more = ("--use_async_save", self.moments.choice(["true", "false"]), "--resume_from_checkpoint", "auto")
        kills = 0
        while kills == 0 or self.moments.random() < AGAIN:
            job = self._start(case, output, *more)
            if self._kill_at_a_moment(job, output, seconds, in_save):
                kills += 1
                counts.update(kills=1, during_a_save=_is_torn(output))
            elif kills == 0:
                shutil.rmtree(output)  # it was faster
        job = self._start(case, output, *more)
        statuses = job.wait()
        assert not any(statuses), (case, statuses, job.shown)
        counts.update(resumed=1, passed_over=job.shown.count("is passed over"))
        assert_same(whole, output)
        print(f"{case}: killed {kills} times {'near a save' if in_save else 'anywhere'}: the same end", flush=True)

    def _run_whole(self, case: str) -> tuple[Path, float]:
        if case not in self._whole:
            output, started = self.folder / f"whole-{case}", time.monotonic()
            job = self._start(case, output)
            assert not any(job.wait()), job.shown
            self._whole[case] = output, time.monotonic() - started
        return self._whole[case]

    def _start(self, case: str, output: Path, *more: object) -> Job:
        stage, processes, words = CASES[case]
        words = (f"{stage}.json", "--output_dir", output.name, *STEPS, *words, *more)
        return self.warm.start(self.folder, SCRIPTS[stage], *words, processes=processes)

    def _kill_at_a_moment(self, job: Job, output: Path, seconds: float, in_save: bool) -> bool:
        """Whether it was still running then."""
        if in_save:
            saves, seen, pause = self.moments.randint(1, 5), set(), self.moments.uniform(0, SAVE_SECONDS)
            while job.is_running() and len(seen) < saves:
                for part in PARTS:  # no "**": the directories that it would look into come and go
                    seen |= {path.name for path in (output / part).glob(".checkpoint-*.partial")}
                time.sleep(0.001)
        else:
            pause = self.moments.uniform(0.05, seconds)
        time.sleep(pause)
        if not job.is_running():
            return False
        job.signal(signal.SIGKILL)
        return all(status == -signal.SIGKILL for status in job.wait())


def _is_torn(output: Path) -> bool:
    """Whether something of a checkpoint is there that is none yet."""
    if any(output.glob("**/.checkpoint-*")):
        return True
    parts = [{path.name for path in (output / part).glob("checkpoint-*")} for part in PARTS[1:]]
    return (output / "value").exists() and parts[0] != parts[1]


def assert_same(whole: Path, killed: Path) -> None:
    """All files of all checkpoints, samples, and metrics but those of time and memory."""
    one, other = (
        {path.relative_to(folder): path for path in folder.glob("**/checkpoint-*/**/*") if path.is_file()}
        for folder in (whole, killed)
    )
    assert one and sorted(one) == sorted(other), set(one) ^ set(other)
    for name, path in one.items():
        assert path.read_bytes() == other[name].read_bytes(), name
    assert rows_of(whole / "metrics.jsonl") == rows_of(killed / "metrics.jsonl")
    if (whole / "samples.jsonl").exists():
        assert (whole / "samples.jsonl").read_bytes() == (killed / "samples.jsonl").read_bytes()


def rows_of(path: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith(UNLIKE)} for row in read_rows(path)]


def run_campaign(folder: Path, kills: int, seed: int, cases: list[str]) -> dict[str, Counter]:
    """So many killed runs, the cases in turn; returns the counts by case."""
    write_project(folder)
    with Warm(folder / "logs") as warm:
        campaign = Campaign(warm, folder, random.Random(seed))
        for number in range(kills):
            campaign.kill(cases[number % len(cases)], in_save=number // len(cases) % 2 == 0)
    return campaign.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = run_campaign(Path(folder), options.kills, options.seed, options.cases)
    names = ("kills", "during_a_save", "resumed", "passed_over")
    print(f"{'case':10}" + "".join(f"{name:>15}" for name in names))
    for case, row in {**counts, "all": sum(counts.values(), Counter())}.items():
        print(f"{case:10}" + "".join(f"{row[name]:15}" for name in names))
    print(f"every resumed run ended as the uninterrupted one; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
