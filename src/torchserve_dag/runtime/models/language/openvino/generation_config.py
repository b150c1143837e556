"""What a request asks for, as OpenVINO GenAI's GenerationConfig."""

from __future__ import annotations

import json
from typing import Any

from torchserve_dag.runtime.messages import Chat, InputError, Prompt
from torchserve_dag.runtime.models.language.json_schema import check_schema

SUPPORTS = frozenset(
    {"n", "presence_penalty", "frequency_penalty", "response_format", "logprobs", "echo", "tools", "tool_choice",
     "parallel_tool_calls"}
)  # fmt: skip
ANY_OBJECT = '{"type": "object"}'
LEAST_TOP_P = 1e-6
"""OpenVINO refuses 0, which chooses the most probable token, too."""


def configure(config: Any, request: Chat | Prompt, most_tokens: int, draft_tokens: int | None) -> None:
    """Write what a request asks for into a pipeline's own configuration.

    `draft_tokens`: how many a draft model drafts at a time; None without one. Raises InputError.
    """
    import openvino_genai  # noqa: PLC0415 (only this engine needs it)

    config.apply_chat_template = False
    config.max_new_tokens = most_tokens
    temperature = 1.0 if request.temperature is None else request.temperature
    config.do_sample = temperature > 0
    if config.do_sample:
        config.temperature = temperature
        config.top_p = 1.0 if request.top_p is None else max(request.top_p, LEAST_TOP_P)
    config.presence_penalty = request.presence_penalty or 0.0
    config.frequency_penalty = request.frequency_penalty or 0.0
    config.logprobs = 1 if request.logprobs else 0
    if isinstance(request, Prompt) and (request.logprobs or 0) > 1:
        raise InputError("logprobs: the engine openvino gives those of the chosen tokens only; write 1.")
    if isinstance(request, Chat) and request.tool_choice not in {None, "auto", "none"}:
        raise InputError('tool_choice: the engine openvino can do "auto" and "none".')
    if draft_tokens:
        if config.do_sample and request.seed is not None:
            what = "with a draft model, the engine openvino does not draw the same tokens again"
            raise InputError(f"seed: {what}; leave it out, or write temperature 0.")
        config.num_assistant_tokens = draft_tokens
    schema = _schema(request)
    if schema:
        config.structured_output_config = openvino_genai.StructuredOutputConfig(json_schema=schema)


def _schema(request: Chat | Prompt) -> str:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return ""
    if wanted.json_schema is None:
        return ANY_OBJECT
    check_schema(wanted.json_schema.schema)
    return json.dumps(wanted.json_schema.schema)
