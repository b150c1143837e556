"""Keep your TorchServe handlers, archives and clients; get the workflow engine that TorchServe never had.

The names that handlers, workflows and clients need are here, and are imported when they are first used:

    from torchserve_dag import Handler, InputError, Photo, Workflow

All other modules are internal, and may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchserve_dag.clients import AsyncGrpcClient as AsyncGrpcClient
    from torchserve_dag.clients import AsyncRestClient as AsyncRestClient
    from torchserve_dag.clients import GrpcClient as GrpcClient
    from torchserve_dag.clients import RequestRefused as RequestRefused
    from torchserve_dag.clients import RestClient as RestClient
    from torchserve_dag.clients import ServingError as ServingError
    from torchserve_dag.runtime.compute.placement import Placement as Placement
    from torchserve_dag.runtime.data.data_url import decode_photo as decode_photo
    from torchserve_dag.runtime.data.data_url import photo_urls as photo_urls
    from torchserve_dag.runtime.handler import ContinuousHandler as ContinuousHandler
    from torchserve_dag.runtime.handler import EngineLoad as EngineLoad
    from torchserve_dag.runtime.handler import Handler as Handler
    from torchserve_dag.runtime.handler import NoSettings as NoSettings
    from torchserve_dag.runtime.handler import Reply as Reply
    from torchserve_dag.runtime.messages import Box as Box
    from torchserve_dag.runtime.messages import Chat as Chat
    from torchserve_dag.runtime.messages import ChatMessage as ChatMessage
    from torchserve_dag.runtime.messages import ContentPart as ContentPart
    from torchserve_dag.runtime.messages import DetectedObject as DetectedObject
    from torchserve_dag.runtime.messages import Embedding as Embedding
    from torchserve_dag.runtime.messages import FailedError as FailedError
    from torchserve_dag.runtime.messages import Failure as Failure
    from torchserve_dag.runtime.messages import FinishReason as FinishReason
    from torchserve_dag.runtime.messages import FunctionCall as FunctionCall
    from torchserve_dag.runtime.messages import FunctionTool as FunctionTool
    from torchserve_dag.runtime.messages import ImageUrl as ImageUrl
    from torchserve_dag.runtime.messages import InputError as InputError
    from torchserve_dag.runtime.messages import JsonSchema as JsonSchema
    from torchserve_dag.runtime.messages import Label as Label
    from torchserve_dag.runtime.messages import Labels as Labels
    from torchserve_dag.runtime.messages import Moderation as Moderation
    from torchserve_dag.runtime.messages import Objects as Objects
    from torchserve_dag.runtime.messages import OverloadedError as OverloadedError
    from torchserve_dag.runtime.messages import Passage as Passage
    from torchserve_dag.runtime.messages import Passages as Passages
    from torchserve_dag.runtime.messages import Photo as Photo
    from torchserve_dag.runtime.messages import Prompt as Prompt
    from torchserve_dag.runtime.messages import Query as Query
    from torchserve_dag.runtime.messages import ResponseFormat as ResponseFormat
    from torchserve_dag.runtime.messages import Skipped as Skipped
    from torchserve_dag.runtime.messages import Text as Text
    from torchserve_dag.runtime.messages import TextChunk as TextChunk
    from torchserve_dag.runtime.messages import TokenLogprob as TokenLogprob
    from torchserve_dag.runtime.messages import Tool as Tool
    from torchserve_dag.runtime.messages import ToolCall as ToolCall
    from torchserve_dag.runtime.messages import Usage as Usage
    from torchserve_dag.runtime.models.language.choice import Choice as Choice
    from torchserve_dag.runtime.models.language.choice import put_together as put_together
    from torchserve_dag.runtime.models.language.json_answer import UnfitAnswerError as UnfitAnswerError
    from torchserve_dag.runtime.models.language.json_answer import read_json_answer as read_json_answer
    from torchserve_dag.runtime.models.language.json_schema import check_schema as check_schema
    from torchserve_dag.runtime.models.language.json_schema import in_grammars as in_grammars
    from torchserve_dag.runtime.models.language.model import LanguageModel as LanguageModel
    from torchserve_dag.runtime.models.language.settings import LanguageSettings as LanguageSettings
    from torchserve_dag.runtime.models.language.settings import Remote as Remote
    from torchserve_dag.runtime.models.language.tool_functions import call_tool as call_tool
    from torchserve_dag.runtime.models.language.tool_functions import failed_call as failed_call
    from torchserve_dag.runtime.models.language.tool_functions import tool_of as tool_of
    from torchserve_dag.runtime.retrieval.passage_index import PassageIndex as PassageIndex
    from torchserve_dag.runtime.retrieval.settings import SearchSettings as SearchSettings
    from torchserve_dag.runtime.workflow import Workflow as Workflow

_HOMES = {
    "clients": ("AsyncGrpcClient", "AsyncRestClient", "GrpcClient", "RequestRefused", "RestClient", "ServingError"),
    "runtime.compute.placement": ("Placement",),
    "runtime.data.data_url": ("decode_photo", "photo_urls"),
    "runtime.handler": ("ContinuousHandler", "EngineLoad", "Handler", "NoSettings", "Reply"),
    "runtime.messages": (
        "Box",
        "Chat",
        "ChatMessage",
        "ContentPart",
        "DetectedObject",
        "Embedding",
        "FailedError",
        "Failure",
        "FinishReason",
        "FunctionCall",
        "FunctionTool",
        "ImageUrl",
        "InputError",
        "JsonSchema",
        "Label",
        "Labels",
        "Moderation",
        "Objects",
        "OverloadedError",
        "Passage",
        "Passages",
        "Photo",
        "Prompt",
        "Query",
        "ResponseFormat",
        "Skipped",
        "Text",
        "TextChunk",
        "TokenLogprob",
        "Tool",
        "ToolCall",
        "Usage",
    ),
    "runtime.models.language.choice": ("Choice", "put_together"),
    "runtime.models.language.json_answer": ("UnfitAnswerError", "read_json_answer"),
    "runtime.models.language.json_schema": ("check_schema", "in_grammars"),
    "runtime.models.language.model": ("LanguageModel",),
    "runtime.models.language.settings": ("LanguageSettings", "Remote"),
    "runtime.models.language.tool_functions": ("call_tool", "failed_call", "tool_of"),
    "runtime.retrieval.passage_index": ("PassageIndex",),
    "runtime.retrieval.settings": ("SearchSettings",),
    "runtime.workflow": ("Workflow",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605 (the table above is the list)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
