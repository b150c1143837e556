"""Kill each process of a server, and each pair, under load: which requests are lost, and how soon all is whole again.

    python loadtests/kills.py                          each case once
    python loadtests/kills.py --times 20 --json OUT    twenty times, with all figures
    python loadtests/kills.py --only Envoy --only keeper+watcher
    python loadtests/kills.py --host direct            the direct host's processes

A project of one function is served by `torchserve-dag up --foreground`, which this program starts again when it ends,
as systemd or a container would. A hundred requests a second reach it through the front door, half of them over gRPC,
each from a client that does not retry. Each answer is compared with what it must be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpc  # noqa: E402 (this file may be run by its path)
import httpx  # noqa: E402
import psutil  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from loadtests import small_project  # noqa: E402
from torchserve_dag.clients import ServingError  # noqa: E402
from torchserve_dag.front_door.door import Door  # noqa: E402
from torchserve_dag.front_door.start import own_token  # noqa: E402
from torchserve_dag.runtime.protos.inference_pb2 import PredictionsRequest  # noqa: E402
from torchserve_dag.runtime.protos.inference_pb2_grpc import InferenceAPIsServiceStub  # noqa: E402
from torchserve_dag.server.connect import management_client  # noqa: E402
from torchserve_dag.server.errors import ServerError  # noqa: E402
from torchserve_dag.server.state import Host, State  # noqa: E402
from torchserve_dag.server.supervised import ROLES, Supervised  # noqa: E402
from torchserve_dag.stack.connect import local_address  # noqa: E402

ECHO = """
from torchserve_dag import Text

def upper(text: Text) -> Text:
    return Text(text.text.upper())
"""
YAML = """
name: echo
version: "1.0"
does: Gives a text in capitals.
code: echo.py
nodes: {upper: {function: upper}}
output: upper
serve: {batch: 16, workers: 2, timeout_s: 20}
"""
WORKER = "worker"
PER_SECOND = 100
THREADS = 20
"""Clients of each protocol: as many requests may wait while others are sent."""
LONGEST_S = 30.0
"""No request waits longer: the model's time limit, and the front door's grace."""
WHOLE_S = 180.0
CALM_S = 0.5
"""How long every request must be answered before the server counts as whole."""


@dataclass(frozen=True)
class Sent:
    """A request and what became of it."""

    at: float
    protocol: str
    outcome: str
    """`answered`; `told` (503 with retry-after); `refused` (no connection: nothing was sent); `lost` (sent, and no
    answer, or another 5xx); `wrong` (another answer than it must be, or a refusal that blames the client)."""
    details: str = ""


@dataclass
class Load:
    """Requests at a constant rate, until it is stopped."""

    address: str
    token: str
    certificate: Path
    sent: list[Sent] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[Load]:
        works = [threading.Thread(target=work, args=(i,)) for work in (self._rest, self._grpc) for i in range(THREADS)]
        for one in works:
            one.start()
        try:
            yield self
        finally:
            self._stop.set()
            for one in works:
                one.join()

    def since(self, begin: float, end: float) -> list[Sent]:
        return [one for one in tuple(self.sent) if begin <= one.at < end]

    def _turns(self, place: int) -> Iterator[str]:
        pause = 2 * THREADS / PER_SECOND
        due = time.monotonic() + pause * place / THREADS
        for turn in itertools.count():
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            due = max(due + pause, time.monotonic() - pause)
            yield f"text {place} {turn}"

    def _rest(self, place: int) -> None:
        trust = ssl.create_default_context(cafile=self.certificate)
        headers = {"authorization": f"Bearer {self.token}", "content-type": "text/plain"}
        with httpx.Client(base_url=f"https://{self.address}", verify=trust, headers=headers, timeout=60) as http:
            for text in self._turns(place):
                at = time.monotonic()
                try:
                    answer = http.post("/predictions/echo", content=text)
                except httpx.ConnectError as error:
                    self._note(at, "REST", "refused", str(error))
                except httpx.HTTPError as error:
                    self._note(at, "REST", "lost", type(error).__name__)
                else:
                    self._note(at, "REST", *rest_outcome(answer, text))

    def _grpc(self, place: int) -> None:
        options = [
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        credentials = grpc.ssl_channel_credentials(self.certificate.read_bytes())
        with grpc.secure_channel(self.address, credentials, options) as channel:
            stub = InferenceAPIsServiceStub(channel)
            for text in self._turns(place):
                at = time.monotonic()
                request = PredictionsRequest(model_name="echo", input={"data": text.encode()})
                try:
                    answer = stub.Predictions(request, metadata=[("authorization", f"Bearer {self.token}")], timeout=60)
                except grpc.RpcError as error:
                    self._note(at, "gRPC", *grpc_failure(error))
                else:
                    right = answer.prediction == json.dumps({"text": text.upper()}).encode()
                    body = answer.prediction.decode("utf-8", "replace")
                    failed = body.startswith('{"code": 5')
                    self._note(at, "gRPC", "answered" if right else "lost" if failed else "wrong", body[:80])

    def _note(self, at: float, protocol: str, outcome: str, details: str = "") -> None:
        self.sent.append(Sent(at, protocol, outcome, details))


def rest_outcome(answer: httpx.Response, text: str) -> tuple[str, str]:
    if answer.status_code == httpx.codes.OK:
        return ("answered" if answer.json() == {"text": text.upper()} else "wrong"), answer.text[:80]
    told = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and "retry-after" in answer.headers
    outcome = "told" if told else "lost" if answer.is_server_error else "wrong"
    return outcome, f"{answer.status_code} {answer.text[:80]}"


def grpc_failure(error: grpc.RpcError) -> tuple[str, str]:
    code, details = error.code(), error.details() or ""
    metadata = {key for key, _ in (*(error.initial_metadata() or ()), *(error.trailing_metadata() or ()))}
    if "retry-after" in metadata:
        return "told", details
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        return "refused", details
    ours = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT}
    return ("wrong" if code in ours else "lost"), f"{code.name} {details[:80]}"


class Server:
    """`up --foreground`, started again whenever it ends, as systemd would."""

    def __init__(self, root: Path, host: Host) -> None:
        self.root, self.state, self.host = root, State(root), host
        self.supervised = Supervised(self.state)
        self._over = threading.Event()
        self._up = self._start("--free-ports")
        self._parent = threading.Thread(target=self._watch, daemon=True)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        log = (self.root / "up.log").open("ab")
        command = [*small_project.TOOL, "up", "--foreground", "--host", self.host, *words]
        return subprocess.Popen(command, cwd=self.root, stdout=log, stderr=log)  # noqa: S603 (our own arguments)

    def wait(self) -> None:
        deadline = time.monotonic() + WHOLE_S
        while not self.whole():
            if self._up.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((self.root / "up.log").read_text())
            time.sleep(0.1)
        self._parent.start()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            if self._up.poll() is not None:
                self._up = self._start()

    def end(self) -> None:
        self._over.set()
        if self._parent.is_alive():
            self._parent.join()
        small_project.tool(self.root, "down")
        with suppress(subprocess.TimeoutExpired):
            self._up.wait(30)

    def pids(self) -> dict[str, int]:
        """Those of all processes, of the worker too. Raises ServerError while it cannot be known."""
        with management_client(self.state) as client:
            workers = [one.pid for model in client.models() for v in model.versions for one in v.workers if one.ready]
        return {**{one.name: one.pid for one in self.supervised.report()}, WORKER: workers[0] if workers else 0}

    def whole(self, killed: Sequence[int] = ()) -> bool:
        """Whether every process runs, none of those that were `killed`, and the watcher is in the foreground."""
        try:
            pids, problems = self.pids(), [one.problem for one in self.supervised.report() if one.problem]
            foreground = "--foreground" in psutil.Process(pids["watcher"]).cmdline()
        except (ServerError, ServingError, psutil.Error, KeyError):  # TorchServe does not answer yet, say
            return False
        return not problems and foreground and 0 not in pids.values() and not set(killed) & set(pids.values())


@dataclass
class Result:
    """What one kill did."""

    case: str
    whole_s: float
    outcomes: Counter[str]
    details: Counter[str]


def kill(server: Server, load: Load, case: Sequence[str]) -> Result:
    pids = server.pids()
    killed = [pids[name] for name in case]
    begin = time.monotonic()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    deadline, since = begin + WHOLE_S, None
    while True:
        now = time.monotonic()
        calm = load.since(now - CALM_S, now)
        kinds = {(one.protocol, one.outcome) for one in calm}
        since = (since or now) if server.whole(killed) else None
        if since and kinds == {("REST", "answered"), ("gRPC", "answered")}:
            break
        if now > deadline:
            raise SystemExit(f"{'+'.join(case)}: not whole after {WHOLE_S:g} s: {server.supervised.report()}")
        time.sleep(0.05)
    last = [one.at for one in load.since(begin, now) if one.outcome != "answered"]
    whole_s = max(since, *last, begin) - begin
    time.sleep(0.2)
    waited = time.monotonic() + LONGEST_S
    expected = int(PER_SECOND * (now - begin) * 0.9)
    while len(load.since(begin, now)) < expected and time.monotonic() < waited:
        time.sleep(0.1)  # requests that still wait for an answer
    sent = load.since(begin - 0.2, now)
    bad = Counter(f"{one.protocol} {one.outcome}: {one.details}" for one in sent if one.outcome in {"lost", "wrong"})
    return Result("+".join(case), whole_s, Counter(one.outcome for one in sent), bad)


def cases(only: Sequence[str], host: Host) -> list[tuple[str, ...]]:
    names = tuple(name for name in (*ROLES, WORKER) if host == "torchserve" or name != "TorchServe")
    every = [(name,) for name in names] + list(itertools.combinations(names, 2))
    return [case for case in every if not only or "+".join(case) in only]


def table(results: Sequence[Result]) -> Table:
    shown = Table(
        "killed",
        "times",
        "sent",
        "answered",
        "503, retry-after",
        "no connection",
        "lost",
        "wrong",
        "whole again, s: median",
        "longest",
    )
    for name in dict.fromkeys(result.case for result in results):
        of = [result for result in results if result.case == name]
        total = sum((result.outcomes for result in of), Counter[str]())
        seconds = [result.whole_s for result in of]
        counts = [total[outcome] for outcome in ("answered", "told", "refused", "lost", "wrong")]
        cells = [len(of), sum(total.values()), *counts, f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"]
        shown.add_row(name, *map(str, cells))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], metavar="CASE", help="Envoy, or keeper+watcher")
    parser.add_argument("--host", choices=["torchserve", "direct"], default="torchserve")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    chosen = cases(["+".join(sorted(one.split("+"), key=(*ROLES, WORKER).index)) for one in options.only], options.host)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the server
    console, results = Console(width=150), list[Result]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small_project.make(root, {"workflows/echo.py": ECHO, "workflows/echo.yaml": YAML})
        server = Server(root, options.host)
        try:
            server.wait()
            record = Door(server.state).record()
            if record is None:
                raise SystemExit("there is no front door")
            load = Load(local_address(record.settings), own_token(server.state), Path(record.certificate))
            with load.running():
                time.sleep(2)
                for turn, case in itertools.product(range(options.times), chosen):
                    result = kill(server, load, case)
                    results.append(result)
                    outcomes, details = dict(result.outcomes), dict(result.details)
                    console.print(f"{turn + 1} {result.case}: {result.whole_s:.1f} s {outcomes} {details}")
                    time.sleep(1)
        finally:
            server.end()
    console.print(table(results))
    if options.json:
        options.json.write_text(json.dumps([vars(result) for result in results], indent=2))


if __name__ == "__main__":
    main()
