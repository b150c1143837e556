"""The settings of a language model, in its handler's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torchserve_dag.runtime.messages import WrongFieldError

EngineName = Literal[
    "auto", "openvino", "vllm", "transformers", "llama.cpp", "deepspeed", "pipeline", "onnxruntime", "remote"
]
"""`auto`: `vllm` where the handler runs on a GPU, else `openvino`."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A model of any server that speaks OpenAI's API."""

    url: str
    """The API's base address, like `https://api.example.com/v1`."""
    key: str | None = None
    """The environment variable that holds the API's key. A key is sent over https only, or to this machine."""
    tokens_per_minute: int | None = None
    """Requests beyond so many tokens a minute are refused here, with 429. Each worker counts its own."""
    money_per_day: float | None = None
    """Requests beyond this cost a day are refused here, with 429; in the currency of the prices.
    Each worker counts its own, from its start; a day is one of UTC."""
    prompt_price: float = 0.0
    """The price of a million tokens of prompts."""
    answer_price: float = 0.0
    """The price of a million tokens of answers."""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the limit of an answer: some models refuse the older name."""
    timeout_s: float = 60.0
    """The longest wait for the next chunk."""
    retries: int = 2
    """How often a request is sent again before its first chunk, after 429, 5xx, and connections that fail."""

    def __post_init__(self) -> None:
        for name, least in (("tokens_per_minute", 1), ("money_per_day", 0.0), ("timeout_s", 0.001), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise WrongFieldError(f"{name} is at least {least:g}", name)
        for name in ("prompt_price", "answer_price"):
            if not getattr(self, name) >= 0:
                raise WrongFieldError(f"{name} is at least 0", name)
        if self.money_per_day is not None and not (self.prompt_price or self.answer_price):
            raise WrongFieldError("without prices no cost can be counted", "money_per_day")


@dataclass(frozen=True, slots=True)
class LanguageSettings:
    """`settings:` of a language model's handler."""

    model: str
    """A file or folder below `weights/`; for `remote` and `vllm` also the model's name there."""
    engine: EngineName = "auto"
    """What computes it."""
    served_as: str | None = None
    """What answers call it, in `served_by`; without it, the engine and the model's name there or its file's."""
    room: int = 18
    """Answers that the engine computes at the same time; those of one token of the front door leave one place of
    eight to others. More wait, and tokens take turns."""
    context: int | None = None
    """The most tokens of a prompt and its answer together; without it, as many as the model was trained with, at most
    8,192; for `remote`, 131,072: its server refuses what is too long."""
    max_tokens: int = 1024
    """The limit of an answer whose client gives none, in tokens."""
    temperature: float | None = None
    """The temperature where the client gives none; without it, that of the engine or of the model's own files. Small
    models write nonsense at 1, the default of OpenAI's API."""
    top_p: float | None = None
    """Likewise, of the most probable tokens that are considered."""
    tokens_in_flight: int | None = None
    """The most tokens of all requests in flight, whether they are computed or wait: their prompts, and the limits of
    their answers. A request that needs more is refused with 429. Without it, four times `room` times `context`."""
    cache_gb: float = 1.0
    """Memory for the cache of keys and values, in GB."""
    prefix_cache: bool = True
    """Keep what was computed for a prompt, for prompts that begin in the same way."""
    prefill_tokens: int = 128
    """The most tokens of prompts that one step computes. Fewer keep the pace of the answers that are being written;
    more read a long prompt faster."""
    threads: int | None = None
    """Threads on a CPU; without it, as many as there are cores."""
    exact: bool = False
    """Compute, and cache, in 32 bits, so that the tokens are those of the model's reference. Slower."""
    chat_template: str | None = None
    """A file below `weights/` with the chat template, in Jinja; without it, the model's own."""
    adapters: dict[str, str] = field(default_factory=dict)
    """LoRA adapters: a name, and its folder below `weights/`. In the engine `openvino` each has weights and a cache of
    its own beside the model's."""
    draft: str | None = None
    """A small model of the same vocabulary, below `weights/`, which drafts tokens for this one to confirm. For
    the engine `openvino` a folder of OpenVINO IR; there is no prefix cache then."""
    draft_tokens: int = 4
    """Tokens that the draft model drafts at a time."""
    remote: Remote | None = None
    """For the engine `remote`: the server."""
    options: dict[str, Any] = field(default_factory=dict)
    """More settings of the engine's own, by their names there; for `remote`, more fields of each request."""

    def __post_init__(self) -> None:
        for name in ("room", "max_tokens", "prefill_tokens", "draft_tokens"):
            if getattr(self, name) < 1:
                raise WrongFieldError(f"{name} is at least 1", name)
        if self.cache_gb <= 0:
            raise WrongFieldError("cache_gb is above 0", "cache_gb")
        if (self.engine == "remote") != (self.remote is not None):
            raise WrongFieldError('"remote" says where the server of the engine "remote" is', "remote")
