"""The executor: requests flow through a graph, and items of all of them share each node's batches.

    submit ─► request ─► ready node ─► its items queue ─► a lane takes a batch ─► results ─► next nodes

A station is a node at work, with its queue. A lane is a thread of one device. On a CPU there is one a
core: it takes items side by side with its neighbours, and never so many that one of them idles. A lane
that finds no full batch does the work that may fill one, and only then takes what there is: a lone request
never waits for company, and under load batches fill by themselves. A Failure ends its own request, and
nothing else.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from torchserve_dag.engine.graph import REQUEST, Graph, Node
from torchserve_dag.engine.request import Item, Request, items_of
from torchserve_dag.engine.runner import Runner, internal_error
from torchserve_dag.messages import Failure, InputError

logger = logging.getLogger(__name__)

PATIENCE_S = 0.05
"""How long an item may wait for its batch to fill while a lane has other work to do."""

MAX_INSIDE = 1_000
"""Requests that may be inside an engine; more are refused at once."""


@dataclass
class NodeCounts:
    """What a node has done so far."""

    batches: int = 0
    items: int = 0
    failures: int = 0


_Ended = tuple[Request, str, Any]
"""A request, a node that has ended for it, and the node's result."""
_Ready = tuple[Request, Node, Mapping[str, Any]]
"""A request, a node that can start for it, and the values that the node may read."""


class _Station:
    """A node at work: its queue, what it runs, and on which device's lanes."""

    def __init__(self, name: str, runner: Runner, batch: int, device: str, depth: int) -> None:
        self.name = name
        self.runner = runner
        self.batch = batch
        self.device = device
        self.depth = depth  # the scheduling priority: see Engine._take
        self.queue: deque[Item] = deque()
        self.counts = NodeCounts()


class Engine:
    """Runs one graph. `runners` has one for each node, and one called `request` that decodes."""

    def __init__(
        self,
        graph: Graph,
        runners: Mapping[str, Runner],
        *,
        lanes: Mapping[str, int],
        timeout_s: float = 30.0,
        devices: Mapping[str, str] | None = None,
    ) -> None:
        """`lanes`: how many a device has; `devices`: each node's, `cpu` where it is not said."""
        self.graph = graph
        self.timeout_s = timeout_s
        self._nodes = graph.nodes
        self._stations = {
            name: _Station(
                name,
                runners[name],
                node.batch if node else 1,
                (devices or {}).get(name, "cpu"),
                node.depth if node else 0,
            )
            for name, node in {REQUEST: None, **graph.nodes}.items()
        }
        self._after: dict[str, list[str]] = {name: [] for name in self._stations}
        for node in graph.nodes.values():
            for need in node.needs:
                self._after[need].append(node.name)
        self._waits = {name: len(node.needs) for name, node in graph.nodes.items()}

        self._lock = threading.Lock()
        self._closed = False
        self._inside = 0
        self._deadlines: list[tuple[float, int, Request]] = []
        self._order = itertools.count()
        self._watch_changed = threading.Condition(self._lock)
        self._work = {device: threading.Condition(self._lock) for device in lanes}
        self._idle = dict.fromkeys(lanes, 0)
        shallow = sorted(self._stations.values(), key=lambda station: station.depth)
        self._by_device = {device: [s for s in shallow if s.device == device] for device in lanes}
        self._busy: dict[int, tuple[float, list[Item]]] = {}
        """By lane: since when it is in a node, and with which items."""
        self._threads = [
            threading.Thread(target=self._lane, args=(device,), name=f"{graph.name}-{device}-{i}", daemon=True)
            for device, count in lanes.items()
            for i in range(count)
        ]
        self._threads.append(threading.Thread(target=self._watch, name=f"{graph.name}-deadlines", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        body: Any,
        parameters: Mapping[str, str] | None = None,
        *,
        request_id: str | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> Request:
        """Put a request in. Its `future` gives the answer or a Failure, at the time limit at the latest.

        `known` holds results that come with the request, for the nodes that a segment leaves out.
        """
        request = Request(
            request_id or uuid.uuid4().hex,
            time.monotonic() + self.timeout_s,
            {**(known or {}), "parameters": dict(parameters or {})},
            dict(self._waits),
        )
        with self._lock:
            if self._closed or self._inside >= MAX_INSIDE:
                message = (
                    "The workflow is closing." if self._closed else f"{MAX_INSIDE} requests are inside; try later."
                )
                request.future.set_result(Failure(HTTPStatus.SERVICE_UNAVAILABLE, message, "Overloaded"))
                return request
            self._inside += 1
            if len(self._deadlines) > 2 * self._inside + 64:  # those that have ended need not be watched
                self._deadlines = [entry for entry in self._deadlines if not entry[2].ended]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, next(self._order), request))
            if self._deadlines[0][2] is request:
                self._watch_changed.notify()
            self._enqueue(self._stations[REQUEST], [Item(request, None, body)])
        return request

    @property
    def closed(self) -> bool:
        return self._closed

    def counts(self) -> dict[str, NodeCounts]:
        with self._lock:
            return {name: NodeCounts(**vars(station.counts)) for name, station in self._stations.items()}

    def stuck(self) -> bool:
        """Whether a lane hangs: in one node for half of what a request may take, its own being past their deadlines."""
        now = time.monotonic()
        with self._lock:
            return any(
                now - since > self.timeout_s / 2 and all(item.request.deadline < now for item in items)
                for since, items in self._busy.values()
            )

    def close(self) -> None:
        """Refuse what is inside, and end the lanes. One that hangs in a node is left behind."""
        with self._lock:
            self._closed = True
            inside = [request for _, _, request in self._deadlines if not request.ended]
            for condition in (*self._work.values(), self._watch_changed):
                condition.notify_all()
        for request in inside:
            self._end(request, Failure(HTTPStatus.SERVICE_UNAVAILABLE, "The workflow is closing.", "Overloaded"))
        deadline = time.monotonic() + 1
        for thread in self._threads:
            if thread is not threading.current_thread():  # a future's callback may close the engine
                thread.join(timeout=max(0.0, deadline - time.monotonic()))

    # One lane's life.

    def _lane(self, device: str) -> None:
        while True:
            with self._lock:
                while not self._closed and (taken := self._take(device)) is None:
                    self._idle[device] += 1
                    self._work[device].wait()
                    self._idle[device] -= 1
                if self._closed:
                    return
                station, items = taken  # type: ignore[misc]
                self._busy[threading.get_ident()] = (time.monotonic(), items)
            answers = self._run(station, items)
            with self._lock:
                del self._busy[threading.get_ident()]
            self._deliver(station, items, answers)

    def _take(self, device: str) -> tuple[_Station, list[Item]] | None:
        """The next batch for a lane of `device`, under the lock."""
        chosen: _Station | None = None
        patience = time.monotonic() - PATIENCE_S
        for station in self._by_device[device]:
            queue = station.queue
            while queue and queue[0].request.ended:
                queue.popleft()
            if not queue:
                continue
            due = len(queue) >= station.batch or queue[0].since < patience
            # The stations come shallowest first. Of those that are due the last, so the deepest, is taken: a
            # request that is nearly done leaves before another is begun. Where none is due, the first: its
            # results may fill the batch of one behind it.
            if due or chosen is None:
                chosen = station
        if chosen is None:
            return None
        size, queue = chosen.batch, chosen.queue
        if device == "cpu":  # share with the idle neighbours; a GPU's lanes are not cores, and want it whole
            size = min(size, -(-len(queue) // (1 + self._idle[device])))
        items: list[Item] = []
        while queue and len(items) < size:
            item = queue.popleft()
            if not item.request.ended:
                items.append(item)
        return chosen, items

    def _run(self, station: _Station, items: list[Item]) -> Sequence[Any]:
        try:
            answers = station.runner([item.value for item in items])
            if len(answers) == len(items):
                return answers
            logger.error("%s gave %d answers for %d items", station.name, len(answers), len(items))
        except BaseException:  # a lane must not end: libraries raise SystemExit, and Rust's panics are no Exception
            logger.exception("%s raised; requests %s", station.name, ", ".join(item.request.id for item in items))
        return [internal_error(station.name)] * len(items)

    # What ends, and what can start because of it.

    def _deliver(self, station: _Station, items: list[Item], answers: Sequence[Any]) -> None:
        failed = [(i.request, a) for i, a in zip(items, answers, strict=True) if isinstance(a, Failure)]
        ended: list[_Ended] = []
        with self._lock:
            station.counts.batches += 1
            station.counts.items += len(items)
            station.counts.failures += len(failed)
            for item, answer in zip(items, answers, strict=True):
                if item.index is None:
                    ended.append((item.request, station.name, answer))
                elif (gather := item.request.gathers.get(station.name)) is not None:
                    gather.answers[item.index] = answer
                    gather.missing -= 1
                    if not gather.missing:
                        ended.append((item.request, station.name, gather.answers))
        for request, failure in failed:
            node = failure.node or (None if station.name == REQUEST else station.name)
            self._end(request, Failure(failure.status, failure.message, failure.type, node))
        self._advance(ended)

    def _advance(self, ended: Iterable[_Ended]) -> None:
        """Record the results of nodes that have ended, and start all that are now ready, together."""
        todo = list(ended)
        queued: dict[str, list[Item]] = {}
        while todo:
            with self._lock:
                ready, answers = self._record(todo)
            for request, value in answers:
                self._end(request, value)
            todo = []
            for request, node, values in ready:  # without the lock: what a ready node reads no longer changes
                try:
                    items, result = items_of(request, node, values)
                except InputError as error:
                    self._end(request, Failure(error.status, error.message, node=node.name))
                    continue
                except Exception:
                    logger.exception("request %s: the expressions of %s raised", request.id, node.name)
                    self._end(request, internal_error(node.name))
                    continue
                if items:
                    queued.setdefault(node.name, []).extend(items)
                else:
                    todo.append((request, node.name, result))
        with self._lock:
            for name, items in queued.items():
                self._enqueue(self._stations[name], items)

    def _record(self, ended: list[_Ended]) -> tuple[list[_Ready], list[tuple[Request, Any]]]:
        """Under the lock: keep the results; which nodes are ready now, and which requests have their answer."""
        ready: list[_Ready] = []
        answers: list[tuple[Request, Any]] = []
        for request, name, value in ended:
            if request.ended:
                continue
            request.values[name] = value
            if name == self.graph.output:
                answers.append((request, value))
                continue
            for after in self._after[name]:
                request.waits[after] -= 1
                if not request.waits[after]:
                    ready.append((request, self._nodes[after], request.values))
        return ready, answers

    def _enqueue(self, station: _Station, items: list[Item]) -> None:
        """Under the lock."""
        station.queue.extend(items)
        self._work[station.device].notify(len(items))

    def _end(self, request: Request, answer: Any) -> None:
        with self._lock:
            if request.ended:
                return
            request.ended = True
            request.values, request.gathers = {}, {}  # photos are large, and a client may keep its request
            self._inside -= 1
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(answer)

    def _watch(self) -> None:
        """Answer every request that is still inside at its deadline."""
        while True:
            late: list[Request] = []
            with self._lock:
                if self._closed:
                    return
                now = time.monotonic()
                while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].ended):
                    request = heapq.heappop(self._deadlines)[2]
                    if not request.ended:
                        late.append(request)
                if not late:
                    self._watch_changed.wait(min(self._deadlines[0][0] - now, 3600) if self._deadlines else None)
            for request in late:
                waiting = next((name for name in self._nodes if name not in request.values), None)
                message = f"No answer within {self.timeout_s:g} s."
                self._end(request, Failure(HTTPStatus.GATEWAY_TIMEOUT, message, "Timeout", waiting))
            if late:  # where every lane hangs, no lane takes these out
                with self._lock:
                    for station in self._stations.values():
                        station.queue = deque(item for item in station.queue if not item.request.ended)
