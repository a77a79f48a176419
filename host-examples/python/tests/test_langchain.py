"""The middleware, on real LangGraph agents, with a stand-in for the library."""

import asyncio
import json
import logging
import unittest
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from locum import AskTeacher, Closed, LocumError, StoreError
from locum.langchain import LocumMiddleware, _choice, _obstacle, _openai
from tests.fakes import FakeLocum

logging.getLogger("locum").setLevel(logging.CRITICAL)


@tool
def weigh(thing: str, grams: int = 1) -> str:
    """Weigh something."""
    if thing == "air":
        raise ValueError("too light")
    return f"{thing} weighs {grams} g"


weigh.handle_tool_error = True


def call(thing: str, call_id: str = "c1") -> dict[str, Any]:
    return {"name": "weigh", "args": {"thing": thing}, "id": call_id, "type": "tool_call"}


def student_call(thing: str, call_id: str = "s1") -> dict[str, Any]:
    function = {"name": "weigh", "arguments": json.dumps({"thing": thing})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "type": "function", "function": function}]}


class Teacher(BaseChatModel):
    """Says its lines one after another."""

    lines: list[AIMessage]
    asked: int = 0

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, **kwargs: Any) -> BaseChatModel:
        return self

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        line = self.lines[min(self.asked, len(self.lines) - 1)]
        self.asked += 1
        return ChatResult(generations=[ChatGeneration(message=line.model_copy(deep=True))])


def two_steps() -> Teacher:
    return Teacher(lines=[AIMessage(content="", tool_calls=[call("lead")]), AIMessage(content="Lead is heavy.")])


def agent_with(middleware: LocumMiddleware, teacher: Teacher, **more: Any) -> Any:
    return create_agent(teacher, [weigh], system_prompt="You weigh things.", middleware=[middleware], **more)


ASK = {"messages": [{"role": "user", "content": "How heavy is lead?"}]}


class Recording(unittest.TestCase):
    def test_every_message_of_a_run_is_recorded_once_in_its_order(self) -> None:
        locum = FakeLocum()
        agent_with(LocumMiddleware(locum), two_steps()).invoke(ASK)
        [episode] = locum.episodes
        self.assertEqual([m["role"] for m, _ in episode.messages], ["system", "user", "assistant", "tool", "assistant"])
        self.assertEqual([about.get("actor") for m, about in episode.messages if m["role"] == "assistant"], ["teacher", "teacher"])
        first = episode.messages[2][0]
        self.assertIsNone(first["content"])
        self.assertEqual(json.loads(first["tool_calls"][0]["function"]["arguments"]), {"thing": "lead"})
        self.assertGreater(episode.messages[2][1]["latency_ms"], 0)

    def test_a_failed_tool_is_recorded_as_an_error(self) -> None:
        locum = FakeLocum()
        teacher = Teacher(lines=[AIMessage(content="", tool_calls=[call("lead")]), AIMessage(content="Done.")])
        middleware = LocumMiddleware(locum)
        history = [
            HumanMessage("?"),
            AIMessage(content="", tool_calls=[call("air")]),
            ToolMessage("too light", tool_call_id="c1", status="error"),
        ]
        agent_with(middleware, teacher).invoke({"messages": history})
        self.assertEqual([about["is_error"] for m, about in locum.episodes[0].messages if m["role"] == "tool"], [True, False])

    def test_the_tools_reach_the_episode_as_openai_specs(self) -> None:
        locum = FakeLocum()
        agent_with(LocumMiddleware(locum), two_steps()).invoke(ASK)
        [spec] = locum.episodes[0].about["tools"]
        self.assertEqual(spec["function"]["name"], "weigh")
        self.assertEqual(spec["function"]["parameters"]["required"], ["thing"])

    def test_a_rewritten_history_adds_only_what_is_new(self) -> None:
        locum, teacher = FakeLocum(), two_steps()
        middleware = LocumMiddleware(locum)
        agent = agent_with(middleware, teacher, checkpointer=InMemorySaver())
        config = {"configurable": {"thread_id": "t"}}
        agent.invoke(ASK, config)
        before = len(locum.episodes[0].messages)
        teacher.asked = 1
        agent.invoke({"messages": [{"role": "user", "content": "Thanks."}]}, config)
        self.assertEqual([m["role"] for m, _ in locum.episodes[0].messages[before:]], ["user", "assistant"])


class Episodes(unittest.TestCase):
    def test_a_thread_id_is_an_episode_until_its_outcome(self) -> None:
        locum = FakeLocum()
        middleware = LocumMiddleware(locum, domain="scales")
        for thread in ("a", "b"):
            agent_with(middleware, two_steps()).invoke(ASK, {"configurable": {"thread_id": thread}})
        self.assertEqual(len(locum.episodes), 2)
        self.assertEqual(middleware.outcome(True, thread_id="b"), locum.episodes[1].id)
        self.assertEqual([e.ended for e in locum.episodes], [False, True])
        agent_with(middleware, two_steps()).invoke(ASK, {"configurable": {"thread_id": "b"}})
        self.assertEqual(len(locum.episodes), 3)

    def test_without_a_name_a_history_finds_its_episode_by_its_beginning(self) -> None:
        locum = FakeLocum()
        middleware = LocumMiddleware(locum)
        result = agent_with(middleware, two_steps()).invoke(ASK)
        agent_with(middleware, two_steps()).invoke(ASK)
        self.assertEqual(len(locum.episodes), 2)
        again = [*result["messages"], HumanMessage("And again?")]
        agent_with(middleware, Teacher(lines=[AIMessage(content="Still heavy.")])).invoke({"messages": again})
        self.assertEqual(len(locum.episodes), 2)
        self.assertEqual(len(locum.episodes[0].messages) + len(locum.episodes[1].messages), 5 + 5 + 2)

    def test_the_outcome_records_what_came_after_the_last_model_call(self) -> None:
        locum = FakeLocum()
        middleware = LocumMiddleware(locum)
        weigh.return_direct = True
        try:
            result = agent_with(middleware, two_steps()).invoke(ASK)
        finally:
            weigh.return_direct = False
        middleware.outcome(False, messages=result["messages"], reason="it was not asked for")
        [episode] = locum.episodes
        self.assertEqual([m["role"] for m, _ in episode.messages], ["system", "user", "assistant", "tool"])
        self.assertEqual(episode.outcomes[0][0], False)

    def test_two_who_ask_the_same_at_once_get_an_episode_each(self) -> None:
        locum = FakeLocum()
        middleware = LocumMiddleware(locum)

        class SlowTeacher(Teacher):
            async def _agenerate(self, *a: Any, **k: Any) -> ChatResult:
                await asyncio.sleep(0.05)
                return self._generate(*a, **k)

        async def run() -> None:
            agent = agent_with(middleware, SlowTeacher(lines=[AIMessage(content="Yes.")]))
            await asyncio.gather(agent.ainvoke(ASK), agent.ainvoke(ASK))

        asyncio.run(run())
        self.assertEqual(len(locum.episodes), 2)

    def test_an_outcome_for_nobody_is_refused(self) -> None:
        with self.assertRaises(LocumError) as caught:
            LocumMiddleware(FakeLocum()).outcome(True, thread_id="nobody")
        self.assertEqual(caught.exception.code, "LOCUM_E_NOT_FOUND")


class TheStudentPlays(unittest.TestCase):
    def test_its_call_reaches_the_agents_tools_and_the_teacher_is_not_asked(self) -> None:
        locum = FakeLocum("student", student_call("feathers"))
        teacher = two_steps()
        middleware = LocumMiddleware(locum)
        weigh.return_direct = True
        try:
            result = agent_with(middleware, teacher).invoke(ASK)
        finally:
            weigh.return_direct = False
        self.assertEqual(teacher.asked, 0)
        said = result["messages"][1]
        self.assertEqual(said.tool_calls, [call("feathers", "s1")])
        self.assertEqual(said.response_metadata["locum"]["who"], "student")
        self.assertEqual(said.usage_metadata["total_tokens"], 12)
        self.assertEqual(result["messages"][2].content, "feathers weighs 1 g")
        self.assertEqual(locum.episodes[0].messages[2][1]["actor"], "student")
        self.assertEqual((middleware.counts.student, middleware.counts.teacher), (1, 0))

    def test_plain_text_ends_the_run(self) -> None:
        locum = FakeLocum("student", {"role": "assistant", "content": "I am done."})
        result = agent_with(LocumMiddleware(locum), two_steps()).invoke(ASK)
        self.assertEqual(result["messages"][-1].content, "I am done.")

    def test_the_loop_keeps_ticking_while_it_answers(self) -> None:
        locum = FakeLocum("student", {"role": "assistant", "content": "I am done."}, seconds=0.3)

        async def run() -> int:
            ticks = 0
            task = asyncio.create_task(agent_with(LocumMiddleware(locum), two_steps()).ainvoke(ASK))
            while not task.done():
                await asyncio.sleep(0.01)
                ticks += 1
            self.assertEqual((await task)["messages"][-1].content, "I am done.")
            return ticks

        self.assertGreater(asyncio.run(run()), 10)


class EveryFailureEndsWithTheTeacher(unittest.TestCase):
    def check(self, locum: FakeLocum, failures: int) -> None:
        for run in (lambda a: a.invoke(ASK), lambda a: asyncio.run(a.ainvoke(ASK))):
            teacher, middleware = two_steps(), LocumMiddleware(locum)
            result = run(agent_with(middleware, teacher))
            self.assertEqual(result["messages"][-1].content, "Lead is heavy.")
            self.assertEqual(teacher.asked, 2)
            self.assertEqual(middleware.counts.failures > 0, failures > 0)

    def test_when_the_student_is_late(self) -> None:
        self.check(FakeLocum("student", AskTeacher("the deadline passed")), failures=0)

    def test_when_the_library_raises(self) -> None:
        self.check(FakeLocum("student", LocumError("inside", code="LOCUM_E_INTERNAL")), failures=1)

    def test_when_the_answer_is_nonsense(self) -> None:
        bad = student_call("x")
        bad["tool_calls"][0]["function"]["arguments"] = "{not json"
        self.check(FakeLocum("student", bad), failures=1)

    def test_when_the_store_is_closed(self) -> None:
        locum = FakeLocum()
        locum.broken = Closed("the store was closed")
        self.check(locum, failures=1)

    def test_when_the_disk_is_full_in_the_middle(self) -> None:
        locum, teacher = FakeLocum(), two_steps()

        class Full(LocumMiddleware):
            def _teacher_spoke(self, *a: Any) -> None:
                locum.broken = StoreError("no space left")
                super()._teacher_spoke(*a)

        middleware = Full(locum)
        result = agent_with(middleware, teacher).invoke(ASK)
        self.assertEqual(result["messages"][-1].content, "Lead is heavy.")
        self.assertGreater(middleware.counts.failures, 0)

    def test_but_the_teachers_own_failure_is_the_hosts(self) -> None:
        class Broken(Teacher):
            def _generate(self, *a: Any, **k: Any) -> ChatResult:
                raise ConnectionError("no network")

        with self.assertRaises(ConnectionError):
            agent_with(LocumMiddleware(FakeLocum()), Broken(lines=[AIMessage(content="")])).invoke(ASK)


class Conversion(unittest.TestCase):
    def test_messages_become_openai_messages(self) -> None:
        check = self.assertEqual
        check(_openai(SystemMessage("s")), {"role": "system", "content": "s"})
        check(_openai(HumanMessage("u")), {"role": "user", "content": "u"})
        check(
            _openai(ToolMessage("t", tool_call_id="c1", name="weigh")),
            {"role": "tool", "tool_call_id": "c1", "name": "weigh", "content": "t"},
        )
        made = _openai(AIMessage(content="", tool_calls=[call("ü")]))
        check(json.loads(made["tool_calls"][0]["function"]["arguments"]), {"thing": "ü"})
        check(_openai({"role": "user", "content": "u"}), {"role": "user", "content": "u"})

    def test_a_students_answer_converts_to_the_message_it_was_made_from(self) -> None:
        locum = FakeLocum("student", student_call("lead"))
        middleware = LocumMiddleware(locum)
        request = ModelRequest(model=two_steps(), messages=[HumanMessage("u")], tools=[weigh])
        message = middleware.wrap_model_call(request, lambda _: self.fail("the teacher was asked"))
        back = _openai(message)
        self.assertEqual(back["tool_calls"][0]["id"], "s1")
        self.assertEqual(json.loads(back["tool_calls"][0]["function"]["arguments"]), {"thing": "lead"})
        self.assertIsNone(back["content"])

    def test_the_tool_choice_narrows_the_request(self) -> None:
        specs = [{"type": "function", "function": {"name": n}} for n in ("weigh", "count")]

        def check(choice: Any, names: list[str], required: bool) -> None:
            made = _choice(ModelRequest(model=two_steps(), messages=[], tool_choice=choice), specs)
            self.assertEqual([t["function"]["name"] for t in made["tools"]], names)
            self.assertEqual(made.get("call_required", False), required)

        check(None, ["weigh", "count"], False)
        check("auto", ["weigh", "count"], False)
        check("any", ["weigh", "count"], True)
        check("required", ["weigh", "count"], True)
        check("none", [], False)
        check("count", ["count"], True)
        check({"type": "function", "function": {"name": "weigh"}}, ["weigh"], True)

    def test_a_structured_response_is_the_teachers(self) -> None:
        request = ModelRequest(model=two_steps(), messages=[], response_format={"type": "object"})  # type: ignore[arg-type]
        self.assertIn("structured", _obstacle(request) or "")


if __name__ == "__main__":
    unittest.main()
