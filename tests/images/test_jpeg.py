"""A JPEG that lacks blocks is found, whatever stands in their place; a whole one never is, and gives the pixels it always did."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from commands import SHARED
from PIL import Image

from wds_tools.errors import Reject
from wds_tools.images import ImageLimits, decode_rgb

KINDS: list[dict[str, Any]] = [
    {},
    {"progressive": True},
    {"optimize": True},
    {"subsampling": 0, "quality": 95},
    {"subsampling": 1},
    {"quality": 100, "subsampling": 0, "progressive": True},
    {"quality": 20, "optimize": True},
    {"restart_marker_rows": 1},
    {"restart_marker_blocks": 3},
]
MODES = ("RGB", "L", "CMYK")
PARTS = (0.1, 0.25, 0.5, 0.75, 0.95)


def pictures() -> dict[str, Image.Image]:
    """A photograph's like, a page with an empty lower half, a slope, and single colours, the gray of libjpeg's filling too."""
    rng = np.random.default_rng(5)
    page_HWC = np.full((150, 130, 3), 128, np.uint8)
    page_HWC[10:60, 5:100] = (rng.random((50, 95, 1)) > 0.8) * 255
    return {
        "photo": Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((237, 181)),
        "page": Image.fromarray(page_HWC),
        "slope": Image.fromarray(np.tile(np.linspace(0, 255, 200).astype(np.uint8), (120, 1))).convert("RGB"),
        **{f"level {level}": Image.new("RGB", (level + 20, 99), (level,) * 3) for level in (0, 127, 128, 255)},
    }


def encoded(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def files(*names: str) -> Iterator[tuple[str, bytes]]:
    for name, image in pictures().items():
        if not names or name in names:
            for kind in KINDS:
                for mode in MODES:
                    yield f"{name} {mode} {kind}", encoded(image.convert(mode), **kind)


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def is_whole(data: bytes) -> bool:
    try:
        decode_rgb(data, ImageLimits(min_side=1))
    except Reject as cause:
        if cause.reason not in ("truncated_image", "corrupt_image"):
            raise
        return False
    return True


def test_no_whole_file_is_taken_for_a_cut_one_and_its_pixels_are_those_of_pillow() -> None:
    count = 0
    for name, data in files():
        assert decode_rgb(data).tobytes() == pixels(data), name
        count += 1
    assert count == 189


def test_neither_are_files_with_padding_or_more_data_behind_or_before_their_end_marker() -> None:
    for name, data in files("photo", "page"):
        scan, end = data[:-2], data[-2:]
        for odd in (data + bytes(3000), data + b"trailer" * 50, data + data, scan + bytes(40) + end, scan + b"\xff" * 9 + end):
            assert decode_rgb(odd).tobytes() == pixels(data), name


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not beside this checkout")
def test_of_the_real_photographs_none_is_taken_for_a_cut_one() -> None:
    paths = [path for path in sorted((SHARED / "pairs").rglob("*.jp*g"))[::2] if path.stat().st_size < 200_000]
    assert len(paths) > 40
    assert [path.name for path in paths if not is_whole(path.read_bytes())] == []


IN_PLACE: dict[str, Callable[[int], bytes]] = {
    "an end marker": lambda _: b"\xff\xd9",
    "zeros and an end marker": lambda num_lost: bytes(num_lost) + b"\xff\xd9",
    "zeros": lambda num_lost: bytes(num_lost + 2),
    "an end marker and zeros": lambda num_lost: b"\xff\xd9" + bytes(num_lost),
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_files_whose_scan_is_cut_are_found_whatever_stands_in_its_place(what: str) -> None:
    missed, count = [], 0
    for name, data in files("photo", "page"):
        begin = data.index(b"\xff\xda")
        scan = data[begin:-2]
        for part in PARTS:
            kept = 14 + int((len(scan) - 14) * part)
            count += 1
            if is_whole(data[:begin] + scan[:kept] + IN_PLACE[what](len(scan) - kept)):
                missed.append(f"{name} {part}")
    assert len(missed) <= count // 100, missed


def test_a_progressive_file_without_its_last_scans_is_found() -> None:
    data = encoded(pictures()["photo"], progressive=True)
    starts = [offset for offset in range(len(data)) if data.startswith(b"\xff\xc4", offset)]
    for start in starts[2:]:
        assert not is_whole(data[:start] + b"\xff\xd9")
