"""The answers to texts, each by itself: a call for each, which the model's worker computes together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from typing import TypeVar

from torchserve_dag.gateway import estimate, fields
from torchserve_dag.gateway.calls import ModelCalls
from torchserve_dag.gateway.text import check, read_json, read_usage
from torchserve_dag.runtime.messages import Embedding, Moderation, Text, Usage

AnswerT = TypeVar("AnswerT", Embedding, Moderation)
AT_ONCE = 64
"""How many texts of one request are with the model at the same time."""


async def ask_each(calls: ModelCalls, kind: type[AnswerT], texts: Sequence[Text]) -> tuple[list[AnswerT], Usage, int]:
    """The texts' answers in order, what they have cost as the model says, and as it is counted. Raises ApiError."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(text: Text) -> tuple[AnswerT, Usage]:
        async with places, calls.call(text) as answer:
            await check(answer)
            body = await answer.whole()
            found = fields.message_of(kind, read_json(body), status=HTTPStatus.BAD_GATEWAY)
            said = found.usage if isinstance(found, Embedding) else None
            return found, said or read_usage(answer) or Usage()

    tasks = [asyncio.ensure_future(one(text)) for text in texts]
    try:
        found = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    usage = sum((usage for _, usage in found), Usage())
    tokens = usage.total_tokens or sum(map(estimate.prompt_tokens, texts))
    return [answer for answer, _ in found], usage, tokens
