"""Prometheus's text format, as TorchServe and Envoy write it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def samples(text: str, prefix: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    """The samples of all metrics whose names begin with `prefix`: the rest of the name, the labels, the value.

    A counter's name comes without `_total`: the parser appends it to every counter, and servers name theirs either way.
    Raises ValueError for text that is not in the format.
    """
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415 (only where it is used)

    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(prefix):
                yield sample.name.removeprefix(prefix).removesuffix("_total"), sample.labels, sample.value
