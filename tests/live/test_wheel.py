"""The built wheel in empty environments: what a client installs, and a project of one's own from nothing to an answer."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)

MOST_MB = 110
"""Of a client's packages; 82 were measured on 27 November 2026, for Python 3.11, with bytecode."""
CLIENT = {
    "annotated-doc", "annotated-types", "anyio", "certifi", "googleapis-common-protos", "grpcio", "h11", "httpcore",
    "httpx", "idna", "markdown-it-py", "mdurl", "packaging", "pillow", "protobuf", "psutil", "pydantic", "pydantic-core", "pygments",
    "pyyaml", "rich", "shellingham", "torchserve-dag", "typer", "typing-extensions", "typing-inspection",
}  # fmt: skip
"""Every package that a client installs; older Pythons need one or two more."""
OLDER = {"exceptiongroup"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True)
    (found,) = folder.glob("*.whl")
    return found


class Environment:
    """An empty virtual environment, with a home folder of its own."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=True, symlinks=True)
        self.bin = folder / "venv" / "bin"
        self.packages = next((folder / "venv").glob("lib/python*/site-packages"))
        (folder / "home").mkdir()
        drop = {"PYTHONPATH", "PYTHONHOME", "JAVA_HOME", "VIRTUAL_ENV", "TS_CONFIG_FILE"}
        self.variables = {key: value for key, value in os.environ.items() if key not in drop}
        self.variables |= {"HOME": str(folder / "home"), "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}

    def run(self, folder: Path, *words: str, code: int = 0) -> str:
        command = [str(self.bin / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=folder, env=self.variables, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`pip install torchserve-dag`, and nothing else."""
    made = Environment(tmp_path_factory.mktemp("client"))
    pip = ["-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel)]
    made.run(ROOT, "python", *pip)
    return made


@pytest.fixture(scope="module")
def server(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel, and the packages of the tests' environment in place of a second installation of torch."""
    made = Environment(tmp_path_factory.mktemp("server"))
    made.run(ROOT, "python", "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
    others = [path for path in sys.path if path.endswith("site-packages")]  # after the wheel's own, on its path
    (made.packages / "tests.pth").write_text("\n".join(others))
    return made


def test_a_client_installs_little(client: Environment, tmp_path: Path) -> None:
    listed = json.loads(client.run(tmp_path, "python", "-m", "pip", "list", "--format", "json"))
    tools = {"pip", "setuptools"}
    found = {one["name"].lower().replace("_", "-") for one in listed} - tools
    size = sum(
        path.stat().st_size
        for path in client.packages.rglob("*")
        if path.is_file() and not path.relative_to(client.packages).parts[0].startswith((*tools, "pkg_resources"))
    )

    assert found - OLDER == CLIENT
    assert size / 1e6 < MOST_MB
    assert (client.packages / "torchserve_dag" / "py.typed").is_file()


def test_a_client_imports_the_clients_and_the_messages(client: Environment, tmp_path: Path) -> None:
    program = """
import sys
import torchserve_dag
assert len([name for name in sys.modules if name.startswith("torchserve_dag")]) == 1
assert torchserve_dag.AsyncGrpcClient and torchserve_dag.RestClient and torchserve_dag.Photo
"""
    client.run(tmp_path, "python", "-c", program)


def test_the_command_line_of_a_client(client: Environment, tmp_path: Path) -> None:
    """It helps, says its version, and names what to install for the rest."""
    (tmp_path / "handlers").mkdir()

    assert "rollout" in client.run(tmp_path, "torchserve-dag", "--help")
    assert client.run(tmp_path, "torchserve-dag", "--version").startswith("torchserve-dag 0.")
    assert "--grpc" in client.run(tmp_path, "torchserve-dag", "call", "--help")
    for words in (["up"], ["build"], ["check"], ["new", "mine"]):
        said = client.run(tmp_path, "torchserve-dag", *words, code=1)
        assert "pip install 'torchserve-dag[serve]'" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_the_guide_of_the_readme_leads_from_an_empty_folder_to_an_answer(server: Environment, tmp_path: Path) -> None:
    """Each command prints what stands below it. Only `pip install` was run already, and the ports are free ones."""
    (guide,) = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    folder = tmp_path
    try:
        for step in guide.removeprefix("$ ").split("\n$ "):
            command, *shown = step.splitlines()
            words = shlex.split(command)
            if words[0] == "cd":
                folder /= words[1]
            elif words[0] != "pip":
                printed = server.run(folder, *words, *(["--free-ports"] if "up" in words else []))
                assert [line for line in shown if line not in printed] == []
    finally:
        server.run(folder, "torchserve-dag", "down")

    assert (folder.name, words) == ("demo", ["torchserve-dag", "down"])


def test_a_workflow_of_ones_own_is_served_from_the_wheel_alone(server: Environment, tmp_path: Path) -> None:
    """With a change, and without a config.properties, which no project needs."""
    folder = tmp_path / "mine"
    server.run(tmp_path, "torchserve-dag", "new", "mine")
    functions = folder / "workflows" / "languages.py"
    functions.write_text(functions.read_text().replace('f"{count} {language}"', 'f"{count} in {language}"'))
    (folder / "config.properties").unlink()
    where = "import torchserve_dag; print(torchserve_dag.__file__)"
    assert str(server.packages) in server.run(folder, "python", "-c", where)
    server.run(folder, "torchserve-dag", "build", "languages")
    server.run(folder, "torchserve-dag", "up", "--free-ports")
    try:
        answer = json.loads(server.run(folder, "torchserve-dag", "call", "languages", "texts/mixed.txt", "--json"))
    finally:
        server.run(folder, "torchserve-dag", "down")

    assert answer["summary"] == "1 in English, 1 in German, 1 in French"
    assert [one["language"] for one in answer["sentences"]] == ["English", "German", "French"]


def test_a_ready_handler_comes_out_of_the_wheel(server: Environment, tmp_path: Path) -> None:
    (tmp_path / "handlers").mkdir()
    server.run(tmp_path, "torchserve-dag", "add", "handler", "transformers_classifier")

    for suffix in (".py", ".yaml"):
        copied = tmp_path / "handlers" / f"transformers_classifier{suffix}"
        assert copied.read_text() == (ROOT / "handlers" / copied.name).read_text()
