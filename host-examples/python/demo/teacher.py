"""The demo's offline teacher: minigrid's bot as a LangChain chat model that slips, and that goes wrong for good in most episodes."""

from __future__ import annotations

import contextlib
import contextvars
import random
from collections.abc import Iterator, Sequence
from typing import Any

from babyai import ACTIONS, World
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult

SLIP = 0.12  # share of actions replaced by a random one, in good episodes too
LATEST_DERAIL = 4  # the episode goes wrong at one of its first steps, 0 to this one
GIVING_UP = "I believe the task is complete."
TARGET_RATE = 0.27
# Share of episodes that derail, so that TARGET_RATE of them succeed under twice the test's step limit. Measured like
# `derail_rate`, over 1,000 (PutNextLocal 2,000) seeds from 700,000; other levels are measured when first used.
DERAIL_RATES = {"BabyAI-GoToLocal-v0": 0.965, "BabyAI-PutNextLocal-v0": 0.73}


class WeakBot:
    """What the teacher does in one episode: the bot's advice, slips, and from a random early step on perhaps nonsense.

    `derail` is the kind of nonsense: `loop` repeats one action, `wander` walks at random, `give_up` claims to be done; None
    for an episode that stays on course. All of it follows from `seed`, so an episode can be played again.
    """

    def __init__(self, world: World, derail_rate: float, seed: int, slip: float = SLIP) -> None:
        self.world, self.slip = world, slip
        self._rng = random.Random(f"weak-bot/{seed}")
        derails = self._rng.random() < derail_rate
        kind = self._rng.choice(("loop", "wander", "give_up"))
        self.derail: str | None = kind if derails else None
        self.derail_step = self._rng.randint(0, LATEST_DERAIL)
        self._loop = self._rng.choice(ACTIONS[:3])

    @property
    def derailed(self) -> bool:
        """Whether the next action is no longer the bot's."""
        return self.derail is not None and self.world.steps >= self.derail_step

    def next_action(self) -> str | None:
        """The next action, or None for giving up."""
        if self.derailed:
            self.world.without_advice()
            if self.derail == "give_up":
                return None
            return self._loop if self.derail == "loop" else self._rng.choice(ACTIONS[:3])
        if self._rng.random() < self.slip or self.world.advice is None:
            return self._rng.choice(ACTIONS[:3])
        return self.world.advice


_PLAYING: contextvars.ContextVar[WeakBot] = contextvars.ContextVar("playing")


@contextlib.contextmanager
def playing(bot: WeakBot) -> Iterator[WeakBot]:
    """Within this, `DerailingBot` speaks for `bot`. LangGraph hands the context on to the threads it uses."""
    token = _PLAYING.set(bot)
    try:
        yield bot
    finally:
        _PLAYING.reset(token)


class DerailingBot(BaseChatModel):
    """The weak bot as a chat model: each answer is one call of `act`, or the claim to be done.

    Unlike a real chat model it looks at the environment instead of the messages, so it must be asked within `playing(...)`.
    """

    @property
    def _llm_type(self) -> str:
        return "derailing-bot"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> BaseChatModel:  # type: ignore[override]
        """The bot knows its one tool already."""
        return self

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        bot = _PLAYING.get(None)
        if bot is None:
            raise RuntimeError("DerailingBot was asked outside `with playing(...)`: it does not know which episode this is")
        action = bot.next_action()
        if action is None:
            message = AIMessage(content=GIVING_UP)
        else:
            call = {"name": "act", "args": {"action": action}, "id": f"call_{bot.world.steps}", "type": "tool_call"}
            message = AIMessage(content="", tool_calls=[call])
        message.response_metadata["model_name"] = self._llm_type
        return ChatResult(generations=[ChatGeneration(message=message)])


def play(bot: WeakBot) -> bool:
    """Plays the episode to its end without any framework. True if the goal was reached."""
    while not bot.world.done:
        action = bot.next_action()
        if action is None:
            return False
        bot.world.act(action)
    return bot.world.success


def success_rate(level: str, limit: int, derail_rate: float, seeds: Sequence[int], slip: float = SLIP) -> float:
    """Share of `seeds` on which the weak bot reaches the goal within `limit` actions."""
    world, won = World(level), 0
    for seed in seeds:
        world.reset(seed, limit, advised=True)
        won += play(WeakBot(world, derail_rate, seed, slip))
    return won / len(seeds)


def derail_rate(level: str, limit: int, target: float = TARGET_RATE, episodes: int = 150, first_seed: int = 700_000) -> float:
    """The share of episodes to derail so that about `target` of them succeed.

    Success is a mixture, (1 - p) clean + p derailed, so both ends are measured and p is read off the line.
    """
    seeds = range(first_seed, first_seed + episodes)
    clean = success_rate(level, limit, 0.0, seeds)
    derailed = success_rate(level, limit, 1.0, seeds)
    if clean <= target:
        return 0.0
    return min(1.0, (clean - target) / max(clean - derailed, 1e-9))


def load(spec: str) -> BaseChatModel:
    """The chat model that `module:factory` makes, for `--teacher`. The factory takes no arguments.

    Raises ValueError with a sentence that says what is wrong with the spec.
    """
    import importlib

    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"--teacher {spec!r}: expected module:factory, for example my_models:make_teacher")
    try:
        made = getattr(importlib.import_module(module_name), attribute)()
    except ModuleNotFoundError as e:
        raise ValueError(f"--teacher {spec!r}: {e}") from e
    except AttributeError as e:
        raise ValueError(f"--teacher {spec!r}: {e}") from e
    if not isinstance(made, BaseChatModel):
        raise ValueError(f"--teacher {spec!r}: the factory returned {type(made).__name__}, not a LangChain chat model")
    return made
