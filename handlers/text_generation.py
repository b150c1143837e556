"""A language model: goes on with a chat or a prompt, in any engine that `engine:` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torchserve_dag import (
    Chat,
    ContinuousHandler,
    EngineLoad,
    LanguageModel,
    LanguageSettings,
    Placement,
    Prompt,
    Reply,
    TextChunk,
)


class TextGeneration(ContinuousHandler[Chat | Prompt, TextChunk]):
    Settings = LanguageSettings

    def load(self, folder: Path, settings: LanguageSettings, placement: Placement) -> None:
        self.model = LanguageModel.load(folder, settings, placement)
        self.room = self.model.room
        self.warms_up = settings.engine != "remote"  # it costs money, and may be away while a fallback stands in

    def example(self) -> Chat:
        return Chat.of("What is the capital of France?", max_tokens=16, temperature=0)

    def reserve(self, item: Chat | Prompt, client: str | None) -> Callable[[], None]:
        return self.model.reserve(item, client)

    def start(self, item: Chat | Prompt, reply: Reply[TextChunk]) -> Callable[[], None]:
        return self.model.start(item, reply)

    def load_now(self) -> EngineLoad:
        return self.model.load_now()

    def hangs(self) -> bool:
        return self.model.hangs()

    def close(self) -> None:
        self.model.close()
