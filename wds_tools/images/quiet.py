"""A piece of work in, its result out, and Pillow's warnings neither printed nor raised on the way, in threads too.

Pillow warns about what we decide by ourselves (large sizes, odd TIFF tags, odd APNGs), and under `-W error` such a
warning becomes an exception inside Pillow, which would make the outcome depend on the user's filters. `catch_warnings`
is no way out: it swaps the filters of the whole process and puts old ones back, so two threads undo each other. Here
ONE filter, added by the public `simplefilter` at the first use (never at import) and never taken out, ignores warnings
whose category is a subclass of `_FromOurWork`; and what is a subclass of it is answered per thread: anything while this
thread is at our work, nothing elsewhere. So other threads and other libraries see their warnings as ever, and there is
nothing to restore.

If somebody puts another filter before ours while we work, the worst is one printed warning; if theirs says "error", the
work is begun again with ours in front. Cost: under a microsecond a call.
"""

import threading
import warnings
from collections.abc import Callable
from typing import Final, TypeVar

Result = TypeVar("Result")

_this_thread: Final = threading.local()
_NUM_TRIES: Final = 5


class _AnswersPerThread(type):
    def __subclasscheck__(cls, category: type) -> bool:
        # A ResourceWarning comes from whatever the garbage collector finds during our work: not ours to hide.
        return getattr(_this_thread, "at_work", False) and not issubclass(category, ResourceWarning)


class _FromOurWork(Warning, metaclass=_AnswersPerThread):
    pass


def quietly(work: Callable[[], Result]) -> Result:
    """Run `work` with this thread's warnings ignored, whatever the filters of the process are.

    Args:
        work: called without arguments; more than once only if a warning came out of it as an exception.

    Returns:
        What `work` returns.

    Raises:
        Whatever `work` raises; a Warning only if other code kept making it an error through several tries.
    """
    for attempt in range(_NUM_TRIES):
        if not warnings.filters or warnings.filters[0][2] is not _FromOurWork:
            warnings.simplefilter("ignore", _FromOurWork)  # moves it to the front if it is there already
        _this_thread.at_work = True
        try:
            return work()
        except Warning:
            if attempt == _NUM_TRIES - 1:
                raise
        finally:
            _this_thread.at_work = False
    raise AssertionError("unreachable: the last try returns or raises")
