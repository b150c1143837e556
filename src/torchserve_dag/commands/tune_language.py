"""`torchserve-dag tune` for a language model: measure with which settings it writes fastest on this machine."""

from __future__ import annotations

import dataclasses
import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from torchserve_dag.commands.common import err, fail, out, print_json

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from torchserve_dag.runtime.data.source import Source
    from torchserve_dag.runtime.project.handler_file import HandlerFile
    from torchserve_dag.tuning.language_search import LanguageTrial

TUNED = ("prefill_tokens", "threads", "room")


def tune_language(
    root: Path, file: Source[HandlerFile], seconds: float, gap_ms: float, *, dry_run: bool, json: bool
) -> None:
    """Measure a language model's `prefill_tokens`, `threads`, `room` and cache, and write the best into its YAML."""
    from torchserve_dag.runtime.compute.cores import cores
    from torchserve_dag.tuning.language_search import best_language, cache_gb, search_language
    from torchserve_dag.tuning.language_trial import LanguageTask
    from torchserve_dag.tuning.search import TrialError
    from torchserve_dag.tuning.write import write_settings

    name, settings = file.value.name, dict(file.value.settings)
    if settings.get("engine") == "remote":
        fail(f"{name} is computed by another server: tune it there.")
    task = LanguageTask(str(root.resolve()), str(file.path.resolve()), settings, seconds)
    trials: list[LanguageTrial] = []
    with err.status(f"measuring {name} with its own settings"):
        try:
            for trial in search_language(task, cores(), gap_ms):
                trials.append(trial)
                err.print(f"  {_name(trial)}: {_result(trial)}", style="dim", markup=False)
        except TrialError as error:
            fail(f"{name} does not run with its own settings: {error}.")
    winner = best_language(trials, gap_ms)
    chosen = {key: winner.setting(key) for key in TUNED} | {"cache_gb": cache_gb(winner) or winner.setting("cache_gb")}
    new = {key: value for key, value in chosen.items() if value != trials[0].setting(key)}
    on = f"tuned on {dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}, {cores()} cores"
    changed = [] if dry_run else write_settings(file.path, new, on, section="settings")
    if json:
        print_json({"trials": [_fields(trial) for trial in trials], "chosen": chosen, "changed": changed})
        return
    out.print(_table(trials, winner, gap_ms))
    out.print(f"Fastest with pauses of at most {gap_ms:g} ms, or else the shortest: {escape(_name(winner))}.")
    if winner.measured and winner.measured.cache_tokens:
        held = winner.measured.cache_tokens
        out.print(f"Its cache holds {held:,} tokens; {chosen['cache_gb']} GB hold all that may be in progress.")
    for key, value in new.items() if dry_run else ():
        out.print(f"{file.path}: would be [green]{key}: {value}[/]", soft_wrap=True)
    for line in changed:
        out.print(f"[green]{file.path}[/]: {escape(line.strip())}", soft_wrap=True)
    if not changed:
        out.print(f"{file.path} is unchanged.", soft_wrap=True)


def _name(trial: LanguageTrial) -> str:
    return ", ".join(f"{key} {trial.setting(key) or 'auto'}" for key in TUNED)


def _result(trial: LanguageTrial) -> str:
    found = trial.measured
    if found is None:
        return f"failed: {trial.failed}"
    rates = " / ".join(f"{rate:.0f}" for rate in found.tokens_per_s.values())
    clients = " / ".join(found.tokens_per_s)
    return f"{rates} tokens a second for {clients} clients; pauses of {found.gap_ms:.0f} ms"


def _table(trials: list[LanguageTrial], winner: LanguageTrial, gap_ms: float) -> Table:
    clients = next(list(trial.measured.tokens_per_s) for trial in trials if trial.measured)
    heads = [f"tokens/s, {count}" for count in clients]
    table = Table("settings", *heads, "first token ms", "long prompt ms", "longest pause ms", "load s")
    for column in table.columns[1:]:
        column.justify = "right"
    for trial in trials:
        found = trial.measured
        if found is None:
            table.add_row(_name(trial), *[""] * (len(clients) + 2), "[red]failed[/]")
            continue
        pause = f"{found.gap_ms:.0f}"
        table.add_row(
            _name(trial),
            *[f"{rate:.0f}" for rate in found.tokens_per_s.values()],
            f"{found.first_ms:.0f}",
            f"{found.long_first_ms:.0f}",
            pause if found.gap_ms <= gap_ms else f"[red]{pause}[/]",
            f"{found.load_s:.1f}",
            style="bold green" if trial is winner else None,
        )
    return table


def _fields(trial: LanguageTrial) -> dict[str, Any]:
    settings = {key: trial.setting(key) for key in (*TUNED, "cache_gb")}
    return {"settings": settings} | (dataclasses.asdict(trial.measured) if trial.measured else {"failed": trial.failed})
