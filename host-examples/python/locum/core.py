"""`Locum`, its episodes and its jobs: the C interface as Python objects.

Everything that can wait has a twin for asyncio whose name ends in `_async`; the rest returns at once and is used from both.
"""

from __future__ import annotations

import contextvars
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_uint8, c_uint64, c_void_p
from pathlib import Path
from typing import Any, TextIO, TypeVar

from . import _ffi
from ._events import Events
from ._progress import Progress
from ._types import Answer, AskTeacher, Closed, Decision, Event, JobStatus, LocumError, Student

log = logging.getLogger("locum")

DEFAULT_DEADLINE_MS = 30_000  # of locum_request, where the caller names none
# An answer is late when its deadline has passed; how much longer we wait for the library to say so itself.
DEADLINE_GRACE_SECONDS = 1.0
POLL_SECONDS = 0.25  # how often a waiting job is looked at

T = TypeVar("T")
PathLike = str | os.PathLike[str]


# Values of `weights`, in the order of LOCUM_WEIGHTS_*.
WEIGHTS = ("f32", "bf16", "q8", "q4")


class Locum:
    """An open store with its policy, engine and students.

    Opens at `with`, at `async with`, by `open()`, or at its first use. All methods may be called from any thread.

    - `store`: folder of the store, created if missing.
    - `policy`: a Luau policy file; None for the built-in default.
    - `base_model`: Hugging Face folder that students start from; None for the one imported into the store.
    - `threads`, `train_threads`: 0 for as many as the machine has cores.
    - `weights`: numbers in which models in service keep their weights: "bf16", what a student's file holds; "q8" and "q4" are smaller and
      faster and may answer a little differently; "f32". Another word raises `ArgumentError`.
    - `detectors`: secrets that are replaced by a mark before anything recorded is written: "all", "none", or kinds to leave out such as
      "-email,-entropy" (key, private_key, jwt, bearer, password, card, email, entropy). Another word raises `ArgumentError`.
    - `learn`: False records and serves but starts no distillation in this process; `load_model`: False only records;
      `read_only` only looks.
    - `max_disk_bytes`: largest size of the database, 0 for none; there recording is refused, or with `drop_oldest` the oldest episodes
      that have ended are dropped and it goes on.
    - `library`: the shared library; None to find it (see `locum.find_library`).
    - `device_library`: liblocum_cuda.so; None for the one beside the library, if any. `max_device_bytes` of the card's memory: 0 for three
      quarters of what is free. `device=False` computes on the processor. A card that cannot be used is no error: `stats` says why.

    Opening raises `LibraryNotFound`, `PolicyError`, `StoreError` or another `LocumError`. A base model that is missing is no
    error: everything is recorded then, and the teacher plays.
    """

    def __init__(
        self,
        store: PathLike,
        *,
        policy: PathLike | None = None,
        base_model: PathLike | None = None,
        threads: int = 0,
        train_threads: int = 0,
        max_disk_bytes: int = 0,
        max_cache_bytes: int = 0,
        weights: str = "bf16",
        detectors: str = "all",
        learn: bool = True,
        load_model: bool = True,
        read_only: bool = False,
        drop_oldest: bool = False,
        library: PathLike | None = None,
        device: bool = True,
        device_library: PathLike | None = None,
        max_device_bytes: int = 0,
    ) -> None:
        self.store = Path(store)
        self._options = {
            "flags": (_ffi.OPEN_READ_ONLY if read_only else 0)
            | (0 if learn else _ffi.OPEN_NO_LEARNING)
            | (0 if load_model else _ffi.OPEN_NO_MODEL)
            | (0 if device else _ffi.OPEN_NO_DEVICE)
            | (_ffi.OPEN_DROP_OLDEST if drop_oldest else 0),
            "store_dir": os.fsencode(self.store),
            "policy_path": os.fsencode(policy) if policy else b"",
            "base_model_dir": os.fsencode(base_model) if base_model else b"",
            "worker_threads": threads,
            "train_threads": train_threads,
            "max_disk_bytes": max_disk_bytes,
            "max_cache_bytes": max_cache_bytes,
            "weights": WEIGHTS.index(weights) + 1 if weights in WEIGHTS else -1,
            "device_library": os.fsencode(device_library) if device_library else b"",
            "max_device_bytes": max_device_bytes,
            "detectors": detectors.encode(),
        }
        self._library_path = library
        self._opening = threading.Lock()
        self._handle = 0
        self._closed = False

    # Life

    def open(self) -> Locum:
        """Opens it if it is not open yet. Returns itself."""
        with self._opening:
            if self._closed:
                raise Closed(f"the store {self.store} was closed")
            if not self._handle:
                library = _ffi.load(self._library_path)
                out = c_uint64()
                library.call("locum_open", byref(_ffi.Options.made(**self._options)), byref(out))
                self._lib, self._handle = library, out.value
                self._events = Events(library, out.value)
                # Also runs when the interpreter exits, so that what is queued gets written.
                self._finalizer = weakref.finalize(self, _close_quietly, library, out.value, self._events)
        return self

    async def open_async(self) -> Locum:
        return await _in_thread(self.open)

    def close(self, drain: float = 5.0) -> None:
        """Pauses a running distillation at its last checkpoint and writes what is queued, for at most `drain` seconds.

        Closing twice does nothing. Raises `Timeout` or `StoreError` if not everything was written; it is closed all the same.
        """
        with self._opening:
            if self._closed:
                return
            self._closed = True
            if self._handle and self._finalizer.detach():
                self._events.close()
                self._lib.call("locum_close", self._handle, max(1, int(drain * 1000)))

    async def close_async(self, drain: float = 5.0) -> None:
        await _in_thread(self.close, drain)

    def __enter__(self) -> Locum:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Locum:
        return await self.open_async()

    async def __aexit__(self, *_: object) -> None:
        await self.close_async()

    @property
    def library(self) -> _ffi.Library:
        """The loaded library; opens the store if need be."""
        self._live()
        return self._lib

    def _live(self) -> int:
        if self._closed:
            raise Closed(f"the store {self.store} was closed")
        if not self._handle:
            self.open()
        return self._handle

    # Episodes

    def episode(
        self,
        task: str = "",
        *,
        domain: str = "",
        group_key: str = "",
        instruction: str = "",
        session_id: str = "",
        scope: str = "",
        agent: Mapping[str, str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Episode:
        """Begins an episode. `task` names the task (level and seed, ticket number), `domain` its family.

        Episodes of one `group_key` are never split between training and test; the default is the task. Students learn from one
        `scope` (a tenant, a project) and answer in it only.
        As a context manager it is also the current episode of `LocumMiddleware`, and ends when the block does: as unknown if
        no outcome was given, as aborted if the block raised.
        """
        meta = {
            "domain": domain,
            "group_key": group_key,
            "instruction": instruction,
            "session_id": session_id,
            "scope": scope,
            "agent": agent,
            "tools": tools,
            "extra": extra,
        }
        return Episode(self, task, {k: v for k, v in meta.items() if v})

    def outcome(
        self,
        episode_id: str,
        success: bool | str | None,
        *,
        score: float | None = None,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Says how an episode ended after its end, in this process or a later one; the newest word counts.

        `episode_id` is `Episode.id`. `success` is True, False, None (unknown), "partial" or "aborted". Durable on return.
        """
        raw = _episode_id(episode_id)
        ended = _outcome(success, score, reason, details)
        self.library.call("locum_outcome_later", self._live(), raw, byref(ended))

    async def outcome_async(self, episode_id: str, success: bool | str | None, **more: Any) -> None:
        await _in_thread(self.outcome, episode_id, success, **more)

    def flush(self, timeout: float = 5.0) -> None:
        """Waits until everything recorded before is durable. Raises `Timeout` or `StoreError`."""
        self.library.call("locum_flush", self._live(), max(1, int(timeout * 1000)))

    async def flush_async(self, timeout: float = 5.0) -> None:
        await _in_thread(self.flush, timeout)

    # Policy, distillation, students

    def set_policy(self, source: str, name: str = "policy") -> None:
        """Puts a Luau policy in place of the present one. Raises `PolicyError` with file and line; then nothing changed."""
        data, label = source.encode(), name.encode()
        self.library.call("locum_policy_load", self._live(), data, len(data), label, len(label))

    def distil(self, **options: Any) -> Job:
        """Starts a distillation in the background and returns at once; it survives the process.

        Options, all with defaults from the policy: `method` ("upper", "lora" or "full"), `tokens`, `max_seconds`, `epochs`,
        `lr`, `rank`, `alpha`, `upper_layers`, `batch_tokens`, `warmup_steps`, `weight_decay`, `patience`, `seed`, `compute`, `memory_mib`,
        `ttt` ("published" or "next_token": layers that learn while the student reads), `ttt_every`, `ttt_chunk`, `ttt_lr`, `ttt_rate`, `ttt_from`,
        `ttt_decay`, `ttt_delta`,
        `continue_student` (True starts from the promoted student), `unfiltered` (True trains on everything, for comparison),
        `promote` ("auto", or "never": only stored).
        Raises `Busy` if one is running, `ModelError` if there is no base model.
        """
        data = json.dumps(options).encode() if options else b""
        out = c_uint64()
        self.library.call("locum_distil_start", self._live(), data, len(data), byref(out))
        return Job(self, out.value)

    async def distil_async(self, **options: Any) -> Job:
        return await _in_thread(self.distil, **options)

    def job(self, number: int = 0) -> Job:
        """The job of that number; 0 is the newest."""
        return Job(self, number)

    def students(self) -> list[Student]:
        """All students, oldest first."""
        return [Student.from_json(s) for s in self._json("locum_student_list")]

    async def students_async(self) -> list[Student]:
        return await _in_thread(self.students)

    def use(self, student: int | str) -> None:
        """Pins who plays: a student's version, or "automatic" (policy and gate decide), "teacher", or "base" (untrained).

        Answers under way finish with the student they began with. The pin is kept in the store. Raises `NotFound`.
        """
        version = _ffi.PINS.get(student) if isinstance(student, str) else student
        if version is None:
            raise LocumError(f"use({student!r}): a version number, or one of {', '.join(_ffi.PINS)}", code="LOCUM_E_ARGUMENT")
        self.library.call("locum_student_use", self._live(), version)

    async def use_async(self, student: int | str) -> None:
        await _in_thread(self.use, student)

    def rollback(self) -> None:
        """Takes the promoted student back: the one before it plays again, or the teacher where there was none."""
        self.library.call("locum_student_rollback", self._live())

    async def rollback_async(self) -> None:
        await _in_thread(self.rollback)

    def forget(self, episode_id: str | None = None, *, scope: str | None = None, retrain: bool = False) -> dict[str, Any]:
        """Erases an episode (`Episode.id`), or all of a scope, for good: no file of the store holds a byte of it on return.

        A job that learns from it is cancelled; students that learned from it are marked and go on playing until they are taken back.
        `retrain` starts a job that makes the newest of them again without it. Returns `episodes`, `students` (versions), `serving`,
        `cancelled_job`, `retraining`. Takes as long and as much room as a copy of the database. Raises `NotFound`, `Busy`, `StoreError`.
        """
        if (episode_id is None) == (scope is None):
            raise LocumError("forget() takes an episode's id, or scope=", code="LOCUM_E_ARGUMENT")
        if episode_id is not None:
            return dict(self._json("locum_forget_episode", _episode_id(episode_id), int(retrain)))
        name = (scope or "").encode()
        return dict(self._json("locum_forget_scope", name, len(name), int(retrain)))

    async def forget_async(self, episode_id: str | None = None, **more: Any) -> dict[str, Any]:
        return await _in_thread(self.forget, episode_id, **more)

    def lineage(self, version: int) -> dict[str, Any]:
        """Which episodes made this student, also by way of those it was trained on from: `episodes`, `ancestors`. Raises `NotFound`."""
        return dict(self._json("locum_student_lineage", version))

    def students_of(self, episode_id: str) -> list[dict[str, Any]]:
        """Which students learned from an episode, also one that was erased since: `version`, `id`, `directly`, `current` of each."""
        return list(self._json("locum_episode_students", _episode_id(episode_id)))

    def stats(self) -> dict[str, Any]:
        """Counters: episodes, steps, who answered, latencies, queues, hooks, the student in place."""
        return dict(self._json("locum_stats"))

    async def stats_async(self) -> dict[str, Any]:
        return await _in_thread(self.stats)

    def report(self, path: PathLike | None = None) -> str:
        """The report as one self-contained HTML page, also written to `path` if given."""
        raw = self.library.locum_extension(b"locum.report/1")
        if not raw:
            raise LocumError("this library makes no report", code="LOCUM_E_UNSUPPORTED")
        extension = _ffi.ReportExtension.from_address(raw)
        data, error = _ffi.Bytes(), c_void_p()
        status = extension.html(self._live(), byref(data), byref(error))
        self._lib.raise_for(status, error, "the report")
        html = self._lib.take(data).decode("utf-8", "replace")
        if path is not None:
            part = Path(path).with_name(Path(path).name + ".part")
            part.write_text(html, encoding="utf-8")
            part.replace(path)
        return html

    async def report_async(self, path: PathLike | None = None) -> str:
        return await _in_thread(self.report, path)

    def events(self, wait: float = 0.0) -> list[Event]:
        """Takes the events that have happened since; waits up to `wait` seconds for the first."""
        self._live()
        return self._events.take(wait)

    async def events_async(self, wait: float = 0.0) -> list[Event]:
        return await _in_thread(self.events, wait)

    def _json(self, function: str, *arguments: Any) -> Any:
        data = _ffi.Bytes()
        self.library.call(function, self._live(), *arguments, byref(data))
        return json.loads(self._lib.take(data))


class Episode:
    """One task from first message to outcome. Its methods may be called from any thread; they take turns."""

    def __init__(self, locum: Locum, task: str, meta: Mapping[str, Any]) -> None:
        self._locum, self._lib = locum, locum.library
        self._turn = threading.RLock()
        self._token: contextvars.Token[Episode | None] | None = None
        name, data, out = task.encode(), (json.dumps(meta).encode() if meta else b""), c_uint64()
        self._lib.call("locum_episode_begin", locum._live(), name, len(name), data, len(data), byref(out))
        self._handle = out.value
        raw = (c_uint8 * 16)()
        self._lib.check(self._lib.locum_episode_id(self._handle, raw), "locum_episode_id")
        self.id = bytes(raw).hex()
        self.task = task

    @property
    def ended(self) -> bool:
        return not self._handle

    def message(
        self,
        message: Mapping[str, Any],
        *,
        actor: str = "unknown",
        model: str = "",
        latency_ms: float = 0,
        cost_usd: float = 0.0,
        unix_ms: int = 0,
        is_error: bool = False,
    ) -> None:
        """Records one OpenAI chat message. Copies and returns; never waits for the disk.

        `actor` says who made an assistant turn: "teacher", "student", "human", "script" or "unknown" (never trained on).
        `is_error` marks a tool result that reports a failed call. Raises `Busy` if the queue is full: the episode is then
        incomplete and is never trained on.
        """
        step = _ffi.Step.made(
            flags=_ffi.STEP_IS_ERROR if is_error else 0,
            actor=_ffi.ACTORS[actor],
            content_json=_dump(message),
            model=model.encode(),
            latency_ms=max(0, round(latency_ms)),
            cost_usd=cost_usd,
            unix_ms=unix_ms,
        )
        with self._turn:
            self._lib.call("locum_episode_step", self._live(), byref(step))

    def decide(self, messages: Sequence[Mapping[str, Any]] | None = None, **request: Any) -> Decision:
        """Who plays the next step? Returns at once; the arguments are those of `start`."""
        made, out = _request(messages, **request), _ffi.Decision.made()
        with self._turn:
            self._lib.call("locum_decide", self._live(), byref(made), byref(out))
        return Decision(
            who="student" if out.who == _ffi.WHO_STUDENT else "teacher",
            reason=out.reason.decode("utf-8", "replace"),
            reason_name=_ffi.REASONS.get(out.reason_code, ""),
            student_version=out.student_version,
            confidence=out.confidence,
            decided_ns=out.decided_ns,
        )

    def start(
        self,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        call_required: bool = False,
        max_tokens: int = 0,
        deadline_ms: int = 0,
        temperature: float = 0.0,
        greedy: bool = False,
        seed: int = 0,
    ) -> Call:
        """Lets the student answer, in the background. Raises `AskTeacher` where there is none that could.

        `messages` is the whole history in OpenAI form, None for the steps recorded so far; `tools` None for those the episode
        began with. `call_required` forbids plain text. An answer later than `deadline_ms` (0 = 30,000) is none.
        """
        made = _request(
            messages,
            tools=tools,
            call_required=call_required,
            max_tokens=max_tokens,
            deadline_ms=deadline_ms,
            temperature=temperature,
            greedy=greedy,
            seed=seed,
        )
        out = c_uint64()
        with self._turn:
            status = self._lib.call("locum_generate", self._live(), byref(made), byref(out))
        if status == _ffi.TEACHER or not out.value:
            raise AskTeacher("there is no student that could answer", reason_name="no_student")
        return Call(self._locum, self._lib, out.value, deadline_ms or DEFAULT_DEADLINE_MS)

    def generate(self, messages: Sequence[Mapping[str, Any]] | None = None, **request: Any) -> Answer:
        """The student's answer; waits for it. Arguments as for `start`. Raises `AskTeacher` with the reason."""
        with self.start(messages, **request) as call:
            call.wait(call.patience)
            return call.result()

    async def generate_async(self, messages: Sequence[Mapping[str, Any]] | None = None, **request: Any) -> Answer:
        """The same without blocking the event loop. Cancelling the task cancels the generation."""
        with self.start(messages, **request) as call:
            await call.wait_async(call.patience)
            return call.result()

    def outcome(
        self,
        success: bool | str | None,
        *,
        score: float | None = None,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Ends the episode, durably. `success` is True, False, None (unknown), "partial" or "aborted".

        On an error the episode stays open and the call may be repeated.
        """
        ended = _outcome(success, score, reason, details)
        with self._turn:
            self._lib.call("locum_episode_end", self._live(), byref(ended))
            self._handle = 0

    async def outcome_async(self, success: bool | str | None, **more: Any) -> None:
        await _in_thread(self.outcome, success, **more)

    def fast_weights(self) -> dict[str, Any]:
        """What the student has learned in this episode while it read: drift and bytes, layer by layer.

        This and the calls below may wait for the step of the model that is under way.
        """
        data = _ffi.Bytes()
        self._lib.call("locum_fast_weights", self._live(), byref(data))
        return dict(json.loads(self._lib.take(data)))

    def switch_fast_weights(self, on: bool) -> None:
        """Switches that learning off or on from the next step on. Off, students play as they were trained, to the bit."""
        self._lib.call("locum_fast_weights_switch", self._live(), int(on))

    def reset_fast_weights(self) -> None:
        """Undoes what was learned so far and goes on learning. Raises `NotFound` if nothing was read yet."""
        self._lib.call("locum_fast_weights_reset", self._live())

    def snapshot_fast_weights(self) -> int:
        """Keeps a copy of the episode's state in memory, and gives its number for `restore_fast_weights`."""
        number = c_uint64()
        self._lib.call("locum_fast_weights_snapshot", self._live(), byref(number))
        return number.value

    def restore_fast_weights(self, snapshot: int) -> None:
        """Puts a copy back, as often as asked. Raises `NotFound` if it is not this episode's, `Busy` while an answer is made."""
        self._lib.call("locum_fast_weights_restore", self._live(), snapshot)

    def forget_fast_weights(self, snapshot: int = 0) -> None:
        """Forgets a copy, or with 0 all of the episode's."""
        self._lib.call("locum_fast_weights_forget", self._live(), snapshot)

    def drop(self) -> None:
        """Forgets the episode, also on disk."""
        with self._turn:
            self._lib.check(self._lib.locum_episode_drop(self._live()), "locum_episode_drop")
            self._handle = 0

    def _live(self) -> int:
        self._locum._live()
        if not self._handle:
            raise Closed(f"episode {self.id} has ended")
        return self._handle

    def __enter__(self) -> Episode:
        self._token = _current.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._token is not None:
            _current.reset(self._token)
            self._token = None
        if not self.ended:
            try:
                self.outcome("aborted" if kind else None, reason=kind.__name__ if kind else "")
            except LocumError as error:
                # Not asked for by the host: neither its own exception nor its work is lost for it.
                log.warning("the end of episode %s is not recorded: %s", self.id, error)


_current: contextvars.ContextVar[Episode | None] = contextvars.ContextVar("locum_episode", default=None)


def current_episode() -> Episode | None:
    """The episode of the innermost `with locum.episode(...)` around the caller."""
    return _current.get()


class Call:
    """A generation in flight, or its finished answer. Give it back with `free()` or a `with` block."""

    def __init__(self, locum: Locum, library: _ffi.Library, handle: int, deadline_ms: int) -> None:
        self._locum, self._lib, self._handle = locum, library, handle
        self.patience = deadline_ms / 1000 + DEADLINE_GRACE_SECONDS

    def poll(self) -> tuple[str, bool]:
        """The text made since the last poll, and whether that was the last piece. Never waits."""
        data = _ffi.Bytes()
        status = self._lib.check(self._lib.locum_call_poll(self._handle, byref(data)), "locum_call_poll")
        return self._lib.take(data).decode("utf-8", "replace"), status == _ffi.OK

    def wait(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds; True if it is finished, well or not."""
        status = self._lib.locum_call_wait(self._handle, max(1, int(timeout * 1000)))
        return self._lib.check(status, "locum_call_wait") == _ffi.OK

    async def wait_async(self, timeout: float) -> bool:
        return await self._locum._events.finished(self._handle, timeout)

    def result(self) -> Answer:
        """The finished answer. Raises `AskTeacher` if it was late, failed, was refused by the policy, or is not finished."""
        data = _ffi.Bytes()
        status = self._lib.call("locum_call_result", self._handle, byref(data))
        raw = self._lib.take(data)
        if status == _ffi.PENDING:
            raise AskTeacher("the student has not answered in time", reason_name="late")
        answer = json.loads(raw)
        about = answer.get("locum", {})
        if status == _ffi.TEACHER:
            name = _ffi.REASONS.get(about.get("reason_code"), "")
            raise AskTeacher(str(about.get("reason", "the student gave no answer")), reason_name=name)
        return Answer(
            message=answer["message"],
            finish_reason=answer.get("finish_reason", ""),
            usage=answer.get("usage", {}),
            student=str(about.get("student", "")),
            version=int(about.get("version") or 0),
            confidence=float(about.get("confidence") or 0.0),
            details=about,
        )

    def cancel(self) -> None:
        self._lib.locum_call_cancel(self._handle)

    def free(self) -> None:
        """Gives the call back; cancels it if it still runs. Twice does nothing."""
        handle, self._handle = self._handle, 0
        if handle:
            self._lib.locum_call_free(handle)

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


class Job:
    """A distillation in the background."""

    def __init__(self, locum: Locum, number: int) -> None:
        self._locum, self.number = locum, number

    def status(self) -> JobStatus:
        """How it stands. Raises `NotFound` if there is no such job."""
        return JobStatus.from_json(self._locum._json("locum_distil_status", self.number))

    async def status_async(self) -> JobStatus:
        return await _in_thread(self.status)

    def cancel(self) -> None:
        """Stops it soon; what is not finished is thrown away. A finished job is not changed."""
        self._locum.library.call("locum_distil_cancel", self._locum._live(), self.number)

    def pause(self) -> None:
        """Keeps it from computing, within milliseconds, until `resume`. It keeps its memory.

        While a step is being decided it pauses by itself. Raises `NotFound` if it does not run in this process.
        """
        self._locum.library.call("locum_distil_pause", self._locum._live(), self.number)

    def resume(self) -> None:
        """Lets a paused job go on. Raises `NotFound` if it does not run in this process."""
        self._locum.library.call("locum_distil_resume", self._locum._live(), self.number)

    def wait(
        self, until: str = "trained", *, timeout: float | None = None, progress: bool = True, stream: TextIO | None = None
    ) -> JobStatus:
        """Waits until the job is "trained" (the student exists and its trial on live episodes begins) or "ended".

        A trial ends only through live episodes, so wait for "ended" only where others go on playing. Shows a progress line:
        moving in a terminal and a notebook, a few plain lines elsewhere (`stream`, by default stderr). Returns the last status,
        also when `timeout` seconds have passed.
        """
        bar = Progress(stream) if progress else None
        deadline = time.monotonic() + timeout if timeout is not None else None
        try:
            while True:
                status = self.status()
                if bar:
                    bar.show(status)
                if _reached(status, until) or (deadline is not None and time.monotonic() >= deadline):
                    return status
                time.sleep(POLL_SECONDS)
        finally:
            if bar:
                bar.close()

    async def wait_async(
        self, until: str = "trained", *, timeout: float | None = None, progress: bool = True, stream: TextIO | None = None
    ) -> JobStatus:
        """`wait` without blocking the event loop."""
        import asyncio

        bar = Progress(stream) if progress else None
        deadline = time.monotonic() + timeout if timeout is not None else None
        try:
            while True:
                status = await self.status_async()
                if bar:
                    bar.show(status)
                if _reached(status, until) or (deadline is not None and time.monotonic() >= deadline):
                    return status
                await asyncio.sleep(POLL_SECONDS)
        finally:
            if bar:
                bar.close()


async def _in_thread(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    # Imported late: a synchronous host should not pay a third of our import time for asyncio.
    import asyncio

    return await asyncio.to_thread(function, *arguments, **named)


def _reached(status: JobStatus, until: str) -> bool:
    if until not in ("trained", "ended"):
        raise LocumError(f"wait(until={until!r}): 'trained' or 'ended' is expected", code="LOCUM_E_ARGUMENT")
    return status.ended or (until == "trained" and status.trained)


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _request(
    messages: Sequence[Mapping[str, Any]] | None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    call_required: bool = False,
    max_tokens: int = 0,
    deadline_ms: int = 0,
    temperature: float = 0.0,
    greedy: bool = False,
    seed: int = 0,
) -> Any:
    return _ffi.Request.made(
        flags=(_ffi.REQUEST_GREEDY if greedy else 0) | (_ffi.REQUEST_CALL_REQUIRED if call_required else 0),
        messages_json=_dump(messages) if messages is not None else b"",
        tools_json=_dump(tools) if tools is not None else b"",
        max_tokens=max_tokens,
        deadline_ms=deadline_ms,
        temperature=temperature,
        seed=seed,
    )


def _episode_id(text: str) -> Any:
    """The 16 bytes that `Episode.id` names."""
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != 16:
        raise LocumError(f"not an episode id: {text[:64]!r} (32 hexadecimal digits are expected)", code="LOCUM_E_ARGUMENT")
    return (c_uint8 * 16)(*raw)


def _outcome(success: bool | str | None, score: float | None, reason: str, details: Mapping[str, Any] | None) -> Any:
    status = success if isinstance(success, str) else {True: "success", False: "failure", None: "unknown"}[success]
    if status not in _ffi.OUTCOMES:
        raise LocumError(f"outcome {success!r}: True, False, None, 'partial' or 'aborted' is expected", code="LOCUM_E_ARGUMENT")
    return _ffi.Outcome.made(
        flags=_ffi.OUTCOME_HAS_SCORE if score is not None else 0,
        status=_ffi.OUTCOMES[status],
        score=score or 0.0,
        reason=reason.encode(),
        details_json=_dump(details) if details else b"",
    )


def _close_quietly(library: _ffi.Library, handle: int, events: Events) -> None:
    """What is left to do when nobody closed it: the garbage collector or the interpreter's exit calls this."""
    try:
        events.close()
        library.call("locum_close", handle, 0)
    except LocumError:
        pass  # nobody is left to tell
