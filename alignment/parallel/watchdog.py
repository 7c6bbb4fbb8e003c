"""The watch-dog: a job that hangs ends with an error on every process, which says who waited for whom.

A thread of each process sends a heartbeat to one of rank 0, with where the main thread is (it may sit in a collective:
those release Python's lock), and gets back what the job looks like. A process that is stopped, or whose host is gone,
sends none. One that works for long, in an endless reward function even, does: that is no hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge, wait
from typing import NamedTuple, NoReturn

from alignment.parallel.collectives import gather_objects
from alignment.parallel.gloo import host_address
from alignment.parallel.topology import topology
from alignment.runtime.bootstrap import is_debug
from alignment.runtime.faults import PEER_GRACE_SECONDS, RUN_STATUS
from alignment.runtime.whereabouts import here

INTERVAL_SECONDS = 1.0
_started = False


class Beat(NamedTuple):
    """What a process tells of itself: see Whereabouts. waits: whether it waits in the operation."""

    where: str
    operation: str
    members: list[int]
    meeting: int
    waits: bool
    lost: bool


NOTHING = Beat("", "", [], -1, False, False)  # of a process that was never heard


class Seen(NamedTuple):
    """A process as rank 0 knows it: its latest beat, seconds since then, and since it last did something else."""

    beat: Beat
    silent: float
    same: float


Table = Mapping[int, Seen]  # by rank


def start_watchdog(timeout: float) -> None:
    """Watch the job from now on; with one process, or ``timeout`` (seconds) 0, nothing is started. All ranks call it.

    The threads talk over TCP, at the address by which the launcher knows rank 0; a secret keeps strangers out.
    """
    global _started
    place = topology()
    if _started or timeout == 0 or place.layout.processes == 1:
        return
    _started, listener, secret = True, None, secrets.token_hex(16)
    if place.rank == 0:
        listener = Listener((host_address(), 0), backlog=place.layout.processes)
    address, secret = gather_objects(listener and (listener.address, secret), "world")[0]
    if listener is not None:
        target = Host(listener, secret, place.layout.processes, timeout).run
    else:
        target = Guest(tuple(address), secret, place.rank, timeout).run
    threading.Thread(target=target, name="watchdog", daemon=True).start()


class Clock:
    """Seconds that this process was awake: while it was stopped itself, it could hear nobody."""

    def __init__(self, interval: float) -> None:
        self.interval, self.now, self._read = interval, 0.0, time.monotonic()

    def tick(self) -> float:
        """The time now; at most two intervals go by between two calls."""
        now = time.monotonic()
        self.now += min(now - self._read, 2 * self.interval)
        self._read = now
        return self.now


class Host:
    """Rank 0's part: hears all processes, judges, and tells them."""

    def __init__(self, listener: Listener, secret: str, size: int, timeout: float) -> None:
        self.listener, self.secret, self.size, self.timeout = listener, secret.encode(), size, timeout
        self.clock = Clock(_interval(timeout))
        self.ranks: dict[Connection, int] = {}
        self.beats: dict[int, Beat] = {}
        self.heard: dict[int, float] = {}
        self.moved: dict[int, float] = {}  # when a process was last seen to do something else

    def run(self) -> None:
        """Until the process ends, or the job hangs."""
        for rank in range(1, self.size):
            self._hear(rank, NOTHING)  # who has not joined in time is silent too
        threading.Thread(target=self._accept, name="watchdog-door", daemon=True).start()
        while True:
            self._hear(0, own_beat())
            self._listen()
            line = judge(self._table(), self.timeout, complete=len(self.beats) == self.size)
            if line is not None:
                for connection in list(self.ranks):
                    with contextlib.suppress(OSError):  # it has ended
                        _send(connection, line)
                end(line, self.clock.interval)

    def _accept(self) -> None:
        """A thread of its own for every caller: one that was stopped as it called keeps nobody else out."""
        while len(self.ranks) < self.size - 1:
            with contextlib.suppress(OSError):  # it has hung up already
                connection = self.listener.accept()
                threading.Thread(target=self._admit, args=[connection], daemon=True).start()

    def _admit(self, connection: Connection) -> None:
        try:
            deliver_challenge(connection, self.secret)
            answer_challenge(connection, self.secret)
            self.ranks[connection] = int(connection.recv_bytes())
        except (AuthenticationError, EOFError, OSError, ValueError):
            connection.close()  # no process of this job

    def _listen(self) -> None:
        """For one interval; every beat is answered, so that a guest knows that rank 0 is there."""
        until = time.monotonic() + self.clock.interval
        while (left := until - time.monotonic()) > 0:
            if not self.ranks:
                time.sleep(left)
            for connection in wait(list(self.ranks), left):
                try:
                    self._hear(self.ranks[connection], Beat(*json.loads(connection.recv_bytes())))
                    _send(connection, None)
                except (EOFError, OSError):  # it has ended, which the launcher sees
                    rank = self.ranks.pop(connection)
                    for known in (self.beats, self.heard, self.moved):
                        known.pop(rank, None)
            self.clock.tick()

    def _hear(self, rank: int, beat: Beat) -> None:
        now = self.clock.tick()
        if beat != self.beats.get(rank):
            self.moved[rank] = now
        self.beats[rank], self.heard[rank] = beat, now

    def _table(self) -> Table:
        now = self.clock.tick()
        return {rank: Seen(beat, now - self.heard[rank], now - self.moved[rank]) for rank, beat in self.beats.items()}


class Guest:
    """The part of every other rank: tells where it is, and does what rank 0 says, or notices that it says nothing."""

    def __init__(self, address: tuple[str, int], secret: str, rank: int, timeout: float) -> None:
        self.address, self.secret, self.rank, self.timeout = address, secret.encode(), rank, timeout
        self.clock = Clock(_interval(timeout))

    def run(self) -> None:
        """Until the process or rank 0 ends, or the job hangs."""
        try:
            connection = Client(self.address)
            self._join(connection)
            self._talk(connection)
        except (AuthenticationError, EOFError, OSError):
            return  # rank 0 has ended, which the launcher sees

    def _join(self, connection: Connection) -> None:
        called = self.clock.tick()
        while not connection.poll(self.clock.interval):
            self._check(self.clock.tick() - called, own_beat())
        answer_challenge(connection, self.secret)
        deliver_challenge(connection, self.secret)
        connection.send_bytes(str(self.rank).encode())

    def _talk(self, connection: Connection) -> None:
        heard, asked = self.clock.tick(), False
        while True:
            beat = own_beat()
            if not asked:  # else what a stopped rank 0 does not read would fill the connection
                connection.send_bytes(json.dumps(beat).encode())
            asked = not connection.poll(self.clock.interval)
            now = self.clock.tick()
            if not asked:
                heard, line = now, json.loads(connection.recv_bytes())
                if line is not None:
                    end(line, self.clock.interval)
                time.sleep(self.clock.interval)
            else:
                self._check(now - heard, beat)

    def _check(self, silent: float, beat: Beat) -> None:
        """End the process if rank 0 has been silent for too many seconds."""
        if silent > limit(self.timeout, beat.lost):
            table = {0: Seen(NOTHING, silent, 0.0), self.rank: Seen(beat, 0.0, 0.0)}
            end(judge(table, silent - self.clock.interval), self.clock.interval)


def own_beat() -> Beat:
    """Where this process is."""
    return Beat(str(here), here.operation, list(here.members), here.meeting, here.waits, here.lost)


def limit(timeout: float, lost: bool) -> float:
    """How long a process may be silent: less once another could not finish an operation, for gloo waits 30 s only."""
    return min(timeout, PEER_GRACE_SECONDS) if lost else timeout


def judge(table: Table, timeout: float, complete: bool = True) -> str | None:
    """What is wrong, on one line: who is silent, or that all wait for each other; None: nothing.

    Args: complete: the table has all processes; else some may wait for one that has ended, and will see that.
    """
    most = limit(timeout, any(seen.beat.lost for seen in table.values()))
    silent = [rank for rank, seen in table.items() if seen.silent > most]
    if silent:
        who = "; ".join(_tell_silent(rank, table) for rank in silent)
        return f"watch-dog: {who}"
    if complete and all(seen.beat.waits and seen.same > timeout for seen in table.values()):
        who = "; ".join(_tell_waiting(rank, table) for rank in table)
        return f"watch-dog: for {timeout:g} s all processes have been waiting for each other: {who}"
    return None


def _tell_silent(rank: int, table: Table) -> str:
    seen = table[rank]
    last = f" (last seen at {seen.beat.where})" if seen.beat.where else ""
    others = {other: one.beat for other, one in table.items() if other != rank}
    waiting = "; ".join(_tell_waiting(other, table) for other, beat in others.items() if beat.waits or beat.lost)
    met = "; ".join(
        f"rank {other}, at {beat.where}, has met it for {beat.operation}"  # and may be in the middle of it
        for other, beat in others.items()
        if rank in beat.members
    )
    return f"rank {rank} has not answered for {seen.silent:.0f} s{last}; {waiting or met or 'nobody waits for it yet'}"


def _tell_waiting(rank: int, table: Table) -> str:
    beat = table[rank].beat
    if beat.lost:
        return f"rank {rank}, at {beat.where}, has given up {beat.operation} with {_count(beat.members)}"
    come = [other for other in beat.members if other in table and _is_with(table[other].beat, beat)]
    absent = [other for other in beat.members if other not in come]
    return f"rank {rank}, at {beat.where}, waits in {beat.operation} for {_count(absent)}"


def _is_with(other: Beat, beat: Beat) -> bool:
    return other.waits and (other.operation, other.members) == (beat.operation, beat.members)


def _count(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {_join(ranks)}"


def _join(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _interval(timeout: float) -> float:
    return min(INTERVAL_SECONDS, timeout / 5)


def _send(connection: Connection, line: str | None) -> None:
    connection.send_bytes(json.dumps(line).encode())


def end(line: str, interval: float) -> NoReturn:
    """Say the line and end the process, after the others have had time to say it: the first end stops all."""
    if is_debug():
        import faulthandler

        faulthandler.dump_traceback(all_threads=True)
    os.write(2, f"error: {line}\n".encode())
    time.sleep(3 * interval)
    os._exit(RUN_STATUS)
