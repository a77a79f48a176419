"""Waits for things to happen in the library: finished calls for asyncio, and everything else for whoever asks."""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from ctypes import byref
from typing import TYPE_CHECKING, Any

from . import _ffi
from ._types import Event

if TYPE_CHECKING:
    import asyncio

CALL_DONE = 1  # kind of the event whose subject is a finished call
KEPT_EVENTS = 1024  # the oldest are dropped when nobody asks
# A wake-up that got lost may cost this much time, not the answer.
LOOK_AGAIN_SECONDS = 0.25


class Events:
    """The one taker of an instance's events. All methods may be called from any thread."""

    def __init__(self, library: _ffi.Library, handle: int) -> None:
        self._library, self._handle = library, handle
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []
        self._kept: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._closed = False
        # How many waiters a loop has; it watches the descriptor while there is one.
        self._watchers: dict[asyncio.AbstractEventLoop, int] = {}
        fd = library.locum_event_handle(handle)
        # A duplicate, because the library closes its own on `close`, when an event loop may still be watching.
        self._fd = os.dup(fd) if fd >= 0 else -1

    def drain(self) -> None:
        """Takes what the library has: wakes those who wait for calls, keeps the rest for `take`."""
        wake: list[Callable[[], None]] = []
        with self._lock:
            raw = _ffi.Event.made()
            while not self._closed and self._library.locum_next_event(self._handle, byref(raw)) == _ffi.OK:
                detail = _object(self._library.take(raw.detail))
                event = Event(raw.kind, str(detail.get("name", "")), raw.subject, raw.number, detail)
                if event.kind == CALL_DONE:
                    # Everybody looks again: waking one too many costs a microsecond, waking the wrong one a quarter second.
                    wake += self._waiting
                else:
                    self._kept.append(event)
                raw = _ffi.Event.made()
        for notify in wake:
            notify()

    def take(self, wait: float) -> list[Event]:
        """Everything kept so far; waits up to `wait` seconds for the first."""
        deadline = time.monotonic() + wait
        while True:
            self.drain()
            with self._lock:
                events = list(self._kept)
                self._kept.clear()
                closed = self._closed
            left = deadline - time.monotonic()
            if events or closed or left <= 0:
                return events
            if self._fd >= 0 and hasattr(select, "poll"):
                watch = select.poll()
                watch.register(self._fd, select.POLLIN)
                watch.poll(min(left, LOOK_AGAIN_SECONDS) * 1000)
            else:
                time.sleep(min(left, 0.02))

    async def finished(self, call: int, timeout: float) -> bool:
        """Waits for a call's end on the running loop, without blocking it. False if `timeout` seconds were not enough."""
        import asyncio  # late, see core._in_thread

        loop = asyncio.get_running_loop()
        watching = self._watch(loop)
        if not watching:  # no descriptor, or a loop that cannot watch one (Windows' proactor)
            wait_ms = max(1, int(timeout * 1000))
            return bool(await asyncio.to_thread(self._library.locum_call_wait, call, wait_ms) != _ffi.PENDING)
        done = asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(done.set)

        try:
            with self._lock:
                self._waiting.append(notify)
            deadline = loop.time() + timeout
            while self._library.locum_call_wait(call, 0) == _ffi.PENDING:
                left = deadline - loop.time()
                if left <= 0:
                    return False
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(done.wait(), min(left, LOOK_AGAIN_SECONDS))
                done.clear()
            return True
        finally:
            with self._lock:
                self._waiting.remove(notify)
            self._unwatch(loop)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> bool:
        if self._fd < 0:
            return False
        if loop not in self._watchers:
            try:
                loop.add_reader(self._fd, self.drain)
            except (NotImplementedError, OSError):
                return False
        self._watchers[loop] = self._watchers.get(loop, 0) + 1
        return True

    def _unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._watchers[loop] -= 1
        if self._watchers[loop] == 0:
            del self._watchers[loop]
            loop.remove_reader(self._fd)
            self._release()

    def close(self) -> None:
        """Wakes everybody; they find their call gone. The descriptor is closed with the last watcher."""
        with self._lock:
            self._closed = True
            wake = list(self._waiting)
        for notify in wake:
            notify()
        self._release()

    def _release(self) -> None:
        with self._lock:
            if self._closed and self._fd >= 0 and not self._watchers:
                os.close(self._fd)
                self._fd = -1


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data) if data else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
