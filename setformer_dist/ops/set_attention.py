"""SeT attention as pure functions: tokens are transported to m references and back, never to each other.

    tokens x --kernel map--> similarity (n x m) --Sinkhorn--> plan T --filter, renormalise--> G, S
    output = S (G^T x):  G gathers the tokens into m references, S scatters them back to n tokens

With one reference set and no filter, S G^T = n m T T^T: non-negative, symmetric, rows summing to 1, and of rank m.
The n x n matrix is never formed; the cost is linear in n. Equations: Shajari et al., "SeTformer is what you need
for vision and language" (AAAI 2024); plan and kernel: Mialon et al. (ICLR 2021). How the m references return to n
tokens is not in the paper; docs/ablation.md says what was tried.

Letters: h = heads, b = images, n = tokens of one image, m = references, k = anchors, d = channels of one head.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import pydantic
import torch

from setformer_dist.core.config import FrozenConfig
from setformer_dist.ops.kernels import at_least_fp32, gaussian, log_separable_filter, nystrom, unit
from setformer_dist.ops.sinkhorn import transport_plan

# Config pages hold lists where Python code writes tuples; both are welcome.
IntTuple = Annotated[tuple[int, ...], pydantic.BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class SetAttentionConfig(FrozenConfig):
    """Choices of one SeT attention layer. The defaults are those of docs/ablation.md.

    Attributes:
        references: m, size of a reference set of one head; one number, or one for each stage of a model.
        epsilon: entropy of the transport, in units of the similarity (which lies within [-1, 1]).
        iterations: Sinkhorn rounds; with epsilon >= 0.1, 5 leave the rows of random features within 0.3 % of
            their sum (before renormalisation).
        kernel: similarity of unit vectors as it is, its Gaussian kernel, or Nyström features of that kernel.
        sigma: width of the Gaussian (kernels "gaussian" and "nystrom").
        anchors: k per head of the Nyström map; 0 means as many as the head has channels.
        position_filter: multiply the plan by a Gaussian of the distance between a token's place and its
            reference's place on a sqrt(m) x sqrt(m) grid, or not.
        tau: width of that Gaussian as a share of the image side.
        reference_sets: 1 set gathers and scatters, or 2: one gathers, another scatters.
        renormalise: divide by the row (column) sums after the filter, so that weights sum to 1 exactly.
    """

    references: int | IntTuple = 16
    epsilon: float = pydantic.Field(default=0.1, gt=0)
    iterations: int = pydantic.Field(default=5, ge=1)
    kernel: Literal["similarity", "gaussian", "nystrom"] = "similarity"
    sigma: float = pydantic.Field(default=0.6, gt=0)
    anchors: int = pydantic.Field(default=0, ge=0)
    position_filter: Literal["none", "separable"] = "separable"
    tau: float = pydantic.Field(default=0.25, gt=0)
    reference_sets: Literal[1, 2] = 2
    renormalise: bool = True

    @pydantic.model_validator(mode="after")
    def _possible(self) -> SetAttentionConfig:
        for m in (self.references,) if isinstance(self.references, int) else self.references:
            if m < 1:
                raise ValueError(f"references = {m} must be at least 1")
            if self.position_filter == "separable" and math.isqrt(m) ** 2 != m:
                side = math.isqrt(m)
                raise ValueError(
                    f"position_filter = 'separable' lays the references on a square grid, but references = "
                    f"{m} is not a square: use {side**2} or {(side + 1) ** 2}, or position_filter = 'none'"
                )
        if self.anchors and self.kernel != "nystrom":
            raise ValueError(f"anchors = {self.anchors} has no use with kernel = {self.kernel!r}: leave it out")
        return self

    def of_stage(self, index: int) -> SetAttentionConfig:
        """Return the choices of one stage, with a single number of references."""
        return self.model_copy(update={"references": self.references_of(index)})

    def references_of(self, index: int) -> int:
        """Return m of a stage, counted from 0."""
        return self.references if isinstance(self.references, int) else self.references[index]


def set_attention(
    x_hbnd: torch.Tensor,
    references_hmd: torch.Tensor,
    grid: tuple[int, int],
    config: SetAttentionConfig,
    *,
    return_references_hmd: torch.Tensor | None = None,
    anchors_hkd: torch.Tensor | None = None,
) -> torch.Tensor:
    """Transport tokens to the references and back.

    Args:
        x_hbnd: (h, b, n, d) tokens, any float dtype; all matrix products but the Sinkhorn run in it.
        references_hmd: (h, m, d), or (h, m, k) with the Nyström kernel; any length, brought to unit length here.
        grid: token rows and columns, n = rows * columns.
        config: the operator's choices.
        return_references_hmd: the second set; given if and only if config.reference_sets == 2.
        anchors_hkd: (h, k, d); given if and only if the kernel is "nystrom".

    Returns:
        (h, b, n, d), or (h, b, n, k) with the Nyström kernel.
    """
    assert (return_references_hmd is not None) == (config.reference_sets == 2)
    features, values = _feature_map(x_hbnd, config, anchors_hkd)
    gather_plan = _plan(features, references_hmd, config)
    scatter_plan = gather_plan if return_references_hmd is None else _plan(features, return_references_hmd, config)
    gather, scatter = _weights(gather_plan, scatter_plan, grid, config)
    # The weights are rounded to the compute dtype only now, at their final scale (rows or columns sum to 1).
    pooled_hbmd = gather.to(values.dtype).mT @ values
    return scatter.to(values.dtype) @ pooled_hbmd


def _feature_map(
    x_hbnd: torch.Tensor, config: SetAttentionConfig, anchors_hkd: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is compared with the references (unit length at most) and what is transported."""
    features = unit(x_hbnd)
    if config.kernel != "nystrom":
        return features, x_hbnd
    assert anchors_hkd is not None
    h, b, n, d = x_hbnd.shape
    features = nystrom(features.reshape(h, b * n, d), anchors_hkd, config.sigma).view(h, b, n, -1)
    # The kernel map of Mialon et al. keeps the length of x beside its direction.
    return features, features * torch.linalg.vector_norm(x_hbnd, dim=-1, keepdim=True).to(features.dtype)


def _plan(features_hbnd: torch.Tensor, references_hmd: torch.Tensor, config: SetAttentionConfig) -> torch.Tensor:
    """Return the transport plan (h, b, n, m) of every head and image, marginals 1/n and 1/m."""
    h, b, n, d = features_hbnd.shape
    # One product per head over the tokens of all images: h large products instead of h * b small ones.
    references = unit(references_hmd).to(features_hbnd.dtype)
    similarity = (features_hbnd.reshape(h, b * n, d) @ references.mT).view(h, b, n, -1)
    if config.kernel == "gaussian":
        similarity = gaussian(at_least_fp32(similarity), config.sigma)
    return transport_plan(similarity, config.epsilon, config.iterations)


def _weights(
    gather_plan: torch.Tensor, scatter_plan: torch.Tensor, grid: tuple[int, int], config: SetAttentionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn plans into weights: columns of the first and rows of the second sum to 1 (with renormalise)."""
    n, m = gather_plan.shape[-2:]
    if config.position_filter == "none":
        gather, scatter = gather_plan, scatter_plan
    else:
        side = math.isqrt(m)
        log_filter = log_separable_filter(grid, side, config.tau, gather_plan.device).to(gather_plan.dtype)
        if config.renormalise:
            # Any factor per column (row) cancels in the renormalisation; taking the largest entry as 1 keeps
            # a narrow filter on a coarse grid from underflowing to a column (row) of zeros.
            gather = gather_plan * torch.exp(log_filter - log_filter.amax(0, keepdim=True))
            scatter = scatter_plan * torch.exp(log_filter - log_filter.amax(1, keepdim=True))
        else:
            gather, scatter = gather_plan * torch.exp(log_filter), scatter_plan * torch.exp(log_filter)
    if not config.renormalise:
        return gather * m, scatter * n
    tiny = torch.finfo(gather.dtype).tiny
    return (
        gather / gather.sum(-2, keepdim=True).clamp_min(tiny),
        scatter / scatter.sum(-1, keepdim=True).clamp_min(tiny),
    )
