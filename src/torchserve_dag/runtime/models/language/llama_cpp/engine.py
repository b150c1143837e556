"""The engine `llama.cpp`: its own server, in this process, with a GGUF file (the package xllamacpp).

Each answer in progress has a thread, which waits in the server's call; the server batches, and calls back for each
event. What the calls do not offer (counting tokens) is asked of the server's HTTP side, on a private Unix socket.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, InputError, OverloadedError, Prompt, TextChunk, Usage
from torchserve_dag.runtime.models.language.engine import Cancel
from torchserve_dag.runtime.models.language.llama_cpp.gguf import context_of, file_of, read_metadata
from torchserve_dag.runtime.models.language.openai_json import ChunkReader, UpstreamError, body_of, failure_of
from torchserve_dag.runtime.models.language.settings import LanguageSettings

if TYPE_CHECKING:
    import httpx

    from torchserve_dag.runtime.compute.placement import Placement  # it imports torch

ENGINE = "llama.cpp"
MOST_CONTEXT = 8_192
"""Where the settings name none."""
MOST_WAITING = 1_000
"""Requests that wait for a place."""
COUNT_S = 30.0
HANGS_S = 60.0
CLOSE_S = 10.0
CLIENT_CLOSED = 499
"""What servers write into their logs for a client that has left."""

SUPPORTS = frozenset(
    {
        "n",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "response_format",
        "logprobs",
        "top_logprobs",
        "echo",
    }
)
TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
"""Where the chat template can write calls; elsewhere the server would take no notice of them."""


class LlamaCppEngine:
    """A GGUF model in llama.cpp's server."""

    def __init__(self, folder: Path, settings: LanguageSettings, *, on_gpu: bool) -> None:
        """`folder` has the files that the settings name. Raises ValueError for a file, or settings, that cannot be."""
        if settings.adapters:
            raise ValueError("adapters: the engine llama.cpp has none here; serve them with another engine")
        self._settings, self._weights, self.room = settings, folder, settings.room
        file = file_of(folder / settings.model)
        self.context = context_of(settings, read_metadata(file), 4 if settings.exact else 2, MOST_CONTEXT)
        self._folder = Path(tempfile.mkdtemp(prefix="llama-cpp-"))  # others cannot open what is in it
        try:
            self._server, self._client = self._serve(file, on_gpu=on_gpu)
            caps = self._client.get("/props").json().get("chat_template_caps", {})
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self.supports = SUPPORTS | (TOOLS if caps.get("supports_tool_calls") else frozenset())
        self._pool = ThreadPoolExecutor(self.room, "llama-cpp")
        self._lock = threading.Lock()
        self._open: set[Future[None]] = set()
        self._progress = time.monotonic()
        self._closed = False

    def count(self, request: Chat | Prompt) -> int:
        """The tokens of a request's prompt, as the server counts them."""
        body = body_of(request, ENGINE, 1)
        if isinstance(request, Chat):
            return int(self._ask("/v1/chat/completions/input_tokens", body)["input_tokens"])
        return len(
            self._ask("/tokenize", {"content": request.prompt, "add_special": True, "parse_special": True})["tokens"]
        )

    def start(self, request: Chat | Prompt, most_tokens: int, reply: Reply[TextChunk]) -> Cancel:
        """See LanguageEngine."""
        asked = _Asked(request, self._body(request, most_tokens), reply)
        with self._lock:
            if self._closed or len(self._open) >= self.room + MOST_WAITING:
                raise OverloadedError("The model has too many requests waiting for it; try again in a few seconds.")
            if not self._open:
                self._progress = time.monotonic()
            future = self._pool.submit(self._answer, asked)
            self._open.add(future)
        future.add_done_callback(lambda future: self._done(asked, future))

        def cancel() -> None:
            asked.cancelled = True
            future.cancel()  # if it has not begun

        return cancel

    def load_now(self) -> EngineLoad:
        there = len(self._open)
        return EngineLoad(running=min(there, self.room), waiting=max(there - self.room, 0))

    def hangs(self) -> bool:
        return bool(self._open) and time.monotonic() - self._progress > HANGS_S

    def close(self) -> None:
        with self._lock:
            closed, self._closed = self._closed, True
            still_open = list(self._open)
        if closed:
            return
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait(still_open, CLOSE_S)
        self._client.close()
        del self._server
        shutil.rmtree(self._folder, ignore_errors=True)

    def _serve(self, file: Path, *, on_gpu: bool) -> tuple[Any, httpx.Client]:
        """The server, and a client for its socket. Raises ValueError if it does not take the model."""
        import httpx  # noqa: PLC0415 (only engines need it)
        import xllamacpp  # noqa: PLC0415 (only this engine needs it)

        socket, key = self._folder / "server.sock", secrets.token_urlsafe()
        params = self._params(file)
        params.hostnames, params.api_keys, params.ui = [str(socket)], [key], False
        params.endpoint_metrics = True
        params.n_gpu_layers = -1 if on_gpu else 0
        try:
            server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ValueError(f"{file}: llama.cpp does not take this model, or these settings: {error}") from error
        transport = httpx.HTTPTransport(uds=str(socket))
        headers = {"authorization": f"Bearer {key}"}
        return server, httpx.Client(transport=transport, headers=headers, base_url="http://llama", timeout=COUNT_S)

    def _params(self, file: Path) -> Any:
        import xllamacpp  # noqa: PLC0415 (only this engine needs it)

        settings, params = self._settings, xllamacpp.CommonParams()
        params.model.path = str(file)
        params.model_alias = {settings.model}
        if settings.chat_template:
            params.chat_template = (self._weights / settings.chat_template).read_text("utf-8")
        params.n_parallel, params.n_ctx = self.room, self.room * self.context
        params.n_batch = params.n_ubatch = settings.prefill_tokens + self.room  # so that answers go on beside a prompt
        params.cache_prompt = settings.prefix_cache
        params.cache_ram_mib = 0  # a second cache, which cache_gb would not bound
        params.fit_params, params.warmup, params.verbosity = False, False, 0
        for cpu in (params.cpuparams, params.cpuparams_batch):
            cpu.n_threads = settings.threads or os.cpu_count() or 1
            cpu.poll = 0  # waiting threads that spin take the cores from all others
        if settings.exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if settings.draft:
            params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            params.speculative.draft.mparams.path = str(file_of(self._weights / settings.draft))
            params.speculative.draft.n_max = settings.draft_tokens
        for name, value in settings.options.items():
            if not hasattr(params, name):
                raise ValueError(f"options: llama.cpp has no setting {name}")
            setattr(params, name, value)
        return params

    def _body(self, request: Chat | Prompt, most_tokens: int) -> dict[str, Any]:
        body = body_of(request, self._settings.model, most_tokens)
        if isinstance(request, Prompt):
            body.pop("echo", None)  # the server takes no notice of it; the reply begins with the prompt
            if (
                body.pop("response_format", {"type": "text"})["type"] != "text"
            ):  # it would forget a schema it cannot read
                message = "response_format: the engine llama.cpp holds to a form in chats only; send a chat."
                raise InputError(message)
        elif request.tool_choice not in (None, "auto", "none"):  # it would not hold to them
            raise InputError("tool_choice: the engine llama.cpp cannot force a call; write auto or none.")
        return body | {"cache_prompt": self._settings.prefix_cache, "return_progress": True}

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        """Raises InputError with what the server refuses."""
        import httpx  # noqa: PLC0415 (only engines need it)

        try:
            response = self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise OverloadedError(f"The model did not count the prompt's tokens ({type(error).__name__}).") from error
        if response.status_code != HTTPStatus.OK:
            raise failure_of(response.status_code, response.content)
        return response.json()

    def _answer(self, asked: _Asked) -> None:
        """Wait in the server's call until the answer has ended. Raises InputError."""
        call = (
            self._server.handle_chat_completions if isinstance(asked.request, Chat) else self._server.handle_completions
        )

        def on_event(event: dict[str, Any]) -> bool:
            self._progress = time.monotonic()
            return asked.read(event) or self._closed

        try:
            call(asked.body, on_event)
        except ValueError as error:  # of the request, before it is computed
            raise InputError(str(error).splitlines()[0]) from error
        if not (asked.cancelled or self._closed):
            asked.finish()

    def _done(self, asked: _Asked, future: Future[None]) -> None:
        """Runs once for each request, however it ends."""
        with self._lock:
            self._open.discard(future)
        error = None if future.cancelled() else future.exception()
        if error:
            asked.reply.fail(error)
        elif self._closed:
            asked.reply.fail(OverloadedError("The model is being closed; try again in a few seconds."))
        elif asked.cancelled:
            asked.reply.fail(InputError("The request was cancelled.", CLIENT_CLOSED))
        else:
            asked.reply.end()


class _Asked:
    """A request that has been accepted."""

    def __init__(self, request: Chat | Prompt, body: dict[str, Any], reply: Reply[TextChunk]) -> None:
        self.request, self.body, self.reply = request, body, reply
        self.cancelled = False
        self._reader = ChunkReader(ENGINE, request.n or 1)
        self._usage: Usage | None = None
        self._error: UpstreamError | None = None
        if isinstance(request, Prompt) and request.echo:
            for index in range(request.n or 1):
                reply.chunk(TextChunk(request.prompt, index))

    def read(self, event: dict[str, Any]) -> bool:
        """Give an event's chunks. Returns whether the server is to stop. Raises nothing: the server would lose it."""
        if self.cancelled:
            return True
        try:
            for chunk in self._reader.read(event):
                self.reply.chunk(chunk)
            self._count(event)
        except UpstreamError as error:
            self._error = error
        return self._error is not None

    def finish(self) -> None:
        """Give the very last chunk. Raises UpstreamError."""
        if self._error:
            raise self._error
        self._reader.usage = self._usage
        for chunk in self._reader.end():
            self.reply.chunk(chunk)

    def _count(self, event: dict[str, Any]) -> None:
        """Each of several answers comes with a usage of its own, all with the one prompt."""
        usage = self._reader.usage
        if event.get("usage") and usage:
            known = self._usage
            completion = usage.completion_tokens + (known.completion_tokens if known else 0)
            first = known or usage
            self._usage = Usage.of(first.prompt_tokens, completion, first.cached_tokens)


def load(folder: Path, settings: LanguageSettings, placement: Placement) -> LlamaCppEngine:
    """The engine with the GGUF file that the settings name. Raises ValueError."""
    return LlamaCppEngine(folder, settings, on_gpu=placement.device.type != "cpu")
