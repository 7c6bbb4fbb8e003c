"""Serve a reward source over HTTP: python -m alignment.ppo.reward_server --reward_function module:name --port 8100

Speaks the protocol of ServerReward (docs/rewards.md). Set ALIGNMENT_REWARD_TOKEN to ask for a bearer token; beyond
the loopback interface it is required.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from alignment.ppo.rewards.base import RewardBatch, RewardSource
from alignment.ppo.rewards.function import FunctionReward
from alignment.ppo.rewards.server import LOOPBACK, REQUEST_BYTES, TOKEN_VARIABLE
from alignment.runtime.command_line import CommandParser
from alignment.runtime.faults import RunError, UsageError, run_main
from data.limits import parse_json, reason_of

PATH = "/rewards"
REQUEST_SECONDS = 60.0  # for a whole request to arrive
CONNECTIONS = 32  # at once; more are hung up on, and asked to come again


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Answers POST /rewards from `source`, one batch at a time, as neither functions nor models need be thread-safe.

    port 0 takes a free one; see `url`. Raises UsageError for an address that cannot be bound.
    """

    daemon_threads = True

    def __init__(self, source: RewardSource, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        if host not in LOOPBACK and not token:
            raise UsageError(f"host {host!r}: set {TOKEN_VARIABLE} to serve beyond the loopback interface")
        self.source, self.token, self.lock = source, token, threading.Lock()
        self.places = threading.BoundedSemaphore(CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"cannot serve on {_join(host, port)}: {reason}") from error

    @property
    def url(self) -> str:
        return f"http://{_join(*self.server_address[:2])}{PATH}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """See socketserver: a thread for each connection, as long as there are not too many."""
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """See socketserver."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is its own affair: one line, no traceback."""
        print(f"reward server: {client_address[0]}: {sys.exc_info()[1]}", file=sys.stderr)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_SECONDS  # that a client may stay silent
    server: RewardServer

    def handle_one_request(self) -> None:
        """See BaseHTTPRequestHandler. A request that has not arrived in time, byte by byte perhaps, is cut off."""
        self.arrival = threading.Timer(REQUEST_SECONDS, self._cut)
        self.arrival.daemon = True
        self.arrival.start()
        try:
            super().handle_one_request()
        finally:
            self.arrival.cancel()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_POST(self) -> None:
        """Score the batch in the request; the reply is {"rewards": [...]} or {"error": "..."} with its status."""
        try:
            status, reply = 200, {"rewards": self._score(self._read_batch()).tolist()}
        except _Refused as refused:
            status, reply = refused.status, {"error": str(refused)}
            self.close_connection = True  # the body may be unread
        except RunError as error:
            status, reply = 500, {"error": str(error)}
            print(f"reward server: {error}", file=sys.stderr)
        body = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _read_batch(self) -> RewardBatch:
        if self.path != PATH:
            raise _Refused(404, f"rewards are at {PATH}")
        given = self.headers.get("Authorization", "").encode()
        if self.server.token and not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            raise _Refused(401, "wrong or missing bearer token")
        if self.headers.get_content_type() != "application/json":  # also keeps web pages from posting here
            raise _Refused(415, "Content-Type must be application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _Refused(411, "Content-Length is needed")
        if int(length) > REQUEST_BYTES:
            raise _Refused(413, f"the request is longer than {REQUEST_BYTES} bytes")
        body = self.rfile.read(int(length))
        self.arrival.cancel()
        if len(body) < int(length):
            raise _Refused(400, "the request was cut short")
        return parse_request(body)

    def _score(self, batch: RewardBatch) -> np.ndarray:
        if not len(batch):  # the client's start check
            return np.zeros(0, dtype=np.float32)
        with self.server.lock:
            return self.server.source(batch)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing for a request served; faults are printed where they happen."""


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_request(body: bytes) -> RewardBatch:
    """JSON {"prompts", "responses"[, "finished"][, "samples"]} -> RewardBatch; refuses anything else with HTTP 400."""
    try:
        request = parse_json(body.decode())
    except ValueError as error:
        raise _Refused(400, f"not JSON: {reason_of(error)}") from error
    if not isinstance(request, dict):
        raise _Refused(400, "not a JSON object")
    responses = _column(request, "responses", str, None)
    count = len(responses)
    finished = _column(request, "finished", bool, [True] * count)
    columns = (
        _column(request, "prompts", str, None),
        responses,
        finished,
        _column(request, "samples", dict, [{}] * count),
    )
    if len({len(column) for column in columns}) != 1:
        raise _Refused(400, "prompts, responses, finished and samples differ in length")
    prompts, responses, finished, samples = columns
    return RewardBatch(prompts, responses, np.array(finished, dtype=bool), samples)


def _column(request: dict[str, Any], name: str, kind: type, default: list | None) -> list:
    column = request.get(name, default)
    if not isinstance(column, list) or not all(isinstance(entry, kind) for entry in column):
        raise _Refused(400, f"{name!r} must be a list of {kind.__name__}")
    return column


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the reward function that the command line names, until interrupted."""
    parser = CommandParser(prog="alignment.ppo.reward_server", description=__doc__.splitlines()[0])
    parser.add_argument("--reward_function", required=True, help="module:name or path/to/file.py:name")
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8100, help="0 takes a free one (default: %(default)s)")
    options = parser.parse_args(arguments)
    source = FunctionReward(options.reward_function)
    with RewardServer(source, options.host, options.port, os.environ.get(TOKEN_VARIABLE, "").strip()) as server:
        print(f"serving {source.spec} at {server.url}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    run_main(main)
