"""SeT attention: tokens are transported to m references and back, never to each other.

    tokens x --kernel map--> similarity (n x m) --Sinkhorn--> plan T --filter, renormalise--> G, S
    output = S (G^T x):  G gathers the tokens into m references, S scatters them back to n tokens

With one reference set and no filter, S G^T = n m T T^T: non-negative, symmetric, rows summing to 1, and of rank m.
The n x n matrix is never formed; the cost is linear in n. Equations: Shamsolmoali et al., "SeTformer is what you need
for vision and language" (AAAI 2024); plan and kernel: Mialon et al. (ICLR 2021). How the m references return to n
tokens is not in the paper; docs/ablation.md says what was tried.

    reference.py   "reference": for reading and proofs; any epsilon
    in_torch.py    "torch": PyTorch without an autograd graph; any device
    cpp.py         "cpp": fused C++ for CPUs, built at first use
    triton.py      "triton": fused for GPUs; neither the kernel matrix nor the plan ever reaches the device's memory
    split.py       tokens of an image on several ranks; in C++ on CPUs, in Triton on GPUs, in PyTorch on any

Letters: b = images, h = heads, n = tokens of one image, m = references, k = anchors, d = channels of one head.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Annotated, Literal

import pydantic
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.kernels import at_least_fp32, grid_places, line_places, nystrom, unit
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set import cpp, reference
from setformer_dist.ops.set.op import CPP_OR_TORCH, differentiable, no_triton
from setformer_dist.ops.set.problem import Inputs, SetProblem
from setformer_dist.ops.set.split import split_attention
from setformer_dist.ops.sinkhorn import working_dtype

log = logging.getLogger(__name__)

# "torch" was "fast" in versions before 2026-11-28, and is in the configs of their runs.
Implementation = Annotated[
    Literal["auto", "reference", "torch", "cpp", "triton"],
    pydantic.BeforeValidator(lambda name: "torch" if name == "fast" else name),
]

# Tokens or references of a line, or of the rows and columns of a grid.
Sides = tuple[int] | tuple[int, int]

# Where in its cell a token or reference lies, as a share of the cell.
OFFSETS = {"centres": 0.5, "edges": 0.0}

# TOML files hold lists where Python code writes tuples; both are welcome.
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
        tolerance: stop the rounds of a head and image once its largest relative error of a row sum is below;
            0 runs all rounds. Needs gradient = "implicit".
        gradient: "exact" differentiates the rounds that are run, "implicit" the fixed point they approach; the two
            agree as far as the rounds have converged.
        position_filter: multiply the plan by a Gaussian of the distance between a token's place and its
            reference's: on a line ("linear"), on a sqrt(m) x sqrt(m) grid ("separable"), or "none".
        places: where tokens and references lie in their cells of the line or grid: at "centres", (i + 1/2)/n and
            (j + 1/2)/m, or at "edges", i/n and j/m, where they move against each other as n changes. Models of
            versions before 2026-11-29 have "edges", and keep them (core/revisions.py).
        tau: width of that Gaussian as a share of the line or the image side.
        reference_sets: 1 set gathers and scatters, or 2: one gathers, another scatters.
        renormalise: divide by the row (column) sums after the filter, so that weights sum to 1 exactly.
        implementation: "auto" takes the fastest that this device, dtype and epsilon allow; a name forces one.
    """

    references: int | IntTuple = 16
    epsilon: float = pydantic.Field(default=0.1, gt=0)
    iterations: int = pydantic.Field(default=5, ge=1)
    kernel: Literal["similarity", "gaussian", "nystrom"] = "similarity"
    sigma: float = pydantic.Field(default=0.6, ge=0.01)
    anchors: int = pydantic.Field(default=0, ge=0)
    tolerance: float = pydantic.Field(default=0.0, ge=0)
    gradient: Literal["exact", "implicit"] = "exact"
    position_filter: Literal["none", "linear", "separable"] = "separable"
    places: Literal["centres", "edges"] = "centres"
    tau: float = pydantic.Field(default=0.25, ge=0.01)
    reference_sets: Literal[1, 2] = 2
    renormalise: bool = True
    implementation: Implementation = "auto"

    @pydantic.model_validator(mode="after")
    def _possible(self) -> SetAttentionConfig:
        for m in (self.references,) if isinstance(self.references, int) else self.references:
            if m < 1:
                raise ValueError(f"references = {m} must be at least 1")
            if self.position_filter == "separable" and math.isqrt(m) ** 2 != m:
                side = math.isqrt(m)
                raise ValueError(
                    f"position_filter = 'separable' lays the references on a square grid, but references = "
                    f"{m} is not a square: use {max(side, 1) ** 2} or {(side + 1) ** 2}, or position_filter = 'none'"
                )
        if self.anchors and self.kernel != "nystrom":
            raise ValueError(f"anchors = {self.anchors} has no use with kernel = {self.kernel!r}: leave it out")
        if self.tolerance and self.gradient == "exact":
            raise ValueError(
                f"tolerance = {self.tolerance} stops the rounds by their error, which only gradient = 'implicit' "
                "can differentiate: set it, or tolerance = 0"
            )
        return self

    def of_stage(self, index: int) -> SetAttentionConfig:
        """Return the choices of one stage, with a single number of references."""
        return self.model_copy(update={"references": self.references_of(index)})

    def references_of(self, index: int) -> int:
        """Return m of a stage, counted from 0."""
        return self.references if isinstance(self.references, int) else self.references[index]


def set_attention(
    x_bhnd: torch.Tensor,
    references_hmd: torch.Tensor,
    config: SetAttentionConfig,
    *,
    return_references_hmd: torch.Tensor | None = None,
    anchors_hkd: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    mask_bn: torch.Tensor | None = None,
    positions_bna: torch.Tensor | None = None,
    rows: Rows | None = None,
) -> torch.Tensor:
    """Transport tokens to the references and back.

    Args:
        x_bhnd: (b, h, n, d) tokens, any float dtype and strides; the work is done in at least fp32.
        references_hmd: (h, m, d), or (h, m, k) with the Nyström kernel; any length, brought to unit length here.
        config: the operator's choices.
        return_references_hmd: the second set; given if and only if config.reference_sets == 2.
        anchors_hkd: (h, k, d); given if and only if the kernel is "nystrom".
        grid: token rows and columns, n = rows * columns; needed by the separable filter.
        mask_bn: True for valid tokens; masked ones take no part and get 0. The linear filter counts valid tokens only,
            so that padding changes nothing. An image without any valid token gets 0.
        positions_bna: where each token lies, (b or 1, n, a) within [0, 1], a = 2 (row, column) for the separable filter
            and 1 for the linear one; for tokens that are no whole grid: some of an image's, or images of several sizes
            in one batch, padded and masked. Without it, tokens fill the grid or the line. No gradient flows to it.
        rows: the group of ranks that share each image (split.py), None where one rank has it whole. With a group, x
            is this rank's part of the tokens, n / p consecutive ones, and grid, mask and positions are of the whole.
            Collective.

    Returns:
        (b, h, n, d), or (b, h, n, k) with the Nyström kernel, in the dtype of x.

    Raises:
        ConfigError: an argument is missing, too many or of the wrong shape, or the implementation that
            `config.implementation` forces cannot compute it.
    """
    parts = 1 if rows is None else rows.count
    _check(x_bhnd, references_hmd, return_references_hmd, anchors_hkd, grid, mask_bn, positions_bna, config, parts)
    n = x_bhnd.shape[2] * parts
    whole = None
    if mask_bn is not None:
        whole = (mask_bn if rows is None else mask_bn[:, rows.own(n)])[:, None, :, None]
        x_bhnd = torch.where(whole, x_bhnd, 0.0)  # padding may hold anything, NaN included
        if positions_bna is not None:
            positions_bna = torch.where(mask_bn.unsqueeze(-1), positions_bna, 0.0)
        mask_bn = mask_bn | ~mask_bn.any(-1, keepdim=True)
    features = None
    if anchors_hkd is not None:
        features, x_bhnd = _nystrom_map(x_bhnd, anchors_hkd, config)
    if positions_bna is None:
        positions, places = _places(x_bhnd, references_hmd.shape[1], grid, mask_bn, config, parts)
    else:
        positions, places = _places_beside(positions_bna, x_bhnd, references_hmd.shape[1], config)
    inputs = Inputs(x_bhnd, features, references_hmd, return_references_hmd, positions, places, mask_bn)
    problem = problem_of(config)
    asked = config.implementation
    y = split_attention(inputs, problem, rows, asked) if rows else _on_one_rank(inputs, problem, asked)
    return y if whole is None else torch.where(whole, y, 0.0)


def _on_one_rank(inputs: Inputs, problem: SetProblem, asked: Implementation) -> torch.Tensor:
    implementation: str
    if inputs.x_bhnd.shape[0] == 0 or _transformed() or _exports_to_onnx(problem, inputs.features_bhnk is not None):
        # Neither torch.func nor ONNX knows our operator, and of no image there is nothing to be fast about.
        implementation = "reference"
    else:
        implementation = choose_implementation(inputs, problem, asked)
    if implementation == "reference":
        return reference.forward(inputs, problem)
    return differentiable(inputs, problem, implementation)


def marginal_error(
    x_bhnd: torch.Tensor,
    references_hmd: torch.Tensor,
    config: SetAttentionConfig,
    *,
    anchors_hkd: torch.Tensor | None = None,
    mask_bn: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return how far the plan is from its marginals after all the config's rounds: max over tokens |n (row sum) - 1|.

    A metric, without gradient; columns are exact by construction. Arguments as those of `set_attention`.

    Returns:
        (b, h), fp32 (fp64 for fp64).
    """
    one_set = config.model_copy(update={"reference_sets": 1, "position_filter": "none"})
    _check(x_bhnd, references_hmd, None, anchors_hkd, None, mask_bn, None, one_set)
    with torch.no_grad():
        mask = None if mask_bn is None else mask_bn | ~mask_bn.any(-1, keepdim=True)
        x = x_bhnd if mask is None else torch.where(mask[:, None, :, None], x_bhnd, 0.0)
        features = unit(at_least_fp32(x)) if anchors_hkd is None else _nystrom_map(x, anchors_hkd, config)[0]
        logs = reference.plan_of(at_least_fp32(features), unit(at_least_fp32(references_hmd)), mask, problem_of(config))
        count = x.shape[2] if mask is None else mask.sum(-1).view(-1, 1, 1)
        errors = (logs.exp().sum(-1) * count - 1.0).abs()
        return (errors if mask is None else errors.masked_fill(~mask.unsqueeze(1), 0.0)).amax(-1)


def problem_of(config: SetAttentionConfig) -> SetProblem:
    """Return the numbers of a config, as implementations take them."""
    return SetProblem(
        epsilon=config.epsilon,
        sigma=config.sigma if config.kernel == "gaussian" else 0.0,
        tau=config.tau,
        iterations=config.iterations,
        tolerance=config.tolerance,
        implicit=config.gradient == "implicit",
        renormalise=config.renormalise,
    )


def _nystrom_map(
    x_bhnd: torch.Tensor, anchors_hkd: torch.Tensor, config: SetAttentionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (features, values), both (b, h, n, k)."""
    b, h, n, d = x_bhnd.shape
    x = at_least_fp32(x_bhnd)  # fp16 squares overflow from 256 on, and its zero vectors have no inverse length
    flat = unit(x).transpose(0, 1).reshape(h, b * n, d)
    features = nystrom(flat, anchors_hkd, config.sigma).view(h, b, n, anchors_hkd.shape[1]).transpose(0, 1)
    # The kernel map of Mialon et al. keeps the length of x besides its direction.
    values = features * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return features.to(x_bhnd.dtype), values.to(x_bhnd.dtype)


def _places(
    x_bhnd: torch.Tensor,
    m: int,
    grid: tuple[int, int] | None,
    mask_bn: torch.Tensor | None,
    config: SetAttentionConfig,
    parts: int = 1,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return places of tokens (b or 1, n, axes) and of references (m, axes) within [0, 1).

    All n tokens of an image of so many parts like x; grid and mask are those of the whole image.
    """
    if config.position_filter == "none":
        return None, None
    dtype, device = torch.promote_types(x_bhnd.dtype, torch.float32), x_bhnd.device
    if config.position_filter == "separable":
        assert grid is not None
        side = math.isqrt(m)
        sides: tuple[Sides, Sides] = (grid[0], grid[1]), (side, side)
    else:
        sides = (x_bhnd.shape[2] * parts,), (m,)
    # What is traced or captured needs places of its own kind, made within the graph.
    if type(x_bhnd) is not torch.Tensor or torch.compiler.is_compiling() or _captures(x_bhnd.device):
        positions, places = _made_places(*sides, dtype, device, config.places)
    else:
        positions, places = _kept_places(*sides, dtype, device, config.places)
    if mask_bn is None or config.position_filter == "separable":
        return positions, places
    order = (mask_bn.cumsum(-1) - 1 + OFFSETS[config.places]).to(dtype)
    return (order / mask_bn.sum(-1, keepdim=True)).unsqueeze(-1), places


def _places_beside(
    positions_bna: torch.Tensor, x_bhnd: torch.Tensor, m: int, config: SetAttentionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return given places of tokens, as the implementations take them, and those of the references beside them."""
    dtype, device = torch.promote_types(x_bhnd.dtype, torch.float32), x_bhnd.device
    side = math.isqrt(m)
    sides: Sides = (side, side) if config.position_filter == "separable" else (m,)
    return positions_bna.detach().to(device, dtype), _of_sides(sides, dtype, device, config.places)


def _made_places(
    tokens: Sides, references: Sides, dtype: torch.dtype, device: torch.device, places: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        _of_sides(tokens, dtype, device, places).unsqueeze(0),
        _of_sides(references, dtype, device, places),
    )


def _of_sides(sides: Sides, dtype: torch.dtype, device: torch.device, places: str) -> torch.Tensor:
    offset = OFFSETS[places]
    if len(sides) == 1:
        return line_places(sides[0], dtype, device, offset=offset)
    return grid_places(sides, dtype, device, offset=offset)


@functools.lru_cache(maxsize=256)
def _kept_places(
    tokens: Sides, references: Sides, dtype: torch.dtype, device: torch.device, places: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `_made_places`, made once: ten small operations cost as much as attention over 100 tokens.

    They come from the CPU, as a copy waits until it has arrived, whatever stream asks for it next. They are plain
    tensors whatever surrounds the first call: inference, tracing or a transform of functions.
    """
    with torch.inference_mode(False), torch._C._DisableFuncTorch(), _disable_current_modes():
        positions, beside = _made_places(tokens, references, dtype, torch.device("cpu"), places)
        return positions.to(device), beside.to(device)


def _captures(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured, whose memory is its own and where no copy can be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ------------------------------------------------------------------------------------------ choice and validation


def _transformed() -> bool:
    """Return whether torch.func (vmap, grad, jvp) transforms the call; under a compiler it does so by itself."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def _exports_to_onnx(problem: SetProblem, nystrom_features: bool) -> bool:
    """Return whether the call is being written down for ONNX.

    Raises:
        ConfigError: ONNX cannot express it: the Nyström map, or rounds that stop early.
    """
    if not (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()):
        return False
    if nystrom_features:
        raise ConfigError("kernel = 'nystrom' takes eigenvalues, for which ONNX has no operator: export another kernel")
    if problem.tolerance > 0:
        raise ConfigError(
            f"tolerance = {problem.tolerance} stops rounds by their error, which an ONNX graph cannot: build the model "
            "with tolerance = 0 for the export; its outputs differ by no more than the tolerance"
        )
    return True


def choose_implementation(inputs: Inputs, problem: SetProblem, wanted: str = "auto") -> str:
    """Return what op.py calls the implementation, or "reference".

    Args:
        inputs: the tensors; their device, dtypes and shapes are looked at.
        problem: the numbers.
        wanted: "auto" takes the fastest that can compute it; a name forces one.

    Raises:
        ConfigError: the forced one cannot.
    """
    no_scalings, no_reference = _no_scalings(inputs, problem), _no_reference(problem)
    if wanted == "auto":
        on_cpu = inputs.x_bhnd.device.type == "cpu"
        reason = no_scalings if on_cpu else no_triton(inputs, problem)
        if reason is None:
            slower = cpp.unsuitable(inputs, problem) if on_cpu else None
            if slower is not None:  # a kernel that cannot be built speaks for itself (cpp_library.py)
                _say_once(f"SeT attention runs as 'torch': {slower}")
            return CPP_OR_TORCH if on_cpu else "triton"
        if no_scalings and no_reference:
            raise ConfigError(f"nothing computes this: {no_scalings}, and {no_reference}; raise epsilon to 0.01")
        chosen = "reference" if no_scalings else "torch"
        if inputs.x_bhnd.device.type != "meta":  # where nothing is computed
            _say_once(f"SeT attention runs as {chosen!r}: {reason}")
        return chosen
    reason = {"reference": no_reference, "torch": no_scalings, "cpp": no_scalings}.get(wanted)
    if wanted == "triton":
        reason = no_triton(inputs, problem)
    elif wanted == "cpp" and not torch.compiler.is_compiling():
        reason = reason or cpp.supports(inputs, problem)
    if reason is not None:
        raise ConfigError(f"implementation = {wanted!r} cannot compute this: {reason}; set implementation = 'auto'")
    return wanted


def _no_reference(problem: SetProblem) -> str | None:
    if problem.implicit or problem.tolerance > 0:
        return "the reference runs all rounds and differentiates them: gradient = 'implicit' is not for it"
    return None


def _no_scalings(inputs: Inputs, problem: SetProblem) -> str | None:
    if working_dtype(inputs.x_bhnd.dtype, problem.epsilon) is None:
        return f"epsilon = {problem.epsilon} is below 0.01, where only logarithms are safe"
    return None


_said: set[str] = set()


def _say_once(text: str) -> None:
    if not torch.compiler.is_compiling() and text not in _said:
        _said.add(text)
        log.warning("%s", text)


def _check(
    x: torch.Tensor,
    references: torch.Tensor,
    back: torch.Tensor | None,
    anchors: torch.Tensor | None,
    grid: tuple[int, int] | None,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    config: SetAttentionConfig,
    parts: int = 1,
) -> None:
    """Refuse what does not fit, naming the argument, what it is and what it should be."""
    if x.ndim != 4 or not x.dtype.is_floating_point or 0 in x.shape[1:]:
        raise ConfigError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}: expected floats (b, h, n, d), none empty but b"
        )
    others = {"references": references, "return_references": back, "anchors": anchors, "mask": mask}
    for name, tensor in (others | {"positions": positions}).items():
        if tensor is not None and tensor.device != x.device:
            raise ConfigError(f"{name} on device {str(tensor.device)!r}: expected {str(x.device)!r}, where x is")
    b, h, n, d = x.shape
    if (anchors is not None) != (config.kernel == "nystrom"):
        raise ConfigError(
            f"anchors are {_given(anchors)}, but kernel = {config.kernel!r}: give them with 'nystrom' only"
        )
    if anchors is not None and (anchors.ndim != 3 or anchors.shape[0] != h or anchors.shape[2] != d):
        raise ConfigError(f"anchors have shape {tuple(anchors.shape)}: expected ({h}, k, {d})")
    width = d if anchors is None else anchors.shape[1]
    m = config.references_of(0)
    for name, tensor in (("references", references), ("return_references", back)):
        if tensor is not None and tuple(tensor.shape) != (h, m, width):
            raise ConfigError(f"{name} have shape {tuple(tensor.shape)}: expected (h, m, d) = ({h}, {m}, {width})")
    if (back is not None) != (config.reference_sets == 2):
        raise ConfigError(
            f"return_references are {_given(back)}, but reference_sets = {config.reference_sets}: "
            "give them with reference_sets = 2 only"
        )
    n *= parts
    if positions is not None:
        _check_positions(positions, b, n, grid, config)
    elif config.position_filter == "separable" and grid is None:
        raise ConfigError("position_filter = 'separable' needs grid = (rows, columns) of the tokens: got None")
    if grid is not None and grid[0] * grid[1] != n:
        of = "x has" if parts == 1 else f"{parts} parts like x have"
        raise ConfigError(f"grid is {grid[0]} x {grid[1]} = {grid[0] * grid[1]} tokens, but {of} n = {n}")
    if mask is not None:
        _check_mask(mask, b, n)


def _check_positions(
    positions: torch.Tensor, b: int, n: int, grid: tuple[int, int] | None, config: SetAttentionConfig
) -> None:
    axes = {"none": 0, "linear": 1, "separable": 2}[config.position_filter]
    if axes == 0:
        raise ConfigError("positions are given, but position_filter = 'none' has no use for them: leave them out")
    if grid is not None:
        raise ConfigError("positions and a grid are given: a grid says where its tokens lie, so leave one of them out")
    if not positions.dtype.is_floating_point or tuple(positions.shape) not in ((b, n, axes), (1, n, axes)):
        raise ConfigError(
            f"positions have shape {tuple(positions.shape)} and dtype {positions.dtype}: "
            f"expected floats ({b} or 1, {n}, {axes})"
        )


def _given(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else "given"


def _check_mask(mask: torch.Tensor, b: int, n: int) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != (b, n):
        raise ConfigError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: "
            f"expected ({b}, {n}) of torch.bool, True for valid tokens"
        )
    # On a device the look at the mask would wait for it, and a compiler or a fake tensor has none to look at.
    looks = mask.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(mask, FakeTensor)
    looks = looks and b > 0 and not torch._C._are_functorch_transforms_active()
    if looks and not bool(mask.any()):
        raise ConfigError("mask leaves no token of any image: expected at least one True")
