"""`make bench-encode`: encoding photographs, against one image at a time in float32 as Liquid does it.

The same weights and photographs for all ways, which take turns, each in a process of its own (`encode_way`); medians over the
rounds. Chameleon's network has its full size and random weights, for which the time is the same. On a CPU; without options the
photographs are scikit-image's.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import skimage.data
import torch
import yaml

from wds_tools.convert import run_conversion
from wds_tools.convert.pairs import PairsConfig
from wds_tools.errors import Reject
from wds_tools.images import crop_for, probe
from wds_tools.vq.chameleon import CONFIG_NAME, WEIGHTS_NAME, checkpoint_name

WAYS = {
    "plain": "one at a time, float32",
    "fp32": "wds-tools, fp32",
    "fp32/torch": "wds-tools, fp32, --resize torch",
    "bf16": "wds-tools, bf16",
    "bf16/torch": "wds-tools, bf16, --resize torch",
    "bare-fp32": "tokenizer alone, fp32",
    "bare-bf16": "tokenizer alone, bf16",
}
BARS = {"chameleon": {"fp32": 1.3, "bf16": 2.3}, "tiny": {"fp32": 3.0, "bf16": 3.0}}
OF_BARE = 0.9
LEVELS = (1, 1, 2, 2, 4)


def gather(photos: Path, out: Path, count: int) -> Path:
    """A dataset of `count` photographs that fit the square crop, again from the first one if there are fewer."""
    found = []
    for path in sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")):
        try:
            info = probe(path.read_bytes())
            crop_for("cc512", info.width, info.height)
            found.append(json.dumps({"image_path": str(path), "text": path.stem}))
        except Reject:
            continue
    if not found:
        sys.exit(f"{photos}: no JPEG photographs")
    out.mkdir(parents=True)
    pairs = out / "pairs.jsonl"
    pairs.write_text("\n".join((found * (count // len(found) + 1))[:count]) + "\n")
    run_conversion(PairsConfig(input=(str(pairs),), output=str(out / "raw"), quiet=True))
    return out / "raw"


def write_chameleon(folder: Path, channels: int = 128, latents: int = 256, entries: int = 8192) -> Path:
    """A checkpoint with random weights, by default of Chameleon's size."""
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * len(LEVELS),
        up_block_types=("UpDecoderBlock2D",) * len(LEVELS),
        block_out_channels=tuple(channels * level for level in LEVELS),
        layers_per_block=2,
        latent_channels=latents,
        num_vq_embeddings=entries,
        vq_embed_dim=latents,
    )
    folder.mkdir(parents=True)
    ddconfig = {"ch": channels, "ch_mult": list(LEVELS), "num_res_blocks": 2, "z_channels": latents}
    (folder / CONFIG_NAME).write_text(yaml.safe_dump({"n_embed": entries, "embed_dim": latents, "ddconfig": ddconfig}))
    state = {checkpoint_name(name, len(LEVELS)): tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / WEIGHTS_NAME)
    return folder


def measure(raw: Path, tokenizer: str, weights: Path | None, rounds: int) -> dict[str, dict[str, float]]:
    """Images per second, processor time an image, share of time that the device waited, of each way; medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.encode_way",
                way,
                str(raw),
                tokenizer,
                *([str(weights)] if weights else []),
            ]
            result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            found[way].append(
                {
                    "speed": result["images"] / result["seconds"],
                    "cpu_ms": 1000 * result["cpu_seconds"] / result["images"],
                    "waited": result.get("waited", 0.0),
                }
            )
    return {
        way: {name: statistics.median(one[name] for one in results) for name in ("speed", "cpu_ms", "waited")}
        for way, results in found.items()
    }


def report(tokenizer: str, images: int, result: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    speed = {way: values["speed"] for way, values in result.items()}
    bars = BARS[tokenizer]
    print(f"\n{tokenizer}, {images} photographs{'':<17}images/s    CPU ms an image")
    for way, title in WAYS.items():
        print(f"  {title:<34}{speed[way]:>10.2f}{result[way]['cpu_ms']:>19,.0f}", end="")
        precision = way.split("/")[0]
        if precision in bars:
            of_bare = speed[way] / speed[f"bare-{precision}"]
            ratios = f"{speed[way] / speed['plain']:.2f} x the first (bar: {bars[precision]}), {of_bare:.2f}"
            print(f"   {ratios} of the bare one (bar: {OF_BARE}); the device waited {result[way]['waited']:.1%}", end="")
        print()


def main(argv: Sequence[str] | None = None) -> None:
    """Run everything under bench-out/encode, which is emptied first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path(skimage.data.data_dir), help="a folder of JPEG photographs")
    parser.add_argument("--tokenizers", nargs="+", choices=sorted(BARS), default=["tiny", "chameleon"])
    parser.add_argument("--images", type=int, nargs="+", default=[200, 6], help="photographs for each tokenizer")
    parser.add_argument("--rounds", type=int, nargs="+", default=[3, 1], help="rounds for each tokenizer")
    args = parser.parse_args(argv)
    out = Path("bench-out/encode").absolute()
    shutil.rmtree(out, ignore_errors=True)
    print(f"machine: {platform.processor() or platform.machine()}, {torch.get_num_threads()} cores, torch {torch.__version__}")
    results = {}
    for tokenizer, images, rounds in zip(args.tokenizers, args.images, args.rounds, strict=True):
        weights = write_chameleon(out / "vqgan") if tokenizer == "chameleon" else None
        raw = gather(args.photos, out / tokenizer, images)
        results[tokenizer] = measure(raw, tokenizer, weights, rounds)
        report(tokenizer, images, results[tokenizer])
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
