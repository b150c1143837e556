"""An engine's bare loop, without this package: the tokens of as many requests as there are clients, step after step.

    python loadtests/language_bare.py SETUP

SETUP is JSON: the engine, its weights, and the numbers that the served engine is set to. Loads and results are lines as
in `language_client.py`.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loadtests.language_client import Answer, Load, Measured, answer_length, loads, prompt, summary  # noqa: E402

PAGE = 16
STEP_S = 60.0


@dataclass(frozen=True)
class Setup:
    engine: str
    weights: str
    room: int
    prefill_tokens: int
    context: int
    threads: int


class BareLoop(Protocol):
    def add(self, key: int, text: str, max_tokens: int) -> int:
        """Begin an answer to a chat; returns the tokens of its prompt."""

    def step(self) -> Iterator[tuple[int, int, bool]]:
        """What a step gives: whose tokens, how many, and whether these were the last."""


class OpenVino:
    """OpenVINO GenAI's pipeline, stepped; a whole answer is decoded at its end."""

    def __init__(self, setup: Setup) -> None:
        import openvino_genai  # noqa: PLC0415 (only this engine needs it)

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = 1, True
        scheduler.max_num_seqs, scheduler.dynamic_split_fuse = setup.room, True
        scheduler.max_num_batched_tokens = max(setup.prefill_tokens, setup.room)
        threads = {"INFERENCE_NUM_THREADS": setup.threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(Path(setup.weights), scheduler, "CPU", threads)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._running: dict[int, tuple[Any, list[int]]] = {}

    def add(self, key: int, text: str, max_tokens: int) -> int:
        messages = [{"role": "user", "content": text}]
        whole = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = self._tokenizer.encode(whole, add_special_tokens=False).input_ids
        config = self._pipeline.get_config()
        config.apply_chat_template, config.do_sample, config.max_new_tokens = False, False, max_tokens
        self._running[key] = (self._pipeline.add_request(key, ids, config), [])
        return int(ids.shape[1])

    def step(self) -> Iterator[tuple[int, int, bool]]:
        self._pipeline.step()
        for key, (handle, tokens) in list(self._running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    tokens.extend(output.generated_ids)
                    done = output.finish_reason.name != "NONE"
                    if done:
                        self._tokenizer.decode(tokens)
                        del self._running[key]
                    yield key, len(output.generated_ids), done


class Transformers:
    """transformers' continuous batching, set as the served one is; the tokens are read as they come, and decoded at
    the end.
    """

    def __init__(self, setup: Setup) -> None:
        import torch  # noqa: PLC0415 (only this engine needs it)
        import transformers  # noqa: PLC0415

        torch.set_num_threads(setup.threads)
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        kind: Any = transformers.AutoModelForCausalLM
        model = kind.from_pretrained(setup.weights, dtype=torch.float32).to(device).eval()
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(setup.weights)
        blocks = setup.room * (setup.context // PAGE + 1)
        config = transformers.ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=blocks, max_batch_tokens=setup.prefill_tokens + setup.room,
            max_requests_per_batch=setup.room, allow_block_sharing=True, use_async_batching=False,
            auto_switch_to_flash=device != "cpu",
        )  # fmt: skip
        end = self._tokenizer.eos_token_id
        generation: Any = transformers.GenerationConfig(do_sample=False, eos_token_id=end)
        self._manager = model.init_continuous_batching(generation, config)
        self._manager.warmup()
        self._manager.start()
        self._had: dict[str, int] = {}

    def add(self, key: int, text: str, max_tokens: int) -> int:
        messages = [{"role": "user", "content": text}]
        whole = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self._tokenizer(whole, add_special_tokens=False)["input_ids"]
        self._had[str(key)] = 0
        self._manager.add_request(ids, request_id=str(key), max_new_tokens=max_tokens, streaming=True)
        return len(ids)

    def step(self) -> Iterator[tuple[int, int, bool]]:
        output = self._manager.get_result(timeout=STEP_S)
        if output is None or output.error:
            raise SystemExit(f"transformers: {output.error if output else f'no token within {STEP_S:g} s'}")
        key, tokens = output.request_id, output.generated_tokens
        new, done = len(tokens) - self._had[key], output.is_finished()
        self._had[key] = len(tokens)
        if done:
            self._tokenizer.decode(tokens)
            del self._had[key]
        yield int(key), new, done


BARE: dict[str, Callable[[Setup], BareLoop]] = {"openvino": OpenVino, "transformers": Transformers}


def run(loop: BareLoop, load: Load, keys: Iterator[int]) -> Measured:
    numbers = iter(range(load.first, sys.maxsize))
    begin = time.perf_counter() + load.warm_up_s
    end, cpu, started = begin + load.seconds, [0.0, 0.0], False
    running: dict[int, Answer] = {}
    answers: list[Answer] = []

    def add() -> None:
        number, key = next(numbers), next(keys)
        running[key] = answer = Answer(time.perf_counter())
        answer.prompt_tokens = loop.add(key, prompt(number), answer_length(number))

    for _ in range(load.clients):
        add()
    while running:
        events = deque(loop.step())
        now = time.perf_counter()
        if not started and now >= begin:
            started, cpu[0] = True, time.process_time()
        if now < end:
            cpu[1] = time.process_time()
        for key, tokens, done in events:
            answer = running[key]
            answer.tokens += tokens
            answer.times += [now] * bool(tokens)
            if done:
                answer.reason = "stop"
                answers.append(running.pop(key))
                if now < end:
                    add()
    return summary(answers, begin, end, cpu[1] - cpu[0])


if __name__ == "__main__":
    setup = Setup(**json.loads(sys.argv[1]))
    bare = BARE[setup.engine](setup)
    keys = iter(range(sys.maxsize))
    for each, write in loads():
        write(run(bare, each, keys))
