"""Entropic optimal transport with uniform marginals: the plan that SeT uses as attention.

    P = argmin_{P 1 = 1/n, P^T 1 = 1/m}  - sum_ij s_ij P_ij - epsilon H(P)      (similarity s, cost -s)

Two ways to the same plan, proved equal by the tests, gradients included:

* `sinkhorn_log` iterates on potentials with logsumexp: right for any similarity and any epsilon, slow.
* `sinkhorn_scaling` iterates on scalings, u = a / (K v), v = (1/m) / (K^T u) with K = exp(s / epsilon): two
  matrix-vector products a round instead of n * m exponentials, and an adjoint of its own. It needs |s| <= 1, for
  which fp32 is wide enough down to epsilon = 0.05 and fp64 down to 0.01 (`working_dtype`).

Both update rows first and columns last, as in Mialon et al. (ICLR 2021): columns sum to 1/m exactly, rows up to
convergence. Both compute in at least fp32 whatever the compute dtype or autocast around them.

Letters: z = batch (heads x images), n = tokens, m = references, L = rounds; a = wanted row sums, 1/n or with masked
tokens 1/(number of valid ones) and 0.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from setformer_dist.core.errors import ConfigError
from setformer_dist.ops import cpp_library
from setformer_dist.ops.kernels import at_least_fp32, no_autocast

# exp(20) bounds the entries of K in fp32, exp(100) in fp64; scalings and their products stay within their squares.
MAX_EXPONENT = {torch.float32: 20.0, torch.float64: 100.0}


def working_dtype(dtype: torch.dtype, epsilon: float) -> torch.dtype | None:
    """Return the dtype in which scalings of this epsilon are safe for such inputs, None where only logarithms are."""
    for wide, largest in MAX_EXPONENT.items():
        if epsilon * largest >= 1.0 - 1e-9:
            return torch.promote_types(wide, torch.promote_types(dtype, torch.float32))
    return None


def transport_plan(
    similarity: torch.Tensor, epsilon: float, iterations: int, tolerance: float = 0.0, *, implicit: bool = False
) -> torch.Tensor:
    """Return the plan, by scalings where they are safe and by logarithms elsewhere.

    Args:
        similarity: (..., n, m), any float dtype. Scalings hold what lies within [-1, 1]; what does not goes by
            logarithms, as far as one can look: on a device, or under a compiler, that is the caller's to know.
        epsilon: strength of the entropy, in units of the similarity.
        iterations: rounds L >= 1, at most; a round sets the row sums, then the column sums.
        tolerance: stop once the largest relative error of a row sum is below; 0 runs all rounds. Scalings only.
        implicit: differentiate at the fixed point instead of through the rounds. Scalings only.

    Returns:
        (..., n, m), fp32 (fp64 for fp64), non-negative; columns sum to 1/m.

    Raises:
        ConfigError: it is empty, or a tolerance or the implicit gradient where only logarithms hold it.
    """
    if similarity.ndim < 2 or 0 in similarity.shape[-2:] or not similarity.dtype.is_floating_point:
        raise ConfigError(f"similarity is {similarity.dtype} {tuple(similarity.shape)}: give floats (..., n, m)")
    if not epsilon > 0 or iterations < 1:
        raise ConfigError(f"epsilon = {epsilon} must be above 0, and iterations = {iterations} at least 1")
    dtype = working_dtype(similarity.dtype, epsilon)
    if dtype is None or _too_wide(similarity, dtype, epsilon):
        if tolerance > 0 or implicit:
            raise ConfigError(
                f"epsilon = {epsilon} leaves only logarithms for these similarities: tolerance and implicit need "
                "epsilon of at least 0.01 and similarities within [-1, 1]"
            )
        return sinkhorn_log(similarity, epsilon, iterations)
    plan = sinkhorn_scaling(similarity.to(dtype), epsilon, iterations, tolerance, implicit=implicit)
    return plan.to(torch.promote_types(similarity.dtype, torch.float32))


def _too_wide(similarity: torch.Tensor, dtype: torch.dtype, epsilon: float) -> bool:
    """Return whether K would leave the range of its dtype, where one can look without waiting for a device."""
    if similarity.device.type != "cpu" or torch.compiler.is_compiling() or type(similarity) is not torch.Tensor:
        return False
    if similarity.numel() == 0 or torch._C._are_functorch_transforms_active():
        return False
    largest = float(similarity.detach().abs().amax())  # NaN stays NaN, in either way
    return largest > max(1.0, MAX_EXPONENT[dtype] * epsilon) * (1.0 + 1e-6)


# --------------------------------------------------------------------------------------------------- logarithms


def log_plan(exponent: torch.Tensor, iterations: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logarithm of the plan from s / epsilon, by potentials; plain autograd through the rounds.

    Args:
        exponent: (..., n, m), any size.
        iterations: rounds.
        mask: broadcasts to (..., n), True for valid tokens, at least one per problem; None means all.

    Returns:
        (..., n, m). Masked tokens keep a finite row that no column sum has seen.
    """
    n, m = exponent.shape[-2:]
    hidden: torch.Tensor | float = 0.0
    log_n: torch.Tensor | float = math.log(n)
    if mask is not None:
        hidden = torch.zeros(mask.shape, dtype=exponent.dtype, device=mask.device).masked_fill(~mask, -math.inf)
        hidden = hidden.unsqueeze(-1)
        log_n = mask.sum(-1).to(exponent.dtype).log()[..., None, None]
    row = column = torch.zeros_like(exponent[..., :1, :])
    for _ in range(iterations):
        row = -log_n - torch.logsumexp(exponent + column, dim=-1, keepdim=True)
        column = -math.log(m) - torch.logsumexp(exponent + row + hidden, dim=-2, keepdim=True)
    return exponent + row + column


def sinkhorn_log(similarity: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Plan by iterations on potentials; see `transport_plan`. The similarity may have any size."""
    with no_autocast(similarity.device):
        return torch.exp(log_plan(at_least_fp32(similarity) / epsilon, iterations))


# ----------------------------------------------------------------------------------------------------- scalings


def sinkhorn_scaling(
    similarity: torch.Tensor, epsilon: float, iterations: int, tolerance: float = 0.0, *, implicit: bool = False
) -> torch.Tensor:
    """Plan by matrix scaling in the dtype that is given (at least fp32); see `transport_plan`. Differentiable once."""
    shape = similarity.shape
    flat = at_least_fp32(similarity).reshape(-1, shape[-2], shape[-1])
    if not (torch.is_grad_enabled() and flat.requires_grad):
        with no_autocast(flat.device):
            return _plan_and_rounds(flat, epsilon, iterations, tolerance)[0].view(shape)
    plan: torch.Tensor = _Scaling.apply(flat, epsilon, iterations, tolerance, implicit)
    return plan.view(shape)


class _Scaling(torch.autograd.Function):
    """Keeps s, the plan and the v of each round; the gradient of s is P * dP less what goes through the rounds."""

    @staticmethod
    def forward(
        ctx: Any, similarity_znm: torch.Tensor, epsilon: float, iterations: int, tolerance: float, implicit: bool
    ) -> torch.Tensor:
        with no_autocast(similarity_znm.device):
            plan, rounds = _plan_and_rounds(similarity_znm, epsilon, iterations, tolerance)
        ctx.epsilon, ctx.implicit = epsilon, implicit
        ctx.save_for_backward(similarity_znm, rounds, plan)
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_plan: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        similarity, rounds, plan = ctx.saved_tensors
        with no_autocast(similarity.device):
            kernel = torch.exp(similarity * (1.0 / ctx.epsilon))
            direct = grad_plan * plan
            adjoint = implicit_adjoint if ctx.implicit else unrolled_adjoint
            df, dg = direct.sum(-1).unsqueeze(1), direct.sum(-2, keepdim=True)
            left, right = adjoint(kernel, rounds, df, dg, 1.0 / kernel.shape[1])
            grad = (direct - kernel * product(left.mT, right)) * (1.0 / ctx.epsilon)
        return grad, None, None, None, None


def _plan_and_rounds(
    similarity_znm: torch.Tensor, epsilon: float, iterations: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the plan and the v of every round: in C++ on CPUs that have it, each problem within the caches."""
    n = similarity_znm.shape[1]
    if similarity_znm.device.type == "cpu" and tolerance == 0:
        library = cpp_library.library()
        if not isinstance(library, str):
            return _plans_in_cpp(library, similarity_znm, epsilon, iterations)
    kernel = torch.exp(similarity_znm * (1.0 / epsilon))
    rounds = scaling_rounds(kernel, 1.0 / n, iterations, tolerance)
    return kernel * last_rows(kernel, rounds, 1.0 / n).mT * rounds[:, -1:], rounds


def _plans_in_cpp(
    library: ctypes.CDLL, similarity_znm: torch.Tensor, epsilon: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    z, n, m = similarity_znm.shape
    similarity = similarity_znm.detach().contiguous()
    plan = torch.empty_like(similarity)
    rounds = similarity.new_empty(z, iterations + 1, m)
    sizes = [ctypes.c_int64(size) for size in (z, n, m, iterations)]
    wide = ctypes.c_int(similarity.dtype == torch.float64)
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (similarity, rounds, plan)]
    if library.setformer_plans(places[0], *sizes, ctypes.c_double(epsilon), wide, *places[1:]):
        raise MemoryError(f"no memory for a transport plan of {n} x {m}")
    return plan, rounds


def product(a_zpq: torch.Tensor, b_zqr: torch.Tensor) -> torch.Tensor:
    """Return the products of two batches of matrices, each the same to the last bit whatever shares its batch.

    On CPUs the library adds up in an order that hangs on where in memory operands and result begin, within 16 bytes.
    Matrices of odd sizes one behind the other begin everywhere; here each begins where the first of a batch does.
    """
    if a_zpq.device.type != "cpu":
        return torch.bmm(a_zpq, b_zqr)
    z, rows, columns = a_zpq.shape[0], a_zpq.shape[1], b_zqr.shape[2]
    a, b = _apart(a_zpq), _apart(b_zqr)
    if rows * columns % 4 == 0:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out=_room(a, z, rows, columns))


def _apart(matrices_zpq: torch.Tensor) -> torch.Tensor:
    """Return the matrices, copied if not all of them begin at multiples of four numbers."""
    z, p, q = matrices_zpq.shape
    if matrices_zpq.storage_offset() % 4 == 0 and (z == 1 or matrices_zpq.stride(0) % 4 == 0):
        return matrices_zpq
    if matrices_zpq.stride(1) == 1:  # a transposed one stays so: the library reads it in its own way
        return _room(matrices_zpq, z, q, p).copy_(matrices_zpq.mT).mT
    return _room(matrices_zpq, z, p, q).copy_(matrices_zpq)


def _room(like: torch.Tensor, z: int, p: int, q: int) -> torch.Tensor:
    """Return uninitialised (z, p, q) matrices, each dense, that begin at multiples of four numbers."""
    return like.new_empty(z, -(-p * q // 4) * 4)[:, : p * q].view(z, p, q)


def scaling_rounds(
    kernel: torch.Tensor, row_sums: torch.Tensor | float, iterations: int, tolerance: float = 0.0
) -> torch.Tensor:
    """Run Sinkhorn on K; return the v before the first round and after each.

    With a tolerance a problem keeps its v once it has converged, so it does not depend on what shares its batch.

    Args:
        kernel: K (z, n, m), positive.
        row_sums: a, one number or (z, 1, n).
        iterations: L.
        tolerance: largest relative error of a row sum that is good enough; 0 runs all rounds.

    Returns:
        (z, L + 1, m).
    """
    z, _, m = kernel.shape
    v = kernel.new_ones(z, 1, m)
    every = [v]
    u_before: torch.Tensor | None = None
    for _ in range(iterations):
        # Vectors lie as rows and multiply from the left: on a CPU a product with a column takes twice as long.
        u = row_sums / product(v, kernel.mT)
        after = (1.0 / m) / product(u, kernel)
        if tolerance > 0:
            if u_before is not None:
                # After the round before, the rows summed to a u_before / u.
                errors = torch.where(u > 0, u_before / u - 1.0, 0.0)
                done = errors.abs().amax(-1, keepdim=True) <= tolerance
                if bool(done.all()):
                    break
                after, u = torch.where(done, v, after), torch.where(done, u_before, u)
            u_before = u
        v = after
        every.append(v)
    every += [v] * (iterations + 1 - len(every))
    return torch.cat(every, 1)


def last_rows(kernel: torch.Tensor, rounds: torch.Tensor, row_sums: torch.Tensor | float) -> torch.Tensor:
    """Return u of the last round, (z, 1, n)."""
    return row_sums / product(rounds[:, -2:-1], kernel.mT)


def unrolled_adjoint(
    kernel: torch.Tensor, rounds: torch.Tensor, df: torch.Tensor, dg: torch.Tensor, row_sums: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry gradients of the last potentials back through the rounds, exactly.

    With f = log u and g = log v a half round is a negative logsumexp, whose derivative is K scaled by a row and a
    column vector: one outer product each. So the gradient of s / epsilon is the direct one less K times a matrix of
    rank 2 L. The rows of all rounds are computed again, by one product K [v_0 ... v_(L-1)].

    Args:
        kernel: K (z, n, m).
        rounds: of `scaling_rounds`, without a tolerance.
        df: gradient of f after the last round, (z, 1, n).
        dg: gradient of g after the last round, (z, 1, m).
        row_sums: a.

    Returns:
        left (z, 2 L, n), right (z, 2 L, m): K * left^T right is to be taken from the direct gradient.
    """
    m = kernel.shape[-1]
    inverse_kv = product(rounds[:, :-1], kernel.mT).reciprocal_()
    u_all = inverse_kv * row_sums
    left, right = [], []
    for step in range(rounds.shape[1] - 1, 0, -1):
        u, v, v_before = u_all[:, step - 1 : step], rounds[:, step : step + 1], rounds[:, step - 1 : step]
        y = v * dg * m
        x = (df - u * product(y, kernel.mT)) * inverse_kv[:, step - 1 : step]
        dg = -v_before * product(x, kernel)
        df = torch.zeros_like(df)
        left += [u, x]
        right += [y, v_before]
    return torch.cat(left, 1), torch.cat(right, 1)


def implicit_adjoint(
    kernel: torch.Tensor, rounds: torch.Tensor, df: torch.Tensor, dg: torch.Tensor, row_sums: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `unrolled_adjoint`, by the implicit function theorem at the fixed point; its cost knows no rounds.

    alpha and beta solve  diag(P 1) alpha + P beta = df,  P^T alpha + diag(P^T 1) beta = dg. The system is singular
    along (1, -1), a gauge that P does not feel; a rank-one term takes it out of the m x m system for beta, which is
    solved in fp64.
    """
    u, v = last_rows(kernel, rounds, row_sums), rounds[:, -1:]
    plan = (kernel * u.mT * v).double()
    a, b = plan.sum(-1).unsqueeze(1), plan.sum(-2)
    inverse_a = torch.where(a > 0, 1.0 / a, 0.0)
    weighted = plan * inverse_a.mT
    side = dg - product(df.double(), weighted)
    beta = implicit_system(b, product(plan.mT, weighted), side)
    alpha = ((df - product(beta, plan.mT)) * inverse_a).to(kernel.dtype)
    beta = beta.to(kernel.dtype)
    return torch.cat([alpha * u, u], 1), torch.cat([v, beta * v], 1)


def implicit_system(b: torch.Tensor, gram: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """Return beta (z, 1, m) of `implicit_adjoint`.

    Args:
        b: column sums of the plan P, (z, m), fp64 as the others.
        gram: P^T diag(P 1)^-1 P, (z, m, m).
        side: (z, 1, m).
    """
    # A plan that falls into blocks has a gauge for each; the last term holds those, far below what P feels.
    schur = torch.diag_embed(b * (1.0 + 1e-10)) - gram + 1.0 / b.shape[-1] ** 2
    return _solve(schur, side)


def _solve(matrix_zmm: torch.Tensor, side_z1m: torch.Tensor) -> torch.Tensor:
    """Solve matrix @ x^T = side^T for x (z, 1, m); filled up to a multiple of four for the reason of `product`."""
    m = matrix_zmm.shape[-1]
    filled = F.pad(matrix_zmm, (0, -m % 4, 0, -m % 4))
    filled.diagonal(dim1=-2, dim2=-1)[:, m:] = 1.0
    solved: torch.Tensor = torch.linalg.solve(filled, F.pad(side_z1m, (0, -m % 4)).mT)
    return solved.mT[..., :m]
