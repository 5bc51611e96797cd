"""Batches on a device: outcomes in order, bounded batches and memory, out of memory, faults, and what the device's time is."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import wait_until
from hypothesis import given
from hypothesis import strategies as st
from properties import tries
from torch import Tensor

from wds_tools.encode.batches import Prepare, encode_in_batches
from wds_tools.encode.device import Device, Outcome, Pixels
from wds_tools.errors import Reject, TokenizerError
from wds_tools.run.progress import Advance
from wds_tools.vq.base import ImageTokenizer
from wds_tools.vq.registry import load_tokenizer

SIZES = ((32, 32), (32, 64), (64, 32), (16, 16))


@dataclass
class FakeTokenizer:
    """Codes are the red of each 16 x 16 block's first pixel; it writes down the batches that came."""

    name: str = "fake"
    codebook_size: int = 256
    stride: int = 16
    weights_hash: str = "sha256:0"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    most_images: int = 1_000_000
    """Larger batches raise out of memory."""
    fails_at: int | None = None
    batches: list[tuple[int, ...]] = field(default_factory=list)

    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        if len(pixels_BHWC) > self.most_images:
            raise torch.OutOfMemoryError("no")
        if self.fails_at == len(self.batches):
            raise RuntimeError("the device broke")
        self.batches.append(tuple(pixels_BHWC.shape[:3]))
        return pixels_BHWC[:, ::16, ::16, 0].long()

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        raise NotImplementedError


def pixels(number: int, size: tuple[int, int] = (32, 32)) -> Pixels:
    return np.full((*size, 3), number % 256, np.uint8)


def run(
    jobs: Iterator[tuple[int, Prepare | None]], tokenizer: FakeTokenizer, batch_size: int, threads: int = 3
) -> list[tuple[int, object]]:
    return list(encode_in_batches(jobs, Device(tokenizer), batch_size=batch_size, threads=threads))


def test_the_fake_is_a_tokenizer() -> None:
    assert isinstance(FakeTokenizer(), ImageTokenizer)


@tries(60)
@given(
    kinds=st.lists(st.sampled_from([*SIZES, None, "bad"]), max_size=60),
    batch_size=st.integers(1, 5),
    threads=st.integers(1, 4),
    most_images=st.integers(1, 8),
)
def test_every_item_comes_out_once_in_order_with_its_own_codes(
    kinds: list[tuple[int, int] | str | None], batch_size: int, threads: int, most_images: int
) -> None:
    def prepare(number: int, kind: tuple[int, int] | str) -> Prepare:
        def work() -> Pixels:
            if isinstance(kind, str):
                raise Reject("corrupt_image", f"number {number}")
            return pixels(number, kind)

        return work

    tokenizer = FakeTokenizer(most_images=most_images)
    jobs = ((number, None if kind is None else prepare(number, kind)) for number, kind in enumerate(kinds))
    results = run(jobs, tokenizer, batch_size, threads)
    assert [number for number, _ in results] == list(range(len(kinds)))
    for (number, outcome), kind in zip(results, kinds, strict=True):
        if kind is None:
            assert outcome is None
        elif isinstance(kind, str):
            assert isinstance(outcome, Reject)
            assert outcome.detail == f"number {number}"
        else:
            assert isinstance(outcome, np.ndarray)
            assert outcome.shape == (kind[0] // 16, kind[1] // 16)
            assert (outcome == number).all()
    encoded = Counter[tuple[int, int]]()
    for count, height, width in tokenizer.batches:
        encoded[height, width] += count
    assert encoded == Counter(kind for kind in kinds if isinstance(kind, tuple))


def test_batches_are_a_function_of_order_and_sizes() -> None:
    rng = np.random.default_rng(0)
    kinds = [(512 * int(rng.integers(1, 3)), 512) for _ in range(90)]

    def late(number: int, delay_s: float) -> Prepare:
        return lambda: time.sleep(delay_s * (number * 7 % 5)) or pixels(number, kinds[number])

    found = []
    for threads, delay_s in ((1, 0.0), (4, 0.0), (4, 0.002)):
        tokenizer = FakeTokenizer()
        run(((n, late(n, delay_s)) for n in range(len(kinds))), tokenizer, batch_size=4, threads=threads)
        found.append(tokenizer.batches)
    assert found[0] == found[1] == found[2]
    assert set(found[0]) <= {(n, 512, 512) for n in range(1, 5)} | {(n, 1024, 512) for n in range(1, 3)}
    assert found[0].count((4, 512, 512)) >= 8


def test_a_rare_size_waits_for_a_bounded_number_of_images() -> None:
    tokenizer = FakeTokenizer()
    sizes = [(48, 48), *[(512, 512)] * 100]
    run(((n, lambda size=size: pixels(0, size)) for n, size in enumerate(sizes)), tokenizer, batch_size=4)
    assert tokenizer.batches.index((1, 48, 48)) == 8
    assert len(tokenizer.batches) == 26


def test_few_images_are_held_at_a_time() -> None:
    held = most = 0
    lock = threading.Lock()

    def prepare() -> Pixels:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return pixels(1, (512, 512))

    for _ in encode_in_batches(((n, prepare) for n in range(300)), Device(FakeTokenizer()), batch_size=2, threads=3):
        with lock:
            held -= 1
    assert most <= 12 * 2 + 3


def test_out_of_memory_halves_the_batches_and_goes_on() -> None:
    tokenizer = FakeTokenizer(most_images=3)
    results = run(((n, lambda n=n: pixels(n, (512, 512))) for n in range(40)), tokenizer, batch_size=16)
    assert [(outcome == number).all() for number, outcome in results] == [True] * 40  # type: ignore[attr-defined]
    assert {count for count, _, _ in tokenizer.batches} == {2}


def test_an_image_that_does_not_fit_alone_is_named() -> None:
    with pytest.raises(TokenizerError, match="fake: a single image of 64 x 32 pixels does not fit the memory of cpu"):
        run(((n, lambda: pixels(1, (32, 64))) for n in range(5)), FakeTokenizer(most_images=0), batch_size=2)


def bad_job() -> Pixels:
    raise MemoryError("prepare broke")


def broken_stream() -> Iterator[tuple[int, Prepare | None]]:
    yield from ((n, lambda: pixels(1)) for n in range(30))
    raise OSError("the shard broke")


@pytest.mark.parametrize(
    ("jobs", "tokenizer", "error"),
    [
        (lambda: ((n, lambda: pixels(1, (512, 512))) for n in range(99)), FakeTokenizer(fails_at=2), "the device broke"),
        (lambda: ((n, bad_job if n == 50 else lambda: pixels(1)) for n in range(99)), FakeTokenizer(), "prepare broke"),
        (broken_stream, FakeTokenizer(), "the shard broke"),
    ],
)
def test_what_breaks_on_the_way_is_raised_and_leaves_no_thread(
    jobs: Callable[[], Iterator[tuple[int, Prepare | None]]], tokenizer: FakeTokenizer, error: str
) -> None:
    with pytest.raises((TokenizerError, MemoryError, OSError), match=error):
        run(jobs(), tokenizer, batch_size=2)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("prepare", "batch"))]


def test_a_consumer_that_leaves_early_leaves_no_thread() -> None:
    stream = encode_in_batches(((n, lambda: pixels(1)) for n in range(10**9)), Device(FakeTokenizer()), batch_size=2, threads=2)
    assert next(stream)[0] == 0
    stream.close()  # type: ignore[attr-defined]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("prepare", "batch"))]


@pytest.mark.parametrize(
    ("codes", "is_told"),
    [([0] * 25, True), ([7] * 25, True), ([*range(25)], False), ([0] * 8 + [1] * 17, False)],
    ids=["NaN inside", "another code", "codes", "in the first seven"],
)
def test_one_code_for_all_pictures_is_said_once(codes: list[int], is_told: bool, capsys: pytest.CaptureFixture[str]) -> None:
    class Blind(FakeTokenizer):
        def encode(self, pixels_BHWC: Tensor) -> Tensor:
            return torch.stack([torch.full((2, 2), codes[int(image_HWC[16, 16, 0])]) for image_HWC in pixels_BHWC])

    def picture(number: int) -> Pixels:
        image_HWC = pixels(number)
        image_HWC[:16] = number + 100
        return image_HWC

    empty = [(n, lambda: pixels(1)) for n in range(20)]  # pages without anything on them
    run(iter([*empty, *((n, lambda n=n: picture(n)) for n in range(1, 25))]), Blind(), 2)
    said = capsys.readouterr().err
    assert said.count("tokenizer fake gave code") == is_told, said


def test_a_device_knows_how_long_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("wds_tools.encode.device.time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(FakeTokenizer):
        def encode(self, pixels_BHWC: Tensor) -> Tensor:
            now[0] += 3
            return super().encode(pixels_BHWC)

    device = Device(Slow())
    assert device.new_use() == Advance()
    for pause_s in (0, 2):
        now[0] += pause_s
        outcomes: list[Future[Outcome]] = [Future(), Future()]
        device.encode(outcomes, [pixels(1), pixels(2)])
        wait_until(lambda: device._num_there == 0, "the batch is delivered")
    assert device.times() == (8, 2)
    assert device.new_use() == Advance(images=4, device_s=8, waited_s=2)
    now[0] += 5
    assert device.new_use() == Advance(device_s=5, waited_s=5)


def test_on_a_cpu_images_of_all_sizes_share_batches_and_have_the_codes_they_have_alone() -> None:
    tokenizer = load_tokenizer("tiny", device="cpu")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*SIZES[number % 4], 3), np.uint8) for number in range(24)]
    device = Device(tokenizer)
    batches = []
    encode = device.encode
    device.encode = lambda outcomes, images: (batches.append(len(images)), encode(outcomes, images))[1]  # type: ignore[method-assign]
    jobs = ((number, partial(lambda image: image, image)) for number, image in enumerate(images))
    found = list(encode_in_batches(jobs, device, batch_size=4, threads=2))
    assert [number for number, _ in found] == list(range(24))
    assert batches == [24], "they are small"
    for (_, codes_hw), image in zip(found, images, strict=True):
        assert np.array_equal(codes_hw, tokenizer.encode(torch.from_numpy(image[None]))[0].numpy())  # type: ignore[arg-type]
    assert device.new_use().images == 24
