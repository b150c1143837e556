"""What holds for every page: its links lead somewhere, its commands exist, and the front page leads to it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.contract.conftest import ROOT
from tests.contract.test_docs import parse
from torchserve_dag.runtime.data.codec import FAILURE_TRAILER
from torchserve_dag.runtime.data.options import HEADERS

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "loadtests").glob("*.md"), ROOT / "photos/README.md"])
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
UNREAD = re.compile(r"^ *```(?:bash|shell|zsh|shell-session)$", re.MULTILINE)
"""Blocks of commands under a name that `commands` does not look for."""
PROGRAMS = {
    *("cd", "curl", "export", "pip", "python", "source", "torch-model-archiver", "torchserve"),
    *("cp", "docker", "journalctl", "systemctl"),
}
"""What a page's commands may be besides ours: the shell's, and those that the package and its set-up bring."""
AFTER_SET_UP = {".venv/bin/locust": "scripts/setup --test"}
"""Programs that are there only after another set-up than README's, which a page that uses them names."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_to(page: Path, link: str) -> bool:
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    return target.exists() and (not anchor or target.suffix != ".md" or anchor in anchors(target))


def links(page: Path) -> list[str]:
    return [link for link in LINK.findall(page.read_text("utf-8")) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_links_lead_somewhere(page: Path) -> None:
    assert [link for link in links(page) if not leads_to(page, link)] == []


def commands(page: Path) -> list[list[str]]:
    """The words of each command that a page shows."""
    text = page.read_text("utf-8")
    typed = re.findall(r"^\$ (.+)$", "\n".join(CONSOLE.findall(text)), re.MULTILINE)
    lines = [*"\n".join(SHELL.findall(text)).replace("\\\n", " ").splitlines(), *typed]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


PAGES_WITH_COMMANDS = [page for page in PAGES if page.parent != DOCS / "reference" and commands(page)]
"""Without the reference, which `scripts/reference` writes from the command line's own help."""


def test_every_block_of_commands_is_read() -> None:
    assert {ROOT / "README.md", DOCS / "serving.md"} <= set(PAGES_WITH_COMMANDS)
    assert [name(page) for page in PAGES if UNREAD.search(page.read_text("utf-8"))] == []


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=name)
def test_its_commands_exist(page: Path) -> None:
    """Those of ours are read as the command line reads them."""
    text = page.read_text("utf-8")
    for words in commands(page):
        program = words[0].removeprefix(".venv/bin/")
        if program == "torchserve-dag":
            parse([word for word in words[1:] if word not in {"|", "grep"}])
        elif words[0] in AFTER_SET_UP:
            assert AFTER_SET_UP[words[0]] in text, f"{words}: the page does not name {AFTER_SET_UP[words[0]]}"
        elif "scripts/" in words[0] or (program == "python" and words[1].endswith(".py")):
            script = words[1] if program == "python" else words[0]
            assert (ROOT / script).is_file(), words
        else:
            assert program in PROGRAMS, words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_options_that_it_names_exist(page: Path) -> None:
    named = set(re.findall(r"`(x-[a-z-]+)[`:]", page.read_text("utf-8")))

    others = {"x-model-version", "x-user-id", "x-tester", FAILURE_TRAILER, "x-should-retry"}  # the last is OpenAI's
    limits = {f"x-ratelimit-{name}-tokens" for name in ("limit", "remaining", "reset")}
    assert named <= set(HEADERS) | others | limits


def test_the_front_page_leads_to_every_page() -> None:
    reached: set[Path] = set()
    waiting = [DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page)]
        waiting += [target for target in targets if target.suffix == ".md" and target not in reached]

    assert sorted(name(page) for page in DOCS.rglob("*.md") if page.resolve() not in reached) == []
