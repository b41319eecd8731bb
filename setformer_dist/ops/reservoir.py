"""Bounded samples of tokens that do not depend on who computes them: of all tokens those with the lowest keys stay.

A token's key is a hash of (seed, optimizer step, place of its sample in the global batch, number within the sample).
So the tokens that stay are the same however the batch is cut into micro batches and ranks (bottom-k sampling; Cohen and
Kaplan, PODC 2007), and a sample of many steps is that of one long step.

Letters: b = images or sequences of a forward pass, n = tokens of one, h = heads, d = channels of one head, r = tokens
that stay, c = h d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from setformer_dist.ops.kmeans import Across
from setformer_dist.ops.splitmix import GOLDEN, mix64

_NOBODY = torch.iinfo(torch.int64).max  # greater than the key of any token but one in 2^64


@dataclass(frozen=True)
class Sample:
    """The tokens that stay, by rising keys.

    Attributes:
        keys_r: int64, no two alike.
        tokens_rc: fp32, all heads of a token side by side.
    """

    keys_r: torch.Tensor
    tokens_rc: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys_r)

    @classmethod
    def empty(cls, width: int, rows: int = 0, device: torch.device | None = None) -> Sample:
        """Return zeros for so many tokens of c = `width`."""
        keys = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(keys, torch.zeros((rows, width), dtype=torch.float32, device=device))

    def joined(self, other: Sample, limit: int) -> Sample:
        """Return the `limit` lowest of both; they share no token."""
        keys = torch.cat([self.keys_r, other.keys_r])
        order = keys.argsort()[:limit]
        return Sample(keys[order], torch.cat([self.tokens_rc, other.tokens_rc])[order])

    def bound(self, limit: int) -> int:
        """Return the key below which another token would still find a place among `limit`."""
        return int(self.keys_r[-1]) if len(self) >= limit else _NOBODY


def token_keys(base: int, places_m: torch.Tensor, b: int, n: int) -> torch.Tensor:
    """Return the keys of all tokens of a forward pass, (b, n) int64.

    Args:
        base: a hash of the seed and the optimizer step.
        places_m: where in the global batch each sample of the micro batch stands, int64, below 2^31; a sample's place,
            and not its id, because a batch may hold a sample twice.
        b: images or sequences, b / m of each sample, one after the other.
        n: tokens of each.
    """
    parts = b // len(places_m)
    numbers = torch.arange(parts * n, device=places_m.device).view(parts, n)
    # One word for each token of a step, mixed one to one: no two tokens of a step have the same key.
    words = (places_m << 32).view(-1, 1, 1) + numbers
    return mix64(words.view(b, n) * GOLDEN + base)


def lowest(x_bhnd: torch.Tensor, keys_bn: torch.Tensor, mask_bn: torch.Tensor | None, bound: int, limit: int) -> Sample:
    """Return the tokens of a forward pass with the lowest keys.

    Args:
        x_bhnd: any float dtype; tokens with a value that is not finite are none.
        keys_bn: see `token_keys`.
        mask_bn: True for valid tokens; None means all.
        bound: only keys below it.
        limit: tokens at most.
    """
    n = x_bhnd.shape[2]
    valid = x_bhnd.isfinite().all(-1).all(1) & (keys_bn < bound)
    valid = valid if mask_bn is None else valid & mask_bn
    numbers = valid.flatten().nonzero().squeeze(1)
    keys = keys_bn.flatten()[numbers]
    order = keys.argsort()[:limit]
    chosen = numbers[order]
    tokens = x_bhnd.detach()[chosen // n, :, chosen % n]
    return Sample(keys[order], tokens.float().flatten(1))


def union(held: Sample, new: Sample, limit: int, across: Across, rank: int, world_size: int) -> Sample:
    """Return the `limit` lowest of what all ranks hold together and of what each has new. Collective.

    Args:
        held: the same on all ranks, on the CPU.
        new: this rank's; no token is on two ranks.
        limit: tokens at most, the same on all ranks; `new` has no more.
        across: sums over the ranks, of tensors on the CPU.
        rank: of this process.
        world_size: of all.
    """
    keys = torch.zeros((world_size, limit), dtype=torch.int64)
    keys[rank] = _NOBODY
    keys[rank, : len(new)] = new.keys_r.cpu()
    everyone = across.sum(keys).flatten()
    candidates = torch.cat([held.keys_r, everyone[everyone < _NOBODY]])
    chosen = candidates.sort().values[:limit]
    # As integers, because a sum of floats with zeros would lose the sign of a zero.
    bits = torch.zeros((len(chosen), new.tokens_rc.shape[1]), dtype=torch.int32)
    _put(bits, chosen, new)
    bits = across.sum(bits)
    _put(bits, chosen, held)
    return Sample(chosen, bits.view(torch.float32))


def _put(bits: torch.Tensor, chosen: torch.Tensor, sample: Sample) -> None:
    """Write the tokens of a sample that are among the chosen into their rows."""
    if not len(chosen):
        return
    keys = sample.keys_r.cpu()
    rows = torch.searchsorted(chosen, keys).clamp_max(len(chosen) - 1)
    stays = chosen[rows] == keys
    bits[rows[stays]] = sample.tokens_rc.cpu().view(torch.int32)[stays]
