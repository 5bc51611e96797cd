"""Train the bundled `tiny` image tokenizer on freely licensed photographs, on a CPU.

Flow: photographs -> random crops -> encoder -> latents -> (noise | codebook) -> decoder -> loss. Three stages:
1. autoencoder: no codebook, but noise of growing strength on the latents, so that what they carry shrinks towards what
   one code can carry; 2. vq: k-means on latents makes the codebook, then straight-through gradients and commitment for
the encoder, moving averages for the codebook, unused entries moved to where latents are; 3. decoder: the encoder and
the codebook are frozen, so codes are final and the decoder sharpens what it makes of them. What is measured, frozen and
kept are averages of the weights over the last 500 steps or so. `--start` begins at 2 with what another run had.
Invariant: a photograph is held out by the hash of its name alone and then only measured; trained on is what is CC0, in
the public domain or CC BY. Equal photographs, seed, steps and threads give an equal file on one machine, `--resume` too.
Cost: about 0.65 s of one core for forward pass, loss and backward pass of 4 crops of 256 px, in float32.

    python examples/train_tiny_tokenizer.py --photos DIR --more DIR --out tiny.safetensors --steps 3000

`--photos` is a folder of COCO's photographs with a provenance.jsonl, `--more` one of those that tiny_photographs.tsv names.
Only numpy, pillow, scikit-image (for its photographs) and torch are needed. The loss uses SSIM (Wang et al. 2004).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wds_tools.vq.quantize import hash_files, nearest
from wds_tools.vq.tiny import TinyConfig, TinyVQ, load_tiny, save_tiny

with Path(__file__).with_name("tiny_photographs.tsv").open() as _table:
    PHOTOGRAPHS = {row["name"]: row for row in csv.DictReader(_table, delimiter="\t", quoting=csv.QUOTE_NONE)}
COCO_LICENCES = {  # NonCommercial and NoDerivs photographs are left out, ShareAlike ones only measured
    "image: Attribution License (": "CC BY 2.0",
    "image: Attribution-ShareAlike License (": "CC BY-SA 2.0",
}


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photograph, decoded."""

    name: str
    licence: str
    source: str
    weight: float
    image: Image.Image
    more: bool = False
    """Of `--more`, so always trained on: what is held out stays the same however many are added."""

    @property
    def held_out(self) -> bool:
        """About 15 % of the names of scikit-image and COCO, fixed for ever."""
        return not self.more and hashlib.sha256(self.name.encode()).digest()[0] < 0.15 * 256

    @property
    def trained_on(self) -> bool:
        """CC0, public domain and CC BY; a ShareAlike photograph can be measured, not trained on."""
        return not self.held_out and "BY-SA" not in self.licence


def load_photos(folder: Path, more: Path | None) -> list[Photo]:
    """Load the table's photographs, of scikit-image and of `more`, and COCO's of `folder` (images and a provenance.jsonl)."""
    bundled = Path(skimage.data.__file__).parent
    photos = []
    for name, row in PHOTOGRAPHS.items():
        place = bundled if row["from"] == "scikit-image" else more
        if place is None:
            continue
        image = Image.open(place / name).convert("RGB")
        image.thumbnail((1600, 1600), Image.Resampling.LANCZOS, reducing_gap=3.0)
        weight, of_more = float(row["weight"]), place is more
        photos.append(Photo(name=name, licence=row["licence"], source=row["from"], weight=weight, image=image, more=of_more))
    provenance = folder / "provenance.jsonl"
    for line in provenance.read_text().splitlines() if provenance.exists() else ():
        row = json.loads(line)
        allowed = [short for start, short in COCO_LICENCES.items() if row["licence"].startswith(start)]
        if not allowed or row["derived"] or "/coco/" not in row["image_path"]:
            continue
        source = row["licence"].partition("), ")[2].partition(";")[0]
        image = Image.open(folder / row["image_path"]).convert("RGB")
        name = Path(row["image_path"]).name
        photos.append(Photo(name=name, licence=allowed[0], source=source, weight=1.0, image=image))
    return photos


def random_crop(photo: Photo, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Cut a square at 0.3 to 1.6 times the scale of a shorter side of 512 px; turn, blur, compress and tint it at random."""
    W, H = photo.image.size
    short = min(W, H)
    scale = math.exp(rng.uniform(math.log(0.3), math.log(1.6))) * 512 / short
    side = min(size / min(scale, 1.6), short)
    x, y = rng.uniform(0, W - side), rng.uniform(0, H - side)
    image = photo.image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side), reducing_gap=2.0)
    if rng.random() < 0.05:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.1:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(40, 90)))
        image = Image.open(file)
    pixels: NDArray[np.float32] = np.asarray(image, dtype=np.float32) / 127.5 - 1
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.25:
        pixels = np.rot90(pixels, rng.integers(1, 4))
    if rng.random() < 0.1:
        pixels = pixels[:, :, rng.permutation(3)]
    gray = pixels.mean(axis=2, keepdims=True)
    pixels = gray + (pixels - gray) * np.float32(rng.uniform(0.6, 1.3))
    gain = rng.uniform(0.8, 1.2) * rng.uniform(0.92, 1.08, size=3)
    shift = rng.uniform(-0.15, 0.15)
    pixels = pixels * gain.astype(np.float32) + np.float32(shift)
    return pixels.clip(-1, 1)


def batches(photos: list[Photo], batch: int, size: int, seed: int, step: int) -> Iterator[Tensor]:
    """Yield pixels_BCHW from `step` on, two batches prepared ahead in a thread; batch i depends on (seed, i) alone."""
    weights = np.array([photo.weight for photo in photos])
    weights /= weights.sum()

    def make(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        picks = rng.choice(len(photos), size=batch, p=weights)
        return torch.from_numpy(np.stack([random_crop(photos[i], size, rng) for i in picks])).permute(0, 3, 1, 2)

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(make, step), pool.submit(make, step + 1)]
        while True:
            yield ahead.pop(0).result().contiguous()
            ahead.append(pool.submit(make, step + 2))
            step += 1


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Mean structural similarity over 8 x 8 windows, two pixels apart."""

    def window(x_BCHW: Tensor) -> Tensor:
        return functional.avg_pool2d(x_BCHW, 8, 2)

    mean_a, mean_b = window(a_BCHW), window(b_BCHW)
    var_a = window(a_BCHW * a_BCHW) - mean_a * mean_a
    var_b = window(b_BCHW * b_BCHW) - mean_b * mean_b
    cov = window(a_BCHW * b_BCHW) - mean_a * mean_b
    c1, c2 = 0.02**2, 0.06**2  # 0.01 and 0.03 of a range of 2
    mean_term = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (mean_term * (2 * cov + c2) / (var_a + var_b + c2)).mean()


def picture_loss(made_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
    """L1 and squares on colours, plus SSIM of the luma and L1 of its gradients at three scales."""
    loss = functional.l1_loss(made_BCHW, true_BCHW) + 2 * functional.mse_loss(made_BCHW, true_BCHW)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    made, true = (made_BCHW * luma).sum(1, keepdim=True), (true_BCHW * luma).sum(1, keepdim=True)
    for level in range(3):
        if level:
            made, true = functional.avg_pool2d(made, 2), functional.avg_pool2d(true, 2)
        loss = loss + 0.06 * (1 - ssim(made, true))
        for axis in (2, 3):
            loss = loss + 0.1 * functional.l1_loss(made.diff(dim=axis), true.diff(dim=axis))
    return loss


class Codebook:
    """Moving-average codebook updates, on the model's own buffer."""

    def __init__(self, model: TinyVQ, decay: float = 0.99) -> None:
        self.codebook_KD = model.codebook_KD
        self.decay = decay
        self.counts_K = torch.ones(len(self.codebook_KD))
        self.sums_KD = torch.zeros_like(self.codebook_KD)

    def k_means(self, latents_ND: Tensor, rounds: int = 15) -> None:
        """Set the entries by Lloyd's algorithm from random latents; an empty cluster restarts at a random latent."""
        K = len(self.codebook_KD)
        starts = torch.randperm(len(latents_ND)).repeat(1 + K // len(latents_ND))[:K]
        self.codebook_KD.copy_(latents_ND[starts])
        for _ in range(rounds):
            counts_K, sums_KD = self._sums(latents_ND, nearest(latents_ND, self.codebook_KD))
            fresh_KD = latents_ND[torch.randint(len(latents_ND), (K,))]
            used_K1 = (counts_K > 0)[:, None]
            self.codebook_KD.copy_(torch.where(used_K1, sums_KD / counts_K.clamp(min=1)[:, None], fresh_KD))
        self.counts_K.fill_(1.0)
        self.sums_KD.copy_(self.codebook_KD)

    def _sums(self, latents_ND: Tensor, codes_N: Tensor) -> tuple[Tensor, Tensor]:
        K = len(self.codebook_KD)
        counts_K = torch.bincount(codes_N, minlength=K).float()
        return counts_K, torch.zeros_like(self.codebook_KD).index_add_(0, codes_N, latents_ND)

    def update(self, latents_ND: Tensor, codes_N: Tensor) -> None:
        """Move each entry towards the latents it stands for."""
        counts_K, sums_KD = self._sums(latents_ND, codes_N)
        self.counts_K.mul_(self.decay).add_(counts_K, alpha=1 - self.decay)
        self.sums_KD.mul_(self.decay).add_(sums_KD, alpha=1 - self.decay)
        self.codebook_KD.copy_(self.sums_KD / self.counts_K.clamp(min=1e-5)[:, None])

    def revive(self, latents_ND: Tensor) -> int:
        """Move entries that stand for almost nothing to random latents of this batch; return how many."""
        dead_M = (self.counts_K < 0.05 * self.counts_K.mean()).nonzero()[:, 0]
        fresh_MD = latents_ND[torch.randint(len(latents_ND), (len(dead_M),))]
        self.codebook_KD[dead_M] = fresh_MD
        self.counts_K[dead_M] = self.counts_K.mean() * 0.3
        self.sums_KD[dead_M] = fresh_MD * self.counts_K[dead_M, None]
        return len(dead_M)


def flat(latents_BDhw: Tensor) -> Tensor:
    """Turn latents_BDhw into latents_ND, in raster order."""
    return latents_BDhw.movedim(1, 3).flatten(0, 2)


def square(photo: Photo, size: int = 512) -> Tensor:
    """Scale the shorter side to `size`, cut the centre: uint8 pixels_1HWC."""
    W, H = photo.image.size
    side = min(W, H)
    box = ((W - side) / 2, (H - side) / 2, (W + side) / 2, (H + side) / 2)
    image = photo.image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.asarray(image).copy())[None]


def measure(weights: Path, photos: list[Photo]) -> dict[str, float]:
    """Measure the weights as shipped: mean PSNR (dB) at 512 px, share of entries used, perplexity of the codes."""
    tokenizer = load_tiny(weights)
    psnrs, all_codes = [], []
    for photo in photos:
        pixels = square(photo)
        codes = tokenizer.encode(pixels)
        mse = (tokenizer.decode(codes).float() - pixels.float()).square().mean().item()
        psnrs.append(10 * math.log10(255**2 / max(mse, 1e-9)))
        all_codes.append(codes.flatten())
    counts = torch.bincount(torch.cat(all_codes), minlength=tokenizer.codebook_size).double()
    share = counts[counts > 0] / counts.sum()
    return {
        "photographs": len(photos),
        "psnr_db": float(np.mean(psnrs)),
        "psnr_min_db": min(psnrs),
        "used": (counts > 0).double().mean().item(),
        "perplexity": math.exp(-(share * share.log()).sum().item()),
    }


def write_card(path: Path, train: list[Photo], held: list[Photo], figures: dict[str, dict[str, float]], run: str) -> None:
    """Write the weights' card: figures, how they were trained, every photograph with its licence."""
    lines = [
        "# tiny.safetensors",
        "",
        f"A VQ autoencoder, stride 16, trained by `examples/train_tiny_tokenizer.py` ({run}).",
        "Figures are of this file, at 512 x 512 px (shorter side scaled to 512, centre cut):",
        "",
        "| photographs | number | mean PSNR, dB | lowest, dB | codebook entries used | perplexity of codes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, f in figures.items():
        row = f"| {name} | {f['photographs']:.0f} | {f['psnr_db']:.2f} | {f['psnr_min_db']:.2f} "
        lines.append(row + f"| {100 * f['used']:.1f} % | {f['perplexity']:.0f} |")
    for title, photos in (("Trained on", train), ("Held out (measured only)", held)):
        lines += ["", f"## {title}", "", "| photograph | licence | from |", "| --- | --- | --- |"]
        lines += [f"| {photo.name} | {photo.licence} | {photo.source} |" for photo in photos]
    path.write_text("\n".join(lines) + "\n")


def train(args: argparse.Namespace, photos: list[Photo]) -> None:
    """Run the three stages; a checkpoint and the file are written every `--save-every` steps and at the end, then the card."""
    trained, held = [photo for photo in photos if photo.trained_on], [photo for photo in photos if photo.held_out]
    print(f"{len(trained)} photographs to train on, {len(held)} held out: {[photo.name for photo in held]}", flush=True)
    torch.manual_seed(args.seed)
    model = TinyVQ(TinyConfig()).to(memory_format=torch.channels_last)
    codebook = Codebook(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    k_means_at, freeze_at = 0 if args.start else math.ceil(0.12 * args.steps), math.ceil(0.75 * args.steps)
    recent: list[Tensor] = []
    step, sums, checkpoint = 0, torch.zeros(3), args.out.with_suffix(".ckpt")
    settings = {name: getattr(args, name) for name in ("steps", "batch", "lr", "commit", "seed", "threads")}
    settings["photographs"] = hashlib.sha256("/".join(photo.name for photo in trained).encode()).hexdigest()
    settings["start"], run = hash_files(args.start) if args.start else "", ""
    if args.start:
        state = torch.load(args.start, weights_only=True)
        model.load_state_dict(state["model"])
        codebook.counts_K, codebook.sums_KD = state["counts"], state["sums"]
        run = f", from what {state['step']} steps of another run had made"
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise SystemExit(f"--resume: {checkpoint} was written with {state['settings']}, got {settings}: give the same")
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step, recent, codebook.counts_K, codebook.sums_KD = (state[key] for key in ("step", "recent", "counts", "sums"))
    stream = batches(trained, args.batch, 256, args.seed, step)
    while step < args.steps:
        if step == k_means_at and not args.start:
            codebook.k_means(torch.cat(recent))
            recent.clear()
            averaged.n_averaged.zero_()  # begin again: there was no codebook
        if step == freeze_at:
            model.load_state_dict(averaged.module.state_dict())
        progress, stage = step / args.steps, 1 + (step >= k_means_at) + (step >= freeze_at)
        model.encoder.requires_grad_(stage < 3)
        warm = min(1, (step + 1 - (k_means_at if stage > 1 else 0)) / 200)
        lr = args.lr * warm * (0.52 + 0.48 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        pixels = next(stream)
        latents = model.latents(pixels)
        commit = power = torch.zeros(())
        if stage == 1:
            strength = 0.45 * min(1, progress / 0.08)
            into_decoder = latents + strength * torch.randn_like(latents)
            power = (latents.square().mean() - 1).square()  # latents of unit power, or they would outgrow the noise
            recent = [*recent, flat(latents.detach())][-40:]
        else:
            latents_ND = flat(latents.detach())
            codes_N = nearest(latents_ND, model.codebook_KD)
            B, D, h, w = latents.shape
            entries = model.codebook_KD[codes_N].view(B, h, w, D).movedim(3, 1)
            commit = functional.mse_loss(latents, entries)
            into_decoder = latents + (entries - latents).detach()
            if stage == 2:
                codebook.update(latents_ND, codes_N)
                if step % 100 == 99 and step < freeze_at - 500:
                    codebook.revive(latents_ND)
        made = model.image(into_decoder)
        loss = picture_loss(made, pixels)
        optimizer.zero_grad(set_to_none=True)
        (loss + args.commit * commit + 0.05 * power).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        averaged.update_parameters(model)
        mse = (made.detach().clamp(-1, 1) - pixels).square().mean()
        sums += torch.stack([loss.detach(), commit.detach(), mse])
        step += 1
        if step % 100 == 0:
            loss_mean, commit_mean, mse_mean = (sums / 100).tolist()
            sums.zero_()
            line = f"step {step} of {args.steps}, stage {stage}, loss {loss_mean:.4f} commit {commit_mean:.3f}"
            print(f"{line} psnr {10 * math.log10(4 / mse_mean):.2f} lr {lr:.1e} {time.strftime('%H:%M:%S')}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
            state |= {"step": step, "recent": recent, "counts": codebook.counts_K, "sums": codebook.sums_KD}
            state |= {"averaged": averaged.state_dict(), "settings": settings}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            if stage > 1:
                save_tiny(averaged.module, args.out)
                print(f"step {step}: held out {measure(args.out, held)}", flush=True)
    figures = {"held out": measure(args.out, held), "trained on": measure(args.out, trained)}
    print(figures, flush=True)
    run = f"{step} steps of {args.batch} crops of 256 px, seed {args.seed}, {args.threads} threads{run}"
    write_card(args.out.with_suffix(".md"), trained, held, figures, run)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, load the photographs, train."""
    parser = argparse.ArgumentParser(description="Train the tiny image tokenizer.")
    parser.add_argument("--photos", type=Path, default=Path("../shared/data/pairs/open"), metavar="DIR")
    parser.add_argument("--more", type=Path, metavar="DIR", help="a folder with the table's other photographs")
    parser.add_argument("--out", type=Path, default=Path("wds_tools/vq/weights/tiny.safetensors"))
    parser.add_argument("--steps", type=int, default=3000, help="at least 9, so that each stage has some")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside --out")
    parser.add_argument("--start", type=Path, metavar="CKPT", help="checkpoint of a run to start from, past stage 1")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--commit", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args(argv)
    if args.steps < 9:
        parser.error(f"--steps {args.steps}: expected at least 9, so that each of the three stages has some")
    torch.set_num_threads(args.threads)
    train(args, load_photos(args.photos, args.more))


if __name__ == "__main__":
    main()
