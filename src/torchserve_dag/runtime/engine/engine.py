"""The executor: requests flow through a graph, and items of all of them share each node's batches.

    submit ─► request ─► ready node ─► its items queue at a station ─► a lane takes a batch ─► answers ─► next nodes

    plan.py      which nodes a request runs, and what each waits for
    request.py   a request on its way, and the items that it becomes at a node
    queue.py     in which order items of several requests are taken
    station.py   a node's code at work, with its queue
    lanes.py     the threads of a device, and which batch each takes next
    timers.py    deadlines, and pauses between tries

A failed item is tried again, skipped or stood in for, as its node's policy says; else it ends its own request,
and nothing else.
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

from torchserve_dag.runtime.data.options import Options, Priority
from torchserve_dag.runtime.engine.counts import NodeCounts
from torchserve_dag.runtime.engine.flow import Changes, make, record, settle, start, values_of
from torchserve_dag.runtime.engine.lanes import BULK_TURN, Lanes, SetAlone
from torchserve_dag.runtime.engine.plan import ANSWER, Plan, make_plan, outputs_asked
from torchserve_dag.runtime.engine.request import PENDING, Item, Request
from torchserve_dag.runtime.engine.runner import Rest, Runner, Starter, internal_error
from torchserve_dag.runtime.engine.span import Observer, Span
from torchserve_dag.runtime.engine.station import CPU, ELSEWHERE, Station
from torchserve_dag.runtime.engine.timers import Timers
from torchserve_dag.runtime.graph.graph import REQUEST, Branch, Code, Graph, Node
from torchserve_dag.runtime.graph.kinds import DecodeCode
from torchserve_dag.runtime.messages import Failure, InputError

logger = logging.getLogger(__name__)

SWEEP_S = 0.5
"""After a request that ran out of time, until what it left behind in the queues is let go of."""

MAX_PLANS = 256
"""Sets of outputs whose plans are kept; clients choose them."""


class Engine:
    """Runs one graph.

    `runners` has one for each code that runs in this process, by its name in `graph.codes`, and one called
    `request` that decodes; `starters` one for each code that runs elsewhere.
    """

    def __init__(
        self,
        graph: Graph,
        runners: Mapping[str, Runner],
        *,
        lanes: Mapping[str, int],
        devices: Mapping[str, str] | None = None,
        starters: Mapping[str, Starter] | None = None,
        observer: Observer | None = None,
        set_alone: SetAlone = lambda _: None,
    ) -> None:
        """`lanes`: how many a device has; `devices`: where each code runs, `cpu` where it is not said."""
        self.graph = graph
        self.timeout_s = float(graph.serve.timeout_s)
        self.max_inside = graph.serve.max_inside
        self._observer = observer
        self._lock = threading.Lock()
        self._closed = False
        self._inside: dict[Request, None] = {}
        self._keys: dict[str, Request] = {}
        """The requests that their clients may cancel, by the key that the client gave."""
        self._runners, self._devices, self._starters = runners, devices or {}, starters or {}
        self._stations: dict[str, Station] = {}
        self._dropped: list[Item] = []
        """Queued items that nobody waited for any more, to be let go of without the lock: see queue.py."""
        self._here = _Here()
        self._sweeping = False
        self._plan = self._make_plan(graph, "", ())
        self._plans: dict[tuple[str, ...], Plan] = {(): self._plan}
        self._timers = Timers(f"{graph.name}-timers")
        stations = list(self._stations.values())
        self._lanes = {
            device: Lanes(graph.name, device, count, stations, self._lock, self._run, set_alone, self._dropped)
            for device, count in lanes.items()
        }

    # The graph's codes, as stations; a workflow inside has a plan of its own.

    def _make_plan(self, graph: Graph, prefix: str, depth: tuple[int, ...]) -> Plan:
        stations = {
            code.name: self._make_station(code, f"{prefix}{code.name}", (*depth, node.depth))
            for node in (*([] if prefix else [_DECODING]), *graph.nodes.values())
            for code in node.codes
        }
        return make_plan(graph, graph.output, stations, prefix)

    def _make_station(self, code: Code, name: str, depth: tuple[int, ...]) -> Station:
        start = None
        if code.inner:
            start = partial(self._start_inner, self._make_plan(code.inner, f"{name}/", depth))
        elif code.kind.elsewhere:
            start = partial(self._start_served, self._starters[name])
        station = Station(
            name,
            batch=code.batch,
            bundle=code.kind.one_by_one,
            depth=depth,
            runner=self._runners.get(name),
            device=self._devices.get(name, CPU),
            start=start,
            dropped=self._dropped,
        )
        self._stations[name] = station
        return station

    # In, and out.

    def submit(
        self,
        body: Any,
        parameters: Mapping[str, str] | None = None,
        *,
        request_id: str | None = None,
        known: Mapping[str, Any] | None = None,
        options: Options | None = None,
        on_piece: Callable[[Any], None] | None = None,
    ) -> Request:
        """Put a request in. Its `future` gives the answer or a Failure, at the time limit at the latest.

        `known` holds results that come with the request, for the nodes that a segment leaves out. Where the
        answer comes in pieces, `on_piece` is called with each, in order, before the future ends; the future then
        gives them all.
        """
        options = options or Options()
        future: Future[Any] = Future()
        now = time.monotonic()
        refusal = None
        plan = self._plan
        try:
            plan = self._plan_for(options.outputs)
        except InputError as error:
            refusal = Failure(error.status, error.message)
        request = Request(
            request_id or uuid.uuid4().hex,
            plan,
            now + min(self.timeout_s, options.timeout_s or self.timeout_s),
            {**(known or {}), "parameters": dict(parameters or {})},
            partial(_finish, future),
            self._end,
            options,
            on_piece=on_piece,
            future=future,
            began_ns=time.time_ns() if self._observer else 0,
        )
        with self._lock:
            if self._closed:
                refusal = _CLOSING
            elif len(self._inside) >= self.max_inside:
                message = f"{self.max_inside:,} requests are inside; try again in a second."
                refusal = Failure(HTTPStatus.SERVICE_UNAVAILABLE, message, "Overloaded")
            if refusal is None:
                self._inside[request] = None
                if options.cancel_key:
                    self._keys[options.cancel_key] = request
                self._timers.at(request.deadline, request, self._too_late)
        if refusal is None:
            item = Item(request, _DECODING, _DECODE, body, [PENDING], 0)
            if self._here.entering is None:
                self._enqueue(Changes(queued=[item]))
            else:
                self._here.entering.append(item)
        else:
            request.ended = True
            future.set_result(refusal)
        return request

    @contextmanager
    def together(self) -> Iterator[None]:
        """What this thread submits inside reaches the lanes at its end: once for all costs less than once for each."""
        entering: list[Item] = []
        self._here.entering = entering
        try:
            yield
        finally:
            self._here.entering = None
            if entering:
                self._enqueue(Changes(queued=entering))

    def cancel(self, key: str) -> bool:
        """Cancel the request that came with this `cancel_key`; whether there was one."""
        with self._lock:
            request = self._keys.get(key)
        if request is None:
            return False
        request.cancel()
        return True

    @property
    def over(self) -> bool:
        """Whether it is closed."""
        return self._closed

    @property
    def inside(self) -> int:
        """How many requests are inside."""
        return len(self._inside)

    def counts(self) -> dict[str, NodeCounts]:
        """What each code has done so far, by its name; `request` is the decoding."""
        with self._lock:
            return {name: station.counts.copy() for name, station in self._stations.items()}

    def stuck(self) -> bool:
        """Whether a lane hangs: in one node for half of what a request may take, with nobody waiting for it."""
        now = time.monotonic()
        with self._lock:
            return any(
                items and now - since > self.timeout_s / 2 and all(item.over for item in items)
                for lanes in self._lanes.values()
                for since, items in lanes.busy.values()
            )

    def close(self) -> None:
        """Refuse what is inside, and end the lanes. One that hangs in a node is left behind."""
        with self._lock:
            self._closed = True
            inside = list(self._inside)
            for lanes in self._lanes.values():
                lanes.close()
        self._timers.close()
        for request in inside:
            self._end(request, _CLOSING)
        deadline = time.monotonic() + 1
        for thread in [self._timers.thread, *(thread for lanes in self._lanes.values() for thread in lanes.threads)]:
            if thread is not threading.current_thread():  # a future's callback may close the engine
                thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _plan_for(self, outputs: tuple[str, ...]) -> Plan:
        plan = self._plans.get(outputs)
        if plan is None:
            plan = make_plan(self.graph, outputs_asked(self.graph, outputs), self._plan.stations)
            if len(self._plans) < MAX_PLANS:
                self._plans[outputs] = plan
        return plan

    # Work.

    def _run(self, station: Station, items: list[Item]) -> None:
        """One batch, in a lane."""
        began = time.monotonic()
        answers: Sequence[Any] = ()
        try:
            answers = station.runner([item.value for item in items])
            if len(answers) != len(items):
                logger.error("%s gave %d answers for %d items", station.name, len(answers), len(items))
        except BaseException:  # a lane must not end: libraries raise SystemExit, and Rust's panics are no Exception
            ids = ", ".join(item.request.id for item in items)
            logger.exception("%s raised; requests %s", station.name, ids)
        if len(answers) != len(items):
            answers = [internal_error(station.name)] * len(items)
        self._deliver(station, items, answers, began)

    def _start_elsewhere(self, station: Station) -> None:
        """Start the items that wait for what runs elsewhere, as many as may be under way."""
        stations = self._here.stations
        stations.append(station)
        if len(stations) > 1:  # this thread is at it, further out: what ends at once must not pile up its stack
            return
        try:
            while stations:
                self._start_at(stations[0])
                del stations[0]
        finally:
            stations.clear()  # else this thread would start nothing any more

    def _start_at(self, station: Station) -> None:
        while True:
            with self._lock:
                station.turn += 1
                first: Priority = "bulk" if station.turn % BULK_TURN == 0 else "interactive"
                items = station.take(station.batch - station.under_way, first)
                station.under_way += len(items)
            self._dropped.clear()
            if not items:
                return
            for item in items:
                try:
                    station.start(item)
                except BaseException:
                    logger.exception("request %s: %s could not be started", item.request.id, station.name)
                    self._came_back(item, internal_error(station.name), time.monotonic())

    def _start_served(self, starter: Starter, item: Item) -> None:
        request, began = item.request, time.monotonic()
        limit = request.root.deadline
        if item.node.policy.timeout_s:
            limit = min(limit, item.since + item.node.policy.timeout_s)

        def done(answer: Any) -> None:
            self._came_back(item, answer, began)

        call_off = starter(item.value, max(0.001, limit - began), done)
        self._away(item, call_off)

    def _start_inner(self, plan: Plan, item: Item) -> None:
        outer, began = item.request, time.monotonic()
        values = {"parameters": outer.values.get("parameters", {}), REQUEST: item.value}

        def finish(answer: Any) -> None:
            self._came_back(item, answer, began)

        inner = Request(outer.id, plan, outer.deadline, values, finish, self._end, outer.options, parent=item)
        self._away(item, inner.cancel)
        self._apply(Changes(ended=[(inner, REQUEST, item.value)]))

    def _away(self, item: Item, call_off: Callable[[], None]) -> None:
        """An item runs elsewhere now; if its request has ended meanwhile, nobody else will call it off."""
        with self._lock:
            over = item.over
            if not over:
                item.request.away[item] = call_off
        if over:
            call_off()

    def _came_back(self, item: Item, answer: Any, began: float) -> None:
        station = item.station
        with self._lock:
            station.under_way -= 1
            item.request.away.pop(item, None)
        self._deliver(station, [item], [answer], began)
        self._start_elsewhere(station)

    # What becomes of the answers; flow.py says what they change.

    def _deliver(self, station: Station, items: Sequence[Item], answers: Sequence[Any], began: float) -> None:
        now = time.monotonic()
        changes = Changes()
        with self._lock:
            station.ran(len(items), now - began)
            failures = sum(isinstance(answer, Failure) for answer in answers)
            station.counts.ran((began - item.since for item in items), now - began, failures)
            for item, answer in zip(items, answers, strict=True):
                if self._observer:
                    _note(item, answer, began, now, len(items))
                if not item.over:
                    settle(item, answer, changes)
        if failures:
            for item, answer in zip(items, answers, strict=True):
                if isinstance(answer, Failure) and answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    logger.error("request %s: %s: %s", item.request.id, station.name, answer.message)
        self._apply(changes)

    def _apply(self, changes: Changes) -> None:
        """Let what has happened have its effect, and what that makes happen, until all of it waits for a station."""
        while changes.failed or changes.grown or changes.ended:
            failed, changes.failed = changes.failed, []
            for request, failure in failed:
                self._end(request, failure)
            ready: list[tuple[Request, Node]] = []
            for request, node in changes.take_grown():
                followers = request.plan.followers.get(node.name, ())
                ready += [(request, follower) for follower in followers if follower.name in request.gathers]
                if node.name == request.plan.streaming:
                    self._send(request)
            with self._lock:
                after = [(r, name) for r, node, value in changes.take_ended() for name in record(r, node, value)]
            ready += [(request, request.plan.nodes[name]) for request, name in after if name != ANSWER]
            for request, name in after:
                if name == ANSWER:
                    self._answer(request)
            if ready:
                self._start(ready, changes)
        if changes.queued or changes.later:
            self._enqueue(changes)

    def _start(self, ready: list[tuple[Request, Node]], changes: Changes) -> None:
        """Start nodes that are ready, or feed those that follow others."""
        with self._lock:
            read = [(request, node, *values_of(request, node)) for request, node in ready if not request.over]
        made = []
        for request, node, values, new in read:
            try:
                made.append((request, node, make(request, node, values, new), len(new)))
            except InputError as error:
                self._end(request, Failure(error.status, error.message, node=request.plan.prefix + node.name))
            except Exception:
                logger.exception("request %s: the expressions of %s raised", request.id, node.name)
                self._end(request, internal_error(request.plan.prefix + node.name))
        with self._lock:
            for request, node, one, new_pieces in made:
                start(request, node, one, new_pieces, changes)

    def _enqueue(self, changes: Changes) -> None:
        queued: dict[Station, list[Item]] = {}
        now = time.monotonic()
        with self._lock:
            for pause, item in changes.later:
                self._timers.at(now + pause, item.request, partial(self._again, item))
            for item in changes.queued:
                queued.setdefault(item.station, []).append(item)
                limit = item.node.policy.timeout_s
                if limit and not isinstance(item.value, Rest):  # it holds for all pieces together
                    self._timers.at(item.since + limit, item, partial(self._out_of_time, limit))
            for station, items in queued.items():
                if station.device == ELSEWHERE:
                    station.put(items)
                else:
                    self._lanes[station.device].put(station, items, only=len(queued) == 1)
        for station in queued:
            if station.device == ELSEWHERE:
                self._start_elsewhere(station)

    def _again(self, item: Item, _: Request) -> None:
        item.since = time.monotonic()
        self._enqueue(Changes(queued=[item]))

    def _out_of_time(self, limit: float, item: Item) -> None:
        """An item has reached its node's own deadline; its late answer will be dropped."""
        failure = Failure(HTTPStatus.GATEWAY_TIMEOUT, f"{item.station.name} took longer than {limit:g} s.", "Timeout")
        changes = Changes()
        with self._lock:
            if item.over:
                return
            call_off = item.request.away.get(item)
            item.station.counts.failures += 1
            settle(item, failure, changes)
        if call_off:
            call_off()
        self._apply(changes)

    # Ends.

    def _answer(self, request: Request) -> None:
        with self._lock:
            if request.over:
                return
            known = request.values
        try:
            values = {name: value.evaluate(known) for name, value in request.plan.output.values.items()}
        except Exception:
            logger.exception("request %s: the expressions of the output raised", request.id)
            self._end(request, internal_error(f"{request.plan.prefix}output"))
        else:
            self._end(request, values.get("", values))

    def _send(self, request: Request) -> None:
        """Give the client the pieces that are ready, in order, one thread at a time; and after the last, the end."""
        pieces, on_piece = request.pieces, request.on_piece
        if pieces is None or on_piece is None:
            return
        while True:
            with self._lock:
                if pieces.sending:
                    return
                ready = pieces.take()
                pieces.sending = bool(ready)
                end = None if ready else pieces.take_end()
            if end:
                request.finish(end[0])
            if not ready:
                return
            try:
                for piece in ready:
                    on_piece(piece)
                failure = None
            except BaseException:  # a lane must not end
                logger.exception("request %s: a piece could not be given to the client", request.id)
                failure = internal_error(request.plan.streaming or "")
                self._end(request, failure)
            with self._lock:
                pieces.sending = False
                if failure:
                    pieces.break_off(failure)

    def _end(self, request: Request, answer: Any) -> None:
        with self._lock:
            if request.ended:
                return
            request.ended = True
            away = list(request.away.values())
            held = request.values, request.gathers, request.away  # and not let go of under the lock
            request.values, request.gathers, request.away = {}, {}, {}  # photos are large, and a client may keep it
            self._inside.pop(request, None)
            if request.options.cancel_key and self._keys.get(request.options.cancel_key) is request:
                del self._keys[request.options.cancel_key]
            if request.pieces:
                request.pieces.end = (answer,)
        del held
        for call_off in away:
            call_off()
        if request.pieces:
            self._send(request)
        else:
            request.finish(answer)
        if self._observer and request.parent is None:
            self._observe(self._observer, request, answer)

    def _too_late(self, request: Request) -> None:
        """Answer a request that is still inside at its deadline."""
        waiting = next((name for name in request.plan.nodes if name not in request.values), None)
        limit = min(self.timeout_s, request.options.timeout_s or self.timeout_s)
        self._end(request, Failure(HTTPStatus.GATEWAY_TIMEOUT, f"No answer within {limit:g} s.", "Timeout", waiting))
        if not self._sweeping:
            self._sweeping = True
            self._timers.at(time.monotonic() + SWEEP_S, self, Engine._sweep)

    def _sweep(self) -> None:
        """Let go of what waits and has ended: where every lane hangs, no lane takes it out."""
        self._sweeping = False
        with self._lock:
            for station in self._stations.values():
                station.drop_ended()
        self._dropped.clear()

    def _observe(self, observer: Observer, request: Request, answer: Any) -> None:
        failure = answer if isinstance(answer, Failure) else None
        whole = Span(self.graph.name, request.id, request.options.trace, request.began_ns, time.time_ns(), {}, failure)
        try:
            observer([whole, *request.spans])
        except Exception:
            logger.exception("request %s: its spans could not be kept", request.id)


def _note(item: Item, answer: Any, began: float, now: float, batch: int) -> None:
    """Keep a try's span."""
    end = time.time_ns()
    root = item.request.root
    attributes = {"queue_s": began - item.since, "batch": batch, "tries": item.tries}
    failure = answer if isinstance(answer, Failure) else None
    start_ns = end - int((now - began) * 1e9)
    root.spans.append(Span(item.station.name, root.id, root.options.trace, start_ns, end, attributes, failure))


class _Here(threading.local):
    """What one thread is at."""

    def __init__(self) -> None:
        self.stations: list[Station] = []
        """Where it is starting items."""
        self.entering: list[Item] | None = None
        """New requests, which it submits together."""


_DECODE = Code(REQUEST, {}, frozenset(), Any, DecodeCode())
_DECODING = Node(
    name=REQUEST, branches=(Branch(None, _DECODE),), each=(), when=None, result=Any, needs=frozenset(), depth=0
)
_CLOSING = Failure(HTTPStatus.SERVICE_UNAVAILABLE, "The workflow is closing.", "Overloaded")


def _finish(future: Future[Any], answer: Any) -> None:
    try:
        if future.set_running_or_notify_cancel():
            future.set_result(answer)
    except BaseException:  # a future's callback must not end a lane
        logger.exception("what waited for an answer raised")
