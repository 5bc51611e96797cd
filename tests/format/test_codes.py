"""What codes are, said once: grids that are joined and split, their types, and the names of code sets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_tools.errors import FormatError
from wds_tools.format.codes import (
    CODE_COLUMNS,
    HW,
    LAYOUTS,
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


def test_a_layout_of_other_axes_is_an_entry_of_the_table() -> None:
    """Everything that depends on the axes follows from the entry."""
    layout = CodeGrid(("scale", "height", "width"), ("<u2",))
    grids = [np.arange(12, dtype="<u2").reshape(3, 2, 2), np.arange(3, dtype="<u2").reshape(3, 1, 1)]
    codes, shapes = join_grids(grids, np.dtype("<u2"), layout)
    layout.check("c", codes, is_joined=True)
    assert codes.shape == (1, 1, 15)
    assert layout.shapes_of("c", codes, shapes) == [(3, 2, 2), (3, 1, 1)]
    assert all(map(np.array_equal, split_grids(codes, shapes), grids))
    with pytest.raises(FormatError, match=r"expected a list of \[scale, height, width\]"):
        layout.check_shapes("c", codes, [[2, 2]])
    assert LAYOUTS["hw"] is HW


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
