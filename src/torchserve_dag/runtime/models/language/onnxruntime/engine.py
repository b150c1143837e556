"""The engine `onnxruntime`: a model that `torchserve-dag export` has written, computed by onnxruntime-genai.

Each answer has a generator of its own, and these take turns: a token each, or a piece of a prompt. (genai's own batches
want a graph of packed sequences, which torch.onnx does not write, or let nobody in before the last one has ended.)
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, InputError, OverloadedError, Prompt, TextChunk
from torchserve_dag.runtime.models.language.answer import BY_WRITER, WAITING, EngineAnswer, drawing
from torchserve_dag.runtime.models.language.engine import Cancel
from torchserve_dag.runtime.models.language.hub_folder import hub_context, hub_folder, refuse_settings
from torchserve_dag.runtime.models.language.onnxruntime.export import CONFIG
from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.runtime.models.language.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torchserve_dag.runtime.compute.placement import Placement

logger = logging.getLogger(__name__)

SEEDS = 1 << 31
STUCK_S = 60.0
ANY_OBJECT = '{"type": "object"}'


def load(folder: Path, settings: LanguageSettings, placement: Placement) -> OnnxEngine:
    """The exported model below `folder`. Raises ValueError."""
    refuse_settings(settings, "adapters", "draft", "options")
    if placement.device.type != "cpu":
        raise ValueError("the engine onnxruntime computes on the CPU: write device: cpu")
    model = hub_folder(folder, settings)
    if not (model / CONFIG).is_file():
        what = f"{settings.model} has no {CONFIG}; write such a model with"
        raise ValueError(f"{what} torchserve-dag export {settings.model} {settings.model}-onnx")
    return OnnxEngine(model, folder, settings)


class OnnxEngine:
    """A loaded model; see LanguageEngine."""

    supports = BY_WRITER | {"response_format"}

    def __init__(self, model: Path, folder: Path, settings: LanguageSettings) -> None:
        import onnxruntime_genai as genai  # noqa: PLC0415 (only this engine needs it)

        genai.disable_telemetry_events()
        self.room, self.context = settings.room, hub_context(model, settings)
        self._genai, self._settings = genai, settings
        template = folder / settings.chat_template if settings.chat_template else None
        self._tokenizer = Tokenizer(model, self.context, template)
        config = genai.Config(str(model))
        if settings.threads:
            threads = {"session_options": {"intra_op_num_threads": settings.threads}}
            config.overlay(json.dumps({"model": {"decoder": threads}}))
        self._model = genai.Model(config)
        ends = json.loads((model / CONFIG).read_text("utf-8"))["model"]["eos_token_id"]
        self._ends: list[int] = ends if isinstance(ends, list) else [ends]
        self._name = f"onnxruntime/{settings.model}"
        self._changed = threading.Condition()
        self._waiting: deque[EngineAnswer] = deque()
        self._running: deque[_Turns] = deque()
        self._closed = False
        self._progress = time.monotonic()
        """When the last turn ended."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def count(self, request: Chat | Prompt) -> int:
        return len(self._tokenizer(request))

    def start(self, request: Chat | Prompt, most_tokens: int, reply: Reply[TextChunk]) -> Cancel:
        answer = EngineAnswer(request, most_tokens, reply, self._tokenizer, self._name)
        with self._changed:
            if self._closed:
                raise OverloadedError("The model is closed.")
            if len(self._waiting) >= WAITING:
                raise OverloadedError(f"{WAITING} answers wait already; try again later.")
            if not (self._running or self._waiting):
                self._progress = time.monotonic()
            self._waiting.append(answer)
            self._changed.notify_all()

        def cancel() -> None:
            answer.cancelled = True

        return cancel

    def load_now(self) -> EngineLoad:
        return EngineLoad(len(self._running), len(self._waiting))

    def hangs(self) -> bool:
        with self._changed:
            if self._closed or not (self._running or self._waiting):
                return False
            return not self._thread.is_alive() or time.monotonic() - self._progress > STUCK_S

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(10)

    # The thread that computes.

    def _run(self) -> None:
        while self._admit():
            turns = self._running[0]
            goes_on = self._turn(turns)
            with self._changed:
                self._running.popleft()
                if goes_on:
                    self._running.append(turns)
                self._progress = time.monotonic()
        for answer in (*(turns.answer for turns in self._running), *self._waiting):
            answer.fail(OverloadedError("The model is closed."))
        self._running.clear()
        self._waiting.clear()

    def _admit(self) -> bool:
        """Wait until there is something to compute, and let as many answers begin as there is room for."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._running or self._waiting)
            while self._waiting and len(self._running) < self.room:
                self._running.append(_Turns(self._waiting.popleft()))
            return not self._closed

    def _turn(self, turns: _Turns) -> bool:
        """Compute an answer's next token, or the next piece of its prompt. Returns whether the answer goes on."""
        answer = turns.answer
        try:
            if answer.cancelled:
                answer.finish("stop")
                return False
            if turns.generator is None:
                turns.generator = self._generator(answer)
            if turns.read < len(answer.prompt):
                turns.read_piece(self._settings.prefill_tokens)
                return True
            token = turns.token()
            answer.add(token)
            if not answer.cancelled and not turns.generator.is_done():
                return True
            answer.finish("stop" if token in self._ends else "length")
        except Exception as error:  # noqa: BLE001 (whatever a runtime raises, it is this answer that fails)
            answer.fail(error)
        return False

    def _generator(self, answer: EngineAnswer) -> Any:
        request = answer.request
        params = self._genai.GeneratorParams(self._model)
        chosen = drawing(request) | {"max_length": len(answer.prompt) + answer.most}
        if request.seed is not None:
            chosen["random_seed"] = request.seed % SEEDS
        params.set_search_options(**chosen)
        form = request.response_format
        if form is None or form.type == "text":
            return self._genai.Generator(self._model, params)
        schema = json.dumps(form.json_schema.schema) if form.json_schema else ANY_OBJECT
        try:
            params.set_guidance("json_schema", schema)
            return self._genai.Generator(self._model, params)
        except RuntimeError as error:
            raise InputError(f"response_format: the schema cannot be followed: {error}") from None


class _Turns:
    """An answer in progress."""

    def __init__(self, answer: EngineAnswer) -> None:
        self.answer = answer
        self.generator: Any = None
        self.read = 0
        """How many of the prompt's tokens have been computed."""

    def read_piece(self, most: int) -> None:
        piece = self.answer.prompt[self.read : self.read + most]
        self.generator.append_tokens(piece)
        self.read += len(piece)

    def token(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])
