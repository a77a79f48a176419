"""The whole loop in one process: a LangGraph agent is recorded, its good episodes are distilled, and a small student takes over.

The last line of stdout is one JSON object; what goes on meanwhile is shown on stderr. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
import re
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
try:
    import locum
except ModuleNotFoundError:  # run from a checkout: the package is beside this folder
    sys.path.insert(0, str(HERE.parent))
    import locum

from locum import JobStatus, Locum, LocumError, ModelError, NotFound  # noqa: E402
from locum._progress import line as progress_line  # noqa: E402

# Seeds that never meet: what the teacher teaches, the trial of a candidate, the final test.
RECORD_SEEDS, TRIAL_SEEDS, TEST_SEEDS = 200_000, 400_000, 60_000

ASK_AFTER_SECONDS = 20.0  # the policy's time to ask for a job once everything is recorded; then the demo asks
# While a job trains, one player goes on at this rest between episodes: enough to show that the agent is served, and little
# enough to leave the cores to the job.
TRAINING_PACE_SECONDS = 3.0
MAX_TRIAL_EPISODES = 800
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """The numbers of a run. Limits are in actions."""

    level: str
    test_limit: int
    record_limit: int
    derail_rate: float
    episodes: int
    train_seconds: float
    test_seeds: int
    threads: int


# Episodes to record and seconds to train where the options say nothing.
DEFAULTS = {"BabyAI-GoToLocal-v0": (1000, 360.0)}
OTHER_LEVELS = (1000, 1200.0)


class Stop(Exception):
    """The demo cannot go on; the text is a sentence for people."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        missing = [m for m in ("minigrid", "langchain", "langgraph") if not _importable(m)]
        if missing:
            raise Stop(f"{' and '.join(missing)} missing: pip install 'host-examples/python[demo]'")
        locum.find_library()
        result = Demo(options).run()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (Stop, LocumError, ValueError) as e:
        print(f"demo: {e}", file=sys.stderr)
        return 2
    print(json.dumps(result), flush=True)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    p.add_argument("--level", default="GoToLocal", help="any BabyAI level by its name (default: GoToLocal)")
    p.add_argument("--teacher", metavar="MODULE:FACTORY", help="makes a LangChain chat model; default: the environment's bot, derailing")
    p.add_argument("--store", type=Path, metavar="DIR", help="default: .cache/demo/LEVEL")
    p.add_argument(
        "--base", type=Path, metavar="DIR", help="Hugging Face folder of the base model; default: the one imported into the store"
    )
    p.add_argument("--fresh", action="store_true", help="forget what an earlier run left in the store")
    p.add_argument("--episodes", type=int, metavar="N", help="episodes of the teacher to record before distilling")
    p.add_argument("--train-seconds", type=float, metavar="S", help="length of the distillation")
    p.add_argument("--test-seeds", type=int, default=100, metavar="N", help="unseen episodes at the end, for each arm (default: 100)")
    p.add_argument("--threads", type=int, default=8, metavar="N", help="episodes played at once (default: 8)")
    p.add_argument("--unfiltered", action="store_true", help="for comparison: train on everything, with as many tokens, and test that")
    p.add_argument("--json", action="store_true", help="nothing but the result")
    return p.parse_args(arguments)


class Demo:
    """One run. `run()` returns the result, and can be repeated on the same store: it goes on where the last one stopped."""

    def __init__(self, options: argparse.Namespace) -> None:
        import babyai
        import teacher
        from display import Display
        from ledger import Ledger

        self.options = options
        self.display = Display(quiet=options.json)
        level = babyai.level_id(options.level)
        self.short = babyai.short_name(level)
        self.store = options.store or Path(".cache") / "demo" / self.short
        if options.fresh:
            self._forget()
        self.ledger = Ledger(self.store / "demo")
        self.teacher_name = options.teacher or "derailing-bot"
        self.model = teacher.load(options.teacher) if options.teacher else teacher.DerailingBot()
        self._same_as_before(level)
        self.plan = self._plan(level)

    def _forget(self) -> None:
        if self.store.exists():
            if any(self.store.iterdir()) and not (self.store / "demo").is_dir():
                raise Stop(f"--fresh would delete {self.store}, which is not a store of this demo; remove it yourself")
            shutil.rmtree(self.store)

    def _same_as_before(self, level: str) -> None:
        now = {"level": level, "teacher": self.teacher_name}
        before = self.ledger.get("what")
        if before is not None and before != now:
            told = ", ".join(f"{k} {before.get(k)}" for k in now)
            raise Stop(f"{self.store} holds a demo of {told}; give another --store, or --fresh to start anew")
        self.ledger.put("what", now)

    def _plan(self, level: str) -> Plan:
        import babyai
        import teacher

        options = self.options
        measured = self.ledger.get("measured")
        if measured is None:
            test_limit = babyai.TEST_LIMITS.get(level)
            if test_limit is None:
                self.display.say(f"measuring {self.short}: twice the expert's mean is the step limit")
                mean, _ = babyai.expert_mean(level)
                test_limit = max(1, round(2 * mean))
            rate = teacher.DERAIL_RATES.get(level)
            if rate is None:
                rate = teacher.derail_rate(level, 2 * test_limit)
            measured = {"test_limit": test_limit, "derail_rate": rate}
            self.ledger.put("measured", measured)
        episodes, seconds = DEFAULTS.get(level, OTHER_LEVELS)
        return Plan(
            level=level,
            test_limit=measured["test_limit"],
            record_limit=2 * measured["test_limit"],
            derail_rate=measured["derail_rate"],
            episodes=options.episodes or episodes,
            train_seconds=options.train_seconds or seconds,
            test_seeds=options.test_seeds,
            threads=max(1, options.threads),
        )

    # The run

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        with Locum(self.store, policy=self._policy(), base_model=self.options.base) as stand_in:
            self.locum = stand_in
            stand_in.use("automatic")  # a run that was killed in its final test left a student pinned
            self.has_base = stand_in.stats().get("base") is not None
            plan = self.plan
            self.display.say(
                f"{self.short}: {plan.episodes} episodes of {self.teacher_name} (limit {plan.record_limit}), "
                f"test on {plan.test_seeds} seeds (limit {plan.test_limit}), store {self.store}"
            )
            if self.ledger.recorded:
                self.display.say(f"going on: {len(self.ledger.recorded)} episodes were recorded before")
            if not self.has_base:
                self.display.say("there is no base model: the teacher plays and is recorded, nothing is distilled "
                                 "(`locum model import`, or --base DIR)")  # fmt: skip
            job = self._live()
            if self.options.unfiltered:
                job = self._unfiltered(job)
            result = self._result(job)
            result["seconds"] = round(time.monotonic() - began, 1)
            return result

    def _policy(self) -> Path:
        """The policy with this run's numbers in it, in the store's folder."""
        from teacher import TARGET_RATE

        source = (HERE / "babyai.lua").read_text()
        # The offline teacher's rate is known, so that the last tenth of the recording goes on while the job begins.
        numbers = {"NEW_SUCCESSES": math.ceil(0.9 * self.plan.episodes * TARGET_RATE), "TRAIN_SECONDS": round(self.plan.train_seconds)}
        for name, value in numbers.items():
            source, n = re.subn(rf"(?m)^local {name} = \d+", f"local {name} = {value}", source)
            assert n == 1, f"babyai.lua has no line `local {name} = ...`"
        path = self.store / "demo" / "babyai.lua"
        path.write_text(source)
        return path

    def _live(self) -> JobStatus | None:
        """Records, and serves, until the newest job has come to its end. None if there can be no job."""
        from player import Crew, Player, open_middleware

        middleware = open_middleware(self.locum, self.plan.level)
        make = functools.partial(Player, self.plan.level, self.model, self.plan.derail_rate, middleware)
        phase, crew, all_recorded, said = "", None, None, ""
        try:
            while True:
                job = self._job()
                if job is not None and job.state != said:
                    said = job.state
                    self.display.say(self._news(job))
                want = self._phase(job)
                if want == "end":
                    return job
                recorded = want == "record" and len(self.ledger.recorded) >= self.plan.episodes
                if not recorded and (want != phase or crew is None or not crew.working):
                    _dismiss(crew)
                    phase, crew = want, self._crew(Crew, make, want)
                if recorded:
                    if not self.has_base:
                        return None
                    all_recorded = all_recorded or time.monotonic()
                    if time.monotonic() - all_recorded > ASK_AFTER_SECONDS:
                        self.display.say("the policy asks for no job yet, so the demo does")
                        self._start(max_seconds=self.plan.train_seconds)
                self.display.status(self._line(job))
                time.sleep(LOOK_SECONDS)
        finally:
            if crew is not None:
                crew.stop()

    def _phase(self, job: JobStatus | None) -> str:
        if job is None:
            return "record"
        if job.ended:
            return "end"
        if job.state in JobStatus.ON_TRIAL:
            if len(self.ledger.tried) >= MAX_TRIAL_EPISODES:
                self.display.say(f"no verdict after {MAX_TRIAL_EPISODES} live episodes")
                return "end"
            return "trial"
        return "train"

    def _crew(self, make_crew: Any, make_player: Any, phase: str) -> Any:
        if phase == "trial":
            seeds: Iterable[int] = _fresh(TRIAL_SEEDS, self.ledger.tried)
        else:
            seeds = _fresh(RECORD_SEEDS, self.ledger.recorded)
            if phase == "record":
                seeds = itertools.islice(seeds, max(0, self.plan.episodes - len(self.ledger.recorded)))
        kept_as = "trial" if phase == "trial" else "record"
        threads = 1 if phase == "train" else self.plan.threads
        crew = make_crew(make_player, threads, seeds, self.plan.record_limit, functools.partial(self.ledger.add_episode, kept_as))
        crew.pace = TRAINING_PACE_SECONDS if phase == "train" else 0.0
        return crew

    def _job(self) -> JobStatus | None:
        """The newest job that serves the agent. Those of `--unfiltered` are told apart by the number they were given."""
        try:
            newest = self.locum.job(self.ledger.get("job") or 0).status()
        except NotFound:
            return None
        if newest.job in (self.ledger.get("unfiltered_jobs") or []):
            return None
        if not self.ledger.get("job"):
            self.ledger.put("job", newest.job)
        if newest.state in ("failed", "cancelled"):
            raise Stop(f"job {newest.job} {newest.state}: {newest.message or 'no reason given'}; --fresh starts anew")
        return newest

    def _start(self, **options: Any) -> JobStatus:
        try:
            return self.locum.distil(**options).status()
        except ModelError as e:
            raise Stop(f"nothing can be distilled: {e}") from e

    # What is said

    def _line(self, job: JobStatus | None) -> str:
        seen = self.ledger.recorded
        won = sum(p.success for p in seen)
        text = f"{len(seen)} episodes, {won} successes"
        if job is None:
            return f"{text} of {self.plan.episodes} episodes   the teacher answers"
        if job.state in JobStatus.ON_TRIAL:
            tried = self.ledger.tried
            student = [p for p in tried if p.student_calls]
            teacher = [p for p in tried if not p.student_calls]
            return (
                f"{job.state}: {len(tried)} live episodes; student {_score(student)}, teacher {_score(teacher)}; "
                f"the student answered {sum(p.student_calls for p in tried)} calls"
            )
        return f"{progress_line(job)}   {text}, the teacher answers"

    def _news(self, job: JobStatus) -> str:
        words = {
            "curating": "a job has begun: choosing what teaches",
            "training": f"training on {job.episodes_kept} of {job.episodes_seen} episodes, the agent goes on with its teacher",
            "saving": "trained; saving the student",
            "evaluating": "asking the student about held-out steps",
            "shadow": "shadow: the student answers beside the teacher, unheard",
            "canary": "canary: the student plays a share of the live episodes",
            "promoted": "promoted: the student takes over",
        }
        text = words.get(job.state, job.state)
        return f"{text} ({job.message})" if job.message else text

    # The final test

    def _result(self, job: JobStatus | None) -> dict[str, Any]:
        version = job.version if job is not None else 0
        arms = {"teacher": self._test("teacher"), "random": self._test("random")}
        if self.has_base:
            arms["base"] = self._test("base", pin="base")
        if version:
            arms["student"] = self._test(f"student-{version}", pin=version)
        self.locum.use("automatic")
        report = self.store / "report.html"
        self.locum.report(report)
        served = [p for p in [*self.ledger.recorded, *self.ledger.tried, *self._tested(f"student-{version}")] if p.student_calls]
        scores = {name: _interval(arms.get(name)) for name in ("teacher", "base", "random", "student")}
        for name, score in scores.items():
            if score:
                self.display.say(f"{name:<8} {score['success']:.2f}  ({score['ci'][0]:.2f} to {score['ci'][1]:.2f}, {score['n']} episodes)")
        self.display.say(f"report: {report}")
        student = next((s for s in self.locum.students() if version and s.version == version), None)
        return {
            "level": self.short,
            **scores,
            "teacher_while_recorded": _interval(self.ledger.recorded),
            "invalid_calls": sum(p.invalid_calls for p in served),
            "episodes_recorded": len(self.ledger.recorded),
            "episodes_kept": (job.episodes_kept or 0) if job else 0,
            "trained_tokens": student.trained_tokens if student else 0,
            "train_seconds": round(student.train_seconds, 1) if student else 0.0,
            "promoted": job is not None and job.state == "promoted",
            "served_by_student": len(served),
            "teacher_calls_saved": sum(p.student_calls for p in served),
            "verdict": (job.message or job.state) if job else "no job",
            "report": str(report),
        }

    def _tested(self, arm: str) -> list[Any]:
        return [self.ledger.tests.get(arm, {}).get(s) for s in self._test_range() if s in self.ledger.tests.get(arm, {})]

    def _test_range(self) -> range:
        return range(TEST_SEEDS, TEST_SEEDS + self.plan.test_seeds)

    def _test(self, arm: str, pin: int | str | None = None) -> list[Any]:
        """Plays what is missing of the test seeds. With `pin` that student plays alone: a step it cannot answer ends the episode."""
        from player import Crew, Played, Player, Silent, open_middleware

        left = [s for s in self._test_range() if s not in self.ledger.tests.get(arm, {})]
        if left and arm == "random":
            for seed in left:
                self.ledger.add_test(arm, Played(seed, *_random_episode(self.plan.level, seed, self.plan.test_limit)))
        elif left:
            middleware = None
            if pin is not None:
                self.locum.use(pin)
                middleware = open_middleware(self.locum, self.plan.level)
            model = self.model if pin is None else Silent()
            make = functools.partial(Player, self.plan.level, model, self.plan.derail_rate, middleware)
            crew = Crew(make, self.plan.threads, left, self.plan.test_limit, functools.partial(self.ledger.add_test, arm), keep=False)
            try:
                while crew.working:
                    done = self._tested(arm)
                    self.display.status(f"test, {arm}: {len(done)} of {self.plan.test_seeds}, {sum(p.success for p in done)} successes")
                    time.sleep(LOOK_SECONDS)
            finally:
                crew.stop()
            _dismiss(crew)
        return self._tested(arm)

    # The comparison

    def _unfiltered(self, job: JobStatus | None) -> JobStatus:
        """Trains a student on everything that was recorded, with as many tokens as the filtered one, and waits for it."""
        if job is None or not job.version:
            raise Stop("--unfiltered compares with a student, and there is none yet: run the demo without it first")
        tokens = next((s.trained_tokens for s in self.locum.students() if s.version == job.version), 0)
        known = self.ledger.get("unfiltered_jobs") or []
        status = self.locum.job(known[-1]).status() if known else None
        if status is None or status.state in ("failed", "cancelled"):
            started = self._start(unfiltered=True, promote="never", tokens=tokens, max_seconds=10 * self.plan.train_seconds)
            self.ledger.put("unfiltered_jobs", [*known, started.job])
            known = [*known, started.job]
        self.display.say(f"training on everything, for comparison: {tokens} tokens")
        while not (status := self.locum.job(known[-1]).status()).ended:
            self.display.status(progress_line(status))
            time.sleep(LOOK_SECONDS)
        if not status.version:
            raise Stop(f"the comparison {status.state}: {status.message}")
        return status


def _dismiss(crew: Any) -> None:
    """Lets a crew go; what stopped it early stops the demo."""
    if crew is not None:
        crew.stop()
        if crew.error is not None:
            raise Stop(
                f"playing stopped after several errors in a row, the last: {type(crew.error).__name__}: {crew.error}"
            ) from crew.error


def _fresh(first: int, played: list[Any]) -> Iterable[int]:
    known = {p.seed for p in played}
    return (s for s in itertools.count(first) if s not in known)


def _random_episode(level: str, seed: int, limit: int) -> tuple[bool, int]:
    import babyai

    world, rng = babyai.World(level), random.Random(f"random/{seed}")
    world.reset(seed, limit)
    while not world.done:
        world.act(babyai.random_action(rng))
    return world.success, world.steps


def _score(played: list[Any]) -> str:
    return f"{sum(p.success for p in played)} of {len(played)}"


def _interval(played: list[Any] | None) -> dict[str, Any] | None:
    """Success with its 95 % Wilson interval."""
    if not played:
        return None
    n, won = len(played), sum(p.success for p in played)
    low, high = wilson(won, n)
    return {"n": n, "success": round(won / n, 4), "ci": [round(low, 4), round(high, 4)]}


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share = successes / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def _importable(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


if __name__ == "__main__":
    sys.exit(main())
