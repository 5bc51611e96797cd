"""The one error tree. Whatever goes wrong for a reason a user can act on is one of these; anything else is our bug.

    WdsToolsError
    ├── UsageError           the caller's mistake: an argument, a setting, an output that is in the way  (a ValueError)
    ├── DataError            what was read is not what it says it is                                     (a ValueError)
    │   ├── FormatError      a tar, index, manifest or member that breaks the format
    │   └── Reject           one record or image that can't be used; has a `reason`, is counted, never fatal alone
    ├── TooManyRejects       more records were rejected than --max-rejects allows
    ├── TokenizerError       weights that are missing, unsafe, or do not fit their configuration
    ├── StorageError         a path or URL that can't be listed, read or written                          (an OSError)
    │   ├── NotFound         nothing there
    │   └── OutOfSpace       the disk or the quota is full
    ├── WorkerDied           a worker process ended without a word (killed, out of memory), or gives none for too long
    ├── TransformError       the caller's own code in a loader, transform or collate, raised or gave what is no batch
    └── MissingPackage       an optional package is needed; the message has the pip line                  (an ImportError)

A message says what, got, expected, where (shard, key, byte) and what to do, in one line. Foreign exceptions are translated
where they enter (`storage` for I/O, `images` for Pillow, `vq` for torch) with `raise … from`.
"""

import difflib
from collections.abc import Iterable


class WdsToolsError(Exception):
    """Base of everything this project raises on purpose."""


class UsageError(WdsToolsError, ValueError):
    """The caller's mistake: an argument, a setting, or an output that is in the way."""


class DataError(WdsToolsError, ValueError):
    """What was read is not what it says it is."""


class FormatError(DataError):
    """A tar, an index, a manifest or a member breaks the format."""


class Reject(DataError):
    """One record that can't be used.

    Args:
        reason: a short word from a fixed vocabulary, counted in the manifest ("bad_json", "truncated_image", ...).
        detail: one line for a person: what was found and what was expected.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class TooManyRejects(WdsToolsError):
    """More records were rejected than the run allows."""


class TokenizerError(WdsToolsError):
    """Weights that are missing, unsafe to load, or do not fit their configuration."""


class StorageError(WdsToolsError, OSError):
    """A path or URL that can't be listed, read or written."""


class NotFound(StorageError):
    """Nothing exists at this path or URL."""


class OutOfSpace(StorageError):
    """The disk, or the quota, is full."""


class WorkerDied(WdsToolsError):
    """A worker process ended without a word, or gives none for too long."""


class TransformError(WdsToolsError):
    """The caller's own code in a loader raised, or gave something else than was expected."""


class MissingPackage(WdsToolsError, ImportError):
    """An optional package is needed for this; the message has the pip line that brings it."""


def in_one_line(error: BaseException) -> str:
    """The error's type, and the first 200 characters of its message.

    Args:
        error: any.
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def meant(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """A hint for a message about a word that is not known.

    Args:
        word: the word.
        known: those that are.
        likeness: how like one of them it has to be, 0 to 1.

    Returns:
        "did you mean X? "; "" if none of them is like it.
    """
    return "".join(f"did you mean {close}? " for close in difflib.get_close_matches(word, list(known), 1, likeness))
