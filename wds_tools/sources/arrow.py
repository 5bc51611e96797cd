"""pyarrow, which is loaded when a table is read."""

from __future__ import annotations

from typing import Any

from wds_tools.errors import MissingPackage


def load_pyarrow(what: str) -> Any:
    """The package, with pyarrow.parquet.

    Args:
        what: what needs it, for the message: "exporting".

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage(f"{what} needs pyarrow: pip install 'wds-tools[convert]'") from error
    return pyarrow
