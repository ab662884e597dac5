"""The scheduler that reports a completion once, on top of a scripted parent; vLLM's own is under it in test_stack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists

from rlsys.actors.scheduler import _Async, _Plain, _ReportOnce, report_once_scheduler, spare_seeds


class Parent:
    """A scheduler whose requests get the tokens that a test says."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.pause_state = PauseState.UNPAUSED

    def add(self, name: str, *, client: int = 0, kind: Any = RequestOutputKind.FINAL_ONLY, **sampling: Any) -> None:
        parameters = SamplingParams(output_kind=kind, **sampling)
        self.requests[name] = SimpleNamespace(request_id=name, client_index=client, sampling_params=parameters)

    def update_from_output(self, tokens: dict[str, int], ended: tuple[str, ...] = ()) -> dict[int, EngineCoreOutputs]:
        batches: dict[int, EngineCoreOutputs] = {}
        for name, token in tokens.items():
            client = self.requests[name].client_index
            finish = FinishReason.LENGTH if name in ended else None
            if finish:
                del self.requests[name]
            row = LogprobsLists(np.array([[token]]), np.array([[-float(token)]], np.float32), np.array([1]))
            output = EngineCoreOutput(name, [token], new_logprobs=row, finish_reason=finish)
            batches.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        return batches

    def has_requests(self) -> bool:
        return bool(self.requests) and self.pause_state == PauseState.UNPAUSED

    def finish_requests(self, names: list[str], _status: Any) -> list[Any]:
        return [self.requests.pop(name) for name in names]


class Quiet(_ReportOnce, Parent):  # type: ignore[misc]
    pass


def said(batches: dict[int, EngineCoreOutputs]) -> dict[str, list[int]]:
    return {output.request_id: output.new_token_ids for batch in batches.values() for output in batch.outputs}


@pytest.fixture
def quiet() -> Any:
    scheduler = Quiet()
    scheduler.add("a")
    scheduler.add("b", client=1)
    return scheduler


def test_a_completion_is_reported_once_and_whole(quiet: Any) -> None:
    assert quiet.update_from_output({"a": 1, "b": 7}) == {}
    assert quiet.update_from_output({"a": 2, "b": 8}) == {}
    batches = quiet.update_from_output({"a": 3, "b": 9}, ended=("a",))
    assert said(batches) == {"a": [1, 2, 3]}
    output = batches[0].outputs[0]
    assert output.finish_reason == FinishReason.LENGTH
    assert output.new_logprobs.logprob_token_ids.tolist() == [[1], [2], [3]]
    assert output.new_logprobs.logprobs.tolist() == [[-1.0], [-2.0], [-3.0]]
    assert output.new_logprobs.sampled_token_ranks.tolist() == [1, 1, 1]
    assert said(quiet.update_from_output({"b": 10}, ended=("b",))) == {"b": [7, 8, 9, 10]}
    assert not quiet.has_requests()


def test_a_pause_reports_what_there_is_in_one_more_step_and_then_rests(quiet: Any) -> None:
    quiet.update_from_output({"a": 1, "b": 7})
    quiet.update_from_output({"a": 2})
    quiet.pause_state = PauseState.PAUSED_ALL
    assert quiet.has_requests()
    batches = quiet.update_from_output({})
    assert {client: said({client: batch}) for client, batch in batches.items()} == {0: {"a": [1, 2]}, 1: {"b": [7]}}
    assert not quiet.has_requests()
    # A step that was under way when the pause began is reported as well, before the weights change.
    assert said(quiet.update_from_output({"a": 3})) == {"a": [3]}
    quiet.pause_state = PauseState.UNPAUSED
    assert quiet.update_from_output({"a": 4}) == {}
    assert said(quiet.update_from_output({"a": 5}, ended=("a",))) == {"a": [4, 5]}


def test_stop_strings_are_looked_for_at_every_token(quiet: Any) -> None:
    quiet.add("stops", stop=["\n```\n"])
    assert said(quiet.update_from_output({"a": 1, "stops": 5})) == {"stops": [5]}
    assert said(quiet.update_from_output({"a": 2, "stops": 6})) == {"stops": [6]}


def test_a_stream_stays_one(quiet: Any) -> None:
    quiet.add("read", kind=RequestOutputKind.DELTA)
    assert said(quiet.update_from_output({"a": 1, "read": 5})) == {"read": [5]}


def test_requests_ended_from_outside_are_forgotten(quiet: Any) -> None:
    quiet.update_from_output({"a": 1, "b": 7})
    quiet.finish_requests(["a"], None)
    quiet.pause_state = PauseState.PAUSED_ALL
    assert said(quiet.update_from_output({})) == {"b": [7]}


def test_what_else_a_batch_says_goes_through(quiet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parent, "update_from_output", lambda *_: {0: EngineCoreOutputs(finished_requests={"x"})})
    assert quiet.update_from_output()[0].finished_requests == {"x"}


@pytest.mark.parametrize(("asynchronous", "expected"), [(True, _Async), (False, _Plain)])
def test_it_takes_the_place_of_the_scheduler_that_vllm_would_use(
    monkeypatch: pytest.MonkeyPatch, asynchronous: bool, expected: type
) -> None:
    chosen: list[type] = []
    for kind in (_Async, _Plain):
        monkeypatch.setattr(kind, "__init__", lambda self, **_: chosen.append(type(self)))
    settings = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    report_once_scheduler(vllm_config=settings, kv_cache_config=None)
    assert chosen == [expected]


def test_a_generator_is_spared_where_the_token_is_thrown_away_and_is_there_again_afterwards() -> None:
    used: list[list[int]] = []

    class FakeRunner:
        def __init__(self) -> None:
            self.input_batch = SimpleNamespace(num_reqs=3, generators={0: "first", 2: "third"})
            self.discard_request_mask = SimpleNamespace(np=np.array([True, False, False, True]))

        def sample_tokens(self) -> str:
            used.append(sorted(self.input_batch.generators))
            return "sampled"

    for _ in range(2):  # made known once for each engine of a process
        spare_seeds(FakeRunner)
    runner = FakeRunner()
    assert runner.sample_tokens() == "sampled"
    assert used == [[2]]
    assert runner.input_batch.generators == {0: "first", 2: "third"}
