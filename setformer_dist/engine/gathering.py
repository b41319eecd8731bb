"""The small weights that ZeRO-3 keeps whole on every rank, gathered at once after an update.

Written against DeepSpeed 0.19.8, which keeps weights of up to `stage3_param_persistence_threshold` elements (100,000)
whole between steps, and gathers each by a collective of its own after every update: 300 to 400 for SeTformer-Tiny.
Here it is one collective for all of them, as DeepSpeed itself gathers the weights of a module.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from setformer_dist.engine.protocol import Engine


def gather_together(engine: Engine) -> None:
    """Have an engine of ZeRO stage 3 gather its small weights at once, unless its config keeps them quantized or twice.

    Args:
        engine: fresh from `deepspeed.initialize`.
    """
    made: Any = engine
    kept = getattr(made.optimizer, "persistent_parameters", [])
    if not kept or made.zero_hpz_partition_size() > 1 or any(hasattr(p.ds_tensor, "ds_quant_scale") for p in kept):
        return
    first = kept[0]
    one_by_one = first.all_gather

    def at_once(param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> Any:
        if param_list is not kept or async_op:
            return one_by_one(param_list, async_op, hierarchy)
        waiting = [p for p in kept if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if waiting:
            first.all_gather_coalesced(waiting).wait()
        return None

    first.all_gather = at_once
