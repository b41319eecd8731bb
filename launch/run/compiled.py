"""[compile] of a run: what is refused, where compiled code is kept, and the modules whose forward pass it becomes.

    <cache>/<processor and versions>/     mode 0700; what torch's compiler keeps, with Triton's below it

The compiler runs what it finds there, and reads pickles there: nobody else may have written it. So the folder belongs
to this user (or root), is closed to others, and lies where others cannot put another one in its place. A config that
comes with somebody else's run may not name one (`repeat.py`).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dataloaders.config import DataConfig
from dataloaders.storage.homes import user_cache, why_not_private
from launch.ranks.environment import usable_cores
from launch.run.config import ResolvedRun
from launch.run.inputs import shapes_of_images
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.compiled import blocks_of, check_compile, compile_model
from setformer_dist.engine.config import CompileConfig
from setformer_dist.models.setformer import Block
from setformer_dist.ops.cpp_library import cpu_facts

# Where torch's compiler looks for its folder.
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

# More processes compile no faster.
_MOST_PROCESSES = 16


def check_compiled(run: ResolvedRun, model: nn.Module, device: str) -> None:
    """Refuse what cannot be compiled, and a cache that others could write to; makes the cache.

    Raises:
        ConfigError: naming the key and the repair.
    """
    config = run.config.compile
    if config.mode == "off":
        return
    check_compile(config, model, run.config.model.name, device)
    cache_of(config)


def compile_for(
    run: ResolvedRun, model: nn.Module, ranks: RankInfo, device: str, beat: Callable[[], None]
) -> list[nn.Module]:
    """Have a run's model compute by compiled graphs, as its config says.

    Args:
        run: with its config.
        model: not yet DeepSpeed's; changed in place.
        ranks: this process's place.
        device: type of the rank's device.
        beat: gives a sign of life.

    Returns:
        The modules whose weights ZeRO-3 must gather as a whole.

    Raises:
        ConfigError: as `check_compiled`.
    """
    c = run.config
    if c.compile.mode == "off":
        return whole_blocks(model)
    check_compiled(run, model, device)
    os.environ[VARIABLE] = str(cache_of(c.compile))
    sizes = len(shapes_of_images(c.data)) if isinstance(c.data, DataConfig) else 1
    # On CPUs C++ is compiled, one file after the other; further processes would only wait.
    share = usable_cores() // ranks.local_world_size
    processes = 1 if device == "cpu" else max(1, min(_MOST_PROCESSES, share))
    whole = isinstance(c.data, DataConfig) and c.data.eval_view == "whole"
    compile_model(model, c.compile, sizes, processes, beat, evaluated=not whole)
    return [module for _, module in blocks_of(model)] if c.compile.mode == "blocks" else []


def whole_blocks(model: nn.Module) -> list[nn.Module]:
    """Return our blocks: they read weights past their layers' hooks (ops/block.py), and fewer hooks take less time."""
    return [module for module in model.modules() if isinstance(module, Block)]


def cache_of(config: CompileConfig) -> Path:
    """Return the folder for what is compiled for this machine, made where it is missing.

    Raises:
        ConfigError: it cannot be made, or others could write to it.
    """
    given = config.cache or os.environ.get(VARIABLE)
    folder = Path(given) if given else user_cache() / "compiled"
    repair = "set compile.cache to a folder of yours"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        why = why_not_private(folder) or _why_not_around(folder.resolve())
        if not why:
            own = folder / _machine()
            own.mkdir(mode=0o700, exist_ok=True)
            why = why_not_private(own)
    except OSError as error:
        raise ConfigError(f"the folder of compiled code {folder} cannot be made ({error.strerror}): {repair}") from None
    if why:
        raise ConfigError(f"the folder of compiled code {folder} {why}, and what lies there is run as code: {repair}")
    return own.resolve()


def _why_not_around(folder: Path) -> str:
    """Return whose hands the folders around a folder are in, if others could rename it away; "" if none can."""
    ours = (os.geteuid(), 0)
    for around in folder.parents:
        facts = around.stat()
        loose = facts.st_mode & stat.S_IWOTH and not facts.st_mode & stat.S_ISVTX
        if facts.st_uid not in ours or loose:
            return f"lies in {around}, where others can put another folder in its place"
    return ""


def _machine() -> str:
    """Name what compiled code depends on: a home folder may be shared by machines of many kinds."""
    facts = "\0".join([cpu_facts(), torch.__version__, str(Path(torch.__file__).parent)])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
