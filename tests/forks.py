"""Commands without the seconds that imports take: a process that has imported what commands need forks for each of them.

A command is a process of its own all the same, with its own arguments, environment, folder, output and exit status. It ends as
children of `multiprocessing` do: its threads and exit handlers first, but without taking the heap of torch apart. Cost: 50 ms in
place of 1 s, or 4 s for one that needs torch.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAVY = ("numpy", "orjson", "PIL.Image", "pyarrow.parquet", "torch", "zstandard")

ROOT = Path(__file__).parents[1]
COMMANDS = ROOT / "wds_tools/cli"


class Forks:
    """A process that forks. Not for threads."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, start_new_session=True, bufsize=0)

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def can(self, env: Mapping[str, str]) -> bool:
        """Whether a command with this environment would find what it is to find: some of it is read when Python starts."""
        return _read_at_start(env) == _read_at_start(self._environment)

    def run(self, args: Sequence[str], env: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run `python -m args...` to its end. Raises subprocess.TimeoutExpired."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {"args": list(args), "env": dict(env), "cwd": str(Path.cwd()), "out": str(out), "err": str(err)}
            status = self._ask(json.dumps(request).encode() + b"\n", args, timeout_s)
            return subprocess.CompletedProcess(args, status, out.read_text(), err.read_text())

    def _ask(self, request: bytes, args: Sequence[str], timeout_s: float) -> int:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(request)
            if not select.select([self._process.stdout], [], [], timeout_s)[0]:
                raise subprocess.TimeoutExpired(list(args), timeout_s)
            return int(self._process.stdout.readline())
        except BaseException:  # an answer that nobody took would be the next command's
            with self._process:  # which closes its pipes, and waits for it
                os.killpg(self._process.pid, signal.SIGKILL)
            raise


def _read_at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in env.items()
        if (name.startswith(("PYTHON", "LC_", "OMP_", "LD_")) and name != "PYTHONPATH") or name in ("LANG", "TZ")
    }


def _serve() -> None:
    sys.path[0] = str(ROOT)  # beside this file, tests/loaders would be taken for the package
    gc.disable()  # what is imported is no garbage
    for name in (*HEAVY, *(f"wds_tools.cli.{module.name}" for module in pkgutil.iter_modules([str(COMMANDS)]))):
        importlib.import_module(name)
    gc.enable()
    gc.freeze()  # what a command collects is its own
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            _become(request)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(request: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, path in enumerate((os.devnull, request["out"], request["err"])):
        os.dup2(os.open(path, flags if number else os.O_RDONLY), number)
    found = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [request["cwd"], *found, *(entry for entry in sys.path[1:] if entry not in found)]
    importlib.invalidate_caches()
    module, *rest = request["args"]
    sys.argv = ["", *rest]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(ended.code)


if __name__ == "__main__":
    _serve()
