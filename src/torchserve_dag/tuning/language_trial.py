"""One trial of a language model: a handler under one set of `settings:`, measured in a process of its own.

`python -m torchserve_dag.tuning.language_trial` reads a LanguageTask as JSON and writes a LanguageMeasured.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import statistics
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.engine.runner import Chunk
from torchserve_dag.runtime.messages import Chat, Failure, Prompt, TextChunk, Usage
from torchserve_dag.runtime.models.continuous import ContinuousModel
from torchserve_dag.runtime.models.load import load_handler
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.server import json_module

CLIENTS = (1, 4, 16, 32)
ANSWER_TOKENS = 32
LONG_PROMPT_TOKENS = 2_000
LONG_PROMPTS = 3
STREAM_TOKENS = 400
"""Of the answer whose pace is measured while a long prompt enters."""
CHUNK_S = 120.0
"""The longest wait for a chunk."""


@dataclass(frozen=True, slots=True)
class LanguageTask:
    """A handler, and the settings to measure it with."""

    project: str
    handler: str
    """The handler's YAML file."""
    settings: dict[str, Any]
    """They take the place of those in the file."""
    seconds: float
    """How long each number of clients asks."""


@dataclass(frozen=True, slots=True)
class LanguageMeasured:
    """The measurements of one trial."""

    load_s: float
    tokens_per_s: dict[str, float]
    """Tokens of answers in a second, by the number of clients that ask one after another."""
    first_ms: float
    """Median time to an answer's first token, with one client."""
    long_prompt_tokens: int
    long_first_ms: float
    """Median time to the first token after a long prompt, while one answer is being written …"""
    gap_ms: float
    """… and the longest pause between two tokens of that answer, median of several prompts."""
    cache_tokens: int | None
    """How many tokens the cache holds; None if the engine does not tell how full it is."""


@dataclass(frozen=True, slots=True)
class _Times:
    """One answer, in seconds since it was asked for."""

    chunks: list[float]
    usage: Usage


class _Client:
    """Asks a language model, each time for something new, so that nothing is in its prefix cache."""

    def __init__(self, model: ContinuousModel) -> None:
        self._model = model
        self._number = itertools.count()
        self._chat = isinstance(model.handler.example(), Chat)

    def request(self, tokens: int, characters: int = 0) -> Chat | Prompt:
        """`characters`: about how long its prompt is."""
        number = next(self._number)
        text = f"{number}. Write a long story about the number {number}. "
        while len(text) < characters:
            text += f"The fox {len(text)} of story {number} runs over the hill. "
        sampling: dict[str, Any] = {"max_tokens": tokens, "temperature": 0}
        return Chat.of(text, **sampling) if self._chat else Prompt(prompt=text, **sampling)

    def ask(self, request: Chat | Prompt) -> Generator[tuple[float, TextChunk]]:
        """Its chunks, with the time of each since the call. Raises ValueError if it is refused or stops coming."""
        arrived: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
        begin = time.perf_counter()
        cancel = self._model(request, Options(), lambda what: arrived.put((time.perf_counter() - begin, what)))
        try:
            while True:
                at, what = arrived.get(timeout=CHUNK_S)
                if isinstance(what, Failure):
                    raise ValueError(f"{self._model.name} fails: {what.message}")  # noqa: TRY004 (a value)
                if not isinstance(what, Chunk):
                    return
                yield at, what.value
        except queue.Empty:
            raise ValueError(f"{self._model.name} wrote nothing for {CHUNK_S:g} s") from None
        finally:
            cancel()

    def answer(self, tokens: int, characters: int = 0) -> _Times:
        chunks = list(self.ask(self.request(tokens, characters)))
        usage = next((chunk.usage for _, chunk in reversed(chunks) if chunk.usage), Usage())
        return _Times([at for at, _ in chunks], usage)


def measure(task: LanguageTask) -> LanguageMeasured:
    """Run one trial. Raises CheckError, ValueError or RuntimeError if the handler does not load or answer."""
    project = Project(Path(task.project))
    file = project.read_handler(Path(task.handler))
    file = dataclasses.replace(file, value=dataclasses.replace(file.value, settings=task.settings))
    begin = time.perf_counter()
    model = load_handler(project, file)
    if not isinstance(model, ContinuousModel):
        raise TypeError(f"{model.name} is no language model")
    load_s = time.perf_counter() - begin
    try:
        client = _Client(model)
        first = [client.answer(1).chunks[0] for _ in range(5)]
        rates = {str(clients): _tokens_per_s(client, clients, task.seconds) for clients in CLIENTS}
        characters, long_tokens = _long(client)
        cache_tokens = _cache_tokens(model, client, characters)
        long_first, gap = _long_prompts(client, characters)
    finally:
        model.close()
    return LanguageMeasured(
        round(load_s, 2), rates, _ms(statistics.median(first)), long_tokens, _ms(long_first), _ms(gap), cache_tokens
    )


def _tokens_per_s(client: _Client, clients: int, seconds: float) -> float:
    """Each client asks again as soon as it has its answer, until the time is over."""
    begin = time.perf_counter()

    def asks(_: int) -> int:
        tokens = client.answer(ANSWER_TOKENS).usage.completion_tokens
        while time.perf_counter() - begin < seconds:
            tokens += client.answer(ANSWER_TOKENS).usage.completion_tokens
        return tokens

    with ThreadPoolExecutor(clients) as threads:
        tokens = sum(threads.map(asks, range(clients)))
    return round(tokens / (time.perf_counter() - begin), 1)


def _cache_tokens(model: ContinuousModel, client: _Client, characters: int) -> int | None:
    """From how full the cache is while the answer to a long prompt is being written, and nothing else."""
    most, tokens = 0.0, 0
    for _, chunk in client.ask(client.request(16, characters)):
        most = max(most, model.handler.load_now().cache_usage or 0.0)
        tokens = chunk.usage.prompt_tokens if chunk.usage else tokens
    return round(tokens / most) if most else None


def _long(client: _Client) -> tuple[int, int]:
    """How many characters make a long prompt that the model accepts, and its tokens."""
    short = client.answer(1, 500).usage.prompt_tokens
    characters = max(500, LONG_PROMPT_TOKENS * 500 // max(1, short))
    while True:
        try:
            return characters, client.answer(1, characters).usage.prompt_tokens
        except ValueError:  # longer than its context
            if characters <= 500:  # noqa: PLR2004 (as above)
                raise
            characters = max(500, characters // 2)


def _long_prompts(client: _Client, characters: int) -> tuple[float, float]:
    """The seconds to the first token after a long prompt, and the longest pause of another answer meanwhile."""
    firsts, gaps = [], []
    with ThreadPoolExecutor(1) as threads:
        for _ in range(LONG_PROMPTS):
            stream = client.ask(client.request(STREAM_TOKENS))
            times = [at for at, _ in itertools.islice(stream, 4)]
            entering = threads.submit(client.answer, 1, characters)
            for at, _ in stream:
                times.append(at)
                if entering.done():
                    break
            stream.close()
            firsts.append(entering.result().chunks[0])
            gaps.append(max((after - before for before, after in itertools.pairwise(times[3:])), default=0.0))
    return statistics.median(firsts), statistics.median(gaps)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


if __name__ == "__main__":
    json_module.serve(LanguageTask, measure)
