"""Several engines of one model as one: for an engine that cannot compute several LoRA adapters beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, InputError, Prompt, TextChunk
from torchserve_dag.runtime.models.language.engine import Cancel, PromptTokens, StepEngine


class EngineByAdapter:
    """See StepEngine. Each adapter has an engine, with weights and a cache of its own; so has the model itself."""

    def __init__(self, load: Callable[[str | None], StepEngine], adapters: Iterable[str]) -> None:
        """`load` loads the engine of an adapter, or of the model itself. Raises what that raises."""
        self._engines: dict[str | None, StepEngine] = {}
        try:
            for name in (None, *adapters):
                self._engines[name] = load(name)
        except BaseException:
            self.close()
            raise
        plain = self._engines[None]
        self.supports = plain.supports | {"adapter"}
        self.room, self.context = plain.room, plain.context

    def count(self, request: Chat | Prompt) -> int:
        return self._engine(request).count(request)

    def start(self, request: Chat | Prompt, most_tokens: int, reply: Reply[TextChunk]) -> Cancel:
        return self._engine(request).start(request, most_tokens, reply)

    def start_tokens(
        self, request: Chat | Prompt, prompt: PromptTokens, most_tokens: int, reply: Reply[TextChunk]
    ) -> Cancel:
        return self._engine(request).start_tokens(request, prompt, most_tokens, reply)

    def after_steps(self, call: Callable[[], None]) -> None:
        for engine in self._engines.values():
            engine.after_steps(call)

    def load_now(self) -> EngineLoad:
        loads = [engine.load_now() for engine in self._engines.values()]
        usage = max((load.cache_usage or 0.0 for load in loads), default=None)
        return EngineLoad(sum(load.running for load in loads), sum(load.waiting for load in loads), usage)

    def hangs(self) -> bool:
        return any(engine.hangs() for engine in self._engines.values())

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def _engine(self, request: Chat | Prompt) -> StepEngine:
        engine = self._engines.get(request.adapter)
        if engine is None:
            known = ", ".join(name for name in self._engines if name)
            raise InputError(f"adapter: there is no adapter {str(request.adapter)[:40]}; known: {known}.", 404)
        return engine
