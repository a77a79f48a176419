"""A stand-in for `Locum` without the library: decides what it is told to, and remembers what it was given."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

from locum import Answer, AskTeacher, Closed, Decision


class FakeEpisode:
    def __init__(self, locum: FakeLocum, task: str, about: dict[str, Any]) -> None:
        self.locum, self.task, self.about = locum, task, about
        self.id = f"{next(locum.numbers):032x}"
        self.messages: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.requests: list[dict[str, Any]] = []
        self.outcomes: list[Any] = []
        self.ended = False

    def _check(self) -> None:
        if self.locum.broken:
            raise self.locum.broken
        if self.ended:
            raise Closed(f"episode {self.id} has ended")

    def message(self, message: dict[str, Any], **about: Any) -> None:
        self._check()
        self.messages.append((message, about))

    def decide(self, messages: Any, **request: Any) -> Decision:
        self._check()
        self.requests.append(request)
        return Decision(self.locum.who, "as told", "policy", 1 if self.locum.who == "student" else 0, 0.5, 1000)

    def _answer(self) -> Answer:
        self._check()
        if isinstance(self.locum.answer, Exception):
            raise self.locum.answer
        return Answer(self.locum.answer, "tool_calls", {"prompt_tokens": 9, "completion_tokens": 3}, "abc", 1, 0.5, {})

    def generate(self, messages: Any, **request: Any) -> Answer:
        time.sleep(self.locum.seconds)
        return self._answer()

    async def generate_async(self, messages: Any, **request: Any) -> Answer:
        await asyncio.sleep(self.locum.seconds)
        return self._answer()

    def outcome(self, success: Any, **about: Any) -> None:
        self._check()
        self.outcomes.append((success, about))
        self.ended = True

    def drop(self) -> None:
        self.ended = True


class FakeLocum:
    """`who` plays; the student says `answer` (or raises it) after `seconds`; with `broken` set, everything raises that."""

    def __init__(self, who: str = "teacher", answer: Any = None, seconds: float = 0.0) -> None:
        self.who, self.answer, self.seconds = who, answer or AskTeacher("late"), seconds
        self.broken: Exception | None = None
        self.numbers = itertools.count(1)
        self.episodes: list[FakeEpisode] = []

    def episode(self, task: str = "", **about: Any) -> FakeEpisode:
        if self.broken:
            raise self.broken
        self.episodes.append(FakeEpisode(self, task, about))
        return self.episodes[-1]
