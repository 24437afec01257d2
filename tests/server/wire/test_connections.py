"""More connections than there may be: whoever waits longest makes way, and descriptors are left for everything else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
from fakes import make_app
from wire_client import LIVE, PATIENCE, post, serving, until

from server.run import configured
from server.settings import ServerSettings
from server.wire.connections import Connections

HEAD = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n"


def test_who_waits_longest_makes_way_and_requests_are_served() -> None:
    """A client opens ten times as many connections as there may be: nobody else notices."""
    with serving(make_app(), connections=10, body_seconds=1000) as running, contextlib.ExitStack() as stack:
        for number in range(100):
            parked = stack.enter_context(running.client())
            parked.send((b"", HEAD, post(b"{", "content-length: 100"))[number % 3])
            if number % 10 == 9:
                with running.client() as client:
                    client.send(LIVE)
                    assert client.reply().status == 200  # type: ignore[union-attr]
            assert len(running.connections) <= 10


def test_a_connection_is_kept_for_as_long_as_an_agent_thinks() -> None:
    """Proxies and clients keep theirs for 60 or 75 s; whoever closes first makes an error of the other's request."""
    assert ServerSettings().idle_seconds >= 75
    config = configured(make_app(), ServerSettings(idle_seconds=77), Connections(10))
    assert config.timeout_keep_alive == 77


def test_idle_connections_keep_nobody_out() -> None:
    """All of them have been served once and would stay for an hour: the one that is idle longest makes way."""
    with serving(make_app(), connections=10, idle_seconds=3600) as running, contextlib.ExitStack() as stack:
        idle = []
        for _ in range(50):
            client = stack.enter_context(running.client())
            client.send(LIVE)
            assert client.reply().status == 200  # type: ignore[union-attr]
            idle.append(client)
        assert len(running.connections) == 10
        assert all(client.closed() for client in idle[:40])
        idle[40].send(LIVE)  # not idle any more, and so the last to go
        assert idle[40].reply().status == 200  # type: ignore[union-attr]
        for _ in range(9):
            stack.enter_context(running.client()).send(LIVE)
        assert all(client.closed() for client in idle[41:])
        idle[40].send(LIVE)
        assert idle[40].reply().status == 200  # type: ignore[union-attr]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is no list of descriptors")
@pytest.mark.parametrize("loop", ["auto", "asyncio"])
def test_a_flood_takes_few_descriptors_more_than_there_are_connections(loop: str) -> None:
    """Connections are counted once they are accepted: few are, before the first one is counted."""
    held, all_wait = threading.Event(), threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/hold":
            held.set()
            all_wait.wait(PATIENCE)  # the loop stands still, and connections wait
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with serving(app, loop=loop, connections=10) as running, contextlib.ExitStack() as stack:
        holding = stack.enter_context(running.client())
        holding.send(LIVE.replace(b"/health/live", b"/hold"))
        assert held.wait(PATIENCE)
        for _ in range(800):
            stack.enter_context(running.client())
        before, most = len(os.listdir("/proc/self/fd")), 0
        all_wait.set()
        while True:  # until all of them were accepted, and all but ten were closed
            now = len(os.listdir("/proc/self/fd")) - before
            most = max(most, now)
            if most > 0 and now <= 10 and len(running.connections) == 10:
                break
    assert most < 256


def test_with_all_at_work_one_more_is_refused_with_a_status() -> None:
    going = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.to_thread(going.wait, PATIENCE)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with serving(app, connections=8) as running, contextlib.ExitStack() as stack:
        working = [stack.enter_context(running.client()) for _ in range(8)]
        for client in working:
            client.send(LIVE)
        until(lambda: all(waits == "no" for waits in running.connections._all.values()))
        with running.client() as client:
            reply = client.reply()
            assert reply
            assert (reply.status, reply.code) == (503, "connections_full")
            assert int(reply.headers["retry-after"]) > 0
        going.set()
        assert [client.reply().status for client in working] == [200] * 8  # type: ignore[union-attr]


def test_the_account_of_connections_keeps_its_order() -> None:
    class One:
        gone = False

        def give_up(self) -> None:
            self.gone = True

    room, ones = Connections(4), [One() for _ in range(7)]
    for one in ones[:4]:
        assert room.admit(one)
    room.note(ones[0], "no")
    room.note(ones[1], "body")
    room.note(ones[2], "no")
    room.note(ones[2], "idle")  # waits again, since now
    assert room.admit(ones[4])
    assert room.admit(ones[5])
    assert [one.gone for one in ones] == [False, False, True, True, False, False, False]
    for one in ones[4:6]:
        room.note(one, "no")
    assert room.admit(ones[6])
    assert ones[1].gone, "half a body is closed before a request that is at work"
    room.note(ones[6], "no")
    assert not room.admit(One())
    room.drop(ones[6])
    room.drop(ones[6])
    assert room.admit(One())


LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, HARD))
from server.wire.connections import room_for_connections
print(room_for_connections(1024), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "room", "after"),
    [(256, 512, 256, 512), (256, 4096, 1024, 4096), (100, 100, 50, 100), (1024, 1024, 768, 1024)],
)
def test_there_is_room_for_fewer_connections_than_descriptors(soft: int, hard: int, room: int, after: int) -> None:
    """What the process may have is raised first; a part is kept for files, keys and the log."""
    script = LIMIT.replace("SOFT", str(soft)).replace("HARD", str(hard))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == [str(room), str(after)]
