"""The engine `pipeline`: one model cut by layers over several processes or GPUs, with torch.distributed.pipelining.

Each rank has a Hugging Face model of its own with some of the layers; the first has the embedding, the last the head.
(Cut by tracing, as torch can too, Hugging Face models fail.) Rank 0 writes the answer by transformers' `generate`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.microbatch import TensorChunkSpec

from torchserve_dag.runtime.models.language.hub_folder import hub_config
from torchserve_dag.runtime.models.language.ranks import rank as ranks_program
from torchserve_dag.runtime.models.language.ranks.rank import Job, OnToken, RankSpec

if TYPE_CHECKING:
    from torchserve_dag.runtime.compute.placement import Placement
    from torchserve_dag.runtime.models.language.engine import LanguageEngine
    from torchserve_dag.runtime.models.language.settings import LanguageSettings


KINDS = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
"""The models, by their `model_type`, whose parts do together what the whole does. Others compute something between
their embedding and the first layer, or behind the head, which parts would do twice or not at all."""


def load(folder: Path, settings: LanguageSettings, placement: Placement) -> LanguageEngine:
    """The model below `folder`, cut over `options: {ranks: N}` processes. Raises ValueError, RuntimeError."""
    from torchserve_dag.runtime.models.language.ranks.engine import load_ranks  # noqa: PLC0415 (a rank needs none of it)

    return load_ranks(__name__, folder, settings, placement, check)


def check(model: Path, ranks: int) -> None:
    """Raises ValueError for a model that cannot be cut into so many parts."""
    config = hub_config(model)
    kind, layers = config["model_type"], config.get("num_hidden_layers", 0)
    if kind not in KINDS:
        raise ValueError(f"{model.name} is a {kind}; what can be cut is {', '.join(KINDS)}")
    if not 2 <= ranks <= layers:  # noqa: PLR2004
        raise ValueError(f"{model.name} has {layers} layers: they cannot be cut over {ranks} ranks")
    _files(model)


def load_rank(spec: RankSpec) -> Stage:
    """This rank's part of the model."""
    ranks_program.join(spec)
    return Stage(spec)


class Stage:
    """A part of the model, and its place in the pipeline."""

    def __init__(self, spec: RankSpec) -> None:
        self._spec, self._device = spec, spec.torch_device
        self._first, self._last = spec.rank == 0, spec.rank == spec.ranks - 1
        self._model = cut(Path(spec.model), spec.rank, spec.ranks, spec.torch_dtype).to(self._device)
        self._layers = _Layers(self._model, first=self._first, last=self._last)
        self._one = self._schedule(1, 1)
        if self._first:
            self._model.forward = self._forward  # `generate` calls it, and sees the whole model

    def answer(self, job: Job, on_token: OnToken) -> str:
        if self._first:
            reason = ranks_program.generate(self._model, job, self._device, on_token)
            self._tell(0)
            return reason
        self._layers.forget()
        with torch.inference_mode():
            while length := self._tell():
                self._step(length)
        return ""

    def _forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
        """The next token's logits, by all ranks. input_ids: [1, length], the tokens that the cache does not have."""
        from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: PLC0415

        self._layers.cache = past_key_values
        self._tell(input_ids.shape[1])
        self._step(input_ids.shape[1], input_ids)
        logits = torch.empty(1, 1, self._model.config.vocab_size, dtype=self._model.dtype, device=self._device)
        distributed.recv(logits, self._spec.ranks - 1)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _tell(self, length: int = -1) -> int:
        """Rank 0 tells the others how many tokens the next step has; 0 where the answer has ended."""
        told = torch.tensor(length, device=self._device)
        distributed.broadcast(told, 0)
        return int(told)

    def _step(self, length: int, tokens: torch.Tensor | None = None) -> None:
        """Send tokens through the stages: a long prompt in pieces, so that the stages compute at the same time."""
        size = self._spec.prefill_tokens
        pieces, rest = divmod(length, size)
        logits = None
        for at, count, each in ((0, pieces, size), (pieces * size, 1, rest)):
            if count and each:
                schedule = self._one if (count, each) == (1, 1) else self._schedule(count, each)
                given = () if tokens is None else (tokens[:, at : at + count * each],)
                logits = schedule.eval(*given)
        if logits is not None:  # the last rank has them: [pieces, 1, words]
            distributed.send(logits[-1:].contiguous(), 0)

    def _schedule(self, pieces: int, length: int) -> ScheduleGPipe:
        config, on = self._model.config, {"dtype": self._model.dtype, "device": self._device}
        hidden = torch.empty(1, length, config.hidden_size, **on)
        given = torch.empty(1, length, dtype=torch.long, device=self._device) if self._first else hidden
        gives = torch.empty(1, 1, config.vocab_size, **on) if self._last else hidden
        spec = self._spec
        stage = PipelineStage(self._layers, spec.rank, spec.ranks, self._device, input_args=given, output_args=gives)
        return ScheduleGPipe(stage, pieces, args_chunk_spec=(TensorChunkSpec(1),))  # type: ignore[no-untyped-call]


class _Layers(nn.Module):
    """A stage's computation: tokens or hidden states in, hidden states or the last token's logits out."""

    def __init__(self, model: Any, *, first: bool, last: bool) -> None:
        super().__init__()
        self._model, self._last = model, last
        self._input = "input_ids" if first else "inputs_embeds"
        self.cache: Any = None

    def forget(self) -> None:
        """Begin another answer, with an empty cache."""
        from transformers import DynamicCache  # noqa: PLC0415

        self.cache = DynamicCache(config=self._model.config)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        out = self._model.model(**{self._input: given}, past_key_values=self.cache, use_cache=True)
        hidden = out.last_hidden_state
        given_on: torch.Tensor = self._model.lm_head(hidden[:, -1:]) if self._last else hidden
        return given_on


def cut(folder: Path, rank: int, ranks: int, dtype: torch.dtype | None) -> Any:
    """One of `ranks` parts of the model, as a model with fewer layers. No other weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig  # noqa: PLC0415

    config = AutoConfig.from_pretrained(folder)
    layers = config.num_hidden_layers
    first, end = layers * rank // ranks, layers * (rank + 1) // ranks
    part = copy.deepcopy(config)
    part.num_hidden_layers = end - first
    if getattr(part, "layer_types", None):
        part.layer_types = part.layer_types[first:end]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(part, dtype=dtype or config.dtype)  # type: ignore[no-untyped-call]
    if rank > 0:
        model.model.embed_tokens = nn.Identity()
    if rank < ranks - 1:
        model.model.norm, model.lm_head = nn.Identity(), nn.Identity()
    model.load_state_dict(_weights(folder, model, first, tied=config.tie_word_embeddings), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=part)  # it has no weights, but numbers
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval().requires_grad_(requires_grad=False)


def _weights(folder: Path, model: Any, first: int, *, tied: bool) -> dict[str, torch.Tensor]:
    """The weights of a part whose first layer is the model's layer `first`."""
    from safetensors import safe_open  # noqa: PLC0415

    files = _files(folder)
    weights = {}
    for name, parameter in model.state_dict().items():
        start, layers, rest = name.partition("model.layers.")
        number, _, of_layer = rest.partition(".")
        theirs = f"{start}{layers}{int(number) + first}.{of_layer}" if layers else name
        if tied and theirs not in files and theirs == "lm_head.weight":
            theirs = "model.embed_tokens.weight"
        with safe_open(folder / files[theirs], "pt") as file:
            weights[name] = file.get_tensor(theirs).to(parameter.dtype)
    return weights


def _files(folder: Path) -> dict[str, str]:
    """The file of each of the model's weights. Raises ValueError."""
    from safetensors import safe_open  # noqa: PLC0415

    index, single = folder / "model.safetensors.index.json", "model.safetensors"
    if index.exists():
        files: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        return files
    if not (folder / single).exists():
        raise ValueError(f"{folder.name} has no {single}: a model is cut from safetensors")
    with safe_open(folder / single, "pt") as file:
        return dict.fromkeys(file.keys(), single)
