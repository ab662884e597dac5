"""Tools in actors of their own: sessions that survive their actor, places that run out, pools that grow and shrink."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pool_plugins
import pytest
from pool_plugins import EVENTS, HOOKS, Caller, FakeActor, never

from rlsys import cluster, places
from rlsys.actors.rollout import RolloutActor
from rlsys.actors.tool import ToolActor
from rlsys.chat import Chat
from rlsys.config import Config, PoolConfig, PooledPlugIn, SamplingConfig
from rlsys.config_file import load_config
from rlsys.errors import ActorError, ConfigError, ResourceError, ToolError
from rlsys.interfaces import Session, ToolResult
from rlsys.places import MAX_ATTEMPTS
from rlsys.plugins import build
from rlsys.pool import ActorPool
from rlsys.remote_tool import RemoteTool
from rlsys.run import _demands
from rlsys.scratch import byte_tokenizer
from rlsys.types import Completion, Problem, RolloutGroup

TOKENIZER = byte_tokenizer()
ADDER, PYTHON = "pool_plugins:Adder", "rlsys.tools.python:PythonTool"


@pytest.fixture(autouse=True)
def nothing_ordered() -> None:
    EVENTS.clear()
    HOOKS.clear()


def pooled(use: str = ADDER, options: Mapping[str, Any] | None = None, **settings: Any) -> PooledPlugIn:
    return PooledPlugIn(use=use, options=dict(options or {}), actors=PoolConfig(**settings))


def make(count: int = 2, plug_in: PooledPlugIn | None = None, **settings: Any) -> tuple[RemoteTool, list[FakeActor]]:
    """A remote tool and its actors."""
    plug_in = plug_in or pooled(**settings)
    actors = [FakeActor(f"tools.0 actor {index}", plug_in) for index in range(count)]
    assert plug_in.actors is not None
    tool = RemoteTool(build(plug_in.use, plug_in.options, place="tools.0"), plug_in.actors)
    tool.use_actors(actors)  # type: ignore[arg-type]
    return tool, actors


async def add(session: Session, number: int, **more: Any) -> str:
    return (await session.call({"add": number, **more})).text


async def loads(actors: Sequence[FakeActor]) -> list[int]:
    return [await actor.host.num_sessions() for actor in actors]


async def home(actors: Sequence[FakeActor]) -> FakeActor:
    """The living actor with the one session that there is."""
    (found,) = [actor for actor in actors if actor.alive and await actor.host.num_sessions()]
    return found


async def settled() -> None:
    """Let everything run that needs no waiting."""
    for _ in range(50):
        await asyncio.sleep(0)


def at_once() -> Coroutine[Any, Any, None]:
    return asyncio.sleep(0)


async def transcript(tool: Any, calls: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """What a rollout reads of the tool, the error that ends it included."""
    told = []
    session = await tool.open("r")
    try:
        for arguments in calls:
            result = await session.call(arguments)
            told.append((result.text, result.ok))
    except (ToolError, RuntimeError) as error:
        told.append((str(error), False))
    finally:
        await session.close()
    return told


# --- what a rollout sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "calls"),
    [
        (ADDER, [{"add": 2}, {"add": -5}, {}]),
        (
            PYTHON,
            [
                {"code": "x = 20\nprint('set')"},
                {"code": "x + 1"},
                {"code": "1 / 0"},
                {"wrong": "x"},
                {"code": "print('y' * 5000)"},
                {"code": "[x] * 3"},
            ],
        ),
    ],
)
def test_a_remote_tool_answers_as_the_tool_itself(use: str, calls: list[dict[str, Any]]) -> None:
    async def main() -> None:
        remote, _ = make(plug_in=pooled(use))
        inline = build(use, {}, place="test")
        assert (remote.name, remote.description) == (inline.name, inline.description)
        assert remote.parameters == inline.parameters
        here = await transcript(inline, calls)
        assert len(here) == len(calls)
        assert await transcript(remote, calls) == here

    asyncio.run(main())


def test_what_a_tool_raises_arrives_as_what_it_is_and_moves_no_session() -> None:
    async def main() -> None:
        tool, actors = make()
        session = await tool.open("r")
        with pytest.raises(ToolError, match=r"^tool 'adder' raised RuntimeError: the disk is full$"):
            await session.call({"fail": "the disk is full"})
        assert await add(session, 3) == "sum 3"
        assert EVENTS.count("open r") == 1
        await session.close()
        assert await loads(actors) == [0, 0]

    asyncio.run(main())


@pytest.mark.parametrize("fail", ["open", "close"])
def test_a_tool_that_cannot_open_or_close_a_session_says_so_and_leaves_none(fail: str) -> None:
    async def main() -> None:
        tool, actors = make(plug_in=pooled(options={"fail": fail}))
        with pytest.raises(ToolError, match=r"tool 'adder' raised RuntimeError: (no room|cannot end)"):
            await (await tool.open("r")).close()
        assert await loads(actors) == [0, 0]

    asyncio.run(main())


def test_sessions_are_spread_and_an_actor_that_lost_some_is_filled_up_first() -> None:
    async def main() -> None:
        tool, actors = make(3)
        sessions = [await tool.open(f"r{number}") for number in range(6)]
        assert await loads(actors) == [2, 2, 2]
        for session in sessions:
            if session._place.actor is actors[1]:  # type: ignore[union-attr,comparison-overlap]
                await session.close()
        assert await loads(actors) == [2, 0, 2]
        await tool.open("r6")
        await tool.open("r7")
        assert await loads(actors) == [2, 2, 2]

    asyncio.run(main())


# --- actors that die, hang or forget ---------------------------------------------------------------------------------


def test_a_session_whose_actor_dies_in_mid_call_goes_on_elsewhere_with_the_same_state() -> None:
    async def main() -> None:
        tool, actors = make()
        session = await tool.open("r")
        assert [await add(session, 2), await add(session, 3)] == ["sum 2", "sum 5"]
        first = await home(actors)

        async def die_the_first_time() -> None:
            HOOKS["mid"] = at_once
            first.die()
            await never()

        HOOKS["mid"] = die_the_first_time
        assert await add(session, 10, hook="mid") == "sum 15"
        assert await home(actors) is not first
        assert await add(session, 1) == "sum 16"

    asyncio.run(main())


def test_an_actor_that_was_replaced_has_forgotten_and_is_told_again() -> None:
    async def main() -> None:
        tool, (actor,) = make(1)
        session = await tool.open("r")
        await add(session, 2)
        actor.die()
        actor.come_back()
        assert await add(session, 3) == "sum 5"
        assert EVENTS == ["start", "open r", "start", "open r"]

    asyncio.run(main())


def test_a_rollout_waits_for_the_replacement_of_its_only_actor() -> None:
    async def main() -> None:
        tool, (actor,) = make(1, wait_seconds=60)
        session = await tool.open("r")
        await add(session, 2)
        actor.die()
        call = asyncio.create_task(add(session, 3))
        await settled()
        assert not call.done()
        actor.come_back()
        assert await call == "sum 5"

    asyncio.run(main())


def test_a_session_whose_replay_differs_is_never_continued() -> None:
    async def main() -> None:
        tool, actors = make()
        session = await tool.open("r")
        await session.call({"mark": True})
        (await home(actors)).die()
        with pytest.raises(ToolError, match="another answer than the policy had read"):
            await add(session, 1)
        await session.close()
        await settled()
        assert [await actor.host.num_sessions() for actor in actors if actor.alive] == [0]

    asyncio.run(main())


def test_an_answer_that_differs_in_nothing_but_its_success_is_another_one() -> None:
    async def main() -> None:
        tool, actors = make()
        session = await tool.open("r")
        await add(session, 1)
        session._journal[0] = ({"add": 1}, ToolResult(text="sum 1", ok=False))
        (await home(actors)).die()
        with pytest.raises(ToolError, match="another answer"):
            await add(session, 1)

    asyncio.run(main())


def test_with_all_actors_dead_the_call_fails_at_its_deadline() -> None:
    async def main() -> None:
        tool, actors = make(wait_seconds=0.2)
        session = await tool.open("r")
        for actor in actors:
            actor.die()
        with pytest.raises(ToolError, match=r"none of its 2 actors had a place within 0\.2 s"):
            await add(session, 1)

    asyncio.run(main())


def test_a_call_that_kills_its_actors_is_not_tried_on_all_of_them() -> None:
    async def main() -> None:
        tool, actors = make(5)
        session = await tool.open("r")
        await add(session, 1)

        async def poison() -> None:
            (await home(actors)).die()
            await never()

        HOOKS["poison"] = poison
        with pytest.raises(ToolError, match=r"3 actors in a row did not survive one call; .*died during call"):
            await add(session, 1, hook="poison")
        assert sum(not actor.alive for actor in actors) == MAX_ATTEMPTS == 3

    asyncio.run(main())


def test_a_hung_actor_is_left_and_asked_again_only_after_it_has_answered() -> None:
    async def main() -> None:
        tool, actors = make(call_seconds=1.0)
        session = await tool.open("r")
        await add(session, 1)
        hung = await home(actors)
        hung.awake.clear()
        assert await add(session, 1) == "sum 2"
        others = [await tool.open(f"r{number}") for number in range(3)]
        assert hung.asked == ["open", "call", "call", "close"]
        hung.awake.set()
        await settled()
        assert await hung.host.num_sessions() == 0
        await tool.open("r4")
        assert await hung.host.num_sessions() == 1
        assert sorted(await loads(actors)) == [1, 1 + len(others)]

    asyncio.run(main())


def test_an_actor_that_comes_back_to_a_host_where_the_tool_cannot_start_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        tool, actors = make()
        await actors[0].host.start()

        async def refuse(_: object) -> None:
            raise RuntimeError("no sandbox on this host")

        monkeypatch.setattr(pool_plugins.Adder, "start", refuse)
        for number in range(4):
            await tool.open(f"r{number}")
        assert await loads(actors) == [4, 0]

    asyncio.run(main())


# --- places ----------------------------------------------------------------------------------------------------------


def test_who_finds_all_places_taken_waits_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_PAUSE_SECONDS", "LAST_PAUSE_SECONDS"):
        monkeypatch.setattr(places, name, 600.0)  # it is the end of a session that lets the next one in

    async def main() -> None:
        tool, actors = make(max_sessions=1, wait_seconds=60)
        first, second = await tool.open("a"), await tool.open("b")
        waiting = [asyncio.create_task(tool.open(name)) for name in ("c", "d")]
        await settled()
        assert await loads(actors) == [1, 1]
        await second.close()
        waiting.append(asyncio.create_task(tool.open("e")))
        third = await waiting[0]
        await settled()
        assert not waiting[1].done()
        await first.close()
        fourth = await waiting[1]
        await third.close()
        fifth = await waiting[2]
        await fourth.close()
        await fifth.close()
        assert await loads(actors) == [0, 0]
        assert [event for event in EVENTS if event.startswith("open")] == [f"open {name}" for name in "abcde"]

    asyncio.run(main())


def test_a_place_that_another_caller_gives_back_is_found() -> None:
    async def main() -> None:
        plug_in = pooled(max_sessions=1, wait_seconds=60)
        tool, actors = make(1, plug_in)
        other, _ = make(1, plug_in)
        other.use_actors(actors)  # type: ignore[arg-type]
        taken = await other.open("a")
        waiting = asyncio.create_task(tool.open("b"))
        await settled()
        assert not waiting.done()
        await taken.close()
        await add(await waiting, 1)

    asyncio.run(main())


def test_the_wait_for_a_place_has_a_deadline_in_line_and_at_its_head() -> None:
    async def main() -> None:
        tool, actors = make(1, max_sessions=1, wait_seconds=0.2)
        held = await tool.open("a")
        failures = await asyncio.gather(tool.open("b"), tool.open("c"), return_exceptions=True)
        assert [type(failure) for failure in failures] == [ToolError, ToolError]
        assert "give it more actors (count) or room in each (max_sessions)" in str(failures[1])
        await held.close()
        await (await tool.open("d")).close()
        assert await loads(actors) == [0]

    asyncio.run(main())


def test_a_rollout_that_is_cancelled_while_its_session_opens_leaves_none() -> None:
    async def main() -> None:
        tool, actors = make()
        HOOKS["open"] = never
        opening = asyncio.create_task(tool.open("r"))
        await settled()
        assert sum(await loads(actors)) == 1
        opening.cancel()
        await settled()
        assert opening.cancelled()
        assert await loads(actors) == [0, 0]
        HOOKS.clear()
        await tool.open("r1")
        await tool.open("r2")
        assert await loads(actors) == [1, 1]

    asyncio.run(main())


# --- the tool actor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "end"), [("Adder", "end"), ("SlowlyEndingAdder", "end, awaited")])
def test_an_actor_starts_its_tool_once_and_ends_sessions_before_it(kind: str, end: str) -> None:
    async def main() -> None:
        host = ToolActor(plug_in=pooled(f"pool_plugins:{kind}"), place="tools.0")
        await asyncio.gather(host.start(), host.open("1", "a"), host.start())
        assert await host.open("2", "b")
        await host.close("1")
        await host.close("1")
        await host.close_all()
        assert not await host.open("3", "c")
        assert await host.num_sessions() == 0

    asyncio.run(main())
    assert list(EVENTS) == ["start", "open a", "open b", "close a", "close b", end]


def test_a_session_that_cannot_end_does_not_keep_the_tool_from_ending() -> None:
    async def main() -> None:
        host = ToolActor(plug_in=pooled(options={"fail": "close"}), place="tools.0")
        await host.open("1", "a")
        with pytest.raises(ToolError, match="cannot end"):
            await host.close_all()

    asyncio.run(main())
    assert EVENTS[-1] == "end"


# --- the pool in the driver ------------------------------------------------------------------------------------------


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[FakeActor]:
    """All actors that were ever placed."""
    made: list[FakeActor] = []

    def place(
        cls: type, demand: cluster.Demand, arguments: Sequence[Mapping[str, Any]], **options: Any
    ) -> list[FakeActor]:
        assert cls is ToolActor
        assert options["restarts"]
        indices = range(options["first_index"], options["first_index"] + len(arguments))
        new = [FakeActor(f"{demand.what} {i}", a["plug_in"]) for i, a in zip(indices, arguments, strict=True)]
        made.extend(new)
        return new

    monkeypatch.setattr(cluster, "place", place)
    return made


async def start_pool(plug_in: PooledPlugIn) -> tuple[ActorPool, RemoteTool]:
    """A pool, and a tool that is told of it."""
    tool, _ = make(0, plug_in)

    async def tell(actors: Sequence[Any]) -> None:
        tool.use_actors(actors)

    made = ActorPool(plug_in, place="tools.0")
    await made.start()
    await made.serve(tell)
    return made, tool


def names(actors: Sequence[Any]) -> list[str]:
    return [actor.name for actor in actors]


def test_a_pool_grows_and_shrinks_and_every_actor_serves_only_when_started(placed: list[FakeActor]) -> None:
    async def main() -> None:
        made, tool = await start_pool(pooled(count=1))
        first = await tool.open("a")
        await made.resize(3)
        assert EVENTS.count("start") == 3
        sessions = [await tool.open(name) for name in "bc"]
        assert await loads(placed) == [1, 1, 1]
        for session in (first, *sessions):
            await session.close()
        await made.resize(1)
        assert [actor.killed for actor in placed] == [[], ["for good"], ["for good"]]
        await made.resize(2)
        assert names(made.actors) == ["tools.0 actor 0", "tools.0 actor 3"]
        await made.close()
        assert [actor.alive for actor in placed] == [False] * 4
        assert EVENTS.count("end") == 4

    asyncio.run(main())


def test_a_surplus_actor_takes_no_session_and_ends_with_its_last_one(placed: list[FakeActor]) -> None:
    async def main() -> None:
        made, tool = await start_pool(pooled(count=2))
        sessions = [await tool.open(name) for name in "ab"]
        (leaving,) = [s for s in sessions if s._place.actor.name == "tools.0 actor 1"]  # type: ignore[union-attr]
        resizing = asyncio.create_task(made.resize(1))
        await settled()
        for name in "cd":
            await tool.open(name)
        assert await loads(placed) == [3, 1]
        assert await add(leaving, 2) == "sum 2"
        assert not resizing.done()
        await leaving.close()
        await resizing
        assert [actor.killed for actor in placed] == [[], ["for good"]]
        assert EVENTS.count("open a") + EVENTS.count("open b") == 2

    asyncio.run(main())


def test_past_its_deadline_a_surplus_actor_ends_and_its_sessions_go_on_elsewhere(placed: list[FakeActor]) -> None:
    async def main() -> None:
        made, tool = await start_pool(pooled(count=3))
        sessions = [await tool.open(name) for name in "abc"]
        assert [await add(session, 2) for session in sessions] == ["sum 2"] * 3
        await made.resize(1, drain_seconds=0.0)
        assert [await add(session, 3) for session in sessions] == ["sum 5"] * 3
        assert await placed[0].host.num_sessions() == 3

    asyncio.run(main())


@pytest.mark.usefixtures("placed")
def test_what_a_session_answers_because_it_is_taken_away_is_not_read() -> None:
    async def main() -> None:
        made, tool = await start_pool(pooled(count=2))
        sessions = [await tool.open(name) for name in "ab"]
        (leaving,) = [s for s in sessions if s._place.actor.name == "tools.0 actor 1"]  # type: ignore[union-attr]
        assert await add(leaving, 2) == "sum 2"
        closing = asyncio.Event()

        async def until_it_is_closed() -> None:
            HOOKS["mid"] = at_once
            await closing.wait()

        async def answer_first() -> None:
            closing.set()
            await settled()

        HOOKS.update(mid=until_it_is_closed, close=answer_first)
        call = asyncio.create_task(add(leaving, 3, hook="mid"))
        await settled()
        await made.resize(1, drain_seconds=0.0)
        assert await call == "sum 5"

    asyncio.run(main())


def test_a_pool_that_cannot_grow_stays_as_it_was(placed: list[FakeActor], monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: object) -> None:
        raise RuntimeError("no sandbox on this host")

    async def hang(_: object) -> None:
        await never()

    async def main() -> None:
        made, tool = await start_pool(pooled(count=1, start_seconds=0.1))
        with pytest.raises(ConfigError, match=r"tools\.0 cannot have 0 actors"):
            await made.resize(0)
        monkeypatch.setattr(pool_plugins.Adder, "start", refuse)
        with pytest.raises(ActorError, match="no sandbox on this host"):
            await made.resize(2)
        monkeypatch.setattr(pool_plugins.Adder, "start", hang)
        with pytest.raises(ResourceError, match=r"did not answer within 0\.1 s; .* 1 CPU for each of 2 more"):
            await made.resize(3)
        assert names(made.actors) == ["tools.0 actor 0"]
        assert [actor.alive for actor in placed] == [True, False, False, False]
        await add(await tool.open("a"), 1)

    asyncio.run(main())


@pytest.mark.usefixtures("placed")
def test_a_tool_that_cannot_start_fails_the_pool_at_its_start() -> None:
    with pytest.raises(ActorError, match="no sandbox on this host"):
        asyncio.run(start_pool(pooled(options={"fail": "start"})))


def test_an_actor_that_hangs_is_replaced_and_one_that_died_is_left_to_ray(placed: list[FakeActor]) -> None:
    async def main() -> None:
        made, _ = await start_pool(pooled(count=3, call_seconds=0.1, watch_seconds=0.01))
        notes: list[tuple[str, str]] = []
        made.note = lambda name, what: notes.append((name, what))
        placed[0].awake.clear()
        placed[1].die()
        async with asyncio.timeout(30):
            while not placed[0].killed:
                await asyncio.sleep(0.01)
        assert [actor.killed for actor in placed] == [["to be replaced"], [], []]
        assert {name for name, _ in notes} == {placed[0].name, placed[1].name}
        assert any(what.startswith("is killed and replaced") for name, what in notes if name == placed[0].name)
        await made.close()

    asyncio.run(main())


def test_no_look_waits_for_the_one_at_another_actor(placed: list[FakeActor]) -> None:
    async def main() -> None:
        made, _ = await start_pool(pooled(count=2, call_seconds=1.0, watch_seconds=0.01))
        looks = asyncio.Event()
        call = placed[0].call

        async def slow(method: str, *args: Any, seconds: float) -> Any:
            if method == "state":
                await looks.wait()
            return await call(method, *args, seconds=seconds)

        placed[0].call = slow  # type: ignore[method-assign]
        placed[1].awake.clear()
        async with asyncio.timeout(30):
            while not placed[1].killed:
                await asyncio.sleep(0.01)
        assert placed[0].killed == []
        looks.set()
        await made.close()

    asyncio.run(main())


# --- in a run --------------------------------------------------------------------------------------------------------

YAML = """\
name: demo
model: {scratch: {hidden_size: 32, num_heads: 2, num_kv_heads: 1}}
data:
  train: {use: "stack_plugins:words_problems", options: {size: 1}}
  held_out: {use: "stack_plugins:words_problems", options: {size: 1}}
rewards: [{use: "pool_plugins:zero"}]
actors: {count: 3, cpus: 2}
chat: {tool_format: template, template_options: {}}
"""


def load(file: Path, more: str) -> Config:
    file.write_text(YAML + more)
    return load_config(file)


def test_pools_are_asked_for_beside_rollout_actors_and_learners(tmp_path: Path) -> None:
    config = load(
        tmp_path / "run.yaml",
        "tools:\n"
        "  - {use: a:b}\n"
        "  - {use: a:c, options: {x: 1}, actors: {count: 4, cpus: 1.5, gpus: 0.25, resources: {tools: 1}}}\n",
    )
    assert config.tools[0].actors is None
    asked = [(demand.what, demand.count, demand.each) for demand in _demands(config, ["rl"])]
    assert asked == [
        ("rollout actor", 3, {"CPU": 2.0}),
        ("tools.1 actor", 4, {"CPU": 1.5, "GPU": 0.25, "tools": 1.0}),
        ("learner rank", 2, {"CPU": 1.0}),
    ]
    assert [demand.what for demand in _demands(config, ["sft"])] == ["learner rank"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("tools: [{use: a:b, actors: {count: 0}}]", "count of a plug-in's actors is 0"),
        ("tools: [{use: a:b, actors: {max_sessions: 0}}]", "max_sessions of a plug-in's actors is 0"),
        ("tools: [{use: a:b, actors: {call_seconds: 0}}]", r"call_seconds of a plug-in's actors is 0\.0"),
        ("tools: [{use: a:b, actors: {cont: 2}}]", "count"),
        ("sft: {demonstrations: {use: a:b, actors: {count: 1}}}", "'actors'"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(tmp_path: Path, more: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path / "run.yaml", more)


class CallingEngine:
    """Calls the tool in every turn and is content with the second answer."""

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:  # noqa: ARG002
        await asyncio.sleep(0)
        said = TOKENIZER.decode(prompt)
        calls = said.count("<tool_call>{")
        text = (
            "done" if calls == 2 else '<tool_call>{"name": "adder", "arguments": {"add": 4, "hook": "mid"}}</tool_call>'
        )
        tokens = np.array(TOKENIZER.encode(text + TOKENIZER.eos_token, add_special_tokens=False), dtype=np.int32)
        return Completion(
            tokens=tokens,
            logprobs=np.zeros(len(tokens), dtype=np.float32),
            versions=np.zeros(len(tokens), dtype=np.int32),
            text="",
            finish_reason="stop",
        )

    def close(self) -> None:
        EVENTS.append("engine closed")


def rollout_actor(folder: Path, more: str) -> RolloutActor:
    actor = RolloutActor(config=load(folder / "run.yaml", more), model_path="model", index=0)
    actor._engine = CallingEngine()
    actor._chat = Chat(TOKENIZER, actor._tools, tool_format="template")
    return actor


def act(actor: RolloutActor, size: int) -> Coroutine[Any, Any, RolloutGroup]:
    problem = Problem(id="p", prompt=({"role": "user", "content": "?"},))
    return actor.act(problem, size=size, sampling=SamplingConfig(max_response_tokens=400), group_id="g")


@pytest.mark.parametrize(
    "more", ["tools: [{use: 'pool_plugins:Adder'}]", "tools: [{use: 'pool_plugins:Adder', actors: {}}]"]
)
def test_a_rollout_whose_tool_fails_is_dropped_and_counted(tmp_path: Path, more: str) -> None:
    async def main() -> None:
        actor = rollout_actor(tmp_path, more)
        if "actors" in more:
            await actor.use_actors("tools.0", [FakeActor("tools.0 actor 0", pooled())])  # type: ignore[list-item]
        turn = itertools.count()

        async def fail_in_the_first_rollout() -> None:
            if next(turn) == 0:
                raise OSError("no space left")

        HOOKS["mid"] = fail_in_the_first_rollout
        group = await act(actor, 3)
        assert group.dropped == {"tool_error: tool 'adder' raised OSError: no space left": 1}
        assert [rollout.metrics["tool_calls"] for rollout in group.rollouts] == [2.0, 2.0]
        assert all("sum 4" in rollout.transcript and "sum 8" in rollout.transcript for rollout in group.rollouts)
        assert sum(event.startswith("close") for event in EVENTS) == 3
        await actor.close()
        assert EVENTS[-1] == ("engine closed" if "actors" in more else "end")

    asyncio.run(main())


def test_a_group_whose_tool_actor_dies_in_the_middle_is_whole(tmp_path: Path) -> None:
    async def main() -> None:
        actor = rollout_actor(tmp_path, "tools: [{use: 'pool_plugins:Adder', actors: {}}]")
        actors = [FakeActor(f"tools.0 actor {index}", pooled()) for index in range(2)]
        await actor.use_actors("tools.0", actors)  # type: ignore[arg-type]
        turn = itertools.count()

        async def kill_in_the_middle() -> None:
            if next(turn) == 5:
                actors[0].die()

        HOOKS["mid"] = kill_in_the_middle
        group = await act(actor, 4)
        assert (group.dropped, len(group.rollouts)) == ({}, 4)
        assert all("sum 4" in rollout.transcript and "sum 8" in rollout.transcript for rollout in group.rollouts)
        assert EVENTS.count("start") == 2
        assert sum(event.startswith("open") for event in EVENTS) > 4

    asyncio.run(main())


# --- on Ray ----------------------------------------------------------------------------------------------------------


async def holder(actors: Sequence[Any]) -> Any:
    """The actor that has the one session."""
    counts = await asyncio.gather(*(actor.call("num_sessions", seconds=60) for actor in actors))
    assert sorted(counts) == [0] * (len(counts) - 1) + [1]
    return actors[counts.index(1)]


async def kill_process(actor: Any) -> None:
    os.kill(await actor.call("pid", seconds=60), signal.SIGKILL)


async def all_answer(actors: Sequence[Any]) -> None:
    """Wait for replacements."""
    async with asyncio.timeout(60):
        while True:
            try:
                await asyncio.gather(*(actor.call("num_sessions", seconds=60) for actor in actors))
                return
            except ActorError:
                await asyncio.sleep(0.1)


def test_on_ray_a_session_outlives_its_actors_and_a_pool_is_resized(on_ray: asyncio.Runner) -> None:
    plug_in = pooled(PYTHON, count=2, cpus=0.1)
    made = ActorPool(plug_in, place="tools.0", host="pool_plugins:TellingToolActor")
    demand = cluster.Demand(what="caller", count=1, cpus=0.1)
    (caller,) = cluster.place(
        Caller, demand, [{"use": PYTHON, "pool": plug_in.actors}], call_seconds=120, concurrency=16
    )

    async def ask(code: str) -> str:
        result = await caller.call("ask", "r", {"code": code})
        assert result.ok
        return str(result.text)

    async def main() -> None:
        await made.start()
        await made.serve(partial(caller.call, "use_actors"))
        await caller.call("open", "r")
        assert [await ask("x = [20]\nx"), await ask("x.append(1)\nx")] == ["[20]", "[20, 1]"]
        await kill_process(await holder(made.actors))
        assert await ask("x.append(2)\nx") == "[20, 1, 2]"
        await all_answer(made.actors)
        under_way = asyncio.ensure_future(ask("import time\nx.append(3)\ntime.sleep(1)\nx"))
        living = await holder(made.actors)
        await asyncio.sleep(0.3)
        await kill_process(living)
        assert await under_way == "[20, 1, 2, 3]"
        await all_answer(made.actors)
        await made.resize(3)
        assert names(made.actors) == ["tools.0 actor 0", "tools.0 actor 1", "tools.0 actor 2"]
        await caller.call("open", "s")
        await made.resize(1, drain_seconds=0.0)
        assert await ask("x") == "[20, 1, 2, 3]"
        assert (await caller.call("ask", "s", {"code": "1"})).text == "1"
        assert await made.actors[0].call("num_sessions") == 2
        for name in "rs":
            await caller.call("close", name)
        assert await made.actors[0].call("num_sessions") == 0

    try:
        on_ray.run(main())
    finally:
        on_ray.run(made.close())
        caller.kill()
