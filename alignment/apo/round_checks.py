"""Whether the steps of a game would accept their arguments, before the first of them runs for hours."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from alignment.apo.round_arguments import RoundArguments, is_file
from alignment.apo.round_steps import SCRIPTS, StageStep
from alignment.runtime.faults import UsageError
from alignment.runtime.steps import CHECKOUT, Step, environment, shorten
from data import load_dataset_modules


def check_steps(steps: Sequence[Step], args: RoundArguments) -> None:
    """Raises UsageError, naming step and key, for the first argument that a step would refuse."""
    stages = [step for step in steps if isinstance(step, StageStep)]
    _elsewhere(_resolve, stages, args.nproc_per_node)


def check_queries(args: RoundArguments) -> None:
    """Read all prompts and golden answers, which otherwise a step does, hours later.

    Raises: UsageError or data.DataError, naming the file or data set, if that cannot be done.
    """
    _elsewhere(_read, args)


def _elsewhere(function: Callable[..., None], *words: Any) -> None:
    """Call it in a process of its own, for it takes Paddle, which this one is spared."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(function, *words).result()


def _read(args: RoundArguments) -> None:
    from alignment.apo.convert import read_golden
    from alignment.apo.queries import load_queries, read_queries

    load_dataset_modules(args.dataset_modules)
    read_golden(args.eval_datasets, args.data_seed)
    if args.adversarial:
        read_golden(args.golden_datasets, args.data_seed)
        if is_file(args.golden_datasets):
            read_queries(args.golden_datasets, args.golden_query_file)
    read = read_queries if is_file(args.policy_datasets) else partial(load_queries, seed=args.data_seed)
    read(args.policy_datasets)


def _resolve(steps: Sequence[StageStep], processes: int) -> None:
    os.environ["PADDLE_TRAINERS_NUM"] = str(processes)
    from alignment.apo.tool_arguments import SampleArguments, ScoreArguments
    from alignment.apo.update_arguments import GROUPS as POLICY
    from alignment.rm.arguments import GROUPS as REWARD
    from alignment.runtime.arguments import resolve

    groups = {"sample": [SampleArguments], "score": [ScoreArguments], "reward": REWARD, "policy": POLICY}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "argument.json"
        for step in steps:
            file.write_text(json.dumps(step.arguments))
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # its notices; the step gives them too
                    resolve([str(file)], groups[step.stage])
            except UsageError as fault:
                raise UsageError(f"step {step.name}: {str(fault).replace(f'{file}: ', '')}") from None


def rehearse_training(steps: Sequence[Step], args: RoundArguments) -> None:
    """Dry-run the first step of each kind of training, on people's pairs in place of what the game makes.

    A failing one ends this process with its exit status.
    """
    pairs = {"train_datasets": args.preference_datasets}
    replaced = {
        "reward": pairs | {"eval_datasets": args.eval_datasets, "model_name_or_path": args.reward_model_base},
        "policy": pairs | {"model_name_or_path": args.model_name_or_path},
    }
    for stage, own in replaced.items():
        # the testing model's steps come first, but the game's are what has the objective
        step = next(one for one in steps if getattr(one, "stage", "") == stage and one.name.startswith("round-"))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{stage}_argument.json"
            file.write_text(json.dumps(step.arguments | own | {"dry_run": True}))
            script = str(shorten(CHECKOUT / "alignment" / SCRIPTS[stage]))
            print(f"\ndry run of {step.name}, on people's pairs:", flush=True)
            command = [sys.executable, *shlex.split(script), str(file)]
            done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            sys.exit(done.returncode)
