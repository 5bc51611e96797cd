"""`python -m benchmarks.nearest`: what it costs `nearest` to look whether latents are numbers.

The search as it is, and the same loop without that look, take turns on one image's latents and one thread, and are timed in
processor time, so that a busy machine matters little; medians over the pairs, and the median of each pair's ratio. On a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from wds_tools.vq import nearest
from wds_tools.vq.quantize import running_in

SIZES = {"tiny": (1024, 4096, 16), "chameleon": (1024, 8192, 256), "emu3": (4096, 32768, 4), "janus": (1024, 16384, 8)}
"""N latents of an image of 512 x 512 pixels, K entries, D numbers."""


def blind(latents_ND: Tensor, codebook_KD: Tensor, chunk: int = 256) -> Tensor:
    """`nearest` without the look."""
    codes_N = torch.empty(len(latents_ND), dtype=torch.int64)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), running_in(latents_ND.device, "fp32"):
        codebook_DK = codebook_KD.float().T
        norms_K = codebook_DK.square().sum(dim=0)
        for start in range(0, len(latents_ND), chunk):
            part_ND = latents_ND[start : start + chunk].float()
            scores_NK = torch.addmm(norms_K, part_ND, codebook_DK, alpha=-2.0)
            codes_N[start : start + chunk] = torch.from_numpy(scores_NK.numpy().argmin(axis=1))
    return codes_N


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=25)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    for name, (N, K, D) in SIZES.items():
        latents_ND, codebook_KD = torch.randn(N, D), torch.randn(K, D)
        assert torch.equal(nearest(latents_ND, codebook_KD), blind(latents_ND, codebook_KD))
        times_s: dict[str, list[float]] = {"nearest": [], "blind": []}
        for pair in range(pairs):
            ways = [("nearest", nearest), ("blind", blind)]
            for way, search in ways if pair % 2 else reversed(ways):
                begun = time.thread_time()
                search(latents_ND, codebook_KD)
                times_s[way].append(time.thread_time() - begun)
        ratio = statistics.median(one / two for one, two in zip(times_s["nearest"], times_s["blind"], strict=True))
        medians = [f"{1000 * statistics.median(times):.2f} ms" for times in times_s.values()]
        print(f"{name:<10} N={N} K={K} D={D}: {medians[0]}, without the look {medians[1]}; {100 * (ratio - 1):+.2f} %")


if __name__ == "__main__":
    main()
