"""The engine: requests flow through a graph, and items of all of them share each node's batches.

    submit ─► request ─► ready node ─► its items queue at a station ─► a lane takes a batch ─► answers ─► next nodes

    admission.py   which requests may enter, and how long they may stay
    plan.py        which nodes a request runs, and what each waits for
    request.py     a request on its way, and its items
    node_start.py  the start of a ready node; fan_out.py: the items that it becomes
    queue.py       in which order the items of several requests are taken
    station.py     the queue of one code, with what runs it
    lanes.py       the threads of a device, and which batch each takes next
    elsewhere.py   items that take no lane: in served models, handlers' processes and sub-workflows; cancelling them
    conditions.py  what an answer decides: another round of its node, nodes that end early
    outcome.py     what an answer changes: results, retries, fallbacks, failures, nodes that are ready next
    feed.py        the chunks of a node, for a function that takes them as they come
    circuit.py     code that has failed again and again is not tried for a while
    failures.py    failed attempts, counted and logged
    streaming.py   the chunks of an answer, to the client
    timers.py      deadlines, and the pauses before retries

A failed item is retried, skipped or replaced, as its node's policy says; else it ends its own request, and nothing
else.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.data.photos import pixels_in
from torchserve_dag.runtime.engine.admission import CLOSING, Admission
from torchserve_dag.runtime.engine.answered import Keep, hand_over
from torchserve_dag.runtime.engine.conditions import NOTHING, decide, decide_all
from torchserve_dag.runtime.engine.counts import NodeCounts, WorkflowCounts
from torchserve_dag.runtime.engine.elsewhere import Elsewhere
from torchserve_dag.runtime.engine.failures import count_failures, log_failures
from torchserve_dag.runtime.engine.gather import PENDING
from torchserve_dag.runtime.engine.item_span import add_span
from torchserve_dag.runtime.engine.lanes import Lanes, SetAlone
from torchserve_dag.runtime.engine.node_start import make_items, read_inputs, start_node
from torchserve_dag.runtime.engine.outcome import Changes, record_answer, record_result
from torchserve_dag.runtime.engine.plan import ANSWER, Plan, Plans, make_plan
from torchserve_dag.runtime.engine.request import Item, Request
from torchserve_dag.runtime.engine.request_span import whole_span
from torchserve_dag.runtime.engine.runner import (
    END,
    BatchStarter,
    Chunk,
    OwnEngine,
    Runner,
    Starter,
    Stream,
    Waits,
    internal_error,
)
from torchserve_dag.runtime.engine.span import Observer
from torchserve_dag.runtime.engine.span_attributes import note_attributes
from torchserve_dag.runtime.engine.station import CPU, ELSEWHERE, Station
from torchserve_dag.runtime.engine.streaming import AnswerStream, SendChunk
from torchserve_dag.runtime.engine.timers import Timers
from torchserve_dag.runtime.graph.graph import REQUEST, Branch, Code, Graph, Node
from torchserve_dag.runtime.graph.kinds import DecodeCode
from torchserve_dag.runtime.messages import Failure, InputError

logger = logging.getLogger(__name__)


class Engine:
    """Runs one graph.

    `runners` has a runner for each code that runs in this process, by its name in `graph.codes`, and one called
    `request` that decodes; `starters` and `batch_starters` have a starter for each code that runs elsewhere.
    """

    def __init__(
        self,
        graph: Graph,
        runners: Mapping[str, Runner],
        *,
        lanes: Mapping[str, int],
        devices: Mapping[str, str] | None = None,
        starters: Mapping[str, Starter] | None = None,
        batch_starters: Mapping[str, BatchStarter] | None = None,
        own_engines: Mapping[str, OwnEngine] | None = None,
        observer: Observer | None = None,
        keep: Keep | None = None,
        set_alone: SetAlone = lambda _: None,
    ) -> None:
        """`lanes`: the number of worker threads of each device; `devices`: where each code runs, `cpu` by default;
        `own_engines`: of each code that is `continuous`; `observer` gets spans, `keep` messages and answers.
        """
        self.graph = graph
        self._observer, self._keep = observer, keep
        self._whole = WorkflowCounts()
        self._lock = threading.Lock()
        self._runners, self._devices = runners, devices or {}
        self._starters, self._batch_starters, self._own = starters or {}, batch_starters or {}, own_engines or {}
        self._dropped: list[Item] = []
        """Obsolete items that were taken from the queues; cleared without the lock: see FairQueue."""
        self._entering = _Entering()
        self._elsewhere = Elsewhere(self._lock, self._dropped, self._deliver, self._deliver_chunk, self._begin)
        self._stations: dict[str, Station[Item]] = {}
        self._plans = Plans(self._make_plan(graph, "", ()))
        self._decoding = self._stations[REQUEST]
        self._timers = Timers(f"{graph.name}-timers")
        self._admission = Admission(
            graph.serve.max_inside,
            graph.serve.pixels_inside,
            float(graph.serve.timeout_s),
            self._lock,
            self._timers,
            self._sweep,
        )
        stations = list(self._stations.values())
        self._lanes = {
            device: Lanes(graph.name, device, count, stations, self._lock, self._run, set_alone, self._dropped)
            for device, count in lanes.items()
        }

    # Each code of the graph gets a station; a sub-workflow gets a plan of its own.

    def _make_plan(self, graph: Graph, prefix: str, depth: tuple[int, ...]) -> Plan[Item]:
        stations = {
            code.name: self._make_station(code, f"{prefix}{code.name}", (*depth, node.depth))
            for node in (*([] if prefix else [_DECODING]), *graph.nodes.values())
            for code in node.codes
        }
        return make_plan(graph, graph.output, stations, prefix)

    def _make_station(self, code: Code, name: str, depth: tuple[int, ...]) -> Station[Item]:
        start: Callable[[Sequence[Item]], None] | None = None
        if code.inner:
            start = partial(self._elsewhere.start_inner, self._make_plan(code.inner, f"{name}/", depth))
        elif code.kind.one_at_a_time:
            start = partial(self._elsewhere.start_batch, self._batch_starters[name])
        elif code.kind.elsewhere:
            start = partial(self._elsewhere.start_served, self._starters[name])
        own = self._own.get(name)
        station = Station(
            name,
            batch=min(code.batch or own.room, own.room) if own else code.batch,
            bundle=code.kind.one_by_one,
            depth=depth,
            runner=self._runners.get(name),
            device=self._devices.get(name, CPU),
            start=start,
            one_at_a_time=code.kind.one_at_a_time,
            own_engine=own,
            attempts=code.attempts,
            dropped=self._dropped,
        )
        self._stations[name] = station
        return station

    # A request enters.

    def submit(
        self,
        body: Any,
        parameters: Mapping[str, str] | None = None,
        *,
        request_id: str | None = None,
        known: Mapping[str, Any] | None = None,
        options: Options | None = None,
        on_chunk: SendChunk | None = None,
    ) -> Request:
        """Submit a request. Its `future` gives the answer or a Failure, at the time limit at the latest.

        `known` holds results that come with the request, for the nodes that a segment leaves out. Where the answer
        streams, `on_chunk` is called with each chunk, in order, before the future ends, and the node that yields waits
        while too many are not taken. The future's answer is an empty list then: a chunk that was sent is not kept.
        """
        options = options or Options()
        deadline = time.monotonic() + self._admission.limit_s(options) - options.waited_s
        refusal, plan = None, self._plans.default
        try:
            plan = self._plans.for_outputs(options.outputs)
        except InputError as error:
            refusal = Failure(error.status, error.message)
        future: Future[Any] = Future()
        request = Request(
            request_id or uuid.uuid4().hex,
            plan,
            deadline,
            {**(known or {}), "parameters": dict(parameters or {})},
            partial(_set_answer, future),
            self._end_request,
            options,
            stream=AnswerStream(plan.streaming, on_chunk, self._lock, self._queue, keeps=self._keep is not None)
            if on_chunk and plan.streaming
            else None,
            future=future,
            idle_s=self._admission.timeout_s if on_chunk and plan.streaming and not options.timeout_s else None,
            began_ns=time.time_ns() if self._observer else 0,
        )
        if self._keep:
            future.add_done_callback(partial(hand_over, self._keep, request))
        refusal = refusal or self._admission.admit(request)
        if refusal:
            request.answered = True
            future.set_result(refusal)
        else:
            self._enter(Item(request, _DECODING, _DECODE, body, [PENDING], 0))
        return request

    @contextmanager
    def together(self) -> Iterator[None]:
        """Queue the requests that this thread submits within the block together, at its end, which costs less."""
        entering: list[Item] = []
        self._entering.items = entering
        try:
            yield
        finally:
            self._entering.items = None
            if entering:
                self._enqueue(Changes(queued=entering))

    def _enter(self, item: Item) -> None:
        if self._entering.items is None:
            self._queue(item)
        else:
            self._entering.items.append(item)

    def cancel(self, key: str) -> bool:
        """Cancel the requests with this `cancel_key`. Returns whether there was one."""
        requests = self._admission.with_cancel_key(key)
        for request in requests:
            request.cancel()
        return bool(requests)

    # The request's nodes become items, which are queued.

    def _begin(self, request: Request, message: Any) -> None:
        """Start the nodes that read nothing but the request's message."""
        self._apply(Changes(ended=[(request, REQUEST, message)]))

    def _start_nodes(self, ready: list[tuple[Request, Node]], changes: Changes) -> None:
        """Start nodes that are ready, or feed nodes that follow a stream."""
        with self._lock:
            inputs = [(request, node, *read_inputs(request, node)) for request, node in ready if not request.obsolete]
        started = []
        for request, node, values, answers, chunks in inputs:
            try:
                started.append((request, node, make_items(request, node, values, answers, chunks), len(chunks)))
            except InputError as error:
                self._end_request(request, Failure(error.status, error.message, node=request.plan.prefix + node.name))
            except Exception as error:  # noqa: BLE001 (a user's object may raise anything)
                fault = logs.report(logger, error, f"request {request.id}: the expressions of {node.name} raised")
                self._end_request(request, internal_error(request.plan.prefix + node.name, fault))
        with self._lock:
            for request, node, made, chunk_count in started:
                start_node(request, node, made, chunk_count, changes)

    def _enqueue(self, changes: Changes) -> None:
        now = time.monotonic()
        with self._lock:
            for pause, item in changes.retries:
                self._timers.schedule(now + pause, item.request, partial(self._retry, item))
            queued, refused = self._by_station(changes.queued, now)
            for station, items in queued.items():
                if station.own_engine:
                    pass  # they reserve what they need first, without the lock
                elif station.device == ELSEWHERE:
                    station.push(items)
                else:
                    self._lanes[station.device].push(station, items, only=len(queued) == 1)
        for station, items in queued.items():
            if station.own_engine:
                self._elsewhere.reserve(station, station.own_engine, items)
            elif station.device == ELSEWHERE:
                self._elsewhere.start_items(station)
        for item, failure in refused:
            self._give_up(item, failure)

    def _by_station(
        self, items: Sequence[Item], now: float
    ) -> tuple[dict[Station[Item], list[Item]], list[tuple[Item, Failure]]]:
        """Items to queue, and those that are not tried. Under the lock."""
        queued: dict[Station[Item], list[Item]] = {}
        refused: list[tuple[Item, Failure]] = []
        for item in items:
            station = item.station
            if station.limits and (failure := self._limit(item, station, now)):
                refused.append((item, failure))
            else:
                queued.setdefault(station, []).append(item)
        return queued, refused

    def _limit(self, item: Item, station: Station[Item], now: float) -> Failure | None:
        """Set the time limits of an attempt; or the Failure of one that is not made. Under the lock."""
        if isinstance(item.value, Stream) or item.obsolete:  # the limits hold for all chunks together
            return None
        if station.breaker and not station.breaker.admits(now):
            return station.breaker.refusal(station.name, now)
        attempts = item.code.attempts
        if attempts.timeout_s:
            self._timers.schedule(item.since + attempts.timeout_s, item, partial(self._time_out, attempts.timeout_s))
        if limit := attempts.first_chunk_s:
            self._timers.schedule(item.since + limit, item, partial(self._time_out_first, limit))
        return None

    def _queue(self, item: Item) -> None:
        self._enqueue(Changes(queued=[item]))

    def _retry(self, item: Item, _: Request) -> None:
        item.since = time.monotonic()
        self._queue(item)

    def _time_out(self, limit: float, item: Item) -> None:
        """Fail an attempt that has reached its node's own time limit; its late answer will be dropped."""
        failure = Failure(HTTPStatus.GATEWAY_TIMEOUT, f"{item.station.name} took longer than {limit:g} s.", "Timeout")
        self._give_up(item, failure)

    def _time_out_first(self, limit: float, item: Item) -> None:
        """Fail an attempt that has given no chunk in time."""
        message = f"{item.station.name} gave nothing within {limit:g} s."
        failure = Failure(HTTPStatus.GATEWAY_TIMEOUT, message, "Timeout")
        self._give_up(item, failure, unless_begun=True)

    def _give_up(self, item: Item, failure: Failure, *, unless_begun: bool = False) -> None:
        """Fail an attempt that nobody waits for any longer, or that is not made."""
        changes = Changes()
        then = decide(item, failure) if item.node.decides else NOTHING
        with self._lock:
            if item.obsolete or (unless_begun and item.answers):
                return
            cancel = item.request.elsewhere.get(item)
            item.station.counts.failures += 1
            if item.station.breaker:
                item.station.breaker.record(failure, time.monotonic())
            record_answer(item, failure, changes, then)
        if cancel:
            cancel()
        self._apply(changes)

    # A lane takes a batch of items.

    def _run(self, station: Station[Item], items: list[Item]) -> None:
        """Run one batch, in a lane."""
        began = time.monotonic()
        answers: Sequence[Any]
        try:
            answers = station.runner([item.value for item in items])
            if len(answers) != len(items):
                raise ValueError(f"{len(answers)} answers for {len(items)} items")  # noqa: TRY301
        except BaseException as error:  # noqa: BLE001 (a lane must not end: SystemExit, or a Rust panic, is no Exception)
            fault = logs.report(logger, error, f"{station.name} raised", line=False)
            answers = [internal_error(station.name, fault)] * len(items)
        self._deliver(station, items, answers, began)

    # The effects of the answers, which outcome.py decides.

    def _deliver(self, station: Station[Item], items: Sequence[Item], answers: Sequence[Any], began: float) -> None:
        with self._faults(station, items):
            self._take_answers(station, items, answers, began)

    @contextmanager
    def _faults(self, station: Station[Item], items: Sequence[Item]) -> Iterator[None]:
        """A fault of the engine's own costs the requests of these items, and not the thread that brings the answers."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 (a lane must not end, nor what reads an engine's process)
            fault = logs.report(logger, error, f"{station.name}: the engine raised", line=False)
            for item in items:
                self._end_request(item.request, internal_error(station.name, fault))

    def _take_answers(
        self, station: Station[Item], items: Sequence[Item], answers: Sequence[Any], began: float
    ) -> None:
        now = time.monotonic()
        changes = Changes()
        pixels = [pixels_in(answer) for answer in answers] if station is self._decoding else ()
        consequences = decide_all(items, answers)
        if self._observer:
            note_attributes(items, answers)
        with self._lock:
            station.record_run(len(items), now - began)
            failures = count_failures(items, answers)
            station.counts.record_batch((began - item.since for item in items), now - began, failures)
            for item, answer, then in zip(items, answers, consequences, strict=True):
                if item.written and answer is END:
                    station.counts.record_end(item)
                if self._observer and not isinstance(answer, Waits):
                    add_span(item, answer, began, now, len(items))
                if not item.obsolete:
                    if station.breaker:
                        station.breaker.record(answer, now)
                    record_answer(item, answer, changes, then)
            for item, held in zip(items, pixels, strict=bool(pixels)):
                if not item.request.obsolete:
                    self._admission.hold(item.request, held)
                    station.paused = self._admission.full_of_pixels
        if failures:
            log_failures(station.name, items, answers)
        self._apply(changes)

    def _deliver_chunk(self, item: Item, chunk: Chunk) -> None:
        """A chunk that came by itself: it is counted with the whole answer of its item."""
        with self._faults(item.station, [item]):
            self._take_chunk(item, chunk)

    def _take_chunk(self, item: Item, chunk: Chunk) -> None:
        changes = Changes()
        then = decide(item, chunk) if item.node.decides else NOTHING
        if self._observer:
            note_attributes([item], [chunk])
        with self._lock:
            if item.obsolete:
                return
            item.station.counts.record_chunk(item, chunk.value)
            record_answer(item, chunk, changes, then)
        self._apply(changes)

    def _apply(self, changes: Changes) -> None:
        """Carry out changes, and those that follow from them, until only items to queue are left."""
        for cancel in changes.cancels:
            cancel()
        while changes.failed or changes.streamed or changes.ended:
            failed, changes.failed = changes.failed, []
            for request, failure in failed:
                self._end_request(request, failure)
            ready: list[tuple[Request, Node]] = []
            for request, node in changes.take_streamed():
                followers = request.plan.followers.get(node.name, ())
                ready += [(request, follower) for follower in followers if follower.name in request.gathers]
                if request.stream and (item := request.stream.send(request)):
                    changes.queued.append(item)
            with self._lock:
                after = [
                    (r, name)
                    for r, node, value in changes.take_ended()
                    for name in record_result(r, node, value, changes)
                ]
            ready += [(request, request.plan.nodes[name]) for request, name in after if name != ANSWER]
            for request, name in after:
                if name == ANSWER:
                    self._answer_from_results(request)
            if ready:
                self._start_nodes(ready, changes)
        if changes.queued or changes.retries:
            self._enqueue(changes)

    def _answer_from_results(self, request: Request) -> None:
        """Answer a request with its output, whose expressions read the results that are there now."""
        with self._lock:
            if request.obsolete:
                return
            known = request.values
        try:
            values = {name: value.evaluate(known) for name, value in request.plan.output.values.items()}
        except Exception as error:  # noqa: BLE001 (as above)
            fault = logs.report(logger, error, f"request {request.id}: the expressions of the output raised")
            self._end_request(request, internal_error(f"{request.plan.prefix}output", fault))
        else:
            self._end_request(request, values.get("", values))

    # The request ends: answered, failed, cancelled, at its deadline, or because the engine is closed.

    def _end_request(self, request: Request, answer: Any) -> None:
        with self._lock:
            if request.answered:
                return
            request.answered = True
            cancels = list(request.elsewhere.values())
            if request.parent is None:
                self._record_whole(request, answer)
            # Deleted below, without the lock.
            released = (request.values, request.gathers, request.elsewhere, request.waiting)
            # A caller may keep the request, but not its images.
            request.values, request.gathers, request.elsewhere, request.waiting = {}, {}, {}, {}
            self._admission.remove(request)
            if self._decoding.paused and not self._admission.full_of_pixels:
                self._decoding.paused = False
                self._lanes[self._decoding.device].wake()
            if request.stream:
                request.stream.close(answer, self._dropped)
                if self._dropped:
                    self._lanes[self._decoding.device].wake()
        del released  # it may run the `finally` of a user's generator
        for cancel in cancels:
            cancel()
        if request.stream:
            request.stream.send(request)
        else:
            request.on_answer(answer)
        if self._observer and request.parent is None:
            self._observe(self._observer, request, answer)

    def _record_whole(self, request: Request, answer: Any) -> None:
        """Record that a client's request has ended, under the lock."""
        if self._keep:
            request.message = request.values.get(REQUEST, PENDING)
        if not isinstance(answer, Failure):
            self._whole.duration_s.observe(time.monotonic() - request.began)

    def _sweep(self) -> None:
        """Drop obsolete items from the queues."""
        with self._lock:
            for station in self._stations.values():
                station.drop_obsolete()
        self._dropped.clear()

    def _observe(self, observer: Observer, request: Request, answer: Any) -> None:
        try:
            observer([whole_span(self.graph, request, answer), *request.spans])
        except Exception as error:  # noqa: BLE001 (an exporter may raise anything)
            logs.report(logger, error, f"request {request.id}: its spans could not be exported")

    # The engine as a whole.

    @property
    def closed(self) -> bool:
        return self._admission.closed

    @property
    def in_flight(self) -> int:
        """How many requests are in flight."""
        return len(self._admission)

    def counts(self) -> dict[str, NodeCounts]:
        """The counters of each code, by its name; `request` is the decoding of requests."""
        with self._lock:
            return {name: station.counts.copy() for name, station in self._stations.items()}

    def workflow_counts(self) -> WorkflowCounts:
        """The counters of whole requests."""
        with self._lock:
            return self._whole.copy()

    def queued(self) -> dict[str, int]:
        """How many items wait for each code, by its name."""
        with self._lock:
            return {name: len(station) for name, station in self._stations.items()}

    def hangs(self) -> bool:
        """Whether a lane hangs: in one batch for half of the time limit, when nobody waits for its items any more."""
        now = time.monotonic()
        with self._lock:
            return any(
                items and now - since > self._admission.timeout_s / 2 and all(item.obsolete for item in items)
                for lanes in self._lanes.values()
                for since, items in lanes.busy.values()
            )

    def close(self) -> None:
        """Fail the requests in flight, and end the threads, except a lane that hangs in a node."""
        with self._lock:
            in_flight = self._admission.close()
            for lanes in self._lanes.values():
                lanes.close()
        self._timers.close()
        for request in in_flight:
            self._end_request(request, CLOSING)
        deadline = time.monotonic() + 1
        for thread in [self._timers.thread, *(thread for lanes in self._lanes.values() for thread in lanes.threads)]:
            if thread is not threading.current_thread():  # a future's callback may close the engine
                thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._dropped.clear()  # what no lane dropped any more


class _Entering(threading.local):
    """Within `together`: the decoding items of the requests that the current thread has submitted."""

    def __init__(self) -> None:
        self.items: list[Item] | None = None


_DECODE = Code(REQUEST, {}, frozenset(), Any, DecodeCode())
_DECODING = Node(
    name=REQUEST, branches=(Branch(None, _DECODE),), each=(), when=None, result=Any, needs=frozenset(), depth=0
)


def _set_answer(future: Future[Any], answer: Any) -> None:
    try:
        if future.set_running_or_notify_cancel():
            future.set_result(answer)
    except BaseException as error:  # noqa: BLE001 (a future's callback must not end a lane)
        logs.report(logger, error, "a callback that waited for an answer raised")
