"""What tells a process from all others, so that what it left behind is known as a dead one's. Only Linux says."""

from __future__ import annotations

import os
from pathlib import Path


def identity(pid: int) -> list[str] | None:
    """The boot of this machine, its namespace of process ids, and when the process began, in ticks since then.

    None where the system does not say, or there is no such process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if status[0] in "ZX" else [boot, namespace, status[19]]


def mark() -> str:
    """This process in a file's name; "" where the system does not say who it is."""
    found = identity(os.getpid())
    return f"{_machine(found)}-{os.getpid()}-{found[2]}" if found else ""


def is_gone(marked: str) -> bool:
    """Whether a name that begins with a mark is of a process of this machine that has ended."""
    here, parts = identity(os.getpid()), marked.split("-")
    if here is None or len(parts) < 3 or parts[0] != _machine(here) or not parts[1].isdecimal():
        return False
    found = identity(int(parts[1]))
    return found is None or found[2] != parts[2]


def _machine(found: list[str]) -> str:
    return f"{found[0][:8]}{found[1].strip('pid:[]')}"
