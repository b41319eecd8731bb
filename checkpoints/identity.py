"""What a checkpoint belongs to: enough to refuse another model and to say what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from pydantic import Field

from checkpoints.strictjson import parse
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import CheckpointError


class Identity(FrozenConfig):
    """Which model and run a checkpoint was written by.

    Attributes:
        model: registered name of the model.
        model_args: the model's arguments, as JSON text with sorted keys.
        parameters: `digest_shapes` of all parameters.
        config_hash: sha256 of the keys of the config that a continuation must share; for information.
        stage: ZeRO stage; for information, since any stage reads what any other wrote.
        world_size: ranks that wrote; for information likewise.
        classes: `digest_json` of the class names in order, "" where there are none.
        versions: package name to version.
    """

    model: str
    model_args: str = "{}"
    parameters: str = ""
    config_hash: str = ""
    stage: int = 0
    world_size: int = 1
    classes: str = ""
    versions: dict[str, str] = Field(default_factory=dict)

    def check_same_model(self, other: Identity) -> None:
        """Refuse to exchange weights with another model; config, stage, ranks and versions may differ.

        Args:
            other: identity of the model that is to be filled.

        Raises:
            CheckpointError: model, arguments, parameter shapes or classes differ.
        """
        faults = [f"{place} {ours} against {theirs}" for place, ours, theirs in self._differences(other)]
        if faults:
            raise CheckpointError(
                f"the checkpoint is of another model ({'; '.join(faults)}, checkpoint first): "
                "use the config it was trained with, or start without it"
            )

    def _differences(self, other: Identity) -> list[tuple[str, str, str]]:
        found = []
        if self.model != other.model:
            found.append(("model", repr(self.model), repr(other.model)))
        if self.model_args != other.model_args:
            found += _differing_arguments(self.model_args, other.model_args)
        if self.parameters != other.parameters and not found:
            found.append(("parameter shapes", self.parameters[:12], other.parameters[:12]))
        if self.classes != other.classes:
            found.append(("classes", self.classes[:12] or "none", other.classes[:12] or "none"))
        return found


def _differing_arguments(ours: str, theirs: str) -> list[tuple[str, str, str]]:
    a, b = parse(ours.encode(), "model_args of the manifest"), json.loads(theirs)
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [("model arguments", ours, theirs)]
    keys = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
    return [(f"argument {key}", repr(a.get(key)), repr(b.get(key))) for key in keys]


def digest_json(value: object) -> str:
    """Return the sha256 of a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the sha256 of parameter names and shapes, independent of their order."""
    return digest_json({name: list(shape) for name, shape in shapes.items()})
