"""Waiting for answers on an event loop, against a library made of Python that has an event handle like the real one."""

import asyncio
import ctypes
import json
import os
import threading
import unittest
from collections import deque
from typing import Any

from locum import _ffi
from locum._events import CALL_DONE, LOOK_AGAIN_SECONDS, Events


class PythonLibrary:
    """Finishes calls when told to, from any thread. The handle is a pipe's end: readable while events wait."""

    def __init__(self, handle: bool = True) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        self._handle = handle
        self._events: deque[tuple[int, int, dict[str, Any]]] = deque()
        self._lock = threading.Lock()
        self._finished: set[int] = set()
        self._condition = threading.Condition()

    def happen(self, kind: int, subject: int, name: str) -> None:
        with self._lock:
            self._events.append((kind, subject, {"name": name}))
            os.write(self._write, b"x")

    def finish(self, call: int, tell: bool = True) -> None:
        with self._condition:
            self._finished.add(call)
            self._condition.notify_all()
        if tell:
            self.happen(CALL_DONE, call, "call_done")

    def locum_event_handle(self, handle: int) -> int:
        return self._read if self._handle else -1

    def locum_next_event(self, handle: int, out: Any) -> int:
        with self._lock:
            if not self._events:
                try:
                    os.read(self._read, 4096)
                except BlockingIOError:
                    pass
                return _ffi.EMPTY
            event = out._obj
            event.kind, event.subject, detail = self._events.popleft()
            self._text = json.dumps(detail).encode()
            event.detail.len = len(self._text)
            return _ffi.OK

    def take(self, data: Any) -> bytes:
        return self._text

    def locum_call_wait(self, call: int, timeout_ms: int) -> int:
        with self._condition:
            self._condition.wait_for(lambda: call in self._finished, timeout_ms / 1000)
            return _ffi.OK if call in self._finished else _ffi.PENDING


def later(seconds: float, function: Any, *arguments: Any) -> None:
    threading.Timer(seconds, function, arguments).start()


class Waiting(unittest.TestCase):
    def test_the_loop_runs_on_until_the_answer_is_there(self) -> None:
        library = PythonLibrary()
        events = Events(library, 1)  # type: ignore[arg-type]

        async def run() -> int:
            ticks = 0
            task = asyncio.create_task(events.finished(7, 5.0))
            later(0.15, library.finish, 7)
            while not task.done():
                await asyncio.sleep(0.005)
                ticks += 1
            self.assertTrue(await task)
            return ticks

        self.assertGreater(asyncio.run(run()), 10)

    def test_many_calls_finish_in_any_order(self) -> None:
        library = PythonLibrary()
        events = Events(library, 1)  # type: ignore[arg-type]

        async def run() -> list[bool]:
            for call in (3, 1, 2, 4):
                later(0.02 * call, library.finish, call)
            return await asyncio.gather(*(events.finished(c, 5.0) for c in (1, 2, 3, 4)))

        self.assertEqual(asyncio.run(run()), [True] * 4)

    def test_two_loops_in_two_threads_wait_at_once(self) -> None:
        library = PythonLibrary()
        events = Events(library, 1)  # type: ignore[arg-type]
        results: list[bool] = []
        threads = [threading.Thread(target=lambda c=c: results.append(asyncio.run(events.finished(c, 5.0)))) for c in (1, 2)]
        for t in threads:
            t.start()
        later(0.05, library.finish, 1)
        later(0.05, library.finish, 2)
        for t in threads:
            t.join()
        self.assertEqual(results, [True, True])

    def test_one_that_is_finished_already_is_not_waited_for(self) -> None:
        library = PythonLibrary()
        library.finish(7, tell=False)
        self.assertTrue(asyncio.run(Events(library, 1).finished(7, 0.0)))  # type: ignore[arg-type]

    def test_a_wake_up_that_got_lost_costs_a_moment_only(self) -> None:
        library = PythonLibrary()
        later(0.02, library.finish, 7, False)

        async def run() -> float:
            loop = asyncio.get_running_loop()
            began = loop.time()
            self.assertTrue(await Events(library, 1).finished(7, 5.0))  # type: ignore[arg-type]
            return loop.time() - began

        self.assertLess(asyncio.run(run()), 4 * LOOK_AGAIN_SECONDS)

    def test_the_time_that_was_given_is_kept(self) -> None:
        library = PythonLibrary()
        self.assertFalse(asyncio.run(Events(library, 1).finished(7, 0.05)))  # type: ignore[arg-type]

    def test_without_a_handle_a_thread_waits(self) -> None:
        library = PythonLibrary(handle=False)
        later(0.05, library.finish, 7)
        self.assertTrue(asyncio.run(Events(library, 1).finished(7, 5.0)))  # type: ignore[arg-type]

    def test_other_events_wait_to_be_taken(self) -> None:
        library = PythonLibrary()
        events = Events(library, 1)  # type: ignore[arg-type]
        library.happen(3, 7, "job_state")
        library.finish(7)
        taken = events.take(0.0)
        self.assertEqual([(e.kind, e.name, e.subject) for e in taken], [(3, "job_state", 7)])
        later(0.05, library.happen, 4, 1, "student_swapped")
        self.assertEqual([e.name for e in events.take(2.0)], ["student_swapped"])
        self.assertEqual(events.take(0.0), [])

    def test_closing_gives_the_descriptor_back(self) -> None:
        library = PythonLibrary()
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
        events = Events(library, 1)  # type: ignore[arg-type]
        asyncio.run(events.finished(7, 0.01))
        events.close()
        self.assertEqual(events.take(1.0), [])
        if before is not None:
            self.assertEqual(len(os.listdir("/proc/self/fd")), before)


class Sizes(unittest.TestCase):
    def test_an_event_is_as_long_as_in_c(self) -> None:
        self.assertEqual(ctypes.sizeof(_ffi.Event), 48)


if __name__ == "__main__":
    unittest.main()
