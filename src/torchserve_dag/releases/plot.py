"""Plot an experiment: the differences with their confidence intervals, and each version's distribution of durations."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchserve_dag.releases.experiment import Difference, Result
from torchserve_dag.releases.request_log import LoggedRequest
from torchserve_dag.server.errors import ServerError

_COLOURS = ("#6b6b6b", "#1552c4", "#c2571a", "#3c8d5a")


def draw(result: Result, requests: Sequence[LoggedRequest], path: Path) -> None:
    """Write an .svg or a .png. Raises ServerError where matplotlib is missing."""
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ImportError:
        raise ServerError("The plot needs matplotlib, which is missing: pip install 'torchserve-dag[bench]'.") from None
    plt: Any = importlib.import_module("matplotlib.pyplot")
    rows = result.differences
    figure, axes = plt.subplots(
        1, len(rows) + 1, figsize=(4.2 * (len(rows) + 1), 3.4), gridspec_kw={"wspace": 0.35}, layout="constrained"
    )
    for axis, row in zip(axes[1:] if rows else [], rows, strict=True):
        _interval(axis, row, result.compared)
    _durations(axes[0] if rows else axes, result, requests)
    figure.suptitle(f"{result.model}: {len(requests):,} requests")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _durations(axis: Any, result: Result, requests: Sequence[LoggedRequest]) -> None:
    """The cumulative distribution of durations."""
    for arm, colour in zip(result.arms, _COLOURS, strict=False):
        times = sorted(one.ms for one in requests if one.version == arm.version)
        shares = [100 * (i + 1) / len(times) for i in range(len(times))]
        axis.step(times, shares, where="post", color=colour, label=f"{arm.version} ({arm.requests:,})")
    axis.set(title="duration", xlabel="ms", ylabel="% of requests", ylim=(0, 100), xscale="log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")


def _interval(axis: Any, row: Difference, compared: Sequence[str]) -> None:
    """The difference with its interval, and a line at zero."""
    colour = ("#3c8d5a" if row.settled else "#a3842c") if row.low != row.high else "#6b6b6b"
    axis.axvline(0, color="#6b6b6b", linewidth=1)
    axis.errorbar(
        row.difference,
        0,
        xerr=[[row.difference - row.low], [row.high - row.difference]],
        fmt="o",
        color=colour,
        capsize=6,
    )
    axis.set(title=f"{row.what}: {compared[1]} less {compared[0]}", xlabel=_verdict(row), yticks=[], ylim=(-1, 1))
    axis.margins(x=0.25)


def _verdict(row: Difference) -> str:
    if row.settled:
        return f"{row.difference:+.3g}: settled"
    more = f"{row.needed:,} more requests" if row.needed else "nothing differs"
    return f"{row.difference:+.3g}: open, {more}"
