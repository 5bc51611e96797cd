"""The whole job on real input, in a minute: `make demo`, or `python examples/demo.py OUTPUT`.

The input is gathered from packages that are installed anyway: the photographs in scikit-image's wheel, captioned by the
docstrings of the functions that load them, and the READMEs of all installed distributions as DCLM-like records. Then the same
commands that you would type: convert, encode, verify, stream, export. Nothing is downloaded.
"""

from __future__ import annotations

import inspect
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from textwrap import shorten

import orjson
import skimage.data
import torch
import zstandard
from datasets import load_from_disk
from PIL import Image, ImageDraw

from loaders import LoaderConfig, Source, World, build_loader
from wds_tools.cli.main import main
from wds_tools.dataset.reader import read_manifest, read_shard
from wds_tools.storage import open_store
from wds_tools.vq import load_tokenizer

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "colorwheel": "color.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "horse": "horse.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "immunohistochemistry": "ihc.png",
    "logo": "logo.png",
    "moon": "moon.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "stereo_motorcycle": "motorcycle_left.png",
    "text": "text.png",
}
SHOWN = ("astronaut", "cat", "coffee", "rocket", "camera", "retina")
"""Public domain or CC0. The tiny tokenizer was trained on the first four; the last two were held out."""


def gather_pairs(folder: Path, functions: Sequence[str] = tuple(PHOTOGRAPHS)) -> Path:
    """Write pairs.jsonl and the images that it names; one line names an image that isn't there, as in real life."""
    source = Path(skimage.data.data_dir)
    images = folder / "images"
    images.mkdir(parents=True)
    lines = []
    for function in functions:
        file = PHOTOGRAPHS[function]
        if not (source / file).exists():
            continue
        shutil.copyfile(source / file, images / file)
        paragraphs = inspect.cleandoc(getattr(skimage.data, function).__doc__ or function).split("\n\n")
        caption = " ".join(" ".join(paragraphs[:2]).split())
        lines.append(orjson.dumps({"image_path": f"images/{file}", "text_prompt": caption}))
    lines.append(orjson.dumps({"image_path": "images/gone.jpg", "text_prompt": "An image that nobody kept."}))
    pairs = folder / "pairs.jsonl"
    pairs.write_bytes(b"\n".join(lines) + b"\n")
    return pairs


def gather_documents(folder: Path, num_files: int = 4) -> Path:
    """Write the READMEs of the installed distributions as .jsonl.zst files with DCLM's field names."""
    folder.mkdir(parents=True)
    records: list[list[bytes]] = [[] for _ in range(num_files)]
    for number, distribution in enumerate(sorted(distributions(), key=lambda d: d.metadata["Name"].lower())):
        text = distribution.metadata.get_payload() or distribution.metadata["Summary"] or ""
        url = distribution.metadata["Home-page"] or f"https://pypi.org/project/{distribution.metadata['Name']}/"
        record = {"text": str(text), "url": url, "language_id_whole_page_fasttext": {"en": 0.99}}
        records[number % num_files].append(orjson.dumps(record))
    for number, lines in enumerate(records):
        data = zstandard.ZstdCompressor().compress(b"\n".join(lines) + b"\n")
        (folder / f"shard_{number:08d}_processed.jsonl.zst").write_bytes(data)
    return folder


def run(*words: object) -> None:
    """Run a wds-tools command as a shell would, and stop if it fails."""
    args = [str(word) for word in words]
    print(f"\n$ wds-tools {shlex.join(args)}", flush=True)
    status = main(args)
    if status:
        sys.exit(status)


def stream(datasets: Sequence[Path], receipts: Path) -> tuple[int, int]:
    """One shuffled epoch of all of it: half on two ranks, then, from the saved state, the rest on one with another batch size.

    Every rank writes its receipt. Returns the samples handed over on two ranks and on one.
    """
    sources = tuple(Source(str(url)) for url in datasets)
    receipts.mkdir()
    two = [
        build_loader(
            LoaderConfig(sources=sources, batch_size=16, last_batch="short", num_workers=1), World(rank=rank, world_size=2)
        )
        for rank in range(2)
    ]
    before = 0
    for _, *batches in zip(range(len(two[0]) // 2), *two, strict=False):
        before += sum(len(batch["__key__"]) for batch in batches)
    state = json.loads(json.dumps(two[0].state_dict()))
    one = build_loader(LoaderConfig(sources=sources, batch_size=24, last_batch="short"), World())
    one.load_state_dict(state)
    after = sum(len(batch["__key__"]) for batch in one)
    for name, loader in (("two-0", two[0]), ("two-1", two[1]), ("one-0", one)):
        (receipts / f"{name}.json").write_text(json.dumps(loader.receipt()))
        loader.close()
    return before, after


def draw(images: Path, encoded: Path, picture: Path) -> None:
    """Put some photographs above the pictures decoded from their codes."""
    tokenizer = load_tokenizer("tiny")
    store = open_store(str(encoded))
    codes = {sample.text: sample.codes for row in read_manifest(store).shards for sample in read_shard(store, row)}
    side = 256
    sheet = Image.new("RGB", (side * len(SHOWN), 2 * side + 24), "white")
    for column, function in enumerate(SHOWN):
        caption = inspect.cleandoc(getattr(skimage.data, function).__doc__ or "").split("\n")[0]
        grid = next(iter(next(grids for text, grids in codes.items() if text.startswith(caption)).values()))
        decoded = Image.fromarray(tokenizer.decode(torch.from_numpy(grid.astype("int64"))[None])[0].numpy())
        original = Image.open(images / PHOTOGRAPHS[function]).convert("RGB")
        crop = min(original.size)
        left, top = (original.width - crop) // 2, (original.height - crop) // 2
        original = original.crop((left, top, left + crop, top + crop))
        sheet.paste(original.resize((side, side), Image.Resampling.LANCZOS), (side * column, 0))
        sheet.paste(decoded.resize((side, side), Image.Resampling.LANCZOS), (side * column, side))
        ImageDraw.Draw(sheet).text((side * column + 6, 2 * side + 6), shorten(caption, 42, placeholder=" …"), fill="black")
    sheet.save(picture, quality=80)


def demo(out: Path) -> None:
    """Make everything under `out`, which is emptied first."""
    begun = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    pairs = gather_pairs(out / "input" / "pairs")
    documents = gather_documents(out / "input" / "dclm")
    modes = {"cc512": out / "pairs-512", "multi768": out / "pairs-multi"}
    for mode, encoded in modes.items():
        raw = out / f"raw-{mode}"
        run("convert", "pairs", "--input", pairs, "--output", raw, "--mode", mode)
        run("encode", "--input", raw, "--output", encoded, "--tokenizer", "tiny")
    text = out / "dclm"
    run("convert", "documents", "--input", documents, "--output", text, "--workers", 2)
    datasets = [*modes.values(), text]
    for url in datasets:
        run("verify", url)
    exported = out / "hf"
    run("export", "hf", "--input", *datasets, "--output", exported, "--num-shards", 4)
    draw(out / "input" / "pairs" / "images", modes["cc512"], out / "decoded.png")

    before, after = stream(datasets, out / "receipts")
    print(f"\nOne shuffled epoch of all three: {before} samples on 2 ranks, then from the saved state {after} on 1")
    run("audit", out / "receipts")
    rows = []
    for url in datasets:
        manifest = read_manifest(open_store(str(url)))
        rejects = sum(manifest.rejects.values()) + sum(manifest.source.get("input", {}).get("rejects", {}).values())
        rows.append((str(url), manifest.samples, rejects, f"{manifest.bytes / 1e6:.2f} MB", "verified, streamed once each"))
    samples = sum(row[1] for row in rows)
    if before + after != samples:
        sys.exit(f"saw {before} + {after} samples of {samples}")
    num_rows = load_from_disk(str(exported)).num_rows
    rows.append((str(exported), num_rows, 0, f"{_size(exported) / 1e6:.2f} MB", "loads with load_from_disk"))
    wide = max(len(made) for made, *_ in rows) + 2
    print(f"\n{'made':<{wide}}{'samples':>8}{'rejects':>9}{'size':>11}")
    for made, samples, rejects, size, how in rows:
        print(f"{made:<{wide}}{samples:>8,}{rejects:>9,}{size:>11}   {how}")
    print(f"{out / 'decoded.png'!s:<{wide}}photographs above, the same decoded from their codes below")
    print(f"\nIn {time.perf_counter() - begun:.0f} s. The shards are plain tars: tar tvf {text}/shard-000000-0000.tar | head")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    demo(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
