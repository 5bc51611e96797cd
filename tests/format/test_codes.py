"""What codes are, said once: grids that are joined and split, their types, and the names of code sets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from wds_tools.errors import FormatError, UsageError
from wds_tools.format.codes import (
    CODE_COLUMNS,
    HW,
    CodeGrid,
    check_column,
    check_range,
    chosen_codes,
    code_dtype,
    codes_named,
    join_grids,
    named_column,
    split_grids,
)
from wds_tools.format.manifest import Manifest, code_layouts, serialize_manifest
from wds_tools.format.shard import IN_COLUMNS, npy_bytes, parse_npy

ROOT = Path(__file__).parents[2]
SIDES = st.integers(1, 5)


@given(st.lists(st.tuples(SIDES, SIDES), max_size=4), st.integers(1, 1 << 32))
def test_joined_grids_fit_their_shapes_and_split_again(shapes: list[tuple[int, int]], codebook_size: int) -> None:
    dtype = code_dtype(codebook_size)
    grids = [np.full(shape, codebook_size - 1, dtype) for shape in shapes]
    codes, stated = join_grids(grids, dtype)
    HW.check("c", codes, is_joined=True)
    assert HW.shapes_of("c", codes, stated) == shapes
    assert all(map(np.array_equal, split_grids(codes, stated), grids))
    check_range("c", codes, codebook_size)
    if shapes and codebook_size > 1:
        with pytest.raises(FormatError, match=f"c holds the code {codebook_size - 1}; the codebook has {codebook_size - 1}"):
            check_range("c", codes, codebook_size - 1)


@pytest.mark.parametrize("shapes", [None, [[1, 4]], [[2, 2], [1, 1]], [], [[2, 2, 1]], [[0, 4]], [["2", 2]], "22", {}, [4]])
def test_shapes_that_are_not_those_of_the_grids_are_refused(shapes: object) -> None:
    with pytest.raises(FormatError, match=r"the grids of c are|c has the shape"):
        HW.check_shapes("c", np.zeros((2, 2), "<u2"), shapes)


LAYOUTS = [
    CodeGrid(),
    CodeGrid(layout="n", codebook_size=4096),
    CodeGrid(layout="hwk", codebook_size=(4, 1 << 17)),
    CodeGrid(layout="thw", codebook_size=300, dtype="uint64"),
    CodeGrid(layout="thwd", dtype="bfloat16"),
    CodeGrid(layout="dhw", dtype="float16"),
    CodeGrid(layout="nd", dtype="float32"),
]


@tries(50)
@given(st.sampled_from(LAYOUTS), st.lists(st.tuples(SIDES, SIDES, SIDES, SIDES), max_size=3), st.integers(0, 1 << 32))
def test_arrays_of_every_layout_are_joined_stored_read_and_split_again(
    layout: CodeGrid, sides: list[tuple[int, ...]], seed: int
) -> None:
    rng, last = np.random.default_rng(seed), len(layout.sizes)
    shapes = [(*of_one[: len(layout.layout) - 1], last if last > 1 else of_one[3]) for of_one in sides]
    below = min(layout.sizes, default=0x7F80)  # as bfloat16 the pattern of infinity, which is the first that is no number
    grids = [rng.integers(0, below, shape).astype(layout.npy_dtype) for shape in shapes]
    codes, stated = join_grids(grids, layout.npy_dtype, layout)
    read = parse_npy(npy_bytes(codes), "c", IN_COLUMNS)
    layout.check("c", read, is_joined=True)
    layout.check_values("c", read)
    assert layout.shapes_of("c", read, stated) == shapes
    assert all(map(np.array_equal, split_grids(read, stated), grids))
    counted = [codes_N for _, codes_N, _ in layout.by_codebook("c", read)]
    assert len(counted) == (0 if layout.is_float else max(1, len(layout.sizes)))
    assert not counted or sum(len(codes_N) for codes_N in counted) == read.size
    for grid in grids:
        layout.check("c", grid, is_joined=False)
        assert layout.shapes_of("c", grid, None) == [grid.shape]
        for wrong in (
            grid[None],
            grid[..., :0],
            grid.astype("<i4"),
            grid[..., :1].repeat(7, -1) if layout.codebook_size == (4, 1 << 17) else grid[0],
        ):
            with pytest.raises(FormatError, match="expected a non-empty"):
                layout.check("c", wrong, is_joined=False)


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        ({"dtype": "int7"}, "dtype='int7', expected one of uint8, "),
        ({"codebook_size": 0}, "codebook_size=0, expected 1 to"),
        ({"codebook_size": (4, -1)}, r"codebook_size=\(4, -1\)"),
        ({"codebook_size": 2**32 + 1}, "codebook_size=4294967297"),
        ({"codebook_size": "8192"}, "codebook_size='8192'"),
    ],
)
def test_python_makes_no_grid_that_a_manifest_could_not_declare(made: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        CodeGrid(**made)


def test_a_code_beyond_its_own_codebook_and_a_float_that_is_no_number_are_found() -> None:
    several = CodeGrid(layout="nk", codebook_size=(4, 8))
    several.check_values("c", np.array([[3, 7], [0, 4]], "<u2"))
    with pytest.raises(FormatError, match="c codebook 0 holds the code 4; the codebook has 4 entries"):
        several.check_values("c", np.array([[3, 7], [4, 4]], "<u2"))
    for dtype, values in (("float32", [1, np.nan, -np.inf]), ("float16", [0, np.inf, np.nan])):
        with pytest.raises(FormatError, match=f"c: 2 of 3 {dtype} numbers are NaN or infinite"):
            CodeGrid(layout="n", dtype=dtype).check_values("c", np.array(values, CodeGrid(dtype=dtype).npy_dtype))
    patterns = np.array([0x3F80, 0x7F80, 0xFF80, 0x7FC0, 0x7F7F], "<u2")  # 1, both infinities, NaN, the greatest
    with pytest.raises(FormatError, match="c: 3 of 5 bfloat16 numbers are NaN or infinite"):
        CodeGrid(layout="n", dtype="bfloat16").check_values("c", patterns)


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        ({"layout": "hh"}, "layout 'hh': expected 1 to 4 different letters"),
        ({"layout": "abcde"}, "layout 'abcde'"),
        ({"layout": ""}, "layout ''"),
        ({"layout": 2}, "layout is 2, expected text"),
        ({"dtype": "int8"}, "dtype is 'int8', expected 'uint8' or"),
        ({"codebook_size": []}, r"codebook_size=\(\)"),
        ({"codebook_size": [4, 0]}, "codebook_size"),
        ({"codebook_size": 4, "dtype": "float32"}, "none with floats"),
    ],
)
def test_a_manifest_that_declares_no_such_arrays_is_refused(made: dict[str, object], problem: str) -> None:
    with pytest.raises(FormatError, match=rf"codes\.vqcode_512.*{problem}"):
        serialize_manifest(Manifest(shards=(), inputs=0, codes={"vqcode_512": made}))


def test_what_all_columns_were_once_declares_nothing_and_is_of_the_first_schema() -> None:
    for layout in LAYOUTS:
        plain = layout == HW
        assert (layout.declared == {}, layout.schema_version) == (plain or layout.declared == {}, 1 if plain else 2)
        assert code_layouts({"c": {**layout.declared, "codebook_size": layout.codebook_size}}) == {"c": layout}
    assert CodeGrid(codebook_size=8192).schema_version == 1
    assert str(CodeGrid(codebook_size=8192)) == "8,192 codes"
    assert str(LAYOUTS[2]) == "4 + 131,072 codes (hwk)"
    assert str(CodeGrid(layout="hwk", codebook_size=(16, 16, 32))) == "2 x 16 + 32 codes (hwk)"
    assert str(LAYOUTS[4]) == "bfloat16 (thwd)"


@pytest.mark.parametrize("code_set", ["", "emu3", "x" * 15])
def test_the_columns_of_a_code_set_are_found_by_its_name_alone(code_set: str) -> None:
    columns = {named_column(column, name): (column, name) for column in CODE_COLUMNS for name in ("", "emu3", "x" * 15)}
    for column in columns:
        check_column(column)
    expected = {column: value for column, value in columns.items() if value[1] == code_set}
    assert chosen_codes(columns, code_set) == expected
    assert codes_named(columns, code_set) == {plain: (plain, code_set) for plain in CODE_COLUMNS}
    assert chosen_codes(dict(reversed(columns.items())), None) == chosen_codes(columns, "x" * 15)


def test_no_other_module_says_how_many_axes_codes_have_or_how_a_code_set_is_named() -> None:
    tell = re.compile(r"codes\w*\.ndim|ndim [!=]= [23]\b|partition\(\"-\"\)|_is_shape|def (split|join)_grids")
    owner = ROOT / "wds_tools/format/codes.py"
    for folder in ("format", "check", "view", "export", "pack", "convert", "sources", "sequences", "dataset"):
        for path in (ROOT / "wds_tools" / folder).rglob("*.py"):
            assert path == owner or not tell.search(path.read_text()), path
    for path in (ROOT / "loaders").rglob("*.py"):
        assert not tell.search(path.read_text()), path
