"""A stand-in for the Hugging Face Hub on loopback: as much of its HTTP as
creating, listing, reading and committing to a repository takes.

It is not the Hub: no Git, no accounts but one token, no Xet storage. What a push leaves here is what its requests said.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

TOKEN = "hf_test_token"  # noqa: S105


@dataclass
class Hub:
    """One repository, and what was done to it."""

    endpoint: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """What the last commit has."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256, committed or not."""
    uploads: list[str] = field(default_factory=list)
    """SHA-256 of each large file that was sent."""
    commits: list[list[str]] = field(default_factory=list)
    """Paths that each commit touched."""
    created: list[dict[str, Any]] = field(default_factory=list)
    reads: list[tuple[str, int]] = field(default_factory=list)
    """Name and bytes of each read of a file, or of a part of one."""
    refuse_after: int | None = None
    """Answer 403 to every upload once so many have come."""


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run it until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, record: Any, status: int = 200) -> None:
        data = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _may(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._body()
        self._answer({"error": "Invalid username or password."}, 401)
        return False

    def do_GET(self) -> None:
        if not self._may():
            return
        path, _, query = unquote(self.path).partition("?")
        if "/tree/" in path:
            folder = "/".join(path.partition("/tree/")[2].split("/")[1:])
            self._answer(_tree(self.state.files, folder, is_deep="recursive=true" in query.lower()))
        elif "/resolve/" in path:
            self._send_file("/".join(path.partition("/resolve/")[2].split("/")[1:]))
        elif re.fullmatch(r"/api/datasets/me/set(/revision/\w+)?", path):
            self._answer({"id": "me/set", "sha": "0" * 40, "siblings": []})
        else:
            self._answer({"error": f"unknown {self.path}"}, 404)

    def _send_file(self, name: str) -> None:
        if (data := self.state.files.get(name)) is None:
            self._answer({"error": "Entry not found"}, 404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first, last = (int(asked[1]), int(asked[2] or len(data))) if asked else (0, len(data))
        part = data[first : last + 1]
        self.state.reads.append((name, len(part)))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def do_PUT(self) -> None:
        data = self._body()
        digest = self.path.rpartition("/")[2]
        if self.state.refuse_after is not None and len(self.state.uploads) >= self.state.refuse_after:
            self._answer({"error": "no"}, 403)
            return
        assert hashlib.sha256(data).hexdigest() == digest
        self.state.objects[digest] = data
        self.state.uploads.append(digest)
        self._answer({})

    def do_POST(self) -> None:
        if not self._may():
            return
        body = self._body()
        if self.path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
            return
        if "/paths-info/" in self.path:
            paths = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            self._answer([_entry(name, self.state.files[name]) for name in paths if name in self.state.files])
            return
        record = json.loads(body)
        if self.path == "/api/repos/create":
            self.state.created.append(record)
            self._answer({"url": f"{self.state.endpoint}/datasets/me/set", "name": "me/set"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular",
                    "shouldIgnore": False,
                }
                for file in record["files"]
            ]
            self._answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._where_to(one) for one in record["objects"]]})
        else:
            self._answer({"error": f"unknown {self.path}"}, 404)

    def _where_to(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.state.objects:
            return one
        return {**one, "actions": {"upload": {"href": f"{self.state.endpoint}/objects/{one['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        touched = []
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "lfsFile":
                    self.state.files[value["path"]] = self.state.objects[value["oid"]]
                case "file":
                    self.state.files[value["path"]] = base64.b64decode(value["content"])
                case "deletedFile":
                    del self.state.files[value["path"]]
                case _:
                    continue
            touched.append(value["path"])
        self.state.commits.append(touched)
        self._answer({"success": True, "commitUrl": f"{self.state.endpoint}/datasets/me/set/commit/0", "commitOid": "0" * 40})


def _tree(files: dict[str, bytes], folder: str, *, is_deep: bool) -> list[dict[str, Any]]:
    """What lies in a folder: files, and, unless all below it is asked for, folders."""
    prefix = f"{folder}/" if folder else ""
    inside = {name: data for name, data in sorted(files.items()) if name.startswith(prefix)}
    if is_deep:
        return [_entry(name, data) for name, data in inside.items()]
    folders = sorted({name[len(prefix) :].partition("/")[0] for name in inside if "/" in name[len(prefix) :]})
    entries = [_entry(name, data) for name, data in inside.items() if "/" not in name[len(prefix) :]]
    return [{"type": "directory", "path": prefix + name, "oid": "0" * 40} for name in folders] + entries


def _entry(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if name.endswith(".parquet"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
