"""The binding against the real library. Skipped where there is none: build it with `cargo build --release -p locum-plugin`."""

import asyncio
import ctypes
import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import locum
from locum import JobStatus, Locum, LocumError, _ffi
from locum._progress import Progress, line

try:
    LIBRARY: Path | None = locum.find_library()
except locum.LibraryNotFound:
    LIBRARY = None
HEADER = Path(__file__).resolve().parents[3] / "plugin-api" / "include" / "locum.h"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "act",
            "description": "Take one step.",
            "parameters": {
                "type": "object",
                "properties": {"action": {"type": "string", "enum": ["left", "right"]}},
                "required": ["action"],
            },
        },
    }
]


def said(action: str) -> dict[str, Any]:
    function = {"name": "act", "arguments": f'{{"action":"{action}"}}'}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]}


class Declarations(unittest.TestCase):
    @unittest.skipUnless(HEADER.is_file(), "not in a checkout")
    def test_every_function_struct_and_number_is_that_of_the_header(self) -> None:
        header = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
        declared = set(re.findall(r"LOCUM_API[^;(]*?(locum_\w+)\(", header))
        callbacks = {"locum_set_log", "locum_set_wake"}  # need a C callback; asyncio watches the descriptor instead
        self.assertEqual({name for name, _, _ in _ffi.FUNCTIONS}, declared - callbacks)
        for name, _, arguments in _ffi.FUNCTIONS:
            [listed] = re.findall(rf"{name}\(([^;]*)\);", header)
            self.assertEqual(len(arguments), 0 if listed.strip() == "void" else listed.count(",") + 1, name)
        structs = {"options": _ffi.Options, "step": _ffi.Step, "outcome": _ffi.Outcome, "request": _ffi.Request,
                   "decision": _ffi.Decision, "event": _ffi.Event}  # fmt: skip
        for name, struct in structs.items():
            [body] = re.findall(rf"typedef struct \{{([^}}]*)\}} locum_{name};", header)
            fields = re.findall(r"(\w+)(?:\[\d+\])?(?=[,;])", body)
            self.assertEqual([f for f, *_ in struct._fields_], fields, name)
        for name, number in (("LOCUM_ABI_MAJOR", _ffi.ABI_MAJOR), ("LOCUM_ABI_MINOR", _ffi.ABI_MINOR)):
            self.assertIn(f"#define {name} {number}", header)
        for prefix, numbers in (("LOCUM_ACTOR", _ffi.ACTORS), ("LOCUM_OUTCOME", _ffi.OUTCOMES)):
            for name, number in numbers.items():
                self.assertRegex(header, rf"{prefix}_{name.upper()} = {number}\b")
        for prefix, names in (("LOCUM_REASON", _ffi.REASONS), ("LOCUM_EVENT", _ffi.EVENTS)):
            listed = {int(n): name.lower() for name, n in re.findall(rf"{prefix}_(\w+) = (\d+)", header)}
            self.assertEqual(names, listed)

    def test_importing_the_package_brings_no_framework_and_is_quick(self) -> None:
        code = (
            "import sys, time; t = time.process_time(); import locum; t = time.process_time() - t\n"
            "print(t); print([m for m in ('langchain', 'langgraph', 'langchain_core', 'asyncio', 'numpy') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HEADER.parents[2] / "host-examples" / "python"
        )
        seconds, modules = done.stdout.splitlines()
        self.assertLess(float(seconds), 0.1)
        self.assertEqual(modules, "[]")


class ProgressLine(unittest.TestCase):
    STATUS = JobStatus(job=1, state="training", progress=0.33, loss=0.412, held_out_loss=0.48, seconds_left=125.0)

    def test_it_says_state_share_losses_and_time_left(self) -> None:
        self.assertEqual(line(self.STATUS), "training   [########----------------]  33 %  loss 0.412  held out 0.480  2:05 left")

    def test_in_a_pipe_it_is_a_line_for_each_tenth_and_state(self) -> None:
        out = io.StringIO()
        bar = Progress(out)
        for percent in range(0, 101):
            bar.show(JobStatus(state="training", progress=percent / 100))
        bar.show(JobStatus(state="saving", progress=1.0))
        bar.close()
        self.assertEqual(out.getvalue().count("\n"), 12)
        self.assertNotIn("\r", out.getvalue())

    def test_in_a_terminal_it_is_one_line_that_moves(self) -> None:
        out = io.StringIO()
        out.isatty = lambda: True  # type: ignore[method-assign]
        bar = Progress(out)
        for percent in range(0, 101):
            bar.show(JobStatus(state="training", progress=percent / 100))
        bar.close()
        self.assertEqual(out.getvalue().count("\n"), 1)

    def test_in_a_notebook_it_replaces_one_output(self) -> None:
        shown: list[str] = []
        Shell = type("ZMQInteractiveShell", (), {})
        handle = mock.Mock(update=lambda html: shown.append(html))
        display = mock.Mock(HTML=lambda text: text, display=mock.Mock(return_value=handle))
        with mock.patch.dict(sys.modules, {"IPython": mock.Mock(get_ipython=Shell), "IPython.display": display}):
            bar = Progress()
            bar.show(self.STATUS)
            bar.show(JobStatus(state="failed", message="1 < 2"))
            bar.close()
        self.assertEqual(len(shown), 2)
        self.assertIn("training", shown[0])
        self.assertIn("1 &lt; 2", shown[1])


class WithStore(unittest.TestCase):
    def setUp(self) -> None:
        if LIBRARY is None:
            self.skipTest("the library is not built")
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.store = Path(folder.name) / "store"

    def record(self, where: Locum, success: Any = True) -> str:
        with where.episode("t", domain="d", tools=TOOLS) as episode:
            episode.message({"role": "user", "content": "Go left."})
            episode.message(said("left"), actor="teacher", model="m", latency_ms=12.5)
            episode.message({"role": "tool", "tool_call_id": "c1", "content": "There."})
            episode.outcome(success, score=1.0, reason="it was there", details={"tags": ["easy"]})
        return episode.id


class Recording(WithStore):
    def test_episodes_outlive_the_process(self) -> None:
        with Locum(self.store) as first:
            self.record(first)
            self.record(first, False)
        with Locum(self.store) as second:
            stats = second.stats()
        self.assertEqual((stats["episodes"], stats["successes"], stats["failures"]), (2, 1, 1))

    def test_an_outcome_may_come_later_and_the_newest_counts(self) -> None:
        with Locum(self.store) as here:
            with here.episode("t") as episode:
                episode.message({"role": "user", "content": "?"})
            self.assertEqual(here.stats()["unknown"], 1)
            here.outcome(episode.id, True)
            self.assertEqual(here.stats()["successes"], 1)
            here.outcome(episode.id, False)
            self.assertEqual((here.stats()["successes"], here.stats()["failures"]), (0, 1))
            with self.assertRaises(locum.NotFound):
                here.outcome("0" * 32, True)
            with self.assertRaises(LocumError):
                here.outcome("no id", True)

    def test_a_block_that_raises_ends_its_episode_as_aborted(self) -> None:
        with Locum(self.store) as here:
            with self.assertRaises(KeyError), here.episode("t") as episode:
                raise KeyError("x")
            self.assertTrue(episode.ended)
            self.assertEqual(here.stats()["open_episodes"], 0)

    def test_a_dropped_episode_is_gone(self) -> None:
        with Locum(self.store) as here:
            with here.episode("t") as episode:
                episode.message({"role": "user", "content": "?"})
                episode.drop()
            here.flush()
            self.assertEqual(here.stats()["episodes"], 0)

    def test_the_current_episode_is_that_of_the_innermost_block(self) -> None:
        with Locum(self.store) as here:
            self.assertIsNone(locum.current_episode())
            with here.episode("a") as a:
                with here.episode("b") as b:
                    self.assertIs(locum.current_episode(), b)
                self.assertIs(locum.current_episode(), a)
            self.assertIsNone(locum.current_episode())

    def test_many_threads_record_at_once(self) -> None:
        with Locum(self.store) as here:
            threads = [threading.Thread(target=lambda: [self.record(here) for _ in range(10)]) for _ in range(8)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            self.assertEqual(here.stats()["successes"], 80)

    def test_a_process_that_never_closes_loses_nothing_that_was_confirmed(self) -> None:
        code = (
            "import sys, locum\n"
            "l = locum.Locum(sys.argv[1])\n"
            "e = l.episode('t'); e.message({'role': 'user', 'content': '?'}); e.outcome(True)\n"
        )
        root = str(Path(locum.__file__).parents[1])
        subprocess.run(
            [sys.executable, "-c", code, str(self.store)], check=True, env={**os.environ, "PYTHONPATH": root, "LOCUM_LIBRARY": str(LIBRARY)}
        )
        with Locum(self.store) as here:
            self.assertEqual(here.stats()["successes"], 1)


class Deciding(WithStore):
    def test_without_a_model_the_teacher_plays_and_the_reason_is_said(self) -> None:
        with Locum(self.store) as here, here.episode("t", tools=TOOLS) as episode:
            episode.message({"role": "user", "content": "Go left."})
            decision = episode.decide([{"role": "user", "content": "Go left."}], tools=TOOLS)
            self.assertEqual(decision.who, "teacher")
            self.assertFalse(decision.student)
            self.assertEqual(decision.reason_name, "no_student")
            self.assertTrue(decision.reason)
            with self.assertRaises(locum.AskTeacher):
                episode.generate([{"role": "user", "content": "Go left."}], tools=TOOLS)
            with self.assertRaises(locum.AskTeacher):
                asyncio.run(episode.generate_async([{"role": "user", "content": "Go left."}], tools=TOOLS))

    def test_nothing_can_be_distilled_without_a_model(self) -> None:
        with Locum(self.store) as here:
            with self.assertRaises(locum.ModelError):
                here.distil()
            with self.assertRaises(locum.NotFound):
                here.job().status()
            with self.assertRaises(locum.NotFound):
                here.use(7)
            with self.assertRaises(locum.NotFound):
                here.rollback()
            with self.assertRaises(LocumError):
                here.use("nobody")
            self.assertEqual(here.students(), [])


class Refusing(WithStore):
    def test_a_policy_with_a_syntax_error_names_file_and_line(self) -> None:
        policy = self.store.parent / "mine.lua"
        policy.write_text("local M = {}\nfunction M.decide(\nreturn M\n")
        with self.assertRaises(locum.PolicyError) as caught:
            Locum(self.store, policy=policy).open()
        self.assertIn("mine.lua", str(caught.exception))
        with Locum(self.store) as here:
            with self.assertRaises(locum.PolicyError):
                here.set_policy("return 7", "seven.lua")
            here.set_policy("return {}", "empty.lua")

    def test_the_demos_policy_is_accepted(self) -> None:
        with Locum(self.store, policy=Path(__file__).parents[1] / "demo" / "babyai.lua") as here:
            self.assertIn("babyai.lua", here.stats()["policy"])

    def test_a_missing_policy_file_and_a_store_that_is_a_file_are_refused(self) -> None:
        with self.assertRaises(locum.NotFound):
            Locum(self.store, policy="/nowhere/mine.lua").open()
        file = self.store.parent / "file"
        file.write_text("x")
        with self.assertRaises(LocumError):
            Locum(file).open()

    def test_a_closed_store_and_an_ended_episode_say_so(self) -> None:
        here = Locum(self.store)
        episode = here.episode("t")
        other = here.episode("u")
        episode.outcome(True)
        with self.assertRaises(locum.Closed):
            episode.message({"role": "user", "content": "?"})
        here.close()
        here.close()
        for use in (lambda: here.stats(), lambda: other.message({"role": "user", "content": "?"}), lambda: here.episode("v")):
            with self.assertRaises(locum.Closed):
                use()

    def test_malformed_messages_are_refused(self) -> None:
        with Locum(self.store) as here, here.episode("t") as episode:
            with self.assertRaises(LocumError) as caught:
                episode.message({"role": "nobody", "content": "?"})
            self.assertTrue(caught.exception.code.startswith("LOCUM_E_"))

    def test_a_library_of_another_kind_is_refused(self) -> None:
        libc = next((p for p in (Path("/lib/x86_64-linux-gnu/libc.so.6"), Path("/usr/lib/libc.so.6")) if p.exists()), None)
        if libc is None:
            self.skipTest("no libc where it is looked for")
        with self.assertRaisesRegex(locum.LibraryNotFound, "is not Locum's library"):
            Locum(self.store, library=libc).open()

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_forked_child_is_told_so_and_may_open_for_itself(self) -> None:
        with Locum(self.store) as here:
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    here.stats()
                    answer = "no error"
                except LocumError as e:
                    answer = e.code
                os.write(write, answer.encode())
                os._exit(0)
            os.waitpid(child, 0)
            self.assertEqual(os.read(read, 100).decode(), "LOCUM_E_FORKED")
            self.record(here)


class Erasing(WithStore):
    def test_an_episode_and_a_scope_leave_the_files_and_nothing_else_does(self) -> None:
        with Locum(self.store) as here:
            ids = {}
            for task, scope in (("kept", ""), ("erased", ""), ("theirs", "tenant-2")):
                with here.episode(task, scope=scope) as episode:
                    ids[task] = episode.id
                    episode.message({"role": "user", "content": f"the word is {task}-zanzibar"})
                    episode.outcome(True)
            for bad in ({}, {"episode_id": ids["kept"], "scope": "x"}, {"episode_id": "7"}, {"scope": ""}):
                with self.assertRaises(LocumError) as raised:
                    here.forget(**bad)
                self.assertEqual(raised.exception.code, "LOCUM_E_ARGUMENT", bad)
            self.assertEqual(here.students_of(ids["erased"]), [])
            done = here.forget(ids["erased"])
            self.assertEqual((done["episodes"], done["students"], done["serving"]), ([ids["erased"]], [], False))
            self.assertEqual(here.forget(scope="tenant-2")["episodes"], [ids["theirs"]])
            for gone in ({"episode_id": ids["erased"]}, {"scope": "tenant-2"}):
                with self.assertRaises(LocumError) as raised:
                    here.forget(**gone)
                self.assertEqual(raised.exception.code, "LOCUM_E_NOT_FOUND")
            with self.assertRaises(LocumError) as raised:
                here.lineage(1)
            self.assertEqual(raised.exception.code, "LOCUM_E_NOT_FOUND")
        found = b"".join(file.read_bytes() for file in self.store.rglob("*") if file.is_file())
        self.assertIn(b"kept-zanzibar", found)
        self.assertNotIn(b"erased-zanzibar", found)
        self.assertNotIn(b"theirs-zanzibar", found)


class Waiting(WithStore):
    def test_async_twins_work_on_a_loop(self) -> None:
        async def run() -> None:
            async with Locum(self.store) as here:
                with here.episode("t") as episode:
                    episode.message({"role": "user", "content": "?"})
                    await episode.outcome_async(True)
                await here.flush_async()
                self.assertEqual((await here.stats_async())["successes"], 1)
                self.assertEqual(await here.students_async(), [])

        asyncio.run(run())

    def test_events_are_taken_once_and_a_new_policy_is_one(self) -> None:
        with Locum(self.store) as here:
            here.events()
            here.set_policy("return {}", "empty.lua")
            events = here.events(wait=2.0)
            self.assertTrue(events)
            self.assertIn("policy_loaded", [e.name for e in events])
            self.assertEqual(here.events(), [])

    def test_the_report_is_one_page(self) -> None:
        with Locum(self.store) as here:
            self.record(here)
            file = self.store / "report.html"
            html = here.report(file)
            self.assertTrue(html.lstrip().lower().startswith("<!doctype html"))
            self.assertEqual(file.read_text(), html)


class SameSizes(unittest.TestCase):
    def test_handles_are_passed_as_64_bit_integers(self) -> None:
        self.assertEqual(ctypes.sizeof(ctypes.c_uint64), 8)
        self.assertEqual(ctypes.sizeof(_ffi.Str), 2 * ctypes.sizeof(ctypes.c_void_p))
        self.assertEqual(ctypes.sizeof(_ffi.Decision), 128)


if __name__ == "__main__":
    unittest.main()
