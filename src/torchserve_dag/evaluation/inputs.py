"""An item's input as what a workflow takes."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from torchserve_dag.clients.bodies import PLAIN_TEXT, body_of
from torchserve_dag.evaluation.data_set import files_in
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.parts import Body
from torchserve_dag.runtime.messages import Chat, Prompt, Text

_TEXTS = (Text, bytes, Any)
"""What takes a text as it is."""


def message_of(kind: Any, value: Any) -> Any:
    """A message of type `kind`, or a body that the workflow decodes as one, as a client would send it.

    A text is the message of the user where a chat is taken, and the prompt where a prompt is. Raises OSError if a file
    cannot be read.
    """
    if isinstance(value, Path) or files_in(value):
        return body_of(value)
    if isinstance(value, str):
        kinds = typing.get_args(kind) if plain.is_union(kind) else (kind,)
        if Chat in kinds:
            return Chat.of(value)
        if Prompt in kinds:
            return Prompt(prompt=value)
        if any(one in kinds for one in _TEXTS):
            return Body(value.encode(), PLAIN_TEXT)
    return Body(plain.to_json(value), "application/json")
