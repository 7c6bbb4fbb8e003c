"""Steps run once each, are refused or done again when they change, and end with their runner."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest

from alignment.runtime.faults import UsageError
from alignment.runtime.steps import CHECKOUT, Step, StepRunner, knows


@pytest.fixture
def play(tmp_path, monkeypatch):
    """(letters, replace) -> what the steps named by them wrote into the log; step "x" fails with status 3."""
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "log"
    log.write_text("")

    def call(letters, replace=False, told=""):
        code = "import sys; open({!r}, 'a').write({!r}); sys.exit({})"
        steps = []
        for letter in letters:
            shown = letter + told if letter == "b" else letter
            words = ["-c", code.format(str(log), shown, 3 if letter == "x" else 0)]
            steps.append(Step(letter, shlex.join(words), tmp_path / f"{letter}.out"))
        runner = StepRunner(tmp_path / "out" / "steps.json", steps, replace)
        try:
            for step in steps:
                runner.run(step)
        finally:
            runner.close()
        return log.read_text()

    return call


def test_steps_run_once_and_new_ones_follow(play, tmp_path):
    assert play("ab") == "ab"
    assert play("ab") == "ab"
    assert play("abc") == "abc"
    assert play("ab") == play("abc") == "abc"
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["finished"] == ["a", "b", "c"]


def test_a_failing_step_ends_it_with_its_status_and_is_run_again(play, tmp_path):
    with pytest.raises(SystemExit) as ended:
        play("axc")
    assert ended.value.code == 3
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["begun"] == "x"
    (tmp_path / "x.out").write_text("of the failed attempt")
    with pytest.raises(SystemExit):
        play("axc")
    assert (tmp_path / "log").read_text() == "axx" and not (tmp_path / "x.out").exists()


def test_a_changed_step_is_refused_or_done_again_with_all_after_it(play):
    play("abc")
    with pytest.raises(UsageError, match='step b was begun with "command": .*, which is .* now; name another, or set'):
        play("abc", told="!")
    with pytest.raises(UsageError, match="step d is new before finished ones"):
        play("adbc")
    assert play("abc", replace=True, told="!") == "abcb!c"
    assert play("abc", told="!") == "abcb!c"


def test_knows(tmp_path):
    steps = [Step("a", "-c pass"), Step("b", "-c pass")]
    assert not knows(tmp_path / "steps.json", steps)
    StepRunner(tmp_path / "steps.json", steps, False).close()
    assert knows(tmp_path / "steps.json", steps[:1]) and not knows(tmp_path / "steps.json", [Step("a", "-c 1")])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_step_ends_with_its_killed_runner_and_until_then_keeps_others_out(tmp_path):
    record, mark = tmp_path / "steps.json", tmp_path / "mark"
    wait = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    sleeper = shlex.join(["-c", wait])
    code = (
        "from pathlib import Path; from alignment.runtime.steps import Step, StepRunner\n"
        f"step = Step('sleep', {sleeper!r}); StepRunner(Path({str(record)!r}), [step], False).run(step)"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    _wait_for(lambda: mark.exists() and mark.read_text())
    with pytest.raises(UsageError, match='"output_dir": another process is at work in'):
        StepRunner(record, [Step("sleep", sleeper)], False)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    _wait_for(lambda: not _is_running(int(mark.read_text())))
    StepRunner(record, [Step("sleep", sleeper)], False).close()


@pytest.mark.parametrize("saves", ["75", "0"], ids=["unfinished", "finished"])
def test_sigterm_is_passed_on_and_a_second_run_goes_on(tmp_path, saves):
    """Whether or not the running step came to its end in spite of it."""
    record, mark, log = tmp_path / "steps.json", tmp_path / "mark", tmp_path / "log"
    step = (
        "import os, signal, sys, time\nif os.path.exists({1!r}): open({0!r}, 'a').write('resumed'), sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open({0!r}, 'a').write('saved '), sys.exit({2})))\n"
        "open({1!r}, 'w'); time.sleep(60)"
    )
    step = shlex.join(["-c", step.format(str(log), str(mark), saves)])
    after = shlex.join(["-c", f"open({str(log)!r}, 'a').write(' after')"])
    code = (
        "from pathlib import Path; from alignment.runtime.faults import run_main\n"
        "from alignment.runtime.steps import Step, StepRunner\n"
        f"steps = [Step('first', {step!r}), Step('second', {after!r})]\n"
        f"runner = StepRunner(Path({str(record)!r}), steps, False)\n"
        "run_main(lambda: [runner.run(step) for step in steps])"
    )
    command = [sys.executable, "-c", code]
    runner = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
    _wait_for(mark.exists)
    runner.send_signal(signal.SIGTERM)
    said = runner.communicate()[1]
    assert runner.returncode == 75 and log.read_text() == "saved "
    assert said.startswith("stopped: SIGTERM, which the running step got too") and said.count("\n") == 1
    subprocess.run(command, cwd=CHECKOUT, check=True)
    assert log.read_text() == ("saved  after" if saves == "0" else "saved resumed after")


def _is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
