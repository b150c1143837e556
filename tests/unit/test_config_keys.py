"""`config.properties`: each key is passed on, set by `up`, or refused at once with file, line and key."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import ts
from typer.testing import CliRunner

from torchserve_dag.commands import app
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.server import config_keys, launch, properties

ROOT = Path(__file__).parents[2]


def refused(tmp_path: Path, text: str) -> list[tuple[int, str]]:
    file = tmp_path / "config.properties"
    file.write_text(text)
    return [(problem.line, problem.what) for problem in config_keys.problems(file)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("disable_token_authorization=true", "every user of this machine"),
        ("enable_envvars_config=true", "write false"),
        ("inference_address=https://127.0.0.1:8443", "write http://"),
        ("inference_address=http://[::1]:8080", "IPv6"),
        ("inference_address=127.0.0.1:8080", "write it like"),
        ("management_address=http://127.0.0.1:port", "write it like"),
        ("grpc_inference_address=::1", "IPv6"),
        ("grpc_inference_port=7o70", "not a whole number"),
        ("default_response_timeout=soon", "not a whole number"),
        ("decode_input_request=yes", "neither true nor false"),
        ("cors_allowed_origin=*", "no effect at the front door"),
        ("keystore=keys.p12", "front door"),
        ("model_snapshot={}", "delete it"),
        ("job_queue=7", "did you mean job_queue_size?"),
        ("no such key at all", "delete it"),
    ],
)
def test_what_could_not_serve_is_refused_with_its_line(tmp_path: Path, line: str, why: str) -> None:
    [(number, what)] = refused(tmp_path, f"# a comment\n\n{line}\n")

    assert number == 3
    assert what.startswith(line.partition("=")[0] + ": ")
    assert why in what


def test_two_addresses_on_one_port_are_refused(tmp_path: Path) -> None:
    text = (
        "inference_address=http://127.0.0.1:8080\nmanagement_address=http://localhost:8080\ngrpc_inference_port=8080\n"
    )

    assert [line for line, _ in refused(tmp_path, text)] == [2, 3]


def test_what_serves_is_passed_on(tmp_path: Path) -> None:
    lines = (
        "job_queue_size=7",
        "load_models=a.mar,b.mar",
        "inference_address=http://localhost:8080",
        "vmargs=-Xmx1g -Da=b",
    )

    assert not refused(tmp_path, "\n".join(lines))
    assert not config_keys.problems(ROOT / "config.properties")


def test_every_key_is_one_that_torchserve_reads() -> None:
    jar = Path(ts.__file__).parent / "frontend" / "model-server.jar"
    with zipfile.ZipFile(jar) as archive:
        constants = archive.read("org/pytorch/serve/util/ConfigManager.class")

    elsewhere = {"plugins_path", "vmargs"}  # read by its plugins' loader, and by its start script
    assert {key for key in config_keys.KEYS if key.encode() not in constants} == elsewhere


def test_a_value_of_several_lines_is_one_value(tmp_path: Path) -> None:
    file, target = tmp_path / "config.properties", tmp_path / "state" / "config.properties"
    file.write_text('load_models=a.mar,\\\n  b.mar\nmodels={\\\n  "a": {"1.0": {"minWorkers": 2}}\\\n}\n')
    target.parent.mkdir()

    properties.write(file, target, {"load_models": "c.mar"})

    assert properties.read(file)["load_models"] == "a.mar,b.mar"
    assert properties.read(target) == {"load_models": "c.mar", "models": '{"a": {"1.0": {"minWorkers": 2}}}'}


def test_check_and_up_refuse_the_same(tmp_path: Path) -> None:
    (tmp_path / "handlers").mkdir()
    (tmp_path / "config.properties").write_text("cors_allowed_origin=*\n")

    checked = CliRunner().invoke(app, ["check", "--project", str(tmp_path)])
    with pytest.raises(CheckError) as error:
        launch.plan(tmp_path, launch.StartOptions(free_ports=True))

    assert "config.properties:1: cors_allowed_origin" in checked.output.replace("\n", "")
    assert "config.properties:1: cors_allowed_origin" in str(error.value)
