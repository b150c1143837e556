"""Handlers as TorchServe's users write them, unedited: on its base class, with state between stages, each in its process."""

from __future__ import annotations

import io
import json
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from torchserve_dag.runtime.compat.rows import Row
from torchserve_dag.runtime.messages import Failure, Label, Photo
from torchserve_dag.runtime.workflow import Workflow

NET = """
    import torch
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
        def forward(self, x):
            return self.layer(x)
"""
COLOUR = """
    import base64, io
    import torch
    from PIL import Image
    from ts.torch_handler.base_handler import BaseHandler

    class Colour(BaseHandler):
        def preprocess(self, data):
            images = []
            for row in data:
                image = row.get("data") or row.get("body")
                if isinstance(image, str):
                    image = base64.b64decode(image)
                elif self.context.get_request_header(0, "Encoding") == "base64":
                    image = base64.b64decode(bytes(image))
                image = Image.open(io.BytesIO(image)).convert("RGB").resize((1, 1))
                images.append(torch.tensor(image.getpixel((0, 0))) / 255)
            return torch.stack(images).to(self.device)

        def postprocess(self, data):
            from names import NAMES
            self.context.metrics.add_counter("Images", len(data))
            return [NAMES[int(row.argmax())] for row in data]
"""
SHADE = """
    import base64, io
    import torch
    from PIL import Image
    from model import Net
    from ts.torch_handler.base_handler import BaseHandler

    class Shade(BaseHandler):
        def initialize(self, context):
            super().initialize(context)
            assert type(self.model) is Net

        def preprocess(self, data):
            self.wanted = [row["colour"].decode() == "blue" for row in data]
            images = [
                Image.open(io.BytesIO(base64.b64decode(row["encode"].decode())))
                for row, wanted in zip(data, self.wanted) if wanted
            ]
            return torch.tensor([[*image.getpixel((0, 0))] for image in images]) / 255 if images else None

        def inference(self, data, *args, **kwargs):
            return None if data is None else super().inference(data)

        def postprocess(self, data):
            shades = iter([] if data is None else data.argmax(dim=1).tolist())
            return [{"blue": ["dark", "light"][next(shades)]} if wanted else "not blue" for wanted in self.wanted]
"""
FUNCTIONS = """
    import base64

    def encode(data, context):
        if data is None:
            return data
        return [base64.b64encode(row.get("data") or row.get("body")).decode() for row in data]
"""
SPEC = """
    models:
      batch-size: 4
      colour: {url: colour.mar}
      shade: {url: shade.mar}
    dag:
      encode: [colour, shade]
      colour: [shade]
"""
OWN = """
    name: flow
    version: "1.0"
    does: Names the colour of each photo.
    code: flow.py
    nodes:
      colour: {torchserve: {archive: colour.mar, takes: Photo, gives: Text}, batch: 4}
      label: {function: label, inputs: {colour: colour}}
    output: label
"""
OWN_FUNCTIONS = """
    from torchserve_dag import Label, Text

    def label(colour: Text) -> Label:
        return Label(colour.text, 1.0)
"""


ENCODED = {"Encoding": "base64"}
"""A header of the client's, which every node sees."""


def weights(*rows: list[float]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"layer.weight": torch.tensor(rows), "layer.bias": torch.zeros(2)}, buffer)
    return buffer.getvalue()


def photo(*colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two archives whose files have the same names."""
    tmp_path = tmp_path_factory.mktemp("project")
    (tmp_path / "workflows").mkdir()
    (tmp_path / "model_store").mkdir()
    nets = {"colour": (COLOUR, weights([1, 0, 0], [0, 0, 1])), "shade": (SHADE, weights([0, 0, 0.5], [2, 0, 0]))}
    for name, (code, parameters) in nets.items():
        model = {"modelName": name, "handler": "handler.py", "modelFile": "model.py", "serializedFile": "model.pt"}
        with zipfile.ZipFile(tmp_path / "model_store" / f"{name}.mar", "w") as archive:
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
            archive.writestr("handler.py", textwrap.dedent(code))
            archive.writestr("model.py", textwrap.dedent(NET))
            archive.writestr("model.pt", parameters)
            archive.writestr("names.py", "NAMES = ['red', 'blue']")
    return tmp_path


def write(root: Path, spec: str, functions: str, *, code: str = "flow.py") -> Path:
    (root / "workflows" / "flow.yaml").write_text(textwrap.dedent(spec))
    (root / "workflows" / code).write_text(textwrap.dedent(functions))
    return root / "workflows" / "flow.yaml"


@pytest.fixture(scope="module")
def torchserves(root: Path) -> Iterator[Workflow]:
    with Workflow.load(write(root, SPEC, FUNCTIONS, code="any_name.py")) as workflow:
        yield workflow


def test_a_workflow_of_torchserves_answers_each_request_with_its_own(torchserves: Workflow) -> None:
    """The second model keeps, between its stages, which rows of the batch it is asked about."""
    sent: list[tuple[bytes, Any]] = [
        (photo(200, 10, 10), b"not blue"),
        (photo(0, 0, 50), {"blue": "dark"}),
        (photo(90, 90, 200), {"blue": "light"}),
    ] * 8
    answers = torchserves([Row({"body": body}, ENCODED) for body, _ in sent])

    assert [one if one == b"not blue" else json.loads(one) for one in answers] == [expected for _, expected in sent]


def test_a_broken_row_of_a_torchserve_batch_fails_alone(torchserves: Workflow) -> None:
    good, bad, also_good = torchserves(
        [Row({"body": body}, ENCODED) for body in (photo(200, 0, 0), b"no photo", photo(200, 0, 0))]
    )

    assert good == also_good == b"not blue"
    assert isinstance(bad, Failure)
    assert (bad.status, bad.node) == (500, "colour")


def test_a_torchserve_archive_is_a_node_of_our_own_workflow(root: Path) -> None:
    with Workflow.load(write(root, OWN, OWN_FUNCTIONS)) as workflow:
        answers = workflow([photo(200, 0, 0), Photo(Image.new("RGB", (2, 2), (0, 0, 200))), photo(0, 0, 9)])

    assert answers == [Label("red", 1.0), Label("blue", 1.0), Label("blue", 1.0)]
