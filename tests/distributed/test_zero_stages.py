"""ZeRO 0-3 on two gloo ranks: the same losses as each other and as plain PyTorch; fragments cover and restore."""

import pytest

from launch.testing.ranks import RanksFailedError, run_ranks
from tests.distributed import workers

STEPS = 20


@pytest.fixture(scope="module")
def plain() -> list[float]:
    losses: list[float] = run_ranks(workers.plain_pytorch, 1, STEPS)[0]
    return losses


@pytest.fixture(scope="module")
def stage_losses() -> dict[int, list[float]]:
    return {stage: run_ranks(workers.losses_of, 2, stage, "fp32", "auto", STEPS)[0] for stage in (0, 1, 2, 3)}


def test_stages_agree_with_each_other_to_1e_6(stage_losses: dict[int, list[float]]) -> None:
    for stage in (1, 2, 3):
        assert stage_losses[stage] == pytest.approx(stage_losses[0], rel=1e-6, abs=0)


def test_stages_agree_with_plain_pytorch_to_1e_5(stage_losses: dict[int, list[float]], plain: list[float]) -> None:
    assert min(plain) < max(plain) - 0.05  # something is learnt, so agreement means something
    for losses in stage_losses.values():
        assert losses == pytest.approx(plain, rel=1e-5, abs=0)


@pytest.mark.parametrize(
    ("stage", "dtype", "grad_accum"),
    [
        (0, "fp32", "auto"),
        (0, "bf16", "auto"),
        (1, "bf16", "fp32"),
        (2, "bf16", "fp32"),
        (3, "bf16", "fp32"),
        (3, "fp32", "auto"),
    ],
)
def test_fragments_cover_restore_and_swap(stage: int, dtype: str, grad_accum: str) -> None:
    results = run_ranks(workers.round_trip, 2, stage, dtype, grad_accum)
    for result in results:
        assert result["first"] == result["second"]  # bit by bit
        assert result["steps"] == 3
        assert result["same_at_start"]
        assert result["swap_restores"]
        assert result["swap_changes"]
    assert_covered(results[0]["cover"], replicated=stage == 0)


def assert_covered(cover: list[list[list[object]]], replicated: bool) -> None:
    """Every element of every state is held exactly once over the ranks (by each rank where replicated)."""
    pieces: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for rank_pieces in cover[:1] if replicated else cover:
        for name, state, start, end, full in rank_pieces:
            pieces.setdefault((name, state, full), []).append((start, end))  # type: ignore[arg-type]
    assert {key[1] for key in pieces} == {"param", "exp_avg", "exp_avg_sq", "ema"}
    for (_, _, full), held in pieces.items():
        position = 0
        for start, end in sorted(held):
            assert start == position
            position = end
        assert position == full


def test_bf16_stage_0_takes_no_dummy_step() -> None:
    stage_0 = run_ranks(workers.losses_of, 2, 0, "bf16", "auto", 4)[0]
    stage_1 = run_ranks(workers.losses_of, 2, 1, "bf16", "auto", 4)[0]
    assert stage_0 == pytest.approx(stage_1, rel=1e-6)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_what_does_not_train_is_held_once_and_reaches_all_ranks(stage: int, dtype: str) -> None:
    (first, held), (other, held_too) = run_ranks(workers.fixed_everywhere, 2, stage, dtype)
    assert (held, held_too) == ((1, 0) if stage else (1, 1))
    assert first == 3.0
    assert other == (3.0 if stage else 4.0)  # under stage 0 each rank reads all of a checkpoint


@pytest.mark.drill
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_compiled_blocks_train_alike_under_every_stage(stage: int) -> None:
    losses, graphs, left = run_ranks(workers.compiled_losses, 2, stage, "blocks", timeout=300)[0]
    eager = run_ranks(workers.compiled_losses, 2, stage, "off", timeout=300)[0][0]
    assert losses == pytest.approx(eager, rel=1e-6)
    assert graphs == 3  # of four blocks in three stages
    assert left == 0


@pytest.mark.drill
@pytest.mark.parametrize(("stage", "recompute"), [(0, "none"), (3, "none"), (3, "block"), (3, "mlp")])
def test_blocks_by_parts_train_alike_under_every_stage(stage: int, recompute: str) -> None:
    """As on a GPU: residual sums and norms by Triton kernels, interpreted."""
    how = {"timeout": 300, "cold": True, "env": {"TRITON_INTERPRET": "1"}}
    losses, calls, left = run_ranks(workers.by_parts_losses, 2, stage, True, recompute, **how)[0]
    plain, none, _ = run_ranks(workers.by_parts_losses, 2, stage, False, recompute, **how)[0]
    assert losses == pytest.approx(plain, rel=1e-5)
    assert none == 0
    assert calls == 4 * 3 * 2 * (2 if recompute == "block" else 1)  # blocks, steps, micro batches
    assert left == 0


@pytest.mark.drill
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_a_frozen_stem_before_whole_blocks_changes_no_stage(recompute: str) -> None:
    """The input of the first block needs no gradient, and its weights do."""
    losses, _, left = run_ranks(workers.by_parts_losses, 2, 3, False, recompute, True)[0]
    plain = run_ranks(workers.by_parts_losses, 2, 0, False, recompute, True)[0][0]
    assert losses == pytest.approx(plain, rel=1e-6)
    assert left == 0


@pytest.mark.drill
@pytest.mark.parametrize(
    ("stage", "dtype", "overlap"),
    [
        (0, "fp32", False),
        (0, "bf16", False),
        (1, "fp32", False),
        (2, "bf16", False),
        (1, "bf16", True),
        (2, "fp32", True),
    ],
)
def test_gradients_of_cuda_graphs_live_until_the_step(stage: int, dtype: str, overlap: bool) -> None:
    for found, expected, moved in run_ranks(workers.graphed_losses, 2, stage, dtype, overlap, timeout=400):
        assert found == expected  # to the last bit
        assert moved == 0


@pytest.mark.drill
@pytest.mark.parametrize("recompute", ["none", "cheap", "mlp", "block"])
def test_recomputation_changes_no_loss_under_zero_3(recompute: str) -> None:
    kept = run_ranks(workers.checkpointed_losses, 2, 3, "none")[0]
    recomputed = run_ranks(workers.checkpointed_losses, 2, 3, recompute)[0]
    assert recomputed == pytest.approx(kept, rel=1e-6)
    # Weights cut between forward and backward, as large ones are.
    cut, held = run_ranks(workers.cut_losses, 2, recompute)[0]
    assert set(held) == {0}
    assert cut == pytest.approx(kept, rel=1e-6)


def fail_on_rank_1() -> None:
    import os  # noqa: PLC0415

    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 has had enough")


def test_a_failing_rank_is_shown_with_its_output() -> None:
    with pytest.raises(RanksFailedError, match="rank 1 has had enough"):
        run_ranks(fail_on_rank_1, 2)
