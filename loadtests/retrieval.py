"""An index of many documents: how long it takes to build and to update, its memory, and how long a search takes.

    .venv/bin/python loadtests/retrieval.py --documents 10000

The documents are made of the sentences of this project's docs, drawn with a fixed seed, and embedded by the project's
`text_embedding`. Searches run in a process of their own, without a server, and get their questions' vectors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any, get_args

import psutil

from torchserve_dag import Embedding, PassageIndex, Query, SearchSettings, Text, Workflow
from torchserve_dag.bench import machine
from torchserve_dag.retrieval.update import update
from torchserve_dag.runtime.retrieval.settings import Mode

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ROOT / "tests" / "retrieval" / "questions.jsonl"
SEARCHES = 400
CHANGED = 10
SHORTEST, LONGEST = 40, 250
"""Characters of a sentence."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000, help="how many documents")
    parser.add_argument("--sentences", type=int, default=3, help="sentences in each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(Path(folder), options.documents, options.sentences)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def measured(root: Path, documents: int, sentences: int) -> dict[str, Any]:
    for name in ("handlers", "weights"):
        (root / name).symlink_to(ROOT / name)
    write(root / "docs", documents, sentences)
    built = update(root, root / "docs", "docs")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number in range(CHANGED):
        (root / "docs" / f"{number:05}.md").write_text(f"# Changed\n\nDocument {number} has changed.\n", "utf-8")
    updated = update(root, root / "docs", "docs")
    unchanged = update(root, root / "docs", "docs")
    here = machine.this()
    size = sum(path.stat().st_size for path in (root / "indexes/docs/1").rglob("*") if path.is_file())
    shutil.rmtree(root / "indexes/docs/1")
    return {
        "processor": here.processor,
        "cores": here.cores,
        "documents": built.documents,
        "passages": built.passages,
        "build_s": round(built.seconds, 1),
        "build_peak_memory_mb": peak // 1_000_000,
        "update_of_10_s": round(updated.seconds, 1),
        "nothing_changed_s": round(unchanged.seconds, 1),
        "on_disk_mb": size // 1_000_000,
        "search": searched(root),
    }


def write(folder: Path, documents: int, sentences: int) -> None:
    draw = random.Random(0)
    text = " ".join(path.read_text("utf-8") for path in sorted((ROOT / "tests/retrieval/docs").rglob("*.md")))
    known = [one.strip() for one in re.split(r"(?<=[.!?])\s+|\n\n", text) if SHORTEST < len(one) < LONGEST]
    folder.mkdir()
    for number in range(documents):
        body = " ".join(draw.sample(known, sentences))
        (folder / f"{number:05}.md").write_text(f"# Note {number}\n\n{body}\n", "utf-8")


def searched(root: Path) -> dict[str, Any]:
    """In a process of its own, which has nothing else in its memory but torch."""
    lines = QUESTIONS.read_text("utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    with Workflow.load(ROOT / "handlers" / "text_embedding.yaml") as model:
        vectors = [answer.embedding for answer in model([Text(one) for one in questions])]
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_search, (root, list(zip(questions, vectors, strict=True))))


def _search(root: Path, asked: list[tuple[str, list[float]]]) -> dict[str, Any]:
    queries = list(islice(cycle([Query(text, Embedding(vector)) for text, vector in asked]), SEARCHES))
    before = psutil.Process().memory_info().rss
    modes: dict[str, Any] = {}
    for mode in get_args(Mode):
        index = PassageIndex(root, SearchSettings("docs", mode=mode))
        for query in queries[:20]:
            index.search(query)
        alone = [_seconds(index, query) for query in queries]
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda query, index=index: _seconds(index, query), queries))
        modes[mode] = {"alone": _milliseconds(alone), "4 at once": _milliseconds(together)}
    return {**modes, "memory_mb": (psutil.Process().memory_info().rss - before) // 1_000_000}


def _seconds(index: PassageIndex, query: Query) -> float:
    began = time.perf_counter()
    index.search(query)
    return time.perf_counter() - began


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    hundredths = statistics.quantiles(seconds, n=100)
    return {"p50_ms": round(hundredths[49] * 1000, 1), "p99_ms": round(hundredths[98] * 1000, 1)}


if __name__ == "__main__":
    main()
