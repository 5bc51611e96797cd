"""Group normalisation whose statistics are right, for float32 on a CPU.

torch's own, given channels_last, adds up a million squares in float32 one after the other: latents of a 512 x 512 px image are
then off by 0.6 % of their spread, and by another amount for each number of threads, so that codes are not those of the plain
forward pass. Here float32 sums are short (512 numbers) and go on in float64. Everything else is left to torch.
Cost: that of torch's own.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

_RUN = 512


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, with the parameters of one that is there already."""

    @classmethod
    def of(cls, norm: nn.GroupNorm) -> Self:
        """Take over the parameters of `norm`."""
        with torch.device("meta"):
            own = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine)
        own.weight, own.bias = norm.weight, norm.bias
        return own

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...)."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        B, C = x.shape[:2]
        rows_BNC = x.flatten(2).transpose(1, 2)
        N = rows_BNC.shape[1]
        length = math.gcd(N, _RUN)
        runs_BnLC = rows_BNC.reshape(B, N // length, length, C)
        per_group = N * C // self.num_groups

        def over_groups(sums_BnC: Tensor) -> Tensor:
            return sums_BnC.sum(1).view(B, self.num_groups, -1).sum(2) / per_group

        mean_BG = over_groups(runs_BnLC.sum(2).double())
        square_BG = over_groups(torch.linalg.vector_norm(runs_BnLC, dim=2).double().square())
        rstd_BG = ((square_BG - mean_BG.square()).clamp_min(0) + self.eps).rsqrt()
        mean_BC, rstd_BC = (value.repeat_interleave(C // self.num_groups, 1) for value in (mean_BG, rstd_BG))
        scale_BC = rstd_BC * self.weight
        shift_BC = self.bias - mean_BC * scale_BC
        shape = (B, C, *[1] * (x.ndim - 2))
        return torch.addcmul(shift_BC.float().view(shape), x, scale_BC.float().view(shape))


def use_right_norms(model: nn.Module) -> None:
    """Put ours in the place of every GroupNorm of a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.GroupNorm:
                setattr(parent, name, GroupNorm.of(child))
