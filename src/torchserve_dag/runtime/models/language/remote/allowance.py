"""What may be asked of a hosted model: so many tokens a minute, and so much money a day."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from http import HTTPStatus

from torchserve_dag.runtime.messages import InputError, Usage
from torchserve_dag.runtime.models.language.model import BusyError
from torchserve_dag.runtime.models.language.settings import Remote

MINUTE_S, DAY_S = 60.0, 86_400.0
MILLION = 1_000_000


Settle = Callable[[Usage], None]


class Allowance:
    """Counts requests before they are sent: the prompt, and as much answer as may come. What a request has really cost
    takes the place of that once it is known.

    It counts in this process, from its start; a day is one of UTC. `clock` gives seconds since 1970.
    """

    def __init__(self, limits: Remote, clock: Callable[[], float] = time.time) -> None:
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self._at = clock()
        self._tokens = float(limits.tokens_per_minute or 0)
        """Tokens that may be asked for now; below 0 where answers cost more than was reserved."""
        self._spent = 0.0
        """The money of this day, what is reserved included."""

    def reserve(self, prompt: int, answer: int) -> Settle:
        """Count a request, and return what to call, once, with what it has cost. Raises InputError: with 429 if it has
        to wait, with 413 if it is more than the limit itself.
        """
        with self._lock:
            self._refill()
            tokens, money = prompt + answer, self._price(prompt, answer)
            self._check_tokens(tokens)
            self._check_money(money)
            self._tokens -= tokens
            self._spent += money
            day = self._day()

        def settle(usage: Usage) -> None:
            with self._lock:
                self._refill()
                self._add(tokens - usage.prompt_tokens - usage.completion_tokens)
                if day == self._day():
                    self._spent += self._price(usage.prompt_tokens, usage.completion_tokens) - money

        return settle

    def _check_tokens(self, tokens: int) -> None:
        limit = self._limits.tokens_per_minute
        if limit is None or tokens <= self._tokens:
            return
        if tokens > limit:
            message = (
                f"The request needs up to {tokens:,} tokens, and the model's limit is {limit:,} a minute: ask for less."
            )
            raise InputError(message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        wait = math.ceil((tokens - self._tokens) / limit * MINUTE_S)
        raise BusyError(f"The model's limit is {limit:,} tokens a minute; try again in {wait} seconds.")

    def _check_money(self, money: float) -> None:
        limit = self._limits.money_per_day
        if limit is None or self._spent + money <= limit:
            return
        if money > limit:
            message = f"The request may cost {money:g}, and the model's limit is {limit:g} a day: ask for less."
            raise InputError(message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        raise BusyError(f"The model's limit of {limit:g} a day is reached; try again after 00:00 UTC.")

    def _refill(self) -> None:
        now = self._clock()
        if int(now // DAY_S) != self._day():
            self._spent = 0.0
        passed, self._at = max(now - self._at, 0.0), now
        self._add(passed / MINUTE_S * (self._limits.tokens_per_minute or 0))

    def _add(self, tokens: float) -> None:
        self._tokens = min(self._tokens + tokens, float(self._limits.tokens_per_minute or 0))

    def _day(self) -> int:
        return int(self._at // DAY_S)

    def _price(self, prompt: int, answer: int) -> float:
        return (prompt * self._limits.prompt_price + answer * self._limits.answer_price) / MILLION
