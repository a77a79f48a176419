"""What the demo remembers between runs, beside the store: which seeds were played, and how the tests went.

Two files of JSON lines that are only ever appended to; a line that a kill cut short is ignored. They are written after the
store has confirmed an episode, so at worst one episode a thread is played twice.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from player import Played


class Ledger:
    """All methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        self.recorded: list[Played] = []
        self.tried: list[Played] = []  # during the trial of a candidate, on seeds of their own
        self.tests: dict[str, dict[int, Played]] = {}
        for line in _lines(folder / "episodes.jsonl"):
            (self.recorded if line.pop("phase") == "record" else self.tried).append(Played(**line))
        for line in _lines(folder / "tests.jsonl"):
            arm = line.pop("arm")
            played = Played(**line)
            self.tests.setdefault(arm, {})[played.seed] = played

    def add_episode(self, phase: str, played: Played) -> None:
        with self._lock:
            (self.recorded if phase == "record" else self.tried).append(played)
            _append(self._folder / "episodes.jsonl", {"phase": phase, **played.as_dict()})

    def add_test(self, arm: str, played: Played) -> None:
        with self._lock:
            self.tests.setdefault(arm, {})[played.seed] = played
            _append(self._folder / "tests.jsonl", {"arm": arm, **played.as_dict()})

    def get(self, name: str) -> Any:
        """A value that `put` kept, or None."""
        try:
            return json.loads((self._folder / f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def put(self, name: str, value: Any) -> None:
        with self._lock:
            part = self._folder / f"{name}.json.part"
            part.write_text(json.dumps(value))
            os.replace(part, self._folder / f"{name}.json")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for text in path.read_text().splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def _append(path: Path, value: dict[str, Any]) -> None:
    with path.open("a+b") as file:
        # A line cut short by a kill must not swallow the next one.
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(value).encode() + b"\n")
