"""A batch's responses in messages of bounded size.

TorchServe (0.12.0) reads a message from its beginning again whenever more of it has come: 16 answers of 6 MB in one
message took 7 s, and ended the worker. It takes several messages for a batch if in each of them but the last there is
a response with `ts_stream_next: true`. What that response then needs depends on how its request came (`exchange.py`):

- REST, and gRPC's `StreamPredictions`, get an empty end with `false` in the next message. A REST failure has none.
- `Predictions` of gRPC is complete after one response, whatever the header says, and a second would end the worker.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from http import HTTPStatus

from torchserve_dag.runtime.compat.wire import NEXT, WireResponse, write_responses
from torchserve_dag.runtime.worker.response import MAX_BYTES


def batch_messages(responses: Sequence[WireResponse], streams: Collection[str]) -> Iterator[bytes]:
    """The messages with these whole responses, of which those of `streams` answer `StreamPredictions`."""
    group: list[WireResponse] = []
    for response in responses:
        size = sum(len(one.body) for one in group) + len(response.body)
        place = _place(group, streams) if size > MAX_BYTES else None
        if place is not None:
            goes_on = group[place]
            group[place] = replace(goes_on, headers={**goes_on.headers, NEXT: "true"})
            yield write_responses(group)
            unary = NEXT in goes_on.headers and goes_on.id not in streams
            group = [] if unary else [WireResponse(goes_on.id, headers={NEXT: "false"})]
        group.append(response)
    yield write_responses(group)


def _place(group: Sequence[WireResponse], streams: Collection[str]) -> int | None:
    """The response that is best made to go on; None if none can, as with REST failures alone, which are small."""
    whole = [i for i, one in enumerate(group) if one.body]  # not the end of one that went on
    unary = [i for i in whole if NEXT in group[i].headers and group[i].id not in streams]
    rest = [i for i in whole if NEXT not in group[i].headers and group[i].status < HTTPStatus.BAD_REQUEST]
    stream = [i for i in whole if group[i].id in streams]
    # A call without `x-pieces` may be a StreamPredictions of somebody's own client, which would then never end.
    return next(iter([*rest, *stream, *unary]), None)
