"""The front door's cost, and the effect on clients of a swap of versions, a loading version, and hostile clients.

    python loadtests/front_door.py                 all four, ten minutes
    python loadtests/front_door.py cost swap       only these two

The project's own archives are served (`scripts/demo` builds them), and a workflow that does nothing. All figures of one
part come from one run, in which the compared sides take turns.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loadtests import hostile, small_project  # noqa: E402 (this file may be run by its path)
from torchserve_dag.bench import machine  # noqa: E402
from torchserve_dag.clients import Options, ServingError  # noqa: E402
from torchserve_dag.front_door.door import Door  # noqa: E402
from torchserve_dag.front_door.start import own_token  # noqa: E402
from torchserve_dag.releases import manual, versions  # noqa: E402
from torchserve_dag.server import launch  # noqa: E402
from torchserve_dag.server.connect import host_client, host_tokens, management_client, running  # noqa: E402
from torchserve_dag.server.state import Host, State  # noqa: E402
from torchserve_dag.stack import connect, supervise  # noqa: E402
from torchserve_dag.stack import start as stack  # noqa: E402

ECHO = """
from torchserve_dag.runtime.messages import Text

def same(text: Text) -> Text:
    return text
"""
YAML = """
name: echo
version: "1.0"
does: Nothing.
nodes: {same: {function: same, input: request}}
output: same
serve: {batch: 1}
"""
PHOTO = "photos/coffee.jpg"
WORKFLOW = "detect_classify"
BODY = b"x" * 1000
IDLE, IDLE_TLS = 10_000, 1_000
ROUNDS, ROUND_S = 6, 8.0


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextmanager
def server(folder: Path, host: Host) -> Iterator[State]:
    """The project's archives, two versions of the workflow among them, and an echo, with the front door."""
    small_project.make(folder, {"workflows/echo.py": ECHO, "workflows/echo.yaml": YAML})
    (folder / "routes.yaml").write_text(split(100, 0))
    for archive in sorted((ROOT / "model_store").glob(f"{WORKFLOW}-*.mar")):
        (folder / "model_store" / archive.name).symlink_to(archive)
    # Long limits, so that the front door holds the hostile connections instead of closing them.
    (folder / "front_door.yaml").write_text("limits: {headers_s: 60, idle_s: 60, requests_per_second: 100000}\n")
    stack.start(folder, launch.StartOptions(free_ports=True), host=host)
    supervise.start(State(folder))
    try:
        yield State(folder)
    finally:
        stack.stop(folder)


def split(old: int, new: int | None) -> str:
    newer = "" if new is None else f', "2.0": {new}'
    return f'{WORKFLOW}:\n  versions: {{"1.0": {old}{newer}}}\n'


# The cost of the front door.


def cost(state: State) -> dict[str, Any]:
    """A request of 1 KB to a model that does nothing: directly and through the front door, in turns."""
    found = {}
    with host_client(state, "grpc") as straight, connect.client(state, "grpc") as through:
        calls = {"straight": grpc_call(straight), "through": grpc_call(through)}
        found["gRPC"] = in_turns(calls)
    where, door = running(state).addresses, Door(state).record()
    assert door  # noqa: S101 (it was started)
    host, port = where.inference.removeprefix("http://").split(":")
    straight_http = http.client.HTTPConnection(host, int(port))
    context = ssl.create_default_context(cafile=door.certificate)
    host, port = connect.local_address(door.settings).split(":")
    through_http = http.client.HTTPSConnection(host, int(port), context=context)
    calls = {
        "straight": http_call(straight_http, host_tokens(state).inference),
        "through": http_call(through_http, own_token(state)),
    }
    found["REST"] = in_turns(calls)
    return found


def grpc_call(client: Any) -> Callable[[], None]:
    return lambda: client.predict("echo", BODY)


def http_call(connection: http.client.HTTPConnection, token: str) -> Callable[[], None]:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "text/plain"}

    def call() -> None:
        connection.request("POST", "/predictions/echo", BODY, headers)
        answer = connection.getresponse()
        answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise SystemExit(f"the echo answered {answer.status}")

    return call


def in_turns(calls: dict[str, Callable[[], None]], rounds: int = 30, each: int = 100) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(each):
                began = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - began) * 1000)
    found = {f"{name} p50 ms": percentile(values, 0.5) for name, values in times.items()}
    return found | {"costs ms": found["through p50 ms"] - found["straight p50 ms"]}


# A swap under load.


class Load:
    """Photos at a constant rate (an open loop); each latency is counted from when its request was due."""

    def __init__(self, state: State, per_second: float) -> None:
        self.times: list[tuple[float, float]] = []
        """When a request was due, and how many milliseconds later it was answered."""
        self.failed: list[str] = []
        self._client = connect.client(state)
        self._photo = (ROOT / PHOTO).read_bytes()
        self._pause, self._stop = 1 / per_second, threading.Event()

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(128)
        self._sending = threading.Thread(target=self._send)
        self._sending.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._sending.join()
        self._pool.shutdown()
        self._client.close()

    def _send(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            self._pool.submit(self._one, due)
            due += self._pause

    def _one(self, due: float) -> None:
        try:
            self._client.predict(WORKFLOW, self._photo)
        except ServingError as error:
            self.failed.append(str(error))
        else:
            self.times.append((due, (time.monotonic() - due) * 1000))

    def between(self, start: float, end: float) -> list[float]:
        return [ms for due, ms in self.times if start <= due < end]


def swap(state: State) -> dict[str, Any]:
    """Swap from 1.0 to 2.0 and back at 70 % of the server's capacity, in turns with equally long times without it."""
    root = state.folder.parent
    capacity = rate_of(state)
    rounds: list[tuple[float, float, float]] = []
    with Load(state, 0.7 * capacity) as load:
        for new in (100, 0):  # warm up both versions before measuring
            take(root, 100 - new, new)
            time.sleep(4)
        for _ in range(ROUNDS):
            quiet = time.monotonic()
            time.sleep(ROUND_S)
            begin = time.monotonic()
            for new in (100, 0):
                take(root, 100 - new, new)
                time.sleep(ROUND_S / 2)
            rounds.append((quiet, begin, time.monotonic()))
        time.sleep(3)
    quiet_p99 = [percentile(load.between(quiet, begin), 0.99) for quiet, begin, _ in rounds]
    swap_p99 = [percentile(load.between(begin, end), 0.99) for _, begin, end in rounds]
    return {
        "capacity /s": capacity,
        "requests": len(load.times),
        "failed": len(load.failed),
        "quiet p99 ms, each round": [round(ms) for ms in quiet_p99],
        "swapping p99 ms, each round": [round(ms) for ms in swap_p99],
        "ratio of medians": statistics.median(swap_p99) / statistics.median(quiet_p99),
    }


def load(state: State) -> dict[str, Any]:
    """The latency of other requests while a version loads its model, at 70 % of the server's capacity."""
    take(state.folder.parent, 100, None)
    capacity = rate_of(state)
    rounds: list[tuple[float, float, float]] = []
    with management_client(state) as client, Load(state, 0.7 * capacity) as under:
        for _ in range(ROUNDS // 2):
            versions.retire(state, client, WORKFLOW, "2.0")
            time.sleep(2)
            quiet = time.monotonic()
            time.sleep(ROUND_S)
            begin = time.monotonic()
            versions.load(state, client, WORKFLOW, "2.0", timeout_s=300)
            rounds.append((quiet, begin, time.monotonic()))
            time.sleep(5)
    quiet_ms = [under.between(quiet, begin) for quiet, begin, _ in rounds]
    loading_ms = [under.between(begin, end) for _, begin, end in rounds]
    return {
        "capacity /s": capacity,
        "requests": len(under.times),
        "failed": len(under.failed),
        "seconds to load": [round(end - begin, 1) for _, begin, end in rounds],
        "quiet p50 and p99 ms": [(round(percentile(ms, 0.5)), round(percentile(ms, 0.99))) for ms in quiet_ms],
        "loading p50 and p99 ms": [(round(percentile(ms, 0.5)), round(percentile(ms, 0.99))) for ms in loading_ms],
    }


def take(root: Path, old: int, new: int | None) -> None:
    (root / "routes.yaml").write_text(split(old, new))
    manual.reload_routes(root)


def rate_of(state: State, clients: int = 8, seconds: float = 12.0) -> float:
    """The server's throughput with this number of clients."""
    photo, end = (ROOT / PHOTO).read_bytes(), time.monotonic() + seconds

    def work(_: int) -> int:
        done = 0
        with connect.client(state) as client:
            while time.monotonic() < end:
                client.predict(WORKFLOW, photo)
                done += 1
        return done

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(work, range(clients))) / seconds


# Hostile clients.


def under_attack(state: State) -> dict[str, Any]:
    """A well-behaved client's latencies while others are hostile."""
    door = Door(state).record()
    assert door  # noqa: S101 (it was started)
    host, port = connect.local_address(door.settings).split(":")
    where = (host, int(port), own_token(state))
    found: dict[str, Any] = {"nobody hostile": good_times(state)}
    ways: dict[str, Callable[..., None]] = {
        f"{IDLE:,} idle connections": hold_idle,
        f"{IDLE_TLS:,} idle connections with TLS": hold_idle_tls,
        "500 heads that never end": send_slow_heads,
        "resets over HTTP/2, without pause": send_resets,
        "large heads, without pause": send_large,
        "wrong tokens, without pause": send_wrong_tokens,
    }
    for why, way in ways.items():
        ready = multiprocessing.Event()
        other = multiprocessing.Process(target=way, args=(where, ready))
        other.start()
        ready.wait(120)
        found[why] = good_times(state)
        other.kill()
        other.join()
    found["nobody hostile, afterwards"] = good_times(state)
    return found


def good_times(state: State, seconds: float = 10.0) -> dict[str, float]:
    """The latencies of the echo, called fifty times a second."""
    times, failed, end = [], 0, time.monotonic() + seconds
    with connect.client(state) as client:
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                client.predict("echo", BODY, options=Options(timeout_s=10))
            except ServingError:
                failed += 1
            times.append((time.monotonic() - began) * 1000)
            time.sleep(max(0.0, 0.02 - (time.monotonic() - began)))
    return {"p50 ms": statistics.median(times), "p99 ms": percentile(times, 0.99), "failed": failed}


Where = tuple[str, int, str]


def hold_idle(where: Where, ready: Any) -> None:
    with hostile.idle(hostile.Target(*where), IDLE, tls=False):
        ready.set()
        time.sleep(60)


def hold_idle_tls(where: Where, ready: Any) -> None:
    with hostile.idle(hostile.Target(*where), IDLE_TLS, tls=True):
        ready.set()
        time.sleep(60)


def send_slow_heads(where: Where, ready: Any) -> None:
    ready.set()
    hostile.slowloris(hostile.Target(*where), 500, 60)


def send_resets(where: Where, ready: Any) -> None:
    ready.set()
    while True:
        hostile.rapid_resets(hostile.Target(*where), 2000)


def send_large(where: Where, ready: Any) -> None:
    ready.set()
    while True:
        hostile.large_headers(hostile.Target(*where))


def send_wrong_tokens(where: Where, ready: Any) -> None:
    ready.set()
    target = hostile.Target(*where[:2], "wrong.wrong.wrong")
    while True:
        target.said(target.head("/predictions/echo", "Content-Length: 0") + hostile.END)


PARTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "cost": cost,
    "swap": swap,
    "load": load,
    "hostile": under_attack,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all unless given")
    parser.add_argument("--host", choices=["torchserve", "direct"], default="torchserve")
    options = parser.parse_args()
    asked = options.parts or list(PARTS)
    this = machine.this()
    results: dict[str, Any] = {"machine": this.processor, "cores": this.cores, "host": options.host}
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), options.host) as state:
        for name in asked:
            results[name] = PARTS[name](state)
            print(json.dumps({name: results[name]}, indent=2), flush=True)  # noqa: T201 (for a person)
    out = ROOT / "loadtests" / "results" / "front_door.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
