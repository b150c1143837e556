"""The table of a workflow's metrics: their names on `/metrics`, and how each is read; the series that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Generic, TypeVar

from torchserve_dag.runtime.engine.counts import Histogram, LanguageCounts, NodeCounts, WorkflowCounts
from torchserve_dag.runtime.engine.request_span import INVOKE_WORKFLOW
from torchserve_dag.runtime.engine.runner import OwnEngine
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.handler import EngineLoad
from torchserve_dag.runtime.messages import Usage
from torchserve_dag.runtime.telemetry.conversations import KeptCounts

Labels = tuple[tuple[str, str], ...]
Series = tuple[str, str, Labels]
"""A node, a name on the page, and the labels beside workflow, version and node; a histogram's bucket has `le` last.
Of a whole workflow the node is empty, and no label."""

PREFIX = "torchserve_dag_node_"
AGENT = "gen_ai_agent_name"
PROVIDER, MODEL, OPERATION = "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_operation_name"
"""Labels of language models, as OpenTelemetry's conventions call them in Prometheus's form."""
_TOKENS_OF = "gen_ai_token_type"

Source = TypeVar("Source")


@dataclass(frozen=True, slots=True)
class Metric(Generic[Source]):
    """A metric, under its name on `/metrics`."""

    name: str
    unit: str
    meaning: str
    value: Callable[[Source], float | Histogram | None]
    """Reads the metric: a number, or a histogram; None if it is not known."""
    vllm: tuple[str, ...] = ()
    """What vLLM calls the same; see docs/metrics.md."""
    labels: Labels = ()
    """Labels that tell it from another metric of its name."""


METRICS: tuple[Metric[NodeCounts], ...] = (
    Metric(
        f"{PREFIX}items_total",
        "items",
        "Items that ran. A retry counts again, and so does each chunk of a node that streams.",
        lambda counts: counts.items,
    ),
    Metric(
        f"{PREFIX}failures_total",
        "items",
        "Items that failed, each retry included, whatever `retry` or `on_error` made of the failure.",
        lambda counts: counts.failures,
    ),
    Metric(
        f"{PREFIX}skipped_total",
        "items",
        "Items that did not run, because of a `when`, a skipped input or `on_error: skip`.",
        lambda counts: counts.skipped,
    ),
    Metric(
        f"{PREFIX}queue_seconds",
        "seconds",
        "Time that an item waited in the node's queue until a batch took it.",
        lambda counts: counts.queue_s,
    ),
    Metric(f"{PREFIX}run_seconds", "seconds", "Time that a batch ran.", lambda counts: counts.run_s),
    Metric(f"{PREFIX}batch_size", "items", "Items in a batch.", lambda counts: counts.batch),
)
"""Of every node."""

LANGUAGE: tuple[Metric[LanguageCounts], ...] = (
    Metric(
        f"{PREFIX}prompt_tokens_total",
        "tokens",
        "Tokens of the prompts.",
        lambda counts: counts.prompt_tokens.sum,
        ("vllm:prompt_tokens_total", "vllm:prefix_cache_queries_total"),
    ),
    Metric(
        f"{PREFIX}generated_tokens_total",
        "tokens",
        "Tokens of the answers.",
        lambda counts: counts.answer_tokens.sum,
        ("vllm:generation_tokens_total",),
    ),
    Metric(
        f"{PREFIX}cached_tokens_total",
        "tokens",
        "Tokens of the prompts that were computed for an earlier request.",
        lambda counts: counts.cached_tokens,
        ("vllm:prefix_cache_hits_total",),
    ),
    Metric(
        "gen_ai_server_time_to_first_token_seconds",
        "seconds",
        "`gen_ai.server.time_to_first_token`: until the first chunk of an answer; queues and the prompt are in it.",
        lambda counts: counts.first_token_s,
        ("vllm:time_to_first_token_seconds",),
    ),
    Metric(
        "gen_ai_server_time_per_output_token_seconds",
        "seconds",
        "`gen_ai.server.time_per_output_token`: for each answer, the mean of the tokens after the first.",
        lambda counts: counts.token_s,
        ("vllm:request_time_per_output_token_seconds",),
    ),
    Metric(
        "gen_ai_server_request_duration_seconds",
        "seconds",
        "`gen_ai.server.request.duration`: until the end of an answer that did not fail.",
        lambda counts: counts.answer_s,
        ("vllm:e2e_request_latency_seconds",),
    ),
    Metric(
        "gen_ai_client_token_usage",
        "tokens",
        f'`gen_ai.client.token.usage`: of each request; `{_TOKENS_OF}="input"` is its prompt.',
        lambda counts: counts.prompt_tokens,
        ("vllm:request_prompt_tokens",),
        ((_TOKENS_OF, "input"),),
    ),
    Metric(
        "gen_ai_client_token_usage",
        "tokens",
        f'Likewise, `{_TOKENS_OF}="output"`: its answer.',
        lambda counts: counts.answer_tokens,
        ("vllm:request_generation_tokens",),
        ((_TOKENS_OF, "output"),),
    ),
)
"""Of every node whose model has an engine of its own, for each operation."""

GAUGES: tuple[Metric[EngineLoad], ...] = (
    Metric(
        f"{PREFIX}running",
        "items",
        "Items that the engine computes now.",
        lambda load: load.running,
        ("vllm:num_requests_running",),
    ),
    Metric(
        f"{PREFIX}waiting",
        "items",
        "Items that have come and that the engine does not compute yet.",
        lambda load: load.waiting,
        ("vllm:num_requests_waiting",),
    ),
    Metric(
        f"{PREFIX}cache_usage",
        "of 1",
        "The part of the engine's cache of keys and values that is in use, where the engine says it.",
        lambda load: load.cache_usage,
        ("vllm:kv_cache_usage_perc",),
    ),
)
"""Of every node whose model has an engine of its own, for each worker: they rise and fall."""


WORKFLOW: tuple[Metric[WorkflowCounts], ...] = (
    Metric(
        "gen_ai_invoke_agent_duration_seconds",
        "seconds",
        f'`gen_ai.invoke_agent.duration`, with `{OPERATION}="{INVOKE_WORKFLOW}"`: until the end of an answer that did '
        "not fail.",
        lambda counts: counts.duration_s,
        labels=((OPERATION, INVOKE_WORKFLOW),),
    ),
)
"""Of every workflow that has language models."""

_NOT_KEPT = "torchserve_dag_not_kept_total"
KEPT: tuple[Metric[KeptCounts], ...] = (
    Metric("torchserve_dag_kept_total", "requests", "Requests that were kept.", lambda counts: counts.kept),
    Metric(
        _NOT_KEPT,
        "requests",
        "Requests that were not kept, because the disk or `redact` was too slow.",
        lambda counts: counts.busy,
        labels=(("reason", "busy"),),
    ),
    Metric(
        _NOT_KEPT,
        "requests",
        "Likewise, because `redact` raised.",
        lambda counts: counts.redact,
        labels=(("reason", "redact"),),
    ),
    Metric(
        _NOT_KEPT,
        "requests",
        "Likewise, because the disk refused them, or they are no plain data.",
        lambda counts: counts.unwritable,
        labels=(("reason", "unwritable"),),
    ),
)
"""Of every workflow whose `serve.keep` has requests kept."""

_VLLM = [
    *((one.name, frozenset(one.labels), name) for one in LANGUAGE for name in one.vllm),
    *((one.name, frozenset(one.labels), name) for one in GAUGES for name in one.vllm),
]


def series_of(counts: Mapping[str, NodeCounts], own: Mapping[str, OwnEngine]) -> dict[Series, float]:
    """The counters and histograms of all nodes; `own`: the nodes with engines of their own."""
    found = {
        (node, name, labels): value
        for node, node_counts in counts.items()
        for name, labels, value in _series(METRICS, node_counts)
    }
    for node, engine in own.items():
        for operation, language in counts[node].language.items():
            about = ((OPERATION, operation), *_labels(engine))
            found |= {(node, name, labels): value for name, labels, value in _series(LANGUAGE, language, about)}
    return found


def workflow_series(
    graph: Graph, whole: WorkflowCounts, counts: Mapping[str, NodeCounts], kept: KeptCounts | None
) -> dict[Series, float]:
    """Those of a whole workflow: of its requests, if its nodes have counted tokens or could, and of what it keeps."""
    found: list[tuple[str, Labels, float]] = []
    if not graph.of_handler and any(of_node.language or of_node.usage != Usage() for of_node in counts.values()):
        found += _series(WORKFLOW, whole, ((AGENT, graph.name),))
    if kept:
        found += _series(KEPT, kept)
    return {("", name, labels): value for name, labels, value in found}


def gauges_of(own: Mapping[str, OwnEngine], queued: Mapping[str, int]) -> dict[Series, float]:
    """What the engines have to do now; `queued`: the items of each node for which they have no room yet."""
    loads = {node: engine.load_now() for node, engine in own.items()}
    loads = {node: replace(load, waiting=load.waiting + queued[node]) for node, load in loads.items()}
    return {
        (node, name, labels): value
        for node, load in loads.items()
        for name, labels, value in _series(GAUGES, load, _labels(own[node]))
    }


def vllm_names(name: str, labels: Labels) -> Iterator[str]:
    """What vLLM calls a series."""
    for ours, own_labels, theirs in _VLLM:
        suffix = name.removeprefix(ours)
        if suffix in {"", "_bucket", "_sum", "_count"} and own_labels <= set(labels):
            yield theirs + suffix


def _labels(engine: OwnEngine) -> Labels:
    return ((PROVIDER, engine.name), (MODEL, engine.model))


def _series(
    metrics: Sequence[Metric[Source]], source: Source, about: Labels = ()
) -> Iterator[tuple[str, Labels, float]]:
    for metric in metrics:
        value, labels = metric.value(source), (*about, *metric.labels)
        if isinstance(value, Histogram):
            yield from _histogram(metric.name, labels, value)
        elif value is not None:
            yield metric.name, labels, value


def _histogram(name: str, labels: Labels, histogram: Histogram) -> Iterator[tuple[str, Labels, float]]:
    """A Prometheus histogram, whose buckets are cumulative."""
    bounds = [*map(str, histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, accumulate(histogram.counts), strict=True):
        yield f"{name}_bucket", (*labels, ("le", bound)), count
    yield f"{name}_sum", labels, histogram.sum
    yield f"{name}_count", labels, histogram.count
