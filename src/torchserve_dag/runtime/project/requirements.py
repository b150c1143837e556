"""The installed packages that a handler or a workflow needs, checked before its code is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime.data.source import CheckError, Problem, Source

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def check_requirements(source: Source[Any]) -> None:
    """Check the `requirements` of a handler's or a workflow's file. Nothing is ever installed.

    Raises CheckError for what is not installed here, or in another version.
    """
    problems: list[Problem] = []
    for i, text in enumerate(source.value.requirements):
        reason, help_ = _wrong(text)
        if reason:
            problems.append(source.problem(("requirements", i), f"requirements: {reason}", help_))
    if problems:
        raise CheckError(problems)


def versions(requirements: Iterable[str]) -> dict[str, str]:
    """The installed version of each package that valid requirements name."""
    names = {re.sub(r"[-_.]+", "-", _read(text).name).lower() for text in requirements}  # as PyPI normalizes them
    return {name: version for name in sorted(names) if (version := _installed(name))}


def differences(requirements: Iterable[str], recorded: Mapping[str, str]) -> list[str]:
    """A sentence for each package that is of another version than was recorded when an archive was built."""
    return [
        f"{name} is {version} here, and was {recorded[name]} where the archive was built"
        for name, version in versions(requirements).items()
        if name in recorded and recorded[name] != version
    ]


def _wrong(text: str) -> tuple[str, str]:
    """Why a requirement is not met here, and what to do; two empty strings where it is."""
    from packaging.requirements import InvalidRequirement  # noqa: PLC0415 (most archives name no requirements)

    try:
        requirement = _read(text)
    except InvalidRequirement as error:
        return f'"{text}" is not a requirement: {str(error).splitlines()[0]}', "write it as for pip: timm>=1.0,<2"
    if requirement.url:
        return f"{text}: an address says no version", f"write the package and its versions: {requirement.name}>=1.0"
    if requirement.marker and not requirement.marker.evaluate():
        return "", ""
    version = _installed(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed here", f"install it: pip install '{text}'"
    if not requirement.specifier.contains(version, prereleases=True):
        what = f"{requirement.name} {version} is installed here, and {requirement.specifier} is required"
        return what, f"install another: pip install '{text}'"
    return "", ""


def _read(text: str) -> Requirement:
    from packaging.requirements import Requirement  # noqa: PLC0415

    return Requirement(text)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
