"""`torchserve-dag serve`, `rollout`, `promote`, `rollback`, `retire`, `routes`: which version gets which requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from torchserve_dag.commands import durations
from torchserve_dag.commands.common import (
    JsonOption,
    ProjectOption,
    ascii_only,
    err,
    fail,
    failures,
    out,
    print_json,
    project_root,
)

if TYPE_CHECKING:
    from torchserve_dag.front_door.door import Traffic
    from torchserve_dag.releases.rollout_store import RolloutProgress, RolloutStore, StepMetrics
    from torchserve_dag.server.state import State

STOP_IF = "errors > 1% or p50 > 1.3x or p99 > 1.3x"
"""The default of --stop-if."""

_COLOURS = {"done": "green", "back": "red"}


def rollout(
    name: Annotated[str, typer.Argument(metavar="NAME|status", help="The model; or status, to show all rollouts.")],
    version: Annotated[str | None, typer.Argument(help="The new version, whose archive is in the model store.")] = None,
    *,
    canary: Annotated[
        str, typer.Option(metavar="PERCENT,…", help="The new version's share of the requests at each step, in percent.")
    ] = "5,25,50,100",
    every: Annotated[str, typer.Option(metavar="TIME", help="The duration of a step: 60s, 5m.")] = "60s",
    stop: Annotated[
        str, typer.Option("--stop-if", metavar="CONDITION", help="Roll back when this condition holds beyond chance.")
    ] = STOP_IF,
    at_least: Annotated[
        int, typer.Option(min=0, help="Requests that the new version must have had before the next step.")
    ] = 20,
    patience: Annotated[
        str, typer.Option(metavar="TIME", help="Roll back if a step has not had these requests after this time.")
    ] = "1h",
    ready: Annotated[str, typer.Option(metavar="TIME", help="How long the new version may take to load.")] = "10m",
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORE>=NUMBER",
            help="What the version's evaluation must show, such as 'recall >= .8'; may be repeated. See evaluate.",
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Show the progress until the rollout ends.")] = True,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Give a new version a growing share of a model's requests, and roll back automatically if it is worse.

    The rollout continues when this command is interrupted. At its end the new version gets all requests, and the old
    version stays loaded. The first version of a model gets all requests at once.
    """
    from torchserve_dag.evaluation import requirement
    from torchserve_dag.front_door.door import Door
    from torchserve_dag.releases import stop_if
    from torchserve_dag.releases.rollout import weights_before
    from torchserve_dag.releases.rollout_store import RolloutPlan, RolloutStore
    from torchserve_dag.releases.versions import find_archive
    from torchserve_dag.server.connect import running
    from torchserve_dag.server.state import State

    with failures():
        root = project_root(project)
        store = RolloutStore(State(root))
        if version is None:
            if name != "status":
                fail(f"Which version of {name}? Write torchserve-dag rollout {name} VERSION.")
            _show_all(store, json=json)
            return
        try:
            stop_if.read(stop)
            required = [requirement.read(one) for one in require or ()]
        except ValueError as error:
            fail(f"{error}.")
        steps = _steps(canary)
        plan = RolloutPlan(name, version, steps, _time(every), stop, at_least, _time(patience), _time(ready))
        state = State(root)
        running(state)
        door = Door(state)
        if door.record() is None:
            fail("The server runs without the front door, which splits the requests: start it with torchserve-dag up.")
        if required:
            requirement.check_released(root, find_archive(state, name, version), required)
        traffic = door.traffic()
        split = traffic.split(name)
        if split is None or not split.weights:
            serve_first(state, name, version, plan.ready_s, json=json)
            return
        weights_before(root, traffic, plan)  # a refusal of the keeper's would replace the progress of the last rollout
        store.request(plan)
        last = _follow(store, name) if watch else store.progress(name)
    if json:
        print_json(last)
    elif last and watch:
        out.print(_line(last))
    if last and last.stage == "back":
        raise typer.Exit(1)


def serve(
    name: Annotated[
        str, typer.Argument(metavar="NAME[/VERSION]", help="A model in the model store; without VERSION its highest.")
    ],
    *,
    ready: Annotated[str, typer.Option(metavar="TIME", help="How long the version may take to load.")] = "10m",
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Bring a version, or a new model, into the running server, and into later starts.

    The first version of a model becomes its default; any other gets only requests that name it.
    """
    from torchserve_dag.server.state import State

    model, _, version = name.partition("/")
    with failures():
        serve_first(State(project_root(project)), model, version or None, _time(ready), json=json)


def serve_first(state: State, model: str, version: str | None, ready_s: float, *, json: bool) -> None:
    """Bring a version into the server, as its model's default if it has none, and say so."""
    from torchserve_dag.releases import versions
    from torchserve_dag.server.connect import management_client

    with management_client(state) as client, err.status(f"loading {model} {version or ''}"):
        version, is_default = versions.serve(state, client, model, version, ready_s)
    if json:
        print_json({"model": model, "version": version, "default": is_default})
        return
    if is_default:
        out.print(f"{model}/{version} is served; it answers requests that name no version")
    else:
        out.print(
            f"{model}/{version} is served to requests that name it; torchserve-dag rollout {model} {version} gives it "
            "a share of the others",
            soft_wrap=True,
        )


def promote(
    name: Annotated[str, typer.Argument(help="A model with a running rollout.")],
    *,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Send all requests to the new version now, and skip the remaining steps."""
    from torchserve_dag.releases import manual

    with failures():
        done = manual.promote(project_root(project), name)
    print_json(done) if json else out.print(_line(done))


def rollback(
    name: Annotated[str, typer.Argument(help="A model with a running or finished rollout.")],
    *,
    json: JsonOption = False,
    project: ProjectOption = None,
) -> None:
    """Restore the weights from before the last rollout, within a second or two."""
    from torchserve_dag.releases import manual

    with failures():
        done = manual.roll_back(project_root(project), name)
    print_json(done) if json else out.print(_line(done))


def retire(
    name: Annotated[str, typer.Argument(metavar="NAME/VERSION", help="A version that no route uses.")],
    *,
    project: ProjectOption = None,
) -> None:
    """Unload a version after its last request is answered. Later starts do not load it."""
    from torchserve_dag.releases import versions
    from torchserve_dag.server.connect import management_client
    from torchserve_dag.server.state import State

    model, _, version = name.partition("/")
    if not version:
        fail(f"Which version of {model}? Write torchserve-dag retire {model}/VERSION.")
    with failures():
        state = State(project_root(project))
        with management_client(state) as client, err.status(f"waiting for requests in flight at {name}"):
            versions.retire(state, client, model, version)
    out.print(f"{name} is retired; torchserve-dag serve {name} loads it again")


def routes(*, json: JsonOption = False, project: ProjectOption = None) -> None:
    """Apply routes.yaml as it is now, without dropping a connection, and show which version gets which requests."""
    from torchserve_dag.releases import manual

    with failures():
        traffic = manual.reload_routes(project_root(project))
    print_json(traffic.splits) if json else _print_routes(traffic)


def _steps(text: str) -> tuple[float, ...]:
    from torchserve_dag.releases.rollout_store import WHOLE

    try:
        steps = tuple(float(part) for part in text.split(","))
    except ValueError:
        steps = ()
    if not steps or list(steps) != sorted(set(steps)) or not 0 < steps[0] <= steps[-1] <= WHOLE:
        fail(f'"{text}" is not a list of steps: write increasing percentages, like 5,25,50,100.')
    return steps if steps[-1] == WHOLE else (*steps, WHOLE)


def _time(text: str) -> float:
    return durations.seconds(text, "30s, 5m or 1h")


def _follow(store: RolloutStore, model: str) -> RolloutProgress | None:
    """Show a rollout until it ends; an interrupt stops the display, not the rollout."""
    now = store.progress(model)
    try:
        with Live(console=err, auto_refresh=False, transient=True) as live:
            while now and not now.over:
                live.update(_picture(now), refresh=True)
                time.sleep(0.2)
                now = store.progress(model)
    except KeyboardInterrupt:
        err.print(f"The rollout continues: see torchserve-dag rollout status, promote {model}, rollback {model}.")
        raise typer.Exit(130) from None
    return now


def _show_all(store: RolloutStore, *, json: bool) -> None:
    found = store.all()
    if json:
        print_json(found)
    elif not found:
        out.print("no rollouts yet")
    elif out.is_terminal and any(not one.over for one in found):
        with Live(console=out, auto_refresh=False) as live:
            while any(not one.over for one in found):
                live.update(Group(*map(_picture, found)), refresh=True)
                time.sleep(0.5)
                found = store.all()
            live.update(Group(*map(_picture, found)), refresh=True)
    else:
        for one in found:
            out.print(_picture(one))


def _picture(now: RolloutProgress) -> Group:
    """One rollout: its status, a bar with the share, and the metrics of both versions within the step."""
    from torchserve_dag.releases.rollout_store import WHOLE

    plan = now.plan
    width = 40
    filled = round(width * now.share / WHOLE)
    full, empty = "#." if ascii_only() else "█░"
    bar = Text.assemble(
        (full * filled, "green"), (empty * (width - filled), "dim"), f" {now.share:g}% to {plan.version}"
    )
    table = Table("", "requests", "errors", "p50 ms", "p99 ms", box=None)
    for label, numbers in ((f"{plan.version} (new)", now.new), (", ".join(now.before), now.old)):
        if numbers:
            table.add_row(label, *_cells(numbers))
    return Group(_line(now), bar, table)


def _cells(numbers: StepMetrics) -> list[str]:
    times = [f"{ms:.0f}" if ms is not None else "" for ms in (numbers.p50_ms, numbers.p99_ms)]
    return [str(numbers.requests), str(numbers.errors), *times]


def _line(now: RolloutProgress) -> Text:
    plan, colour = now.plan, _COLOURS.get(now.stage, "yellow")
    steps = ", ".join(f"{step:g}" for step in plan.steps)
    status = {
        "waiting": "is about to start",
        "loading": f"loads {plan.version}",
        "rolling": f"rolls out {plan.version} in steps of {steps} percent",
        "done": f"is {plan.version} now: {now.reason}",
        "back": f"rolled back from {plan.version}: {now.reason}",
    }[now.stage]
    return Text.assemble((plan.model, "bold"), " ", (status, colour))


def _print_routes(traffic: Traffic) -> None:
    table = Table("model", "version", "share", "also")
    for split in traffic.splits:
        shares = split.shares
        known = [one.version for one in traffic.served if one.model == split.model]
        for version in [*shares, *(one for one in known if one not in shares)]:
            uses = [f"always {rule}" for rule, one in split.route.always.items() if one == version]
            uses += [f"a copy of {split.route.shadow[version]:g}%"] if version in split.route.shadow else []
            uses += ["fallback"] if version == split.fallback else []
            uses += ["[yellow]ejected for a while: it keeps failing[/]"] if version in split.ejected else []
            table.add_row(split.model, version, f"{shares.get(version, 0):.1%}", escape(", ".join(uses)))
    out.print(table)
