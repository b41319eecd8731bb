"""Architectures, one file each, registered with timm: `import setformer_dist.models`, then `timm.create_model`."""

from setformer_dist.models.setformer import SeTformer, SetformerConfig

__all__ = ["SeTformer", "SetformerConfig"]
