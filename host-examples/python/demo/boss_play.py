"""BossLevel played by students, for docs/ttt.md: does learning while they read help them to the goal?

Every seed is played by each reader in turn: the student with its updates on, the same with updates off, and one trained without.
The level's bot plays a step in the teacher's place where the student leaves it, and where it has come back to what it saw twice of late:
a small student that walks into a wall would do so for ever. Nothing is kept: the episodes are dropped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import boss
from babyai import World
from locum import AskTeacher, Locum

FIRST_SEED = 600_000  # boss.py records from 500,000 on
SLACK = 2  # times the bot's own steps that a student may take
RESAMPLES = 10_000
REPLY_TOKENS = 24
LATELY, TOO_OFTEN = 8, 2  # of the last so many views, so many like the present one


@dataclass(frozen=True)
class Reader:
    name: str
    version: int
    updates: bool


@dataclass
class Played:
    seed: int
    reader: str
    success: bool
    steps: int
    as_bot: int  # of the student's steps, those that the bot would have taken there
    asked: int  # steps left to the teacher
    before_parting: int  # steps until the first that the bot would not have taken
    updates: int  # chunks learned from by the end; 0 too if a drift past the cap had undone them


def play(here: Locum, world: World, reader: Reader, seed: int, limit: int) -> Played:
    """One episode; `limit` actions at most."""
    text = boss.brief(world.reset(seed, limit, advised=True))
    played = Played(seed, reader.name, False, 0, 0, 0, 0, 0)
    together, lately = True, deque([text], maxlen=LATELY)
    episode = here.episode(boss.LEVEL, tools=boss.TOOLS)
    if not reader.updates:
        episode.switch_fast_weights(False)
    episode.message({"role": "user", "content": text})
    while not world.done:
        advice = world.advice if world.advice in boss.WHAT else "forward"
        try:
            if list(lately)[:-1].count(lately[-1]) >= TOO_OFTEN:
                raise AskTeacher("it goes in circles", reason_name="policy")
            message = episode.generate(call_required=True, greedy=True, max_tokens=REPLY_TOKENS).message
            call, actor = message["tool_calls"][0], "student"
        except AskTeacher:
            call = {"id": f"call_{world.steps}", "type": "function", "function": {"name": advice, "arguments": "{}"}}
            message, actor = {"role": "assistant", "content": None, "tool_calls": [call]}, "teacher"
            played.asked += 1
        action = call["function"]["name"]
        episode.message(message, actor=actor)
        if actor == "student":
            played.as_bot += action == advice
            together &= action == advice
            played.before_parting += together
        lately.append(boss.brief(world.act(action)))
        episode.message({"role": "tool", "tool_call_id": call["id"], "content": lately[-1]})
    if played.asked < world.steps:
        learned = episode.fast_weights()
        if learned["on"]:
            played.updates = learned["position"] // learned["chunk"]
    episode.drop()
    played.success, played.steps = world.success, world.steps
    return played


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean with a 95 % interval, bootstrapped over seeds.

    >>> interval([1.0, 1.0])
    (1.0, 1.0, 1.0)
    """
    rng = random.Random(1)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    return sum(values) / len(values), means[RESAMPLES // 40], means[-RESAMPLES // 40]


def table(all_played: list[Played], readers: list[Reader]) -> str:
    """Means of each reader, and of the first less each other one, seed by seed."""
    by_seed: dict[int, dict[str, Played]] = {}
    for played in all_played:
        by_seed.setdefault(played.seed, {})[played.reader] = played
    whole = [seed for seed in by_seed.values() if len(seed) == len(readers)]
    if not whole:
        return "no seed was played by all"
    measures = {
        "success, %": lambda p: 100.0 * p.success,
        "steps as the bot, %": lambda p: 100.0 * p.as_bot / max(p.steps - p.asked, 1),
        "steps before parting from it": lambda p: float(p.before_parting),
        "steps left to the teacher, %": lambda p: 100.0 * p.asked / max(p.steps, 1),
    }
    said = lambda three, sign="": f"{three[0]:{sign}.1f} ({three[1]:{sign}.1f} to {three[2]:{sign}.1f})"
    lines = [f"| {len(whole)} seeds | " + " | ".join(measures) + " |", "| --- |" + " --- |" * len(measures)]
    for reader in readers:
        cells = [said(interval([of(seed[reader.name]) for seed in whole])) for of in measures.values()]
        lines.append(f"| {reader.name} | " + " | ".join(cells) + " |")
    first = readers[0].name
    for reader in readers[1:]:
        cells = [said(interval([of(s[first]) - of(s[reader.name]) for s in whole]), "+") for of in measures.values()]
        lines.append(f"| {first} less {reader.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="boss_play.py", description=__doc__.splitlines()[0])
    p.add_argument("--store", required=True, help="folder of the store that holds the students")
    p.add_argument("--policy", type=Path, default=Path(__file__).parent / "boss.lua", help="their policy (default: boss.lua)")
    p.add_argument("--student", type=int, required=True, help="version of the student with TTT")
    p.add_argument("--plain", type=int, help="version of one trained without")
    p.add_argument("--episodes", type=int, default=40, help="seeds to play (default: 40)")
    p.add_argument("--first-seed", type=int, default=FIRST_SEED, help=f"default: {FIRST_SEED}")
    p.add_argument("--weights", default="q8", help="numbers of the weights (default: q8)")
    p.add_argument("--out", type=Path, help="JSON of every episode")
    options = p.parse_args(arguments)
    readers = [Reader("updates on", options.student, True), Reader("updates off", options.student, False)]
    if options.plain is not None:
        readers.append(Reader("trained without", options.plain, True))
    world, seed, seeds = World(boss.LEVEL), options.first_seed, 0
    everything: list[Played] = []
    with Locum(options.store, policy=options.policy, weights=options.weights, learn=False) as here:
        while seeds < options.episodes:
            solved = boss.episode(world, seed)
            if solved is not None:
                for reader in readers:
                    here.use(reader.version)
                    everything.append(play(here, world, reader, seed, SLACK * len(solved)))
                seeds += 1
                print(f"\r{seeds} of {options.episodes} seeds", end="", file=sys.stderr, flush=True)
                if options.out:
                    played: list[dict[str, Any]] = [asdict(one) for one in everything]
                    options.out.write_text(json.dumps(played))
            seed += 1
        here.use("automatic")
    print(file=sys.stderr)
    print(table(everything, readers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
