"""The progress of a distillation, on a line that moves in a terminal or a notebook, and as a few plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
from typing import Any, TextIO

from ._types import JobStatus

BAR_WIDTH = 24
PLAIN_EVERY = 0.1  # a plain line for each tenth, and for each new state


class Progress:
    """Shows `JobStatus` values as they come. `close()` ends the line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._notebook = _notebook_display() if stream is None else None
        self._moving = self._notebook is not None or getattr(self._stream, "isatty", lambda: False)()
        self._last: tuple[str, int] | None = None
        self._width = 0

    def show(self, status: JobStatus) -> None:
        text = line(status)
        if self._notebook is not None:
            self._notebook(text)
        elif self._moving:
            text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be written over
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)
        else:
            mark = (status.state, int((status.progress or 0.0) / PLAIN_EVERY))
            if mark != self._last:
                self._last = mark
                self._stream.write(text + "\n")
                self._stream.flush()

    def close(self) -> None:
        if self._moving and self._notebook is None and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def line(status: JobStatus) -> str:
    """`training   [########----------------]  33 %  loss 0.412  held out 0.480  2:05 left`"""
    share = min(1.0, max(0.0, status.progress or 0.0))
    full = round(share * BAR_WIDTH)
    parts = [f"{status.state:<10} [{'#' * full}{'-' * (BAR_WIDTH - full)}] {share * 100:3.0f} %"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.held_out_loss is not None:
        parts.append(f"held out {status.held_out_loss:.3f}")
    if status.seconds_left is not None and not status.ended:
        parts.append(f"{clock(status.seconds_left)} left")
    if status.message:
        parts.append(status.message)
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """125 as `2:05`."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"


def _notebook_display() -> Any:
    """A function that replaces the output of one notebook cell, or None outside a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if type(shell).__name__ != "ZMQInteractiveShell":
        return None
    from IPython.display import HTML, display  # type: ignore[import-not-found]

    handle = display(HTML(""), display_id=True)

    def show(text: str) -> None:
        safe = text.replace("&", "&amp;").replace("<", "&lt;")
        handle.update(HTML(f"<pre>{safe}</pre>"))

    return show
