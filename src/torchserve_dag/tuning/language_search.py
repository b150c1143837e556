"""Search the settings with which a language model writes fastest, while long prompts hold nobody up."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.server import json_module
from torchserve_dag.tuning.language_trial import LanguageMeasured, LanguageTask
from torchserve_dag.tuning.search import TRIAL_LIMIT_S, WORTH_IT, TrialError

MOST_CONTEXT = 8192
"""The context of a model whose settings name none; see LanguageSettings.context."""
DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in dataclasses.fields(LanguageSettings)}

MeasureLanguage = Callable[[LanguageTask], LanguageMeasured]


@dataclass(frozen=True, slots=True)
class LanguageTrial:
    """The result of one set of settings."""

    settings: dict[str, Any]
    measured: LanguageMeasured | None
    failed: str = ""

    def setting(self, key: str) -> Any:
        """The value of a setting, or its default."""
        return self.settings.get(key, DEFAULTS[key])

    @property
    def tokens_per_s(self) -> float:
        """With as many clients as it writes most for."""
        return max(self.measured.tokens_per_s.values()) if self.measured else 0.0


def search_language(
    task: LanguageTask, cores: int, gap_ms: float, measure: MeasureLanguage | None = None
) -> Iterator[LanguageTrial]:
    """Run trials: first with the file's own settings, then for `prefill_tokens`, for `threads` with the best of those,
    and for `room` with the best of these.

    Raises TrialError if the file's own settings fail. `best_language` chooses from the trials.
    """
    measure = measure or _in_own_process
    trials = [LanguageTrial(task.settings, measure(task))]
    yield trials[0]
    for key, values in {"prefill_tokens": (32, 64, 256, 512), "threads": _threads(cores), "room": (8, 16, 32)}.items():
        start = best_language(trials, gap_ms)
        for value in values:
            if value == (start.setting(key) or cores):
                continue
            settings = start.settings | {key: value}
            try:
                trials.append(LanguageTrial(settings, measure(replace(task, settings=settings))))
            except TrialError as error:
                trials.append(LanguageTrial(settings, None, str(error)))
            yield trials[-1]


def best_language(trials: list[LanguageTrial], gap_ms: float) -> LanguageTrial:
    """Of the trials whose pauses are no longer than `gap_ms`, or else of that with the shortest, those that write
    fastest; of about equally fast ones, that which reads a long prompt soonest; of several of these, the first.
    """
    measured = [(trial, trial.measured) for trial in trials if trial.measured]
    shortest = min(found.gap_ms for _, found in measured)
    smooth = [(trial, found) for trial, found in measured if found.gap_ms <= max(gap_ms, shortest)]
    most = max(trial.tokens_per_s for trial, _ in smooth)
    fast = [(trial, found) for trial, found in smooth if trial.tokens_per_s * WORTH_IT >= most]
    soonest = min(found.long_first_ms for _, found in fast)
    return next(trial for trial, found in fast if found.long_first_ms <= soonest * WORTH_IT)


def cache_gb(trial: LanguageTrial, memory_gb: float | None = None) -> int | None:
    """The cache, in whole GB, that holds all tokens which may be in progress, at most half of the machine's memory.

    None where the engine does not tell how full its cache is.
    """
    if trial.measured is None or not trial.measured.cache_tokens:
        return None
    if memory_gb is None:
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    tokens_per_gb: float = trial.measured.cache_tokens / max(1, round(trial.setting("cache_gb")))
    context = trial.setting("context") or MOST_CONTEXT
    fits: int = trial.setting("room") * context
    in_progress = min(fits, trial.setting("tokens_in_flight") or fits)
    needed = math.ceil(in_progress / tokens_per_gb)
    return max(1, min(needed, int(memory_gb / 2)))


def _threads(cores: int) -> list[int]:
    return sorted({max(1, cores // 4), max(1, cores // 2), cores})


def _in_own_process(task: LanguageTask) -> LanguageMeasured:
    """Raises TrialError."""
    try:
        return json_module.call("torchserve_dag.tuning.language_trial", task, LanguageMeasured, TRIAL_LIMIT_S)
    except json_module.ModuleFailedError as error:
        raise TrialError(str(error)) from None
