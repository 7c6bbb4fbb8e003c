"""Rewards over HTTP: real servers that hang, fail, lie, die and come back, and the toolkit's own server."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import requests

from alignment.ppo import reward_server
from alignment.ppo.reward_server import RewardServer
from alignment.ppo.rewards import TOKEN_VARIABLE, FunctionReward, RewardBatch, ServerReward, WeightedRewards, server
from alignment.runtime.faults import RunError, UsageError
from tests.ppo.reward_examples import FUNCTIONS, Constant, make_batch


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTIONS)
    return path


@contextmanager
def serving(http_server):
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield http_server
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()


class Misbehaving(ThreadingHTTPServer):
    """Takes one behaviour of `script` per request; the last one stays."""

    daemon_threads = True

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), MisbehavingHandler)
        self.script, self.requests, self.released = list(script), [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"

    def shutdown(self):
        self.released.set()
        super().shutdown()


class MisbehavingHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((dict(self.headers), body))
        script = self.server.script
        behaviour = script.pop(0) if len(script) > 1 else script[0]
        good = json.dumps({"rewards": [float(len(r)) for r in body["responses"]]}).encode()
        if behaviour == "good":
            self.reply(200, good)
        elif behaviour == "hang":
            self.server.released.wait(30)
        elif behaviour == "cut":
            self.reply(200, good[:5], length=len(good))
        elif behaviour == "header":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not self.server.released.wait(0.02):
                self.wfile.write(b"X: y\r\n"[: 1 + len(self.server.requests) % 2])
        elif behaviour == "trickle":
            self.reply(200, b" ", length=1000)
            while not self.server.released.wait(0.05):
                self.wfile.write(b" ")
        elif isinstance(behaviour, int):
            self.reply(behaviour, b"out of\nmemory")
        elif isinstance(behaviour, bytes):
            self.reply(200, behaviour)
        # "drop": close without a word

    def reply(self, status, body, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE_S", 0.02)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def test_server_reward_sends_everything_and_reads_the_rewards():
    batch = make_batch()
    with serving(Misbehaving("good")) as http_server:
        rewards = ServerReward(http_server.url)(batch)
    (_, body), = http_server.requests  # fmt: skip
    assert rewards.dtype == np.float32 and rewards.tolist() == [5, 1, 5, 3]
    assert body == {
        "prompts": batch.prompts,
        "responses": batch.responses,
        "finished": [True, False, True, False],
        "samples": batch.samples,
    }


@pytest.mark.parametrize(
    "fault",
    ["hang", "drop", "cut", "trickle", "header", 500, 503, 429, 302, b"<html>", b'{"rewards": [1]}'],
)
def test_passing_fault_is_retried(fault):
    with serving(Misbehaving(fault, fault, "good")) as http_server:
        assert ServerReward(http_server.url, timeout=0.3, retries=2)(make_batch()).tolist() == [5, 1, 5, 3]
    assert len(http_server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("hang", "failed 2 times, last: no complete reply within 0.2 s"),
        ("drop", "failed 2 times, last: RemoteDisconnected"),
        ("cut", "failed 2 times, last: IncompleteRead"),
        ("trickle", "failed 2 times, last: no complete reply within 0.2 s"),
        ("header", "failed 2 times, last: no complete reply within 0.2 s"),
        (500, "failed 2 times, last: HTTP 500: out of memory"),
        (302, "failed 2 times, last: HTTP 302"),
        (b"<html>busy</html>", "failed 2 times, last: the reply is not JSON: '<html>busy"),
        (b"\xff\xfe", "the reply is not JSON"),
        (b"[" * 20_000, "the reply is not JSON"),
        (b'{"rewards": [1' + b"0" * 10_000 + b"]}", "the reply is not JSON"),
        (b"[1, 2, 3, 4]", 'no "rewards"'),
        (b'{"rewards": 1}', "it returned int, not a sequence of 4 numbers"),
        (b'{"rewards": [1, 2, 3]}', "it returned 3 rewards for 4 responses"),
        (b'{"rewards": [1, NaN, 3, 4]}', "it returned nan for response 1"),
        (b'{"rewards": [1, 2, null, 4]}', "it returned None for response 2"),
        (b'{"rewards": [1, 2, 3, 4]' + b" " * 100_000 + b"}", "the reply is longer than 66560 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_lasting_fault_ends_the_run(fault, message):
    with serving(Misbehaving(fault)) as http_server, pytest.raises(RunError, match=message) as error:
        ServerReward(http_server.url, timeout=0.2, retries=1)(make_batch())
    assert http_server.url in str(error.value) and len(http_server.requests) == 2 and "\n" not in str(error.value)


def test_status_that_calls_the_request_wrong_ends_the_run_at_once():
    with serving(Misbehaving(404)) as http_server, pytest.raises(RunError, match="HTTP 404: out of memory"):
        ServerReward(http_server.url, timeout=5, retries=3)(make_batch())
    assert len(http_server.requests) == 1


def test_time_limit_holds_for_a_connection_that_is_used_again():
    with serving(RewardServer(Constant(1.0))) as http_server:
        source = ServerReward(http_server.url, timeout=0.3, retries=0)
        source.check()
        http_server.source = lambda batch: time.sleep(1) or np.zeros(len(batch))
        with pytest.raises(RunError, match="no complete reply within 0.3 s"):
            source(make_batch())


def test_long_batch_is_sent_in_parts(monkeypatch):
    batch = make_batch()
    with serving(Misbehaving("good")) as http_server:
        monkeypatch.setattr(server, "REQUEST_BYTES", len(server._encode(batch)) // 2)
        assert ServerReward(http_server.url)(batch).tolist() == [5, 1, 5, 3]
        assert sum((body["responses"] for _, body in http_server.requests), []) == batch.responses
        monkeypatch.setattr(server, "REQUEST_BYTES", 20)
        with pytest.raises(RunError, match="one answer takes .* bytes, more than 20"):
            ServerReward(http_server.url)(batch)


def exchange(http_server, *pieces, pause=0.0):
    """What the server sends back on one connection until it closes it."""
    with socket.create_connection(http_server.server_address[:2], timeout=20) as connection:
        with contextlib.suppress(OSError):  # the server may hang up first
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while block := connection.recv(4096):
                received += block
    return received


def test_reward_server_cuts_off_what_arrives_too_slowly(monkeypatch):
    monkeypatch.setattr(reward_server, "REQUEST_SECONDS", 0.3)
    head = b"POST /rewards HTTP/1.1\r\nContent-Type: application/json\r\n"
    with serving(RewardServer(Constant(1.0))) as http_server:
        assert exchange(http_server, *[head[place : place + 1] for place in range(40)], pause=0.05) == b""
        assert exchange(http_server, head + b"Content-Length: 9\r\n\r\n", *[b" "] * 8, pause=0.1) == b""
        ServerReward(http_server.url).check()


def test_reward_server_takes_so_many_connections_at_once(monkeypatch):
    monkeypatch.setattr(reward_server, "CONNECTIONS", 2)
    with serving(RewardServer(Constant(1.0))) as http_server:
        held = [socket.create_connection(http_server.server_address[:2]) for _ in range(2)]
        assert exchange(http_server) == b""
        for connection in held:
            connection.close()
        assert ServerReward(http_server.url, retries=5)(make_batch()).tolist() == [1] * 4


def test_server_that_comes_back_is_found(monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE_S", 0.2)
    with serving(Misbehaving("good")) as first:
        source = ServerReward(first.url, timeout=2, retries=5)
        source(make_batch())
    with pytest.raises(RunError, match="failed 1 times, last: ConnectionRefusedError"):
        ServerReward(first.url, timeout=2, retries=0).check()
    revived = []

    def revive():
        time.sleep(0.5)
        revived.append(RewardServer(WeightedRewards([Constant(4.0)]), port=first.server_address[1]))
        with serving(revived[0]):
            done.wait(30)

    done = threading.Event()
    source.url += "rewards"
    thread = threading.Thread(target=revive)
    thread.start()
    try:
        assert source(make_batch()).tolist() == [4, 4, 4, 4]
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/x", "http://", "http://[::1", "http://me:secret@host/rewards"]
)
def test_bad_url_is_refused_at_start(url):
    with pytest.raises(UsageError) as error:
        ServerReward(url)
    assert "secret" not in str(error.value)


def test_sample_that_is_not_json_is_named():
    batch = RewardBatch(["p"], ["r"], np.array([True]), [{"input": {1, 2}}])
    with pytest.raises(RunError, match="cannot be sent as JSON: Object of type set"):
        ServerReward("http://127.0.0.1:9/")(batch)


def test_start_check_passes_only_with_the_token(monkeypatch):
    with serving(RewardServer(Constant(1.5), token="right")) as http_server:
        for token in (None, "wrong"):
            with pytest.raises(RunError, match="HTTP 401: .*token.*start check"):
                ServerReward(http_server.url, token=token).check()
        monkeypatch.setenv(TOKEN_VARIABLE, "right")
        source = ServerReward(http_server.url)
        source.check()
        assert WeightedRewards([source]).score(make_batch())[1]["rewards/server"].tolist() == [1.5] * 4


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("/other", {}, b"{}", 404),
        ("/rewards", {"Content-Type": "text/plain"}, b"{}", 415),
        ("/rewards", {"Content-Length": "999999999999"}, b"", 413),
        ("/rewards", {}, b"{", 400),
        ("/rewards", {}, b"[" * 9999, 400),
        ("/rewards", {}, b'{"prompts": ["\\ud800"], "responses": ["r"]}', 400),
        ("/rewards", {}, b"[]", 400),
        ("/rewards", {}, b'{"prompts": ["p"], "responses": "r"}', 400),
        ("/rewards", {}, b'{"prompts": ["p"], "responses": []}', 400),
        ("/rewards", {}, b'{"prompts": ["p"], "responses": ["r"], "samples": [1]}', 400),
        ("/rewards", {}, b'{"prompts": ["p"], "responses": ["r"]}', 200),
    ],
    ids=lambda value: str(value)[:30],
)
def test_reward_server_refuses_bad_requests(path, headers, body, status):
    with serving(RewardServer(Constant(1.0))) as http_server:
        url = http_server.url.removesuffix("/rewards") + path
        reply = requests.post(url, data=body, headers={"Content-Type": "application/json", **headers}, timeout=10)
    assert reply.status_code == status and ("error" in reply.json()) == (status != 200)


def test_reward_server_reports_the_function_s_fault(functions, capfd):
    with serving(RewardServer(FunctionReward(f"{functions}:broken"))) as http_server:
        with pytest.raises(RunError, match="failed 2 times, last: HTTP 500: .*ZeroDivisionError"):
            ServerReward(http_server.url, retries=1)(make_batch())
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_reward_server_needs_a_token_beyond_loopback():
    with pytest.raises(UsageError, match=TOKEN_VARIABLE):
        RewardServer(Constant(1.0), host="0.0.0.0")


def test_reward_server_serves_on_ipv6_loopback():
    try:
        server = RewardServer(Constant(2.0), host="::1")
    except UsageError as fault:  # a machine without IPv6
        assert "cannot serve on [::1]:0: " in str(fault)
        return
    with serving(server) as http_server:
        assert http_server.url.startswith("http://[::1]:")
        assert ServerReward(http_server.url)(make_batch()).tolist() == [2, 2, 2, 2]


def test_reward_server_command(functions):
    command = [sys.executable, "-m", "alignment.ppo.reward_server", "--port", "0", "--reward_function"]
    with subprocess.Popen([*command, f"{functions}:words"], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[-1]
            source = ServerReward(url, timeout=20)
            source.check()
            assert source(make_batch()).tolist() == [3, 1, 1, 2]
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    refused = subprocess.run([*command, f"{functions}:absent"], capture_output=True, text=True)
    assert refused.returncode == 2 and "absent" in refused.stderr and "Traceback" not in refused.stderr
