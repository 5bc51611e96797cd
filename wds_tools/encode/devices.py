"""What there is to encode with, for people: `wds-tools doctor`."""

from __future__ import annotations

import torch


def describe_devices() -> list[str]:
    """One line for each GPU that torch can use: its name, memory and compute capability; none without one."""
    lines = []
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        lines.append(f"cuda:{number} {found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}, {bf16}")
    return lines
