"""Clients that leave in the middle of their requests: is anything of a request begun after its client has left?

    python loadtests/leaving.py                 a thousand clients, on the direct host
    python loadtests/leaving.py --clients 5000

A workflow of three slow functions, and one that streams, are served by `torchserve-dag up --host direct`. Each client
sends its request to the host's plain port, over REST or gRPC, and closes its connection after a random while, in which
its request waits, computes or streams. The functions write down when they begin; what they begin LATE_S or more after
their client left is counted. The exit status is 1 if there is any.
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpc  # noqa: E402 (this file may be run by its path)
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from loadtests import small_project  # noqa: E402
from torchserve_dag.clients import KeyFile  # noqa: E402
from torchserve_dag.runtime.protos.inference_pb2 import PredictionsRequest  # noqa: E402
from torchserve_dag.runtime.protos.inference_pb2_grpc import InferenceAPIsServiceStub  # noqa: E402
from torchserve_dag.server.connect import running  # noqa: E402
from torchserve_dag.server.state import State  # noqa: E402

LATE_S = 0.1
AT_ONCE = 50
"""How many clients there are at a time."""
LONGEST_S = 1.0
"""After this time at the latest a client leaves."""
SETTLE_S = 15.0

CODE = """
from __future__ import annotations
import os, time
from collections.abc import Iterator
from torchserve_dag import Text

LOG = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def _begin(text: Text) -> None:
    os.write(LOG, f"{{text.text}} {{time.time()}}\\n".encode())

def step(text: Text) -> Text:
    _begin(text)
    time.sleep(0.02)
    return text

def tell(text: Text) -> Iterator[Text]:
    for _ in range(100):
        _begin(text)
        time.sleep(0.02)
        yield text
"""
STEPS = """
name: steps
version: "1.0"
does: Three slow steps.
code: leaving.py
nodes:
  first: {function: step, input: request}
  second: {function: step, input: first}
  third: {function: step, input: second}
output: third
"""
TELL = """
name: tell
version: "1.0"
does: A slow stream.
code: leaving.py
nodes: {tell: {function: tell}}
output: tell
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Clients that leave in the middle of their requests.")
    parser.add_argument("--clients", type=int, default=1000)
    clients = parser.parse_args().clients
    with tempfile.TemporaryDirectory() as folder:
        root, log = Path(folder) / "project", Path(folder) / "begun"
        root.mkdir()
        code = CODE.format(log=str(log))
        files = {"workflows/leaving.py": code, "workflows/steps.yaml": STEPS, "workflows/tell.yaml": TELL}
        small_project.make(root, files)
        small_project.tool(root, "up", "--free-ports", "--host", "direct")
        try:
            left = leave(root, clients)
            time.sleep(SETTLE_S)
        finally:
            small_project.tool(root, "down")
        sys.exit(report(left, log.read_text("utf-8").splitlines()))


def leave(root: Path, clients: int) -> dict[str, float]:
    """Send the requests, and leave each. Returns when each client left, by the text that it sent."""
    state = State(root)
    where, key = running(state).addresses, KeyFile.read(state.key_file).inference
    left: dict[str, float] = {}
    chance = random.Random(1)
    ways = {"rest": _over_rest(where.inference, key), "grpc": _over_grpc(where.grpc_inference, key)}
    plan = [(way, model) for way in ways for model in ("steps", "tell")]

    def one(number: int) -> None:
        way, model = plan[number % len(plan)]
        text = f"{way}-{model}-{number}"
        ways[way](model, text, chance.uniform(0.0, LONGEST_S), left)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in track(pool.map(one, range(clients)), "clients leave", clients):
            pass
    return left


Leave = Callable[[str, str, float, dict[str, float]], None]


def _over_rest(address: str, key: str) -> Leave:
    host, _, port = address.removeprefix("http://").rpartition(":")

    def leave_after(model: str, text: str, after_s: float, left: dict[str, float]) -> None:
        head = f"POST /predictions/{model} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
        head += f"content-type: text/plain\r\ncontent-length: {len(text)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}{text}".encode())
            time.sleep(after_s)
        left[text] = time.time()

    return leave_after


def _over_grpc(address: str, key: str) -> Leave:
    channel = grpc.insecure_channel(address)
    stub = InferenceAPIsServiceStub(channel)
    metadata = (("authorization", f"Bearer {key}"),)

    def leave_after(model: str, text: str, after_s: float, left: dict[str, float]) -> None:
        asked = PredictionsRequest(model_name=model, input={"body": text.encode()})
        call = stub.StreamPredictions(asked, metadata=metadata, timeout=60)
        threading.Thread(target=_read, args=[call], daemon=True).start()
        time.sleep(after_s)
        call.cancel()
        left[text] = time.time()

    return leave_after


def _read(call: grpc.Call) -> None:
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        return


def report(left: dict[str, float], begun: list[str]) -> int:
    """Print what was begun, and how long after its client left. Returns the exit status."""
    table = Table(
        "", "clients", "steps begun", f"{LATE_S * 1000:.0f} ms after leaving", "latest, ms", "median of the latest"
    )
    late_in_all = 0
    for kind in ("rest-steps", "rest-tell", "grpc-steps", "grpc-tell"):
        texts = [text for text in left if text.startswith(f"{kind}-")]
        after: dict[str, list[float]] = {}
        for line in begun:
            text, at = line.split()
            if text.startswith(f"{kind}-"):
                after.setdefault(text, []).append(float(at) - left[text])
        all_s = [one for times in after.values() for one in times]
        late = sum(one > LATE_S for one in all_s)
        late_in_all += late
        latest = [max(times) for times in after.values()]
        row = (len(all_s), late, round(1000 * max(all_s)), round(1000 * statistics.median(latest)))
        table.add_row(kind, str(len(texts)), *map(str, row))
    Console().print(table)
    return 1 if late_in_all else 0


if __name__ == "__main__":
    main()
