"""Which plan a config asks for: the one place that puts orders, shares and buckets together."""

from __future__ import annotations

from dataloaders.config import DataConfig
from dataloaders.order.mixture import MixturePlan, MixtureSource
from dataloaders.order.order import BlockOrder, FullOrder, Order, Plan, SetPlan
from dataloaders.order.repeated import RepeatedPlan, check_repeats
from dataloaders.order.resolution import BucketPlan, assign_buckets
from dataloaders.source import Source


def plan_of(source: Source, config: DataConfig, seed: int, global_batch: int) -> Plan:
    """Return which samples make each global batch.

    Raises:
        ConfigError: the global batch does not fit the data, or is not made of whole copies and groups.
    """
    plan, repeats = _plan_of_once(source, config, seed, global_batch), config.augment.repeats
    if repeats == 1:
        return plan
    check_repeats(repeats, config.group, global_batch)
    return RepeatedPlan(_plan_of_once(source, config, seed, global_batch // repeats), repeats, plan.steps_per_epoch)


def _plan_of_once(source: Source, config: DataConfig, seed: int, global_batch: int) -> Plan:
    if isinstance(source, MixtureSource):
        orders = [order_of(one, config, seed, member) for member, one in enumerate(source.sources)]
        return MixturePlan(orders, source.weights, global_batch, seed)
    wrap = config.epoch_end == "wrap"
    if config.aspect_buckets:
        members = assign_buckets(source.sizes(), config.aspect_buckets, global_batch)
        return BucketPlan(members, config.aspect_buckets, global_batch, seed, wrap)
    return SetPlan(order_of(source, config, seed), global_batch, wrap)


def order_of(source: Source, config: DataConfig, seed: int, member: int = 0) -> Order:
    """Return the order of one set."""
    if config.order == "block":
        return BlockOrder(source.shards, config.block_shards, seed, member)
    return FullOrder(source.num_samples, seed, member)
