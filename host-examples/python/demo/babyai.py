"""BabyAI behind one tool: a level of minigrid as text, one action a call, with the bot's advice for the teacher."""

from __future__ import annotations

import difflib
import functools
import random
from typing import Any

ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
SYSTEM = "You control a robot in a grid world. Reach the goal with the act tool, one action per call."
ACT_SPEC: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "act",
        "description": "Take one step in the grid world.",
        "parameters": {
            "type": "object",
            "properties": {"action": {"type": "string", "enum": list(ACTIONS)}},
            "required": ["action"],
        },
    },
}
GOAL_REACHED = "Goal reached."
OUT_OF_TIME = "Out of time."

# Step limits of the final test: twice the bot's mean over 1,000 seeds. Other levels are measured (`expert_mean`).
TEST_LIMITS = {"BabyAI-GoToLocal-v0": 11, "BabyAI-PutNextLocal-v0": 24}


class WrongLevel(ValueError):
    """The level's name is not one of BabyAI's."""


def level_id(name: str) -> str:
    """`GoToLocal`, `BabyAI-GoToLocal` and `BabyAI-GoToLocal-v0` all name one level. Raises `WrongLevel` with near names."""
    known = _levels()
    full = name if name.startswith("BabyAI-") else f"BabyAI-{name}"
    full = full if full.rsplit("-", 1)[-1].startswith("v") else f"{full}-v0"
    if full in known:
        return full
    by_lower = {k.lower(): k for k in known}
    if full.lower() in by_lower:
        return by_lower[full.lower()]
    near = difflib.get_close_matches(full.lower(), list(by_lower), n=3, cutoff=0.5)
    hint = ", ".join(short_name(by_lower[n]) for n in near) or "GoToLocal, PutNextLocal"
    raise WrongLevel(f"there is no BabyAI level named {name!r}; near it: {hint} (minigrid has {len(known)} of them)")


def short_name(level: str) -> str:
    """`BabyAI-GoToLocal-v0` as `GoToLocal`."""
    return level.removeprefix("BabyAI-").removesuffix("-v0")


@functools.lru_cache(maxsize=1)
def _levels() -> frozenset[str]:
    import gymnasium
    import minigrid  # noqa: F401  (importing it registers the levels)
    from minigrid.envs.babyai.core import roomgrid_level

    # Level generation prints a line for each rejected draw; shadowing `print` in that one module keeps our output clean.
    roomgrid_level.print = lambda *_: None  # type: ignore[attr-defined]
    return frozenset(k for k in gymnasium.registry if k.startswith("BabyAI-"))


class World:
    """One level of BabyAI, played an episode at a time: `reset(seed, limit)`, then `act(action)` until `done`.

    Used by one thread at a time. `advice` is what the environment's bot would do now; it is kept only when `reset` was
    asked for it, because it costs as much as the step itself.
    """

    def __init__(self, level: str) -> None:
        import gymnasium

        self.level = level_id(level)
        _levels()
        self._env = gymnasium.make(self.level, disable_env_checker=True).unwrapped
        self._bot: Any = None
        self.done = True

    def reset(self, seed: int, limit: int, advised: bool = False) -> str:
        """Starts the episode of `seed`, which ends after `limit` actions. Returns the text the agent is given."""
        obs, _ = self._env.reset(seed=seed)
        # The level's own limit would end long episodes earlier than the caller's.
        self._env.max_steps = max(self._env.max_steps, limit + 1)
        self.seed, self.limit, self.steps = seed, limit, 0
        self.success = self.done = False
        self.goal: str = obs["mission"]
        self.view = text_view(obs["image"])
        self._bot, self.advice = None, None
        if advised:
            from minigrid.utils.baby_ai_bot import BabyAIBot

            self._bot = BabyAIBot(self._env)
            self.advice = self._advise(None)
        return f"Goal: {self.goal}.\n{self.view}"

    def act(self, action: str) -> str:
        """Takes one action and returns what the robot sees then, or how the episode ended.

        An unknown action costs a step and changes nothing: the reply lists the actions.
        """
        if self.done:
            return OUT_OF_TIME
        self.steps += 1
        if action in ACTIONS:
            code = ACTIONS.index(action)
            obs, reward, terminated, _, _ = self._env.step(code)
            self.success = bool(terminated and reward > 0)
            self.done = bool(terminated)
            self.view = text_view(obs["image"])
            if not self.done and self._bot is not None:
                self.advice = self._advise(self._env.actions(code))
        if self.success:
            return GOAL_REACHED
        if self.done or self.steps >= self.limit:
            self.done = True
            return OUT_OF_TIME
        if action not in ACTIONS:
            return f"Error: no action {action!r}; the actions are {', '.join(ACTIONS)}."
        return self.view

    def without_advice(self) -> None:
        """Spares the bot's thinking for the rest of the episode."""
        self._bot = self.advice = None

    def _advise(self, taken: Any) -> str | None:
        # The bot gives up with an assertion in states its author did not think of (a box it needs was opened, say).
        try:
            return ACTIONS[int(self._bot.replan(taken))]
        except Exception:
            self._bot = None
            return None


def text_view(image: Any) -> str:
    """What the robot sees, as a line: objects from near to far, walls, and what it carries.

    `image` is minigrid's egocentric view, (columns, rows, 3) small integers of object, colour and state, with the robot in
    the middle of the last row, looking up. "blue box 1 ahead 2 right" is one cell ahead and two to the right.
    """
    from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT, OBJECT_TO_IDX

    cells = image.tolist()
    width, height = len(cells), len(cells[0])
    middle = width // 2
    wall = OBJECT_TO_IDX["wall"]
    skip = {OBJECT_TO_IDX[k] for k in ("unseen", "empty", "wall", "floor", "agent")}

    things: list[tuple[int, str]] = []
    for x in range(width):
        for y in range(height):
            kind, colour, state = cells[x][y]
            ahead, right = height - 1 - y, x - middle
            if kind in skip or (ahead == 0 and right == 0):
                continue
            name = f"{IDX_TO_COLOR[colour]} {IDX_TO_OBJECT[kind]}"
            if IDX_TO_OBJECT[kind] == "door":
                name = f"{('open', 'closed', 'locked')[state]} {name}"
            things.append((ahead + abs(right), name + _place(ahead, right)))
    things.sort()

    def first_wall(line: list[list[int]]) -> int:
        return next((i for i, cell in enumerate(line, 1) if cell[0] == wall), 0)

    row = [cells[x][height - 1] for x in range(width)]
    ahead = first_wall([cells[middle][y] for y in range(height - 2, -1, -1)])
    left, right = first_wall(row[middle - 1 :: -1]), first_wall(row[middle + 1 :])
    walls = [f"wall {ahead} ahead" if ahead else "open ahead"]
    walls += [f"wall {n} {side}" for n, side in ((left, "left"), (right, "right")) if n]

    text = f"See: {'; '.join(t for _, t in things) or 'nothing'}. {', '.join(walls)}."
    kind, colour, _ = cells[middle][height - 1]
    return text if kind in skip else f"{text} Carrying {IDX_TO_COLOR[colour]} {IDX_TO_OBJECT[kind]}."


def _place(ahead: int, right: int) -> str:
    side = f" {abs(right)} {'right' if right > 0 else 'left'}" if right else ""
    return (f" {ahead} ahead" if ahead else "") + side


def expert_mean(level: str, episodes: int = 200, first_seed: int = 900_000) -> tuple[float, float]:
    """Mean length of the bot's successful episodes and its share of successes, each episode under the level's own limit."""
    world, lengths = World(level), []
    for seed in range(first_seed, first_seed + episodes):
        world.reset(seed, 1_000, advised=True)
        while not world.done and world.advice is not None:
            world.act(world.advice)
        if world.success:
            lengths.append(world.steps)
    if not lengths:
        raise WrongLevel(f"minigrid's bot solves no episode of {short_name(world.level)}, so there is no teacher for it")
    return sum(lengths) / len(lengths), len(lengths) / episodes


def random_action(rng: random.Random) -> str:
    """The random policy of the report: any of the seven actions."""
    return rng.choice(ACTIONS)
