"""Argument files and command lines, through the real parser of every stage: arguments, or one line."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path

from hypothesis import strategies as st

from alignment.apo.round_arguments import RoundArguments
from alignment.apo.tool_arguments import SampleArguments, ScoreArguments
from alignment.parallel.plan.arguments import read_arguments
from alignment.runtime.argument_fields import arguments_of
from alignment.runtime.arguments import resolve
from alignment.runtime.document_arguments import SCRIPTS, groups_of
from alignment.runtime.faults import UsageError
from data import DataError
from tests.fuzz.campaign import assert_one_line, fuzz
from tests.fuzz.documents import DEEP, SCALARS, VALUES, changed, damaged, dump
from tests.runtime.paddlenlp_files import PPO_2024, PPO_2025, RM_2024

CONFIG = Path(__file__).resolve().parents[2] / "config"
GROUPS = {stage: groups_of(stage) for stage in SCRIPTS}
GROUPS |= {"sample": (SampleArguments,), "score": (ScoreArguments,), "game": (RoundArguments,)}
KEYS = sorted({argument.name for groups in GROUPS.values() for group in groups for argument in arguments_of(group)})
FILES = [json.loads(path.read_text()) for path in sorted(CONFIG.glob("*/*.json"))] + [PPO_2024, PPO_2025, RM_2024]
stages = st.sampled_from(sorted(GROUPS))
keys = st.sampled_from(KEYS) | st.text(max_size=12)
files = changed(st.sampled_from(FILES) | st.just({}), keys)
words = st.one_of(
    st.tuples(keys, SCALARS.map(str)).map("--{0[0]}={0[1]}".format),
    keys.map("--{}".format),
    SCALARS.map(str),
    VALUES.map(dump),
    st.sampled_from(["-x", "--", "-", "--print_config", "--dry_run", "@x", "--help=1"]),
)


def settle(words, groups):
    """Arguments, their print, or a fault in one line; nothing else."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            assert isinstance(resolve(words, groups), dict)
        except (UsageError, DataError) as fault:
            assert_one_line(fault)
        except SystemExit as end:
            assert end.code == 0 and {"--print_config", "--help", "-h"} & set(words)


def settle_file(content, groups, *more):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "argument.json")
        path.write_bytes(content)
        settle([str(path), *more], groups)


@fuzz(150, 4000, stage=stages, content=files, dry=st.booleans())
def objects(stage, content, dry):
    """Objects with real and invented keys and any value."""
    settle_file(dump(content).encode(), GROUPS[stage], *["--dry_run"] * dry)


@fuzz(60, 1500, stage=stages, content=damaged(files.map(dump) | VALUES.map(dump) | DEEP) | st.binary(max_size=200))
def contents(stage, content):
    """Files that are broken, or no JSON at all."""
    settle_file(content, GROUPS[stage])


@fuzz(90, 2500, stage=stages, given_words=st.lists(words, max_size=6))
def command_lines(stage, given_words):
    """Words of any kind, also in place of the file."""
    settle(given_words, GROUPS[stage])


@fuzz(40, 1000, content=files, processes=st.integers(-1, 9))
def plans(content, processes):
    """The plan's own reader, which leaves other keys alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "argument.json")
        path.write_text(dump(content))
        try:
            read_arguments([str(path), f"--processes={processes}"])
        except UsageError as fault:
            assert_one_line(fault)


test_objects, test_objects_full = objects
test_contents, test_contents_full = contents
test_command_lines, test_command_lines_full = command_lines
test_plans, test_plans_full = plans
