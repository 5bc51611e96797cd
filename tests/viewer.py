"""The viewer as tests start and ask it, and a dataset with everything in it, hostile words too."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from commands import image_bytes
from factory import image_sample, multi_sample, text_sample

from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.errors import Reject
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store
from wds_tools.view.server import ViewConfig, ViewServer

TINY = {"tokenizer": "tiny", "codebook_size": 4096, "precision": "fp32"}
CODES = {"vqcode_512": TINY, "vqcode_multi768": TINY}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> ../../etc/passwd"


def small_codes(sample: Sample) -> Sample:
    """With codes that the bundled tokenizer has."""
    return sample._replace(codes={column: grid % 4096 for column, grid in sample.codes.items()})


def conversation(number: int) -> Sample:
    turns = [
        {"from": "human", "value": f"<image>\nWhat is number {number}? {HOSTILE}"},
        {"from": "gpt", "value": f"Answer {number}"},
    ]
    return Sample(
        key=f"talk-{number:08d}",
        data_type="visual_sft",
        text="",
        conversations=turns,
        image=image_bytes(number),
        image_extension="jpg",
    )


def samples() -> list[Sample]:
    pairs = [
        small_codes(image_sample(number, side=8))._replace(image=image_bytes(number), image_extension="jpg")
        for number in range(30)
    ]
    pairs[7] = pairs[7]._replace(text=HOSTILE, provenance={"url": "javascript:alert(3)", "deep": {"a": [1]}})
    return [
        *pairs,
        *(small_codes(multi_sample(number)) for number in range(10)),
        *(conversation(number) for number in range(5)),
        *(text_sample(number, f"document {number} " + "words " * (number * 20)) for number in range(25)),
    ]


def write_set(folder: Path) -> Path:
    """70 samples of every kind in shards of 15, and 12 rejects."""
    store = open_store(str(folder))
    output = Output(store, OutputSpec(num_tasks=1, source={"command": "test"}, codes=CODES))
    output.begin()
    with TaskWriter(store, 0, ShardLimits(samples=15)) as writer:
        for sample in samples():
            writer.add(sample)
        for number in range(12):
            reason = "bad_json" if number % 3 else "empty_text"
            writer.reject(Reject(reason, f"broken {number} {HOSTILE}"), source="a.jsonl", line=number)
        writer.finish(len(samples()) + 12)
    output.finish(output.results())
    return folder


@contextmanager
def serving(folder: Path | str, **config: Any) -> Iterator[ViewServer]:
    server = ViewServer(ViewConfig(input=str(folder), port=0, **config))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})  # else ending it takes half a second
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(
    server: ViewServer, path: str, *, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """A request as it is written here: nothing is normalised."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    sent = {"Host": f"127.0.0.1:{server.server_address[1]}"} | (headers or {})
    connection.putrequest(method, path, skip_host=True)
    for name, value in sent.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def ask(server: ViewServer, path: str, status: int = 200) -> Any:
    found, _, body = fetch(server, path)
    assert found == status, body
    return json.loads(body)
