"""What is said of options that cannot work, before anything is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import options

SCRIPTS = ("benchmarks.rollout", "benchmarks.ppo_iteration")


def run(module: str, *arguments: str) -> tuple[int, str]:
    result = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    return result.returncode, result.stderr


@pytest.mark.parametrize("module", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--pairs", "0"], "--pairs: '0' is not a whole number from 1"),
        (["--engine", "magic"], "--engine: invalid choice: 'magic' (choose from"),
        (["--json", "result.txt"], "--json: 'result.txt' must end in .json"),
        (["--json", "nowhere/result.json"], "--json: 'nowhere/result.json' must end in .json and lie in a directory"),
        (["--peer-python", "nowhere/python"], "--peer-python: nowhere/python is not a Python interpreter"),
    ],
)
def test_bad_option_is_one_line_and_status_2(module, arguments, named):
    status, said = run(module, *arguments)
    assert status == 2
    assert named in said
    assert said.count("\n") == 1


def test_minibatches_must_divide_the_batch():
    status, said = run("benchmarks.ppo_iteration", "--batch", "16", "--minibatches", "3")
    assert (status, said) == (2, "error: --minibatches 3: must divide --batch, 16\n")


def test_option_wins_over_variable_and_variable_over_the_usual_place(monkeypatch, tmp_path):
    usual = tmp_path / "python"
    usual.symlink_to(sys.executable)
    monkeypatch.setattr(options, "PEER_DEFAULT", usual)
    monkeypatch.setenv(options.PEER_VARIABLE, "/bin/sh")
    assert options.find_peer_python("/bin/cat") == "/bin/cat"
    assert options.find_peer_python(None) == "/bin/sh"
    monkeypatch.delenv(options.PEER_VARIABLE)
    assert options.find_peer_python(None) == str(usual)  # the link, which belongs to an environment


def test_without_peers_one_line_says_how_to_get_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(options, "PEER_DEFAULT", tmp_path / "missing")
    monkeypatch.delenv(options.PEER_VARIABLE, raising=False)
    assert options.find_peer_python(None) is None
    said = capsys.readouterr().out
    assert "benchmarks/peers/requirements.txt" in said
    assert said.count("\n") == 1
