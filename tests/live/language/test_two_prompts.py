"""Two prompts beside each other: shares by routes.yaml, scores that a client posts back, and the verdict."""

from __future__ import annotations

import json
import time
from pathlib import Path

import openai

from tests.live.conftest import Serving, run_tool
from tests.live.openai_access import WITHIN_S, Access, said

COUNTRIES = ("France", "Italy", "Spain", "Germany", "Japan", "Egypt")
REQUESTS = 60


def test_the_better_prompt_is_found(server: Serving, client: openai.OpenAI, access: Access) -> None:
    """The second says that one word is enough, so its answers are shorter; the client's score is their length."""
    (server.root / "routes.yaml").write_text('prompted:\n  versions: {"1.0": 50, "2.0": 50}\n')
    run_tool(server.root, "routes")
    last = ""
    with access.plain() as http:
        for at in range(REQUESTS):
            messages = said(f"What is the capital of {COUNTRIES[at % len(COUNTRIES)]}?")
            raw = client.chat.completions.with_raw_response.create(
                model="prompted", messages=messages, temperature=0, max_tokens=24
            )
            text = raw.parse().choices[0].message.content or ""
            last = raw.headers["x-request-id"]
            posted = http.post("/feedback", json={"request_id": last, "score": -len(text)})
            assert posted.is_success
    _until_written(server.state.logs / "feedback.log", last)

    result = json.loads(run_tool(server.root, "experiment", "prompted", "--json"))

    assert sum(arm["requests"] for arm in result["arms"]) == REQUESTS
    (feedback,) = [one for one in result["differences"] if one["what"] == "feedback"]
    assert feedback["low"] > 0, result


def _until_written(log: Path, request_id: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while request_id not in log.read_text("utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
