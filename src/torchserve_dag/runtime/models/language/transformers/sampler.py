"""Chooses an answer's next token from the model's logits, by what its own request says.

Engines that take the most probable token of every row of a batch can so serve requests with different settings side by
side: the choice of each row is made the most probable one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchserve_dag.runtime.messages import Chat, InputError, Prompt, Sampling, TokenLogprob

SEEDS = 2**63
"""Seeds that torch accepts."""
STRIDE = 1_000_003
"""Between the seeds of an answer's tokens and those of the next seed's answer."""
COLDEST = 1e-4
"""A lower temperature changes no choice, and its quotients overflow."""


@dataclass(frozen=True, slots=True)
class DefaultSampling:
    """How the model writes where a request does not say: what its `generation_config.json` says."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Only so many most probable tokens are considered; 0 for all."""


class Sampler:
    """The choices of one answer. Its methods are called by one thread at a time."""

    def __init__(self, request: Chat | Prompt, index: int, defaults: DefaultSampling, vocabulary: int) -> None:
        """`index`: which of the request's answers. Raises InputError for a bias of a token that does not exist."""
        self._request = request
        self._temperature = defaults.temperature if request.temperature is None else request.temperature
        self._top_p = defaults.top_p if request.top_p is None else request.top_p
        self._top_k = min(defaults.top_k, vocabulary)
        seed = secrets.randbits(62) if request.seed is None else request.seed
        self._seed = (seed + index) * STRIDE
        self._bias = _bias(request, vocabulary)
        self._top_logprobs = _top_logprobs(request)
        self._logprobs: dict[int, tuple[float, list[tuple[int, float]]]] = {}

    @property
    def changes(self) -> bool:
        """Whether it has anything to do; else the most probable token is the choice."""
        request = self._request
        penalties = request.presence_penalty or request.frequency_penalty
        return bool(self._temperature or self._bias or penalties or self._top_logprobs is not None)

    def choose(self, logits: Tensor, written: Sequence[int]) -> int:
        """The token that follows `written`, the answer so far; `logits` are the model's, float32 [vocabulary].

        The same seed gives the same token in the same place, whatever else is in the batch.
        """
        scores = self._adjusted(logits, written)
        token = int(scores.argmax())
        if self._temperature:
            token = self._draw(scores / max(self._temperature, COLDEST), place=len(written))
        if self._top_logprobs is not None:
            self._note(logits, token, place=len(written))
        return token

    def take_logprobs(self, place: int, token: int, text: Callable[[int], str]) -> list[TokenLogprob] | None:
        """What the request wants to know of its token at a place; None if it wants nothing."""
        if self._top_logprobs is None:
            return None
        logprob, top = self._logprobs.pop(place)
        others = [TokenLogprob(text(other), value) for other, value in top]
        return [TokenLogprob(text(token), logprob, others)]

    def _adjusted(self, logits: Tensor, written: Sequence[int]) -> Tensor:
        request = self._request
        scores = logits
        if self._bias:
            scores = scores.clone()
            places = torch.tensor(list(self._bias), device=scores.device)
            scores[places] += torch.tensor(list(self._bias.values()), device=scores.device)
        if written and (request.presence_penalty or request.frequency_penalty):
            counts = torch.bincount(torch.tensor(written, device=scores.device), minlength=scores.shape[-1])
            scores = (
                scores - (request.frequency_penalty or 0.0) * counts - (request.presence_penalty or 0.0) * (counts > 0)
            )
        return scores

    def _draw(self, scores: Tensor, place: int) -> int:
        """A token drawn by its probability: the first to come of as many exponential clocks as there are tokens."""
        if self._top_k:
            scores = scores.masked_fill(scores < scores.topk(self._top_k).values[-1], -torch.inf)
        probabilities = scores.softmax(-1)
        if self._top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            too_many = ordered.cumsum(-1) - ordered >= self._top_p  # the first is always kept
            probabilities = probabilities.index_fill(-1, order[too_many], 0.0)
        random = torch.Generator().manual_seed((self._seed + place) % SEEDS)
        clocks = torch.empty(probabilities.shape).exponential_(generator=random)
        return int((probabilities / clocks.to(probabilities.device)).argmax())

    def _note(self, logits: Tensor, token: int, place: int) -> None:
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(self._top_logprobs or 0, logprobs.shape[-1]))
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        self._logprobs[place] = (float(logprobs[token]), pairs)


def _bias(request: Sampling, vocabulary: int) -> dict[int, float]:
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    if bias and max(bias) >= vocabulary:
        raise InputError(f"logit_bias: the model has no token {max(bias)}; its last is {vocabulary - 1}.")
    return bias


def _top_logprobs(request: Chat | Prompt) -> int | None:
    """How many most probable tokens come with each token; None if no log-probabilities were asked for."""
    if isinstance(request, Chat):
        return request.top_logprobs or 0 if request.logprobs else None
    return request.logprobs
