"""The seven columns of Liquid's tables, in which `export hf` writes and `convert hf` reads; the package for such files.

All are strings, but for `length`; what a sample does not have is ABSENT; codes are a JSON list in a string. The only module that
imports pyarrow, and only when it is used.
"""

from __future__ import annotations

from typing import Any

from wds_tools.errors import MissingPackage

COLUMNS = {
    "data_type": "string",
    "text": "string",
    "length": "int64",
    "vqcode_512": "string",
    "vqcode_multi768": "string",
    "width": "string",
    "height": "string",
}
"""Name -> Arrow type, in order."""
ABSENT = "no"


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
