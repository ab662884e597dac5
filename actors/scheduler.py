"""Schedulers for vLLM that report a completion once instead of token by token.

vLLM serves people who read along: after every step each running request sends its newest token from the engine's
process to the front end, where it is listed and counted. A rollout is read by nobody until it ends, and with a small
model or many sequences that traffic costs as much as the step itself. These schedulers keep a request's tokens and
log-probs in the engine's process and hand them over when the request ends or generation is paused, so that no message
mixes weight versions. Requests whose tokens are streamed, or that have stop strings, which the front end finds by
decoding, are reported as ever.

vLLM's `scheduler_cls` option takes them but does not promise to keep that interface: the tests of the real stack, which
compare every log-prob and version with the learner's, run on them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists

from rlsys.actors.engine import PROGRESS_VARIABLE

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object


class _ReportOnce(_Base):
    """Mixed into a scheduler; `_held` are the outputs not yet reported, by request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, list[EngineCoreOutput]] = {}
        shared = os.environ.get(PROGRESS_VARIABLE)
        self._written = np.memmap(shared, dtype=np.int64, shape=(1,)) if shared else np.zeros(1, dtype=np.int64)

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """As the parent does, without the outputs that can wait."""
        batches: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)
        for batch in batches.values():
            self._written[0] += sum(len(output.new_token_ids) for output in batch.outputs)
            batch.outputs = [ready for output in batch.outputs if (ready := self._ready(output)) is not None]
        if self._pausing:
            for request_id in list(self._held):
                batch = batches.setdefault(self.requests[request_id].client_index, EngineCoreOutputs())
                batch.outputs.append(self._take(request_id))
        return {client: batch for client, batch in batches.items() if not _is_empty(batch)}

    def has_requests(self) -> bool:
        """Whether a step is needed: a pause begins with one that only reports what is held."""
        return super().has_requests() or (self._pausing and bool(self._held))

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """End requests from outside; nobody waits for their tokens any more."""
        ended = super().finish_requests(*args, **kwargs)
        for request in ended:
            self._held.pop(request.request_id, None)
        return ended

    @property
    def _pausing(self) -> bool:
        return self.pause_state == PauseState.PAUSED_ALL

    def _ready(self, output: EngineCoreOutput) -> EngineCoreOutput | None:
        """Everything of this output's request if it must be reported now."""
        self._held.setdefault(output.request_id, []).append(output)
        request = self.requests.get(output.request_id)
        if output.finished or request is None or _is_followed(request.sampling_params):
            return self._take(output.request_id)
        return None

    def _take(self, request_id: str) -> EngineCoreOutput:
        held = self._held.pop(request_id)
        return held[0] if len(held) == 1 else _joined(held)


def _joined(outputs: list[EngineCoreOutput]) -> EngineCoreOutput:
    """The consecutive outputs of one request as one: the last of them, with the tokens of all."""
    first, last = outputs[0], outputs[-1]
    last.new_token_ids = [token for output in outputs for token in output.new_token_ids]
    parts = [output.new_logprobs for output in outputs if output.new_logprobs is not None]
    if parts:
        last.new_logprobs = LogprobsLists(
            np.concatenate([part.logprob_token_ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.sampled_token_ranks for part in parts]),
        )
    # Said once, with the first token.
    last.prefill_stats = first.prefill_stats
    last.new_prompt_logprobs_tensors = first.new_prompt_logprobs_tensors
    return last


def _is_followed(sampling: SamplingParams | None) -> bool:
    """Whether the front end looks at every token: for a reader, or for strings to stop at."""
    return sampling is None or bool(sampling.stop) or sampling.output_kind != RequestOutputKind.FINAL_ONLY


def _is_empty(batch: EngineCoreOutputs) -> bool:
    return not batch.outputs and batch.finished_requests is None and batch.scheduler_stats is None


class _Plain(_ReportOnce, Scheduler):
    pass


class _Async(_ReportOnce, AsyncScheduler):
    pass


def spare_seeds(runner_class: Any) -> None:
    """Let a CPU engine live through a seeded request whose prompt is read in several steps.

    A token is sampled in each of them and thrown away. vLLM then turns the request's generator back by an offset, which
    generators on CPUs do not have, and the engine dies. So in such a step the generator is not given to be used.
    """
    original = runner_class.sample_tokens
    if getattr(original, "spares_seeds", False):
        return

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        thrown_away = np.nonzero(self.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        aside = {index: batch.generators.pop(index) for index in thrown_away if index in batch.generators}
        try:
            return original(self, *args, **kwargs)
        finally:
            batch.generators.update(aside)

    sample_tokens.spares_seeds = True  # type: ignore[attr-defined]
    runner_class.sample_tokens = sample_tokens


def report_once_scheduler(*, vllm_config: Any, **options: Any) -> Scheduler:
    """The scheduler to use where vLLM would use its own plain or asynchronous one."""
    if vllm_config.device_config.device_type == "cpu":
        # The runner is in this process: a CPU engine has one worker.
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        spare_seeds(CPUModelRunner)
    chosen = _Async if vllm_config.scheduler_config.async_scheduling else _Plain
    return chosen(vllm_config=vllm_config, **options)
