"""What the samples and pixels of a run depend on, tried out: each check varies one thing and compares digests.

Used by tests/distributed/test_data_determinism.py and by `python -m benchmarks.determinism`, which prints the table.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.order.mixture import MixturePlan
from dataloaders.order.order import BlockOrder, Cut, FullOrder, Plan, SetPlan, cursor_at, step_of_cursor
from dataloaders.order.repeated import RepeatedPlan
from dataloaders.order.resolution import BucketPlan, assign_buckets
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.reading.streams import ShardTrainStream, train_requests
from dataloaders.source import Source
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.ranks import RankInfo

SEED = 11
# Divided by 1, 2, 3, 4 and 8 ranks times micro batches up to 64.
GLOBAL_BATCH = 192
RANKS = (1, 2, 3, 4, 8)
EPOCHS = 3
_SAMPLES = 2000

# Everything at once, so that no augmentation goes unproved.
FULL_RECIPE = AugmentConfig(randaugment_ops=2, color_jitter=0.4, erasing=0.5, mixup=0.2, cutmix=1.0, mix_prob=0.8)


@dataclass(frozen=True)
class Checked:
    """One row of the table.

    Attributes:
        what: was varied.
        over: the values.
        compared: what was compared.
        cases: how many times it was made.
        identical: whether all came out the same.
    """

    what: str
    over: str
    compared: str
    cases: int
    identical: bool


def plans(seed: int = SEED, batch: int = GLOBAL_BATCH) -> dict[str, Plan]:
    """Return one plan of each kind, over some thousand samples that need not exist."""
    shards = np.repeat(np.arange(40, dtype=np.int32), 50)
    sizes = np.random.default_rng(0).integers(200, 400, (_SAMPLES, 2)).astype(np.int32)
    aspects = (0.7, 1.0, 1.5)
    members = assign_buckets(sizes, aspects, batch)
    return {
        "full, drop": SetPlan(FullOrder(_SAMPLES, seed), batch),
        "full, wrap": SetPlan(FullOrder(_SAMPLES, seed), batch, wrap=True),
        "block, drop": SetPlan(BlockOrder(shards, 8, seed), batch),
        "block, wrap": SetPlan(BlockOrder(shards, 8, seed), batch, wrap=True),
        "mixture": MixturePlan([FullOrder(1500, seed, 0), BlockOrder(shards, 8, seed, 1)], [2, 1], batch, seed),
        "buckets, drop": BucketPlan(members, aspects, batch, seed),
        "buckets, wrap": BucketPlan(members, aspects, batch, seed, wrap=True),
        "repeats, drop": RepeatedPlan(SetPlan(FullOrder(_SAMPLES, seed), batch // 4), 4, _SAMPLES // batch),
    }


def cuts(batch: int = GLOBAL_BATCH, largest: int = 64) -> list[tuple[int, int]]:
    """Return every (ranks, micro batch) that divides a global batch, micro batches up to `largest`."""
    return [(w, m) for w in RANKS for m in range(1, largest + 1) if batch % (w * m) == 0]


def step_ids(plan: Plan, world: int, micro: int, first: int, steps: int) -> list[tuple[int, ...]]:
    """Return the samples of each global batch, in the order of places, as the ranks ask for them."""
    found = [[-1] * plan.global_batch for _ in range(steps)]
    for rank in range(world):
        cut = Cut(plan.global_batch, micro, rank, world)
        for request in itertools.islice(train_requests(plan, cut, first), steps * cut.accumulation):
            place = request.first_position - request.step * plan.global_batch
            found[request.step - first][place : place + micro] = request.samples.tolist()
    return [tuple(ids) for ids in found]


def check_cuts() -> list[Checked]:
    """Compare the samples of three epochs over ranks and micro batches."""
    rows = []
    for name, plan in plans().items():
        steps = EPOCHS * plan.steps_per_epoch
        found = {digest(step_ids(plan, world, micro, 0, steps)) for world, micro in cuts()}
        over = f"{', '.join(map(str, RANKS))} ranks x micro batches 1 to 64"
        rows.append(Checked(over, name, f"sample ids of {EPOCHS} epochs", len(cuts()), len(found) == 1))
    return rows


def check_interruptions(count: int = 200) -> list[Checked]:
    """Interrupt runs at random steps and continue with other ranks and micro batches, by the cursor in JSON alone."""
    rows = []
    for name, plan in plans().items():
        numbers = random.Random(name)
        steps = EPOCHS * plan.steps_per_epoch
        whole = step_ids(plan, 1, GLOBAL_BATCH, 0, steps)
        same, interruptions = True, 0
        while interruptions < count:
            found: list[tuple[int, ...]] = []
            while len(found) < steps:
                state = json.loads(json.dumps(cursor_at(plan, SEED, "data", len(found)).to_json()))
                again = plans()[name]  # another process would build it again
                first = step_of_cursor(state, again, SEED, "data")
                world, micro = numbers.choice(cuts())
                found += step_ids(again, world, micro, first, min(numbers.randint(1, 6), steps - len(found)))
                interruptions += 1
            same = same and found == whole
        what = "interruptions, each with other ranks"
        rows.append(Checked(what, name, f"sample ids of {EPOCHS} epochs", interruptions, same))
    return rows


# Pixels

_BATCH = 24


def make_images(folder: Path, count: int = 61) -> Path:
    """Write an ImageFolder of small JPEG files of several sizes and return it."""
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = 40 + i % 13, 48 + i % 9
        coarse = np.random.default_rng(i).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
        path.write_bytes(out.getvalue())
    return folder


def pack_images(images: Path, folder: Path) -> Path:
    """Pack an ImageFolder and return the split."""
    pack_image_folder(images, folder, PackOptions(samples_per_shard=16))
    return folder


Sources = Callable[[], Source]


@dataclass(frozen=True)
class Pixels:
    """What all ranks see in some steps of a run.

    Attributes:
        open_source: opens the data.
        config: of the data.
        world: ranks.
        micro: micro batch.
        steps: which.
    """

    open_source: Sources
    config: DataConfig
    world: int = 1
    micro: int = _BATCH
    steps: Sequence[int] = (0, 1, 2, 3)

    def by_step(self) -> dict[int, str]:
        """Return a digest of ids, pixels, labels and mixing of each step, put together from the ranks."""
        slots: dict[int, dict[int, MicroBatch]] = {step: {} for step in self.steps}
        for rank in range(self.world):
            ranks = RankInfo(rank, self.world)
            stream = ShardTrainStream(self.open_source(), self.config, SEED, ranks, _BATCH, self.micro)
            for first, last in stretches_of(self.steps):
                wanted = (last + 1 - first) * stream.accumulation
                for place, one in enumerate(itertools.islice(stream.micro_batches(first), wanted)):
                    slots[one.step][place % stream.accumulation * self.world + rank] = one
            stream.close()
        return {step: _digest_of([found[slot] for slot in sorted(found)]) for step, found in slots.items()}


def _digest_of(parts: list[MicroBatch]) -> str:
    """Return a digest of a global batch, the same however it was cut."""
    columns = [torch.cat([part.sample_ids for part in parts]), torch.cat([part.inputs for part in parts])]
    columns.append(torch.cat([part.labels for part in parts]))
    offset = 0
    for part in parts:
        if part.mix is not None:
            columns += [part.mix.partner + offset]
        offset += len(part.labels)
    mixes = [part.mix for part in parts if part.mix is not None]
    assert len(mixes) in (0, len(parts)), "some micro batches of a step are mixed and some are not"
    columns += [mix.lam for mix in mixes] + [mix.box for mix in mixes]
    found = hashlib.sha256()
    for column in columns:
        found.update(column.contiguous().numpy().tobytes())
    return found.hexdigest()


def stretches_of(steps: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Yield (first, last) of the stretches of steps that follow each other: each is a resumption."""
    first = last = steps[0]
    for step in steps[1:]:
        if step != last + 1:
            yield first, last
            first = step
        last = step
    yield first, last


def pixel_config(**changes: object) -> DataConfig:
    """Return a config with every augmentation on."""
    return DataConfig.model_validate({"root": "", "image_size": 32, "augment": FULL_RECIPE, **changes})


def check_readers(open_source: Sources, readers: Sequence[tuple[int, int]]) -> Checked:
    """Compare pixels over (workers, threads)."""
    found = {digest(Pixels(open_source, pixel_config(workers=w, threads=t), micro=8).by_step()) for w, t in readers}
    over = ", ".join(f"{w}/{t}" for w, t in readers)
    return Checked("workers / threads", over, "pixels, labels, mixing", len(readers), len(found) == 1)


def check_pixel_cuts(open_source: Sources, threads: int = 2) -> Checked:
    """Compare pixels over ranks and micro batches."""
    chosen = [(1, 24), (1, 2), (2, 4), (2, 12), (3, 8), (4, 2), (12, 2)]
    found = {digest(Pixels(open_source, pixel_config(threads=threads), w, m).by_step()) for w, m in chosen}
    over = ", ".join(f"{w} x {m}" for w, m in chosen)
    return Checked("ranks x micro batch", over, "pixels, labels, mixing", len(chosen), len(found) == 1)


def check_resumed_pixels(open_source: Sources, count: int = 10) -> Checked:
    """Compare the pixels of steps that a run reaches with those of runs that begin there, with readers ahead."""
    numbers, same = random.Random(5), True
    whole = Pixels(open_source, pixel_config(threads=1), steps=range(10)).by_step()
    for _ in range(count):
        step = numbers.randrange(9)
        world, micro = numbers.choice([(1, 12), (2, 6), (3, 8)])
        config = pixel_config(threads=2, prefetch=3)
        resumed = Pixels(open_source, config, world, micro, (step, step + 1)).by_step()
        same = same and resumed == {at: whole[at] for at in resumed}
    return Checked("beginning at any step", "steps 0 to 8, other ranks", "pixels, labels, mixing", count, same)


def check_containers(open_sources: dict[str, Sources]) -> Checked:
    """Compare pixels over containers of the same images, in the same order."""
    found = {digest(Pixels(opener, pixel_config(threads=1), micro=8).by_step()) for opener in open_sources.values()}
    over = ", ".join(open_sources)
    return Checked("containers", over, "pixels, labels, mixing", len(open_sources), len(found) == 1)


def digest(value: object) -> str:
    """Return a digest of a value's text."""
    return hashlib.sha256(repr(value).encode()).hexdigest()
