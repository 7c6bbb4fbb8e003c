"""Every command's help, the list of commands, --print_config, nearest words, a reader that leaves."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.__main__ import GROUPS, list_commands, main
from alignment.runtime.arguments import resolve
from alignment.runtime.command_line import CommandParser
from alignment.runtime.document_arguments import SCRIPTS, groups_of
from alignment.runtime.faults import RUN_STATUS, STOPPED_STATUS, USAGE_STATUS, UsageError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [command for commands in GROUPS.values() for command in commands]
PPO = ["--output_dir=out", "--train_datasets=x", "--reward_server=http://h/", "--per_device_train_batch_size=16"]


def module_of(command):
    """A script by its path, or a module; a package's own __main__."""
    name = command.removesuffix(".py").replace("/", ".")
    folder = ROOT / name.replace(".", "/")
    return importlib.import_module(f"{name}.__main__" if folder.is_dir() else name)


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "argv", ["it", "--help"])
    with pytest.raises(SystemExit) as end:
        module_of(command).main()
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "--help" in shown
    longest = max(map(len, shown.splitlines()))
    assert longest <= min(width, 110), shown
    if command.startswith("alignment/"):
        assert "--print_config" in shown and "\n\n" in shown


def test_the_list_of_commands_fits_a_terminal_and_misses_none():
    assert max(map(len, list_commands().splitlines())) <= 80
    told = " ".join(list_commands().partition("Exit status: ")[2].split())
    assert told.startswith(f"0 done, {RUN_STATUS} a fault while running, {USAGE_STATUS} bad input, {STOPPED_STATUS} ")
    scripts = {str(path.relative_to(ROOT)) for path in (ROOT / "alignment").rglob("run_*.py")} - {
        "alignment/runtime/run_record.py"
    }
    assert scripts == {command for command in COMMANDS if command.endswith(".py")}


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alignment", "--version"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and capsys.readouterr().out.startswith("paddle-alignment 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--colour", "blu"], '\'blu\' is not allowed; it must be one of red, blue (did you mean "blue"?)'),
        (["--color", "red"], '--color: unknown option (did you mean "--colour"?)'),
        (["--col=red"], "--col: unknown option"),
        ([], "the following arguments are required: --colour"),
        (["--colour", "red", "more"], "unexpected 'more'"),
    ],
)
def test_faults_of_plain_commands(words, message):
    parser = CommandParser()
    parser.add_argument("--colour", choices=("red", "blue"), required=True)
    with pytest.raises(UsageError) as fault:
        parser.parse_args(words)
    assert str(fault.value).startswith("command line: ") and message in str(fault.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--policy_loss=ppp", '"ppp" is not allowed; it must be one of ppo, apa, awr (did you mean "ppo"?)'),
        ("--report_to=visualld", '(did you mean "visualdl"?)'),
        ("--kl_coef=1", '--kl_coef: unknown key (did you mean "kl_coeff"?)'),
        ("--print_confi", '(did you mean "print_config"?)'),
    ],
)
def test_nearest_word_of_a_stage(option, message):
    with pytest.raises(UsageError) as fault:
        resolve([*PPO, option], groups_of("ppo"))
    assert message in str(fault.value)


def printed(words, groups, capsys):
    with pytest.raises(SystemExit) as end:
        resolve([*words, "--print_config"], groups)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*/*.json")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_printed_arguments_are_an_argument_file(path, tmp_path, capsys):
    stage, offline = path.stem.removeprefix("offline_").partition("_")[0], path.stem.startswith("offline_")
    if stage == "apo":
        from alignment.apo.round_arguments import RoundArguments

        groups = (RoundArguments,)
    else:
        update = stage in ("rjs", "rrhf", "dpo")
        name = "ppo.offline" if offline else "apo.update" if update else stage
        groups = groups_of(name if name in SCRIPTS else "ppo")
    text = printed([str(path)], groups, capsys)  # one process prints what several will run
    (tmp_path / "again.json").write_text(text)
    assert printed([str(tmp_path / "again.json")], groups, capsys) == text
    assert json.loads(text).keys() >= json.loads(path.read_text()).keys() - {"max_src_len", "max_dec_len"}


def test_printed_arguments_hide_secrets(tmp_path, capsys):
    text = printed([*PPO, "--reward_server_token=s3cret"], groups_of("ppo"), capsys)
    assert "s3cret" not in text and json.loads(text)["reward_server_token"] == "***"
    (tmp_path / "again.json").write_text(text)
    assert resolve([str(tmp_path / "again.json")], groups_of("ppo"))["reward_server_token"] is None


def test_a_reader_that_leaves_is_no_fault():
    code = "from alignment.runtime.faults import run_main; run_main(lambda: [print('x' * 99) for _ in range(10000)])"
    shell = f'"{sys.executable}" -c "{code}" | head -1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["x" * 99, "141"] and done.stderr == ""
