"""One round of `extract`: the model writes JSON, which is compared with the schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torchserve_dag import (
    Chat,
    ChatMessage,
    JsonSchema,
    ResponseFormat,
    TextChunk,
    UnfitAnswerError,
    Usage,
    in_grammars,
    put_together,
    read_json_answer,
)

CONSTRAINED = True
"""Whether the engine of `text_generation` can hold an answer to a schema (`response_format` in docs/engines.md). If it
cannot, the model is only told the schema."""

INSTRUCTION = "Answer with JSON and nothing else. It has to fit this JSON Schema:"
REPAIR = "Write the whole JSON again, so that it fits the schema."


@dataclass(frozen=True)
class Extraction:
    """What goes round: the chat, and what has come of it."""

    chat: Chat
    """The client's, with the repair that is asked for."""
    schema: dict[str, Any]
    """What the answer has to fit."""
    answer: str = ""
    """The last."""
    wrong: str = ""
    """Where the last answer does not fit, and why."""
    rounds: int = 0
    cut_off: bool = False
    """Whether the last answer was ended before its end, which another round does not mend."""
    usage: Usage = field(default_factory=Usage)
    """Of all rounds."""
    served_by: str | None = None

    @property
    def ended(self) -> bool:
        return self.cut_off or not self.wrong

    def span_attributes(self) -> Mapping[str, object]:
        return {"rounds": self.rounds, "fits": not self.wrong, "cut_off": self.cut_off}


def ask(extraction: Extraction) -> Chat:
    """The chat for the model. A grammar knows a part of JSON Schema only: what it leaves out, `compare` looks at."""
    instruction = ChatMessage("system", f"{INSTRUCTION}\n{json.dumps(extraction.schema)}")
    wanted = ResponseFormat("json_schema", JsonSchema("answer", in_grammars(extraction.schema)))
    messages = [instruction, *extraction.chat.messages]
    return replace(extraction.chat, messages=messages, response_format=wanted if CONSTRAINED else None)


def compare(asked: Extraction, chunks: list[TextChunk]) -> Extraction:
    """The round's answer, and what is wrong with it."""
    (choice,) = put_together(chunks)
    cut_off, wrong = choice.finish_reason != "stop", ""
    if cut_off:
        wrong = f"The answer was cut off ({choice.finish_reason}): ask for less, or allow more with max_tokens."
    else:
        try:
            read_json_answer(choice.text, asked.schema)
        except UnfitAnswerError as error:
            wrong = error.message
    answered = [ChatMessage("assistant", choice.text), ChatMessage("user", f"{wrong} {REPAIR}")]
    return replace(
        asked,
        chat=replace(asked.chat, messages=[*asked.chat.messages, *answered]) if wrong else asked.chat,
        answer=choice.text.strip(),
        wrong=wrong,
        rounds=asked.rounds + 1,
        cut_off=cut_off,
        usage=asked.usage + (choice.usage or Usage()),
        served_by=choice.served_by,
    )
