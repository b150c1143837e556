"""Unedited archives of TorchServe's on the direct host: on the main thread, in whole batches, with TorchServe's answers."""

from __future__ import annotations

import io
import json
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.foreign_archives import EXCHANGES, TOLD, WITHIN_S, Exchange, Host, ask, check, hosted, manifest
from tests.unit.conftest import Mar
from torchserve_dag.direct.main_thread import RunsOnMainThread
from torchserve_dag.direct.torchserve_archive.handler import ForeignHandler
from torchserve_dag.direct.torchserve_archive.service import ForeignService
from torchserve_dag.direct.torchserve_archive.settings import ArchiveSettings, read_settings
from torchserve_dag.runtime.compat.context import Context
from torchserve_dag.runtime.data import unzip
from torchserve_dag.runtime.telemetry.series import PREFIX
from torchserve_dag.runtime.worker.protocol import PendingResponse, ServiceRequest, ServiceResponse


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def unpack(mar: Mar, tmp_path: Path) -> Callable[..., Path]:
    """Makes an archive with TorchServe's own archiver, and unpacks it."""

    def make(name: str, code: str, config: str = "", **more: Any) -> Path:
        files = {"model-config.yaml": config or "batchSize: 1", **more.pop("more", {})}
        archive = mar(name, code, more=files, config_file="model-config.yaml", **more)
        unzip.extract(archive, tmp_path / name)
        return tmp_path / name

    return make


def unpacked(folder: Path, code: str = TOLD, config: str = "{}") -> Path:
    """The files of an archive called `m`."""
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF" / "MANIFEST.json").write_text(manifest(configFile="model-config.yaml"))
    (folder / "model-config.yaml").write_text(textwrap.dedent(config))
    (folder / "handler.py").write_text(textwrap.dedent(code))
    return folder


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an archive that does what it is told."""
    with hosted(unpacked(tmp_path_factory.mktemp("told") / "m")) as host:
        yield host.address


class TestServed:
    """As a program, over HTTP."""

    @pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.what)
    def test_requests_and_answers_are_those_of_torchserve(self, told: str, exchange: Exchange) -> None:
        check(exchange, ask(told, "m", **exchange.send))

    def test_a_body_of_which_only_curl_says_that_it_is_a_form_is_a_body(self, told: str) -> None:
        """TorchServe gives the handler an empty row."""
        headers = {"content-type": "application/x-www-form-urlencoded"}

        assert ask(told, "m", content=b"hello", headers=headers).json()["row"] == {"body": ["bytearray", "hello"]}

    def test_a_header_has_any_case(self, told: str) -> None:
        """TorchServe's handlers ask for it as clients write it, and a proxy writes it in lower case."""
        headers = {"do": "answer = context.get_request_header(i, 'X-One')", "X-One": "1"}

        assert ask(told, "m", headers=headers).text == "1"

    @pytest.mark.parametrize(
        "code",
        [
            "context.set_response_header(i, 'x', 'a\\r\\nb: c')",
            "context.set_response_header(i, 'a b', 'c')",
            "context.set_response_header(i, 'x', 3)",
            "context.set_response_header(i, 'content-type', '\\u20ac')",
            "context.set_response_status(99, '', i)",
            "context.set_response_status('odd', '', i)",
        ],
    )
    def test_what_http_cannot_carry_is_a_failure_of_its_request(self, told: str, code: str) -> None:
        answer = ask(told, "m", headers={"do": f"answer = 'a'; {code}"})

        assert (answer.status_code, "which HTTP does not carry" in answer.json()["message"]) == (500, True)

    def test_a_failure_leads_to_its_traceback(self, tmp_path: Path) -> None:
        with hosted(unpacked(tmp_path / "m")) as host:
            answer = ask(host.address, "m", headers={"do": "raise KeyError('the reason')", "x-request-id": "mine"})

            assert answer.json()["message"].endswith("torchserve-dag logs --request mine says why.")
            host.wait_for(lambda: "request mine: m: Prediction failed (fault " in host.said)
            assert "KeyError: 'the reason'" in host.said

    def test_a_deep_body_fails_nobody(self, told: str) -> None:
        answer = ask(told, "m", content=b"[" * 100_000, headers={"content-type": "application/json"})

        assert answer.json()["row"]["body"][0] == "bytearray"


NET = """
    import torch
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2, bias=False)
        def forward(self, x):
            return self.layer(x)
"""
MODEL = """
    import torch
    from ts.torch_handler.base_handler import BaseHandler

    class Doubler(BaseHandler):
        def preprocess(self, data):
            return torch.tensor([row["body"] for row in data], dtype=torch.float32)

        def postprocess(self, data):
            self.context.metrics.add_counter("Doubled", len(data))
            return [[*row, len(data)] for row in data.tolist()]
"""


def test_a_handler_on_torchserves_base_class_gets_whole_batches(unpack: Callable[..., Path]) -> None:
    """No batch of four would be answered before its delay, were it not full."""
    weights = io.BytesIO()
    torch.save({"layer.weight": 2 * torch.eye(2)}, weights)
    config = f"batchSize: 4\nmaxBatchDelay: {1000 * WITHIN_S}\nresponseTimeout: {10 * WITHIN_S}\n"
    files = {"model.py": NET, "model.pt": weights.getvalue()}
    folder = unpack("doubler", MODEL, config, more=files, model_file="model.py", serialized_file="model.pt")

    with hosted(folder) as host, ThreadPoolExecutor(4) as pool:
        address = host.address
        answers = list(pool.map(lambda i: ask(address, "doubler", json=[i, 0.5]), range(4)))

    assert [answer.json() for answer in answers] == [[2.0 * i, 1.0, 4] for i in range(4)]


MAIN_THREAD = """
    import asyncio, os, signal, sqlite3, subprocess, sys, threading
    import torch
    import beside

    class Bound:
        def initialize(self, context):
            self.thread = threading.current_thread()
            self.connection = sqlite3.connect(":memory:")
            self.connection.execute("create table t as select 7 as n")
            torch.set_grad_enabled(False)
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
            self.signals = []
            signal.signal(signal.SIGUSR1, lambda *_: self.signals.append(threading.current_thread().name))
            self.context = context

        async def later(self):
            await asyncio.sleep(0)
            return asyncio.get_running_loop() is self.loop

        def handle(self, data, context):
            os.kill(os.getpid(), signal.SIGUSR1)
            properties = context.system_properties
            return [{
                "main": threading.current_thread() is threading.main_thread() is self.thread,
                "same context": context is self.context,
                "sqlite": self.connection.execute("select n from t").fetchone(),
                "gradients": torch.is_grad_enabled(),
                "loop": asyncio.get_event_loop().run_until_complete(self.later()),
                "signals": self.signals,
                "cwd": os.getcwd(),
                "file": open("beside.py").read().strip(),
                "path": sys.path[0],
                "a program's": subprocess.run(
                    [sys.executable, "-c", "import beside; print(beside.N)"], capture_output=True, text=True, cwd="/"
                ).stdout.strip(),
                "properties": {key: properties[key] for key in ("model_dir", "gpu_id", "batch_size", "server_name")},
                "config": context.model_yaml_config,
                "manifest": context.manifest["model"]["modelName"],
                "model": context.model_name,
            }] * len(data)
"""


def test_a_handler_has_the_main_thread_and_its_folder(unpack: Callable[..., Path]) -> None:
    """What belongs to a thread or to a process works as it does under TorchServe."""
    folder = unpack("bound", MAIN_THREAD, "own: [1]", more={"beside.py": "N = 3"})
    with hosted(folder) as host:
        ask(host.address, "bound")
        answer = ask(host.address, "bound").json()

    assert answer == {
        "main": True,
        "same context": True,
        "sqlite": [7],
        "gradients": False,
        "loop": True,
        "signals": ["MainThread"] * 2,
        "cwd": str(folder),
        "file": "N = 3",
        "path": str(folder),
        "a program's": "3",
        "properties": {"model_dir": str(folder), "gpu_id": None, "batch_size": 1, "server_name": "MMS"},
        "config": {"own": [1]},
        "manifest": "bound",
        "model": "bound",
    }


def test_a_signal_reaches_a_handler_that_has_nothing_to_do(tmp_path: Path) -> None:
    """Its main thread waits for requests, and still runs what Python runs on a signal: here it ends the process."""
    code = """
        import os, signal, sys
        def handle(data, context):
            if data is None:
                signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
            return data and [str(os.getpid())]
    """
    with hosted(unpacked(tmp_path / "m", code)) as host:
        assert ask(host.address, "m").text == str(host.process.pid)
        host.process.send_signal(signal.SIGUSR1)

        host.ended()
        assert host.process.returncode == 7


STREAM = """
    import time
    from pathlib import Path
    from ts.handler_utils.utils import send_intermediate_predict_response

    def handle(data, context):
        if data is None:
            return None
        context.set_response_content_type(0, "text/plain")
        send_intermediate_predict_response(["first "], context.request_ids, "", 200, context)
        gate = bytes(data[0]["body"]).decode()
        if gate == "raise":
            raise KeyError("late")
        end = time.monotonic() + 120
        while gate and not Path(gate).exists() and time.monotonic() < end:
            time.sleep(0.01)
        send_intermediate_predict_response(["second "], context.request_ids, "", 200, context)
        return ["last"]
"""


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with hosted(unpacked(tmp_path_factory.mktemp("stream") / "m", STREAM)) as host:
        yield host.address


def test_a_handler_that_sends_chunks_streams(stream: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with httpx.stream("POST", f"{stream}/predictions/m", content=str(gate), timeout=WITHIN_S) as answer:
        chunks = answer.iter_bytes()

        assert (next(chunks), answer.headers["content-type"]) == (b"first ", "text/plain")
        gate.touch()
        assert b"".join(chunks) == b"second last"


def test_a_failure_after_chunks_is_the_end_of_the_answer(stream: str) -> None:
    answer = ask(stream, "m", content=b"raise")
    first, failure = answer.text.split("\n", 1)

    assert (answer.status_code, first, json.loads(failure)["code"]) == (200, "first ", 503)


class TestLoading:
    @pytest.mark.parametrize(
        ("before", "code", "why"),
        [
            ("", "import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
            (
                "import sys; sys.modules['ts'] = None\n",
                "from ts.torch_handler.base_handler import BaseHandler",
                "RuntimeError: m 1.0 imports ts, which is TorchServe's own package, and not installed here: pip install",
            ),
            ("", "async def handle(data, context): return data", "handle is a coroutine, which only TorchServe's"),
            ("", "a = 1", "handler.py has neither a function handle nor exactly one class"),
        ],
    )
    def test_what_cannot_be_loaded_ends_with_its_reason(self, tmp_path: Path, before: str, code: str, why: str) -> None:
        said = Host(unpacked(tmp_path / "m", code), before).ended()

        assert why in said.splitlines()[-1]

    @pytest.mark.parametrize(
        ("config", "model", "what"),
        [
            ("asyncCommunication: true", {}, "asyncCommunication: true in its model-config.yaml"),
            ("continuousBatching: true", {}, "continuousBatching: true in its model-config.yaml"),
            ("sequenceBatching: true", {}, "sequenceBatching: true in its model-config.yaml"),
            ("{parallelType: tp, torchrun: {nproc-per-node: 2}}", {}, "parallelType: tp in its model-config.yaml"),
            ("{}", {"envelope": "json"}, 'the envelope "json" in its manifest'),
        ],
    )
    def test_what_only_torchserve_can_do_is_refused_in_a_sentence(
        self, tmp_path: Path, config: str, model: dict[str, str], what: str
    ) -> None:
        folder = unpacked(tmp_path / "m", config=config)
        (folder / "MAR-INF" / "MANIFEST.json").write_text(manifest(configFile="model-config.yaml", **model))
        with pytest.raises(ValueError, match="let TorchServe serve it") as refused:
            read_settings(folder)

        assert str(refused.value) == f"m 1.0 has {what}, which the direct host does not do: let TorchServe serve it."

    @pytest.mark.parametrize(
        ("file", "text", "why"),
        [
            ("MAR-INF/MANIFEST.json", None, r"holds no MAR-INF/MANIFEST\.json"),
            ("MAR-INF/MANIFEST.json", "{", r"MAR-INF/MANIFEST\.json cannot be read: Expecting"),
            ("MAR-INF/MANIFEST.json", "[]", r"MAR-INF/MANIFEST\.json is not a mapping"),
            ("MAR-INF/MANIFEST.json", "{}", 'names no "model"'),
            ("MAR-INF/MANIFEST.json", manifest(handler=""), r"names no model\.handler"),
            ("MAR-INF/MANIFEST.json", manifest(configFile="../x"), "lies outside"),
            ("MAR-INF/MANIFEST.json", manifest(configFile="x"), "holds no x that can be read"),
            ("MAR-INF/MANIFEST.json", manifest().replace("python", "LSP"), 'the runtime "LSP"'),
            ("model-config.yaml", "a: [", r"model-config\.yaml cannot be read"),
            ("model-config.yaml", "- a", r"model-config\.yaml is not a mapping"),
        ],
    )
    def test_an_archive_that_cannot_be_read_is_refused(
        self, tmp_path: Path, file: str, text: str | None, why: str
    ) -> None:
        path = unpacked(tmp_path / "m") / file
        path.unlink() if text is None else path.write_text(text)

        with pytest.raises(ValueError, match=why):
            read_settings(tmp_path / "m")

    def test_settings_are_the_archives_or_torchserves(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A delay of 0 is TorchServe's default, too, and so is what is no number."""
        given = "{batchSize: 8, maxBatchDelay: 5, jobQueueSize: 7, responseTimeout: 9, deviceType: cpu}"
        odd = "{batchSize: no, maxBatchDelay: 0, jobQueueSize: -1, responseTimeout: true, useJobTicket: true}"
        defaults = ArchiveSettings("m", "1.0", "handler.py", None, on_cpu=False)

        assert read_settings(unpacked(tmp_path / "a", config=given)) == ArchiveSettings(
            "m", "1.0", "handler.py", None, on_cpu=True, batch=8, delay_s=0.005, queue=7, timeout_s=9
        )
        assert read_settings(unpacked(tmp_path / "b", config="")) == defaults
        assert not caplog.messages
        assert read_settings(unpacked(tmp_path / "c", config=odd)) == defaults
        assert [message.split()[0] for message in caplog.messages] == [
            "m",
            "batchSize:",
            "jobQueueSize:",
            "responseTimeout:",
        ]

    def test_packages_that_an_archive_names_are_not_installed(self, unpack: Callable[..., Path]) -> None:
        code = "def handle(data, context): return data and ['x']"
        folder = unpack(
            "needy", code, more={"requirements.txt": "no-such-package"}, requirements_file="requirements.txt"
        )
        with hosted(folder) as host:
            assert ask(host.address, "needy").text == "x"

        assert "needy 1.0: the packages of its requirements.txt are not installed by the direct host" in host.said


# In this process, with a function of the test's own as the handler, so that the test holds its gates.


class Model:
    """A service whose handler waits at a gate for requests with the body `wait`, and the thread that runs it."""

    def __init__(
        self,
        folder: Path,
        handle: Callable[[Any, Any], Any] | None = None,
        *,
        streams: bool = False,
        **settings: Any,
    ) -> None:
        self.gate, self.batches, self.raised = threading.Event(), list[list[bytes]](), list[BaseException]()
        about = ArchiveSettings("m", "1.0", "handler.py", None, **{"on_cpu": True, "timeout_s": WITHIN_S, **settings})
        self.handler = ForeignHandler("m", handle or self.handle, Context("m", folder, None, about.batch))
        self.service = ForeignService(about, self.handler, streams=streams)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.service.run()
        except BaseException as error:  # noqa: BLE001 (that is what the test looks at)
            self.raised.append(error)

    def handle(self, data: Any, context: Any) -> list[str]:
        self.batches.append([bytes(row["body"]) for row in data])
        if b"wait" in self.batches[-1]:
            assert self.gate.wait(WITHIN_S)
        return [bytes(row["body"]).decode().upper() for row in data]

    def send(self, body: bytes, request_id: str = "id", **options: str) -> PendingResponse:
        named = {name.replace("_", "-"): value for name, value in options.items()}
        return self.service.submit(ServiceRequest(request_id, body, options=named))

    def block(self) -> PendingResponse:
        """A request that runs until the gate is opened."""
        known = len(self.batches)
        blocking = self.send(b"wait")
        until(lambda: len(self.batches) > known)
        return blocking


Start = Callable[..., Model]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    models: list[Model] = []

    def begin(handle: Callable[[Any, Any], Any] | None = None, **settings: Any) -> Model:
        models.append(Model(tmp_path, handle, **settings))
        return models[-1]

    yield begin
    for model in models:
        model.gate.set()
        model.service.close()
        model.thread.join(WITHIN_S)
        assert not model.thread.is_alive()


def failure(pending: PendingResponse) -> tuple[int, str]:
    response = pending.result(WITHIN_S)
    return response.status, json.loads(response.body)["type"]


def bodies(*pending: PendingResponse) -> list[bytes]:
    return [one.result(WITHIN_S).body for one in pending]


def test_it_is_a_service_that_runs_on_a_thread_that_it_is_given(start: Start) -> None:
    service = start(batch=2, delay_s=0.005, queue=3, timeout_s=4).service

    assert isinstance(service, RunsOnMainThread)
    assert service.describe() == {
        "name": "m",
        "version": "1.0",
        "handler": "handler.py",
        "batchSize": 2,
        "maxBatchDelay": 5,
        "jobQueueSize": 3,
        "responseTimeout": 4,
    }


def test_requests_that_wait_are_one_batch_up_to_its_size(start: Start) -> None:
    model = start(batch=3, delay_s=0.001)
    blocking = model.block()
    waiting = [model.send(body) for body in (b"a", b"b", b"c", b"d")]
    model.gate.set()

    assert bodies(blocking, *waiting) == [b"WAIT", b"A", b"B", b"C", b"D"]
    assert model.batches == [[b"wait"], [b"a", b"b", b"c"], [b"d"]]


def test_requests_that_enter_together_are_one_batch(start: Start) -> None:
    """Though the batch does not wait for others."""
    model = start(batch=8, delay_s=0.0)
    with model.service.together():
        sent = [model.send(body) for body in (b"a", b"b", b"c")]

    assert bodies(*sent) == [b"A", b"B", b"C"]
    assert model.batches == [[b"a", b"b", b"c"]]


def test_one_bad_answer_of_a_batch_fails_alone(start: Start) -> None:
    model = start(lambda data, context: [object(), *["well"] * (len(data) - 1)], batch=4, delay_s=0.0)
    with model.service.together():
        bad, *good = [model.send(b"a") for _ in range(3)]

    assert bodies(*good) == [b"well"] * 2
    assert failure(bad) == (503, "InternalServerException")


def test_a_handler_that_raises_fails_its_batch_and_no_other(start: Start) -> None:
    def handle(data: Any, context: Any) -> list[str]:
        if b"poison" in [bytes(row["body"]) for row in data]:
            raise KeyError("secret")
        return ["well"] * len(data)

    model = start(handle, batch=4, delay_s=0.0)
    with model.service.together():
        together = [model.send(body) for body in (b"a", b"poison", b"b")]

    assert [failure(one) for one in together] == [(503, "InternalServerException")] * 3
    assert bodies(model.send(b"a")) == [b"well"]


def test_two_requests_of_a_batch_may_have_one_id(start: Start) -> None:
    """Clients choose ids. The handler sees different ones."""
    seen: list[list[str]] = []

    def handle(data: Any, context: Any) -> list[str]:
        seen.append([context.get_request_id(i) for i in range(len(data))])
        return [bytes(row["body"]).decode() for row in data]

    model = start(handle, batch=4, delay_s=0.0)
    with model.service.together():
        sent = [model.send(body, name) for body, name in ((b"a", "x-2"), (b"b", "x"), (b"c", "x"))]

    assert bodies(*sent) == [b"a", b"b", b"c"]
    assert len(set(seen[0])) == 3


def test_a_request_beyond_the_queue_is_refused_at_once(start: Start) -> None:
    """As TorchServe refuses it, so that its sender may send it again."""
    model = start(queue=2)
    blocking = model.block()
    waiting = [model.send(b"a"), model.send(b"b")]
    refused = model.send(b"c").result(0)

    assert (refused.status, json.loads(refused.body)["type"]) == (503, "ServiceUnavailableException")
    assert refused.headers == {"Retry-After": "1"}
    model.gate.set()
    assert bodies(blocking, *waiting) == [b"WAIT", b"A", b"B"]
    assert bodies(model.send(b"d")) == [b"D"]


def test_a_request_that_is_cancelled_before_it_begins_never_begins(start: Start) -> None:
    model = start(queue=1)
    blocking = model.block()
    left = model.send(b"a")
    left.cancel()

    assert failure(left) == (499, "Cancelled")
    kept = model.send(b"b")  # there is room again
    model.gate.set()
    assert bodies(blocking, kept) == [b"WAIT", b"B"]
    assert model.batches == [[b"wait"], [b"b"]]


def test_a_request_that_is_cancelled_while_it_runs_is_answered_at_once(start: Start) -> None:
    model = start()
    blocking = model.block()
    blocking.cancel()

    assert failure(blocking) == (499, "Cancelled")
    model.gate.set()
    assert bodies(model.send(b"a")) == [b"A"]


def test_a_batch_that_is_being_filled_leaves_out_who_has_gone(start: Start) -> None:
    model = start(batch=2, delay_s=WITHIN_S)
    gone = model.send(b"a")
    until(lambda: model.service._taken)
    gone.cancel()
    stayed = [model.send(b"b"), model.send(b"c")]

    assert bodies(*stayed) == [b"B", b"C"]
    assert model.batches == [[b"b", b"c"]]


def test_requests_are_cancelled_by_their_key(start: Start) -> None:
    model = start()
    blocking = model.block()
    mine, other = model.send(b"a", x_cancel_key="mine"), model.send(b"b", x_cancel_key="other")

    assert (model.service.cancel("mine"), model.service.cancel("nobody's")) == (True, False)
    assert failure(mine) == (499, "Cancelled")
    model.gate.set()
    assert bodies(blocking, other) == [b"WAIT", b"B"]


def test_a_client_that_waits_for_less_than_the_model_may_take_is_answered_408(start: Start) -> None:
    model = start()
    blocking = model.block()
    hasty = model.send(b"a", x_timeout_ms="1")

    assert failure(hasty) == (408, "Timeout")
    model.gate.set()
    assert bodies(blocking) == [b"WAIT"]
    assert failure(model.send(b"a", x_timeout_ms="soon")) == (400, "InputError")
    assert [b"a"] not in model.batches


def test_what_nobody_waits_for_any_more_does_not_begin(start: Start) -> None:
    """A time limit counts from the arrival at the front door."""
    model = start()
    late = model.send(b"a", x_timeout_ms="1000", x_arrived_ms=str(1000 * (time.time() - 10)))

    assert failure(late) == (408, "Timeout")
    assert bodies(model.send(b"b")) == [b"B"]
    assert model.batches == [[b"b"]]


def test_a_batch_that_takes_too_long_is_answered_504_and_hangs(start: Start) -> None:
    """The thread cannot be ended, so whoever hosts the service replaces its process. Nobody waits for that."""
    model = start(timeout_s=0.5, queue=100)
    late = model.send(b"wait")
    while not model.batches:  # on a slow machine it may not have begun in time
        if not late._future.done():
            time.sleep(0.01)
            continue
        late = model.send(b"wait")
    waiting = model.send(b"a")

    assert failure(late) == (504, "Timeout")
    until(model.service.hangs)
    assert failure(waiting) == (503, "ServiceUnavailableException")
    assert failure(model.send(b"b")) == (503, "ServiceUnavailableException")
    model.gate.set()
    until(lambda: not model.service.hangs())


def test_a_handler_that_ends_its_process_fails_its_batch_and_all_that_wait(start: Start) -> None:
    """`run` raises what the handler raised; TorchServe answers the batch in the same words."""
    begun, gate = threading.Event(), threading.Event()

    def handle(data: Any, context: Any) -> list[str]:
        begun.set()
        assert gate.wait(WITHIN_S)
        raise SystemExit(3)

    model = start(handle)
    running = model.send(b"a")
    assert begun.wait(WITHIN_S)
    waiting = model.send(b"b")
    gate.set()

    assert json.loads(running.result(WITHIN_S).body)["message"] == "Worker died."
    assert failure(waiting) == (503, "ServiceUnavailableException")
    model.thread.join(WITHIN_S)
    assert [type(error) for error in model.raised] == [SystemExit]


def test_closing_fails_who_is_inside(start: Start) -> None:
    model = start()
    blocking = model.block()
    waiting = model.send(b"a")
    model.service.close()

    assert [failure(one)[0] for one in (blocking, waiting, model.send(b"b"))] == [503] * 3
    model.gate.set()
    model.thread.join(WITHIN_S)
    assert (model.batches, model.raised) == ([[b"wait"]], [])


def test_bodies_are_not_decoded_where_the_server_says_so(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    model = start(lambda data, context: [type(row["body"]).__name__ for row in data])
    request = ServiceRequest("id", b"{}", "application/json")

    assert bodies(model.service.submit(request)) == [b"bytearray"]


def test_chunks_are_joined_for_a_client_that_wants_one_answer(start: Start) -> None:
    from ts.protocol.otf_message_handler import create_predict_response

    def handle(data: Any, context: Any) -> list[str]:
        context.set_response_content_type(0, "text/plain")
        message = create_predict_response(["first "], context.request_ids, "", 200, context, ts_stream_next=True)
        context.cl_socket.sendall(message)
        return ["last"]

    whole, chunks = start(handle), list[tuple[bytes, str]]()
    streaming = start(handle, streams=True).service
    rest = streaming.submit(ServiceRequest("id"), lambda body, kind, _: chunks.append((body, kind)))

    assert whole.send(b"").result(WITHIN_S) == ServiceResponse(b"first last", "text/plain")
    assert rest.result(WITHIN_S) == ServiceResponse(b"last", "text/plain")
    assert chunks == [(b"first ", "text/plain")]


def test_a_chunk_gives_a_batch_its_time_anew(start: Start) -> None:
    """As under TorchServe, so that a long stream does not end the process."""
    from ts.protocol.otf_message_handler import create_predict_response

    told: list[bool] = []

    def handle(data: Any, context: Any) -> list[str]:
        model.service._running.deadline = 0.0
        told.append(model.service.hangs())
        message = create_predict_response(["a"], context.request_ids, "", 200, context, ts_stream_next=True)
        context.cl_socket.sendall(message)
        told.append(model.service.hangs())
        return ["b"]

    model = start(handle)

    assert bodies(model.send(b"")) == [b"ab"]
    assert told == [True, False]


def test_its_metrics_are_those_of_a_workflow_with_one_node(start: Start) -> None:
    model = start(
        lambda data, context: [object() if bytes(r["body"]) == b"bad" else "a" for r in data], batch=4, delay_s=0.0
    )
    with model.service.together():
        sent = [model.send(b"good"), model.send(b"bad")]
    for one in sent:
        one.result(WITHIN_S)

    def numbers() -> Mapping[str, float]:
        series = model.service.metrics().items()
        return {name.removeprefix(PREFIX): number for (_, name, labels), number in series if not labels}

    until(lambda: numbers()["items_total"] == 2)
    assert {node for node, _, _ in model.service.metrics()} == {"m"}
    assert numbers()["failures_total"] == 1
    assert (numbers()["batch_size_count"], numbers()["batch_size_sum"]) == (1, 2)
