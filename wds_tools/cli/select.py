"""`wds-tools select`."""

from __future__ import annotations

from dataclasses import dataclass

from wds_tools.cli.summary import Printed, dataset_record, print_dataset, print_json
from wds_tools.select.select import SelectConfig, select

EXAMPLE = "wds-tools select --input laion --where 'aesthetic >= 5.5 and not watermark' --unique codes --output laion-good"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, SelectConfig):
    """Choose samples of datasets: by conditions, keys or shares; without duplicates; in splits."""


def run(config: Config) -> int:
    """Choose, and say what came of it."""
    made = select(config)
    if config.json and config.split:
        print_json({url: dataset_record(url, manifest) for url, manifest in made.items()})
        return 0
    for url, manifest in made.items():
        print_dataset(url, manifest, json=config.json)
    return 0
