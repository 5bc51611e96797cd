"""What a field has for the codes of an image -> the codes in one line, and the shape that they had. Pure.

    [1, 2, ...]   [[1, 2], [3, 4]]   either's JSON   the bytes of an npy file        -> (N,) codes, (H, W) or whatever it was

Nothing is ever unpickled: what Python's pickle or torch.save wrote can run code when it is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.errors import FormatError, Reject
from wds_tools.format.shard import NPY, OF_OTHERS, parse_npy

Shape = tuple[int, ...]
PICKLED = (".pkl", ".pickle", ".pyd", ".pt", ".pth")
_HOW = "write them with numpy.save(path, codes), as .npy"
_IN_ORDER = 'numpy.save(path, numpy.ascontiguousarray(codes, "<u4")) writes them so'


def flat_and_shape(name: str, value: Any, kinds: str = "iu") -> tuple[NDArray[Any], Shape]:
    """The codes in one line, and their shape without sides of 1 in front.

    Args:
        name: of the field.
        value: what it has.
        kinds: numpy's letters of the numbers that a list may have.

    Raises:
        Reject: "bad_codes": no array of numbers; a pickle.
    """
    if isinstance(value, bytes):
        array = _from_file(name, value)
    else:
        array = _from_list(name, value, kinds)
    shape = array.shape
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    if not array.size:
        raise Reject("bad_codes", f"{name} holds no codes: its shape is {array.shape}")
    return array.reshape(-1), shape


def _from_file(name: str, data: bytes) -> NDArray[Any]:
    if data[:1] == b"\x80" or data[:2] == b"PK":
        kind = "a Python pickle" if data[:1] == b"\x80" else "a zip archive, as numpy.savez and torch.save write"
        raise Reject("bad_codes", f"{name} is {kind}: for safety codes are read from npy files alone; {_HOW}")
    try:
        return parse_npy(data, name, OF_OTHERS)
    except FormatError as error:
        raise Reject("bad_codes", f"{error}; {_IN_ORDER if data.startswith(NPY) else _HOW}") from error


def _from_list(name: str, value: Any, kinds: str) -> NDArray[Any]:
    try:
        array = np.array(orjson.loads(value) if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        array = np.array([""])
    if not isinstance(value, str | list) or array.dtype.kind not in kinds:
        raise Reject("bad_codes", f"{name} is {str(value)[:40]!r}, expected a list of whole numbers, its JSON, or an npy file")
    return array
