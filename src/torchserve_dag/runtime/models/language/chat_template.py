"""A chat as the text that its model was trained on: the model's own template, in Jinja, as Hugging Face writes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from torchserve_dag.runtime.messages import Chat, ChatMessage, InputError


class ChatTemplate:
    """A compiled template. It runs in Jinja's sandbox, for it comes with the weights.

    The format is that of transformers: https://huggingface.co/docs/transformers/chat_templating_writing
    """

    def __init__(self, source: str | Mapping[str, str], *, photos: bool = False, **tokens: str | None) -> None:
        """`source`: the template, or several by name (`default`, `tool_use`). `photos`: whether the template writes a
        placeholder for each photo. `tokens`: `bos_token` and others that templates name.

        Raises ValueError if it is no template.
        """
        from jinja2 import TemplateSyntaxError  # noqa: PLC0415 (torch brings it; only chats need it)

        sources = {"default": source} if isinstance(source, str) else dict(source)
        try:
            self._templates = {name: _environment().from_string(text) for name, text in sources.items()}
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template cannot be read: line {error.lineno}: {error.message}") from None
        if "default" not in self._templates:
            raise ValueError(f"the model has chat templates named {', '.join(sorted(sources))}, and none named default")
        self._photos = photos
        self._tokens = {name: token or "" for name, token in tokens.items()}

    def __call__(self, chat: Chat) -> str:
        """The prompt, up to where the assistant's answer begins. Raises InputError for a chat that does not fit."""
        from jinja2 import TemplateError  # noqa: PLC0415 (as above)

        tools = [_plain(tool) for tool in chat.tools or []] if chat.tool_choice != "none" else []
        template = self._templates.get("tool_use" if tools else "default", self._templates["default"])
        messages = [self._message(message) for message in chat.messages]
        try:
            return str(
                template.render(messages=messages, tools=tools or None, add_generation_prompt=True, **self._tokens)
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"messages: the model's chat template does not accept them: {error}") from None

    def _message(self, message: ChatMessage) -> dict[str, Any]:
        plain = _plain(message)
        if message.role == "developer":  # the newer name, which templates do not know
            plain["role"] = "system"
        if self._photos and isinstance(message.content, list):
            kinds = [{"type": "image"} if part.image_url else _plain(part) for part in message.content]
            plain["content"] = kinds
        else:
            plain["content"] = message.text
        for call in plain.get("tool_calls", []):
            call["function"]["arguments"] = _arguments(call["function"].get("arguments"))
        return plain


def _environment() -> Any:
    """Jinja as transformers sets it up."""
    from jinja2.ext import loopcontrols  # noqa: PLC0415 (as above)
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError  # noqa: PLC0415 (as above)

    raise TemplateError(message)


def _arguments(text: str | None) -> Any:
    """A call's arguments as an object, which templates expect; a text that is no JSON stays one."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text


def _plain(message: Any) -> dict[str, Any]:
    """A message as dictionaries and lists, without what is None."""
    return dataclasses.asdict(
        message, dict_factory=lambda pairs: {key: value for key, value in pairs if value is not None}
    )


def _given(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if value is not None}
