"""`run_tasks`: results, reports and errors come through, in this process or from workers, and no worker is left behind."""

from __future__ import annotations

import multiprocessing
import operator
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
from commands import environment, session, wait_until

import wds_tools
from wds_tools.errors import MissingPackage, NotFound, OutOfSpace, Reject, TokenizerError, UsageError, WorkerDied
from wds_tools.run.local import MOST_RESTS, Report, Rest, run_tasks
from wds_tools.run.progress import Advance

SERIAL_AND_PARALLEL = pytest.mark.parametrize("workers", [1, 2])
ERRORS: dict[str, Exception] = {
    "usage": UsageError("wrong"),
    "not found": NotFound("gone"),
    "full": OutOfSpace("full"),
    "tokenizer": TokenizerError("weights"),
    "reject": Reject("bad_json", "broken"),
    "package": MissingPackage("pip install it"),
    "foreign": ZeroDivisionError("division"),
}


def square(task: int, report: Report) -> int:
    report(Advance(units=1, samples=task))
    return task * task


def fail(task: str, report: Report) -> int:
    if task in ERRORS:
        raise ERRORS[task]
    return len(task)


def die(task: int, report: Report) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def sleep(task: float, report: Report) -> float:
    time.sleep(task)
    return task


def chatter(task: int, report: Report) -> int:
    for _ in range(task):
        report(Advance(units=1, samples=1))
    return os.getpid()


def rests(task: int, report: Report) -> tuple[int, int] | Rest[tuple[int, int]]:
    """A task whose rest ends when as many more have begun in this process as may, or after a while."""
    begun.append(task)

    def finish() -> tuple[int, int]:
        place, until = begun.index(task) + 1 + MOST_RESTS, time.monotonic() + 0.5
        while len(begun) < place and time.monotonic() < until:
            time.sleep(0.01)
        return task, len(begun) - begun.index(task) - 1

    return Rest(finish)


def rest_fails(task: int, report: Report) -> int | Rest[int]:
    return Rest(partial(operator.floordiv, 7, task))


begun: list[int] = []


def silent(new: Advance) -> None:
    pass


OTHERS = set(multiprocessing.active_children())
"""Children of this process when this file begins: those of other tests."""


def no_children_left() -> None:
    wait_until(lambda: OTHERS.issuperset(multiprocessing.active_children()), "no worker is left")


@SERIAL_AND_PARALLEL
def test_every_task_gives_its_result_once(workers: int) -> None:
    seen: list[Advance] = []
    results = list(run_tasks(square, range(20), workers=workers, on_report=seen.append))
    assert sorted(results) == [n * n for n in range(20)]
    assert sorted(seen, key=lambda new: new.samples) == [Advance(units=1, samples=n) for n in range(20)]
    no_children_left()


@SERIAL_AND_PARALLEL
def test_no_tasks_are_no_work(workers: int) -> None:
    assert list(run_tasks(square, [], workers=workers, on_report=silent)) == []


@pytest.mark.slow
def test_more_reports_than_a_pipe_holds_neither_block_nor_get_lost() -> None:
    seen: list[Advance] = []
    pids = set(run_tasks(chatter, [20_000] * 3, workers=3, on_report=seen.append))
    assert sum(seen, Advance()) == Advance(units=60_000, samples=60_000)
    assert os.getpid() not in pids


@pytest.mark.parametrize(
    ("workers", "kind"),
    [
        *((1, kind) for kind in ERRORS),
        *((2, kind) for kind in ("package", "foreign")),
        *(pytest.param(2, kind, marks=pytest.mark.slow) for kind in ERRORS if kind not in ("package", "foreign")),
    ],
)
def test_an_error_comes_through_with_its_type_and_words(workers: int, kind: str) -> None:
    error = ERRORS[kind]
    with pytest.raises(type(error)) as caught:
        list(run_tasks(fail, ["fine", kind, "also fine"], workers=workers, on_report=silent))
    assert str(caught.value) == str(error)
    assert caught.value.args == error.args
    no_children_left()


@SERIAL_AND_PARALLEL
def test_the_rest_of_a_task_is_done_while_the_next_ones_begin_and_no_result_is_lost(workers: int) -> None:
    begun.clear()
    found = dict(run_tasks(rests, range(7), workers=workers, on_report=silent))
    assert sorted(found) == [*range(7)]
    assert 2 <= max(found.values()) <= MOST_RESTS  # that had begun by then
    no_children_left()


@SERIAL_AND_PARALLEL
@pytest.mark.parametrize("tasks", [[3, 0, 2], [2, 3, 0]])
def test_an_error_in_the_rest_of_a_task_comes_through(workers: int, tasks: list[int]) -> None:
    with pytest.raises(ZeroDivisionError):
        list(run_tasks(rest_fails, tasks, workers=workers, on_report=silent))
    no_children_left()


def test_an_error_does_not_wait_for_the_other_tasks() -> None:
    begun = time.monotonic()
    with pytest.raises(TypeError):
        list(run_tasks(sleep, ["not a number", 60.0, 60.0], workers=2, on_report=silent))  # type: ignore[arg-type]
    assert time.monotonic() - begun < 30
    no_children_left()


def test_a_killed_worker_is_said_so_and_nothing_hangs() -> None:
    with pytest.raises(WorkerDied, match="killed, or memory ran out"):
        list(run_tasks(die, range(8), workers=2, on_report=silent))
    no_children_left()


def test_whoever_stops_taking_results_leaves_no_worker_behind() -> None:
    results = run_tasks(sleep, [0.0, 60.0, 60.0], workers=2, on_report=silent)
    assert next(results) == 0.0
    results.close()
    no_children_left()


PARENT = """
    import sys, time
    sys.path[:0] = {paths!r}
    from test_run import silent, sleep
    from wds_tools.run.local import run_tasks

    if __name__ == "__main__":
        for result in run_tasks(sleep, [0.0, 600.0, 600.0], workers=2, on_report=silent):
            print(result, flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_die_with_their_parent_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT).format(paths=[str(folder) for folder in Path(__file__).parents[:2]]))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"0.0\n"
        assert session(process.pid)
        process.send_signal(how)
        process.wait(30)
        wait_until(lambda: not session(process.pid), "the workers are gone")


def test_whoever_loops_over_tasks_closes_them() -> None:
    """An interrupt in the loop's own lines would leave the processes at work behind whatever is cleared up."""
    lines = [line for path in Path(wds_tools.__file__).parent.rglob("*.py") for line in path.read_text().splitlines()]
    calls = [line.strip() for line in lines if re.search(r"(?<!def )\brun_tasks\(", line) and "`" not in line]
    assert len(calls) > 6
    assert [call for call in calls if "closing(run_tasks(" not in call] == [
        "finished = run_tasks(run_task, todo, workers=options.workers, on_report=report)"  # closed where both ways meet
    ]
