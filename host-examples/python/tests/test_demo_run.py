"""The demo's run from recording to the last line, against a library that pretends to train."""

import json
import re
import tempfile
import threading
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import boss
import boss_play
import run
from babyai import World

from locum import Decision, JobStatus, Locum, ModelError, NotFound, Student
from locum.core import _current
from tests.fakes import FakeEpisode, FakeLocum

STATES = ("curating", "training", "training", "saving", "evaluating", "shadow", "canary", "canary", "promoted")


class PretendEpisode(FakeEpisode):
    def __enter__(self) -> "PretendEpisode":
        self.token = _current.set(self)  # type: ignore[arg-type]
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self.token)

    def decide(self, messages: Any, **request: Any) -> Decision:
        pretend: Any = self.locum
        student = pretend.pin in ("base", 1) or (pretend.pin == "automatic" and pretend.state == "canary" and int(self.id, 16) % 2 == 0)
        return Decision("student" if student else "teacher", "as told", "policy", 1, 0.5, 1)

    def outcome(self, success: Any, **about: Any) -> None:
        super().outcome(success, **about)
        pretend: Any = self.locum
        with pretend.lock:
            pretend.successes += bool(success)


class PretendLocum(FakeLocum):
    """Begins a job when its policy's number of successes is there; the job moves on each time it is looked at."""

    kept: dict[str, Any] = {}  # what is "on disk" between runs

    def __init__(self, store: Path, policy: Path, base_model: Path | None) -> None:
        function = {"name": "act", "arguments": '{"action": "forward"}'}
        super().__init__(
            "teacher", {"role": "assistant", "content": None, "tool_calls": [{"id": "s", "type": "function", "function": function}]}
        )
        self.store, self.pin, self.lock = store, "automatic", threading.Lock()
        self.has_base = base_model is None
        self.successes = self.kept.setdefault("successes", 0)
        [wanted] = re.findall(r"local NEW_SUCCESSES = (\d+)", policy.read_text())
        self.wanted = int(wanted)
        self.jobs: list[dict[str, Any]] = self.kept.setdefault("jobs", [])

    def __enter__(self) -> "PretendLocum":
        return self

    def __exit__(self, *_: object) -> None:
        self.kept["successes"] = self.successes

    @property
    def state(self) -> str:
        return STATES[self.jobs[0]["at"]] if self.jobs else ""

    def episode(self, task: str = "", **about: Any) -> PretendEpisode:
        self.episodes.append(PretendEpisode(self, task, about))
        return self.episodes[-1]  # type: ignore[return-value]

    def stats(self) -> dict[str, Any]:
        return {"base": "abc" if self.has_base else None}

    def use(self, pin: Any) -> None:
        self.pin = pin

    def distil(self, **options: Any) -> Any:
        if not self.has_base:
            raise ModelError("there is no base model")
        self.jobs.append({"at": 0, "options": options})
        return self.job(len(self.jobs))

    def job(self, number: int = 0) -> Any:
        if not self.jobs and self.has_base and self.successes >= self.wanted:
            self.jobs.append({"at": 0, "options": {}})
        if not self.jobs:
            raise NotFound("no job")
        number = number or len(self.jobs)
        job = self.jobs[number - 1]
        last = STATES.index("promoted") if "promote" not in job["options"] else -1

        def status() -> JobStatus:
            state = "stored" if last < 0 and job["at"] > 4 else STATES[min(job["at"], len(STATES) - 1)]
            job["at"] = min(job["at"] + 1, len(STATES) - 1)
            version = number if state in ("shadow", "canary", "promoted", "stored") else 0
            return JobStatus(job=number, state=state, progress=0.5, episodes_seen=30, episodes_kept=7, version=version)

        return mock.Mock(status=status)

    def students(self) -> list[Student]:
        return [Student(version=v, id=str(v), trained_tokens=1234, train_seconds=5.0) for v in range(1, len(self.jobs) + 1)]

    def report(self, path: Path) -> str:
        path.write_text("<!doctype html>")
        return ""


class Run(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.store = Path(folder.name) / "store"
        PretendLocum.kept = {}
        for patch in (
            mock.patch.object(run, "Locum", PretendLocum),
            mock.patch.object(run, "LOOK_SECONDS", 0.05),
            mock.patch.object(run, "ASK_AFTER_SECONDS", 0.2),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def demo(self, *more: str, then: Callable[[run.Demo], None] | None = None) -> dict[str, Any]:
        arguments = ["--store", str(self.store), "--json", "--episodes", "24", "--test-seeds", "4", "--threads", "2", *more]
        demo = run.Demo(run.parse(arguments))
        if then:
            then(demo)
        return demo.run()

    def test_it_ends_with_everything_the_last_line_needs(self) -> None:
        result = self.demo()
        self.assertTrue(json.dumps(result))
        for field in (
            "level teacher base random student episodes_recorded episodes_kept trained_tokens train_seconds promoted "
            "served_by_student teacher_calls_saved report teacher_while_recorded invalid_calls"
        ).split():
            self.assertIn(field, result)
        self.assertTrue(result["promoted"])
        self.assertEqual((result["level"], result["episodes_kept"], result["trained_tokens"]), ("GoToLocal", 7, 1234))
        for arm in ("teacher", "base", "random", "student"):
            self.assertEqual(result[arm]["n"], 4)
            self.assertEqual(len(result[arm]["ci"]), 2)
        self.assertGreaterEqual(result["teacher_calls_saved"], result["served_by_student"])
        self.assertEqual(result["invalid_calls"], 0)
        self.assertTrue(Path(result["report"]).exists())

    def test_a_second_run_repeats_nothing(self) -> None:
        first = self.demo()
        with mock.patch("player.Player.play") as play:
            second = self.demo()
        play.assert_not_called()
        self.assertEqual({**first, "seconds": 0}, {**second, "seconds": 0})

    def test_a_run_that_was_killed_while_recording_goes_on(self) -> None:
        def stop_soon(demo: run.Demo) -> None:
            demo._line = mock.Mock(side_effect=KeyboardInterrupt)  # type: ignore[method-assign]

        with self.assertRaises(KeyboardInterrupt):
            self.demo(then=stop_soon)
        before = [json.loads(line)["seed"] for line in (self.store / "demo" / "episodes.jsonl").read_text().splitlines()]
        self.assertTrue(before)
        self.demo()
        seeds = [json.loads(line)["seed"] for line in (self.store / "demo" / "episodes.jsonl").read_text().splitlines()]
        self.assertEqual(len(seeds), len(set(seeds)))
        self.assertEqual(seeds[: len(before)], before)

    def test_when_the_policy_does_not_ask_the_demo_does(self) -> None:
        # 12 episodes cannot bring the successes that a policy made for 1,000 waits for.
        with mock.patch.object(PretendLocum, "wanted", 10**6, create=True), mock.patch.object(PretendLocum, "__setattr__", _all_but_wanted):
            self.assertTrue(self.demo()["promoted"])

    def test_without_a_model_the_teacher_is_recorded_and_the_result_says_so(self) -> None:
        result = self.demo("--base", "/nowhere")
        self.assertEqual((result["student"], result["base"], result["promoted"]), (None, None, False))
        self.assertEqual(result["episodes_recorded"], 24)
        self.assertEqual(result["teacher"]["n"], 4)

    def test_the_unfiltered_comparison_has_as_many_tokens_and_is_not_tried_live(self) -> None:
        self.demo()
        result = self.demo("--unfiltered")
        options = PretendLocum.kept["jobs"][1]["options"]
        self.assertEqual((options["unfiltered"], options["promote"], options["tokens"]), (True, "never", 1234))
        self.assertFalse(result["promoted"])
        again = self.demo()
        self.assertTrue(again["promoted"])

    def test_another_level_does_not_go_into_the_same_store(self) -> None:
        self.demo()
        with self.assertRaisesRegex(run.Stop, "GoToLocal"):
            self.demo("--level", "PutNextLocal")


def _all_but_wanted(pretend: Any, name: str, value: Any) -> None:
    if name != "wanted":
        object.__setattr__(pretend, name, value)


class StudentsOfBossLevel(unittest.TestCase):
    def test_a_student_that_is_not_there_leaves_every_step_to_the_bot(self) -> None:
        world, seed = World(boss.LEVEL), boss.FIRST_SEED
        while (solved := boss.episode(world, seed)) is None:
            seed += 1
        with tempfile.TemporaryDirectory() as folder, Locum(folder) as here:
            played = boss_play.play(here, world, boss_play.Reader("none", 1, True), seed, 2 * len(solved))
        self.assertEqual((played.success, played.asked, played.updates), (True, played.steps, 0))


if __name__ == "__main__":
    unittest.main()
