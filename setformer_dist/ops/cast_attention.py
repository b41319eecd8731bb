"""CAST attention as pure functions: softmax attention inside clusters of tokens, summaries between the clusters.

    affinity of every token to N_c surrogate tokens --> each cluster takes its kappa best tokens (or every token its
    best cluster) --> softmax attention inside each cluster --> one summary of values per cluster -->
    a token's output = its own clusters' attention and the other clusters' summaries, weighted by its affinities

With N_c * kappa = n the cost is n * (2 kappa + 4 N_c) products per channel: of order n^1.5 at best, never n x n.
Source: van Engelenhoven, Strisciuglio, Talavera, "CAST: Clustering self-attention using surrogate tokens" (2024). The
paper's structure is certain, its gates and temperatures are not; where they are a reading of ours, the code says so.
Affinities and weights are computed in fp32 (fp64 for fp64 inputs), attention inside clusters in the compute dtype.

Letters: b = images or sequences, h = heads, n = tokens, c = clusters, k = members of one cluster (kappa),
d = channels of one head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.kernels import at_least_fp32, no_autocast

Assignment = Literal["top_k", "single"]


class Clusters(NamedTuple):
    """Which tokens are in which cluster, the same for all heads.

    Attributes:
        token_bck: int64, the token in each place.
        member_bck: bool, False for places without a token (`token_bck` then holds some token's number).
    """

    token_bck: torch.Tensor
    member_bck: torch.Tensor


def cast_attention(
    q_bhnd: torch.Tensor,
    k_bhnd: torch.Tensor,
    v_bhnd: torch.Tensor,
    surrogates_hcd: torch.Tensor,
    *,
    size: int,
    assignment: Assignment = "top_k",
    gate_bn: torch.Tensor | None = None,
    mask_bn: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend inside clusters and to the summaries of the other clusters.

    Args:
        q_bhnd: queries, any float dtype.
        k_bhnd: keys.
        v_bhnd: values.
        surrogates_hcd: learned tokens, one per cluster and head.
        size: kappa, members of a cluster; more than n means n.
        assignment: "top_k": each cluster takes its best tokens, so that a token is in none, one or several of them;
            "single": each token is in exactly one (see `single_assignment`).
        gate_bn: phi, which trades a token's role as a query against its role as a key; None for an even gate.
        mask_bn: bool, True for valid tokens; the others take no part and their output is 0.

    Returns:
        (b, h, n, d) in the dtype of v, the same to the last bit every time, on GPUs too.

    Raises:
        ConfigError: shapes that do not fit, a mask that is not boolean, clusters too small to hold all tokens.
    """
    _check(q_bhnd, k_bhnd, v_bhnd, surrogates_hcd, size, gate_bn, mask_bn)
    if mask_bn is not None:
        hidden_b1n1 = ~mask_bn[:, None, :, None]
        # Blanked, so that not even NaN in the padding can reach a product or a gradient.
        q_bhnd, k_bhnd, v_bhnd = (x.masked_fill(hidden_b1n1, 0) for x in (q_bhnd, k_bhnd, v_bhnd))
        gate_bn = None if gate_bn is None else gate_bn.masked_fill(~mask_bn, 0)
    with no_autocast(q_bhnd.device):
        surrogates_hdc = at_least_fp32(surrogates_hcd).mT
        queries_bhnc, keys_bhnc = at_least_fp32(q_bhnd) @ surrogates_hdc, at_least_fp32(k_bhnd) @ surrogates_hdc
        phi_bn = None if gate_bn is None else gate_bn.to(queries_bhnc.dtype)
        with torch.no_grad():  # a choice of tokens has no derivative
            affinity_bnc = cluster_affinity(queries_bhnc, keys_bhnc, phi_bn)
            choose = top_k_assignment if assignment == "top_k" else single_assignment
            clusters = choose(affinity_bnc, size, mask_bn)
        attended_bhckd, members_v_bhckd = _attend_inside(q_bhnd, k_bhnd, v_bhnd, clusters)
        summary_bhcd = _summarise(members_v_bhckd, keys_bhnc, phi_bn, clusters, q_bhnd.shape[-1])
        y_bhnd = _combine(attended_bhckd, summary_bhcd, queries_bhnc, phi_bn, clusters, q_bhnd.shape[-1])
    if mask_bn is not None:
        y_bhnd = y_bhnd.masked_fill(hidden_b1n1, 0)
    return y_bhnd.to(v_bhnd.dtype)


# -------------------------------------------------------------------------------------------------------- choice


def cluster_affinity(
    queries_bhnc: torch.Tensor, keys_bhnc: torch.Tensor, gate_bn: torch.Tensor | None = None
) -> torch.Tensor:
    """Return (b, n, c): sigma(phi) softmax(A_q) + (1 - sigma(phi)) softmax(A_k), summed over the heads.

    The softmax runs over the clusters (our reading of the paper's f). An even gate takes sigma = 1/2.
    """
    queries_bnc, keys_bnc = queries_bhnc.softmax(-1).sum(1), keys_bhnc.softmax(-1).sum(1)
    if gate_bn is None:
        return 0.5 * (queries_bnc + keys_bnc)
    share_bn1 = gate_bn.sigmoid().unsqueeze(-1)
    return share_bn1 * queries_bnc + (1.0 - share_bn1) * keys_bnc


def top_k_assignment(affinity_bnc: torch.Tensor, size: int, mask_bn: torch.Tensor | None = None) -> Clusters:
    """Give each cluster the `size` valid tokens of largest affinity to it; of equal ones the earlier."""
    b, n, c = affinity_bnc.shape
    if mask_bn is not None:
        affinity_bnc = affinity_bnc.masked_fill(~mask_bn.unsqueeze(-1), -torch.inf)
    order_bcn = _descending(affinity_bnc.mT.contiguous())
    token_bck = order_bcn[..., :size].contiguous()
    if mask_bn is None:
        return Clusters(token_bck, torch.ones_like(token_bck, dtype=torch.bool))
    return Clusters(token_bck, mask_bn.unsqueeze(1).expand(b, c, n).gather(-1, token_bck))


def single_assignment(affinity_bnc: torch.Tensor, size: int, mask_bn: torch.Tensor | None = None) -> Clusters:
    """Give each valid token one cluster: in the order of their best affinity, the best that still has a place.

    Between two moments at which a token finds its choice full, all choices can be made at once. At each such moment a
    cluster closes for good, so c rounds over all tokens do what n steps of one token would.

    Raises:
        ConfigError: c * size places are fewer than n tokens.
    """
    b, n, c = affinity_bnc.shape
    if c * size < n:
        raise ConfigError(
            f"size = {size} with {c} clusters gives {c * size} places for {n} tokens: "
            f"use size = {-(-n // c)} or more, or assignment = 'top_k'"
        )
    size = min(size, n)
    best_bn = affinity_bnc.amax(-1)
    if mask_bn is not None:
        best_bn = best_bn.masked_fill(~mask_bn, -torch.inf)
    order_bn = _descending(best_bn)
    affinity_bnc = affinity_bnc.gather(1, order_bn.unsqueeze(-1).expand(b, n, c))
    pending_bn = torch.ones_like(order_bn, dtype=torch.bool) if mask_bn is None else mask_bn.gather(1, order_bn)
    place_bn = torch.full_like(order_bn, c * size)  # one place behind the last, for tokens without any
    used_b1c = order_bn.new_zeros(b, 1, c)
    for _ in range(c):
        choice_bn1 = affinity_bnc.masked_fill(used_b1c >= size, -torch.inf).argmax(-1, keepdim=True)
        wants_bnc = torch.zeros_like(affinity_bnc, dtype=torch.bool).scatter(2, choice_bn1, pending_bn.unsqueeze(-1))
        rank_bn = (used_b1c + wants_bnc.long().cumsum(1)).gather(2, choice_bn1).squeeze(-1)
        refused_bn = pending_bn & (rank_bn > size)
        settled_bn = pending_bn & (refused_bn.long().cumsum(1) == 0)
        place_bn = torch.where(settled_bn, choice_bn1.squeeze(-1) * size + rank_bn - 1, place_bn)
        used_b1c = used_b1c + (wants_bnc & settled_bn.unsqueeze(-1)).sum(1, keepdim=True)
        pending_bn = pending_bn & ~settled_bn
    token = order_bn.new_zeros(b, c * size + 1).scatter(1, place_bn, order_bn)
    member = torch.zeros_like(token, dtype=torch.bool).scatter(1, place_bn, True)
    return Clusters(token[:, :-1].view(b, c, size), member[:, :-1].view(b, c, size))


def _descending(values: torch.Tensor) -> torch.Tensor:
    """Return the order of the last axis, largest first and of equal values the earlier."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort, but its TopK says which of equal values comes first: the earlier one.
        return values.topk(values.shape[-1], dim=-1).indices
    # Not torch.topk elsewhere, which leaves that open.
    return values.argsort(dim=-1, descending=True, stable=True)


def gather_members(x_bhnd: torch.Tensor, clusters: Clusters) -> torch.Tensor:
    """Return (b, h, c, k, d): the tokens of each cluster."""
    (b, h, _, d), (_, c, k) = x_bhnd.shape, clusters.token_bck.shape
    taken_bhpd = _taken(x_bhnd, clusters.token_bck.flatten(1), x_bhnd.device.type != "cpu")
    return taken_bhpd.reshape(b, h, c, k, d)


def scatter_members(y_bhckd: torch.Tensor, clusters: Clusters, n: int) -> torch.Tensor:
    """Return (b, h, n, d): for each token the sum over its places; the inverse of gathering where it has one."""
    y_bhpd = y_bhckd.masked_fill(~clusters.member_bck[:, None, :, :, None], 0).flatten(2, 3)
    return _added(y_bhpd, clusters.token_bck.flatten(1), n, y_bhpd.device.type != "cpu")


# A token in several clusters adds up several numbers, here and in the gradient of taking it. On a GPU scatter_add does
# so by atomics, in any order; index_put sorts first. On a CPU it is index_put that has no order.


def _taken(x_bhnd: torch.Tensor, token_bp: torch.Tensor, sorts: bool) -> torch.Tensor:
    """Return (b, h, p, d): the tokens of each of p places."""
    b, h, _, d = x_bhnd.shape
    if not sorts:
        return x_bhnd.gather(2, token_bp[:, None, :, None].expand(b, h, -1, d))
    image_b1 = torch.arange(b, device=x_bhnd.device).unsqueeze(1)
    return x_bhnd.transpose(1, 2)[image_b1, token_bp].transpose(1, 2)


def _added(y_bhpd: torch.Tensor, token_bp: torch.Tensor, n: int, sorts: bool) -> torch.Tensor:
    """Return (b, h, n, d): for each token the sum over its places."""
    b, h, _, d = y_bhpd.shape
    if not sorts:
        return y_bhpd.new_zeros(b, h, n, d).scatter_add(2, token_bp[:, None, :, None].expand(b, h, -1, d), y_bhpd)
    image_b1 = torch.arange(b, device=y_bhpd.device).unsqueeze(1)
    sums_bnhd = y_bhpd.new_zeros(b, n, h, d).index_put((image_b1, token_bp), y_bhpd.transpose(1, 2), accumulate=True)
    return sums_bnhd.transpose(1, 2)


# ----------------------------------------------------------------------------------------------------- attention


def _attend_inside(
    q_bhnd: torch.Tensor, k_bhnd: torch.Tensor, v_bhnd: torch.Tensor, clusters: Clusters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax attention among the members of each cluster, temperature sqrt(d), and their values."""
    q, k, v = (gather_members(x, clusters) for x in (q_bhnd, k_bhnd, v_bhnd))
    member_bck = clusters.member_bck
    # A cluster without members must still have something to sum over; its places are dropped later.
    keys_b1c1k = (member_bck | ~member_bck.any(-1, keepdim=True))[:, None, :, None, :]
    b, h, c, size, d = q.shape
    keys = keys_b1c1k.expand(b, h, c, 1, size).reshape(b, h * c, 1, size)
    y = F.scaled_dot_product_attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), attn_mask=keys)
    return y.view(b, h, c, size, d), v


def _summarise(
    members_v_bhckd: torch.Tensor,
    keys_bhnc: torch.Tensor,
    gate_bn: torch.Tensor | None,
    clusters: Clusters,
    d: int,
) -> torch.Tensor:
    """Return (b, h, c, d): the values of each cluster, weighted by its members' affinity as keys.

    The gate enters as softplus(-phi) + 1, so that it trades against its sign in `_combine` (our reading).
    """
    score_bhnc = keys_bhnc * (_temper(gate_bn, -1.0) * d**-0.5)
    b, h, _, c = score_bhnc.shape
    index = clusters.token_bck.unsqueeze(1).expand(b, h, c, -1)
    score_bhck = score_bhnc.mT.gather(-1, index).masked_fill(
        ~clusters.member_bck.unsqueeze(1), torch.finfo(score_bhnc.dtype).min
    )
    weight_bhc1k = score_bhck.softmax(-1).unsqueeze(-2)
    summary_bhc1d: torch.Tensor = weight_bhc1k @ members_v_bhckd.to(weight_bhc1k.dtype)
    return summary_bhc1d.squeeze(-2)


def _combine(
    attended_bhckd: torch.Tensor,
    summary_bhcd: torch.Tensor,
    queries_bhnc: torch.Tensor,
    gate_bn: torch.Tensor | None,
    clusters: Clusters,
    d: int,
) -> torch.Tensor:
    """Weight a token's own clusters' attention and the other clusters' summaries by its affinity as a query."""
    b, h, n, c = queries_bhnc.shape
    score_bhnc = queries_bhnc * (_temper(gate_bn, 1.0) * d**-0.5)
    filled_bc = clusters.member_bck.any(-1)
    # An empty cluster has no summary and takes no share.
    score_bhnc = score_bhnc.masked_fill(~filled_bc[:, None, None, :], torch.finfo(score_bhnc.dtype).min)
    weight_bhnc = score_bhnc.softmax(-1)
    index = clusters.token_bck.unsqueeze(1).expand(b, h, c, -1)
    own_bhck = weight_bhnc.mT.gather(-1, index)
    own_bhnd = scatter_members(own_bhck.unsqueeze(-1) * attended_bhckd.to(weight_bhnc.dtype), clusters, n)
    belongs_bcn = clusters.token_bck.new_zeros(b, c, n).scatter_add(2, clusters.token_bck, clusters.member_bck.long())
    other_bhnc = weight_bhnc.masked_fill((belongs_bcn > 0).mT.unsqueeze(1), 0)
    others_bhnd: torch.Tensor = other_bhnc @ summary_bhcd
    return own_bhnd + others_bhnd


def _temper(gate_bn: torch.Tensor | None, sign: float) -> torch.Tensor | float:
    """Return softplus(sign * phi) + 1 as (b, 1, n, 1), or 1 for an even gate."""
    return 1.0 if gate_bn is None else (F.softplus(sign * gate_bn) + 1.0)[:, None, :, None]


# -------------------------------------------------------------------------------------------------------- checks


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    surrogates: torch.Tensor,
    size: int,
    gate: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    b, h, n, d = q.shape
    for name, given in (("k_bhnd", k), ("v_bhnd", v)):
        if given.shape != q.shape:
            raise ConfigError(f"{name} has shape {tuple(given.shape)}: it must have that of q_bhnd, {tuple(q.shape)}")
    if surrogates.ndim != 3 or (surrogates.shape[0], surrogates.shape[2]) != (h, d) or surrogates.shape[1] < 1:
        raise ConfigError(
            f"surrogates_hcd has shape {tuple(surrogates.shape)}: with q_bhnd {tuple(q.shape)} it must be "
            f"({h}, c, {d}) with c at least 1"
        )
    if size < 1:
        raise ConfigError(f"size = {size} must be at least 1")
    if gate is not None and gate.shape != (b, n):
        raise ConfigError(f"gate_bn has shape {tuple(gate.shape)}: it must be {(b, n)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (b, n)):
        raise ConfigError(f"mask_bn is {mask.dtype} {tuple(mask.shape)}: it must be torch.bool {(b, n)}")
