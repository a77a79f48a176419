"""Plays episodes: a LangGraph agent in a BabyAI world, with or without Locum between the agent and its model."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import babyai
import teacher as weak
from babyai import ACT_SPEC, SYSTEM, World
from langchain.agents import create_agent
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import StructuredTool

from locum import Locum
from locum.langchain import LocumMiddleware

MAX_FAILURES = 5  # episodes in a row that may fail by an error before the crew stops


@dataclass(frozen=True)
class Played:
    """One episode that was played to its end."""

    seed: int
    success: bool
    steps: int
    student_calls: int = 0
    teacher_calls: int = 0
    invalid_calls: int = 0  # of the student: not one of the seven actions
    id: str = ""  # in the store; empty if it was not kept

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Silent(BaseChatModel):
    """Has nothing to say, which ends the episode: stands where no teacher may help a student that is being tested."""

    @property
    def _llm_type(self) -> str:
        return "silent"

    def bind_tools(self, tools: Any, **kwargs: Any) -> BaseChatModel:  # type: ignore[override]
        return self

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content="No answer."))])


class Player:
    """One world and the agent in it. Used by one thread at a time; the middleware may be shared."""

    def __init__(self, level: str, model: BaseChatModel, derail_rate: float, middleware: LocumMiddleware | None = None) -> None:
        self.world = World(level)
        self.name = babyai.short_name(self.world.level)
        self._derail_rate, self._middleware = derail_rate, middleware
        self._advised = isinstance(model, weak.DerailingBot)
        self._tool = StructuredTool.from_function(
            self._act,
            name="act",
            description=ACT_SPEC["function"]["description"],
            args_schema=ACT_SPEC["function"]["parameters"],
            # Read by the agent after each call: true ends the run, so that it stops with the world and not a model call later.
            return_direct=True,
        )
        self._agent = create_agent(model, [self._tool], system_prompt=SYSTEM, middleware=[middleware] if middleware else [])

    def _act(self, action: str) -> str:
        text = self.world.act(action)
        self._tool.return_direct = self.world.done
        return text

    def play(self, seed: int, limit: int, keep: bool = True) -> Played:
        """Plays `seed` for at most `limit` actions. With a middleware the episode is recorded, with its outcome, if `keep`."""
        text = self.world.reset(seed, limit, advised=self._advised)
        bot = weak.WeakBot(self.world, self._derail_rate, seed)
        with weak.playing(bot):
            if self._middleware is None:
                return self._played(self._run(text, limit))
            locum = self._middleware.locum
            with locum.episode(f"{self.name}/{seed}", domain=self.name, tools=[ACT_SPEC]) as episode:
                messages = self._run(text, limit)
                if not keep:
                    episode.drop()
                    return self._played(messages)
                why = "the goal was reached" if self.world.success else f"not done after {self.world.steps} actions"
                self._middleware.outcome(self.world.success, messages=messages, reason=why)
                return self._played(messages, episode.id)

    def _run(self, text: str, limit: int) -> list[Any]:
        # Each action is two supersteps of the graph.
        config = {"recursion_limit": 2 * limit + 10}
        return self._agent.invoke({"messages": [{"role": "user", "content": text}]}, config)["messages"]

    def _played(self, messages: list[Any], episode_id: str = "") -> Played:
        said = [m for m in messages if isinstance(m, AIMessage)]
        by_student = [m for m in said if "locum" in m.response_metadata]
        invalid = [c for m in by_student for c in m.tool_calls if c["name"] != "act" or c["args"].get("action") not in babyai.ACTIONS]
        return Played(
            seed=self.world.seed,
            success=self.world.success,
            steps=self.world.steps,
            student_calls=len(by_student),
            teacher_calls=len(said) - len(by_student),
            invalid_calls=len(invalid),
            id=episode_id,
        )


class Crew:
    """Several players at work in threads of their own.

    Each takes the next number from `seeds`, plays it, and hands the result to `done` (called from those threads, one at a
    time). `pace` is how long each rests after an episode, in seconds; set it at any time.
    """

    def __init__(
        self, make: Callable[[], Player], threads: int, seeds: Iterable[int], limit: int, done: Callable[[Played], None], keep: bool = True
    ) -> None:
        self.pace = 0.0
        self.error: Exception | None = None
        self._make, self._seeds, self._limit, self._done, self._keep = make, iter(seeds), limit, done, keep
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._failures = 0
        self._threads = [threading.Thread(target=self._work, daemon=True, name=f"player-{i}") for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        player = None
        while not self._stop.is_set():
            with self._lock:
                seed = next(self._seeds, None)
            if seed is None:
                return
            try:
                player = player or self._make()
                played = player.play(seed, self._limit, self._keep)
            except Exception as e:  # the user's own teacher failed, or the store did: a few are borne
                with self._lock:
                    self._seeds = itertools.chain([seed], self._seeds)
                    self._failures += 1
                    if self._failures >= MAX_FAILURES:
                        self.error = e
                        self._stop.set()
                continue
            with self._lock:
                self._failures = 0
                self._done(played)
            self._rest()

    def _rest(self) -> None:
        # Looked at again and again, so that a new pace takes effect at once.
        rested = 0.0
        while rested < self.pace and not self._stop.is_set():
            time.sleep(0.1)
            rested += 0.1

    @property
    def working(self) -> bool:
        return any(t.is_alive() for t in self._threads)

    def stop(self) -> None:
        """Lets everybody finish the episode at hand, and waits for it. `error` then says what stopped the crew early, if so."""
        self._stop.set()
        for thread in self._threads:
            while thread.is_alive():  # with a timeout, so that Ctrl-C is heard
                thread.join(0.2)


def open_middleware(locum: Locum, level: str) -> LocumMiddleware:
    return LocumMiddleware(locum, domain=babyai.short_name(level), max_tokens=32)
