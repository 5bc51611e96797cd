"""`convert coded`: codes that other tools wrote, in fields of any name or in npy files, get their grid back or are rejects."""

from __future__ import annotations

import io
import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import read_rejects, read_samples, write_jsonl
from factory import random_codes
from hypothesis import given
from hypothesis import strategies as st

from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.convert import run_conversion
from wds_tools.convert.coded import CodedConfig
from wds_tools.errors import Reject, UsageError
from wds_tools.format.codes import CodeGrid
from wds_tools.format.manifest import Manifest, code_layouts
from wds_tools.format.schema import Sample, validate

Row = dict[str, Any]
SQUARE = random_codes(1, 32, 32)
WIDE = random_codes(2, 2, 6)


def npy(array: Any, dtype: str = "<i8") -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(array).astype(dtype))
    return out.getvalue()


def sample_of(row: Row, **options: Any) -> Sample:
    converter = CodedConfig(input=("in",), output="out", **options).make_converter()
    sample = converter.convert("a", row, "in/rows.jsonl")
    validate(sample)
    return sample


def reason(row: Row, **options: Any) -> str:
    with pytest.raises(Reject) as caught:
        sample_of(row, **options)
    return f"{caught.value.reason}: {caught.value.detail}"


@pytest.mark.parametrize(
    "codes",
    [
        {"vq_code": SQUARE.ravel().tolist(), "data_type": "image_text"},
        {"vq_code": json.dumps(SQUARE.ravel().tolist()), "length": 1, "vqcode_multi768": "no"},
        {"vqcode_512": json.dumps(SQUARE.ravel().tolist())},
        {"codes": SQUARE.tolist()},
        {"npy": npy(SQUARE[None], "<u2"), "width": 900, "height": 300},
        {"npy": npy(SQUARE.reshape(1, 1, -1)), "width": "512", "height": "512"},
    ],
    ids=lambda row: ", ".join(row),
)
def test_codes_of_512_pixels_are_found_in_any_field_and_form(codes: Row) -> None:
    sample = sample_of({"text": "a dog", **codes})
    assert (sample.data_type, sample.text, sample.width, list(sample.codes)) == ("image_text", "a dog", None, ["vqcode_512"])
    assert np.array_equal(sample.codes["vqcode_512"], SQUARE)


@pytest.mark.parametrize(
    ("codes", "options"),
    [
        ({"codes": WIDE.tolist()}, {}),
        ({"npy": npy(WIDE, "|i1" if WIDE.max() < 128 else "<i4")}, {}),
        ({"vq_code": WIDE.ravel().tolist(), "width": 96, "height": "32"}, {}),
        ({"vq_code": WIDE.ravel().tolist()}, {"grid": (2, 6)}),
        ({"vq_code": [WIDE.ravel().tolist()]}, {"grid": (2, 6)}),
        ({"npy": npy([WIDE.ravel() * 0, WIDE.ravel()])}, {"grid": (2, 6), "crop": 1}),
        ({"npy": npy([1]), "latents": npy(WIDE)}, {"codes": "latents"}),
    ],
    ids=str,
)
def test_another_grid_comes_from_the_array_the_size_or_the_option(codes: Row, options: Row) -> None:
    sample = sample_of({"text": "a dog", **codes}, **options)
    assert (sample.data_type, sample.width, sample.height) == ("image_text_multi", 96, 32)
    assert np.array_equal(sample.codes["vqcode_multi768"], WIDE)


LINE = random_codes(3, 1, 32)[0]
SEVERAL = np.stack([WIDE % 64] * 4, -1)


@pytest.mark.parametrize(
    ("codes", "layout", "expected"),
    [
        ({"vq_code": LINE.tolist()}, "n", LINE),
        ({"npy": npy(LINE[None])}, "n", LINE),
        ({"vqcode_512": json.dumps(LINE.tolist())}, "n", LINE),
        ({"npy": npy(SEVERAL)}, "hwk", SEVERAL),
        ({"codes": SEVERAL[:1].tolist()}, "hwk", SEVERAL[:1]),
    ],
    ids=str,
)
def test_codes_in_one_dimension_and_of_several_codebooks_keep_their_layout(codes: Row, layout: str, expected: Any) -> None:
    config = CodedConfig(input=("in",), output="out", layout=layout, mode="cc256")
    sample = config.make_converter().convert("a", {"text": "a dog", **codes}, "in/rows.jsonl")
    validate(sample, code_layouts(config.code_columns(())))
    assert (sample.data_type, sample.width, list(sample.codes)) == ("image_text", None, ["vqcode_256"])
    assert np.array_equal(sample.codes["vqcode_256"], expected)
    made = config.code_columns(())["vqcode_256"]
    assert (made["layout"], made["stride"]) == (layout, 16 if layout == "hwk" else None)


def test_titok_like_rows_are_a_dataset_that_says_its_layout(tmp_path: Path) -> None:
    rows = [{"text": "a", "vq_code": LINE.tolist()}, {"text": "b", "vq_code": SQUARE.tolist()}, {"text": "c", "vq_code": [9999]}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    options: Row = {"tokenizer": "titok", "layout": "n", "mode": "cc256", "max_rejects": "100%", "quiet": True}
    manifest = run_conversion(CodedConfig(input=(str(source),), output=str(tmp_path / "out"), **options))
    assert (manifest.samples, manifest.rejects, manifest.schema_version) == (1, {"bad_codes": 2}, 2)
    assert manifest.layouts == {"vqcode_256": CodeGrid(layout="n", codebook_size=8192)}
    assert "has the shape (32, 32), expected the axes number" in read_rejects(tmp_path / "out")[0]["detail"]
    assert verify(VerifyConfig(input=str(tmp_path / "out"), quiet=True)).problems == ()


TALK = {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]}


def test_a_conversation_may_have_its_codes_in_such_a_field_too() -> None:
    row = {"data_type": "visual_sft", "text": json.dumps(TALK), "vq_code": SQUARE.ravel().tolist()}
    assert np.array_equal(sample_of(row).codes["vqcode_512"], SQUARE)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"npy": pickle.dumps(SQUARE)}, {}, "bad_codes: npy is a Python pickle: for safety"),
        ({"pkl": pickle.dumps(Evil())}, {}, "bad_codes: pkl is a Python pickle: for safety codes are read from npy files alone"),
        ({"pth": b"PK\3\4"}, {}, "bad_codes: pth is a zip archive, as numpy.savez and torch.save write"),
        ({"npy": npy(SQUARE, "<f4")}, {}, "bad_codes: npy: expected little-endian integers in C order, got '<f4'"),
        ({"npy": npy(SQUARE)[:-1]}, {}, "bad_codes: npy: 8191 bytes of data"),
        ({"npy": npy(SQUARE).replace(b"(32, 32)", b"(1<<9,)")}, {}, "bad_codes: npy: unreadable npy header"),
        ({"npy": b"\xff\xd8\xff"}, {}, "bad_codes: npy: not an npy file; write them with numpy.save"),
        ({"npy": npy(-SQUARE.astype(int))}, {}, "bad_codes: npy is not a list of whole numbers from 0 to 8191"),
        ({"npy": npy(SQUARE.astype(int) + 8192)}, {}, "bad_codes: npy is not a list of whole numbers from 0 to 8191"),
        ({"npy": npy(np.zeros((0, 4)))}, {}, "bad_codes: npy holds no codes"),
        ({"npy": npy(np.zeros((1, 10, 256)))}, {}, "bad_codes: npy has the shape (10, 256), which does not say rows and columns"),
        ({"npy": npy(np.zeros((2, 4, 4)))}, {}, "bad_codes: npy has the shape (2, 4, 4), which does not say"),
        ({"npy": npy(np.zeros((1, 10, 256)))}, {"grid": (16, 16)}, "bad_codes: npy has the shape (10, 256): 10 grids of 16 x 16"),
        ({"npy": npy(np.zeros((2, 16)))}, {"grid": (4, 4), "crop": 2}, "bad_codes: npy has the shape (2, 16): 2 grids of 4 x 4"),
        ({"npy": npy(np.zeros(15))}, {"grid": (4, 4)}, "bad_codes: npy has the shape (15), which is no whole number of grids"),
        ({"codes": [1] * 256}, {}, "bad_codes: codes has the shape (256), which does not say rows and columns: --grid H W"),
        ({"codes": [[1, 2], [3]]}, {}, "bad_codes: codes is '[[1, 2], [3]]', expected a list of whole numbers"),
        ({"codes": "1 2 3"}, {}, "bad_codes: codes is '1 2 3'"),
        ({"codes": {"a": 1}}, {}, "bad_codes: codes is"),
        ({"codes": [2**70, 1]}, {}, "bad_codes: codes is"),
        ({"codes": [True, False]}, {}, "bad_codes: codes is"),
        ({"codes": [1], "vq_code": [1]}, {}, "ambiguous_fields: vq_code, codes hold codes: say --codes vq_code or --codes codes"),
        ({"tokens": [1]}, {}, "missing_codes: no vqcode_512 or vqcode_multi768 or vq_code"),
        (
            {"codes": [[1]], "data_type": "text_pretrain"},
            {},
            "unknown_data_type: data_type is 'text_pretrain'",
        ),
        ({"codes": "gone.npy"}, {}, "missing_image: gone.npy"),
        ({"codes": "/etc/passwd.npy"}, {"code_root": "/nowhere"}, "outside_root"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_grid_of_codes_is_a_reject(row: Row, options: Row, expected: str) -> None:
    assert reason({"text": "a dog", **row}, **options).startswith(expected)


@given(data=st.binary(max_size=200), keep=st.integers(0, 140))
def test_no_bytes_are_more_than_a_reject(data: bytes, keep: int) -> None:
    for content in (data, npy(WIDE)[:keep] + data):
        with suppress(Reject):
            sample_of({"text": "a dog", "npy": content})


def test_wrong_options_are_refused() -> None:
    for options in ({"grid": (0, 4)}, {"crop": 1}, {"grid": (4, 4), "crop": -1}, {"layout": "n"}, {"mode": "cc256"}):
        with pytest.raises(UsageError):
            CodedConfig(input=("in",), output="out", **options)


@pytest.mark.parametrize("root", [None, "codes"])
def test_npy_files_beside_the_rows_are_read_by_their_paths(tmp_path: Path, root: str | None) -> None:
    (tmp_path / "codes").mkdir()
    np.save(tmp_path / "codes/a.npy", WIDE.astype(np.int64))
    (tmp_path / "codes/b.npy").write_bytes(pickle.dumps(WIDE))
    prefix = "" if root else "codes/"
    rows = [{"caption": name, "text": name, "codes": f"{prefix}{name}.npy"} for name in "ab"]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    options: Row = {"code_root": None if root is None else str(tmp_path / root), "max_rejects": "50%", "quiet": True}
    manifest: Manifest = run_conversion(CodedConfig(input=(str(source),), output=str(tmp_path / "out"), **options))
    assert (manifest.samples, manifest.rejects) == (1, {"bad_codes": 1})
    assert np.array_equal(read_samples(tmp_path / "out")[0].codes["vqcode_multi768"], WIDE)
    assert "is a Python pickle" in read_rejects(tmp_path / "out")[0]["detail"]
    assert verify(VerifyConfig(input=str(tmp_path / "out"), quiet=True)).problems == ()
