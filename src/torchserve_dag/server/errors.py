"""Why a server cannot be started, found or stopped."""

from __future__ import annotations


class ServerError(Exception):
    """One sentence for a person: what is wrong, where, and what to do."""
