"""`wds-tools compare-codes`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from wds_tools.check.compare import CompareConfig, compare_codes
from wds_tools.cli.options import Positional
from wds_tools.cli.summary import Printed, aligned, show

EXAMPLE = "wds-tools compare-codes pairs-fp32 pairs-bf16 --weights vqgan/"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, CompareConfig):
    """Report how many codes of two encoded datasets are equal, and how far apart their decoded pictures are."""

    a: Positional[str]
    """The first dataset."""
    b: Positional[str]
    """The second dataset; it may be the same one, if the names of the codes differ."""


def run(config: Config) -> int:
    """Compare, and print what came out."""
    result = compare_codes(config)
    others = [f"{count:,} only in {name}" for count, name in ((result.only_a, config.a), (result.only_b, config.b)) if count]
    facts = {"samples": "; ".join([f"{result.samples:,} in both", *others])}
    if result.codes:
        facts["equal codes"] = (
            f"{result.equal_codes / result.codes:.4%} ({result.codes - result.equal_codes:,} of {result.codes:,} differ)"
        )
        facts["equal samples"] = f"{result.equal_samples / result.samples:.2%} ({result.equal_samples:,})"
    for name, value in (
        ("PSNR, B against A", result.psnr_between_db),
        ("PSNR, A against the images", result.psnr_a_db),
        ("PSNR, B against the images", result.psnr_b_db),
    ):
        if value is not None:
            facts[name] = f"{value:.2f} dB over {result.pictures:,} decoded pictures"
    show(config, asdict(result), aligned(facts))
    return 0
