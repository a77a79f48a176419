"""Locum stands in for the large model behind an agent: it records episodes, distils the good ones, proves the student, swaps it in.

    import locum

    with locum.Locum("~/.local/share/locum") as l:
        with l.episode("ticket-17", tools=tools) as episode:
            episode.message({"role": "user", "content": "..."})
            if episode.decide().student: ...

No framework is imported here; `locum.langchain` has the middleware for LangChain and LangGraph.
"""

from ._ffi import find as find_library
from ._types import (
    Answer,
    AskTeacher,
    Busy,
    Cancelled,
    Closed,
    Decision,
    Event,
    JobStatus,
    LibraryNotFound,
    LocumError,
    ModelError,
    NotFound,
    PolicyError,
    StoreError,
    Student,
    Timeout,
    ToolCall,
)
from .core import Call, Episode, Job, Locum, current_episode

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AskTeacher",
    "Busy",
    "Call",
    "Cancelled",
    "Closed",
    "Decision",
    "Episode",
    "Event",
    "Job",
    "JobStatus",
    "LibraryNotFound",
    "Locum",
    "LocumError",
    "ModelError",
    "NotFound",
    "PolicyError",
    "StoreError",
    "Student",
    "Timeout",
    "ToolCall",
    "current_episode",
    "find_library",
]
