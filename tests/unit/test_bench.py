"""The benchmark, against real small servers: what it sends, counts, starts, stops and reports."""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

import grpc.aio
import psutil
import pytest
from typer.testing import CliRunner

from torchserve_dag.bench import batches, bodies, programs, rows, systems
from torchserve_dag.bench.answers import Answers, alike
from torchserve_dag.bench.benchmark_file import Workload, read
from torchserve_dag.bench.environments import python_for
from torchserve_dag.bench.errors import BenchError
from torchserve_dag.bench.http_answer import AnswerReader
from torchserve_dag.bench.load import Grpc, Rest, Spec, run
from torchserve_dag.bench.measure import rotated
from torchserve_dag.bench.window import Counts, Percentiles, percentiles
from torchserve_dag.commands import app
from torchserve_dag.runtime.protos.inference_pb2 import PredictionResponse
from torchserve_dag.runtime.protos.inference_pb2_grpc import (
    InferenceAPIsServiceServicer,
    add_InferenceAPIsServiceServicer_to_server,
)

ROOT = Path(__file__).parents[2]
OBJECTS = b'{"objects": [1, 2]}'

Reply = Callable[[bytes], Awaitable[bytes]]
"""What a server of a test writes back for a body."""


def plain_answer(content: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n{more}\r\n".encode() + content


def chunked(content: bytes) -> bytes:
    pieces = [content[:3], content[3:]]
    written = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces if piece)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + written + b"0\r\n\r\n"


def load(
    reply: Reply, sent: list[bytes] | None = None, contents: tuple[bytes, ...] = (b"a body",), **options
) -> Counts:
    """What a load generator counts at a server that replies so. `sent` gets the heads of the requests."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if sent is not None:
                    sent.append(head)
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                answer = await reply(await reader.readexactly(length))
                writer.write(answer)
                if not answer or b"close" in answer:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def both() -> Counts:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        where = Rest(f"http://127.0.0.1:{port}/predictions/x", {"authorization": "Bearer abc"})
        chosen = {"clients": 2} if "rate" not in options else {}
        settings = {"seconds": 0.3, "warm_up": 0.05, **chosen, **options}
        counts = await run(Spec(where, [str(i) for i in range(len(contents))], **settings), list(contents))
        server.close()
        return counts

    return asyncio.run(both())


async def answered(body: bytes) -> bytes:
    return plain_answer(OBJECTS)


class TestReadingHttp:
    @pytest.mark.parametrize("make", [plain_answer, chunked])
    def test_an_answer_may_be_cut_anywhere(self, make):
        data = make(OBJECTS)
        for cut in range(len(data)):
            reader = AnswerReader()
            first, second = reader.feed(data[:cut]), reader.feed(data[cut:])

            assert first is None
            assert second is not None
            assert (second.status, second.content, second.keep_alive) == (200, OBJECTS, True)

    def test_the_next_answer_of_a_connection_is_read_after_the_first(self):
        reader = AnswerReader()

        assert [reader.feed(make(b"12345")).content for make in (plain_answer, chunked, plain_answer)] == [b"12345"] * 3

    def test_an_answer_without_a_length_ends_with_its_connection(self):
        reader = AnswerReader()

        assert reader.feed(b"HTTP/1.1 200 OK\r\n\r\nsome") is None
        assert reader.feed(b"thing") is None
        assert reader.closed() == (200, b"something", False)

    def test_one_that_was_begun_is_no_answer(self):
        reader = AnswerReader()
        reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsome")

        assert reader.closed() is None
        assert reader.begun

    def test_100_continue_is_passed_over(self):
        answer = AnswerReader().feed(b"HTTP/1.1 100 Continue\r\n\r\n" + plain_answer(b"x", "503 Busy"))

        assert answer == (503, b"x", True)

    def test_a_server_may_say_that_it_closes(self):
        assert not AnswerReader().feed(plain_answer(b"", more="Connection: close\r\n")).keep_alive

    def test_what_is_not_http_is_refused(self):
        with pytest.raises(ValueError, match="not HTTP"):
            AnswerReader().feed(b"SSH-2.0\r\n\r\n")


class TestLoadOverRest:
    def test_a_closed_loop_counts_answers_objects_and_latencies(self):
        async def slow(body: bytes) -> bytes:
            await asyncio.sleep(0.02)
            return plain_answer(OBJECTS)

        counts = load(slow, clients=4, seconds=0.5)

        assert 10 <= counts.requests <= 101
        assert counts.objects == 2 * counts.requests
        assert counts.latency_ms.p50 >= 20
        assert (counts.errors, counts.different, counts.objects_by_body) == ({}, 0, [2])
        assert counts.client_cpu_us > 0

    def test_requests_carry_the_servers_headers_and_the_bodies_in_turn(self):
        heads: list[bytes] = []
        seen: list[bytes] = []

        async def note(body: bytes) -> bytes:
            seen.append(body)
            return chunked(b"fine")

        load(note, heads, (b"one", b"two", b"three"), clients=1)

        assert heads[0].startswith(b"POST /predictions/x HTTP/1.1\r\nhost: 127.0.0.1:")
        assert b"\r\nauthorization: Bearer abc\r\n" in heads[0]
        assert seen[:4] == [b"one", b"two", b"three", b"one"]

    def test_refusals_and_failures_are_counted_apart(self):
        turn = 0

        async def reply(body: bytes) -> bytes:
            nonlocal turn
            turn += 1
            return plain_answer(b"", ("200 OK", "503 Busy", "500 Broken")[turn % 3])

        counts = load(reply, seconds=1.0)

        assert counts.errors.keys() == {"503", "500"}
        assert counts.refused == counts.errors["503"]
        assert counts.refused_ms.p50 > 0

    def test_a_client_whose_request_failed_waits_before_the_next(self):
        async def busy(body: bytes) -> bytes:
            return plain_answer(b"", "503 Busy")

        assert load(busy, clients=1, seconds=1.0).refused <= 10

    def test_another_answer_to_the_same_body_is_seen(self):
        turn = 0

        async def reply(body: bytes) -> bytes:
            nonlocal turn
            turn += 1
            return plain_answer(b'{"score": 0.5}' if turn % 2 else b'{"score": 0.7}')

        counts = load(reply, clients=1)

        assert abs(counts.different - counts.requests / 2) <= 1

    def test_a_request_over_its_limit_is_an_error(self):
        async def never(body: bytes) -> bytes:
            await asyncio.sleep(5)
            return b""

        counts = load(never, clients=1, limit=0.3, seconds=1.5)

        assert counts.errors.keys() == {"time limit"}

    def test_a_lost_connection_is_an_error_and_the_client_goes_on(self):
        turn = 0

        async def reply(body: bytes) -> bytes:
            nonlocal turn
            turn += 1
            return plain_answer(b"fine") if turn % 3 else b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nclose"

        counts = load(reply, clients=1, seconds=0.6)

        assert counts.errors.keys() == {"connection lost"}
        assert counts.requests

    def test_a_kept_connection_that_was_closed_meanwhile_costs_nothing(self):
        turn = 0

        async def reply(body: bytes) -> bytes:
            nonlocal turn
            turn += 1
            return plain_answer(b"fine") if turn % 2 else b""

        counts = load(reply, clients=1)

        assert counts.requests
        assert counts.errors == {}

    def test_a_server_that_is_not_there_is_an_error(self):
        async def nobody() -> Counts:
            return await run(Spec(Rest("http://127.0.0.1:9/x", {}), ["0"], 0.3, 0.0, clients=1), [b"x"])

        assert asyncio.run(nobody()).errors.keys() == {"cannot connect"}

    def test_an_open_loop_keeps_its_rate(self):
        for _ in range(5):  # where something else has the cores, the generator is late
            counts = load(answered, rate=200.0, seconds=2.0)
            if counts.late_ms.p50 < 5:
                break

        assert 300 <= counts.requests <= 500
        assert counts.late_ms.p50 < 5

    def test_an_open_loop_counts_the_wait_from_the_planned_arrival(self):
        """A server that stops for half a second delays all that would have come in it, not only one request."""
        held = False

        async def stops_once(body: bytes) -> bytes:
            nonlocal held
            if not held:
                held = True
                await asyncio.sleep(0.3)
                time.sleep(0.5)  # noqa: ASYNC251 (the generator shares the loop, and is held up too)
            return plain_answer(OBJECTS)

        counts = load(stops_once, rate=100.0, seconds=1.5)

        assert counts.latency_ms.p99 > 300
        assert counts.latency_ms.p95 > 200

    def test_an_open_loop_sends_no_more_than_can_be_out(self, monkeypatch):
        monkeypatch.setattr("torchserve_dag.bench.loops.MOST_OUTSTANDING", 3)

        async def slow(body: bytes) -> bytes:
            await asyncio.sleep(0.2)
            return plain_answer(OBJECTS)

        counts = load(slow, rate=100.0, seconds=0.5)

        assert counts.not_sent > 10

    def test_a_load_has_either_clients_or_a_rate(self):
        with pytest.raises(ValueError, match="clients or a rate"):
            Spec(Rest("http://127.0.0.1:9/x", {}), ["0"], 1.0, 0.0, clients=1, rate=2.0)


class Predictions(InferenceAPIsServiceServicer):
    """Answers in turn: right, a failure as TorchServe delivers it, and the two ways in which it refuses."""

    def __init__(self) -> None:
        self.turn = 0
        self.seen: tuple = ()

    async def Predictions(self, request, context):  # noqa: N802 (the protocol's name)
        self.seen = (request.model_name, dict(request.input), dict(context.invocation_metadata()).get("authorization"))
        self.turn += 1
        if self.turn % 4 == 0:
            await context.abort(grpc.StatusCode.INTERNAL, 'Model "detect" has no worker to serve inference request.')
        if self.turn % 3 == 0:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "queue is full")
        failure = b'{"code": 504, "type": "Timeout", "message": "late"}'
        return PredictionResponse(prediction=OBJECTS if self.turn % 3 == 1 else failure)


class TestLoadOverGrpc:
    def test_answers_failures_and_refusals_are_counted(self):
        service = Predictions()

        async def both() -> Counts:
            server = grpc.aio.server()
            add_InferenceAPIsServiceServicer_to_server(service, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            where = Grpc(f"127.0.0.1:{port}", "detect", "1.0", "abc")
            counts = await run(Spec(where, ["0"], 1.0, 0.1, clients=4), [b"a photo"])
            await server.stop(None)
            return counts

        counts = asyncio.run(both())

        assert service.seen == ("detect", {"data": b"a photo"}, "Bearer abc")
        assert counts.requests
        assert counts.errors.keys() == {"503", "504", "UNAVAILABLE"}
        assert counts.refused == counts.errors["UNAVAILABLE"] + counts.errors["503"]
        assert counts.error_texts["UNAVAILABLE"] == "queue is full"


class TestAnswers:
    def test_numbers_may_differ_by_a_thousandth(self):
        assert alike({"a": [0.50001, "x"]}, {"a": [0.5, "x"]})
        assert not alike({"a": 0.52}, {"a": 0.5})
        assert not alike([1, 2], [1])
        assert not alike({"a": 1000}, {"a": 1001})

    def test_objects_are_a_list_or_their_number(self):
        answers = Answers(3)

        assert answers.judge(0, b'{"objects": [1, 2, 3]}').objects == 3
        assert answers.judge(1, b'{"objects": 5}').objects == 5
        assert answers.objects() == [3, 5, None]

    def test_an_answer_may_be_only_the_end_of_what_comes(self):
        answers = Answers(1, at_end=True)

        assert answers.judge(0, b'{"outputs": []}\x7b\x00\x00\x00{"objects": [{"a": 1}]}').objects == 1
        assert answers.judge(0, b'{"outputs": [1]}\x13\x00\x00\x00{"objects": [{"a": 1}]}').same

    def test_percentiles_are_nearest_ranks_in_ms(self):
        assert percentiles([i / 1000 for i in range(1, 101)]) == Percentiles(50.0, 95.0, 99.0)
        assert percentiles([]) is None


class TestPlan:
    def test_the_projects_plan_is_in_order(self):
        plan = read(ROOT / "loadtests" / "bench.toml")

        assert {"photos, mixed", "stub", "chain of 3, 1 MB"} <= {work.name for work in plan.work}
        assert len({work.slug for work in plan.work}) == len(plan.work)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("work = []", "at least one"),
            ("rounds = ", "plan.toml: "),
            ('[[work]]\nname = "a"\nworkflow = "w.yaml"', "one of bodies, bytes and mix"),
            ('[[work]]\nname = "a"\nworkflow = "w.yaml"\nbytes = 1\nclient = [1]', 'unknown key "client"'),
            ('[[work]]\nname = "a"\nworkflow = "w.yaml"\nbytes = 1\nat = 1', "series and at are given together"),
        ],
    )
    def test_a_mistake_is_one_sentence_that_names_the_file(self, tmp_path, text, said):
        path = tmp_path / "plan.toml"
        path.write_text(text)

        with pytest.raises(BenchError, match=r"plan\.toml") as error:
            read(path)
        assert said in str(error.value)

    def test_bodies_are_generated_or_found(self, tmp_path):
        mixed = bodies.prepare(Workload("a mix", "w.yaml", mix=[0, 3]), tmp_path, tmp_path / "made")
        large = bodies.prepare(Workload("large", "w.yaml", bytes=1000), tmp_path, tmp_path / "made")

        assert [json.loads(path.read_bytes()) for path in mixed] == [{"objects": 0}, {"objects": 3}]
        assert [path.stat().st_size for path in large] == [1000]
        named = bodies.prepare(Workload("f", "w.yaml", bodies=["made/large/body.bin"] * 2), tmp_path, tmp_path)
        assert [path.read_bytes() for path in named] == [large[0].read_bytes()] * 2
        assert named == sorted(named), "in the order in which they are named"
        with pytest.raises(BenchError, match="does not exist"):
            bodies.prepare(Workload("none", "w.yaml", bodies=["none"]), tmp_path, tmp_path)


HEAD = """
# /// script
# dependencies = []
# [tool.bench]
# name = "{name}"
# arrangement = "{arrangement}"
# ///
"""

SERVER = """
import asyncio, json, subprocess, sys

async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
            await asyncio.sleep(DELAY)
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 19\\r\\n\\r\\n" + b'{"objects": [1, 2]}')
    except (asyncio.IncompleteReadError, ConnectionError):
        pass

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print("starting", file=sys.stderr)
    # One that leaves the process group, as a server's own children may.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print(json.dumps({"rest": "http://127.0.0.1:%d/x" % server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

BARE = """
import argparse, json
parser = argparse.ArgumentParser()
parser.add_argument("workflow")
for option in ("bodies", "seconds", "processes", "threads", "batch"):
    parser.add_argument("--" + option)
options = parser.parse_args()
requests = 100 * int(options.processes) * float(options.seconds)
print(json.dumps({"requests": int(requests), "seconds": float(options.seconds), "latencies_ms": [9.0, 10.0, 11.0],
    "memory_mb": 50.0, "startup_s": 0.1}))
"""


def program(folder: Path, key: str, code: str, name: str = "", arrangement: str = "one process") -> Path:
    path = folder / f"with_{key}.py"
    path.write_text(HEAD.format(name=name or key, arrangement=arrangement).lstrip() + code)
    return path


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A plan with two toy systems, one that does not start, and a bare loop."""
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "w.yaml").write_text("name: w\n")
    folder = tmp_path / "systems"
    folder.mkdir()
    program(folder, "quick", SERVER.replace("DELAY", "0.002"), "Quick")
    program(folder, "slow", SERVER.replace("DELAY", "0.02"), "Slow")
    program(folder, "broken", 'import sys\nsys.exit("no such model")')
    program(folder, "bare", BARE)
    (tmp_path / "bench.toml").write_text(
        textwrap.dedent("""
        ours = "quick"
        rounds = 2
        seconds = 0.4
        warm_up = 0.1
        settle = 0.1
        bare = [{processes = 1, threads = 1, batch = 1}, {processes = 2, threads = 1, batch = 8}]
        [[work]]
        name = "small"
        workflow = "workflows/w.yaml"
        mix = [0, 2]
        clients = [1, 4, 8]
        open = [50, 80, 120]
        series = "size"
        at = 1
        [[work]]
        name = "large"
        workflow = "workflows/w.yaml"
        bytes = 100_000
        clients = [2]
        series = "size"
        at = 2
        """)
    )
    return tmp_path


def command(bench: Path, *words: str):
    return CliRunner().invoke(app, ["bench", str(bench / "bench.toml"), "--project", str(bench), *words])


class TestPrograms:
    def test_a_head_says_what_is_installed_and_how_it_runs(self, tmp_path):
        path = program(tmp_path, "other", "", "Other 1.0", "2 workers")

        assert programs.read(path) == programs.Program("other", str(path), "Other 1.0", "2 workers", [])

    def test_a_program_without_a_head_is_named(self, tmp_path):
        (tmp_path / "with_x.py").write_text("import sys")

        with pytest.raises(BenchError, match=r"with_x\.py has no metadata block"):
            programs.find(tmp_path)

    def test_an_unknown_system_is_named_and_the_bare_loop_is_always_there(self, bench):
        found = programs.find(bench / "systems")

        assert [one.key for one in programs.chosen(found, ["slow"])] == ["bare", "slow"]
        with pytest.raises(BenchError, match='no system "slwo"; did you mean "slow"'):
            programs.chosen(found, ["slwo"])

    def test_without_pins_a_program_runs_with_the_projects_python(self, bench):
        (first, *_) = programs.find(bench / "systems")

        assert python_for(first, bench / "environments").exists()
        assert not (bench / "environments").exists()


class TestSystems:
    def test_it_is_measured_and_nothing_of_it_is_left(self, bench):
        log = bench / "log"
        with systems.started(
            Path(sys.executable), bench / "systems" / "with_quick.py", bench / "workflows" / "w.yaml", log
        ) as system:
            deadline = time.monotonic() + 60
            while len(processes := system.processes()) < 2:  # one that was started just now has no environment yet
                assert time.monotonic() < deadline

            assert system.memory_mb() > 1
            assert system.cpu_s() > 0
            assert system.startup_s > 0
        assert not any(psutil.pid_exists(one.pid) and one.status() != psutil.STATUS_ZOMBIE for one in processes)
        assert log.read_text() == "starting\n"

    def test_one_that_does_not_start_says_why(self, bench):
        starting = systems.started(Path(sys.executable), bench / "systems" / "with_broken.py", bench, bench / "log")
        with pytest.raises(BenchError, match="ended without serving: no such model"), starting:
            pass

    def test_the_order_changes_with_the_round(self):
        assert [rotated("abc", by) for by in range(4)] == [
            ["a", "b", "c"],
            ["b", "c", "a"],
            ["c", "a", "b"],
            list("abc"),
        ]

    def test_mean_batches_are_those_between_two_readings(self):
        assert batches.means({"a": (10, 5)}, {"a": (40, 10), "b": (3, 3), "c": (0, 0)}) == {"a": 6.0, "b": 1.0}
        assert batches.read(None) == {}


class TestCommand:
    def test_it_measures_all_and_reports(self, bench):
        out = bench / "out"
        result = command(bench, "--out", str(out), "--rounds", "1")

        assert result.exit_code == 0, result.output
        found = rows.read(out / "results.jsonl")
        loads = [row for row in found if isinstance(row, rows.LoadRow)]
        assert len(loads) == 2 * (6 + 1)
        assert all(row.counts.requests and not row.counts.errors for row in loads)
        report = (out / "report.md").read_text()
        assert "The bare loop: 200 requests a second; one request at a time takes 10.0 ms." in report
        assert "- **Quick**: one process" in report
        assert "| **Quick** |" in report
        assert "- broken: it ended without serving: no such model" in report

        drawn = {path.name for path in out.glob("*.svg")}
        pictures = {"small-rate.svg", "small-p99.svg", "by-small.svg"} if find_spec("matplotlib") else set()
        assert drawn == pictures
        assert all((out / name).with_suffix(".png").stat().st_size > 10_000 for name in drawn)
        assert all(f"]({name})" in report for name in drawn)

        again = CliRunner().invoke(app, ["bench", "--report-only", str(out), "--json"])
        summary = json.loads(again.output[again.output.index("{") :])
        quick = next(one for one in summary["works"][0]["systems"] if one["key"] == "quick")

        assert [one["clients"] for one in quick["closed"]] == [1, 4, 8]
        assert quick["closed"][2]["ratio"] == pytest.approx(quick["closed"][2]["rps"] / 200)

    def test_an_interrupted_run_goes_on_where_it_stopped(self, bench):
        out = bench / "out"
        words = ("--only", "large", "--systems", "quick", "--out", str(out))
        assert command(bench, *words, "--rounds", "2").exit_code == 0
        path = out / "results.jsonl"
        found = rows.read(path)
        kept = [row for row in found if row.round == 1]
        begun = next(row for row in found if row.round == 2 and isinstance(row, rows.LoadRow))
        rows.write(path, [*kept, begun])
        with path.open("a") as file:
            file.write('{"kind": "lo')

        result = command(bench, "--resume", "--out", str(out))

        assert result.exit_code == 0, result.output
        after = rows.read(path)
        assert after[: len(kept)] == kept
        assert sorted(map(type, after), key=str) == sorted(map(type, found), key=str)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--only", "photos"), "No workload has photos in its name; there are small, large."),
            (("--systems", "quik"), 'no system "quik"; did you mean "quick"?'),
            (("--resume",), "Name the run to continue"),
            (("--report-only", "nowhere"), "nowhere has no run.json"),
        ],
    )
    def test_a_mistake_is_one_sentence(self, bench, words, said):
        result = command(bench, *words)

        assert result.exit_code == 1
        assert said in " ".join(result.output.split())

    def test_results_are_not_written_over(self, bench):
        (bench / "out").mkdir()
        (bench / "out" / "results.jsonl").write_text("")

        assert "has results already" in " ".join(command(bench, "--out", str(bench / "out")).output.split())
