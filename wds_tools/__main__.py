"""The `wds-tools` process: what it does before a command is loaded and after it has ended. Nothing but the standard library here.

    signals and streams -> main(arguments), in cli/main.py -> what standard output could not take -> exit status

SIGINT, SIGTERM and SIGHUP are one thing, KeyboardInterrupt: whatever cleans up after one of them does so after all. While modules
load nothing is begun, and the process ends at once. One that is ignored from birth (nohup) stays ignored.
Invariant: no traceback tells of a signal or of a stream that nobody reads, and a signal ends the process within seconds.
"""

from __future__ import annotations

import io
import os
import sys
import time

try:
    import signal
except KeyboardInterrupt:  # Ctrl-C before anybody listens
    os._exit(130)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from sys import UnraisableHookArgs
    from threading import Event
    from types import FrameType
    from typing import NoReturn

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE_S = 20.0
"""For clearing up. Who sends SIGTERM sends SIGKILL after 30 s, most often."""
_LEAVE_S = 2.0
_AGAIN_S = 0.01
_stops: list[int] = []
"""Those that came."""


class _Stream(io.FileIO):
    """Standard output or standard error. What it can't take is dropped, and why is kept: a run does not fail for its messages."""

    failure: OSError | None = None

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return len(data)


def start() -> int:
    """Run the command line of this process; returns the exit status."""
    handled = [number for number in _STOPS if signal.getsignal(number) != signal.SIG_IGN]
    _listen(handled, _end)
    out, error = _open(1), _open(2)
    encoding = getattr(sys.stdout or sys.stderr, "encoding", None)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(out), encoding, "backslashreplace", line_buffering=out.isatty())
    sys.stderr = io.TextIOWrapper(error, encoding, "backslashreplace", write_through=True)

    from threading import Event, Thread, Timer, get_ident

    from wds_tools.cli.main import main
    from wds_tools.terminal import say

    over = Event()
    report = sys.unraisablehook

    def unheard(raised: UnraisableHookArgs) -> None:
        """A signal that comes while a finaliser runs, or whatever else C calls, is lost in there: it is sent once more."""
        if not isinstance(raised.exc_value, KeyboardInterrupt):
            report(raised)
        elif _stops and not over.is_set():
            signal.signal(_stops[0], _stop)
            Timer(_AGAIN_S, signal.pthread_kill, (get_ident(), _stops[0])).start()

    def begin() -> None:
        sys.unraisablehook = unheard
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        Thread(target=_see_to_the_end, args=(told, over), daemon=True).start()
        _listen(handled, _stop)

    try:
        try:
            status = main(begin=begin, stops=_stops)
        except SystemExit as ended:  # --help
            status = int(ended.code or 0)
        if _stops:
            _free_leases()  # the signal may have come in the midst of that
        over.set()
        _listen((number for number in handled if signal.getsignal(number) is _stop), _end)
    except KeyboardInterrupt:  # at the end of all, or once more, in the midst of saying so
        _end(_stops[-1] if _stops else signal.SIGINT, None)
    sys.stdout.flush()
    if out.failure is None:
        return status
    if not isinstance(out.failure, BrokenPipeError):  # then whoever read it has left, as in `wds-tools ... | head -1`
        say(f"wds-tools: can't write to standard output: {out.failure.strerror}", error=True)
    return status or 1


def _open(descriptor: int) -> _Stream:
    try:
        os.fstat(descriptor)
    except OSError:  # closed: nothing else may take its number
        os.dup2(os.open(os.devnull, os.O_RDONLY), descriptor)
    return _Stream(descriptor, "w", closefd=False)


def _listen(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], NoReturn]) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _see_to_the_end(told: int, over: Event) -> None:
    """A thread that hears of signals at once, also while the main thread waits for a server that is silent, or for C that does
    not end, and does not hear. Then this one clears up: no lease stays behind."""
    while (number := os.read(told, 1)[0]) not in _STOPS:
        pass
    if not over.wait(_PATIENCE_S):
        from threading import Timer

        Timer(_LEAVE_S, _end, (number, None)).start()  # should the store be silent
        _free_leases()
        _end(number, None)
    time.sleep(_LEAVE_S)  # for threads that the interpreter waits for
    os._exit(128 + number)


def _free_leases() -> None:
    if lease := sys.modules.get("wds_tools.dataset.lease"):  # else nothing has been written
        lease.free_leases()


def _end(number: int, _: FrameType | None) -> NoReturn:
    """Before a command has begun and after it has ended: an exception could come out of any import as something else."""
    try:
        os.write(2, f"wds-tools: stopped by {signal.Signals(number).name}\n".encode())
    finally:
        os._exit(128 + number)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """The first one ends the command. SIGTERM is often sent twice, and cleaning up is under way then; Ctrl-C breaks that off."""
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    _stops.append(number)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(start())
