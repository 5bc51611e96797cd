"""A job of one's own, through what is public."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import tree

from wds_tools import Sample
from wds_tools.dataset.layout import MANIFEST, OFFSETS, PLAN, TASKS, WORK, marker_name
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.reader import read_shard
from wds_tools.errors import OutOfSpace, Reject, UsageError, WorkerDied
from wds_tools.jobs import Advance, Job, JobOptions, Report, ShardLimits, TaskWriter, run_job
from wds_tools.jobs.job import _RunTask
from wds_tools.run.local import Rest, run_tasks
from wds_tools.run.progress import Progress
from wds_tools.storage import Entry, LocalStore, open_store


def write_words(task: list[str], writer: TaskWriter, report: Report) -> int:
    for number, word in enumerate(task):
        report(Advance(units=len(word)))
        if word:
            writer.add(Sample(key=writer.key(number), data_type="text_pretrain", text=word))
        else:
            writer.reject(Reject("empty_text", "nothing"), source="words", line=number)
    return len(task)


JOB = Job(
    command="words",
    settings={"language": "en"},
    tasks=[["one", "", "two"], ["three"], []],
    work=write_words,
    total=11,
)


def options(folder: Path, *, resume: bool = False, part: str | None = None) -> JobOptions:
    return JobOptions(output=str(folder), quiet=True, max_rejects="50%", resume=resume, part=part)


def test_a_job_of_ones_own_is_a_dataset_and_its_tasks_may_be_empty(tmp_path: Path) -> None:
    manifest = run_job(JOB, options(tmp_path / "out"))
    assert (manifest.inputs, manifest.samples, manifest.rejects) == (4, 3, {"empty_text": 1})
    assert manifest.source["plan"]["command"] == "words"
    store = open_store(str(tmp_path / "out"))
    samples = [sample for shard in manifest.shards for sample in read_shard(store, shard)]
    assert [(sample.key, sample.text) for sample in samples] == [
        ("000000-00000000", "one"),
        ("000000-00000002", "two"),
        ("000001-00000000", "three"),
    ]
    before = tree(tmp_path / "out")
    assert run_job(JOB, options(tmp_path / "out", resume=True)) == manifest
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_lists_the_markers_of_tasks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, resume: bool) -> None:
    if resume:
        run_job(JOB, options(tmp_path / "out", part="0/2"))
    listed: Counter[str] = Counter()
    list_all = LocalStore.list

    def count(store: LocalStore, prefix: str = "") -> Iterator[Entry]:
        listed[prefix] += 1
        return list_all(store, prefix)

    monkeypatch.setattr(LocalStore, "list", count)
    assert run_job(JOB, options(tmp_path / "out", resume=resume)).samples == 3
    assert listed[TASKS] == 1


def test_an_output_that_was_begun_is_taken_up_with_the_spec_that_it_was_begun_with(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    spec = OutputSpec(num_tasks=2, source={"plan": {"command": "x"}}, codes={"vqcode_512": {"tokenizer": "tiny"}}, parts=2)
    with Output(store, spec) as output:
        assert output.begin() is None
        with TaskWriter(store, 1, ShardLimits()) as writer:
            writer.finish(0)
    with Output.begun(store) as again:
        assert again.spec == spec
        with TaskWriter(store, 0, ShardLimits()) as writer:
            writer.finish(0)
        assert again.finish(again.results()).codes == {}
    assert sorted(entry.name for entry in store.list()) == [MANIFEST, OFFSETS]
    other = Output(store, OutputSpec(num_tasks=2, source={"plan": {"command": "y"}}), resume=True)
    with pytest.raises(UsageError, match='command was "x", is now "y"'):
        other.look()


@pytest.mark.parametrize("end", [KeyboardInterrupt(), WorkerDied("killed"), OutOfSpace("full"), ZeroDivisionError()])
def test_looking_at_an_output_writes_nothing_and_a_run_that_ends_before_its_time_leaves_no_lease_and_no_half_file(
    tmp_path: Path, end: BaseException
) -> None:
    store = open_store(str(tmp_path / "out"))
    output = Output(store, OutputSpec(num_tasks=1, source={}))
    assert output.look() is None
    assert not (tmp_path / "out").exists()

    def interrupted() -> None:
        with output:
            output.begin()
            (tmp_path / "out/.tmp").mkdir(exist_ok=True)
            (tmp_path / "out/.tmp/half").write_bytes(b"a shard")
            raise end

    with pytest.raises(type(end)):
        interrupted()
    assert [entry.name for entry in store.list(WORK)] == [PLAN]
    assert not (tmp_path / "out/.tmp/half").exists()


def test_what_the_work_reports_and_its_writer_counts_arrive_together_and_whole(tmp_path: Path) -> None:
    reports: list[Advance] = []
    words = [f"{number}" if number % 3 else "" for number in range(200)]
    done = _RunTask(write_words, str(tmp_path), ShardLimits(), "", {})((0, words), reports.append)
    assert isinstance(done, Rest)
    assert done.finish().inputs == 200
    assert sum(reports, Advance()) == Advance(units=sum(len(str(n)) for n in range(200) if n % 3), samples=133, rejects=67)


def write_one(task: str, writer: TaskWriter, report: Report) -> int:
    writer.add(Sample(key=writer.key(0), data_type="text_pretrain", text=task))
    return 1


def test_where_a_task_can_not_be_published_the_next_one_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalStore.put

    def put_but_the_first(store: LocalStore, name: str, data: bytes) -> None:
        if name == marker_name(0):
            raise OutOfSpace("full")
        put(store, name, data)

    monkeypatch.setattr(LocalStore, "put", put_but_the_first)
    run_task = _RunTask(write_one, str(tmp_path), ShardLimits(), "", {})
    with pytest.raises(OutOfSpace):
        list(run_tasks(run_task, [(0, "a"), (1, "b"), (2, "c")], workers=1, on_report=Progress("x", 3, quiet=True)))
    assert not any(name.startswith(".tmp") for name in tree(tmp_path))
    assert (tmp_path / marker_name(1)).exists()


def count_nothing(task: list[str], writer: TaskWriter, report: Report) -> int:
    writer.count("shortened", 0)
    return 0


def test_what_was_counted_and_is_zero_is_in_the_manifest(tmp_path: Path) -> None:
    manifest = run_job(Job(command="x", settings={}, tasks=[[], []], work=count_nothing, total=0), options(tmp_path / "out"))
    assert manifest.source["counts"] == {"shortened": 0}
