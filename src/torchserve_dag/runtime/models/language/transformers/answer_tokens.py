"""One answer as an engine of ours gives it, token by token: until its end, a stop string or its limit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torchserve_dag.runtime.messages import FinishReason
from torchserve_dag.runtime.models.language.transformers.sampler import Sampler
from torchserve_dag.runtime.models.language.writer import AnswerWriter, Detokenizer


class AnswerTokens:
    """Takes an answer's tokens and writes its text. Its methods are called by one thread at a time."""

    def __init__(
        self,
        answers: AnswerWriter,
        index: int,
        sampler: Sampler,
        decode: Callable[[Sequence[int]], str],
        ends: Collection[int],
        most_tokens: int,
    ) -> None:
        """`index`: which of the request's answers; `ends`: the tokens that end a text; `most_tokens`: the limit."""
        self.sampler = sampler
        self.most_tokens = most_tokens
        self.count = 0
        """Its tokens so far."""
        self.cached_tokens = 0
        """Tokens of the prompt that were computed for an earlier request."""
        self.ended = False
        self.ends = ends
        self._answers, self._index = answers, index
        self._decode = decode
        self._detokenizer = Detokenizer(decode)

    def take(self, tokens: Sequence[int]) -> bool:
        """Write the next tokens. Returns whether the answer goes on."""
        for token in tokens:
            if self.ended:
                break
            self.count += 1
            if token in self.ends:
                self._finish("stop")
                break
            logprobs = self.sampler.take_logprobs(self.count - 1, token, lambda each: self._decode([each]))
            if not self._answers.write(self._index, self._detokenizer.add([token]), logprobs):
                self._finish("stop")
            elif self.count >= self.most_tokens:
                self._finish("length")
        return not self.ended

    def fail(self, error: BaseException) -> None:
        self.ended = True
        self._answers.fail(error)

    def _finish(self, reason: FinishReason) -> None:
        self.ended = True
        self._answers.write(self._index, self._detokenizer.rest())
        cached = 0 if self._index else self.cached_tokens  # the prompt counts once, however many answers it gets
        self._answers.finish(self._index, reason, self.count, cached)
