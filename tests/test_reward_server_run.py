"""A whole PPO run whose reward server fails in the middle: a clear end, nothing lost, and the same numbers at last."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.stages import read_rows, run, weights_of, write_project

UNLIKE = ("timing_s/", "memory_gb/", "perf/")
STEPS = ("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 1, "--evaluation_strategy", "no",
         "--reward_function", "null", "--reward_server_timeout", 2)  # fmt: skip


class Vowels(ThreadingHTTPServer):
    """Scores answers by their vowels. The request number `fails_at`, and all after it, get `fault` instead."""

    daemon_threads = True

    def __init__(self, fault=None, fails_at=10**9, failures=10**9):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.failing, self.asked = fault, range(fails_at, fails_at + failures), 0
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/rewards"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number, server.asked = server.asked, server.asked + 1
        rewards = [sum(letter in "aeiou" for letter in text) / 4 for text in request["responses"]]
        reply = json.dumps({"rewards": rewards}).encode()
        fault = server.fault if number in server.failing else "none"
        if fault == "hang":
            server.released.wait(60)
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            for place in range(len(reply)):
                if server.released.wait(0.5):
                    return
                self.wfile.write(reply[place : place + 1])
        elif fault == "die":
            server.socket.close()  # nobody listens any more
        else:
            status, body = {
                "garbage": (200, b"<html>\xff"),
                "error": (500, b"out of memory"),
                "length": (200, json.dumps({"rewards": rewards[1:]}).encode()),
                "nan": (200, json.dumps({"rewards": [float("nan")] * len(rewards)}).encode()),
                "redirect": (302, b""),
                "none": (200, reply),
            }[fault]
            self.send_response(status)
            self.send_header("Location", "/rewards")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    with serving(Vowels()) as server:
        status, shown = run(folder, "ppo", "--output_dir", "whole", *STEPS, "--reward_server", server.url)
    assert status == 0, shown
    (folder / "asked").write_text(str(server.asked))
    return folder


def rows_of(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(UNLIKE)} for row in rows]


def assert_same_run(one, other):
    assert rows_of(one) == rows_of(other)
    for part in ("policy", "value"):
        first, second = (weights_of(folder / part / "checkpoint-4") for folder in (one, other))
        for name, value in first.items():
            np.testing.assert_array_equal(second[name], value, err_msg=name)


def fail_and_resume(project, fault, words):
    """The check at the start is request 0; of the others one or more come before the first of four checkpoints."""
    output = project / fault
    with serving(Vowels(fault, fails_at=3)) as server:
        started = time.monotonic()
        status, shown = run(project, "ppo", "--output_dir", fault, *STEPS, "--reward_server_retries", 1,
                            "--reward_server", server.url)  # fmt: skip
        assert time.monotonic() - started < 300
    assert status == 1, shown
    lines = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in shown, shown
    for word in (server.url, "failed 2 times", *words):
        assert word in lines[0]
    saved = sorted(path.name for path in (output / "policy").iterdir())
    assert saved and saved == sorted(path.name for path in (output / "value").iterdir())
    assert "checkpoint-4" not in saved
    with serving(Vowels()) as server:
        status, shown = run(project, "ppo", "--output_dir", fault, *STEPS, "--resume_from_checkpoint", "true",
                            "--reward_server", server.url)  # fmt: skip
    assert status == 0, shown
    assert_same_run(project / "whole", output)


def test_a_server_that_dies_in_the_middle(project):
    fail_and_resume(project, "die", ("Connection",))


@pytest.mark.trust_full
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang", ("no complete reply within 2 s",)),
        ("drip", ("no complete reply within 2 s",)),
        ("garbage", ("not JSON", "<html>")),
        ("error", ("HTTP 500: out of memory",)),
        ("length", ("rewards for",)),
        ("nan", ("returned nan for response 0", "not a finite")),
        ("redirect", ("HTTP 302",)),
    ],
)
def test_a_server_that_fails_in_the_middle(project, fault, words):
    fail_and_resume(project, fault, words)


@pytest.mark.trust_full
@pytest.mark.parametrize("fault", ["hang", "error", "garbage", "length", "nan", "redirect"])
def test_a_passing_fault_leaves_no_trace(project, fault):
    with serving(Vowels(fault, fails_at=3, failures=2)) as server:
        name = f"passing_{fault}"
        status, shown = run(project, "ppo", "--output_dir", name, *STEPS, "--reward_server", server.url)
        assert status == 0 and server.asked == int((project / "asked").read_text()) + 2, shown
    assert_same_run(project / "whole", project / name)
