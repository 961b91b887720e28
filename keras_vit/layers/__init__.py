"""The layers that models are made of; each exists once. A layer's first docstring line is its shapes."""

from keras_vit.layers.attention import Attention
from keras_vit.layers.block import Block
from keras_vit.layers.conv import GroupNorm, StdConv
from keras_vit.layers.drop import DropPath
from keras_vit.layers.embed import Patches, Tokens
from keras_vit.layers.mlp import MLP
from keras_vit.layers.pool import ClassToken, MapHead, MeanTokens, PatchGrid, PatchTokens

__all__ = [
    "MLP", "Attention", "Block", "ClassToken", "DropPath", "GroupNorm", "MapHead", "MeanTokens", "PatchGrid", "PatchTokens",
    "Patches", "StdConv", "Tokens",
]  # fmt: skip
