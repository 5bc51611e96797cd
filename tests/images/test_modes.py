"""Sizes: what ccN, multiN and fitN bring images to, for any N, stride and shape."""

import math
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wds_tools.errors import Reject, UsageError
from wds_tools.format.codes import is_square
from wds_tools.format.schema import PAIR_TYPES, pair_fields
from wds_tools.images import Mode, crop_for, mode_of_column, parse_mode, shapes
from wds_tools.images.mode import Family

strides = st.sampled_from([4, 8, 14, 16, 20, 28, 32])
pixels = st.integers(1, 9_000)


@st.composite
def modes(draw: st.DrawFn, family: Family) -> Mode:
    """A mode that suits a tokenizer of some stride."""
    stride = draw(strides)
    side = draw(st.integers(-(-64 // stride), 4096 // stride)) * stride
    assume(side >= {"cc": 1, "multi": 2, "fit": 4}[family] * stride)
    min_pixels = draw(st.integers(0, side * side)) if family == "fit" else 0
    return parse_mode(f"{family}{side}").at("any", stride, min_pixels)


def is_inside(mode: Mode, width: int, height: int) -> bool:
    """Whether the crop lies in the scaled image, which it covers: one of the two sides is the target's."""
    crop = mode.crop_for(width, height)
    left, top, right, bottom = crop.box
    within = 0 <= left <= right <= crop.resize[0] and 0 <= top <= bottom <= crop.resize[1]
    return within and (crop.resize[0] == crop.size[0] or crop.resize[1] == crop.size[1])


@given(modes("cc"), pixels, pixels)
def test_cc_is_a_square_of_n_pixels(mode: Mode, width: int, height: int) -> None:
    assume(max(width, height) <= 2 * min(width, height))
    assert mode.crop_for(width, height).size == (mode.side, mode.side)
    assert is_inside(mode, width, height)


@settings(deadline=None)
@given(modes("multi"), pixels, pixels)
def test_multi_is_the_nearest_shape_of_about_n_times_n_pixels(mode: Mode, width: int, height: int) -> None:
    assume(max(width, height) <= 4.2 * min(width, height))
    patch = 32 if 32 % mode.stride == 0 else 2 * mode.stride
    table = shapes(mode.side, patch)
    size = mode.crop_for(width, height).size
    assert size in table
    assert is_inside(mode, width, height)
    assert size[0] % mode.stride == size[1] % mode.stride == 0
    distances = {shape: abs(math.log(width * shape[1] / (height * shape[0]))) for shape in table}
    assert distances[size] <= min(distances.values()) + 1e-12
    assert mode.crop_for(height, width).size == size[::-1]


@settings(deadline=None)
@given(st.integers(1, 4096), st.sampled_from([8, 28, 32, 40]))
def test_a_table_has_shapes_within_the_area_that_no_other_contains_and_their_transposes(side: int, patch: int) -> None:
    assume(side >= patch)
    table = shapes(side, patch)
    n = side // patch
    assert (n * patch, n * patch) in table
    assert list(table) == sorted(table)
    assert {(height, width) for width, height in table} == set(table)
    for width, height in table:
        assert not any(w >= width and h >= height for w, h in table if (w, h) != (width, height))
        assert width % patch == height % patch == 0
        assert width * height <= side * side
        assert max(width, height) <= 4 * min(width, height)
        assert n * n - min(width, height) // patch < width * height // patch**2 <= n * n


@given(modes("fit"), pixels, pixels)
def test_fit_keeps_the_shape_within_the_area(mode: Mode, width: int, height: int) -> None:
    assume(max(width, height) <= 4.2 * min(width, height))
    w, h = mode.crop_for(width, height).size
    assert is_inside(mode, width, height)
    assert w % mode.stride == h % mode.stride == 0
    assert min(w, h) >= 4 * mode.stride
    assert w * h <= mode.side**2
    assert mode.crop_for(height, width).size == (h, w)
    steps = w // mode.stride, h // mode.stride
    if min(steps) > 4:  # else it is as slim as it may be
        lost = abs(math.log(w * height / (h * width)))
        assert lost <= -math.log(1 - 1 / (steps[0] + 1)) - math.log(1 - 1 / (steps[1] + 1)), "a step of each side, at most"
        loosely = (w + mode.stride) * (h + mode.stride)
        assert loosely > min(max(width * height, mode.min_pixels), mode.side**2), "no smaller than it has to be"


def test_fit_rounds_scales_down_and_scales_up_as_the_processors_of_emu3_do() -> None:
    fit = parse_mode("fit720").at("emu3", 8)
    assert fit.crop_for(500, 333).size == (496, 336)  # 62.5, 41.6 steps: rounded
    assert fit.crop_for(1600, 1200).size == (824, 616)  # 720 * sqrt(4/3) = 831.4, 623.5: rounded down
    assert fit.crop_for(30, 20).size == (32, 32)  # 4 steps at least
    assert parse_mode("fit720").at("emu3", 8, 512 * 512).crop_for(500, 333).size == (632, 424)  # 627.4, 417.8: rounded up
    assert parse_mode("fit720").at("emu3", 8, 720 * 720).crop_for(500, 333).size == (880, 584)  # up would be too much: down
    assert parse_mode("fit64").crop_for(400, 100).size == (64, 64)


@pytest.mark.parametrize(
    ("word", "column"),
    [("cc512", "vqcode_512"), ("multi768", "vqcode_multi768"), ("cc256", "vqcode_256"), ("fit720", "vqcode_fit720")],
)
def test_a_mode_its_word_and_its_column_say_the_same(word: str, column: str) -> None:
    mode = parse_mode(word)
    assert (str(mode), mode.column) == (word, column)
    assert mode_of_column(column) == mode_of_column(f"{column}-emu3") == mode
    assert is_square(column) == (mode.family == "cc")
    assert mode.data_type == PAIR_TYPES[mode.family != "cc"] == pair_fields(column, (2, 3), 16)["data_type"]


@pytest.mark.parametrize(
    "word", ["", "512", "cc", "cc63", "cc4097", "cc0512", "cc512 ", "CC512", "square", "fit-720", "multi\u0667\u0666\u0668"]
)
def test_what_is_no_mode_is_refused_with_what_is(word: str) -> None:
    expected = rf"mode '{re.escape(word)}': (did you mean (\w+)\? )?expected cc, multi or fit with 64 to 4096 pixels"
    with pytest.raises(UsageError, match=expected) as refused:
        crop_for(word, 10, 10)
    found = re.match(expected, str(refused.value))
    assert found is not None
    assert found[2] is None or parse_mode(found[2])


def test_a_tokenizer_that_does_not_divide_is_one_line_with_the_nearest_sizes() -> None:
    with pytest.raises(UsageError, match="cc500: 500 px is not a multiple of 16, the stride of tokenizer t: take cc496 or cc512"):
        parse_mode("cc500").at("t", 16)
    with pytest.raises(UsageError, match="mode fit64: fit takes 128 px at least with stride 32, of tokenizer t"):
        parse_mode("fit64").at("t", 32)
    with pytest.raises(UsageError, match="--min-pixels 20000: expected 0 to 16384 with fit128"):
        parse_mode("fit128").at("t", 16, 20_000)


@pytest.mark.parametrize(("family", "limit"), [("cc", 2), ("multi", 4.2), ("fit", 4.2)])
def test_what_a_family_takes_depends_on_the_shape_alone(family: str, limit: float) -> None:
    for side in (64, 720, 4096):
        mode = parse_mode(f"{family}{side}")
        assert mode.crop_for(int(1000 * limit), 1000)
        for width, height in ((int(1000 * limit) + 1, 1000), (1000, int(1000 * limit) + 1)):
            with pytest.raises(Reject, match=f"aspect_ratio: {width}x{height}: the longer side is more than {limit} times"):
                mode.crop_for(width, height)
