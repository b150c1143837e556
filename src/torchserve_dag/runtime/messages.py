"""The messages: every value that crosses an edge of a workflow or a socket.

Each message is an immutable dataclass. A project defines its own beside its functions in `workflows/NAME.py`: any
dataclass of plain fields is a message, which `codec.py` can write and read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, ClassVar, Literal

from PIL import Image


class WrongFieldError(ValueError):
    """Raised in a message's `__post_init__`: the value of the field at `path` is wrong."""

    def __init__(self, what: str, *path: str | int) -> None:
        super().__init__(what)
        self.path = path


class InputError(Exception):
    """An item cannot be served, for a reason that its sender can mend.

    Raise it in any stage of a handler or in a function. The item gets `status` (HTTP, 4xx) and the
    message, one sentence for the client; the other items of the batch are not affected.
    """

    type = "InputError"
    """The failure's short name for programs."""

    def __init__(self, message: str, status: int = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.message = message
        self.status = int(status)


class OverloadedError(InputError):
    """An item cannot be served now, and may be sent again: 503."""

    type = "Overloaded"

    def __init__(self, message: str) -> None:
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request or an item has no answer: a value that takes the place of the answer."""

    status: int
    """The HTTP status: 4xx if the sender can mend the failure, 5xx if the server's owner can."""
    message: str
    """One sentence: what, where, what to do."""
    type: str = "InputError"
    """A short name for programs."""
    node: str | None = None
    """The workflow's node that failed."""
    fault: str = field(default="", compare=False, repr=False)
    """What the log calls the exception behind it: the client is then told how its server's owner finds it there."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", int(self.status))  # an HTTPStatus would print its name


class FailedError(Exception):
    """A request has no answer, where its chunks were awaited one by one; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Skipped:
    """The result of a node, or of an item, that did not run because its `when` was false."""

    by: str
    """The node whose `when` was false."""


@dataclass(frozen=True, slots=True)
class Photo:
    """A decoded photo: 8-bit RGB, upright (EXIF rotation applied)."""

    image: Image.Image
    """The pixels, as Pillow's image."""
    file: bytes | None = field(default=None, init=False, repr=False, compare=False)
    """The image file that the client sent, where it has these very pixels. A crop has none, nor a photo that had to be
    turned or converted. TorchServe handlers get it, who read the client's files themselves."""

    @classmethod
    def of_file(cls, image: Image.Image, file: bytes) -> Photo:
        """A photo whose pixels are those of an image file."""
        photo = cls(image)
        object.__setattr__(photo, "file", file)  # not of __init__, so that dataclasses.replace leaves it out
        return photo

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    def crop(self, box: Box) -> Photo:
        """The part inside `box`, clipped to the photo and at least one pixel wide and high."""
        left = min(max(int(box.left), 0), self.width - 1)
        top = min(max(int(box.top), 0), self.height - 1)
        right = min(max(round(box.right), left + 1), self.width)
        bottom = min(max(round(box.bottom), top + 1), self.height)
        return Photo(self.image.crop((left, top, right, bottom)))


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the upright photo. The origin is the photo's top left corner."""

    left: float
    """Distance of the left side from the photo's left side."""
    top: float
    """Distance of the upper side from the photo's upper side."""
    right: float
    """Distance of the right side from the photo's left side."""
    bottom: float
    """Distance of the lower side from the photo's upper side."""


@dataclass(frozen=True, slots=True)
class DetectedObject:
    """An object in a photo."""

    label: str
    """The object's class."""
    score: float
    """The detector's confidence, 0 to 1."""
    box: Box
    """Where the object is."""


@dataclass(frozen=True, slots=True)
class Objects:
    """A detector's answer. An empty list is an ordinary answer."""

    width: int
    """The photo's width in pixels."""
    height: int
    """The photo's height in pixels."""
    objects: list[DetectedObject] = field(default_factory=list)
    """The detected objects, highest score first."""


@dataclass(frozen=True, slots=True)
class Label:
    """A class and its probability."""

    name: str
    """The class."""
    score: float
    """The classifier's confidence, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Labels:
    """A classifier's answer."""

    labels: list[Label]
    """The most probable classes, highest score first; never empty."""

    @property
    def best(self) -> Label:
        return self.labels[0]


@dataclass(frozen=True, slots=True)
class Text:
    """A text."""

    text: str
    """The characters."""


# Of language models. Names, and what they mean, are those of OpenAI's API, where it has the thing.

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
"""Why a text ended: by itself or at a stop string, at its limit of tokens, with calls of tools, or because of what it
says."""

MAX_STOPS, MAX_CHOICES, MAX_LOGPROBS, MAX_TEMPERATURE, MAX_BIAS = 16, 16, 20, 2.0, 100.0


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A JSON Schema that an answer has to fit."""

    leaves_out_none: ClassVar[bool] = True

    name: str
    """What it describes."""
    schema: dict[str, Any]
    """The schema itself."""
    strict: bool | None = None
    """Taken as true: an engine that cannot hold to a schema refuses it."""
    description: str | None = None
    """What it is for, in the words of the client."""


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The form of an answer."""

    leaves_out_none: ClassVar[bool] = True

    type: Literal["text", "json_object", "json_schema"] = "text"
    """Any text, any JSON object, or JSON that fits a schema."""
    json_schema: JsonSchema | None = None
    """For the type `json_schema`."""

    def __post_init__(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('a json_schema belongs to the type "json_schema", and to no other')


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a language model is to write. What is None is the engine's default."""

    leaves_out_none: ClassVar[bool] = True

    max_tokens: int | None = None
    """The most tokens of an answer; without it, as many as there is room for in the model's context."""
    max_completion_tokens: int | None = None
    """The newer name of `max_tokens`; the smaller holds if both are given."""
    temperature: float | None = None
    """0 (always the most probable token) to 2."""
    top_p: float | None = None
    """Only the most probable tokens whose probabilities sum up to this are considered; above 0, at most 1."""
    n: int | None = None
    """How many answers to one prompt."""
    stop: str | list[str] | None = None
    """The answer ends before the first of these texts."""
    seed: int | None = None
    """The same seed gives the same answer, as far as the engine can."""
    presence_penalty: float | None = None
    """-2 to 2: above 0, tokens that are in the text already become less probable."""
    frequency_penalty: float | None = None
    """-2 to 2: above 0, tokens become less probable the more often they are in the text already."""
    logit_bias: dict[str, float] | None = None
    """Token id → what is added to its logit, -100 to 100."""
    response_format: ResponseFormat | None = None
    """The form of the answer."""
    adapter: str | None = None
    """The name of a LoRA adapter of the model. Not in OpenAI's API, where the model's name has it: `NAME:ADAPTER`."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_tokens", 1, None),
            ("max_completion_tokens", 1, None),
            ("temperature", 0.0, MAX_TEMPERATURE),
            ("top_p", 0.0, 1.0),
            ("n", 1, MAX_CHOICES),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            if value is not None and not (least <= value and (most is None or value <= most)):
                raise WrongFieldError(f"it is {value:g}; write {_range(least, most)}", name)
        if len(self.stops) > MAX_STOPS or not all(self.stops):
            raise WrongFieldError(f"at most {MAX_STOPS} texts, none of them empty", "stop")
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isdecimal() and -MAX_BIAS <= bias <= MAX_BIAS):
                raise WrongFieldError("it maps the ids of tokens to numbers from -100 to 100", "logit_bias")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer's tokens, if the client gave one."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(limits, default=None)


def _range(least: float, most: float | None) -> str:
    return f"{least:g} or more" if most is None else f"{least:g} to {most:g}"


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function that a model wants to have called."""

    leaves_out_none: ClassVar[bool] = True

    name: str | None = None
    """In a chunk, only in the first of a call."""
    arguments: str | None = None
    """JSON; in a chunk, a part of it."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, or in a chunk a part of one."""

    leaves_out_none: ClassVar[bool] = True

    function: FunctionCall
    """The function, with its arguments."""
    id: str | None = None
    """What the tool's answer refers to."""
    type: Literal["function"] | None = None
    """There is no other kind of tool."""
    index: int | None = None
    """In a chunk: which of the answer's calls it belongs to."""


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """A photo in a chat."""

    leaves_out_none: ClassVar[bool] = True

    url: str
    """The photo itself, as a data URL: `data:image/jpeg;base64,…`. Nothing is fetched from another address."""
    detail: str | None = None
    """How closely the model is to look at it; engines decide that themselves."""

    def __post_init__(self) -> None:
        if not self.url.startswith("data:image/"):
            raise WrongFieldError("send the photo itself, as data:image/jpeg;base64,…: nothing is fetched", "url")


@dataclass(frozen=True, slots=True)
class ContentPart:
    """A part of a chat message: a text or a photo."""

    leaves_out_none: ClassVar[bool] = True

    type: Literal["text", "image_url"]
    """Which of the two it is."""
    text: str | None = None
    """Of a text: the text."""
    image_url: ImageUrl | None = None
    """Of a photo: the photo."""

    def __post_init__(self) -> None:
        if getattr(self, self.type) is None:
            raise WrongFieldError(f'a part of the type "{self.type}" has a "{self.type}"', self.type)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of a chat."""

    leaves_out_none: ClassVar[bool] = True

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who says it."""
    content: str | list[ContentPart] | None = None
    """What is said: a text, or texts and photos."""
    name: str | None = None
    """The name of who says it, for chats of several."""
    tool_calls: list[ToolCall] | None = None
    """What the assistant wanted to have called."""
    tool_call_id: str | None = None
    """Of a tool's answer: the call that it answers."""

    @property
    def text(self) -> str:
        """Its text, without its photos."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or ""


@dataclass(frozen=True, slots=True)
class FunctionTool:
    """What a model is told of a function."""

    leaves_out_none: ClassVar[bool] = True

    name: str
    """The name of the function."""
    description: str | None = None
    """What it does: by this the model decides when to call it."""
    parameters: dict[str, Any] | None = None
    """A JSON Schema of the arguments."""
    strict: bool | None = None
    """Whether arguments must fit the schema."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that a model may have called."""

    function: FunctionTool
    """The function."""
    type: Literal["function"] = "function"
    """There is no other kind of tool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat(Sampling):
    """A chat that a language model is to go on with."""

    messages: list[ChatMessage]
    """The chat so far."""
    tools: list[Tool] | None = None
    """What the model may have called."""
    tool_choice: str | dict[str, Any] | None = None
    """`auto`, `none`, `required`, or the tool that must be called."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls."""
    logprobs: bool | None = None
    """Whether each token comes with its log-probability …"""
    top_logprobs: int | None = None
    """… and how many of the other most probable tokens."""

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        if not self.messages:
            raise WrongFieldError("it has no message", "messages")
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            raise WrongFieldError(f"it is {self.top_logprobs}; write 0 to {MAX_LOGPROBS}", "top_logprobs")

    @classmethod
    def of(cls, text: str, **sampling: Any) -> Chat:
        """A chat of one message of the user's."""
        return cls(messages=[ChatMessage("user", text)], **sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(Sampling):
    """A text that a language model is to go on with."""

    prompt: str
    """The text, as the model's tokenizer gets it: without a chat's template."""
    logprobs: int | None = None
    """How many of the most probable tokens come with each token, with their log-probabilities."""
    echo: bool | None = None
    """Whether the answer begins with the prompt."""

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        if not 0 <= (self.logprobs or 0) <= MAX_LOGPROBS:
            raise WrongFieldError(f"it is {self.logprobs}; write 0 to {MAX_LOGPROBS}", "logprobs")


@dataclass(frozen=True, slots=True)
class PromptTokensDetails:
    """More about the tokens of a prompt."""

    cached_tokens: int = 0
    """Tokens of the prompt that were computed for an earlier request."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer has cost, in tokens."""

    prompt_tokens: int = 0
    """Tokens of the prompt."""
    completion_tokens: int = 0
    """Tokens of the answers."""
    total_tokens: int = 0
    """Their sum."""
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    """More about the tokens of the prompt."""

    @classmethod
    def of(cls, prompt: int, completion: int = 0, cached: int = 0) -> Usage:
        return cls(prompt, completion, prompt + completion, PromptTokensDetails(cached))

    @property
    def cached_tokens(self) -> int:
        return self.prompt_tokens_details.cached_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage.of(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability."""

    leaves_out_none: ClassVar[bool] = True

    token: str
    """The text of the token."""
    logprob: float
    """The natural logarithm of its probability."""
    top_logprobs: list[TokenLogprob] | None = None
    """The most probable tokens in its place."""


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A part of a language model's answer, as it is written."""

    leaves_out_none: ClassVar[bool] = True

    text: str = ""
    """What is added to the answer; whole characters."""
    index: int = 0
    """Which of the answers, where `n` asked for several."""
    finish_reason: FinishReason | None = None
    """Of an answer's last chunk."""
    usage: Usage | None = None
    """Of all answers together, with the very last chunk."""
    tool_calls: list[ToolCall] | None = None
    """The calls of tools that it adds."""
    logprobs: list[TokenLogprob] | None = None
    """Of its tokens, where they were asked for."""
    served_by: str | None = None
    """Who wrote it, with the last chunk: the engine, and the model that it served."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """A text as a vector."""

    embedding: list[float]
    """The vector: of length 1, as many numbers as the model has dimensions."""
    usage: Usage | None = None
    """What it has cost."""


@dataclass(frozen=True, slots=True)
class Moderation:
    """A verdict on a text."""

    flagged: bool
    """Whether the text is in any of the categories."""
    categories: dict[str, bool] = field(default_factory=dict)
    """Category → whether the text is in it: whether its score reaches the category's threshold."""
    category_scores: dict[str, float] = field(default_factory=dict)
    """Category → how sure the classifier is that the text is in it, 0 to 1."""

    @property
    def named(self) -> str:
        """The categories that the text is in, in words."""
        return " and ".join(name for name, is_in in self.categories.items() if is_in)

    def span_attributes(self) -> dict[str, bool | tuple[str, ...]]:
        """For the span of the node that gave it: the verdict and its categories, never the text."""
        return {"flagged": self.flagged, "categories": tuple(name for name, is_in in self.categories.items() if is_in)}


# Of retrieval.


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for in an index of documents."""

    text: str
    """A question, or words."""
    embedding: Embedding
    """Its vector, of the model that embedded the index."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document, with its place in it."""

    text: str
    """The words of the passage, as they stand in the document."""
    document: str
    """The path of the document."""
    heading: str
    """The headings above the passage, outermost first, with " > " between them; empty where there are none."""
    begin: int
    """Where it begins in the document: the number of characters before it. Of HTML and PDF, in the text that was read
    from them."""
    end: int
    """Where it ends: the number of characters before the first that is not part of it."""
    line: int
    """The line of the document that it begins in, from 1; of a PDF, of the page."""
    page: int | None
    """Of a PDF: the page, from 1."""
    similarity: float
    """The cosine of the angle between its vector and the query's: 1 where they mean the same, about 0 where they have
    nothing to do with each other."""


@dataclass(frozen=True, slots=True)
class Passages:
    """What an index has for a query."""

    passages: list[Passage]
    """The best first. None is an ordinary answer: nothing was near enough."""
    index: str
    """The name of the index."""
    version: int
    """The version of the index that answered."""

    def span_attributes(self) -> dict[str, str | int | float]:
        """For the span of the node that gave it: which index answered, and how near it came."""
        nearest = max((one.similarity for one in self.passages), default=None)
        return {
            "gen_ai.data_source.id": f"{self.index}/{self.version}",
            "passages": len(self.passages),
            **({} if nearest is None else {"similarity": nearest}),
        }
