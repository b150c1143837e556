"""A loaded handler's stages: micro-batches overlap, order is kept, and what goes wrong stays with its item."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchserve_dag.runtime.compute.placement import Placement
from torchserve_dag.runtime.handler import Handler
from torchserve_dag.runtime.messages import Failure, InputError
from torchserve_dag.runtime.models.stages import Stages
from torchserve_dag.runtime.project.handler_file import MicroBatch

CPU = Placement(torch.device("cpu"))
WAIT_S = 30.0
"""How long a test waits for what must happen; only a failure waits so long."""

Stage = Callable[[Any], None]


def nothing(_: Any) -> None: ...


@dataclass
class Scripted(Handler[int, int, int, int]):
    """Doubles numbers; what else a stage does is handed in."""

    before: Stage = nothing
    within: Stage = nothing
    after: Stage = nothing
    batches: list[list[int]] = field(default_factory=list)

    def example(self) -> int:
        return 0

    def preprocess(self, item: int) -> int:
        self.before(item)
        return item

    def infer(self, batch: Sequence[int]) -> list[int]:
        self.batches.append(list(batch))
        self.within(batch)
        return [number * 2 for number in batch]

    def postprocess(self, output: int, item: int) -> int:
        assert output == item * 2
        self.after(item)
        return output


Make = Callable[..., Stages]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Stages] = []

    def stages(
        handler: Handler[Any, Any, Any, Any], micro_batch: MicroBatch | None = None, timeout_s: float = WAIT_S
    ) -> Stages:
        made.append(Stages("double", handler, CPU, micro_batch, timeout_s))
        return made[-1]

    yield stages
    for one in made:
        one.close()


def raising(error: Exception, at: int) -> Stage:
    def stage(value: Any) -> None:
        if value == at or (isinstance(value, list) and at in value):
            raise error

    return stage


def test_a_batch_is_answered_in_order(make: Make) -> None:
    handler = Scripted()

    assert make(handler)(range(5)) == [0, 2, 4, 6, 8]
    assert handler.batches == [[0, 1, 2, 3, 4]]


def test_micro_batches_keep_the_order(make: Make) -> None:
    handler = Scripted()
    stages = make(handler, MicroBatch(3, preprocess=4, infer=2, postprocess=4))

    assert stages(range(100)) == [number * 2 for number in range(100)]
    assert sorted(map(len, handler.batches)) == [1] + [3] * 33


def test_no_items_have_no_answers(make: Make) -> None:
    assert make(Scripted())([]) == []
    assert make(Scripted(), MicroBatch(2))([]) == []


def test_the_next_micro_batch_is_prepared_while_one_is_inferred(make: Make) -> None:
    """The first micro-batch's infer waits until the second micro-batch has been prepared."""
    prepared = threading.Event()

    def within(batch: Sequence[int]) -> None:
        assert batch[0] != 0 or prepared.wait(WAIT_S)

    handler = Scripted(before=lambda item: prepared.set() if item == 3 else None, within=within)

    assert make(handler, MicroBatch(2))(range(4)) == [0, 2, 4, 6]


def test_a_micro_batch_is_answered_while_the_next_is_inferred(make: Make) -> None:
    answered = threading.Event()

    def within(batch: Sequence[int]) -> None:
        assert batch[0] != 2 or answered.wait(WAIT_S)

    handler = Scripted(within=within, after=lambda item: answered.set() if item == 1 else None)

    assert make(handler, MicroBatch(2))(range(4)) == [0, 2, 4, 6]


def test_all_three_stages_run_at_the_same_time(make: Make) -> None:
    """Three micro-batches meet, each in another stage."""
    together = threading.Barrier(3, timeout=WAIT_S)

    def meet(micro_batch: int) -> Stage:
        return lambda value: together.wait() * 0 if value in (micro_batch, [micro_batch]) else None  # type: ignore[return-value]

    handler = Scripted(before=meet(2), within=meet(1), after=meet(0))

    assert make(handler, MicroBatch(1))(range(3)) == [0, 2, 4]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_stage_has_as_many_threads_as_are_set_and_no_more(make: Make, threads: int) -> None:
    full = threading.Barrier(threads, timeout=WAIT_S)
    inside, most, lock = [0], [0], threading.Lock()

    def within(_: Any) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        full.wait()  # as many threads as that run at once
        with lock:
            inside[0] -= 1

    make(Scripted(within=within), MicroBatch(1, infer=threads))(range(6))

    assert most == [threads]


def test_several_callers_may_share_one_handler(make: Make) -> None:
    stages = make(Scripted(), MicroBatch(2, 2, 2, 2))
    answers: dict[int, list[Any]] = {}
    callers = [threading.Thread(target=lambda i=i: answers.update({i: stages(range(i, i + 9))})) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT_S)

    assert answers == {i: [2 * n for n in range(i, i + 9)] for i in range(8)}


MICRO_BATCHES = [None, MicroBatch(2), MicroBatch(1, 2, 2, 2)]


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
@pytest.mark.parametrize("stage", ["before", "within", "after"])
def test_an_exception_ends_only_its_own_item(make: Make, stage: str, micro_batch: MicroBatch | None) -> None:
    answers = make(Scripted(**{stage: raising(KeyError("secret"), 3)}), micro_batch)(range(6))

    named = {"before": "preprocess", "within": "infer", "after": "postprocess"}[stage]
    assert [a for a in answers if not isinstance(a, Failure)] == [0, 2, 4, 8, 10]
    assert answers[3] == Failure(500, f"double failed in {named}.", "HandlerError")


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
@pytest.mark.parametrize("stage", ["before", "within", "after"])
def test_an_input_error_keeps_its_status_and_sentence(make: Make, stage: str, micro_batch: MicroBatch | None) -> None:
    answers = make(Scripted(**{stage: raising(InputError("Too long.", 413), 3)}), micro_batch)(range(6))

    assert answers[3] == Failure(413, "Too long.", "InputError")
    assert [a for a in answers if not isinstance(a, Failure)] == [0, 2, 4, 8, 10]


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_a_stage_that_wants_to_end_the_process_ends_only_its_item(make: Make, micro_batch: MicroBatch | None) -> None:
    def leave(item: int) -> None:
        if item == 3:
            raise SystemExit(1)

    answers = make(Scripted(before=leave), micro_batch)(range(6))

    assert answers[3] == Failure(500, "double failed in preprocess.", "HandlerError")
    assert [a for a in answers if not isinstance(a, Failure)] == [0, 2, 4, 8, 10]


def test_a_batch_that_fails_together_is_inferred_item_by_item(make: Make) -> None:
    """As a GPU that is out of memory would: nothing is wrong with any one of them."""

    def within(batch: Sequence[int]) -> None:
        if len(batch) > 1:
            raise RuntimeError("too much at once")

    handler = Scripted(within=within)

    assert make(handler)(range(4)) == [0, 2, 4, 6]
    assert handler.batches == [[0, 1, 2, 3], [0], [1], [2], [3]]


def test_items_that_failed_are_not_inferred(make: Make) -> None:
    handler = Scripted(before=raising(InputError("no"), 1))
    make(handler)(range(3))
    make(Scripted(before=raising(InputError("no"), 1), within=raising(AssertionError("empty batch"), -1)))([1])

    assert handler.batches == [[0, 2]]


class Miscounting(Scripted):
    def infer(self, batch: Sequence[int]) -> list[int]:
        return [*batch, 1]


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_outputs_that_are_not_one_an_item_are_a_failure_of_the_handler(
    make: Make, micro_batch: MicroBatch | None, caplog: pytest.LogCaptureFixture
) -> None:
    answers = make(Miscounting(), micro_batch)(range(4))

    assert {(a.status, a.type) for a in answers} == {(500, "HandlerError")}
    assert "infer gave 2 outputs for 1 items" in caplog.text


class Nothing(Scripted):
    def infer(self, batch: Sequence[int]) -> list[int]:
        return None  # type: ignore[return-value]


def test_an_infer_that_gives_nothing_is_a_failure_of_the_handler(make: Make) -> None:
    assert [a.status for a in make(Nothing())(range(2))] == [500, 500]


def test_infer_runs_without_gradients_in_every_thread(make: Make) -> None:
    seen: list[bool] = []
    make(Scripted(within=lambda _: seen.append(torch.is_inference_mode_enabled())), MicroBatch(1, infer=2))(range(4))

    assert seen == [True] * 4
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("stage", ["before", "within", "after"])
def test_a_stage_that_hangs_costs_its_items_a_504_and_the_others_nothing(make: Make, stage: str) -> None:
    let_go = threading.Event()

    def hang(value: Any) -> None:
        if value in (4, [4, 5]):
            let_go.wait(WAIT_S)

    stages = make(Scripted(**{stage: hang}), MicroBatch(2, 2, 2, 2), timeout_s=1.0)
    begin = time.monotonic()

    answers = stages(range(8))

    assert time.monotonic() - begin < WAIT_S / 2
    assert [a.status if isinstance(a, Failure) else a for a in answers] == [0, 2, 4, 6, 504, 504, 12, 14]
    assert answers[4] == Failure(504, "double took longer than 1 s.", "Timeout")
    let_go.set()
    assert stages(range(4)) == [0, 2, 4, 6]


def test_close_ends_the_threads(make: Make) -> None:
    before = set(threading.enumerate())
    stages = make(Scripted(), MicroBatch(1, 2, 2, 2))
    stages(range(8))
    mine = set(threading.enumerate()) - before
    assert 3 <= len(mine) <= 6  # a pool starts a thread only while none of its own is idle

    stages.close()
    for thread in mine:
        thread.join(WAIT_S)

    assert not any(thread.is_alive() for thread in mine)


def test_close_does_not_leave_a_caller_waiting(make: Make) -> None:
    """What is queued is refused at once; it would otherwise be awaited until its time limit."""
    begun, let_go = threading.Event(), threading.Event()

    def hang(_: Any) -> None:
        begun.set()
        let_go.wait(WAIT_S)

    stages = make(Scripted(before=hang), MicroBatch(1), timeout_s=WAIT_S)
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.extend(stages(range(4))))
    caller.start()
    begun.wait(WAIT_S)
    begin = time.monotonic()
    stages.close()
    let_go.set()
    caller.join(WAIT_S)

    assert time.monotonic() - begin < WAIT_S / 2
    assert len(answers) == 4
    assert {a.status for a in answers} == {503}


def test_the_example_warms_up_alone_and_as_a_full_batch(make: Make) -> None:
    handler = Scripted()
    make(handler).warm_up(4)

    assert handler.batches == [[0], [0, 0, 0, 0]]


def test_a_handler_that_fails_on_its_own_example_is_refused(make: Make) -> None:
    with pytest.raises(RuntimeError, match="double failed on its own example: Bad"):
        make(Scripted(before=raising(InputError("Bad."), 0))).warm_up(1)


outcomes = st.sampled_from(["well", "well", "well", "input", "key", "runtime"])
plans = st.lists(st.tuples(outcomes, outcomes, outcomes), max_size=9)
_SHARED = [
    Stages("double", Scripted(), CPU, m) for m in (None, MicroBatch(1, 2, 2, 2), MicroBatch(2), MicroBatch(3, 2, 1, 2))
]


def fail(outcome: str) -> None:
    if outcome == "input":
        raise InputError("No.", 422)
    if outcome != "well":
        raise {"key": KeyError, "runtime": RuntimeError}[outcome]("surprise")


def naive(plan: list[tuple[str, str, str]]) -> list[Any]:
    """What must come out: each item alone, stage after stage."""
    answers: list[Any] = []
    for i, outcomes_of_one in enumerate(plan):
        answer: Any = i * 2
        for stage, outcome in zip(("preprocess", "infer", "postprocess"), outcomes_of_one, strict=True):
            try:
                fail(outcome)
            except InputError as error:
                answer = Failure(error.status, error.message)
                break
            except (KeyError, RuntimeError):
                answer = Failure(500, f"double failed in {stage}.", "HandlerError")
                break
        answers.append(answer)
    return answers


@given(plans, st.sampled_from(_SHARED))
@settings(max_examples=60)
def test_whatever_fails_wherever_the_answers_are_those_of_a_plain_loop(
    plan: list[tuple[str, str, str]], shared: Stages
) -> None:
    shared.handler = Scripted(
        before=lambda item: fail(plan[item][0]),
        within=lambda batch: [fail(plan[item][1]) for item in batch] and None,
        after=lambda item: fail(plan[item][2]),
    )

    assert shared(range(len(plan))) == naive(plan)
