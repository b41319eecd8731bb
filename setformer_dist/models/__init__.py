"""Architectures, one file each, registered with timm: `import setformer_dist.models`, then `timm.create_model`."""

from setformer_dist.models.sequence import SequenceConfig, SequenceEncoder
from setformer_dist.models.setformer import SeTformer, SetformerConfig
from setformer_dist.models.soft import SOFT, SoftConfig

__all__ = ["SOFT", "SeTformer", "SequenceConfig", "SequenceEncoder", "SetformerConfig", "SoftConfig"]
