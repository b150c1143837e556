"""Cancel keys, which belong to the token that sent them."""

from __future__ import annotations


def with_own_keys(headers: dict[str, str]) -> dict[str, str]:
    """The headers with the name of their token in each cancel key: no other token's key is the same."""
    token = headers.get("x-door-token")
    keys = [name for name in ("x-cancel-key", "x-cancel") if token is not None and name in headers]
    return headers | {name: f"{token} {headers[name]}" for name in keys} if keys else headers
