"""One round of `tools`: the model writes, and the functions are called that it wants to have called."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Annotated, Any

from torchserve_dag import (
    Chat,
    ChatMessage,
    FinishReason,
    InputError,
    TextChunk,
    ToolCall,
    Usage,
    call_tool,
    failed_call,
    put_together,
    tool_of,
)

MOST_CALLS = 8
"""In a round; the model is not told of more."""
_OPERATIONS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
MOST_EXPRESSION = 200


def calculate(expression: Annotated[str, "Numbers, + - * / and parentheses, like (12 + 3) * 4"]) -> float:
    """Calculates the value of an arithmetic expression."""
    if len(expression) > MOST_EXPRESSION:
        raise InputError(f"The expression has more than {MOST_EXPRESSION} characters.")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError("Write numbers, + - * / and parentheses.") from None
    except ZeroDivisionError:
        raise InputError("It divides by zero.") from None


def day_of_week(day: Annotated[str, "A date like 2026-11-27"]) -> str:
    """Tells on which day of the week a date is."""
    try:
        return f"{date.fromisoformat(day):%A}"
    except ValueError:
        raise InputError("Write the date like 2026-11-27.") from None


TOOLS = (calculate, day_of_week)
"""What the model may have called. It is told their names, docstrings and parameters."""
_TOLD = [tool_of(function) for function in TOOLS]


@dataclass(frozen=True)
class Dialogue:
    """What goes round."""

    chat: Chat
    """With the calls so far, and their results."""
    tokens: int
    """How many the model may still write."""
    answer: str = ""
    """What it said last."""
    finish_reason: FinishReason | None = None
    """None while it has functions called."""
    rounds: int = 0
    usage: Usage = field(default_factory=Usage)
    """Of all rounds."""
    served_by: str | None = None

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class Said:
    """What the model said in a round."""

    text: str
    tool_calls: list[ToolCall]
    finish_reason: FinishReason
    usage: Usage
    served_by: str | None


@dataclass(frozen=True)
class Called:
    """A call that was made."""

    name: str
    message: ChatMessage
    """Its result, as the model gets it."""

    def span_attributes(self) -> Mapping[str, object]:
        """Which function it was, as OpenTelemetry names it; a name that the model made up is not repeated."""
        known = self.name in {function.__name__ for function in TOOLS}
        return {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": self.name if known else "unknown"}


def ask(dialogue: Dialogue) -> Chat:
    """The chat for the model, which may write what is left of the tokens."""
    return replace(dialogue.chat, tools=_TOLD, max_tokens=dialogue.tokens, max_completion_tokens=None)


def said(chunks: list[TextChunk]) -> Said:
    (choice,) = put_together(chunks)
    asked = enumerate(choice.tool_calls[:MOST_CALLS])
    calls = [replace(one, id=one.id or f"call_{place}", index=None) for place, one in asked]
    usage = choice.usage or Usage.of(0, len(chunks))  # a model that counts nothing
    return Said(choice.text, calls, choice.finish_reason, usage, choice.served_by)


def call(call: ToolCall) -> Called:
    """A call's result, as the model gets it."""
    return Called(call.function.name or "", call_tool(TOOLS, call))


def not_called(call: ToolCall) -> Called:
    """In place of the result of a call that was not in time."""
    name = call.function.name or ""
    return Called(name, ChatMessage("tool", failed_call(f"{name} did not answer in time."), tool_call_id=call.id))


def go_on(before: Dialogue, said: Said, called: list[Called]) -> Dialogue:
    """The dialogue after the round. It has ended if nothing was called, or if there are no tokens left."""
    left = before.tokens - said.usage.completion_tokens
    reason = said.finish_reason if not said.tool_calls or said.finish_reason == "length" else None
    messages = [*before.chat.messages, ChatMessage("assistant", said.text, tool_calls=said.tool_calls)]
    return replace(
        before,
        chat=replace(before.chat, messages=[*messages, *(one.message for one in called)]),
        tokens=max(left, 0),
        answer=said.text,
        finish_reason=reason or ("length" if left < 1 else None),
        rounds=before.rounds + 1,
        usage=before.usage + said.usage,
        served_by=said.served_by,
    )


def _value(node: Any) -> float:
    """Raises ValueError for what is no arithmetic."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.operand))
    raise ValueError
