"""The functions of describe_photo: the photo of a chat, what was found in it as a chat, and the sentence to answer."""

from __future__ import annotations

from collections import Counter
from http import HTTPStatus

from torchserve_dag import (
    Chat,
    ChatMessage,
    InputError,
    Photo,
    Skipped,
    TextChunk,
    Usage,
    decode_photo,
    photo_urls,
    put_together,
)
from workflows.counted import NUMBERS, counts_rightly, names_of, plural
from workflows.detect_classify import Description

MAX_TOKENS = 64
PLAIN = "plain sentence"
"""Who answers where the language model does not."""
SYSTEM = "Write one sentence about a photo, with the things and numbers that you are told."
EXAMPLES = (
    ({"bird": 2}, "Two birds can be seen in this photo."),
    ({"horse": 1, "sheep": 3}, "In this photo there are one horse and three sheep."),
    ({"train": 1}, "One train can be seen in this photo."),
)
_WORDS = {number: word for word, number in NUMBERS.items()}


def photo(chat: Chat) -> Photo:
    """The chat's only photo."""
    urls = photo_urls(chat)
    if len(urls) != 1:
        what = f"messages: the chat has {len(urls) or 'no'} photos; send one, as an image_url with a data URL."
        raise InputError(what, HTTPStatus.UNPROCESSABLE_ENTITY)
    if (chat.n or 1) > 1:
        raise InputError("n: a photo has one description; leave it out.", HTTPStatus.UNPROCESSABLE_ENTITY)
    return decode_photo(urls[0])


def counts(found: Description) -> dict[str, int]:
    """How many of each there are, of what the detector is sure of: that has a finer name."""
    return dict(Counter(one.label for one in found.objects if one.names))


def ask(chat: Chat, counts: dict[str, int]) -> Chat:
    """What the language model is asked. Of the client's chat it gets the temperature and the seed, and no word."""
    messages = [ChatMessage("system", SYSTEM)]
    for example, sentence in EXAMPLES:
        messages += [ChatMessage("user", listed(example)), ChatMessage("assistant", sentence)]
    messages.append(ChatMessage("user", listed(counts)))
    return Chat(messages=messages, max_tokens=MAX_TOKENS, temperature=chat.temperature or 0.0, seed=chat.seed)


def sentence(written: list[TextChunk]) -> TextChunk:
    """The model's answer as a whole."""
    (whole,) = put_together(written)
    text, reason = whole.text.strip(), whole.finish_reason
    return TextChunk(text, finish_reason=reason, usage=whole.usage, served_by=whole.served_by)


def answer(found: Description, counts: dict[str, int], written: TextChunk | Skipped) -> TextChunk:
    """The model's sentence if its counts are right, else the plain one."""
    if isinstance(written, Skipped):
        return TextChunk(found.summary, finish_reason="stop", usage=Usage(), served_by=PLAIN)
    if written.finish_reason == "stop" and counts_rightly(written.text, counts):
        return written
    return TextChunk(found.summary, finish_reason="stop", usage=written.usage, served_by=PLAIN)


def listed(counts: dict[str, int]) -> str:
    """Counts in words: `twelve cups and two dining tables`."""
    parts = [f"{in_words(n)} {(str if n == 1 else plural)(names_of(label)[0])}" for label, n in counts.items()]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def in_words(number: int) -> str:
    """A number from 0 to 99 in words; a larger one in digits."""
    if number in _WORDS:
        return _WORDS[number]
    tens, units = divmod(number, 10)
    return f"{_WORDS[tens * 10]}-{_WORDS[units]}" if tens * 10 in _WORDS else str(number)
