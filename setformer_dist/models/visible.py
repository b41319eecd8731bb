"""The visible units of images of which the rest is hidden: their tokens gathered, and laid back into the grid.

Blocks compute with the gathered tokens alone. Convolutions see the whole grid with zeros at hidden tokens, as SparK's
do (Tian et al. 2023), so that nothing of a hidden unit reaches a visible token.

Letters: B = images, R, C = rows and columns of units, V = visible units of an image, s = tokens of a unit's side in a
stage, c = channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from setformer_dist.ops.kernels import grid_places, line_places
from setformer_dist.ops.set.attention import OFFSETS, SetAttentionConfig


@dataclass(frozen=True)
class VisibleUnits:
    """Some units of each image, the same number in all.

    Attributes:
        index_bv: (B, V) int64, units in row-major order, rising.
        rows: R.
        columns: C.
    """

    index_bv: torch.Tensor
    rows: int
    columns: int

    def gather(self, map_bhwc: torch.Tensor) -> torch.Tensor:
        """(B, R s, C s, c) -> (B, V s, s, c), unit below unit."""
        b, height, _, c = map_bhwc.shape
        s = height // self.rows
        units = map_bhwc.view(b, self.rows, s, self.columns, s, c).transpose(2, 3).reshape(-1, s, s, c)
        return units.index_select(0, self._flat()).view(b, -1, s, c)

    def scatter(self, x_btsc: torch.Tensor) -> torch.Tensor:
        """(B, V s, s, c) -> (B, R s, C s, c), zeros at hidden tokens."""
        b, _, s, c = x_btsc.shape
        units = x_btsc.new_zeros(b * self.rows * self.columns, s, s, c)
        units = units.index_copy(0, self._flat(), x_btsc.reshape(-1, s, s, c))
        whole = units.view(b, self.rows, self.columns, s, s, c).transpose(2, 3)
        return whole.reshape(b, self.rows * s, self.columns * s, c)

    def seen(self, s: int) -> torch.Tensor:
        """Return (B, R s, C s) bool, True at visible tokens."""
        b = self.index_bv.shape[0]
        flags = torch.zeros(b, self.rows * self.columns, dtype=torch.bool, device=self.index_bv.device)
        flags = flags.scatter(1, self.index_bv, value=True).view(b, self.rows, self.columns)
        return flags.repeat_interleave(s, 1).repeat_interleave(s, 2)

    def hidden(self) -> VisibleUnits:
        """Return the other units of each image."""
        order = self.seen(1).flatten(1).to(torch.int8).argsort(dim=1, stable=True)
        return VisibleUnits(order[:, : order.shape[1] - self.index_bv.shape[1]], self.rows, self.columns)

    def positions(self, s: int, config: SetAttentionConfig) -> torch.Tensor | None:
        """Return where the gathered tokens lie, as `set_attention` takes it: (B, V s s, axes); None without a filter.

        Args:
            s: tokens of a unit's side.
            config: of the attention.
        """
        if config.position_filter == "none":
            return None
        grid, device = (self.rows * s, self.columns * s), self.index_bv.device
        offset = OFFSETS[config.places]
        if config.position_filter == "separable":
            places = grid_places(grid, torch.float64, device, offset=offset)
        else:
            places = line_places(grid[0] * grid[1], torch.float64, device, offset=offset)
        whole = places.view(1, *grid, -1).expand(self.index_bv.shape[0], -1, -1, -1)
        return self.gather(whole.contiguous()).flatten(1, 2)

    def _flat(self) -> torch.Tensor:
        b = self.index_bv.shape[0]
        first = torch.arange(b, device=self.index_bv.device).unsqueeze(1) * (self.rows * self.columns)
        return (self.index_bv + first).flatten()
