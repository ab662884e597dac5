"""vLLM's asynchronous engine behind a few calls: the one place that knows its API (0.32)."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.config import ActorsConfig
from rlsys.errors import ActorError, EngineDiedError
from rlsys.shared_weights import SharedPlace
from rlsys.types import Completion
from rlsys.weights import GLOO_BACKEND, NCCL_BACKEND, WeightGroup, WeightPlan

PROGRESS_VARIABLE = "RLSYS_PROGRESS_FILE"
"""Where the scheduler finds the number in which it counts tokens."""


class VllmEngine:
    """One engine with its own worker processes; many generations run in it at once."""

    def __init__(self, *, model_path: str, config: ActorsConfig, seed: int) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.kv_cache_gib))
        # Two engines on one machine must not both bind their thread to the first core.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if not config.gpus:
            # Else a CPU engine puts its one worker into a process of its own and spins while it waits for it, which
            # takes a core from the neighbours.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.backend = NCCL_BACKEND if config.gpus else GLOO_BACKEND
        self._sync_seconds = config.sync_seconds
        self._ids = itertools.count()
        self._updates = 0
        options: dict[str, Any] = {
            "model": model_path,
            "dtype": config.dtype,
            "seed": seed,
            "max_model_len": config.max_model_tokens,
            "max_num_seqs": config.max_rollouts,
            "enable_prefix_caching": True,
            "enforce_eager": not config.gpus,
            "tensor_parallel_size": max(1, int(config.gpus)),
            "logprobs_mode": "processed_logprobs",
            "weight_transfer_config": WeightTransferConfig(backend=self.backend),
            "scheduler_cls": "rlsys.actors.scheduler.report_once_scheduler",
            "worker_extension_cls": "rlsys.actors.weights.WorkerExtension",
            "disable_log_stats": True,
            **config.engine_options,
        }
        self._running = 0
        with progress_file() as self._progress:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    async def start(self) -> None:
        """Mark the weights that the engine was made with as version 0; for those that no learner updates."""
        await self.resume(0)

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:
        """Continue `prompt`; every token comes with its log-prob and the version of the weights that wrote it.

        With `allowed_token_ids` no other token is written, and log-probs are normalised over these.
        """
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        stop = list(sampling["stop"])
        parameters = SamplingParams(
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            max_tokens=sampling["max_tokens"],
            ignore_eos=bool(sampling.get("ignore_eos", False)),
            seed=sampling.get("seed"),
            allowed_token_ids=sampling.get("allowed_token_ids"),
            stop=stop or None,
            detokenize=bool(stop),  # costs more than all else in the front end; `Completion.text` is empty without
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = None
        self._running += 1
        try:
            with _while_it_lives():
                # What is cached under other weights has another salt. (Versions may repeat: a learner can be set back.)
                asked = TokensPrompt(prompt_token_ids=list(prompt), cache_salt=str(self._updates))
                async for output in self._llm.generate(asked, parameters, request_id=str(next(self._ids))):
                    final = output
        finally:
            self._running -= 1
        assert final is not None
        return _to_completion(final.outputs[0])

    async def pulse(self) -> dict[str, float]:
        """A sign of life: `tokens` that were written so far, and how many generations are `running`.

        Raises:
            EngineDiedError: the engine's own process has ended.
        """
        if self._llm.errored:
            raise EngineDiedError("the engine's own process has ended; its log says why")
        return {"tokens": float(self._progress[0]), "running": float(self._running)}

    async def pause(self) -> None:
        """Freeze what was asked for so far, with its keys and values: it goes on from there. Later prompts use none.

        To have vLLM clear its cache would be to read every prompt and response in flight again. Its `pause_generation`
        is this call and a sleep of 20 ms, which would be for those who look at outputs between steps.
        """
        with _while_it_lives():
            await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        self._updates += 1  # what comes from here on is read with the next weights

    async def resume(self, version: int) -> None:
        """Go on; from here every token is marked with `version`."""
        with _while_it_lives():
            await self._llm.update_weight_version(str(version))
            await self._llm.resume_generation()

    async def open_weights(self, group: WeightGroup, *, rank: int) -> None:
        """Meet the learner at `group`; this engine's first worker has `rank`."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        info = {**asdict(group), "rank_offset": rank}
        info |= {"seconds": self._sync_seconds} if self.backend == GLOO_BACKEND else {"packed": True}
        with _while_it_lives():
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def receive_weights(self, plan: WeightPlan, *, published: SharedPlace | None = None) -> dict[str, int]:
        """Receive and load one full set of weights (the engine must be paused); returns checksums of what arrived.

        What was `published` by a learner on this host is read there: it need not send, nor have met this engine.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        info = asdict(plan) | ({} if published is None else {"published": asdict(published)})
        with _while_it_lives():
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))
            await self._llm.finish_weight_update()
            workers = await self._llm.collective_rpc("received_checksums")
        if any(worker != workers[0] for worker in workers[1:]):
            raise ActorError("the workers of one engine received different weights")
        return dict(workers[0])

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.shutdown()
        del self._llm  # vLLM keeps the frame that made it alive; at the interpreter's end its `__del__` would fail


@contextmanager
def _while_it_lives() -> Iterator[None]:
    """vLLM's word that the engine's own process has ended becomes ours: its host can do nothing any more."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDiedError("the engine's own process has ended; its log says why") from error


@contextmanager
def progress_file() -> Iterator[NDArray[np.int64]]:
    """A number that the scheduler, in the engine's process, counts written tokens with and this process reads.

    It is shared memory: a file that both have mapped, and that has no name any more once the engine has started.
    """
    with tempfile.NamedTemporaryFile(prefix="rlsys-progress-") as file:
        file.write(bytes(8))
        file.flush()
        os.environ[PROGRESS_VARIABLE] = file.name
        try:
            yield np.memmap(file.name, dtype=np.int64, shape=(1,))
        finally:
            del os.environ[PROGRESS_VARIABLE]


def _to_completion(output: Any) -> Completion:
    if output.finish_reason == "abort":
        raise ActorError("the engine gave up a request; its log says why")
    tokens = np.array(output.token_ids, dtype=np.int32)
    logprobs = np.array(output.logprobs.logprobs, dtype=np.float32)  # one at each position: that of the token
    assert len(logprobs) == len(tokens), f"{len(logprobs)} log-probs for {len(tokens)} tokens"
    versions = np.full(len(tokens), -1, dtype=np.int32)
    for span in output.weight_versions:
        versions[span.start : span.end] = int(span.version)
    stopped_by_text = isinstance(output.stop_reason, str)
    finish = "length" if output.finish_reason == "length" else "stop_string" if stopped_by_text else "stop"
    return Completion(
        tokens=tokens,
        logprobs=logprobs,
        versions=versions,
        text=output.text,
        finish_reason=finish,  # type: ignore[arg-type]
    )
