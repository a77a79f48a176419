"""The C interface, as declared in `locum.h`, for ctypes. Nothing here but declarations, the search for the library, and errors."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from ctypes import POINTER, byref, c_char, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from ._types import LibraryNotFound, LocumError, error_class

ABI_MAJOR, ABI_MINOR = 0, 1

OK, PENDING, EMPTY, TEACHER = 0, 1, 2, 3
OPEN_READ_ONLY, OPEN_NO_LEARNING, OPEN_NO_MODEL, OPEN_NO_DEVICE, OPEN_DROP_OLDEST = 1, 2, 4, 8, 16
STEP_IS_ERROR = 1
ACTORS = {"unknown": 0, "teacher": 1, "student": 2, "human": 3, "script": 4}
OUTCOMES = {"unknown": 0, "success": 1, "failure": 2, "partial": 3, "aborted": 4}
OUTCOME_HAS_SCORE = 1
REQUEST_GREEDY, REQUEST_CALL_REQUIRED = 1, 2
WHO_STUDENT = 1
REASONS = {
    0: "policy",
    1: "no_student",
    2: "shadow",
    3: "canary_teacher",
    4: "canary_student",
    5: "promoted",
    6: "pinned",
    7: "bad_request",
    8: "tools_inexpressible",
    9: "prompt_too_long",
    10: "view_mismatch",
    11: "late",
    12: "refused",
    13: "fault",
    14: "closed",
    15: "drifted",
}
EVENTS = {
    1: "call_done",
    2: "job_progress",
    3: "job_state",
    4: "student_swapped",
    5: "rolled_back",
    6: "store_trouble",
    7: "policy_loaded",
    8: "fault",
    9: "fast_weights",
    10: "forgotten",
    11: "hook_off",
}
PINS = {"automatic": 0, "teacher": 2**64 - 1, "base": 2**64 - 2}

LIBRARY_NAME = {"win32": "locum.dll", "darwin": "liblocum.dylib"}.get(sys.platform, "liblocum.so")


class Str(ctypes.Structure):
    """`locum_str`: borrowed text. Keeps the Python bytes alive through `keep`."""

    _fields_ = [("ptr", c_char_p), ("len", c_size_t)]

    @classmethod
    def of(cls, data: bytes) -> Str:
        s = cls(data, len(data))
        s.keep = data
        return s


class Bytes(ctypes.Structure):
    _fields_ = [("ptr", c_void_p), ("len", c_size_t), ("owner", c_uint64)]


class _Sized(ctypes.Structure):
    """A struct that begins with its size. `made(...)` zeroes it, fills the size, and keeps its strings alive."""

    @classmethod
    def made(cls, **values: Any) -> Any:
        s = cls()
        s.struct_size = ctypes.sizeof(cls)
        s.keep = []
        for name, value in values.items():
            if isinstance(value, bytes):
                value = Str.of(value)
                s.keep.append(value)
            setattr(s, name, value)
        return s


class Options(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("flags", c_uint32),
        ("store_dir", Str), ("policy_path", Str), ("base_model_dir", Str),
        ("worker_threads", c_uint32), ("train_threads", c_uint32),
        ("max_disk_bytes", c_uint64), ("max_cache_bytes", c_uint64),
        ("weights", c_int32), ("reserved", c_uint32),
        ("device_library", Str), ("max_device_bytes", c_uint64),
        ("detectors", Str),
    ]  # fmt: skip


class Step(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("flags", c_uint32), ("role", c_int32), ("actor", c_int32),
        ("content_json", Str), ("model", Str), ("unix_ms", c_uint64), ("cost_usd", c_double),
        ("latency_ms", c_uint32), ("reserved", c_uint32),
    ]  # fmt: skip


class Outcome(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("flags", c_uint32), ("status", c_int32), ("reserved", c_uint32),
        ("score", c_double), ("reason", Str), ("details_json", Str),
    ]  # fmt: skip


class Request(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("flags", c_uint32), ("messages_json", Str), ("tools_json", Str),
        ("max_tokens", c_uint32), ("deadline_ms", c_uint32), ("temperature", c_float), ("reserved", c_uint32),
        ("seed", c_uint64),
    ]  # fmt: skip


class Decision(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("who", c_int32), ("confidence", c_float), ("decided_ns", c_uint32),
        ("student_version", c_uint64), ("reason_code", c_int32), ("reason", c_char * 100),
    ]  # fmt: skip


class Event(_Sized):
    _fields_ = [
        ("struct_size", c_uint32), ("kind", c_int32), ("subject", c_uint64), ("number", c_int64), ("detail", Bytes),
    ]  # fmt: skip


class ReportExtension(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("html", ctypes.CFUNCTYPE(c_int32, c_uint64, POINTER(Bytes), POINTER(c_void_p))),
    ]


# Name, result, arguments. A handle is a struct of one 64-bit integer, which every C convention passes like the integer.
_ERROR, _HANDLE, _TEXT = POINTER(c_void_p), c_uint64, [c_char_p, c_size_t]
FUNCTIONS: list[tuple[str, Any, list[Any]]] = [
    ("locum_abi_version", c_uint32, []),
    ("locum_build_info", c_char_p, []),
    ("locum_status_name", c_char_p, [c_int32]),
    ("locum_extension", c_void_p, [c_char_p]),
    ("locum_error_status", c_int32, [c_void_p]),
    ("locum_error_message", c_char_p, [c_void_p]),
    ("locum_error_os_code", c_int32, [c_void_p]),
    ("locum_error_free", None, [c_void_p]),
    ("locum_bytes_free", None, [POINTER(Bytes)]),
    ("locum_open", c_int32, [POINTER(Options), POINTER(c_uint64), _ERROR]),
    ("locum_close", c_int32, [_HANDLE, c_uint32, _ERROR]),
    ("locum_episode_begin", c_int32, [_HANDLE, *_TEXT, *_TEXT, POINTER(c_uint64), _ERROR]),
    ("locum_episode_step", c_int32, [_HANDLE, POINTER(Step), _ERROR]),
    ("locum_episode_end", c_int32, [_HANDLE, POINTER(Outcome), _ERROR]),
    ("locum_episode_drop", c_int32, [_HANDLE]),
    ("locum_episode_id", c_int32, [_HANDLE, c_uint8 * 16]),
    ("locum_outcome_later", c_int32, [_HANDLE, c_uint8 * 16, POINTER(Outcome), _ERROR]),
    ("locum_flush", c_int32, [_HANDLE, c_uint32, _ERROR]),
    ("locum_decide", c_int32, [_HANDLE, POINTER(Request), POINTER(Decision), _ERROR]),
    ("locum_generate", c_int32, [_HANDLE, POINTER(Request), POINTER(c_uint64), _ERROR]),
    ("locum_call_poll", c_int32, [_HANDLE, POINTER(Bytes)]),
    ("locum_call_wait", c_int32, [_HANDLE, c_uint32]),
    ("locum_call_result", c_int32, [_HANDLE, POINTER(Bytes), _ERROR]),
    ("locum_call_cancel", c_int32, [_HANDLE]),
    ("locum_call_free", c_int32, [_HANDLE]),
    ("locum_event_handle", c_int64, [_HANDLE]),
    ("locum_next_event", c_int32, [_HANDLE, POINTER(Event)]),
    ("locum_policy_load", c_int32, [_HANDLE, *_TEXT, *_TEXT, _ERROR]),
    ("locum_distil_start", c_int32, [_HANDLE, *_TEXT, POINTER(c_uint64), _ERROR]),
    ("locum_distil_status", c_int32, [_HANDLE, c_uint64, POINTER(Bytes), _ERROR]),
    ("locum_distil_cancel", c_int32, [_HANDLE, c_uint64, _ERROR]),
    ("locum_distil_pause", c_int32, [_HANDLE, c_uint64, _ERROR]),
    ("locum_distil_resume", c_int32, [_HANDLE, c_uint64, _ERROR]),
    ("locum_fast_weights", c_int32, [_HANDLE, POINTER(Bytes), _ERROR]),
    ("locum_fast_weights_switch", c_int32, [_HANDLE, c_int32, _ERROR]),
    ("locum_fast_weights_reset", c_int32, [_HANDLE, _ERROR]),
    ("locum_fast_weights_snapshot", c_int32, [_HANDLE, POINTER(c_uint64), _ERROR]),
    ("locum_fast_weights_restore", c_int32, [_HANDLE, c_uint64, _ERROR]),
    ("locum_fast_weights_forget", c_int32, [_HANDLE, c_uint64, _ERROR]),
    ("locum_student_list", c_int32, [_HANDLE, POINTER(Bytes), _ERROR]),
    ("locum_student_use", c_int32, [_HANDLE, c_uint64, _ERROR]),
    ("locum_student_rollback", c_int32, [_HANDLE, _ERROR]),
    ("locum_forget_episode", c_int32, [_HANDLE, c_uint8 * 16, c_int32, POINTER(Bytes), _ERROR]),
    ("locum_forget_scope", c_int32, [_HANDLE, *_TEXT, c_int32, POINTER(Bytes), _ERROR]),
    ("locum_student_lineage", c_int32, [_HANDLE, c_uint64, POINTER(Bytes), _ERROR]),
    ("locum_episode_students", c_int32, [_HANDLE, c_uint8 * 16, POINTER(Bytes), _ERROR]),
    ("locum_stats", c_int32, [_HANDLE, POINTER(Bytes), _ERROR]),
]


class Library:
    """The loaded library. Its functions may be called from any thread; ctypes lets other Python threads run meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # An absolute path, so that the loader's own search (and its surprises) plays no part.
            self._dll = ctypes.CDLL(str(path.resolve()))
        except OSError as e:
            raise LibraryNotFound(f"{path} cannot be loaded: {e}") from e
        for name, result, arguments in FUNCTIONS:
            try:
                function = getattr(self._dll, name)
            except AttributeError as e:
                raise LibraryNotFound(f"{path} is not Locum's library, or of another version: it has no {name}") from e
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        version = self.locum_abi_version()
        if version != (ABI_MAJOR << 16) | ABI_MINOR:
            raise LibraryNotFound(
                f"{path} speaks ABI {version >> 16}.{version & 0xFFFF}, this package ABI {ABI_MAJOR}.{ABI_MINOR}: "
                "use a package and a library of the same version"
            )

    def __getattr__(self, name: str) -> Any:  # only for type checkers: the functions are set in __init__
        raise AttributeError(name)

    def call(self, name: str, *arguments: Any) -> int:
        """Calls a function whose last argument is `locum_error **`. Returns a status >= 0, raises for a negative one."""
        error = c_void_p()
        return self.raise_for(getattr(self, name)(*arguments, byref(error)), error, name)

    def raise_for(self, status: int, error: c_void_p, name: str) -> int:
        """Returns a status >= 0; raises what `error` says, and frees it, for a negative one."""
        if status >= 0:
            return int(status)
        try:
            text = self.locum_error_message(error).decode("utf-8", "replace") if error else ""
            os_code = self.locum_error_os_code(error) if error else 0
        finally:
            self.locum_error_free(error)
        raise self.exception(status, text or f"{name} failed", os_code)

    def check(self, status: int, name: str) -> int:
        """The same for functions without an error argument."""
        if status < 0:
            raise self.exception(status, f"{name} failed", 0)
        return status

    def exception(self, status: int, text: str, os_code: int) -> LocumError:
        code = self.locum_status_name(status).decode()
        return error_class(code)(text, code=code, status=status, os_code=os_code)

    def take(self, data: Bytes) -> bytes:
        """Copies bytes the library gave us and frees them."""
        try:
            return ctypes.string_at(data.ptr, data.len) if data.ptr and data.len else b""
        finally:
            self.locum_bytes_free(byref(data))


_loaded: dict[Path, Library] = {}
_loading = threading.Lock()


def load(path: str | os.PathLike[str] | None = None) -> Library:
    """The library at `path`, else at `LOCUM_LIBRARY`, else inside this package, else built by cargo in the checkout around it.

    Raises `LibraryNotFound` with the places that were tried.
    """
    found = find(path)
    with _loading:
        if found not in _loaded:
            _loaded[found] = Library(found)
        return _loaded[found]


def find(path: str | os.PathLike[str] | None = None) -> Path:
    """Where `load` would take the library from."""
    for named, source in ((path, "the argument `library`"), (os.environ.get("LOCUM_LIBRARY"), "LOCUM_LIBRARY")):
        if named:
            file = Path(named)
            file = file / LIBRARY_NAME if file.is_dir() else file
            if not file.is_file():
                raise LibraryNotFound(f"{source} names {file}, and there is no such file")
            return file
    here = Path(__file__).resolve().parent
    # A built package holds the library; a checkout has it in target/release beside the workspace's Cargo.toml.
    places = [here / LIBRARY_NAME]
    places += [up / "target" / "release" / LIBRARY_NAME for up in here.parents if (up / "Cargo.toml").is_file()]
    for place in places:
        if place.is_file():
            return place
    raise LibraryNotFound(
        f"{LIBRARY_NAME} was not found; looked for {', '.join(map(str, places))}. Build it with "
        "`cargo build --release -p locum-plugin`, or set LOCUM_LIBRARY to the file"
    )
