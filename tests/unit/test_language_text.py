"""Chats as prompts, and calls of tools in a text."""

from __future__ import annotations

import json

import pytest

from tests.tiny_llama import TEMPLATE
from torchserve_dag import (
    Chat,
    ChatMessage,
    ContentPart,
    FunctionCall,
    FunctionTool,
    ImageUrl,
    InputError,
    Tool,
    ToolCall,
)
from torchserve_dag.runtime.models.language.chat_template import ChatTemplate
from torchserve_dag.runtime.models.language.tool_calls import ToolCallText

WEATHER = Tool(FunctionTool("weather", "The weather of a city", {"type": "object"}))
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def test_a_chat_becomes_what_transformers_makes_of_it() -> None:
    """Transformers' own renderer, with the same template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = Chat(messages=[ChatMessage("system", "Be kind."), ChatMessage("user", "Grüße < & >")], tools=[WEATHER])
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    tools = [
        {
            "function": {"name": "weather", "description": "The weather of a city", "parameters": {"type": "object"}},
            "type": "function",
        }
    ]
    wanted = render_jinja_template([messages], tools=tools, chat_template=TEMPLATE, add_generation_prompt=True)[0][0]

    assert ChatTemplate(TEMPLATE)(chat) == wanted
    assert "Grüße < & >" in wanted
    assert "The weather of a city" in wanted


def test_a_template_gets_the_tokens_that_it_names() -> None:
    template = ChatTemplate("{{ eos }}{{ messages[0].content }}{{ pad }}", eos="</s>", pad=None)

    assert template(Chat.of("Hi")) == "</s>Hi"


def test_photos_are_placeholders_where_the_template_writes_them_and_else_only_text_is_left() -> None:
    photo = ContentPart("image_url", image_url=ImageUrl("data:image/png;base64,"))
    chat = Chat(messages=[ChatMessage("user", [ContentPart("text", "See "), photo, ContentPart("text", "?")])])

    assert "See <image>?" in ChatTemplate(TEMPLATE, photos=True)(chat)
    assert "See ?" in ChatTemplate(TEMPLATE)(chat)


def test_a_developer_is_the_system_and_a_calls_arguments_are_an_object() -> None:
    """Templates know neither the newer name nor OpenAI's text of JSON."""
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.tool_calls[0].function.arguments.city if m.tool_calls }};{% endfor %}"
    )
    call = ToolCall(FunctionCall("weather", '{"city": "Bonn"}'), "1", "function")
    chat = Chat(messages=[ChatMessage("developer", "x"), ChatMessage("assistant", tool_calls=[call])])

    assert ChatTemplate(source)(chat) == "system:;assistant:Bonn;"


def test_tools_have_a_template_of_their_own_where_there_is_one() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"})

    assert template(Chat.of("Hi")) == "plain"
    assert template(Chat.of("Hi", tools=[WEATHER])) == "tools"
    assert template(Chat.of("Hi", tools=[WEATHER], tool_choice="none")) == "plain"


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[9].content }}", "{{ ''.__class__.__mro__ }}"],
)
def test_a_chat_that_the_template_does_not_accept_is_the_senders_fault(source: str) -> None:
    """The last one tries to leave Jinja's sandbox."""
    with pytest.raises(InputError, match="messages: the model's chat template does not accept them"):
        ChatTemplate(source)(Chat.of("Hi"))


def test_a_template_that_cannot_be_read_says_where() -> None:
    with pytest.raises(ValueError, match="cannot be read: line 2"):
        ChatTemplate("a\n{% if %}")


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_call_is_found_however_the_text_is_cut(size: int) -> None:
    text = f"Let me see.\n{CALL}\n{CALL}"
    found, content, calls = ToolCallText(), "", []
    for start in range(0, len(text), size):
        more, new = found.add(text[start : start + size])
        content, calls = content + more, calls + new

    assert content.strip() + found.rest() == "Let me see."
    assert [call.index for call in calls] == [0, 1]
    assert {call.function.name for call in calls} == {"weather"}
    assert json.loads(calls[1].function.arguments or "") == {"city": "Köln"}
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize(
    "text",
    ["a < b", '<tool_call>{"name": "weather"', "<tool_call>no JSON</tool_call> end", "<tool_call>[1]</tool_call>", "x <tool_",
     "<tool_call>" + "[" * 100_000 + "</tool_call>"],
)  # fmt: skip
def test_what_is_no_call_is_content(text: str) -> None:
    """Also a call that never closes, and one nested deeper than JSON is read."""
    found = ToolCallText()
    content, calls = found.add(text)

    assert content + found.rest() == text
    assert calls == []


def test_nothing_comes_after_the_last_call_that_is_allowed() -> None:
    found = ToolCallText(most=1)
    content, calls = found.add(CALL + " more " + CALL)

    assert (content, len(calls), found.full) == ("", 1, True)
    assert found.add("and more") == ("", [])
    assert found.rest() == ""
