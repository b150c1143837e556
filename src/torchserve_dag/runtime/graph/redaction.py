"""The function that `serve: {keep: {redact: NAME}}` names: it takes out of a text what is not to be kept."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.source import CheckError, Source
from torchserve_dag.runtime.project.handler_file import HandlerFile
from torchserve_dag.runtime.project.workflow_file import WorkflowFile

Redact = Callable[[str], str]


def redaction(source: Source[WorkflowFile] | Source[HandlerFile], load: Callable[[], ModuleType]) -> Redact | None:
    """The function, of the module beside the file, which `load` loads; None if the file names none.

    Raises CheckError.
    """
    keep = source.value.serve.keep
    if keep is None or keep.redact is None:
        return None
    name, code = keep.redact, source.path.parent / source.value.code_file
    if not code.is_file():
        raise _error(source, f"there is no {code}", f"write the function {name} there")
    module = load()
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        known = [one for one, value in vars(module).items() if inspect.isfunction(value) and not one.startswith("_")]
        raise _error(source, f'{code} has no function "{name}"', plain.did_you_mean(name, known))
    if not _text_to_text(function):
        raise _error(source, f"{name} does not take a text and give one", f"write def {name}(text: str) -> str")
    return function


def _error(source: Source[Any], what: str, help: str) -> CheckError:  # noqa: A002 (the word that is printed)
    return CheckError([source.problem(("serve", "keep", "redact"), f"serve: keep: redact: {what}", help)])


def _text_to_text(function: Callable[..., Any]) -> bool:
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # noqa: BLE001 (annotations are the user's, and evaluated)
        return False
    (*takes, gives) = [hints.get(name) for name in (*inspect.signature(function).parameters, "return")]
    return takes == [str] and gives is str and not inspect.iscoroutinefunction(function)
