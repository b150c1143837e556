"""What moderation costs: the workflow `moderated_chat` beside the language model alone, through the same front door.

    python loadtests/moderated.py --rounds 3 --seconds 15

Both are served from one project, with the weights of `scripts/weights --language`, and take turns. The first text is
the first token of the model alone, and the first sentence of the workflow, which is held back until it is judged.
Tables are printed, and `loadtests/results/moderated.json` written; the exit status is 1 where the workflow has less
than 0.9 of the model's tokens a second with the most clients.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402 (this file may be run by its path)
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from loadtests.language_arranged import IN_FLIGHT, ROOM, Program, show  # noqa: E402
from loadtests.language_client import Load, Measured  # noqa: E402
from loadtests.language_server import LanguageServer, serving, weights_for  # noqa: E402
from torchserve_dag.bench import machine  # noqa: E402
from torchserve_dag.server.rates import rates, read  # noqa: E402

RESULTS = ROOT / "loadtests" / "results"
ALONE, MODERATED, JUDGE, FILTER = "text_generation", "moderated_chat", "text_moderation", "english-profanity"
LEAST = 0.9
WARM_UP_S = 2.0
CONSOLE = Console(width=140)
Key = tuple[str, int]


def files(root: Path) -> dict[str, str]:
    """The workflow and its classifier, as they are in this repository, for a project that has the model."""
    (root / "weights").mkdir(parents=True)
    (root / "weights" / FILTER).symlink_to(ROOT / "weights" / FILTER, target_is_directory=True)
    names = [f"handlers/{JUDGE}.py", f"handlers/{JUDGE}.yaml"]
    names += [f"workflows/{MODERATED}.py", f"workflows/{MODERATED}.yaml"]
    return {name: (ROOT / name).read_text("utf-8") for name in names}


def in_turns(server: LanguageServer, options: argparse.Namespace) -> dict[Key, list[Measured]]:
    """Each of the two with each number of clients, `rounds` times; every round begins with the other."""
    door = server.at_door()
    places = [replace(door, name=name, fields={**door.fields, "model": name}) for name in (ALONE, MODERATED)]
    clients = [int(count) for count in options.clients.split(",")]
    found: dict[Key, list[Measured]] = {(place.name, count): [] for count in clients for place in places}
    loads = 0
    with Program("language_client.py") as client:
        for number in range(options.rounds):
            for count in clients:
                for place in places[:: -1 if number % 2 else 1]:
                    loads += 1
                    load = Load(count, options.seconds, WARM_UP_S, loads * 10_000, place)
                    found[place.name, count].append(measured := client.measure(load))
                    show(f"{number + 1}: {place.name}, {count} clients: {measured.tokens_per_s:.1f} tokens/s")
    return found


def rows(found: dict[Key, list[Measured]]) -> list[dict[str, Any]]:
    """The medians of all rounds."""

    def median(rounds: list[Measured], name: str) -> float:
        values: list[float] = [value for one in rounds for value in getattr(one, name)]
        if not values:
            raise SystemExit("no answer began within a measurement: measure for longer, with --seconds")
        return statistics.median(values)

    return [
        {
            "model": name,
            "clients": clients,
            "tokens_per_s": statistics.median(one.tokens_per_s for one in rounds),
            "first_ms": 1000 * median(rounds, "first_s"),
            "whole_ms": 1000 * median(rounds, "whole_s"),
            "answers": sum(one.answers for one in rounds),
            "errors": [error for one in rounds for error in one.errors][:5],
        }
        for (name, clients), rounds in found.items()
    ]


def per_node(server: LanguageServer) -> list[dict[str, Any]]:
    """What each node of the workflow has taken: a batch in its lane, an item in its queue, and all together."""
    record = server.state.record()
    if record is None:
        raise SystemExit("the server has ended")
    page = httpx.get(f"{record.addresses.metrics}/metrics", timeout=30, trust_env=False).text
    of_nodes = rates({}, read(page, MODERATED, "1.0"), 1.0)  # as if since the start, a second ago: totals
    return [
        {
            "node": name,
            "items": int(node.items_s),
            "batch": node.batch,
            "run_ms": 1000 * node.run_s,
            "queue_ms": 1000 * node.wait_s,
            "lane_s": node.busy,
        }
        for name, node in of_nodes.items()
    ]


def measure(options: argparse.Namespace) -> list[str]:
    """Measure, print and write. Returns what is not as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        settings = {"room": options.room, "tokens_in_flight": IN_FLIGHT}
        weights = weights_for("openvino", "smollm2", Path(folder))
        with serving(root, weights, settings, files(root), (ALONE, MODERATED)) as server:
            found = rows(in_turns(server, options))
            nodes = per_node(server)
    print_table("moderated_chat beside text_generation", found)
    print_table("moderated_chat, its nodes", nodes)
    RESULTS.mkdir(exist_ok=True)
    about = {"machine": asdict(machine.this()), "date": datetime.now(timezone.utc).isoformat()}
    written = {**about, "options": vars(options), "rows": found, "nodes": nodes}
    (RESULTS / "moderated.json").write_text(json.dumps(written, indent=2) + "\n")
    wrong = [f"{row['model']}, {row['clients']} clients: {row['errors'][0]}" for row in found if row["errors"]]
    most = max(row["clients"] for row in found)
    speeds = {row["model"]: row["tokens_per_s"] for row in found if row["clients"] == most}
    if (ratio := speeds[MODERATED] / speeds[ALONE]) < LEAST:
        wrong.append(f"{most} clients: {ratio:.2f} of the model's tokens a second, not {LEAST:.2f}")
    return wrong


def print_table(title: str, found: list[dict[str, Any]]) -> None:
    table = Table(*found[0], title=title)
    for row in found:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--room", type=int, default=ROOM, help="answers at the same time")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the server is stopped
    sys.exit("\n".join(measure(parser.parse_args())) or None)


if __name__ == "__main__":
    main()
