"""The vectors of texts: a call for each, which the model's worker computes together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from http import HTTPStatus

from torchserve_dag.gateway import estimate, fields
from torchserve_dag.gateway.calls import ModelCalls
from torchserve_dag.gateway.text import check, read_json, read_usage
from torchserve_dag.runtime.messages import Embedding, Text, Usage

AT_ONCE = 64
"""How many texts of one request are with the model at the same time."""


async def embed(calls: ModelCalls, texts: Sequence[Text]) -> tuple[list[Embedding], Usage, int]:
    """The texts' vectors, what they have cost as the model says, and as it is counted. Raises ApiError."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(text: Text) -> tuple[Embedding, Usage]:
        async with places, calls.call(text) as answer:
            await check(answer)
            body = await answer.whole()
            found = fields.message_of(Embedding, read_json(body), status=HTTPStatus.BAD_GATEWAY)
            return found, found.usage or read_usage(answer) or Usage()

    tasks = [asyncio.ensure_future(one(text)) for text in texts]
    try:
        found = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    usage = sum((usage for _, usage in found), Usage())
    tokens = usage.total_tokens or sum(map(estimate.prompt_tokens, texts))
    return [vector for vector, _ in found], usage, tokens
