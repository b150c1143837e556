"""What hostile clients do to a server, with a good client beside: its errors, p50 and p99 before and during.

    python loadtests/attacks.py                          all of them, some ten minutes
    python loadtests/attacks.py --only unread_streams,refused_log
    python loadtests/attacks.py --json

It starts a server of its own, on free ports of this machine, with two versions of a workflow `echo` in batches and a
workflow `tell` that answers in chunks. `mallory`'s token, with the default rate, is the attackers'; the good client has
another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import signal
import socket
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpc  # noqa: E402 (this file may be run by its path)
import httpx  # noqa: E402

from loadtests import hostile, small_project  # noqa: E402
from loadtests.hostile import END, Http2, Target  # noqa: E402
from loadtests.small_project import tool  # noqa: E402
from torchserve_dag.front_door.access_logs import REFUSED_LOG, REQUESTS_LOG  # noqa: E402
from torchserve_dag.front_door.door import Door  # noqa: E402
from torchserve_dag.front_door.start import own_token  # noqa: E402
from torchserve_dag.releases import version_metrics  # noqa: E402
from torchserve_dag.runtime.protos.inference_pb2 import PredictionsRequest  # noqa: E402
from torchserve_dag.runtime.protos.inference_pb2_grpc import InferenceAPIsServiceStub  # noqa: E402
from torchserve_dag.server.state import State  # noqa: E402
from torchserve_dag.stack import connect  # noqa: E402

BEFORE_S, AFTER_S = 5.0, 3.0
PAUSE_S = 0.02
"""The good client's, between two requests."""

FILES = {
    "workflows/echo.py": """
from __future__ import annotations
import time
from torchserve_dag import InputError, Text

def answer(text: Text) -> Text:
    word, _, number = text.text.partition(" ")
    if word == "sleep":
        time.sleep(float(number))
    if word == "bad":
        raise InputError(f"This is refused: {number}", 422)
    if word == "fail":
        raise RuntimeError(number)
    return Text("x" * int(number) if word == "big" else text.text)
""",
    "workflows/tell.py": """
from __future__ import annotations
from collections.abc import Iterator
from torchserve_dag import Text

def tell(text: Text) -> Iterator[Text]:
    word, *numbers = text.text.split()
    if word == "fat":
        for _ in range(int(numbers[0])):
            yield Text("x" * int(numbers[1]))
    yield text
""",
    "workflows/tell.yaml": """
name: tell
version: "1.0"
does: Answers in chunks.
nodes: {tell: {function: tell}}
output: tell
""",
    "routes.yaml": """
echo:
  versions: {"1.0": 50, "2.0": 50}
  fallback: "1.0"
""",
}
ECHO = """
name: echo
version: "{version}"
does: Answers what it is sent.
code: echo.py
nodes: {{answer: {{function: answer, input: request}}}}
output: answer
serve: {{batch: 16}}
"""


@dataclass(frozen=True)
class Server:
    """The attacked server, as an attacker and its owner see it."""

    state: State
    host: str
    port: int
    token: str
    """Mallory's, with the default rate."""

    @property
    def target(self) -> Target:
        return Target(self.host, self.port, self.token)

    @property
    def door(self) -> Door:
        return Door(self.state)

    @property
    def certificate(self) -> str:
        record = self.door.record()
        if record is None:
            raise SystemExit("the front door has ended")
        return record.certificate

    def stats(self, regex: str) -> dict[str, int]:
        return {name: value for name, value in self.door.admin.stats(regex).items() if value}

    def http(self, *, token: bool = True) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.token}"} if token else {}
        return httpx.Client(
            base_url=f"https://localhost:{self.port}",
            verify=ssl.create_default_context(cafile=self.certificate),
            headers=headers,
            timeout=60,
            trust_env=False,
        )


Attack = Callable[[Server], str]
ATTACKS: dict[str, tuple[str, Attack]] = {}


def attack(line: str) -> Callable[[Attack], Attack]:
    """An attack by the name of its function, with what it does in a line; it says what became of it."""

    def add(function: Attack) -> Attack:
        ATTACKS[function.__name__] = (line, function)
        return function

    return add


# Without a token.


@attack("100 bodies of POST /ping that never end, over one HTTP/2 connection, without a token")
def endless_pings(server: Server) -> str:
    connection = Http2(server.target)
    streams = [connection.request("/ping", token=False) for _ in range(100)]
    sent = connection.send(streams, 24_000_000, 10)
    time.sleep(5)
    return f"{sent / 1e6:,.0f} MB sent, {len(connection.answered)} answered at once"


@attack("95 bodies of POST /ping that never end, over HTTP/1.1, without a token")
def endless_pings_http1(server: Server) -> str:
    return _uploads(server, 95, b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 24000001" + END)


@attack("odd pings: with Expect, with a body that never comes, with a query")
def odd_pings(server: Server) -> str:
    heads = [
        b"POST /ping HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1000000",
        b"GET /ping HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1000000",
        b"GET /ping HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked",
        b"GET /ping?x=1 HTTP/1.1\r\nHost: x\r\nExpect: 200-nothing",
    ]
    found: Counter[int] = Counter()
    end = time.monotonic() + 8
    with ExitStack() as held, server.http(token=False) as http:
        while time.monotonic() < end:
            for head in heads:
                held.enter_context(server.target.tls("http/1.1")).sendall(head + END)
            found.update(http.get("/ping").status_code for _ in range(20))
    return f"others' pings: {dict(found)}"


@attack("refused requests with 28 KB of x-request-id each, as fast as they go, without a token")
def refused_log(server: Server) -> str:
    logs = server.state.logs
    with server.http() as http:
        http.post("/predictions/echo", content=b"hi", headers={"x-request-id": "before-the-flood"})
    head = b"GET /predictions/echo HTTP/1.1\r\nHost: x\r\nx-request-id: " + b"i" * 28_000 + END

    def flood(_: int) -> int:
        count, until = 0, time.monotonic() + 8
        with suppress(OSError):
            while time.monotonic() < until:
                with server.target.tls("http/1.1", timeout=5) as connection:
                    for _ in range(50):
                        connection.sendall(head)
                        answer = connection.recv(65_536)
                        while END not in answer or len(answer.partition(END)[2]) < 100:  # noqa: PLR2004 (its start)
                            answer += connection.recv(65_536)
                        count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        sent = sum(pool.map(flood, range(4)))
    time.sleep(2)
    kept = any(b"before-the-flood" in path.read_bytes() for path in logs.glob("requests*.log"))
    counted = sum(server.stats(r"^refused\.count").values())
    size = sum(path.stat().st_size for path in logs.glob(f"{Path(REFUSED_LOG).stem}*.log"))
    files = len(list(logs.glob(f"{Path(REQUESTS_LOG).stem}*.log")))
    return (
        f"{sent:,} sent, {counted:,} counted, {size / 1000:,.0f} KB in {REFUSED_LOG}; "
        f"{files} file of requests, an earlier line kept: {kept}"
    )


@attack("1,000 idle TLS connections, and 300 heads that come a byte at a time")
def idle_connections(server: Server) -> str:
    with hostile.idle(server.target, 1000, tls=True) as held:
        ended = hostile.slowloris(server.target, 300, 15)
        return f"{len(held)} idle ones held, {ended} of 300 slow heads ended within 15 s"


@attack("requests that are reset at once, over HTTP/2 (CVE-2023-44487)")
def rapid_resets(server: Server) -> str:
    end, found = time.monotonic() + 8, Counter[str]()
    while time.monotonic() < end:
        found[hostile.rapid_resets(server.target, 2000)] += 1
    return str(dict(found))


# With a token.


@attack("100 bodies of 24 MB that never end, over one HTTP/2 connection")
def endless_bodies(server: Server) -> str:
    connection = Http2(server.target)
    streams = [connection.request("/predictions/echo", content_type="text/plain") for _ in range(100)]
    sent = connection.send(streams, 24_000_000, 20)
    time.sleep(5)
    stats = server.stats(r"reset_high_memory_stream\.count$")
    return f"{sent / 1e6:,.0f} MB sent, {len(connection.reset)} reset; {stats}"


@attack("95 bodies of 24 MB that never end, over HTTP/1.1")
def endless_bodies_http1(server: Server) -> str:
    found = _uploads(server, 95, server.target.head("/predictions/echo", "Content-Length: 24000001") + END)
    return f"{found}; {server.stats(r'abort_dispatch.shed_load_count$')}"


@attack("60 answers in chunks of 60 MB that nobody reads, over HTTP/1.1")
def unread_streams(server: Server) -> str:
    return _unread(server, 60, "/predictions/tell", b"fat 60 1000000")


@attack("60 answers in chunks of 60 MB that nobody reads, over one HTTP/2 connection")
def unread_streams_http2(server: Server) -> str:
    connection = Http2(server.target, unread_bytes=65_535)
    body = b"fat 60 1000000"
    streams = [
        connection.request("/predictions/tell", content_type="text/plain", content_length=str(len(body)))
        for _ in range(60)
    ]
    for stream in streams:
        connection.write(stream, body)
    time.sleep(20)
    found = f"{_memory(server)}; {len(connection.reset)} reset"
    connection.close()
    return found


@attack("250 answers of 6 MB that nobody reads")
def unread_answers(server: Server) -> str:
    return _unread(server, 250, "/predictions/echo/1.0", b"big 6000000", received_bytes=4096)


@attack("calls of half a second over gRPC that are cancelled at once")
def cancelled_calls(server: Server) -> str:
    trust = Path(server.certificate).read_bytes()
    return str(asyncio.run(_cancelled(server, trust, 10)))


@attack("requests with a time limit of a tenth of a microsecond")
def short_time_limits(server: Server) -> str:
    found: Counter[int] = Counter()
    end = time.monotonic() + 8
    with server.http() as http:
        while time.monotonic() < end:
            headers = {"x-timeout-ms": "0.0001", "content-type": "text/plain"}
            found[http.post("/predictions/echo", content=b"hi", headers=headers).status_code] += 1
    return f"{dict(found)}; ejected: {list(server.door.traffic().ejected)}"


@attack("forms that no handler can read, and broken ones")
def bad_forms(server: Server) -> str:
    found: Counter[int] = Counter()
    end = time.monotonic() + 8
    kinds = ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json"]
    with server.http() as http:
        while time.monotonic() < end:
            for kind in kinds:
                found[
                    http.post("/predictions/echo", content=b"x=%\xff", headers={"content-type": kind}).status_code
                ] += 1
    return f"{dict(found)}; ejected: {list(server.door.traffic().ejected)}"


@attack("a time limit of 1 ms, cancels and refused inputs, all at one version by a sticky header's value")
def client_decides(server: Server) -> str:
    """None of it may eject a version, or count against it in a rollout."""
    before = version_metrics.read(server.door.admin)
    found: Counter[int] = Counter()
    end = time.monotonic() + 8
    headers = {"content-type": "text/plain"}
    with server.http() as http:
        while time.monotonic() < end:
            late = http.post("/predictions/echo", content=b"sleep 0.05", headers={**headers, "x-timeout-ms": "1"})
            refused = http.post("/predictions/echo", content=b"bad \n[PID]1", headers=headers)
            found.update([late.status_code, refused.status_code])
            with suppress(httpx.TimeoutException):
                http.post("/predictions/echo", content=b"sleep 0.2", headers=headers, timeout=0.02)
    now = version_metrics.read(server.door.admin)
    errors = {name: now[name].errors - before[name].errors for name in before if name[0] == "echo"}
    return f"{dict(found)}; errors {errors}; ejected: {list(server.door.traffic().ejected)}"


@attack("exceptions whose messages hold lines that TorchServe would obey")
def forged_commands(server: Server) -> str:
    forged = (
        "x\n[METRICS]forged_total.Count:1|#a:b|#type:COUNTER|#hostname:h,1\r[PID]1\u2028[METRICS]forged2.Count:1|#a:b"
    )
    end, sent = time.monotonic() + 8, 0
    with server.http() as http:
        while time.monotonic() < end:
            http.post("/predictions/echo", content=f"fail {forged}".encode(), headers={"content-type": "text/plain"})
            sent += 1
    time.sleep(1.5)
    record = server.state.record()
    page = httpx.get(f"{record.addresses.metrics}/metrics", trust_env=False).text if record else ""
    log = (server.state.logs / "model_log.log").read_text("utf-8", "replace")
    return f"{sent:,} sent; on /metrics: {page.count('forged')}; tracebacks in the log: {log.count('Traceback')}"


@attack("batches of 16 answers of 6 MB")
def large_batches(server: Server) -> str:
    found: Counter[str] = Counter()

    def ask(_: int) -> str:
        with server.http() as http:
            begun = time.monotonic()
            try:
                answer = http.post("/predictions/echo", content=b"big 6000000", headers={"content-type": "text/plain"})
            except httpx.HTTPError as error:
                return type(error).__name__
            took = "under 5 s" if time.monotonic() - begun < 5 else "over 5 s"  # noqa: PLR2004
            return f"{answer.status_code} with {len(answer.content):,} bytes, {took}"

    with ThreadPoolExecutor(32) as pool:
        found.update(pool.map(ask, range(96)))
    return str(dict(found))


def _uploads(server: Server, count: int, head: bytes) -> str:
    def upload(_: int) -> str:
        with suppress(OSError), server.target.tls("http/1.1", timeout=15) as connection:
            connection.sendall(head)
            for _ in range(24):
                connection.sendall(b"a" * 1_000_000)
            return f"answered {hostile.status_of(connection)}"
        return "closed"

    with ThreadPoolExecutor(count) as pool:
        return str(dict(Counter(pool.map(upload, range(count)))))


def _unread(server: Server, count: int, path: str, body: bytes, received_bytes: int = 0) -> str:
    """So many requests, whose answers stay in the kernel's buffers (`received_bytes` if not 0) and in the server."""
    head = server.target.head(path, "Content-Type: text/plain", f"Content-Length: {len(body)}") + END
    with ExitStack() as held:
        for _ in range(count):
            connection = server.target.connect()
            if received_bytes:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, received_bytes)
            wrapped = held.enter_context(server.target.wrap(connection, "http/1.1"))
            wrapped.sendall(head + body)
        time.sleep(20)
        return _memory(server)


def _memory(server: Server) -> str:
    import psutil  # noqa: PLC0415

    sizes: Counter[str] = Counter()
    for process in psutil.process_iter(["name", "environ", "memory_info"]):
        if str(server.state.folder) in str(process.info["environ"]):
            sizes[process.info["name"]] += process.info["memory_info"].rss
    return ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in sizes.most_common(3))


async def _cancelled(server: Server, certificate: bytes, seconds: float) -> dict[str, int]:
    found: Counter[str] = Counter()
    trust = grpc.ssl_channel_credentials(certificate)
    options = [
        ("grpc.ssl_target_name_override", "localhost"),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    end = time.monotonic() + seconds
    request = PredictionsRequest(model_name="echo", input={"data": b"sleep 0.5"})
    while time.monotonic() < end:
        async with grpc.aio.secure_channel(f"{server.host}:{server.port}", trust, options) as channel:
            stub = InferenceAPIsServiceStub(channel)
            for _ in range(10):
                metadata = [("authorization", f"Bearer {server.token}")]
                calls = [stub.Predictions(request, metadata=metadata) for _ in range(100)]
                await asyncio.sleep(0.02)
                for call in calls:
                    call.cancel()
                for call in calls:
                    try:
                        await call
                        found["answered"] += 1
                    except asyncio.CancelledError:
                        found["cancelled"] += 1
                    except grpc.aio.AioRpcError as error:
                        found[error.code().name] += 1
    return dict(found)


# The good client beside.


@dataclass(frozen=True)
class Result:
    attack: str
    what: str
    outcome: str
    seconds: float
    before: dict[str, float]
    during: dict[str, float]
    after: dict[str, float]


def measured(server: Server, name: str) -> Result:
    """An attack, with the good client's requests before it, during it, and after it."""
    what, run = ATTACKS[name]
    ready, stop = multiprocessing.Event(), multiprocessing.Event()
    ours, theirs = multiprocessing.Pipe()
    where = (f"https://localhost:{server.port}", own_token(server.state), server.certificate)
    client = multiprocessing.Process(target=good_client, args=(where, ready, stop, theirs))
    client.start()
    ready.wait(60)
    start = time.monotonic()
    time.sleep(BEFORE_S)
    begin = time.monotonic()
    try:
        outcome = run(server)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the outcome)
        outcome = f"{type(error).__name__}: {error}"
    end = time.monotonic()
    time.sleep(AFTER_S)
    stop.set()
    times: list[tuple[float, float, str]] = ours.recv()
    client.join(60)
    parts = [[one for one in times if a <= one[0] < b] for a, b in ((start, begin), (begin, end), (end, end + AFTER_S))]
    return Result(name, what, outcome, round(end - begin, 1), *map(summary, parts))


def good_client(where: tuple[str, str, str], ready: Any, stop: Any, pipe: Any) -> None:
    """Calls the echo fifty times a second, and sends home when, how long in ms, and what went wrong."""
    url, token, certificate = where
    trust = ssl.create_default_context(cafile=certificate)
    times: list[tuple[float, float, str]] = []
    headers = {"authorization": f"Bearer {token}", "content-type": "text/plain"}
    with httpx.Client(base_url=url, verify=trust, headers=headers, timeout=30, trust_env=False) as http:
        while not stop.is_set():
            began = time.monotonic()
            try:
                answer = http.post("/predictions/echo", content=b"hello")
                wrong = "" if answer.is_success and answer.json() == {"text": "hello"} else str(answer.status_code)
            except (httpx.HTTPError, ValueError) as error:
                wrong = type(error).__name__
            times.append((began, (time.monotonic() - began) * 1000, wrong))
            ready.set()
            time.sleep(max(0.0, PAUSE_S - (time.monotonic() - began)))
    pipe.send(times)


def summary(times: list[tuple[float, float, str]]) -> dict[str, float]:
    ordered = sorted(ms for _, ms, _ in times)
    errors = Counter(wrong for _, _, wrong in times if wrong)
    found = {"requests": len(times), "errors": sum(errors.values())} | {f"errors {why}": n for why, n in errors.items()}
    if ordered:
        found |= {"p50 ms": round(ordered[len(ordered) // 2], 1), "p99 ms": round(ordered[len(ordered) * 99 // 100], 1)}
    return found


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    versions = {f"workflows/echo-{version}.yaml": ECHO.format(version=version) for version in ("1.0", "2.0")}
    small_project.make(folder, FILES | versions)
    try:
        tool(folder, "up", "--free-ports")
        state = State(folder)
        record = Door(state).record()
        if record is None:
            raise SystemExit("the front door has ended")
        host, port = connect.local_address(record.settings).split(":")
        yield Server(state, host, int(port), tool(folder, "token", "new", "mallory").strip())
    finally:
        tool(folder, "down")


def table(results: list[Result]) -> str:
    """In Markdown: errors of all requests, p50 and p99 in ms, before → during."""
    rows = ["| attack | errors | p50 ms | p99 ms | what became of it |", "|---|---|---|---|---|"]
    for one in results:
        before, during = one.before, one.during
        errors = f"{before['errors']:.0f} → {during['errors']:.0f} of {during['requests']:,.0f}"
        halves = [f"{before.get(key, 0):,.0f} → {during.get(key, 0):,.0f}" for key in ("p50 ms", "p99 ms")]
        rows.append(f"| {one.what} | {errors} | {halves[0]} | {halves[1]} | {one.outcome} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"names, separated by commas: {', '.join(ATTACKS)}")
    parser.add_argument("--json", action="store_true", help="all figures, for programs")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(ATTACKS)
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        parser.error(f"no attack {', '.join(unknown)}; known: {', '.join(ATTACKS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the server is stopped
    results = []
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as server:
        for name in names:
            results.append(measured(server, name))
            print(f"{name}: {results[-1].outcome}; {results[-1].during}", file=sys.stderr, flush=True)  # noqa: T201 (for a person)
    print(json.dumps([asdict(one) for one in results], indent=2) if options.json else table(results))  # noqa: T201


if __name__ == "__main__":
    main()
