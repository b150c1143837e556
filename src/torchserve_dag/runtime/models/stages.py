"""A loaded handler, which runs batches through its three stages, whole or in overlapping micro-batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data.declared import As, WrongTypeError
from torchserve_dag.runtime.handler import Handler, streams
from torchserve_dag.runtime.messages import Failure, InputError
from torchserve_dag.runtime.project.handler_file import MicroBatch

if TYPE_CHECKING:  # it imports torch
    from torchserve_dag.runtime.compute.placement import Placement

logger = logging.getLogger(__name__)

_END: Final = object()
"""After the last output of a handler's stream."""

Batch = list[Any]
"""The items' values before or after a stage; a Failure in place of an item that has failed."""


class Stages:
    """Runs batches through one handler. Safe to call from several threads at once.

    An exception in a stage fails only its own item: an InputError with its status, any other with 500 and a line in
    the log. If `infer` raises for a batch, it is called again for each item, so that a bad item does not fail the
    others.
    """

    def __init__(
        self,
        name: str,
        handler: Handler[Any, Any, Any, Any],
        placement: Placement,
        micro_batch: MicroBatch | None = None,
        timeout_s: float = 30.0,
        as_declared: As | None = None,
    ) -> None:
        """`as_declared` looks at each answer; one of another type fails its item."""
        self._as_declared = as_declared or (lambda answer: answer)
        self.name = name
        self.handler = handler
        self.placement = placement
        self.micro_batch = micro_batch
        self.timeout_s = timeout_s
        self.hangs = False
        """Whether a micro-batch did not end in time: its thread cannot be ended, and others wait behind it."""
        self._threads = (
            {
                stage: ThreadPoolExecutor(getattr(micro_batch, stage), thread_name_prefix=f"{name}-{stage}")
                for stage in ("preprocess", "infer", "postprocess")
            }
            if micro_batch
            else {}
        )

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        """The items' answers, in order; a Failure for each item without one."""
        items = list(items)
        if self.micro_batch is None or len(items) <= self.micro_batch.size:
            return self._postprocess(self._infer(self._preprocess(items)), items)
        return self._overlapped(items, self.micro_batch.size)

    def stream(self, item: Any) -> Iterator[Any]:
        """The chunks of a streaming handler's answer. It raises what the handler raises."""
        outputs = self.handler.stream(self.handler.preprocess(item))
        while True:
            with (
                self.placement.inferring()
            ):  # the setting belongs to the thread, and another thread may compute the next chunk
                output = next(outputs, _END)
            if output is _END:
                return
            yield self._answer(output, item)

    def warm_up(self, batch: int) -> None:
        """Run the handler's own example, alone and as a full batch. Raises RuntimeError if it fails."""
        example = self.handler.example()
        if streams(type(self.handler)):
            for _ in self.stream(example):
                pass
            return
        for size in dict.fromkeys((1, batch)):
            for answer in self([example] * size):
                if isinstance(answer, Failure):
                    raise RuntimeError(  # noqa: TRY004 (a value, not a wrong type)
                        f"{self.name} failed on its own example: {answer.message}"
                    )

    def close(self) -> None:
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)

    def _overlapped(self, items: Batch, size: int) -> list[Any]:
        micro_batches = [items[i : i + size] for i in range(0, len(items), size)]
        deadline = time.monotonic() + self.timeout_s
        ends: list[Future[Batch]] = [Future() for _ in micro_batches]

        def then(stage: str, work: Callable[[], Batch], after: Callable[[Batch], None], end: Future[Batch]) -> None:
            def run() -> None:
                try:
                    after(work())
                except BaseException as error:  # noqa: BLE001 (the waiting caller must get any exception)
                    end.set_exception(error)

            try:
                job = self._threads[stage].submit(run)
            except RuntimeError:  # closed meanwhile
                end.cancel()
            else:
                job.add_done_callback(lambda job: end.cancel() if job.cancelled() else None)

        for micro_batch, end in zip(micro_batches, ends, strict=True):

            def finish(outputs: Batch, micro_batch: Batch = micro_batch, end: Future[Batch] = end) -> None:
                then("postprocess", lambda: self._postprocess(outputs, micro_batch), end.set_result, end)

            def infer(prepared: Batch, end: Future[Batch] = end, finish: Callable[[Batch], None] = finish) -> None:
                then("infer", lambda: self._infer(prepared), finish, end)

            then("preprocess", lambda micro_batch=micro_batch: self._preprocess(micro_batch), infer, end)  # type: ignore[misc]

        return [
            answer
            for micro_batch, end in zip(micro_batches, ends, strict=True)
            for answer in self._awaited(end, len(micro_batch), deadline)
        ]

    def _awaited(self, end: Future[Batch], size: int, deadline: float) -> Batch:
        """A micro-batch's answers; a failure for each item if they do not come by the deadline."""
        try:
            return end.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError:
            self.hangs = True
            message = f"{self.name} took longer than {self.timeout_s:g} s."
            return [Failure(HTTPStatus.GATEWAY_TIMEOUT, message, "Timeout")] * size
        except CancelledError:
            return [Failure(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.name} is closing.", "Overloaded")] * size
        except Exception as error:  # noqa: BLE001
            return [self._surprise("a stage", error)] * size

    def _preprocess(self, items: Batch) -> Batch:
        return [self._one("preprocess", self.handler.preprocess, item) for item in items]

    def _infer(self, prepared: Batch) -> Batch:
        alive = [value for value in prepared if not isinstance(value, Failure)]
        if not alive:
            return prepared
        with self.placement.inferring():
            outputs = iter(self._infer_alive(alive))
        return [value if isinstance(value, Failure) else next(outputs) for value in prepared]

    def _infer_alive(self, batch: Batch) -> Batch:
        try:
            outputs = list(self.handler.infer(batch))
            if len(outputs) == len(batch):
                return outputs
            raise ValueError(f"infer gave {len(outputs)} outputs for {len(batch)} items")  # noqa: TRY301
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 (libraries raise SystemExit, and Rust's panics are no Exception)
            if len(batch) == 1:
                return [self._failure("infer", error)]
            return [output for value in batch for output in self._infer_alive([value])]

    def _postprocess(self, outputs: Batch, items: Batch) -> Batch:
        return [
            output if isinstance(output, Failure) else self._one("postprocess", self._answer, output, item)
            for output, item in zip(outputs, items, strict=True)
        ]

    def _answer(self, output: Any, item: Any) -> Any:
        return self._as_declared(self.handler.postprocess(output, item))

    def _one(self, stage: str, function: Callable[..., Any], *values: Any) -> Any:
        try:
            return function(*values)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 (as above)
            return self._failure(stage, error)

    def _failure(self, stage: str, error: BaseException) -> Failure:
        if isinstance(error, InputError):
            return Failure(error.status, error.message)
        if isinstance(error, WrongTypeError):
            return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), "WrongType")
        return self._surprise(stage, error)

    def _surprise(self, stage: str, error: BaseException) -> Failure:
        fault = logs.report(logger, error, f"{self.name}: {stage} raised", line=False)
        message = f"{self.name} failed in {stage}."
        return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, message, "HandlerError", fault=fault)
