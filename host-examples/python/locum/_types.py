"""The values that come out of Locum, and its errors. Plain data, no library needed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypedDict


class LocumError(Exception):
    """Something failed. The text is a sentence for people, `code` a stable name for programs (`LOCUM_E_BUSY`, say)."""

    code = "LOCUM_E_UNKNOWN"

    def __init__(self, message: str, *, code: str | None = None, status: int = 0, os_code: int = 0) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.status = status
        self.os_code = os_code


class LibraryNotFound(LocumError):
    """The shared library is missing, cannot be loaded, or is of another version."""

    code = "LOCUM_LIBRARY_NOT_FOUND"


class AskTeacher(LocumError):
    """There is no answer of a student: ask the teacher. The text says why, `reason_name` for programs (see `Decision`)."""

    code = "LOCUM_TEACHER"

    def __init__(self, message: str, *, reason_name: str = "", **more: Any) -> None:
        super().__init__(message, **more)
        self.reason_name = reason_name


class Busy(LocumError):
    """A queue is full or another is at work; later it may succeed."""

    code = "LOCUM_E_BUSY"


class Timeout(LocumError):
    """Not done in the time given; it may still be done later."""

    code = "LOCUM_E_TIMEOUT"


class Cancelled(LocumError):
    code = "LOCUM_E_CANCELLED"


class Closed(LocumError):
    """The store was closed or the episode has ended."""

    code = "LOCUM_E_CLOSED"


class NotFound(LocumError):
    """No such episode, job, student or file."""

    code = "LOCUM_E_NOT_FOUND"


class StoreError(LocumError):
    """The disk: full, not writable, failing."""

    code = "LOCUM_E_STORE"


class ModelError(LocumError):
    """A model folder cannot be used."""

    code = "LOCUM_E_MODEL"


class PolicyError(LocumError):
    """A policy does not compile or fails its check."""

    code = "LOCUM_E_POLICY"


_BY_CODE = {c.code: c for c in (AskTeacher, Busy, Timeout, Cancelled, Closed, NotFound, StoreError, ModelError, PolicyError)}


def error_class(code: str) -> type[LocumError]:
    """The exception for a status name; `LocumError` itself for the rarer ones."""
    return _BY_CODE.get(code, LocumError)


class ToolCallFunction(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    """A tool call in OpenAI's form; `arguments` is JSON text."""

    id: str
    type: str
    function: ToolCallFunction


@dataclass(frozen=True)
class Decision:
    """Who plays the next step, and why."""

    who: str  # "teacher" or "student"
    reason: str  # for people
    # For programs: policy, no_student, shadow, canary_teacher, canary_student, promoted, pinned, bad_request,
    # tools_inexpressible, prompt_too_long, view_mismatch, late, refused, fault, closed; empty for one this package is too old for
    reason_name: str
    student_version: int  # 0 = none
    confidence: float  # 0 to 1
    decided_ns: int

    @property
    def student(self) -> bool:
        return self.who == "student"


@dataclass(frozen=True)
class Answer:
    """A student's answer: an OpenAI assistant message and how it came about."""

    message: dict[str, Any]
    finish_reason: str
    usage: dict[str, int]
    student: str
    version: int
    confidence: float
    details: dict[str, Any] = field(default_factory=dict)  # timings and what else the library reports

    @property
    def tool_calls(self) -> list[ToolCall]:
        return self.message.get("tool_calls") or []

    @property
    def text(self) -> str:
        return self.message.get("content") or ""


@dataclass(frozen=True)
class Event:
    """Something happened: a job moved on, a student was promoted or taken back."""

    kind: int
    name: str  # job_progress, job_state, student_swapped, rolled_back, store_trouble, policy_loaded, fault, fast_weights, forgotten, hook_off
    subject: int  # a job, or a student's version
    number: int
    detail: dict[str, Any]


def _known(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)} - {"more"}
    return {k: v for k, v in data.items() if k in names}


@dataclass(frozen=True)
class JobStatus:
    """How a distillation stands. Fields are None where nothing is known; `more` holds everything the library reports."""

    job: int = 0
    state: str = "queued"
    progress: float | None = None  # 0 to 1
    tokens_done: int | None = None
    tokens_total: int | None = None
    held_seconds: float | None = None  # of waiting while steps were decided, or paused
    tokens_shared: int | None = None  # of those done, not computed: another sample of their step begins with them too
    loss: float | None = None
    held_out_loss: float | None = None
    seconds: float | None = None  # spent so far
    seconds_left: float | None = None
    tokens_per_second: float | None = None
    episodes_seen: int | None = None  # looked at by curation
    episodes_kept: int | None = None  # of which teach
    student: str | None = None
    version: int = 0  # the student's; 0 = none yet
    message: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    # States that nothing follows. `held` was refused or put aside, `stored` was wanted without a trial.
    ENDED = frozenset({"promoted", "held", "stored", "cancelled", "failed"})
    ON_TRIAL = frozenset({"shadow", "canary"})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> JobStatus:
        return cls(**_known(cls, data), more=data)

    @property
    def ended(self) -> bool:
        return self.state in self.ENDED

    @property
    def trained(self) -> bool:
        """True once the student exists, or never will: only live episodes can move the job on from here."""
        return self.ended or self.state in self.ON_TRIAL


@dataclass(frozen=True)
class Student:
    """A trained student. `more` holds everything the library reports, lineage and measurements among it."""

    version: int = 0
    id: str = ""
    state: str = ""  # candidate, shadow, canary, promoted, held, stored, retired
    current: bool = False  # the one that plays
    held_out_exact: float | None = None  # share of held-out steps answered exactly like the teacher
    held_out_loss: float | None = None
    trained_tokens: int = 0
    train_seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Student:
        return cls(**_known(cls, data), more=data)
