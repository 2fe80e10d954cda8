"""Several servers of one model: which one is asked next, which are left alone for a while, and when to give up."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
"""A server that fails is left alone for so long, twice as long each time that it fails again."""

_MOST_DOUBLED = 16
"""Further failures change nothing."""

_SHORTEST_WAIT_S = 0.05

_REMEMBERED = 1024
"""Prompts, of all servers together."""

_REMEMBERED_CHARACTERS = 32 << 20
"""Of those together."""


@dataclass(eq=False)
class Server:
    """One server.

    Attributes:
        url: with `/v1`, as OpenAI clients take it.
        running: requests that it answers now, of this process.
        failures: how often it failed since it last answered.
        out_until: when it is tried again.
    """

    url: str
    running: int = 0
    failures: int = 0
    out_until: float = 0.0


class Servers:
    """Chooses among servers; safe to use from several threads.

    A conversation goes to the server that answered its last turn, since that one has its KV at hand; what is new goes
    to the one with the fewest running requests.
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.all = [Server(url) for url in urls]
        self._clock = clock
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._answered: OrderedDict[str, Server] = OrderedDict()
        self._characters = 0  # of those prompts

    def take(self, text: str) -> Server | float:
        """The server for a prompt, counted as running; or for how many seconds to wait, since none can be asked."""
        if os.getpid() != self._pid:  # a fork: the lock may be held by a thread that is not here
            self._pid, self._lock = os.getpid(), threading.Lock()
            for server in self.all:
                server.running = 0
        with self._lock:
            now = self._clock()
            ready = [server for server in self.all if server.out_until <= now]
            if not ready:
                return max(_SHORTEST_WAIT_S, min(server.out_until for server in self.all) - now)
            former = self._former(text)
            server = former if former in ready else min(ready, key=lambda each: each.running)
            server.running += 1
            return server

    def answered(self, server: Server, text: str) -> None:
        """It has answered a prompt."""
        with self._lock:
            server.running -= 1
            server.failures, server.out_until = 0, 0.0
            if len(self.all) > 1 and text:
                if self._answered.pop(text, None) is None:
                    self._characters += len(text)
                self._answered[text] = server
                while len(self._answered) > _REMEMBERED or self._characters > _REMEMBERED_CHARACTERS:
                    self._characters -= len(self._answered.popitem(last=False)[0])

    def left(self, server: Server) -> None:
        """A request ended otherwise, by nobody's fault of the server."""
        with self._lock:
            server.running -= 1

    def failed(self, server: Server) -> None:
        """It could not be reached, or failed: it is left alone for a while. Requests that were under way together fail
        together, and count once."""
        with self._lock:
            server.running -= 1
            now = self._clock()
            if now < server.out_until:
                return
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(server.failures, _MOST_DOUBLED))
            server.failures += 1
            server.out_until = now + pause_s

    def _former(self, text: str) -> Server | None:
        """Who answered the longest prompt that this one continues."""
        continued = [each for each in self._answered if text.startswith(each)]
        return self._answered[max(continued, key=len)] if continued else None
