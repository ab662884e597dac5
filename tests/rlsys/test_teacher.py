"""A teacher behind a real local server, which misbehaves on demand: what is lost is counted, nothing hangs."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from rlsys.completions import _retry_after
from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.errors import ConfigError, ResourceError, TrainingStalledError
from rlsys.run import check
from rlsys.samplers import Answers, SamplerContext
from rlsys.samples import read_samples
from rlsys.scratch import ScratchModel, build_scratch_model
from rlsys.teacher import OpenAiTeacher
from tests.rlsys.sampling_stage import YAML, in_stage, problem

Act = Callable[[dict[str, Any], int], Awaitable[web.StreamResponse] | web.StreamResponse]
FAST: dict[str, Any] = {"retry_seconds": 0.01, "timeout_seconds": 5.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = ScratchModel(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32)
    return build_scratch_model(tmp_path_factory.mktemp("teacher") / "model", shape)


class FakeTeacher:
    """A chat-completions server: what it answers is `act(request, how many requests came before)`."""

    def __init__(self, act: Act, *, models: web.Response | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.at_once = self.most_at_once = 0
        self._act, self._models = act, models

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(request.headers)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            found = self._act(body, len(self.requests) - 1)
            return await found if isinstance(found, Awaitable) else found
        except ConnectionAbortedError:
            assert request.transport is not None
            request.transport.abort()
            raise
        finally:
            self.at_once -= 1

    async def list_models(self, _request: web.Request) -> web.Response:
        return self._models or web.json_response({"data": [{"id": "big"}]})


def choice(text: Any, *, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}


def said(*choices: dict[str, Any]) -> web.Response:
    return web.json_response({"choices": list(choices)})


def answer(body: dict[str, Any], number: int) -> web.Response:
    """`number` in a box for each choice."""
    return said(*(choice(f"\\boxed{{{number}}}") for _ in range(body.get("n", 1))))


@asynccontextmanager
async def teaching(folder: Path, server: FakeTeacher, *, overrides: Sequence[str] = (), **options: Any) -> Any:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.complete)
    app.router.add_get("/v1/models", server.list_models)
    async with TestServer(app) as running:
        teacher = OpenAiTeacher(**{"base_url": str(running.make_url("/v1")), "model": "big", **FAST, **options})
        told: list[str] = []
        config = settings(folder.parent, *overrides)
        stage = config.samples["own"]
        try:
            await teacher.start(
                SamplerContext(config=config, stage="own", model=folder, sampling=stage.sampling, tell=told.append)
            )
            teacher.told = told  # type: ignore[attr-defined]
            yield teacher
        finally:
            await teacher.close()


def settings(folder: Path, *overrides: str) -> Config:
    (folder / "teacher.yaml").write_text(YAML)
    reward = "rewards=[{name: math, use: 'tests.rlsys.test_teacher:EqualsAnswer'}]"
    return load_config(folder / "teacher.yaml", [reward, *overrides])


class EqualsAnswer:
    """1 where the problem's answer stands in a box; refuses to grade what says so, and what tells of thoughts."""

    async def score(self, problem: Any, response: str, rollout: Any) -> float:
        assert "SECRET" not in response + rollout.transcript
        if "ungradable" in response:
            raise ValueError("cannot grade this")
        return float(f"\\boxed{{{problem.answer}}}" in response)


def ask(model: Path, act: Act, *, size: int = 1, number: int = 0, **options: Any) -> tuple[Answers, FakeTeacher]:
    async def go() -> Answers:
        async with teaching(model, server, **options) as teacher:
            found: Answers = await teacher.sample(problem(number), size=size)
            return found

    server = FakeTeacher(act)
    return asyncio.run(go()), server


def reasons(answers: Answers) -> Counter[str]:
    return Counter(dict(answers.dropped))


def test_answers_are_graded_by_the_runs_rewards_and_know_who_wrote_them(model: Path) -> None:
    found, server = ask(model, answer, size=3, number=1)
    assert sorted(sample.text for sample in found.samples) == [f"\\boxed{{{n}}}" for n in range(3)]
    assert [sample.correct for sample in found.samples] == [s.text == "\\boxed{1}" for s in found.samples]
    assert all(sample.reward == float(sample.correct or 0) for sample in found.samples)
    assert all(sample.num_tokens > 1 and sample.finish_reason == "stop" for sample in found.samples)
    provenance = found.samples[0].provenance
    assert (provenance["sampler"], provenance["model"], provenance["stage"]) == ("teacher", "big", "own")
    assert provenance["base_url"].endswith("/v1")
    assert not found.dropped
    body = server.requests[0]
    assert body["messages"] == [{"role": "user", "content": "1?"}]
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("big", 1.0, 1.0, 256)
    assert "n" not in body


def test_fields_may_be_added_renamed_and_left_out(model: Path) -> None:
    _, server = ask(
        model, answer, length_field="max_completion_tokens", body={"top_p": None, "reasoning_effort": "high"}
    )
    assert server.requests[0].keys() == {
        "model",
        "messages",
        "temperature",
        "max_completion_tokens",
        "reasoning_effort",
    }


def test_several_choices_of_one_request_and_a_server_that_gives_fewer(model: Path) -> None:
    found, server = ask(model, answer, size=5, choices_per_request=4)
    assert (len(found.samples), [body.get("n", 1) for body in server.requests]) == (5, [4, 1])
    found, server = ask(model, lambda *_: said(choice("only one")), size=3, choices_per_request=4)
    assert (len(found.samples), [body.get("n", 1) for body in server.requests]) == (3, [3, 2, 1])


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_put_in_front_or_left_out(model: Path, field: str) -> None:
    def thinks(*_: Any) -> web.Response:
        return said(choice("\\boxed{0}", **{field: "Let me see.\n"}))

    kept, _ = ask(model, thinks)
    assert kept.samples[0].text == "<think>\nLet me see.\n</think>\n\n\\boxed{0}"
    assert kept.samples[0].correct
    dropped, _ = ask(model, thinks, thinking="drop")
    assert dropped.samples[0].text == "\\boxed{0}"


THOUGHT = "chat.thought={prompt: '{message} T: R:', thought_mark: 'T:', response_mark: 'R:'}"


def test_a_teacher_is_asked_for_hidden_thoughts_and_told_apart_as_the_policy_is(model: Path) -> None:
    texts = ["T: SECRET 7 R: \\boxed{0}", "T: SECRET \\boxed{0}", "\\boxed{0}"]
    found, server = ask(
        model,
        lambda _, number: said(choice(texts[number], reasoning_content="SECRET of its own")),
        size=3,
        overrides=[THOUGHT],
    )
    assert not found.dropped  # the reward saw no thought
    assert [body["messages"] for body in server.requests] == [[{"role": "user", "content": "0? T: R:"}]] * 3
    samples = {sample.text: sample for sample in found.samples}
    assert set(samples) == set(texts), "what trains is the whole text, without the server's own field"
    assert [samples[text].correct for text in texts] == [True, False, False]
    assert [samples[text].reward for text in texts] == [1.0, 0.0, 0.0]
    assert [samples[text].metrics["thought_parse_failure"] for text in texts] == [0.0, 1.0, 1.0]
    assert samples[texts[0]].metrics["thought_tokens"] > 0
    assert {sample.provenance["thinking"] for sample in found.samples} == {"drop"}


def test_an_answer_that_was_cut_off_says_so_even_within_its_thoughts(model: Path) -> None:
    found, _ = ask(
        model,
        lambda _, number: (
            said(choice("part", finish="length"))
            if number
            else said(choice(None, finish="length", reasoning_content="long thoughts"))
        ),
        size=2,
    )
    assert {sample.finish_reason for sample in found.samples} == {"length"}
    assert any("long thoughts" in sample.text for sample in found.samples)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (lambda *_: said(), "the answer has no choices"),
        (lambda *_: web.json_response([1]), "the answer has no choices: [1]"),
        (lambda *_: web.Response(text="<html>busy</html>", content_type="text/html"), "the answer is not JSON: <html>"),
        (lambda *_: web.Response(text='{"choices": [{"mess'), "the answer is not JSON"),
        (lambda *_: said(choice(None)), "a message without a text"),
        (lambda *_: said(choice("")), "an empty text"),
        (lambda *_: said(choice(7)), "a message without a text"),
        (lambda *_: said({"finish_reason": "stop"}), "a choice without a message"),
        (lambda *_: said(choice("no", finish="content_filter")), "withheld by its content filter"),
        (lambda *_: said(choice("a<|im_end|>b")), "a control token of the policy's chat"),
        (lambda *_: web.json_response({"error": {"message": "too many tokens"}}, status=400), "HTTP 400: too many tok"),
    ],
)
def test_nonsense_is_dropped_at_once_and_counted_by_reason(model: Path, response: Act, reason: str) -> None:
    found, server = ask(model, response, size=2)
    assert not found.samples
    assert sum(found.dropped.values()) == 2
    assert all(key.startswith(f"teacher_error: {reason}") for key in found.dropped), found.dropped
    assert len(server.requests) == 2


def test_a_list_of_parts_and_half_characters_are_a_text(model: Path) -> None:
    found, _ = ask(model, lambda *_: said(choice([{"type": "text", "text": "a"}, {"type": "text", "text": "\ud800b"}])))
    assert found.samples[0].text == "a?b"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_asked_again(model: Path, status: int) -> None:
    def busy(body: dict[str, Any], number: int) -> web.Response:
        return web.Response(status=status) if number < 2 else answer(body, 0)

    found, server = ask(model, busy)
    assert found.samples[0].correct
    assert len(server.requests) == 3


def test_a_dropped_connection_and_a_late_answer_are_asked_again(model: Path) -> None:
    async def flaky(body: dict[str, Any], number: int) -> web.StreamResponse:
        if number == 0:
            raise ConnectionAbortedError
        if number == 1:
            await asyncio.sleep(0.5)
        return answer(body, 0)

    found, server = ask(model, flaky, timeout_seconds=0.2)
    assert found.samples
    assert len(server.requests) == 3


def test_a_server_that_stays_down_costs_the_answers_and_says_why(model: Path) -> None:
    found, server = ask(model, lambda *_: web.Response(status=503, text="overloaded"), size=2, max_attempts=3)
    assert reasons(found) == {"teacher_error: HTTP 503: overloaded (asked 3 times)": 2}
    assert len(server.requests) == 6


def test_nothing_for_too_long_ends_the_stage(model: Path) -> None:
    with pytest.raises(
        TrainingStalledError, match=r"has answered nothing for .*give_up_seconds=0.05.*HTTP 503.*--resume"
    ):
        ask(model, lambda *_: web.Response(status=503), max_attempts=1000, give_up_seconds=0.05)


def test_the_server_says_how_long_to_wait(model: Path) -> None:
    pauses: list[float] = []

    def limited(body: dict[str, Any], number: int) -> web.Response:
        pauses.append(time.monotonic())
        return web.Response(status=429, headers={"Retry-After": "0.2"}) if number == 0 else answer(body, 0)

    ask(model, limited, retry_seconds=60.0)
    assert pauses[1] - pauses[0] >= 0.19


def test_retry_after_is_a_number_a_date_or_nothing() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100))
    assert _retry_after("2.5") == 2.5
    assert 95 < (_retry_after(soon) or 0) <= 100
    assert _retry_after("-3") == 0
    assert _retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0
    assert _retry_after("soon") is None
    assert _retry_after(None) is None


def test_no_more_requests_are_open_than_allowed(model: Path) -> None:
    async def slowly(body: dict[str, Any], number: int) -> web.Response:
        await asyncio.sleep(0.01)
        return answer(body, number)

    _, server = ask(model, slowly, size=12, concurrency=3)
    assert server.most_at_once == 3


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret-key")
    found, server = ask(model, answer, api_key_variable="TEACHER_KEY")
    assert server.headers[0]["Authorization"] == "Bearer secret-key"
    assert "secret-key" not in json.dumps(dict(found.samples[0].provenance))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"api_key_variable": "NO_SUCH_KEY"}, ConfigError, "variable NO_SUCH_KEY .*is not set"),
        (
            {"base_url": "http://127.0.0.1:9/v1"},
            ResourceError,
            r"nothing answers at http://127.0.0.1:9/v1 \(.*start the",
        ),
    ],
)
def test_a_teacher_that_is_not_there_is_an_error_at_the_start(
    model: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask(model, answer, **options)


def test_a_key_that_is_not_there_is_said_before_the_stages_in_front_of_the_teacher(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "{base_url: 'http://127.0.0.1:9/v1', model: big, api_key_variable: TEACHER_KEY}"
    teacher = f"samples.own.sampler={{use: 'rlsys.teacher:OpenAiTeacher', options: {options}}}"
    config = settings(tmp_path, teacher, f"model.path={model}")
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"variable TEACHER_KEY .*is not set"):
        check(config)
    monkeypatch.setenv("TEACHER_KEY", "secret-key")
    check(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "host/v1"}, "base_url 'host/v1' must begin with"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
        ({"choices_per_request": 0}, "choices_per_request is 0"),
        ({"thinking": "yes"}, "thinking is 'yes'"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OpenAiTeacher(**{"base_url": "http://host/v1", "model": "big", **options})


def test_a_key_in_the_place_of_its_variable_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="no name of an environment variable") as caught:
        OpenAiTeacher(base_url="http://host/v1", model="big", api_key_variable="sk-very-secret")
    assert "very-secret" not in str(caught.value)


def test_a_refused_key_and_a_wrong_address_end_the_stage(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"refuses no key: set api_key_variable \(HTTP 401: who are you\)"):
        ask(model, lambda *_: web.json_response({"error": {"message": "who are you"}}, status=401))
    with pytest.raises(ConfigError, match=r"says 404 \(.*\); correct base_url or model \('big'\)"):
        ask(model, lambda *_: web.Response(status=404, text="no model"))


def test_a_model_that_the_server_does_not_list_is_told(model: Path) -> None:
    async def told() -> list[str]:
        async with teaching(model, FakeTeacher(answer), model="small") as teacher:
            return list(teacher.told)

    (text,) = asyncio.run(told())
    assert "lists no model 'small'; it lists big" in text


def test_what_a_reward_cannot_grade_is_dropped_and_counted(model: Path) -> None:
    found, _ = ask(model, lambda _, number: said(choice("ungradable" if number else "\\boxed{0}")), size=2)
    assert len(found.samples) == 1
    assert reasons(found) == {"reward_error: reward 'math' raised ValueError: cannot grade this": 1}


def test_a_whole_stage_with_a_teacher_that_dies_and_comes_back(model: Path, tmp_path: Path) -> None:
    """Too much is lost, the stage stops; with the teacher back, resume asks for the rest only."""
    alive = 4

    def mortal(body: dict[str, Any], number: int) -> web.Response:
        return answer(body, 0) if number < alive else web.Response(status=503)

    async def attempt(server: FakeTeacher, *, resume: bool, port: int | None) -> int:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", server.complete)
        app.router.add_get("/v1/models", server.list_models)
        async with TestServer(app, port=port) as running:
            options = f"{{base_url: '{running.make_url('/v1')}', model: big, retry_seconds: 0.01, max_attempts: 2}}"
            sampler = f"samples.own.sampler={{use: 'rlsys.teacher:OpenAiTeacher', options: {options}}}"
            config = settings(
                tmp_path,
                sampler,
                f"model.path={model}",
                f"run_dir={tmp_path / 'run'}",
                "samples.own.max_problems_in_flight=1",
            )
            port = running.port
            if resume:
                await in_stage(config, resume=True, model=model)
            else:
                with pytest.raises(TrainingStalledError, match=r"could not be had.*HTTP 503"):
                    await in_stage(config, model=model)
        assert port is not None
        return port

    first, second = FakeTeacher(mortal), FakeTeacher(answer)
    port = asyncio.run(attempt(first, resume=False, port=None))
    kept = read_samples(tmp_path / "run" / "own" / "parts")
    assert len(kept) == alive
    asyncio.run(attempt(second, resume=True, port=port))
    found = read_samples(tmp_path / "run" / "own" / "samples.parquet")
    assert [sample.problem.id for sample in found] == [f"p{number}" for number in range(10) for _ in range(2)]
    assert len(second.requests) == 20 - alive
