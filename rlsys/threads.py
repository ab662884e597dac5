"""Synchronous code that is not trusted to return, in threads of its own beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

Outcome = tuple[BaseException | None, Any]
"""What a function raised, or None, and what it returned."""


class Threads:
    """A daemon thread for each call: those of a pool would all be taken once enough of them hang.

    A thread cannot be ended. One whose caller has given up runs on, and `num_late` counts it until it returns.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._late: list[threading.Thread] = []

    @property
    def num_late(self) -> int:
        """Calls that were given up and still run."""
        self._late = [thread for thread in self._late if thread.is_alive()]
        return len(self._late)

    async def call(self, function: Callable[..., Any], *args: Any) -> Outcome:
        """Call the function; what it raises is returned, because not all of it can be raised in a coroutine."""
        loop = asyncio.get_running_loop()
        returned: asyncio.Future[Outcome] = loop.create_future()

        def deliver(outcome: Outcome) -> None:
            if not returned.done():  # else it is late
                returned.set_result(outcome)

        def run() -> None:
            try:
                outcome: Outcome = None, function(*args)
            except BaseException as error:  # `exit()` as well, which would end the thread without a word
                outcome = error, None
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(deliver, outcome)

        thread = threading.Thread(target=run, name=self._name, daemon=True)
        thread.start()
        try:
            return await returned
        except asyncio.CancelledError:
            self._late.append(thread)
            raise
