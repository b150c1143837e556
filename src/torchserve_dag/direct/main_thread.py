"""What the direct host has to know of a service whose model runs on the process's main thread."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class RunsOnMainThread(Protocol):
    """Such a service is loaded on the main thread too, and the HTTP side then runs on another.

    A handler of TorchServe's has the main thread of its process, and counts on it: signals, asyncio's loop, sqlite's
    connections and gradient mode belong to a thread.
    """

    def run(self) -> None:
        """Run the model on this thread, until `close` is called on another.

        Raises what ends a process, SystemExit and KeyboardInterrupt, if the handler or a signal's handler raises it.
        Requests that are in the service by then fail. A signal's handler must not call `close`, because it interrupts
        this thread anywhere: it tells the thread of the HTTP side to end, and that one closes the service.
        """
