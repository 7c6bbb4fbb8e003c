"""Rewards from an HTTP server: POST {"prompts", "responses", "finished", "samples"} -> {"rewards": [N numbers]}."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests
import urllib3

from alignment.ppo.rewards.base import RewardBatch, RewardSource, check_rewards
from alignment.runtime.faults import RunError, UsageError

TOKEN_VARIABLE = "ALIGNMENT_REWARD_TOKEN"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
FINAL = frozenset(range(400, 500)) - {408, 425, 429}
"""Statuses that say that the request is wrong, so that asking again is of no use."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
REQUEST_BYTES = 64 * 1024 * 1024
"""What is sent at once, and what the server takes; a longer batch goes in parts."""
REPLY_BYTES, REPLY_BYTES_PER_REWARD = 64 * 1024, 256


class _TryAgain(Exception):
    """A failure that may go away: no connection, no reply in time, or one that cannot be meant."""


class _Cuttable(requests.adapters.HTTPAdapter):
    """Knows its socket, so that a request can be ended from outside, whatever it waits for."""

    socket: socket.socket | None = None

    def get_connection_with_tls_context(self, *args: Any, **settings: Any) -> Any:
        """See HTTPAdapter; the pool's connections report themselves here."""
        pool = super().get_connection_with_tls_context(*args, **settings)
        if not hasattr(pool.ConnectionCls, "adapter"):
            pool.ConnectionCls = type("Connection", (_Reporting, pool.ConnectionCls), {"adapter": self})
        return pool

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Cut the connection after so many seconds. A time-out of the socket counts anew at every byte."""
        timer = threading.Timer(seconds, self._cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _cut(self) -> None:
        if self.socket is not None:
            with contextlib.suppress(OSError):  # not connected any more
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)  # of TLS too: its own shutdown would wait


class _Reporting:
    """Of a connection class: tells its adapter which socket it uses."""

    adapter: _Cuttable

    def connect(self) -> None:
        super().connect()
        type(self).adapter.socket = self.sock


class _Bearer(requests.auth.AuthBase):
    """Set explicitly, so that a ~/.netrc entry for the host cannot replace the token."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


class ServerReward(RewardSource):
    """Asks a reward server; see docs/rewards.md for the protocol and alignment.ppo.reward_server for a server.

    The retry loop is our own rather than urllib3's Retry, which ends where the headers end: a server that dies, hangs
    or talks nonsense in its reply must be asked again too, and the whole reply must be there within `timeout`, even of
    a server that sends a byte a second.
    """

    def __init__(self, url: str, timeout: float = 60.0, retries: int = 3, token: str | None = None) -> None:
        """timeout: seconds for one attempt; retries: attempts after the first; token: bearer token, by default the
        environment variable ALIGNMENT_REWARD_TOKEN, so that no secret stands in an argument file.

        Raises UsageError for a URL that is not http(s), or that carries a password.
        """
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise UsageError(f"reward_server {url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"reward_server {url!r}: expected http://host:port/path or https://...")
        if parts.username or parts.password:
            raise UsageError(f"reward_server: a password in the URL would be logged; set {TOKEN_VARIABLE} instead")
        if timeout <= 0 or retries < 0:
            raise UsageError(f"reward_server: timeout {timeout} must be above 0 and retries {retries} at least 0")
        self.name, self.url, self.timeout, self.retries = "server", url, timeout, retries
        self.session, self.adapter = requests.Session(), _Cuttable()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, self.adapter)
        self.session.auth = _Bearer((token or os.environ.get(TOKEN_VARIABLE, "")).strip())
        self.session.headers.update({"Content-Type": "application/json", "Accept-Encoding": "identity"})
        if parts.hostname in LOOPBACK:
            self.session.trust_env = False  # a proxy cannot reach this machine's loopback

    def check(self) -> None:
        """Send an empty batch; raise RunError unless {"rewards": []} comes back."""
        try:
            self(RewardBatch([], [], np.zeros(0, dtype=bool), []))
        except RunError as error:
            raise RunError(f'{error} (start check: to empty lists a server answers {{"rewards": []}})') from error

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """float32 [N]. Raises RunError when all attempts fail to get N finite numbers."""
        body = _encode(batch)
        if len(body) > REQUEST_BYTES and len(batch) > 1:
            half = len(batch) // 2
            return np.concatenate([self(batch.take(range(half))), self(batch.take(range(half, len(batch))))])
        if len(body) > REQUEST_BYTES:
            raise RunError(f"reward server {self.url}: one answer takes {len(body)} bytes, more than {REQUEST_BYTES}")
        for attempt in range(1, self.retries + 2):
            try:
                return self._ask(body, len(batch))
            except _TryAgain as error:
                if attempt > self.retries:
                    raise RunError(f"reward server {self.url}: failed {attempt} times, last: {error}") from error
                time.sleep(min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S))
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, body: bytes, count: int) -> np.ndarray:
        """float32 [count]: one attempt. Raises _TryAgain, or RunError for a status in FINAL."""
        status, content = self._post(body, REPLY_BYTES + REPLY_BYTES_PER_REWARD * count)
        if status in FINAL:
            raise RunError(f"reward server {self.url}: {_describe_status(status, content)}")
        if status != 200:
            raise _TryAgain(_describe_status(status, content))
        try:
            return check_rewards(_decode(content), count, "it")
        except RunError as error:
            raise _TryAgain(str(error)) from error

    def _post(self, body: bytes, limit: int) -> tuple[int, bytes]:
        deadline = time.monotonic() + self.timeout
        try:
            with (
                self.adapter.within(self.timeout),
                self.session.post(
                    self.url, data=body, timeout=self.timeout, stream=True, allow_redirects=False
                ) as response,
            ):
                content = _read(response, limit)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            late = isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError)
            if late or time.monotonic() >= deadline:
                raise _TryAgain(f"no complete reply within {self.timeout:g} s") from error
            raise _TryAgain(_root_cause(error)) from error
        if time.monotonic() >= deadline:  # cut off, which looks like an end
            raise _TryAgain(f"no complete reply within {self.timeout:g} s")
        return response.status_code, content


def _read(response: requests.Response, limit: int) -> bytes:
    """The reply's body, unless it is longer than `limit` bytes: _TryAgain."""
    content = bytearray()
    while chunk := response.raw.read1(16 * 1024, decode_content=False):
        content += chunk
        if len(content) > limit:
            raise _TryAgain(f"the reply is longer than {limit} bytes")
    return bytes(content)


def _encode(batch: RewardBatch) -> bytes:
    columns = {"prompts": batch.prompts, "responses": batch.responses, "finished": [bool(x) for x in batch.finished]}
    try:
        return json.dumps({**columns, "samples": batch.samples}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RunError(f"reward server: a sample cannot be sent as JSON: {error}") from error


def _decode(content: bytes) -> Any:
    start = content[:60].decode(errors="replace")
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _TryAgain(f"the reply is not JSON: {start!r}") from error
    if not isinstance(reply, dict) or "rewards" not in reply:
        raise _TryAgain(f'the reply has no "rewards": {start!r}')
    return reply["rewards"]


def _describe_status(status: int, content: bytes) -> str:
    return f"HTTP {status}: {' '.join(content[:200].decode(errors='replace').split())}"


def _root_cause(error: BaseException) -> str:
    """The innermost cause: "ConnectionRefusedError: ..." rather than three nested wrappers of it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {error}"
