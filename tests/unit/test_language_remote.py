"""The engine `remote`, against a small real server that answers as OpenAI's API does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engines.written import Written, start, until
from tests.unit.openai_server import KEY, USAGE, WORDS, OpenAiServer
from torchserve_dag import Chat, InputError, Prompt
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import Usage
from torchserve_dag.runtime.models.language.model import LanguageModel
from torchserve_dag.runtime.models.language.remote.allowance import Allowance
from torchserve_dag.runtime.models.language.remote.engine import RemoteEngine
from torchserve_dag.runtime.models.language.settings import LanguageSettings, Remote

ANSWER = "".join(WORDS)
VARIABLE = "CAPITALS_KEY"
DAY_S = 86_400

Load = Callable[..., RemoteEngine]


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAiServer]:
    with OpenAiServer() as server:
        yield server


@pytest.fixture(autouse=True)
def forget(server: OpenAiServer) -> None:
    server.times.clear()
    server.bodies.clear()
    server.headers.clear()
    server.most_open = 0


@pytest.fixture
def load(server: OpenAiServer) -> Iterator[Load]:
    engines: list[RemoteEngine] = []

    def load_engine(room: int = 16, settings: dict[str, Any] | None = None, **remote: Any) -> RemoteEngine:
        there = Remote(**{"url": server.url, **remote})
        made = RemoteEngine(LanguageSettings("capital", "remote", room=room, remote=there, **settings or {}))
        made._allowance = Allowance(there, lambda: 0.0)  # as if the tests took no time
        engines.append(made)
        return made

    yield load_engine
    for engine in engines:
        engine.close()
        assert not engine._in_progress._thread.is_alive()


@pytest.fixture
def engine(load: Load) -> RemoteEngine:
    return load()


def ask(engine: RemoteEngine, text: str) -> Written:
    return start(engine, Chat.of(text)).wait()


def refused(engine: RemoteEngine, text: str) -> InputError:
    written = start(engine, Chat.of(text))
    with pytest.raises(InputError) as caught:
        written.wait()
    assert written.ends == 1
    return caught.value


@pytest.mark.parametrize("request_", [Chat.of("Hello"), Prompt(prompt="Hello")], ids=["chat", "prompt"])
def test_the_chunks_are_the_servers(engine: RemoteEngine, request_: Chat | Prompt) -> None:
    """At the end with the server's own count of tokens, and with the model that it named."""
    written = start(engine, request_).wait()

    assert [chunk.text for chunk in written.chunks] == [*WORDS, ""]
    assert written.reasons() == {0: "stop"}
    assert written.usage == Usage.of(7, 5, 3)
    assert written.chunks[-1].served_by == "remote capital-2"
    assert written.ends == 1
    assert [chunk.usage for chunk in written.chunks[:-1]] == [None] * 5


def test_the_request_goes_to_the_server_as_it_is(load: Load, server: OpenAiServer) -> None:
    """With the limit by the name that the server has for it, the settings' own fields, and the adapter in the name."""
    engine = load(settings={"options": {"reasoning_effort": "low", "model": "x"}}, limit="max_completion_tokens")
    start(engine, Chat.of("Hello", temperature=0, seed=3, adapter="polite"), 9).wait()

    assert server.bodies == [
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "temperature": 0,
            "seed": 3,
            "max_completion_tokens": 9,
            "model": "capital:polite",
            "reasoning_effort": "low",
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert "authorization" not in server.headers[0]


def test_a_connection_is_used_again(engine: RemoteEngine, server: OpenAiServer) -> None:
    for _ in range(3):
        ask(engine, "Hello")
        until(lambda: engine.load_now().running == 0)

    assert len({headers["x-port"] for headers in server.headers}) == 1


def test_a_server_that_does_not_stream_is_read_too(engine: RemoteEngine) -> None:
    written = ask(engine, "whole")

    assert (written.text(), written.usage.total_tokens, written.ends) == (ANSWER, 12, 1)


def test_the_key_comes_from_the_environment(load: Load, server: OpenAiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"{VARIABLE}, which `key` names, is not set"):
        load(key=VARIABLE)
    monkeypatch.setenv(VARIABLE, f"{KEY}\n")
    engine = load(key=VARIABLE)

    assert ask(engine, "needs a key").text() == ANSWER
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_a_key_that_is_refused_is_named_and_not_shown(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is told 502: the key is the server's owner's, not the client's."""
    monkeypatch.setenv(VARIABLE, "sk-wrong")
    engine = load(key=VARIABLE)
    wrong = refused(engine, "needs a key")

    assert (wrong.status, wrong.message) == (
        502,
        f"The model's server refused the key in the environment variable {VARIABLE} (401).",
    )
    repeated = refused(engine, "repeats the key")
    assert (repeated.status, repeated.message) == (400, "You sent Bearer …")
    without = refused(load(), "needs a key")
    assert (without.status, without.message) == (
        502,
        "The model's server refused a request without a key: name one in `key` (401).",
    )


@pytest.mark.parametrize("value", ["sk-\nsecret", "sk-sécret", "sk- secret"])
def test_a_key_that_no_header_can_hold_is_refused_at_once(
    load: Load, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=VARIABLE) as caught:
        load(key=VARIABLE)

    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["api.example.com/v1", "ftp://a/v1", "https://", "https://me@a/v1", "https://a/v1?b=c"])
def test_an_address_that_cannot_be_is_refused_at_once(load: Load, url: str) -> None:
    with pytest.raises(ValueError, match="is no address like https"):
        load(url=url)


def test_a_key_is_not_sent_where_it_could_be_read(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)

    with pytest.raises(ValueError, match="would show the key on its way"):
        load(url="http://api.example.com/v1", key=VARIABLE)
    load(url="https://api.example.com/v1", key=VARIABLE)
    load(url="http://localhost:1/v1", key=VARIABLE)


@pytest.mark.parametrize("text", ["busy once", "broken once"])
def test_a_request_is_sent_again_before_its_first_chunk(engine: RemoteEngine, server: OpenAiServer, text: str) -> None:
    assert ask(engine, text).text() == ANSWER
    assert server.times[text] == 2


def test_a_request_is_sent_again_so_many_times(load: Load, server: OpenAiServer) -> None:
    failed = refused(load(retries=1), "always broken")

    assert (failed.status, failed.message) == (502, "Sorry.")
    assert server.times["always broken"] == 2


def test_a_server_that_wants_too_long_a_pause_is_not_asked_again(engine: RemoteEngine, server: OpenAiServer) -> None:
    failed = refused(engine, "busy for long")

    assert (failed.status, failed.message) == (429, "Slow down.")
    assert server.times["busy for long"] == 1


def test_what_the_server_refuses_is_passed_on(engine: RemoteEngine, server: OpenAiServer) -> None:
    failed = refused(engine, "too long")

    assert (failed.status, failed.message) == (400, "This model's maximum context length is 8192 tokens.")
    assert server.times["too long"] == 1


def test_no_redirect_is_followed(engine: RemoteEngine) -> None:
    failed = refused(engine, "moved")

    assert (failed.status, failed.message) == (
        502,
        "The model's server answered 307, and no other address is followed: correct the url.",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stops in the middle", "stopped in the middle"),
        ("breaks in the middle", "stopped in the middle"),
        ("an error in the middle", "Out of memory."),
    ],
)
def test_an_answer_that_stops_in_the_middle_is_a_failure(
    engine: RemoteEngine, server: OpenAiServer, text: str, said: str
) -> None:
    """And is not asked for again: the client has its beginning already."""
    written = start(engine, Chat.of(text))
    with pytest.raises(InputError, match=said) as caught:
        written.wait()

    assert (written.text(), caught.value.status) == ("Paris is", 502)
    assert server.times[text] == 1
    assert written.reasons() == {}


@pytest.mark.parametrize("text", ["silent in the middle", "only comments", "no answer"])
def test_the_next_chunk_has_a_time_limit(load: Load, server: OpenAiServer, text: str) -> None:
    """Comments, with which some servers keep a connection alive, are no chunks."""
    failed = refused(load(timeout_s=0.5), text)

    assert (failed.status, failed.message) == (504, "The model's server sent nothing for 0.5 seconds.")
    assert server.times[text] == 1


def test_a_server_that_is_not_there_is_a_failure(load: Load) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # it does not listen
        failed = refused(load(url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=1), "Hello")

    assert (failed.status, failed.message) == (502, "The model's server cannot be reached (ConnectError).")


def test_certificates_are_verified(load: Load) -> None:
    """A server whose certificate nobody vouches for gets nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        received = _serve_tls(listener)
        failed = refused(load(url=f"https://127.0.0.1:{listener.getsockname()[1]}/v1", retries=0), "Hello")

    assert failed.message == "The model's server cannot be reached (ConnectError)."
    assert received == []


def test_a_cancelled_request_leaves_the_server_at_once(load: Load, server: OpenAiServer) -> None:
    """And its place is free: the next request does not wait."""
    engine = load(room=1)
    written = start(engine, Chat.of("without end"))
    written.wait_for(lambda: len(written.chunks) > 8)
    written.cancel()
    written.cancel()
    written.wait_for(lambda: bool(written.ends))

    until(lambda: server.open == 0)
    assert ask(engine, "Hello").text() == ANSWER
    assert written.ends == 1
    assert engine.load_now().running == 0


def test_a_request_that_is_cancelled_before_it_was_sent_is_not_sent(load: Load, server: OpenAiServer) -> None:
    engine = load(room=1)
    first = start(engine, Chat.of("without end"))
    waiting = [start(engine, Chat.of("waiting")) for _ in range(3)]
    until(lambda: engine.load_now().waiting == 3)
    for one in waiting:
        one.cancel()
    first.cancel()
    until(lambda: engine.load_now().waiting == 0)

    assert ask(engine, "Hello").text() == ANSWER
    assert server.times["waiting"] == 0


def test_hundreds_of_streams_need_one_thread(load: Load, server: OpenAiServer) -> None:
    engine = load(room=100)
    before = threading.active_count()
    streams = [start(engine, Chat.of("without end")) for _ in range(200)]
    until(lambda: server.open == 100)

    assert threading.active_count() == before
    load_now = engine.load_now()
    assert (load_now.running, load_now.waiting) == (100, 100)
    for stream in streams:
        stream.cancel()
    until(lambda: server.open == 0)
    assert server.most_open == 100


def test_what_is_in_progress_fails_when_the_engine_is_closed(load: Load) -> None:
    engine = load()
    written = start(engine, Chat.of("without end"))
    written.wait_for(lambda: len(written.chunks) > 8)
    engine.close()

    with pytest.raises(InputError, match="is being closed") as caught:
        written.wait()
    assert caught.value.status == 503
    with pytest.raises(InputError):
        start(engine, Chat.of("Hello"))


def test_waiting_requests_have_a_bound(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchserve_dag.runtime.models.language.remote.engine.MOST_WAITING", 2)
    engine = load(room=1)
    streams = [start(engine, Chat.of("without end")) for _ in range(3)]

    with pytest.raises(InputError, match="too many requests") as caught:
        start(engine, Chat.of("Hello"))
    assert caught.value.status == 503
    for stream in streams:
        stream.cancel()


def test_beyond_the_tokens_of_a_minute_nothing_is_sent(load: Load, server: OpenAiServer) -> None:
    """What an answer did not need of its limit is given back."""
    engine = load(tokens_per_minute=100)
    for _ in range(5):  # of up to 50 tokens each, and 12 in truth
        start(engine, Chat.of("Hello"), 45).wait()
        until(lambda: engine.load_now().running == 0)
    with pytest.raises(InputError, match=r"100 tokens a minute; try again in \d+ seconds") as caught:
        start(engine, Chat.of("Hello"), 80)

    assert caught.value.status == 429
    assert len(server.bodies) == 5
    with pytest.raises(InputError, match="limit is 100 a minute: ask for less") as caught:
        start(engine, Chat.of("Hello"), 200)
    assert caught.value.status == 413


def test_beyond_the_money_of_a_day_nothing_is_sent(load: Load, server: OpenAiServer) -> None:
    engine = load(money_per_day=0.001, prompt_price=1.0, answer_price=10.0)  # 57e-6 for an answer
    for _ in range(2):
        start(engine, Chat.of("Hello"), 90).wait()
        until(lambda: engine.load_now().running == 0)
    with pytest.raises(InputError, match=r"limit of 0.001 a day is reached") as caught:
        start(engine, Chat.of("Hello"), 95)

    assert caught.value.status == 429
    assert len(server.bodies) == 2


def test_a_request_that_was_refused_costs_nothing(load: Load) -> None:
    engine = load(tokens_per_minute=100)
    for _ in range(5):
        refused(engine, "too long")
        until(lambda: engine.load_now().running == 0)

    assert ask(engine, "Hello").text() == ANSWER


def test_the_allowance_of_a_minute_comes_back_and_that_of_a_day_at_midnight() -> None:
    now = [DAY_S * 20_000.0]
    limits = Remote("https://a/v1", tokens_per_minute=60, money_per_day=1.0, prompt_price=0.0, answer_price=10_000.0)
    allowance = Allowance(limits, lambda: now[0])
    settle = allowance.reserve(10, 50)  # 0.5
    with pytest.raises(InputError, match="try again in 5 seconds"):
        allowance.reserve(0, 5)
    now[0] += 5
    allowance.reserve(0, 5)  # 0.55
    now[0] += 60
    with pytest.raises(InputError, match="limit of 1 a day is reached"):
        allowance.reserve(0, 50)
    settle(Usage.of(10, 10))  # 0.4 less
    allowance.reserve(0, 50)
    now[0] += DAY_S
    allowance.reserve(0, 60)

    with pytest.raises(InputError, match="may cost 2"):
        Allowance(Remote("https://a/v1", money_per_day=1.0, answer_price=10_000.0)).reserve(0, 200)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"timeout_s": 0}, "timeout_s is at least"),
        ({"timeout_s": float("nan")}, "timeout_s is at least"),
        ({"retries": -1}, "retries is at least 0"),
        ({"tokens_per_minute": 0}, "tokens_per_minute is at least 1"),
        ({"prompt_price": -1}, "prompt_price is at least 0"),
        ({"money_per_day": 1}, "without prices no cost can be counted"),
        ({"key_": "x"}, "unknown key"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    remote = {"url": "https://a/v1", **wrong}

    with pytest.raises(plain.WrongDataError, match=said):
        plain.build(LanguageSettings, {"model": "m", "engine": "remote", "remote": remote})


def test_a_prompt_is_estimated(engine: RemoteEngine) -> None:
    """A token for four bytes, and so many for each message and photo; tools count as their JSON."""
    photo = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    chat = plain.build(Chat, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 400}, photo]}]})

    assert engine.count(Prompt(prompt="a" * 400)) == 101
    assert 1_100 <= engine.count(chat) <= 1_120


def test_it_serves_as_a_language_model(load: Load) -> None:
    """Every field goes through; an answer that has no limit gets the handler's."""
    engine = load()
    model = LanguageModel(engine, engine._settings)
    written = Written()
    model.start(Chat.of("Hello", n=1, logit_bias={"3": 1.0}, presence_penalty=1.0), written)

    assert written.wait().text() == ANSWER
    assert USAGE["total_tokens"] == written.usage.total_tokens


def _serve_tls(listener: socket.socket) -> list[bytes]:
    """Answer one connection with a certificate that is signed by itself; gives what the client sends after that."""
    import ssl
    import tempfile
    from datetime import datetime, timedelta, timezone
    from pathlib import Path

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    dated = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    certificate = dated.sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "both.pem"
        file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
        context.load_cert_chain(file)
    received: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                with context.wrap_socket(connection, server_side=True) as tls:
                    received.append(tls.recv(1024))
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    return received
