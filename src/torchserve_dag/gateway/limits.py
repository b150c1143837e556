"""How many tokens of language models each of the front door's tokens has used: the limit is so many a minute.

What is used is forgotten evenly: a limit of 6,000 a minute forgets 100 a second. The count is in a file of SQLite, so
that it outlives this process: a request that is inside when the process is killed stays counted as it was estimated.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from torchserve_dag.front_door.tokens import Token
from torchserve_dag.gateway.errors import ApiError

logger = logging.getLogger(__name__)

MINUTE_S = 60.0
KEPT_S = 3600.0
"""After so many seconds nothing of a count is left, whatever it was, unless one request used sixty times the limit."""


class Spending:
    """What every token has used."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock` has to go on while this process does not run."""
        self._clock = clock
        self._used: dict[str, tuple[float, float]] = {}
        """Token's id → how many are counted, and when that was so."""
        self._file = _open(path)
        with self._file:
            self._file.execute("DELETE FROM used WHERE at < ?", (clock() - KEPT_S,))
        for token, count, at in self._file.execute("SELECT token, count, at FROM used"):
            self._used[token] = (count, at)

    def reserve(self, token: Token | None, tokens: int) -> Reservation | None:
        """Count a request as `tokens` until it is settled; None for a token without a limit. Raises ApiError, 429."""
        if token is None or not token.tokens_per_minute:
            return None
        reservation = Reservation(self, token.id, token.tokens_per_minute, tokens)
        wait_s = (self.used(token.id, token.tokens_per_minute) + tokens) * MINUTE_S / token.tokens_per_minute - MINUTE_S
        if tokens > token.tokens_per_minute:
            message = (
                f"This request needs about {tokens:,} tokens, and its limit is {token.tokens_per_minute:,} a minute: "
                "send less, or ask for a shorter answer with max_tokens."
            )
            headers = {**reservation.headers(), "x-should-retry": "false"}  # which OpenAI's own clients obey
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, headers=headers)
        if wait_s > 0:
            seconds = math.ceil(wait_s)
            message = (
                f"This request needs about {tokens:,} tokens, and more than that are used of the limit of "
                f"{token.tokens_per_minute:,} a minute: try again in {seconds} s."
            )
            headers = {**reservation.headers(), "retry-after": str(seconds)}
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, headers=headers)
        self.add(token.id, token.tokens_per_minute, tokens)
        return reservation

    def used(self, token: str, limit: int) -> float:
        """How many tokens are counted at present."""
        count, at = self._used.get(token, (0.0, 0.0))
        return max(0.0, count - max(0.0, self._clock() - at) * limit / MINUTE_S)

    def add(self, token: str, limit: int, tokens: int) -> None:
        """Count more tokens, or fewer."""
        entry = (max(0.0, self.used(token, limit) + tokens), self._clock())
        self._used[token] = entry
        try:
            self._file.execute("INSERT OR REPLACE INTO used VALUES (?, ?, ?)", (token, *entry))
        except sqlite3.Error as error:  # a full disk: the count in memory still holds
            logger.warning("the count of tokens is not kept: %s", error)


class Reservation:
    """A request's tokens."""

    def __init__(self, spending: Spending, token: str, limit: int, tokens: int) -> None:
        self._spending, self._token, self._limit, self._tokens = spending, token, limit, tokens
        self._settled = False

    def settle(self, tokens: int) -> None:
        """Count what the request has really used, once."""
        if not self._settled:
            self._settled = True
            self._spending.add(self._token, self._limit, tokens - self._tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's headers, by which a client can pace itself."""
        used = self._spending.used(self._token, self._limit)
        return {
            "x-ratelimit-limit-tokens": str(self._limit),
            "x-ratelimit-remaining-tokens": str(max(0, int(self._limit - used))),
            "x-ratelimit-reset-tokens": f"{used * MINUTE_S / self._limit:.3f}s",
        }


def _open(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.DatabaseError as error:
        logger.warning("%s is begun anew: %s", path, error)
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(name).unlink(missing_ok=True)
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    file = sqlite3.connect(path, isolation_level=None)
    file.execute("PRAGMA journal_mode = WAL")
    file.execute("PRAGMA synchronous = OFF")  # what was written survives this process, and that is what is asked
    file.execute("CREATE TABLE IF NOT EXISTS used (token TEXT PRIMARY KEY, count REAL, at REAL)")
    return file
