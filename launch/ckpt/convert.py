"""`setformer ckpt convert`: weights in a pickle of torch (.pth, .pt, .bin) as a .safetensors file.

The pickle is read by torch's restricted unpickler, which makes tensors and plain values and calls nothing else.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from safetensors import SafetensorError

from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.words import plain

# Where training scripts put the weights besides optimizer and epoch; the averaged ones first, as timm does.
_INNER = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_PREFIX = "module."  # of DistributedDataParallel
_REPEATED = 1 << 30  # bytes that a tensor may have which repeats fewer (an expanded one)


def convert(source: Path, dest: Path, key: str | None, console: Console) -> None:
    """Write the tensors of a pickle as a .safetensors file.

    Args:
        source: the pickle.
        dest: the file to make.
        key: which entry of the pickle holds the weights; None looks for the usual ones.
        console: where to say what was taken and what was left.

    Raises:
        ConfigError: the destination is there already or cannot be written, or there is no such entry.
        CheckpointError: the pickle is damaged, holds more than tensors and plain values, or holds no weights.
    """
    if dest.exists():
        raise ConfigError(f"{dest} already exists: name a new file")
    if dest.suffix != ".safetensors":
        raise ConfigError(f"{dest} does not end in .safetensors: give it that suffix")
    table, entry = _weights(_read(source), key, source)
    tensors = _plain_tensors(table, source)
    left = [name for name, value in table.items() if not isinstance(value, torch.Tensor)]
    if not tensors:
        raise CheckpointError(f"{source} holds no tensors by name{f' in {entry!r}' if entry else ''}")
    aside = dest.with_name(f".{dest.name}.{os.getpid()}.tmp")
    try:
        # save_file would make it readable for its owner alone, whatever the umask says.
        aside.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        aside.rename(dest)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{dest} cannot be written: {' '.join(str(error).split())}") from None
    finally:
        aside.unlink(missing_ok=True)
    count = sum(tensor.numel() for tensor in tensors.values())
    where = f" from {entry!r}" if entry else ""
    console.print(f"{dest}: {len(tensors)} tensors, {count:,} elements{where}", highlight=False, markup=False)
    if left:
        names = ", ".join(map(plain, left[:8]))
        console.print(f"left out because they are not tensors: {names}", highlight=False, markup=False)


def _plain_tensors(table: Mapping[Any, Any], source: Path) -> dict[str, torch.Tensor]:
    """Return the tensors by name, without the prefix of DistributedDataParallel.

    Raises:
        CheckpointError: a .safetensors file cannot hold one, or two have one name.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, value in table.items():
        if not isinstance(value, torch.Tensor):
            continue
        name = key.removeprefix(_PREFIX) if isinstance(key, str) else ""
        if not name.isprintable() or not name:  # half characters are not printable either
            raise CheckpointError(f"{source} has a tensor under {plain(repr(key))}, which is not a parameter name")
        if name in tensors:
            raise CheckpointError(f"{source} has two tensors for {name}, with and without {_PREFIX!r}: name one --key")
        if (fault := _unwritable(value)) is not None:
            raise CheckpointError(f"{source}: {name} is {fault}, which a .safetensors file does not hold")
        if value.is_floating_point() and bool(value.isnan().any()):
            raise CheckpointError(
                f"{source}: {name} has values that are not numbers (NaN): the training that saved it had diverged; "
                "take an earlier checkpoint"
            )
        tensors[name] = value.detach().contiguous().clone()
    return tensors


def _unwritable(tensor: torch.Tensor) -> str | None:
    """Return of what kind a tensor is that is not written, None where it is."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return "a sparse or nested tensor"
    if tensor.is_quantized or tensor.device.type != "cpu":
        return "a quantized tensor" if tensor.is_quantized else "a tensor without values"
    size = tensor.numel() * tensor.element_size()
    if size > max(tensor.untyped_storage().nbytes(), _REPEATED):
        return f"a tensor of {size} bytes that repeats a few"
    return None


def _read(source: Path) -> object:
    """Return what a pickle holds.

    Raises:
        CheckpointError: it cannot be read, or would have more done than making tensors and plain values.
    """
    if not source.is_file():
        raise ConfigError(f"{source} does not exist or is no file: name a .pth, .pt or .bin file")
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_pickle(source):
            raise CheckpointError(f"{source} is no file of torch.save: it begins with {_beginning(source)!r}") from None
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it names {named[1]}" if named else _first_sentence(error)
        raise CheckpointError(
            f"{source} holds more than tensors and plain values, and reading it could run any code: save its "
            f"state_dict alone where you trust it ({why})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        raise CheckpointError(f"{source} is not a complete file of torch.save: {_first_sentence(error)}") from None


def _beginning(source: Path) -> bytes:
    with source.open("rb") as file:
        return file.read(16)


def _is_pickle(source: Path) -> bool:
    """Return whether a file begins as torch.save's do: a zip archive, or a pickle of protocol 2 or later."""
    return _beginning(source).startswith((b"PK", b"\x80"))


def _first_sentence(error: Exception) -> str:
    for line in str(error).splitlines():
        if "Unsupported" in line or "Error:" in line:
            return line.strip()[:200]
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _weights(value: object, key: str | None, source: Path) -> tuple[Mapping[str, object], str]:
    """Return the table of weights and the entry that it was in, "" for the whole file.

    Raises:
        ConfigError: there is no entry of that name.
        CheckpointError: there is no table.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{source} holds a {type(value).__name__} and no weights by name")
    tables = [name for name, inner in value.items() if isinstance(inner, Mapping)]
    if key is not None:
        if key not in tables:
            raise ConfigError(
                f"--key {plain(key)}: {source} has no such table; it has {', '.join(map(plain, tables)) or 'none'}"
            )
        return value[key], key
    for name in _INNER:
        if name in tables and any(isinstance(inner, torch.Tensor) for inner in value[name].values()):
            return value[name], name
    return value, ""
