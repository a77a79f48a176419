"""What the demo shows while it runs: lines that stay, and one that moves in a terminal (a plain line now and then elsewhere)."""

from __future__ import annotations

import shutil
import sys
import time

from locum._progress import clock

PLAIN_EVERY_SECONDS = 15.0


class Display:
    """Writes to stderr, so that stdout ends with the result whatever happens. Used by one thread."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._moving = sys.stderr.isatty()
        self._started = time.monotonic()
        self._last_plain = 0.0
        self._width = 0

    def say(self, text: str) -> None:
        """A line that stays, with the time since the start."""
        if self._quiet:
            return
        self._clear()
        sys.stderr.write(f"{clock(time.monotonic() - self._started):>6}  {text}\n")
        sys.stderr.flush()
        self._last_plain = time.monotonic()

    def status(self, text: str) -> None:
        """How things stand right now."""
        if self._quiet:
            return
        stamped = f"{clock(time.monotonic() - self._started):>6}  {text}"
        if self._moving:
            stamped = stamped[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be written over
            sys.stderr.write("\r" + stamped.ljust(self._width))
            self._width = len(stamped)
        elif time.monotonic() - self._last_plain >= PLAIN_EVERY_SECONDS:
            self._last_plain = time.monotonic()
            sys.stderr.write(stamped + "\n")
        sys.stderr.flush()

    def _clear(self) -> None:
        if self._moving and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            self._width = 0
