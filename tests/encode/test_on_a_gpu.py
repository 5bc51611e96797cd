"""What has to hold on a GPU: `pytest -m gpu` there. A CPU is asked the same where it can be, so that the questions are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from torch import Tensor
from weights import config_tree, vqgan, vqgan_state, write_vqgan

from wds_tools.encode.device import Device, Outcome
from wds_tools.encode.image_encoder import ImageEncoder
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import TokenizerError
from wds_tools.format.schema import Sample
from wds_tools.images import ImageLimits, prepare
from wds_tools.vq import load_tokenizer

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
SIDE = 64
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
on_a_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
in_any_precision = pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "fp32"), *(pytest.param("cuda", name, marks=GPU) for name in ("fp32", "bf16"))]
)


def photograph(name: str) -> bytes:
    return (Path(skimage.data.data_dir) / name).read_bytes()


@pytest.fixture(scope="module")
def images() -> list[Any]:
    """Eight pictures, each another."""
    large = [prepare(photograph(name), f"cc{2 * SIDE}") for name in PHOTOGRAPHS]
    return [image[:SIDE, :SIDE].copy() for image in large] + [image[SIDE:, SIDE:].copy() for image in large]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VQGAN with random weights."""
    config = vqgan(levels=(1, 1, 2), blocks=1)
    return write_vqgan(tmp_path_factory.mktemp("gpu") / "vqgan", config_tree(config), vqgan_state(config))


def load(name: str, folder: Path, device: str, precision: str = "fp32", **settings: Any) -> Any:
    weights = None if name == "tiny" else str(folder)
    return load_tokenizer(name, weights=weights, device=device, precision=precision, **settings)


def through(device: Device, images: Sequence[Any], batch: int) -> Tensor:
    """Their codes as a pass makes them, in batches of so many, also on a CPU."""
    device.takes_any_size = False
    outcomes: list[Future[Outcome]] = [Future() for _ in images]
    for first in range(0, len(images), batch):
        device.encode(outcomes[first : first + batch], images[first : first + batch])
    return stacked([outcome.result() for outcome in outcomes])


def stacked(images: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.stack(images))


@on_a_gpu
@pytest.mark.parametrize("name", ["tiny", "chameleon"])
def test_in_fp32_codes_are_those_of_the_cpu_but_for_near_ties(name: str, device: str, folder: Path, images: list[Any]) -> None:
    on_cpu = load(name, folder, "cpu")
    expected, found = on_cpu.encode(stacked(images)), load(name, folder, device).encode(stacked(images)).cpu()
    differs = expected != found
    assert differs.float().mean() < 0.001
    with torch.inference_mode():
        latents = on_cpu.network.latents((stacked(images).float() / 255 * 2 - 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    near, far = ((latents - on_cpu.codebook_KD[codes]).norm(dim=-1)[differs] for codes in (expected, found))
    assert (far <= near * 1.001).all()


@on_both
def test_in_fp32_codes_do_not_depend_on_the_batch_or_on_how_pixels_come(device: str, folder: Path, images: list[Any]) -> None:
    tokenizer = load("chameleon", folder, device)
    alone = torch.cat([tokenizer.encode(stacked([image])) for image in images]).cpu()
    assert len(alone.unique()) > 8, "a comparison of constant codes would prove nothing"
    assert torch.equal(tokenizer.encode(stacked(images)).cpu(), alone)
    for batch in (3, 8):
        assert torch.equal(through(Device(tokenizer), images, batch), alone)


@in_any_precision
def test_latents_that_are_no_numbers_end_the_pass_with_the_image_named(device: str, precision: Any, folder: Path) -> None:
    options = TokenizerOptions(weights=str(folder), device=device, precision=precision, batch_size=1)
    encoder = ImageEncoder(
        "chameleon", options, workers=1, keep_images=False, limits=ImageLimits(), modes={"image_text": f"cc{SIDE}"}
    )
    tokenizer: Any = encoder.device.tokenizer
    latents, dark = tokenizer._latents, prepare(photograph("rocket.jpg"), f"cc{SIDE}").mean() / 127.5 - 0.99
    tokenizer._latents = lambda x: latents(x) * torch.where(x.mean((1, 2, 3), keepdim=True) < dark, torch.nan, 1.0)
    samples = [
        (number, Sample(key=name[:4], data_type="image_text", text="", image=photograph(name), image_extension="jpg"))
        for number, name in enumerate(("coffee.png", "chelsea.png", "rocket.jpg"))
    ]
    filled = encoder.fill(samples)
    assert [next(filled)[0], next(filled)[0]] == [0, 1]
    with pytest.raises(TokenizerError, match=r"rock: .* gave NaN or infinite numbers for \d+ of the \d+ codes of image 0"):
        next(filled)


def out_of_memory_above(tokenizer: Any, count: int) -> Callable[[Tensor], Tensor]:
    encode: Callable[[Tensor], Tensor] = tokenizer.encode

    def limited(pixels_BHWC: Tensor) -> Tensor:
        if len(pixels_BHWC) > count:
            raise torch.OutOfMemoryError("as asked")
        return encode(pixels_BHWC)

    return limited


@in_any_precision
def test_out_of_memory_halves_the_batch_and_codes_are_those_of_the_half(
    device: str, precision: str, folder: Path, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load("chameleon", folder, device, precision)
    expected = through(Device(tokenizer), images, 2)
    monkeypatch.setattr(tokenizer, "encode", out_of_memory_above(tokenizer, 3))
    assert torch.equal(through(Device(tokenizer), images, 8), expected)


@contextmanager
def memory_for(share: float, tokenizer: Any, images: Sequence[Any]) -> Iterator[None]:
    """As much of the GPU's memory as lies between one image (0) and all of them at once (1)."""
    needs = []
    for part in (images[:1], images):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        tokenizer.encode(stacked(part))
        torch.cuda.synchronize()
        needs.append(torch.cuda.max_memory_reserved())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(tokenizer.device).total_memory
    torch.cuda.set_per_process_memory_fraction((needs[0] + share * (needs[1] - needs[0])) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@on_a_gpu
def test_a_batch_that_really_does_not_fit_is_cut_and_the_pass_goes_on(device: str, folder: Path, images: list[Any]) -> None:
    tokenizer, many = load("chameleon", folder, device, "bf16"), images * 32
    expected = through(Device(tokenizer), many, 8)
    limited = Device(tokenizer)
    with memory_for(0.4, tokenizer, many):
        found = through(limited, many, len(many))
    assert limited._most_pixels < len(many) * SIDE**2, "it fitted after all"
    assert (found == expected).float().mean() > 0.99  # kernels may be others in another size of batch


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_pass_can_be_recorded_as_a_cuda_graph_with_the_same_codes(
    device: str, precision: str, folder: Path, images: list[Any]
) -> None:
    tokenizer = load("chameleon", folder, device, precision)
    given = torch.zeros_like(stacked(images)).to(device)
    aside: Any = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        tokenizer.encode(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = tokenizer.encode(given)
    given.copy_(stacked(images))
    graph.replay()
    assert torch.equal(codes, tokenizer.encode(stacked(images)))


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_network_gives_nearly_the_same_codes(device: str, precision: str, folder: Path, images: list[Any]) -> None:
    plain, compiled = (load("chameleon", folder, device, precision, compile=wanted) for wanted in (False, True))
    equal = (plain.encode(stacked(images)) == compiled.encode(stacked(images))).float().mean()
    assert equal > (0.999 if precision == "fp32" else 0.9)
