"""Very long episodes for `locum eval ttt`: ScienceWorld's own solutions, as chats that `locum episodes import` reads.

What grew from which pot, or how far a block slid, decides the last action a hundred steps later.
Needs `pip install scienceworld` and Java 17; see docs/ttt.md for the commands around this one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, Iterator

TASKS = ["mendelian-genetics-known-plant", "mendelian-genetics-unknown-plant", "inclined-plane-friction-unnamed-surfaces"]
LONGEST = 250  # steps of an episode that is kept
# Of a room's long list, what the tasks are about.
ABOUT = re.compile(r"flower pot|seed|plant|inclined|block|sink|jug|stopwatch|\bbox\b|door to")
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "act",
            "description": "Send one command to the lab simulator.",
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
        },
    }
]


def brief(text: str) -> str:
    """What was seen in one line; of a list of more than four things, those that the tasks are about.

    >>> brief("You move to the greenhouse.")
    'You move to the greenhouse.'
    >>> brief("A room. In it, you see:\\n\\tthe agent\\n\\tair\\n\\tan axe\\n\\ta flower pot 2 (containing soil)\\n\\ta fountain")
    'A room. In it, you see: a flower pot 2 (containing soil)'
    """
    first, *rest = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if len(rest) > 4:
        rest = [line for line in rest if ABOUT.search(line)]
    return " ".join([first, "; ".join(rest)]).strip()


def episode(env: Any, task: str, variation: int) -> list[tuple[str, str]] | None:
    """What was seen and then done, step by step, by the simulator's own solution; None if that fails or is too long."""
    env.load(task, variation, "easy", generateGoldPath=True)
    # As after `reset()`, which would work out the solution once more.
    seen, *_ = env.step("look around")
    seen = f"{env.get_task_description()}\n{brief(seen)}"
    solution, steps, score = env.get_gold_action_sequence(), [], 0
    if len(solution) > LONGEST:
        return None
    for command in solution:
        steps.append((seen, command))
        seen, _, done, info = env.step(command)
        seen, score = brief(seen), info["score"]
        if done:
            break
    return steps if score == 100 else None


def chat(task: str, variation: int, steps: list[tuple[str, str]]) -> dict[str, Any]:
    """The episode as an agent's host would have recorded it."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": steps[0][0]}]
    for at, (_, command) in enumerate(steps):
        call = {"id": f"call_{at}", "type": "function", "function": {"name": "act", "arguments": json.dumps({"command": command})}}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        then = steps[at + 1][0] if at + 1 < len(steps) else "Done."
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": then})
    outcome = {"success": True, "reward": 1.0}
    return {"task": f"{task}/{variation}", "seed": variation, "env": "scienceworld", "messages": messages, "tools": TOOLS, "outcome": outcome}


def order(env: Any, tasks: list[str]) -> Iterator[tuple[str, int]]:
    """All variations of all tasks, a task after the other in turn."""
    most = {task: env.get_max_variations(task) for task in tasks}
    for variation in range(max(most.values())):
        yield from ((task, variation) for task in tasks if variation < most[task])


def written(file: Path) -> set[tuple[str, int]]:
    """The tasks and variations whose episodes the file holds; a last line that was cut is taken off.

    >>> written(Path("no such file"))
    set()
    """
    if not file.exists():
        return set()
    whole, newline, _ = file.read_text().rpartition("\n")
    file.write_text(whole + newline)
    episodes = [json.loads(line) for line in whole.splitlines()]
    return {(str(e["task"]).rpartition("/")[0], int(e["seed"])) for e in episodes}


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="sciworld.py", description=__doc__.splitlines()[0])
    p.add_argument("file", type=Path, help="JSONL, an episode a line; one that is there is gone on with")
    p.add_argument("--episodes", type=int, default=90, help="that it shall hold (default: 90)")
    p.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"default: {' '.join(TASKS)}")
    options = p.parse_args(arguments)
    try:
        from scienceworld import ScienceWorldEnv
    except ImportError:
        p.error("`pip install scienceworld` (it needs Java 17)")
    done = written(options.file)
    env, kept, steps = ScienceWorldEnv("", None, envStepLimit=LONGEST + 1), len(done), 0
    # Each step would list every command that is possible there, which takes nearly all of an episode's time and is not looked at.
    env.get_valid_action_object_combinations = lambda: []
    with options.file.open("a") as file:
        for task, variation in order(env, options.tasks):
            if kept >= options.episodes:
                break
            if (task, variation) in done:
                continue
            played = episode(env, task, variation)
            if played is not None:
                file.write(json.dumps(chat(task, variation, played)) + "\n")
                file.flush()
                kept, steps = kept + 1, steps + len(played)
                print(f"\r{kept} of {options.episodes} episodes", end="", file=sys.stderr)
    print(f"\n{kept} episodes, {steps / max(kept - len(done), 1):.0f} steps each of the {kept - len(done)} new ones", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
