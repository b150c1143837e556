"""Ten minutes of everything at once: threads, open files and memory of the server must stay flat.

    python loadtests/soak.py                            10 minutes, 8 clients; writes loadtests/results/soak.{csv,png}
    python loadtests/soak.py --minutes 1 --clients 4

It serves a project of its own, made in a temporary folder: this project's `detect_classify`, and workflows of functions
that fan out over as many objects as a text has words, and stream. Good requests of all sizes, empty ones, broken
ones, ones with a thousand objects, ones whose client gives up, and streams that are left in the middle come in a random
order from the start to the end. Every five seconds it notes what each process of the server holds.
"""

from __future__ import annotations

import argparse
import collections
import csv
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import psutil
from rich.progress import track

from torchserve_dag.clients import Options, ServingError
from torchserve_dag.clients.client import Client
from torchserve_dag.runtime.messages import Text
from torchserve_dag.server.connect import host_client as client
from torchserve_dag.server.connect import running
from torchserve_dag.server.state import State

ROOT = Path(__file__).parents[1]
EVERY_S = 5.0
WARM_UP = 0.2
"""The share of the run that is not judged: caches fill, Java's heap grows to its limit."""

FLOW = """
name: objects
version: "1.0"
does: Fans out over the words of a text.
nodes:
  words: {function: words}
  upper: {function: upper, each: words, when: len(item.text) > 1}
  answer: {function: joined}
output: answer
serve: {timeout_s: 20}
""".replace("{function: joined}", "{function: joined, input: upper}")
TELL = """
name: tell
version: "1.0"
does: Tells a text word by word.
code: objects.py
nodes:
  tell: {function: tell}
output: tell
serve: {timeout_s: 20}
"""
FUNCTIONS = '''"""Functions of the soak."""

import time
from collections.abc import Iterator

from torchserve_dag.runtime.messages import InputError, Skipped, Text


def words(text: Text) -> list[Text]:
    return [Text(word) for word in text.text.split()]


def upper(text: Text) -> Text:
    if text.text == "bad":
        raise InputError("It is bad.", 422)
    if text.text == "slow":
        time.sleep(0.05)
    return Text(text.text.upper())


def joined(texts: list[Text | Skipped]) -> Text:
    return Text(" ".join(text.text for text in texts if isinstance(text, Text)))


def tell(text: Text) -> Iterator[Text]:
    for word in text.text.split():
        time.sleep(0.005)
        yield Text(word)
'''

PHOTOS = {name: (ROOT / "photos" / f"{name}.jpg").read_bytes() for name in ("empty", "coffee", "many")}
THOUSAND = Text(" ".join(f"w{i}" for i in range(1000)))


@dataclass
class Traffic:
    """What was asked, and what came of it."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers that were neither right nor a clear error."""
    over: threading.Event = field(default_factory=threading.Event)


def photo(name: str) -> Callable[[Client], None]:
    def ask(serving: Client) -> None:
        if not serving.predict("detect_classify", PHOTOS[name]).get("summary"):
            raise AssertionError(f"{name}: no summary")

    return ask


def words(text: Text, options: Options | None = None) -> Callable[[Client], None]:
    def ask(serving: Client) -> None:
        expected = " ".join(word.upper() for word in text.text.split() if len(word) > 1)
        if serving.predict("objects", text, options=options).get("text") != expected:
            raise AssertionError(f"{text.text[:20]}: the wrong words")

    return ask


def refused(model: str, body: bytes, status: int) -> Callable[[Client], None]:
    def ask(serving: Client) -> None:
        try:
            serving.predict(model, body)
        except ServingError as error:
            if error.status != status:
                raise
        else:
            raise AssertionError(f"{model} took {body[:20]!r}")

    return ask


def gives_up(serving: Client) -> None:
    try:
        serving.predict("objects", Text("slow " * 100), options=Options(timeout_s=0.1))
    except ServingError as error:
        if error.status != 504:  # noqa: PLR2004
            raise


def leaves(serving: Client) -> None:
    pieces = serving.stream("tell", Text("word " * 200))
    next(pieces)
    pieces.close()


KINDS: dict[str, Callable[[Client], None]] = {
    "photo without objects": photo("empty"),
    "photo with one": photo("coffee"),
    "photo with fourteen": photo("many"),
    "not a photo": refused("detect_classify", b"nothing like it", 415),
    "an empty body": refused("objects", b"", 400),
    "no words": words(Text(" ")),
    "ten words": words(Text("some of these words are in it ten times over")),
    "a thousand words": words(THOUSAND),
    "a thousand words in bulk": words(THOUSAND, Options(priority="bulk")),
    "a bad word": refused("objects", b"good bad good", 422),
    "a client that gives up": gives_up,
    "a stream that is left": leaves,
}


def ask_until_over(serving: Client, traffic: Traffic, seed: int) -> None:
    chance = random.Random(seed)
    while not traffic.over.is_set():
        kind = chance.choice(list(KINDS))
        try:
            KINDS[kind](serving)
            traffic.outcomes[kind] += 1
        except (ServingError, AssertionError) as error:
            traffic.wrong.append(f"{kind}: {error}")


@contextmanager
def served() -> Iterator[State]:
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root = Path(folder)
        for name in ("handlers", "weights", "config.properties", "log4j2.xml"):
            (root / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "workflows", root / "workflows")
        for name, text in {"objects.yaml": FLOW, "tell.yaml": TELL, "objects.py": FUNCTIONS}.items():
            (root / "workflows" / name).write_text(text)
        tool(root, "build", "detect_classify/2.0", "objects", "tell")
        tool(root, "up", "--free-ports", "--no-front-door")
        try:
            yield State(root)
        finally:
            tool(root, "down")


def tool(root: Path, *words: str) -> None:
    subprocess.run(  # noqa: S603 (our own command)
        [sys.executable, "-m", "torchserve_dag", *words], cwd=root, check=True, timeout=300
    )


def held(java: psutil.Process) -> dict[str, float]:
    """What the server's processes hold now: Java's own, and all of its workers' together."""
    workers = [child for child in java.children(recursive=True) if "model_service_worker" in " ".join(child.cmdline())]
    found = {}
    for name, processes in (("Java", [java]), ("workers", workers)):
        found[f"{name}: threads"] = float(sum(p.num_threads() for p in processes))
        found[f"{name}: open files"] = float(sum(p.num_fds() for p in processes))
        found[f"{name}: memory MB"] = sum(p.memory_info().rss for p in processes) / 1e6
    return found


def growth(times: list[float], values: list[float]) -> float:
    """How much of its mean a series grows over the judged part of the run, by a straight line through it."""
    first = int(len(times) * WARM_UP)
    slope = np.polyfit(times[first:], values[first:], 1)[0]
    return float(slope * (times[-1] - times[first]) / np.mean(values[first:]))


def draw(path: Path, times: list[float], series: dict[str, list[float]], title: str) -> None:
    mpl.use("Agg")
    figure, axes = plt.subplots(3, 2, figsize=(10, 8), sharex=True, layout="constrained")
    for axis, (name, values) in zip(axes.T.flat, series.items(), strict=True):
        axis.plot([t / 60 for t in times], values, color="#2563a8")
        axis.axvspan(0, times[-1] * WARM_UP / 60, color="#999999", alpha=0.15)
        axis.set(title=f"{name} ({growth(times, values):+.1%})", ylim=(0, max(values) * 1.2))
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("minutes")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8, help="half of them over REST, half over gRPC")
    parser.add_argument("--results", type=Path, default=ROOT / "loadtests" / "results")
    options = parser.parse_args()
    traffic = Traffic()
    times: list[float] = []
    rows: list[dict[str, float]] = []
    with served() as state, client(state, "rest") as rest, client(state, "grpc") as grpc:
        java = psutil.Process(running(state).pid)
        threads = [
            threading.Thread(target=ask_until_over, args=((rest, grpc)[i % 2], traffic, i), daemon=True)
            for i in range(options.clients)
        ]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        for _ in track(range(int(options.minutes * 60 / EVERY_S)), "Under load"):
            time.sleep(EVERY_S)
            rows.append(held(java))
            times.append(time.monotonic() - began)
        traffic.over.set()
        for thread in threads:
            thread.join(60)
    options.results.mkdir(exist_ok=True)
    series = {name: [row[name] for row in rows] for name in rows[0]}
    with (options.results / "soak.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seconds", *series])
        writer.writerows(zip((round(t, 1) for t in times), *series.values(), strict=True))
    total = sum(traffic.outcomes.values())
    machine = f"{psutil.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%d %B %Y')}"
    title = f"{total:,} requests in {times[-1] / 60:.0f} minutes, {len(traffic.wrong)} of them wrong ({machine})"
    draw(options.results / "soak.png", times, series, title)
    report = [title, *(f"  {count:6,} {kind}" for kind, count in traffic.outcomes.most_common())]
    report += [f"  grew by {growth(times, values):+6.1%}  {name}" for name, values in series.items()]
    report += [f"  wrong: {what}" for what in traffic.wrong[:20]]
    sys.stdout.write("\n".join(report) + "\n")
    sys.exit(1 if traffic.wrong else 0)


if __name__ == "__main__":
    main()
