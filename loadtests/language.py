"""A language model's speed: the engine's bare loop, the worker's socket, and `/v1` through the front door, in turns.

    python loadtests/language.py speed --engine openvino --rounds 3 --seconds 15
    python loadtests/language.py batching                 16 clients against one
    python loadtests/language.py prefix                   a prompt whose first 500 tokens another one had
    python loadtests/language.py pace                     a running stream while a prompt of 2,000 tokens enters

The clients, the bare loop and the server are processes of their own on this machine. All that is compared takes turns,
round after round, so that other work on the machine disturbs all alike. A table is printed, and
`loadtests/results/language_MODE_ENGINE.json` written; the exit status is 1 where a limit of LIMITS is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402 (this file may be run by its path)
from rich.table import Table  # noqa: E402

from loadtests.language_arranged import PREFILL, ROOM, Arranged, arranged, show  # noqa: E402
from loadtests.language_client import Answer, Connection, Load, Measured, Place, chat, connect  # noqa: E402
from torchserve_dag.bench import machine  # noqa: E402

RESULTS = ROOT / "loadtests" / "results"
CLIENTS = (1, 4, 16, 32)
WARM_UP_S = 2.0
LIMITS = {"worker": (0.95, 5.0), "/v1": (0.90, 10.0)}
"""Of a place: the least part of the bare loop's tokens a second; and how many ms more the first token may take, of one
client."""
BATCHING = 3.0
"""The least ratio of the tokens a second of 16 clients to those of one."""
COMMON = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
LONG = 1960
"""Tokens of a long prompt: as many as the context has, but for the template and the answer."""
AFTER = 60
PREFIX = 0.3
"""The largest ratio of the times to the first token: of the second prompt with the same beginning, to the first."""


# Speed, and batching.


@dataclass
class Cell:
    """What was measured at a place with a number of clients, in all rounds."""

    place: str
    clients: int
    rounds: list[Measured] = field(default_factory=list)
    server_s: list[float] = field(default_factory=list)
    """Seconds of CPU in each round."""

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(one.tokens_per_s for one in self.rounds)

    @property
    def cpu(self) -> float:
        return statistics.median(one.cpu for one in self.rounds)

    @property
    def cpu_ms_per_token(self) -> float:
        """Of the server's processes, or of the bare loop's: other work on the machine hardly changes it."""
        return 1000 * sum(self.server_s) / max(1, sum(one.tokens for one in self.rounds))

    @property
    def errors(self) -> list[str]:
        return [error for one in self.rounds for error in one.errors]

    def ms(self, name: str, share: float = 0.5) -> float:
        """A percentile of `first_s` or `per_token_s`, of all rounds, in milliseconds."""
        values = sorted(value for one in self.rounds for value in getattr(one, name))
        return 1000 * values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")

    def row(self) -> dict[str, Any]:
        figures = {f"{name}_ms_p{share}": self.ms(name, share / 100) for name in NAMES for share in (50, 95)}
        named = {"place": self.place, "clients": self.clients, "tokens_per_s": self.tokens_per_s}
        each = [round(one.tokens_per_s, 1) for one in self.rounds]
        figures |= {"client_cpu": self.cpu, "cpu_ms_per_token": self.cpu_ms_per_token}
        return {**named, **figures, "tokens_per_s_of_rounds": each, "errors": self.errors}


CONSOLE = Console(width=None if sys.stdout.isatty() else 140)
NAMES = ("first_s", "per_token_s")
Cells = dict[tuple[str, int], Cell]


def in_turns(this: Arranged, options: argparse.Namespace, clients: tuple[int, ...]) -> Cells:
    """Each place with each number of clients, `rounds` times; every round begins with another place."""
    places = list(this.places.items())
    cells = {(name, count): Cell(name, count) for count in clients for name, _ in places}
    loads = 0
    for number in range(options.rounds):
        for count in clients:
            first = (number + count) % len(places)
            for name, place in places[first:] + places[:first]:
                loads += 1
                load = Load(count, options.seconds, WARM_UP_S, loads * 10_000, place)
                before = this.cpu_s(place)
                cells[name, count].rounds.append(measured := this.measure(load))
                cells[name, count].server_s.append(this.cpu_s(place) - before)
                show(f"{number + 1}: {name}, {count} clients: {measured.tokens_per_s:.1f} tokens/s {measured.errors}")
    return cells


def speed(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    with arranged(options, bare=True) as this:
        cells = in_turns(this, options, tuple(map(int, options.clients.split(","))))
    table = Table(
        "clients", "place", "tokens/s", "of bare", "first token ms p50", "p95", "more", "ms/token p50", "p95",
        "CPU ms/token", "client's CPU", title=f"{options.engine}, {options.model}",
    )  # fmt: skip
    kept = [f"{cell.place}, {cell.clients} clients: {cell.errors[0]}" for cell in cells.values() if cell.errors]
    for (name, count), cell in cells.items():
        bare = cells.get(("bare loop", count), cell)
        ratio, more = cell.tokens_per_s / bare.tokens_per_s, cell.ms("first_s") - bare.ms("first_s")
        numbers = (cell.ms("first_s", 0.95), more, cell.ms("per_token_s"), cell.ms("per_token_s", 0.95))
        words = [f"{cell.tokens_per_s:.1f}", f"{ratio:.2f}", *(f"{one:.1f}" for one in (cell.ms("first_s"), *numbers))]
        table.add_row(str(count), name, *words, f"{cell.cpu_ms_per_token:.2f}", f"{cell.cpu:.2f}")
        least, most_ms = LIMITS.get(name, (0.0, float("inf")))
        if ratio < least:
            kept.append(f"{name}, {count} clients: {ratio:.2f} of the bare loop's tokens a second, not {least:.2f}")
        if count == 1 and more > most_ms:
            kept.append(f"{name}: the first token takes {more:.1f} ms more than the bare loop's, not {most_ms:g}")
    CONSOLE.print(table)
    return [cell.row() for cell in cells.values()], kept


def batching(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    with arranged(options, bare=True) as this:
        cells = in_turns(this, options, (1, 16))
        places = list(this.places)
    table = Table("place", "1 client tokens/s", "16 clients tokens/s", "ratio", title=f"{options.engine}: batching")
    kept = []
    for name in places:
        one, many = cells[name, 1].tokens_per_s, cells[name, 16].tokens_per_s
        table.add_row(name, f"{one:.1f}", f"{many:.1f}", f"{many / one:.2f}")
        if name in LIMITS and many < BATCHING * one:
            kept.append(f"{name}: 16 clients get {many / one:.2f} times the tokens of one, not {BATCHING:g}")
    CONSOLE.print(table)
    return [cell.row() for cell in cells.values()], kept


# One or two requests at a time.


def prefix(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Pairs of prompts with the same beginning, each pair with one of its own; nobody else asks."""
    with arranged(options, bare=False) as this:
        rows = asyncio.run(_pairs(this, options.rounds))
    table = Table(
        "place",
        "prompt tokens",
        "first ms",
        "second ms",
        "ratio",
        "cached",
        title=f"{options.engine}: the time to the first token of two prompts with the same beginning",
    )
    kept = []
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
        if row["ratio"] > PREFIX:
            kept.append(f"{row['place']}: the second prompt's first token takes {row['ratio']:.2f} of the first's")
    CONSOLE.print(table)
    return rows, kept


async def _pairs(this: Arranged, rounds: int) -> list[dict[str, Any]]:
    places = [place for place in this.places.values() if place]
    found: dict[str, list[tuple[Answer, Answer]]] = {place.name: [] for place in places}
    connections = {place.name: await connect(place) for place in places}
    count = await words_of(places[0], 500)
    for _ in range(max(rounds, 5)):
        for place in places:
            words = text_of(count)
            ends = ("What comes first?", "Who is it about?")
            pair = [await connections[place.name].ask(place, chat(f"{words} {end}", 8)) for end in ends]
            if wrong := [answer.error for answer in pair if not answer.ok]:
                raise SystemExit(f"{place.name}: {wrong[0]}")
            found[place.name].append((pair[0], pair[1]))
    rows = []
    for name, pairs in found.items():
        first, second = (statistics.median(pair[at].first_s for pair in pairs) * 1000 for at in (0, 1))
        tokens, cached = min(pair[0].prompt_tokens for pair in pairs), pairs[-1][1].cached_tokens
        row = {"place": name, "tokens": tokens, "first_ms": first, "second_ms": second, "ratio": second / first}
        rows.append({**row, "cached": cached})
    return rows


def pace(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The gaps between the chunks of a running stream, before and while a prompt of 2,000 tokens enters."""
    with arranged(options, bare=False) as this:
        rows = asyncio.run(_paces(this, options.rounds))
    title = f"{options.engine}: the gaps between tokens; prefill_tokens {options.prefill_tokens}"
    table = Table(
        "place", "prompt tokens", "alone ms p50", "max", "while it enters ms p50", "p95", "max", "gaps",
        "its first token ms", title=title,
    )  # fmt: skip
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    CONSOLE.print(table)
    return rows, []


async def _paces(this: Arranged, rounds: int) -> list[dict[str, Any]]:
    rows = []
    count = await words_of(this.server.at_worker(), LONG)
    for place in filter(None, this.places.values()):
        alone: list[float] = []
        during: list[float] = []
        entered: list[Answer] = []
        for _ in range(rounds):
            stream, other = await connect(place), await connect(place)
            answer, late = await _entering(stream, other, place, count)
            middle = [(late.began, late.times[0])] if late.times else []
            gaps = list(zip(answer.times, answer.times[1:], strict=False))
            for begin, end in middle:
                alone += [(b - a) * 1000 for a, b in gaps if b < begin]
                during += [(b - a) * 1000 for a, b in gaps if b >= begin and a <= end]
            entered.append(late)
        tokens, first = entered[-1].prompt_tokens, statistics.median(late.first_s for late in entered) * 1000
        row = {"place": place.name, "tokens": tokens, "alone_p50": statistics.median(alone), "alone_max": max(alone)}
        ordered = sorted(during)
        row |= {"during_p50": statistics.median(during), "during_p95": ordered[int(0.95 * len(ordered))]}
        rows.append(row | {"during_max": ordered[-1], "gaps": len(during), "first_ms": first})
    return rows


async def _entering(stream: Connection, other: Connection, place: Place, count: int) -> tuple[Answer, Answer]:
    """A stream, and a prompt of `count` words that comes once it has AFTER chunks."""
    begun = asyncio.Event()
    stream.on_chunk = lambda: begun.set() if len(stream.answer.times) > AFTER else None
    running = stream.send(place, chat(f"Tell me a very long story. {text_of(20)}", 1200))
    await asyncio.wait({running, asyncio.ensure_future(begun.wait())}, return_when=asyncio.FIRST_COMPLETED)
    late = await other.ask(place, chat(text_of(count), 1))
    if not late.ok:
        raise SystemExit(f"{place.name}: {late.error}")
    await asyncio.sleep(0.2)
    stream.transport.abort()
    other.transport.abort()
    return stream.answer, late


async def words_of(place: Place, tokens: int) -> int:
    """How many words at random have so many tokens in this model's vocabulary."""
    connection = await connect(place)
    found = [(await connection.ask(place, chat(text_of(count), 1))).prompt_tokens for count in (20, 120)]
    connection.transport.close()
    if found[1] <= found[0]:
        raise SystemExit(f"the model does not say how many tokens its prompts have: {found}")
    return int((tokens - found[0]) * 100 / (found[1] - found[0])) + 20


def text_of(words: int) -> str:
    return " ".join(random.choices(COMMON, k=words))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


Mode = Callable[[argparse.Namespace], tuple[list[dict[str, Any]], list[str]]]
MODES: dict[str, Mode] = {"speed": speed, "batching": batching, "prefix": prefix, "pace": pace}


def measure(options: argparse.Namespace) -> list[str]:
    """Run a mode, and write its JSON. Returns what is not as it should be."""
    rows, wrong = MODES[options.mode](options)
    about = {"machine": asdict(machine.this()), "date": datetime.now(timezone.utc).isoformat()}
    about["openvino-genai"] = _version("openvino-genai")
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"language_{options.mode}_{options.engine}.json"
    out.write_text(json.dumps({**about, "options": vars(options), "rows": rows, "not kept": wrong}, indent=2) + "\n")
    return wrong


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("mode", choices=MODES)
    found.add_argument("--engine", default="openvino")
    found.add_argument("--model", default="smollm2", help="smollm2, tiny (the tests' small Llama), or a path")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    found.add_argument("--clients", default=",".join(map(str, CLIENTS)))
    found.add_argument("--room", type=int, default=ROOM, help="answers at the same time")
    found.add_argument("--prefill-tokens", type=int, default=PREFILL)
    found.add_argument("--settings", default="{}", help="more settings of the handler, in JSON")
    return found


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the server is stopped
    wrong = measure(parser().parse_args())
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
