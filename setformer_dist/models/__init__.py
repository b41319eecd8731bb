"""Architectures, one file each, registered with timm: `import setformer_dist.models`, then `timm.create_model`.

arguments.py   which arguments of a model a config may set: those of its own constructor
attention.py   the attention modules, one interface for images and sequences
build.py       a model from the `[model]` table: any name that timm knows, ours included
cost.py        parameters and multiply-adds of a SeTformer as closed formulas of its config, without building it
encoded.py     an encoder within a larger model, and feature maps of any model
host_memory.py  inputs of recomputed blocks in host memory, where a GPU has its own
layers.py      what our image models share: keyed stochastic depth, small layers, and timm's method set over stages
masked.py      masked autoencoding around a SeTformer: fusion of its stages, and a light decoder
measure.py     counted costs: multiply-adds and memory of any model, without computing it
recompute.py    what a block keeps for its backward pass, and what it computes again
reference_sets.py  the reference sets of a model: which there are, what its layers see of them, and freezing them
detector.py    object detection around any model: RetinaNet on its feature maps
segmenter.py   semantic segmentation around any model: UPerNet's head on its feature maps
sequence.py    an encoder of token sequences, with any attention
setformer.py   a hierarchical vision transformer whose attention is optimal transport to a small reference set
simmim.py      masked image modelling around any model: hidden units replaced, and one layer that predicts them
text.py        encoders of texts, with any attention, and what names their hidden tokens
visible.py     the tokens of some units of each image, gathered, and laid back into the grid
soft.py        SOFT and SOFT++: vision transformers with a Gaussian kernel through 49 landmarks in place of softmax
"""

from setformer_dist.models.sequence import SequenceConfig, SequenceEncoder
from setformer_dist.models.setformer import SeTformer, SetformerConfig
from setformer_dist.models.soft import SOFT, SoftConfig
from setformer_dist.models.text import TextConfig, TextEncoder

__all__ = [
    "SOFT",
    "SeTformer",
    "SequenceConfig",
    "SequenceEncoder",
    "SetformerConfig",
    "SoftConfig",
    "TextConfig",
    "TextEncoder",
]
