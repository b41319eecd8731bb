"""Augmentations of a user's own, by name: functions of an image and a key, so a run stays a function of its config.

from dataloaders.pixels.own import register_augmentation
register_augmentation("dim", dim)      # in a module that run.imports names; data.augment.own = ["dim"]

    dim(image, key) -> image           image (3, H, W) uint8, key 0 <= key < 2^63

With data.pixels and data.mean of other images, the image has their numbers and bands.

The key follows from (seed, epoch, sample) and from the function's place in the list. All that a function draws must
come from it, such as `torch.Generator().manual_seed(key)`: a draw from a generator of the process would depend on
threads, ranks and interruptions. Functions are tried before training, and refused where they draw from elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch

from setformer_dist.core.config import nearest
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.registry import register

# (B, H, W) and a key -> (B, H, W), uint8 where data.pixels says nothing else
Augmentation = Callable[[torch.Tensor, int], torch.Tensor]

_OWN: dict[str, Augmentation] = {}
_TRIED_KEYS = range(8)


def register_augmentation(name: str, function: Augmentation) -> None:
    """Make an augmentation known by a name that is not known yet; the same function may come again.

    Args:
        name: as `data.augment.own` will have it.
        function: takes (3, H, W) uint8 and a key, returns an image of the same shape. With data.workers > 0 it must be
            a function of an importable module.

    Raises:
        ConfigError: another augmentation has the name, or the function is not callable.
    """
    register(_OWN, "augmentation", name, function)


def own_augmentations(
    names: Sequence[str], example: torch.Tensor, workers: int
) -> tuple[tuple[str, Augmentation], ...]:
    """Return the augmentations of `data.augment.own` with their names, each tried on an image.

    Args:
        names: registered ones.
        example: an image of the shape and dtype that they are tried on, (B, H, W).
        workers: reader processes, which find a function by its module.

    Raises:
        ConfigError: one is not registered, not a function of image and key alone, or cannot reach the readers.
    """
    found = []
    for name in names:
        if name not in _OWN:
            known = nearest(name, _OWN) if _OWN else "none is registered"
            raise ConfigError(
                f"data.augment.own names {name!r}, which is not an augmentation: {known}; to use your own, "
                "name the module that registers it in run.imports"
            )
        function = _OWN[name]
        if workers and (fault := _out_of_reach(function)):
            raise ConfigError(
                f"augmentation {name!r} is {fault}, where reader processes do not find it: move it to the top of a "
                "module, or set data.workers = 0"
            )
        _try(name, function, example)
        found.append((name, function))
    return tuple(found)


def _out_of_reach(function: Augmentation) -> str:
    """Return why another process would not find a function, or ""."""
    module, place = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module is None or place is None:
        return "an object without a module of its own"
    if module == "__main__":
        return "defined in the program that was started"
    return "defined within a function" if "<" in place else ""


def _try(name: str, function: Augmentation, example: torch.Tensor) -> None:
    """Apply a function to an image, twice with each key.

    Raises:
        ConfigError: it draws from elsewhere than its key, or returns something else than an image.
    """
    image = torch.arange(example.numel()).remainder(251).to(example.dtype).view_as(example)
    before = _generators()
    for key in _TRIED_KEYS:
        first, second = (apply(name, function, image.clone(), key) for _ in range(2))
        if not torch.equal(first, second):
            raise ConfigError(
                f"augmentation {name!r} gives different results for the same image and key: all of its random "
                "numbers must come from the key, as by torch.Generator().manual_seed(key)"
            )
    if _generators() != before:
        raise ConfigError(
            f"augmentation {name!r} draws from a global generator: all of its random numbers must come from the key, "
            "as by torch.Generator().manual_seed(key)"
        )


def _generators() -> tuple[bytes, str, str]:
    """Return the states of the generators that a process has."""
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), str(random.getstate())


def apply(name: str, function: Augmentation, image: torch.Tensor, key: int) -> torch.Tensor:
    """Return what a function makes of an image.

    Raises:
        ConfigError: it fails, or returns something else than an image of the same shape.
    """
    try:
        made = function(image, key)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"augmentation {name!r} (data.augment.own) failed: {why}") from error
    if not isinstance(made, torch.Tensor) or made.dtype != image.dtype or made.shape != image.shape:
        what = f"{tuple(made.shape)} {made.dtype}" if isinstance(made, torch.Tensor) else type(made).__name__
        raise ConfigError(
            f"augmentation {name!r} (data.augment.own) returned {what}: it must return an image like the one it gets, "
            f"{tuple(image.shape)} {image.dtype}"
        )
    return made
