"""`torchserve-dag chat`: a chat with a language model in the terminal, over OpenAI's API of the front door."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from torchserve_dag.commands.common import (
    JsonOption,
    ProjectOption,
    err,
    fail,
    failures,
    out,
    print_json,
    project_root,
)
from torchserve_dag.commands.remote import (
    CaOption,
    InsecureOption,
    ServerOption,
    TokenFileOption,
    TokenOption,
    token_of,
)

if TYPE_CHECKING:
    from torchserve_dag.clients.chat import ChatClient

HELP = "ctrl-C stops an answer, /new begins another chat, ctrl-D ends."


def chat(
    model: Annotated[str, typer.Argument(metavar="NAME[/VERSION]", help="A language model that is served.")],
    *,
    system: Annotated[str | None, typer.Option(help="What the model is told before the chat begins.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The limit of each answer, in tokens.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0: always the most probable token; more: more varied answers.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the next part of an answer.")] = 60.0,
    json: JsonOption = False,
    server: ServerOption = None,
    ca: CaOption = None,
    token: TokenOption = None,
    token_file: TokenFileOption = None,
    insecure: InsecureOption = False,
    project: ProjectOption = None,
) -> None:
    """Chat with a language model. A question that is piped in gets its answer, and the command ends."""
    with failures():
        if server and project is None:
            client = _client(server, token_of(token, token_file), ca, insecure=insecure, timeout=timeout)
        else:
            client = _client_of_project(project, timeout)
        with client:
            talk = Conversation(client, model, system, {"max_tokens": max_tokens, "temperature": temperature})
            if sys.stdin.isatty():
                _chat(talk, json=json)
                return
            question = sys.stdin.read().strip()
            if not question:
                fail("The standard input is empty: pipe a question in, or type one in a terminal.")
            talk.ask(question, json=json)


@dataclass
class Conversation:
    """A chat so far, and the model that goes on with it."""

    client: ChatClient
    model: str
    system: str | None
    sampling: dict[str, float | None]
    messages: list[dict[str, str]] = field(default_factory=list)
    """The user's and the model's, without the system's."""

    def ask(self, question: str, *, json: bool) -> None:
        """Print the answer as it comes, and remember both. A stopped answer counts as far as it came.

        Raises ServingError; then the question is forgotten. Raises KeyboardInterrupt after stopping the answer.
        """
        told = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": question}
        answer = _Answer(time.perf_counter(), shown=not json)
        try:
            with closing(self.client.answer(self.model, [*told, *self.messages, asked], **self.sampling)) as parts:
                for part in parts:
                    answer.add(part.text, part.finish_reason, part.usage)
        except KeyboardInterrupt:
            answer.finish_reason = "stopped"
            raise
        finally:
            answer.end()
            if answer.finish_reason:
                self.messages += [asked, {"role": "assistant", "content": answer.text}]
        if json:
            answer.print_as_json(self.model)


@dataclass
class _Answer:
    """An answer as it comes."""

    asked_at: float
    shown: bool
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def add(self, text: str, finish_reason: str | None, usage: dict[str, Any]) -> None:
        self.text += text
        self.finish_reason = finish_reason or self.finish_reason
        self.usage = usage or self.usage
        if self.shown:
            sys.stdout.write(_printable(text) if out.is_terminal else text)
            sys.stdout.flush()

    def end(self) -> None:
        """A newline, and in a terminal what the answer has cost."""
        if not self.shown:
            return
        if self.text and not self.text.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
        if out.is_terminal and self.finish_reason:
            out.print(f"[dim]{', '.join(self._facts())}[/]")

    def _facts(self) -> Iterator[str]:
        taken = time.perf_counter() - self.asked_at
        if tokens := self.usage.get("completion_tokens"):
            yield f"{tokens} tokens in {taken:.1f} s"
        if self.finish_reason == "length":
            yield "cut at the limit of the answer or of the context"
        elif self.finish_reason == "stopped":
            yield "stopped"

    def print_as_json(self, model: str) -> None:
        fields = {"model": model, "answer": self.text, "finish_reason": self.finish_reason, "usage": self.usage}
        print_json(fields, indent=None)


def _chat(talk: Conversation, *, json: bool) -> None:
    """Ask what the user types, until ctrl-D."""
    import readline  # noqa: F401 (so that input() has the arrow keys, and the earlier questions)

    from torchserve_dag.clients import ServingError

    err.print(f"[dim]{talk.model}: {HELP}[/]")
    while True:
        try:
            question = input(_prompt()).strip()
            if question == "/new":
                talk.messages.clear()
            elif question:
                talk.ask(question, json=json)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except EOFError:
            sys.stdout.write("\n")
            return
        except ServingError as error:
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)


def _prompt() -> str:
    """Its colour is marked as taking no room, or the line editor would miscount."""
    return "> " if not out.is_terminal or out.no_color else "\001\033[1;32m\002> \001\033[0m\002"


def _printable(text: str) -> str:
    """Without what would steer the terminal: a model may write anything."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def _client(
    server: str, token: str | None, ca: Path | None, *, insecure: bool, timeout: float, name: str | None = None
) -> ChatClient:
    from torchserve_dag.clients.chat import ChatClient

    try:
        return ChatClient(server, token=token, ca=ca, insecure=insecure, timeout=timeout, server_name=name)
    except ValueError as error:
        fail(f"{error}.")


def _client_of_project(project: Path | None, timeout: float) -> ChatClient:
    from torchserve_dag.server.state import State
    from torchserve_dag.stack.connect import chat_client

    return chat_client(State(project_root(project)), timeout)
