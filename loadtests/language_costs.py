"""What each workflow of language models costs one client, through the front door and `/v1`: docs/language.md has it.

    python loadtests/language_costs.py --times 10

All are served from one project, on the direct host, with the weights of `scripts/weights --language`, and asked in
turns by OpenAI's own client. A table is printed, and `loadtests/results/language_costs.json` written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402 (this file may be run by its path)
import openai  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from loadtests import small_project  # noqa: E402
from torchserve_dag.bench import machine  # noqa: E402
from torchserve_dag.front_door.door import Door  # noqa: E402
from torchserve_dag.server.state import State  # noqa: E402

RESULTS = ROOT / "loadtests" / "results"
ANSWER_S = 300.0
QUESTION = "What is the capital of France?"
PERSON: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "person",
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
    },
}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "text_generation": (QUESTION, {}),
    "moderated_chat": (QUESTION, {}),
    "chat_with_fallback": (QUESTION, {}),
    "tools": (QUESTION, {}),
    "ask_docs": ("How do I roll a version back?", {}),
    "extract": ("Ada Lovelace is 36 years old.", {"response_format": PERSON}),
}
"""Each model with what it is asked, and with which other fields."""


@dataclass
class Asked:
    """The answers of one model."""

    first_ms: list[float] = field(default_factory=list)
    """Until the first text."""
    whole_ms: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Of the last answer, as the two above."""
    text: str = ""


def ask(client: openai.OpenAI, model: str, found: Asked) -> None:
    question, more = ASKED[model]
    began, first, text = time.perf_counter(), None, ""
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
        **more,
    )
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
        if text and first is None:
            first = time.perf_counter()
        if chunk.usage:
            found.prompt_tokens, found.completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    found.first_ms.append(1000 * ((first or began) - began))
    found.whole_ms.append(1000 * (time.perf_counter() - began))
    found.text = text


def project(root: Path) -> None:
    for name in ("handlers", "workflows"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "weights").symlink_to(ROOT / "weights")
    small_project.tool(root, "index", str(ROOT / "docs"), "--name", "docs")
    small_project.make(root, {}, tuple(ASKED))


def measure(times: int) -> dict[str, Asked]:
    found = {model: Asked() for model in ASKED}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        project(root)
        try:
            small_project.tool(root, "up", "--free-ports", "--host", "direct")
            record = Door(State(root)).record()
            if record is None:
                raise SystemExit("the front door has ended")
            trust = ssl.create_default_context(cafile=record.certificate)
            url = f"https://localhost:{record.settings.listen.rpartition(':')[2]}/v1"
            token = small_project.tool(root, "token", "new", "load").strip()
            http = httpx.Client(verify=trust, timeout=ANSWER_S)
            with openai.OpenAI(base_url=url, api_key=token, http_client=http, max_retries=0) as client:
                for number in range(times + 1):
                    for model, asked in found.items():
                        ask(client, model, asked if number else Asked())  # the first round warms up
        finally:
            small_project.tool(root, "down")
    return found


def print_table(found: dict[str, Asked], models: Sequence[str]) -> None:
    table = Table("model", "first text ms p50", "whole ms p50", "tokens read", "written", "answer")
    for model in models:
        one = found[model]
        numbers = (statistics.median(one.first_ms), statistics.median(one.whole_ms))
        table.add_row(
            model, *(f"{ms:.0f}" for ms in numbers), str(one.prompt_tokens), str(one.completion_tokens), one.text[:60]
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the server is stopped
    options = parser.parse_args()
    found = measure(options.times)
    print_table(found, list(ASKED))
    RESULTS.mkdir(exist_ok=True)
    about = {"machine": asdict(machine.this()), "date": datetime.now(timezone.utc).isoformat(), "times": options.times}
    rows = {model: asdict(one) for model, one in found.items()}
    (RESULTS / "language_costs.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
