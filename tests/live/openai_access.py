"""OpenAI's own client, for a server of the tests."""

from __future__ import annotations

import ssl
from typing import Any

import httpx
import openai

from tests.live.conftest import Serving
from torchserve_dag.front_door.door import Door

WITHIN_S = 600


class Access:
    """What a client needs to call a server: its address, its certificate, a token."""

    def __init__(self, server: Serving, token: str) -> None:
        record = Door(server.state).record()
        assert record
        self.root = f"https://localhost:{record.settings.listen.rpartition(':')[2]}"
        self.token, self.trust = token, ssl.create_default_context(cafile=record.certificate)

    def sync(self) -> openai.OpenAI:
        http = httpx.Client(verify=self.trust, timeout=WITHIN_S)
        return openai.OpenAI(base_url=f"{self.root}/v1", api_key=self.token, http_client=http, max_retries=0)

    def plain(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.root, verify=self.trust, timeout=WITHIN_S, headers=headers)


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]
