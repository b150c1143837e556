"""The workflow describe_photo: which photos it takes, which sentences it lets through, and who writes the answer."""

from __future__ import annotations

import base64
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.openai_server import OpenAiServer
from torchserve_dag import Chat, Failure, TextChunk, Workflow
from torchserve_dag.runtime.data import plain
from workflows.counted import CLASSES, counts_rightly, names_of, plural
from workflows.describe_photo import PLAIN, in_words, listed

ROOT = Path(__file__).parents[2]
MODEL = "remote capital-2"
COFFEE = "The photo shows a cup (espresso) in the middle."

Load = Callable[..., Workflow]


def chat(*photos: str | bytes, **fields: Any) -> Chat:
    """A chat with these photos of the project, or with these bytes as a photo."""
    bodies = [photo if isinstance(photo, bytes) else (ROOT / photo).read_bytes() for photo in photos]
    urls = [f"data:image/jpeg;base64,{base64.b64encode(body).decode()}" for body in bodies]
    content = [{"type": "text", "text": "What is in it?"}]
    content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]  # type: ignore[dict-item]
    return plain.build(Chat, {"messages": [{"role": "user", "content": content}], **fields})


class TestTheCheck:
    """`counts_rightly`: a sentence passes if each thing is there, with its number, and nothing else is counted."""

    @pytest.mark.parametrize(
        ("sentence", "counts"),
        [
            ("One cup can be seen in this photo.", {"cup": 1}),
            ("A cup.", {"cup": 1}),
            ("There are 12 white cups on two dining tables!", {"cup": 12, "diningtable": 2}),
            ("In the picture, a dog, a bicycle and a truck.", {"dog": 1, "bicycle": 1, "truck": 1}),
            ("Twenty-two small old boats lie at the shore.", {"boat": 22}),
            ("A photo of three people with one hot dog.", {"person": 3, "hot dog": 1}),
            (
                "Five mice, four knives, two buses and 3 motorcycles.",
                {"mouse": 5, "knife": 4, "bus": 2, "motorbike": 3},
            ),
        ],
    )
    def test_what_is_right_passes(self, sentence: str, counts: dict[str, int]) -> None:
        assert counts_rightly(sentence, counts)

    @pytest.mark.parametrize(
        "sentence",
        [
            "There are two cups and three dogs in this photo.",  # counts what is not there
            "There are three cups and one dog in this photo.",  # another number
            "There are two cups.",  # a thing is missing
            "There are two cups, two cups and one dog.",  # twice
            "There are two dogs and one cup.",  # the wrong way round
            "There are two cups and one dog with a helpful assistant.",
            "There are two cups and one dog near the birds.",  # not found, and not counted
            "There are two cup and one dog.",
            "There are several cups and one dog.",
            "There are two or three cups and one dog.",
            "There are more than two cups and one dog.",
            "There aren't two cups and one dog.",
            "There are two cups of tea and one dog in a row of four.",
            "There are two cups and a couple of dogs.",
            "There are cups and one dog.",
            "There are two cups and the dog.",
            "There are two cups and one hot dog.",
            "There are two cups and one dog, and 2nd is a boat.",
            "There are two cups and one dog and 1,000 fish.",
            "There are two cups and one dog and ½ of a fish.",
            "There are two cups and one dog and ٣ fish.",
            "There are two parrots, cups and one dog.",
            "There are two cups and one dog",
            "There are two cups and one dog. There are more.",
            "There are two cups\nand one dog.",
            "There are two cups and a person feeds one dog.",
            "There are twenty-two cups and one dog.",
            "There are -2 cups and one dog.",
            "There are two cups and one dog, one of them white.",
            "I'm a helpful AI assistant.",
            "There are two cups and one dog" + ", and so on" * 30 + ".",
            ".",
            "",
        ],
    )
    def test_what_is_wrong_does_not(self, sentence: str) -> None:
        assert not counts_rightly(sentence, {"cup": 2, "dog": 1})

    def test_it_knows_what_the_detector_knows(self) -> None:
        assert list(CLASSES) == (ROOT / "weights" / "coco.names").read_text("utf-8").split("\n")[: len(CLASSES)]


numbers = st.integers(1, 99)
found = st.dictionaries(st.sampled_from(CLASSES), numbers, min_size=1, max_size=4)
opening = st.sampled_from(["There are ", "This photo shows ", "In the picture one sees ", "A photo with ", ""])
closing = st.sampled_from(["", " in this photo", " on the grass", ", all of it in the sun", " near water"])
adjective = st.sampled_from(["", "", "small ", "old white "])


@st.composite
def sentences(draw: st.DrawFn, counts: dict[str, int]) -> str:
    """A sentence with these counts, in words or digits, in any order."""
    parts = []
    for label in draw(st.permutations(list(counts))):
        number, name = counts[label], draw(st.sampled_from(names_of(label)))
        said = draw(st.sampled_from([str(number), in_words(number)]))
        parts.append(f"{said} {draw(adjective)}{name if number == 1 else plural(name)}")
    between = draw(st.sampled_from([", ", " and ", " next to "]))
    # "one sees" would count; it is what makes an opening unreadable
    return f"{draw(opening.filter(lambda text: 'one' not in text))}{between.join(parts)}{draw(closing)}."


@given(st.data())
def test_every_right_sentence_passes(data: st.DataObject) -> None:
    counts = data.draw(found)
    assert counts_rightly(data.draw(sentences(counts)), counts)


@given(st.data())
def test_no_wrong_count_passes(data: st.DataObject) -> None:
    """A sentence that is right for other counts, which differ by a number, by a thing more, or by one less."""
    counts, said = data.draw(st.tuples(found, found).filter(lambda both: both[0] != both[1]))
    assert not counts_rightly(data.draw(sentences(said)), counts)
    label, other = data.draw(st.sampled_from(sorted(counts))), data.draw(numbers)
    changed = counts | {label: other}
    assert counts_rightly(data.draw(sentences(changed)), counts) == (other == counts[label])


@given(st.data())
def test_nothing_more_may_be_counted(data: st.DataObject) -> None:
    """Whatever is added to a right sentence, with a number or as a class that was not found."""
    counts = data.draw(found)
    right = data.draw(sentences(counts))[:-1]
    number = data.draw(st.sampled_from(["a", "one", "three", "7", "several", "many", "no", "another", "half a"]))
    thing = data.draw(st.sampled_from(["bird", "birds", "fish", "of them", "road", "windows"]))
    assert not counts_rightly(f"{right} and {number} {thing}.", counts)
    absent = data.draw(st.sampled_from([label for label in CLASSES if label not in counts]))
    assert not counts_rightly(f"{right} near the {names_of(absent)[0]}.", counts)


@given(st.text(max_size=400), found)
def test_any_text_has_a_verdict(text: str, counts: dict[str, int]) -> None:
    assert counts_rightly(text, counts) in {True, False}


def test_numbers_in_words() -> None:
    assert [in_words(n) for n in (0, 1, 12, 20, 21, 99, 100)] == [
        "zero", "one", "twelve", "twenty", "twenty-one", "ninety-nine", "100",
    ]  # fmt: skip
    assert listed({"cup": 12, "diningtable": 1, "person": 2}) == "twelve cups, one dining table and two people"


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAiServer]:
    with OpenAiServer() as server:
        yield server


@pytest.fixture(scope="module")
def described(server: OpenAiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workflow]:
    """The workflow with its own detector and classifier; its language model is on a server that says what a test wants."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "handlers", folder / "handlers")
    shutil.copytree(ROOT / "workflows", folder / "workflows", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "weights").symlink_to(ROOT / "weights")
    handler = folder / "handlers" / "text_generation.yaml"
    file = yaml.safe_load(handler.read_text("utf-8"))
    remote = {"url": server.url, "retries": 0, "timeout_s": 0.5}
    settings = {"engine": "remote", "model": "capital", "remote": remote}
    handler.write_text(yaml.safe_dump(file | {"settings": settings}))
    describe = folder / "workflows" / "describe_photo.yaml"
    file = yaml.safe_load(describe.read_text("utf-8"))
    file["nodes"]["written"]["circuit"]["failures"] = 100  # the faults of these tests open none
    describe.write_text(yaml.safe_dump(file))
    with Workflow.load(describe, device="cpu") as workflow:
        yield workflow


@pytest.fixture(autouse=True)
def forget(server: OpenAiServer) -> None:
    server.fault, server.words = "", ["One", " cup", " of", " coffee."]
    server.bodies.clear()


def test_a_right_sentence_is_the_answer(described: Workflow, server: OpenAiServer) -> None:
    (answer,) = described([chat("photos/coffee.jpg", temperature=0.5, seed=3)])

    assert (answer.text, answer.served_by, answer.finish_reason) == ("One cup of coffee.", MODEL, "stop")
    assert answer.usage.total_tokens == 12
    (body,) = server.bodies
    assert body["messages"][-1]["content"] == "one cup"
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.5, 3, 64)


def test_a_wrong_one_is_not(described: Workflow, server: OpenAiServer) -> None:
    server.words = ["Two", " cups", " of", " coffee."]
    (answer,) = described([chat("photos/coffee.jpg")])

    assert (answer.text, answer.served_by) == (COFFEE, PLAIN)
    assert answer.usage.total_tokens == 12  # it was written, and is paid


@pytest.mark.parametrize("fault", ["always broken", "busy for long", "no answer", "stops in the middle", "too long"])
def test_without_the_language_model_the_sentence_is_plain(
    described: Workflow, server: OpenAiServer, fault: str
) -> None:
    """Also where it ends in the middle: nothing of it was released."""
    server.fault = fault
    (answer,) = described([chat("photos/coffee.jpg")])

    assert (answer.text, answer.served_by, answer.finish_reason) == (COFFEE, PLAIN, "stop")


def test_where_nothing_was_found_the_model_is_not_asked(described: Workflow, server: OpenAiServer) -> None:
    (answer,) = described([chat("photos/empty.jpg")])

    assert answer.text == "Nothing that the detector knows is in this photo."
    assert (answer.served_by, server.bodies) == (PLAIN, [])


def test_what_the_detector_is_unsure_of_is_not_counted(described: Workflow, server: OpenAiServer) -> None:
    """Five objects, of which the table has a score of 0.28."""
    described([chat("photos/five.jpg")])

    assert server.bodies[0]["messages"][-1]["content"] == "four cups"


@pytest.mark.parametrize(
    ("message", "status", "said"),
    [
        (
            Chat.of("What is in it?"),
            422,
            "messages: the chat has no photos; send one, as an image_url with a data URL.",
        ),
        (chat("photos/five.jpg", "photos/empty.jpg"), 422, "messages: the chat has 2 photos; send one"),
        (chat("photos/five.jpg", n=2), 422, "n: a photo has one description; leave it out."),
        (chat(b"no photo"), 415, "not a photo that is read here"),
        (chat((ROOT / "photos" / "coffee.jpg").read_bytes()[:2000]), 400, "damaged"),
    ],
)
def test_a_chat_that_it_cannot_answer_is_refused(described: Workflow, message: Chat, status: int, said: str) -> None:
    (failed,) = described([message])

    assert isinstance(failed, Failure)
    assert (failed.status, said in failed.message) == (status, True), failed.message


def test_a_photo_of_too_many_pixels_is_refused(described: Workflow) -> None:
    """A small file may hold very many: it is refused before it is decoded."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    (failed,) = described([chat(file.getvalue())])

    assert isinstance(failed, Failure)
    assert failed.status == 413


def test_requests_are_not_mixed(described: Workflow, server: OpenAiServer) -> None:
    photos = ["photos/coffee.jpg", "photos/empty.jpg", "photos/five.jpg"] * 4
    random.Random(17).shuffle(photos)
    answers: list[TextChunk] = described([chat(photo) for photo in photos])
    whole = {
        "photos/coffee.jpg": "One cup of coffee.",
        "photos/empty.jpg": "Nothing that",
        "photos/five.jpg": "The photo",
    }

    assert all(answer.text.startswith(whole[photo]) for photo, answer in zip(photos, answers, strict=True))
    assert len(server.bodies) == 8
