"""A small S3 server that is far away: it waits before the first byte of each answer and paces each connection.

    with serve_paced(folder, latency_ms=30, mb_per_s=50) as server:   # folder/BUCKET/... are its objects
        os.environ.update(server.env)
    server.cpu_s()                                                    # what it took of a core so far

Reads alone: GET with ranges, HEAD, and lists (version 2). Signatures are not looked at. A process of asyncio: files go out by
sendfile, and the kernel paces (SO_MAX_PACING_RATE, Linux). It takes 0.4 ms of a core for a small request and 6 ms for one of
4 MiB, most of it the loopback's own copying; `python -m benchmarks.paced_s3` measures it here.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

SO_MAX_PACING_RATE = 47
ROOT = Path(__file__).parents[1]
BUCKET = "bench"


@dataclass(frozen=True)
class PacedServer:
    """One that runs."""

    endpoint: str
    pid: int

    @property
    def env(self) -> dict[str, str]:
        """What makes an S3 client use it."""
        keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}
        names = ("AWS_ENDPOINT_URL", "S3_ENDPOINT_URL")  # the second is MosaicML's
        return {**keys, "AWS_DEFAULT_REGION": "us-east-1", **dict.fromkeys(names, self.endpoint)}

    def cpu_s(self) -> float:
        """Seconds of a core that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serve_paced(folder: Path, latency_ms: float, mb_per_s: float) -> Iterator[PacedServer]:
    """Run it until the block ends. `folder` has a folder for each bucket."""
    command = [sys.executable, "-m", "benchmarks.paced_s3", "serve", str(folder), str(latency_ms), str(mb_per_s)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield PacedServer(f"http://127.0.0.1:{int(process.stdout.readline())}", process.pid)
        finally:
            process.kill()


class _Answers:
    """A connection after the other."""

    def __init__(self, folder: Path, latency_s: float, bytes_per_s: int) -> None:
        self._folder, self._latency_s, self._bytes_per_s = folder, latency_s, bytes_per_s

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """All requests of a connection."""
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, self._bytes_per_s)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                await asyncio.sleep(self._latency_s)
                await self._answer(head, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> None:
        method, target, _ = head.split(" ", 2)
        url = urlsplit(target)
        path = self._folder / unquote(url.path).lstrip("/")
        if method not in ("GET", "HEAD") or ".." in path.parts:
            writer.write(_head("405 Method Not Allowed", 0))
        elif "list-type" in (query := parse_qs(url.query)):
            body = _listing(path, query.get("prefix", [""])[0], query.get("delimiter", [""])[0]).encode()
            writer.write(_head("200 OK", len(body), "Content-Type: application/xml") + body)
        elif not path.is_file():
            body = b"<Error><Code>NoSuchKey</Code></Error>"
            writer.write(_head("404 Not Found", len(body), "Content-Type: application/xml") + (body if method == "GET" else b""))
        else:
            await self._object(path, method, re.search(r"(?im)^range:\s*bytes=(\d*)-(\d*)", head), writer)
        await writer.drain()

    async def _object(self, path: Path, method: str, wanted: re.Match[str] | None, writer: asyncio.StreamWriter) -> None:
        status = path.stat()
        first, end, size = 0, status.st_size, status.st_size
        headers = [f'ETag: "{size:x}-{status.st_mtime_ns:x}"', f"Last-Modified: {formatdate(status.st_mtime, usegmt=True)}"]
        if wanted:
            first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            end = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
            if first >= size:
                writer.write(_head("416 Range Not Satisfiable", 0))
                return
            headers.append(f"Content-Range: bytes {first}-{end - 1}/{size}")
        writer.write(_head("206 Partial Content" if wanted else "200 OK", end - first, "Accept-Ranges: bytes", *headers))
        if method == "GET" and end > first:
            await writer.drain()
            with path.open("rb") as file:
                await asyncio.get_running_loop().sendfile(writer.transport, file, first, end - first)


def _head(status: str, length: int, *headers: str) -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", f"Content-Length: {length}", *headers, "", "")).encode()


def _listing(bucket: Path, prefix: str, delimiter: str) -> str:
    """All objects in one answer; with a delimiter the folders below the prefix are one entry each."""
    found, folders = [], set()
    for path in sorted(Path(name) / file for name, _, files in os.walk(bucket / prefix.rpartition("/")[0]) for file in files):
        key = str(path.relative_to(bucket))
        if key.startswith(prefix):
            below = key[len(prefix) :]
            if delimiter and delimiter in below:
                folders.add(prefix + below.partition(delimiter)[0] + delimiter)
                continue
            status = path.stat()
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
            found.append(
                f'<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified><ETag>"{status.st_mtime_ns:x}"</ETag>'
                f"<Size>{status.st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
    found += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)]
    return (
        f"<ListBucketResult><Name>{bucket.name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found)}</KeyCount>"
        f"<MaxKeys>1000000</MaxKeys><IsTruncated>false</IsTruncated>{''.join(found)}</ListBucketResult>"
    )


async def _serve(folder: Path, latency_ms: float, mb_per_s: float) -> None:
    answers = _Answers(folder, latency_ms / 1000, int(mb_per_s * 1e6))
    server = await asyncio.start_server(answers.serve, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


def bare_gets(server: PacedServer, objects: Sequence[tuple[str, int]], in_flight: int = 64, request: int = 4 << 20) -> float:
    """Bytes a second that bare ranged GETs of objects (key, size) reach."""
    import obstore
    from obstore.store import S3Store

    settings: Any = {name.lower(): value for name, value in server.env.items() if name.startswith("AWS")}
    store = S3Store(BUCKET, config=settings, client_options={"allow_http": True})
    ranges = [(key, at, min(at + request, size)) for key, size in objects for at in range(0, size, request)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(in_flight) as pool:
        total = sum(pool.map(lambda one: len(obstore.get_range(store, one[0], start=one[1], end=one[2])), ranges))
    return total / (time.perf_counter() - begun)


def measure_here() -> dict[str, float]:
    """What the server reaches and costs on this machine: one connection, many, and requests of a few bytes."""
    results = {}
    with TemporaryDirectory() as folder:
        (Path(folder) / BUCKET).mkdir()
        with (Path(folder) / BUCKET / "object").open("wb") as file:
            file.truncate(1 << 30)
        with serve_paced(Path(folder), 30, 50) as server:
            for name, size, in_flight, request in (
                ("one connection", 64 << 20, 1, 64 << 20),
                ("64 x 4 MiB", 1 << 30, 64, 4 << 20),
                ("64 x 4 KiB", 16 << 20, 64, 4 << 10),
            ):
                before = server.cpu_s()
                results[f"{name}: MB/s"] = bare_gets(server, [("object", size)], in_flight, request) / 1e6
                results[f"{name}: ms of a core a request"] = 1000 * (server.cpu_s() - before) / (size / request)
    return results


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(_serve(Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
    else:
        print(json.dumps(measure_here(), indent=2))
