"""Every line that commands write to a terminal goes through `say`, on standard output or standard error.

Names, keys and messages come from files that anybody may have written. What a terminal would act on or hide in them (escape
codes, line ends, marks that reverse the direction) is shown as \\uXXXX, which is also what it is called in JSON.
Invariant: a call with n lines writes n lines, of printable characters.
"""

from __future__ import annotations

import sys

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def say(*lines: str, error: bool = False) -> None:
    """Write lines to standard output, or to standard error."""
    if lines:
        print(*map(printable, lines), sep="\n", file=sys.stderr if error else sys.stdout, flush=True)


def printable(text: str) -> str:
    """The text with everything but printable characters escaped."""
    return text if text.isprintable() else "".join(one if one.isprintable() else _escaped(one) for one in text)


def counted(number: int, one: str, several: str | None = None) -> str:
    """ "1 file", "2,000 files": a number with its noun, and the verb behind it if there is one."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def sized(num_bytes: float) -> str:
    """ "640 B", "1.5 kB", "120 MB": a number of bytes in the unit that it has most of."""
    power = 0
    while num_bytes >= 1000 and power < len(_UNITS) - 1:
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{num_bytes:,.{1 if power and num_bytes < 100 else 0}f} {_UNITS[power]}"


def from_to(low: int, high: int) -> str:
    """ "7", "7 to 11": the whole numbers [low, high)."""
    return f"{low:,}" if high - low == 1 else f"{low:,} to {high - 1:,}"


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
