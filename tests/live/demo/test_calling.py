"""The calls of docs/calling.md are answered, by the server that README's demo started."""

from __future__ import annotations

import re

from tests.live.conftest import ROOT
from tests.live.demo.conftest import Demo, Run
from torchserve_dag.front_door import settings

PAGE = (ROOT / "docs" / "calling.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_calls_of_the_page_are_answered(serving: Demo, run: Run) -> None:
    """Each block of shell, and each of Python as a program, with what the first block exports."""
    token, ca = run(BLOCKS[0][1] + 'echo "$TOKEN" "$CA"').split()
    server = f"localhost:{settings.read(serving.root).listen.rpartition(':')[2]}"
    printed = []
    for kind, text in BLOCKS[1:]:
        (serving.root / "call.py").write_text(text.replace("localhost:8443", server), "utf-8")
        command = text.replace("curl ", "curl -sS --fail ") if kind == "sh" else "python call.py"
        printed.append(run(f"export TOKEN={token} CA={ca}\n{command.replace('localhost:8443', server)}"))

    assert printed[0].count('"label": "cup"') == 2
    assert all(
        kind == "python" or '"label": "cup"' in text for (kind, _), text in zip(BLOCKS[1:], printed, strict=True)
    )
    run("torchserve-dag token revoke alice")
