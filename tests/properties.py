"""How many examples the tests of properties try."""

from __future__ import annotations

from hypothesis import settings

SHARE = 3
"""Quick tests try a third of the examples, the same ones in every run; `make test-slow` tries all, and others each time."""


def tries(number: int) -> settings:
    """So many examples in `make test-slow`; tests that say nothing have 100."""
    is_quick = settings.get_current_profile_name() == "quick"
    return settings(max_examples=number // SHARE if is_quick else number)
