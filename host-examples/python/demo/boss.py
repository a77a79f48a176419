"""Long episodes for `locum eval ttt`: BabyAI's BossLevel played by its bot, as chats that `locum episodes import` reads.

An episode is one task with several parts in a maze of rooms: where a door or a key was seen thirty steps ago decides what to do now.
See docs/ttt.md for the commands around this one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from babyai import GOAL_REACHED, World

LEVEL = "BossLevel"
FIRST_SEED = 500_000  # far from the demo's
SHORTEST, LONGEST = 30, 100  # steps of an episode that is kept
THINGS = 3  # that are named of what is seen, nearest first

# A tool an action: two tokens a call.
WHAT = {
    "left": "Turn left.",
    "right": "Turn right.",
    "forward": "Step forward.",
    "pickup": "Pick up what is ahead.",
    "drop": "Put down what you carry.",
    "toggle": "Open or close what is ahead.",
}
NOTHING = {"type": "object", "properties": {}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": NOTHING}} for name, text in WHAT.items()
]


def brief(text: str) -> str:
    """The demo's view in fewer words: the nearest things, the wall ahead, what is carried.

    >>> brief("See: red ball 2 ahead 1 right; open blue door 3 left. wall 5 ahead, wall 2 left. Carrying green key.")
    'red ball 2 ahead 1 right; open blue door 3 left; wall 5 ahead; carrying green key'
    """
    if "See: " not in text:
        return text
    goal, _, view = text.rpartition("See: ")
    things, _, rest = view.partition(". ")
    seen = [t for t in things.split("; ") if t != "nothing"][:THINGS]
    seen += re.findall(r"wall \d+ ahead", rest)
    carried = re.search(r"Carrying ([^.]+)", rest)
    if carried:
        seen.append(f"carrying {carried[1]}")
    return goal + ("; ".join(seen) or "nothing")


def episode(world: World, seed: int) -> list[tuple[str, str]] | None:
    """What was seen and then done, step by step, by the bot; None if it fails, or the episode is too short or too long."""
    text, steps = world.reset(seed, LONGEST + 1, advised=True), []
    while not world.done and world.advice in WHAT:
        steps.append((brief(text), world.advice))
        text = world.act(world.advice)
    fits = SHORTEST <= len(steps) <= LONGEST
    return steps if world.success and fits else None


def chat(seed: int, steps: list[tuple[str, str]]) -> dict[str, Any]:
    """The episode as an agent's host would have recorded it: what it sees is its last call's result."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": steps[0][0]}]
    for at, (_, action) in enumerate(steps):
        call = {"id": f"call_{at}", "type": "function", "function": {"name": action, "arguments": "{}"}}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        then = steps[at + 1][0] if at + 1 < len(steps) else GOAL_REACHED
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": then})
    outcome = {"success": True, "reward": 1.0}
    return {"task": LEVEL, "seed": seed, "env": LEVEL, "messages": messages, "tools": TOOLS, "outcome": outcome}


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="boss.py", description=__doc__.splitlines()[0])
    p.add_argument("file", type=Path, help="JSONL, an episode a line")
    p.add_argument("--episodes", type=int, default=100, help="to write (default: 100)")
    p.add_argument("--first-seed", type=int, default=FIRST_SEED, help=f"episodes are of the seeds from here on (default: {FIRST_SEED})")
    options = p.parse_args(arguments)
    world, seed, kept, steps = World(LEVEL), options.first_seed, 0, 0
    with options.file.open("w") as file:
        while kept < options.episodes:
            played = episode(world, seed)
            if played is not None:
                file.write(json.dumps(chat(seed, played)) + "\n")
                kept, steps = kept + 1, steps + len(played)
                print(f"\r{kept} of {options.episodes} episodes", end="", file=sys.stderr)
            seed += 1
    print(f"\n{kept} episodes of seeds {options.first_seed} to {seed - 1}, {steps / max(kept, 1):.0f} steps each", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
