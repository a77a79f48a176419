"""Middleware for LangChain and LangGraph agents: every model call is recorded, and answered by the student where it has earned it.

    from langchain.agents import create_agent
    from locum import Locum
    from locum.langchain import LocumMiddleware

    stand_in = LocumMiddleware(Locum("store"))
    agent = create_agent(my_model, tools, middleware=[stand_in])   # my_model stays as it is: it is the teacher
    agent.invoke({"messages": [...]}, {"configurable": {"thread_id": "ticket-17"}})
    stand_in.outcome(True, thread_id="ticket-17")

Whatever fails on our side ends in the teacher being asked; the reason goes to the logger `locum`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage, convert_to_openai_messages
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.config import get_config

from ._types import Answer, AskTeacher, Decision, LocumError
from .core import Episode, Locum, current_episode

log = logging.getLogger("locum")

MAX_OPEN_CONVERSATIONS = 1024  # beyond it the one untouched for longest ends with an unknown outcome


@dataclass
class Counts:
    """How many model calls went where. `failures` are calls in which something of ours went wrong; the teacher then played."""

    teacher: int = 0
    student: int = 0
    failures: int = 0


@dataclass(eq=False)
class _Conversation:
    """An episode and how much of the host's history has been recorded into it."""

    episode: Episode
    key: str  # `thread:ID`, `episode:ID`, or `#N` where the host names neither
    in_flight: int = 0  # model calls that are not answered yet
    recorded: list[bytes] = field(default_factory=list)  # one entry a message, in canonical JSON
    lock: threading.RLock = field(default_factory=threading.RLock)
    prefix: int = 0  # hash of everything recorded, by which a history without a thread id is recognised

    def note(self, message: dict[str, Any], canonical: bytes) -> None:
        self.recorded.append(canonical)
        self.prefix = _extend(self.prefix, message, canonical)


@dataclass
class _Turn:
    """One model call under way."""

    conversation: _Conversation
    request: dict[str, Any]
    messages: list[dict[str, Any]]
    decision: Decision


class LocumMiddleware(AgentMiddleware):
    """Puts Locum between an agent and its model. The agent's own model is the teacher.

    Which episode a call belongs to is found out in this order: the `with locum.episode(...)` block around it; the
    `thread_id` of the run's config; else the open conversation whose recorded messages are the beginning of this history.
    Nothing in an agent says whether it succeeded, so say it: `outcome(...)`.

    - `domain`: family of the tasks, for reports; `task`: gives a task's name from its thread id and first messages.
    - `deadline_ms`: an answer later than this is the teacher's (0 = 30,000); `max_tokens` of an answer (0 = 256).
    - `greedy`: always the student's most likely answer.

    One middleware may serve many agents and threads at once.
    """

    def __init__(
        self,
        locum: Locum,
        *,
        domain: str = "",
        task: Callable[[str | None, Sequence[dict[str, Any]]], str] | None = None,
        deadline_ms: int = 0,
        max_tokens: int = 0,
        greedy: bool = True,
    ) -> None:
        super().__init__()
        self.locum = locum
        self.counts = Counts()
        self._domain, self._task = domain, task
        self._request = {"deadline_ms": deadline_ms, "max_tokens": max_tokens, "greedy": greedy}
        self._lock = threading.Lock()
        # By key, the one touched longest ago first.
        self._open: OrderedDict[str, _Conversation] = OrderedDict()
        self._unnamed = 0
        self._tool_specs: OrderedDict[int, tuple[Any, dict[str, Any]]] = OrderedDict()

    # The two hooks that LangChain calls

    def wrap_model_call(self, request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> Any:
        turn = self._begin(request)
        try:
            if turn is not None and turn.decision.student:
                try:
                    answer = turn.conversation.episode.generate(turn.messages, **turn.request)
                    return self._student_message(turn, answer)
                except Exception as e:
                    self._teacher_instead(e)
            started = time.perf_counter()
            response = handler(request)
            self._teacher_spoke(turn, request, response, time.perf_counter() - started)
            return response
        finally:
            self._end(turn)

    async def awrap_model_call(self, request: ModelRequest, handler: Callable[[ModelRequest], Awaitable[ModelResponse]]) -> Any:
        turn = self._begin(request)
        try:
            if turn is not None and turn.decision.student:
                try:
                    answer = await turn.conversation.episode.generate_async(turn.messages, **turn.request)
                    return self._student_message(turn, answer)
                except Exception as e:
                    self._teacher_instead(e)
            started = time.perf_counter()
            response = await handler(request)
            self._teacher_spoke(turn, request, response, time.perf_counter() - started)
            return response
        finally:
            self._end(turn)

    # Outcomes

    def outcome(
        self,
        success: bool | str | None,
        *,
        thread_id: str | None = None,
        messages: Sequence[BaseMessage | dict[str, Any]] | None = None,
        score: float | None = None,
        reason: str = "",
        details: dict[str, Any] | None = None,
    ) -> str:
        """Ends an episode: that of `thread_id`, else that of the surrounding `with locum.episode(...)`, else the one that
        `messages` belongs to. Returns the episode's id, with which `Locum.outcome` can correct the outcome later.

        `messages` is the agent's final history; give it, and what came after the last model call (the last tool's result) is
        recorded too. `success` is True, False, None (unknown), "partial" or "aborted". Durable on return.
        Raises `LocumError` where no such episode is open.
        """
        final = [_openai(m) for m in messages or ()]
        with self._lock:
            # A thread that is named counts for more than the block around the caller.
            conversation = self._find(thread_id, final, None if thread_id else current_episode())
        if conversation is None:
            raise LocumError("outcome(): no open episode; name its thread_id, or give the final messages", code="LOCUM_E_NOT_FOUND")
        with conversation.lock:
            self._record_new(conversation, final, messages or ())
            conversation.episode.outcome(success, score=score, reason=reason, details=details)
        with self._lock:
            self._open.pop(conversation.key, None)
        return conversation.episode.id

    async def outcome_async(self, success: bool | str | None, **named: Any) -> str:
        """`outcome` without blocking the event loop."""
        import asyncio

        # The context goes along, so that the current episode is still found.
        return await asyncio.to_thread(self.outcome, success, **named)

    def drop(self, *, thread_id: str | None = None) -> None:
        """Forgets the episode of `thread_id`, else of the surrounding `with locum.episode(...)`, also on disk."""
        with self._lock:
            conversation = self._find(thread_id, [], None if thread_id else current_episode())
            if conversation is not None:
                del self._open[conversation.key]
        if conversation is None:
            raise LocumError("drop(): no open episode; name its thread_id", code="LOCUM_E_NOT_FOUND")
        with conversation.lock:
            conversation.episode.drop()

    # A model call, step by step. `_begin` and `_teacher_spoke` never raise.

    def _begin(self, request: ModelRequest) -> _Turn | None:
        conversation = None
        try:
            history: list[BaseMessage] = [*([request.system_message] if request.system_message else []), *request.messages]
            messages = [_openai(m) for m in history]
            tools = [self._tool_spec(t) for t in request.tools]
            conversation = self._conversation(messages, tools)
            with conversation.lock:
                self._record_new(conversation, messages, history)
                asked, obstacle = {**self._request, **_choice(request, tools)}, _obstacle(request)
                if obstacle:
                    decision = Decision("teacher", obstacle, "bad_request", 0, 0.0, 0)
                else:
                    decision = conversation.episode.decide(messages, **asked)
            return _Turn(conversation, asked, messages, decision)
        except Exception as e:
            self._end(conversation)
            self.counts.failures += 1
            log.warning("the teacher plays, and this call is not recorded: %s", _sentence(e))
            return None

    def _end(self, of: _Turn | _Conversation | None) -> None:
        conversation = of.conversation if isinstance(of, _Turn) else of
        if conversation is not None:
            with self._lock:
                conversation.in_flight -= 1

    def _student_message(self, turn: _Turn, answer: Answer) -> AIMessage:
        message = AIMessage(
            content=answer.text,
            tool_calls=[
                {
                    "name": call["function"]["name"],
                    "args": json.loads(call["function"]["arguments"] or "{}"),
                    "id": call["id"],
                    "type": "tool_call",
                }
                for call in answer.tool_calls
            ],
            response_metadata={
                "model_name": f"locum/{answer.version}",
                "finish_reason": answer.finish_reason,
                "locum": {
                    "who": "student",
                    "reason": turn.decision.reason,
                    "student": answer.student,
                    "version": answer.version,
                    "confidence": answer.confidence,
                },
            },
            usage_metadata=_usage(answer.usage),
        )
        self._record_reply(turn.conversation, message, actor="student", model=f"locum/{answer.version}")
        self.counts.student += 1
        return message

    def _teacher_instead(self, error: Exception) -> None:
        if isinstance(error, AskTeacher):
            log.info("the teacher plays instead of the student: %s", error)
        else:
            self.counts.failures += 1
            log.warning("the teacher plays instead of the student: %s", _sentence(error))

    def _teacher_spoke(self, turn: _Turn | None, request: ModelRequest, response: Any, seconds: float) -> None:
        self.counts.teacher += 1
        if turn is None:
            return
        try:
            inner = getattr(response, "model_response", response)  # ExtendedModelResponse holds one
            for message in [inner] if isinstance(inner, BaseMessage) else inner.result:
                if isinstance(message, AIMessage):
                    name = message.response_metadata.get("model_name") or type(request.model).__name__
                    self._record_reply(turn.conversation, message, actor="teacher", model=str(name), latency_ms=seconds * 1000)
        except Exception as e:
            self.counts.failures += 1
            log.warning("the teacher's answer is not recorded: %s", _sentence(e))

    def _record_reply(self, conversation: _Conversation, message: AIMessage, **about: Any) -> None:
        try:
            converted = _openai(message)
            with conversation.lock:
                conversation.note(converted, _canonical(converted))
                conversation.episode.message(converted, **about)
        except Exception as e:
            self.counts.failures += 1
            log.warning("an answer is not recorded: %s", _sentence(e))

    # Episodes

    def _conversation(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> _Conversation:
        """The conversation this call belongs to, begun if need be, with one more call in flight."""
        around, thread_id = current_episode(), _thread_id()
        with self._lock:
            found = self._find(thread_id, messages, around)
            if found is not None:
                found.in_flight += 1
                return found
            self._unnamed += 1
            unnamed = f"#{self._unnamed}"
        if around is not None and not around.ended:
            key, episode = f"episode:{around.id}", around
        else:
            key = f"thread:{thread_id}" if thread_id else unnamed
            name = self._task(thread_id, messages) if self._task else ""
            episode = self.locum.episode(name, domain=self._domain, session_id=thread_id or "", tools=tools)
        conversation = _Conversation(episode, key, in_flight=1)
        crowded = None
        with self._lock:
            self._open[key] = conversation
            if len(self._open) > MAX_OPEN_CONVERSATIONS:
                crowded = next((c for c in self._open.values() if not c.in_flight), None)
            if crowded is not None:
                del self._open[crowded.key]
        if crowded is not None and not crowded.episode.ended:
            crowded.episode.outcome(None, reason="too many conversations were open at once")
        return conversation

    def _find(self, thread_id: str | None, messages: list[dict[str, Any]], around: Episode | None) -> _Conversation | None:
        if around is not None and not around.ended:
            key: str | None = f"episode:{around.id}"
        elif thread_id:
            key = f"thread:{thread_id}"
        else:
            key = self._longest_beginning(messages)
        found = self._open.get(key) if key else None
        if found is None or found.episode.ended:
            return None
        self._open.move_to_end(found.key)
        return found

    def _longest_beginning(self, messages: list[dict[str, Any]]) -> str | None:
        """The unnamed conversation whose recorded messages are the longest beginning of this history.

        One that waits for an answer is not meant: that is somebody else who asks the same.
        """
        unnamed = {c.prefix: c.key for c in self._open.values() if c.key.startswith("#") and not c.in_flight}
        best, prefix = None, 0
        for message in messages:
            prefix = _extend(prefix, message, _canonical(message))
            best = unnamed.get(prefix, best) if prefix else None
        return best

    def _record_new(self, conversation: _Conversation, messages: list[dict[str, Any]], history: Sequence[Any]) -> None:
        """Records what of the history is not in the episode yet.

        A host may rewrite its history (trim or summarise it), so messages are counted, not positions: one is new if it occurs
        more often than it was recorded.
        """
        left: dict[bytes, int] = {}
        for known in conversation.recorded:
            left[known] = left.get(known, 0) + 1
        for message, original in zip(messages, history):
            canonical = _canonical(message)
            if left.get(canonical, 0) > 0:
                left[canonical] -= 1
                continue
            conversation.note(message, canonical)
            conversation.episode.message(message, is_error=isinstance(original, ToolMessage) and original.status == "error")

    def _tool_spec(self, tool: Any) -> dict[str, Any]:
        # Converting means walking a Pydantic schema, so it is done once a tool; the tool is kept, so that its id stays its own.
        known = self._tool_specs.get(id(tool))
        if known is None or known[0] is not tool:
            known = self._tool_specs[id(tool)] = (tool, convert_to_openai_tool(tool))
            if len(self._tool_specs) > MAX_OPEN_CONVERSATIONS:
                self._tool_specs.popitem(last=False)
        return known[1]


def _openai(message: BaseMessage | dict[str, Any]) -> dict[str, Any]:
    """One message in OpenAI's form."""
    converted: dict[str, Any] = convert_to_openai_messages(message)
    if converted.get("tool_calls") and converted.get("content") == "":
        converted["content"] = None  # LangChain has no null content; a call without words is not an empty text
    return converted


def _canonical(message: dict[str, Any]) -> bytes:
    return json.dumps(message, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace")


def _extend(prefix: int, message: dict[str, Any], canonical: bytes) -> int:
    # System prompts are left out: an agent's final state does not hold them.
    return prefix if message.get("role") == "system" else hash((prefix, canonical))


def _choice(request: ModelRequest, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The tools of this call and whether it must be a tool call, from the request's `tool_choice`."""
    choice = _chosen(request)
    if choice in (None, "auto"):
        return {"tools": tools}
    if choice == "none":
        return {"tools": []}
    if choice in ("any", "required", True):
        return {"tools": tools, "call_required": True}
    return {"tools": [t for t in tools if t.get("function", {}).get("name") == choice], "call_required": True}


def _chosen(request: ModelRequest) -> Any:
    choice = request.tool_choice
    if isinstance(choice, dict):
        return choice.get("function", choice).get("name", choice.get("type"))
    return choice


def _obstacle(request: ModelRequest) -> str | None:
    """Why no student can answer this request, or None."""
    if request.response_format is not None:
        return "a structured response is wanted, which the student cannot give"
    if any(isinstance(t, dict) and t.get("type") != "function" and "name" not in t for t in request.tools):
        return "a tool of the model's provider is offered, which the student cannot call"
    return None


def _usage(usage: dict[str, int]) -> Any:
    read, made = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    return {"input_tokens": read, "output_tokens": made, "total_tokens": read + made}


def _thread_id() -> str | None:
    try:
        thread_id = get_config().get("configurable", {}).get("thread_id")
    except RuntimeError:  # outside a run
        return None
    return None if thread_id is None else str(thread_id)


def _sentence(error: Exception) -> str:
    # A LocumError never holds prompts or tool outputs; a foreign one may, so only its kind is logged.
    return str(error) if isinstance(error, LocumError) else type(error).__name__
