"""What a version's evaluation must show before it is released: `rollout --require 'recall >= .8'`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from torchserve_dag.archives.archive import Archive
from torchserve_dag.evaluation.data_set import DataSet
from torchserve_dag.evaluation.results import Evaluation, kept, path_of
from torchserve_dag.evaluation.specs import ScoreSpec
from torchserve_dag.releases.comparison import Comparison
from torchserve_dag.runtime.data.plain import did_you_mean
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.server.errors import ServerError

ERRORS = "errors"
"""Beside the scores: the share of items that failed."""


def read(text: str) -> Comparison:
    """Parse a requirement. Raises ValueError that says what to write instead."""
    found = Comparison.read(text)
    if found is None or found.unit not in {"", "%"}:
        raise ValueError(f'"{text}" is not a requirement: write "recall >= .8", "exact > 90%" or "errors <= 1%"')
    return found


def check_released(root: Path, archive: Archive, requirements: Sequence[Comparison]) -> None:
    """Raises ServerError if a version's kept evaluation is missing or stale, or does not meet a requirement."""
    which = f"{archive.name}/{archive.version}"
    result = kept(root, archive.name, archive.version)
    if result is None:
        raise ServerError(
            f"{which} was not evaluated, and {_shown(requirements[0])} is required: "
            f"torchserve-dag evaluate {which} --data FILE --score SCORE."
        )
    path = path_of(root, archive.name, archive.version)
    if why := _stale(root, archive, result):
        raise ServerError(f"{path} is not of what is rolled out: {why}. Run {command(result)}.")
    for reason in unmet(result, requirements):
        raise ServerError(f"{reason} ({path}).")


def unmet(result: Evaluation, requirements: Sequence[Comparison]) -> list[str]:
    """Each requirement that a result does not meet, as a sentence without its full stop."""
    return [why for one in requirements if (why := _unmet(result, one))]


def command(result: Evaluation) -> str:
    """What evaluates a version again, in the same way."""
    scores = " ".join(f"--score {shlex.quote(score.scorer)}" for score in result.scores.values())
    return f"torchserve-dag evaluate {result.name} --data {shlex.quote(result.data)} {scores}"


def _unmet(result: Evaluation, required: Comparison) -> str | None:
    number = required.number / 100 if required.unit == "%" else required.number
    if required.what == ERRORS:
        share = result.errors / result.items
        shown = f"{ERRORS} {share:.1%} of {result.items} items"
    else:
        names = [name for name in result.scores if required.what in {name, name.partition("@")[0].partition(":")[0]}]
        if len(names) != 1:
            known = [*result.scores, ERRORS]
            what = f"has {' and '.join(names)}" if names else f"has no score {required.what}"
            help_ = "write the whole name" if names else did_you_mean(required.what, known)
            return f"The evaluation of {result.name} {what}, and {_shown(required)} is required; {help_}"
        score = result.scores[names[0]]
        share = score.mean
        shown = f"{names[0]} {share:.3g} of {result.items} items (95% interval {score.low:.3g} to {score.high:.3g})"
    if required.holds(share, number):
        return None
    return f"{result.name} has {shown}, and {_shown(required)} is required"


def _stale(root: Path, archive: Archive, result: Evaluation) -> str | None:
    """Why a result does not hold for what would be released."""
    if result.archive != archive.hash:
        return f"it is of another archive ({result.archive}, and {archive.path.name} is {archive.hash})"
    path = root / result.data
    try:
        if DataSet.read(path).hash != result.data_hash:
            return f"{path} has changed since, or a file that it names"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    except CheckError:
        return f"{path} has changed since, and has mistakes now"
    for name, score in result.scores.items():
        try:
            same = ScoreSpec.read(score.scorer).origin(root) == score.origin
        except (OSError, ValueError, CheckError):
            same = False
        if not same:
            return f"what computes the score {name} has changed since"
    return None


def _shown(required: Comparison) -> str:
    return f"{required.what} {required.operator} {required.number:g}{required.unit}"
