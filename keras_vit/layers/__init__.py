"""The layers that models are made of; each exists once. A layer's first docstring line is its shapes."""

from keras_vit.layers.attention import Attention
from keras_vit.layers.block import Block
from keras_vit.layers.conv import GroupNorm, StdConv
from keras_vit.layers.drop import DropPath
from keras_vit.layers.embed import MaskToken, Patches, Tokens
from keras_vit.layers.mlp import MLP
from keras_vit.layers.pool import ClassToken, MapHead, MeanTokens, PatchGrid, PatchTokens
from keras_vit.layers.resize import AdaptivePooling, Bilinear, Doubling
from keras_vit.layers.scale import Affine, LayerScale

__all__ = [
    "MLP", "AdaptivePooling", "Affine", "Attention", "Bilinear", "Block", "ClassToken", "Doubling", "DropPath", "GroupNorm",
    "LayerScale", "MapHead", "MaskToken", "MeanTokens", "PatchGrid", "PatchTokens", "Patches", "StdConv", "Tokens",
]  # fmt: skip
