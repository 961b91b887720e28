"""DeiT: "Training data-efficient image transformers & distillation through attention" (arXiv 2012.12877), and
"DeiT III: Revenge of the ViT" (2204.07118); parallel blocks and a stem: "Three things everyone should know about Vision
Transformers" (2203.09795).

Weights: facebookresearch/deit (`https://dl.fbaipublicfiles.com/deit`).
"""

import collections
import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_vit import errors
from keras_vit.checkpoints.adapt import Positions, bicubic, resample_bicubic
from keras_vit.checkpoints.dialects import torch
from keras_vit.checkpoints.names import Names
from keras_vit.checkpoints.weights import deit
from keras_vit.data.pixels import IMAGENET
from keras_vit.layers import (
    MLP,
    Attention,
    Block,
    ClassToken,
    DropPath,
    LayerScale,
    MeanTokens,
    Patches,
    PatchGrid,
    PatchTokens,
    Tokens,
)
from keras_vit.layers.conv import batch_norm
from keras_vit.layers.taps import check_tap
from keras_vit.models.vit import MU, TI, B, H, L, S, check_size, default_size, depth
from keras_vit.zoo import Contract, Family, builder, check_choices, variant

POOLINGS = (None, "token", "avg")
STYLES = ("deit", "deit3")
STEMS = ("linear", "hmlp")
STDDEV = 0.02  # of the values that kernels, tokens and positions start from


@keras.saving.register_keras_serializable("keras_vit")
class DeiTTokens(Tokens):
    """(b, h, w, d) -> (b, n, d): `Tokens` whose positions are resampled bicubically, as PyTorch's `interpolate` does."""

    @staticmethod
    def line(old, new):
        return bicubic(old, new, np if isinstance(new, int) else ops)


@keras.saving.register_keras_serializable("keras_vit")
class HMLPStem(keras.layers.Layer):
    """(b, H, W, 3) -> (b, H / 16, W / 16, d): patches of 16 in three steps, each within its patch (arXiv 2203.09795, section 5).

    Convolutions of 4 x 4, 2 x 2 and 2 x 2 pixels without overlap, each with a batch norm; GELU between. (The original takes the
    statistics of a batch over all devices, this layer over one.)

    Args:
        width: d, the width of the tokens; d / 4 in between.
    """

    patch_size = 16

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width, dtype = width, self.dtype_policy
        sizes = ((width // 4, 4), (width // 4, 2), (width, 2))
        self.convs = [
            keras.layers.Conv2D(filters, side, side, data_format="channels_last", dtype=dtype, name=f"conv_{i}")
            for i, (filters, side) in enumerate(sizes)
        ]
        self.norms = [batch_norm(dtype=dtype, name=f"norm_{i}") for i in range(len(sizes))]

    def build(self, input_shape):
        for conv, norm in zip(self.convs, self.norms):
            conv.build(input_shape)
            input_shape = conv.compute_output_shape(input_shape)
            norm.build(input_shape)

    def call(self, x):
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = norm(conv(keras.activations.gelu(x, approximate=False) if i else x))
        return x

    def multiply_adds(self, input_shape):
        """ "conv" of one example (b, H, W, 3)."""
        total = 0
        for conv in self.convs:
            input_shape = conv.compute_output_shape(input_shape)
            total += math.prod(input_shape[1:3]) * math.prod(conv.kernel.shape)
        return collections.Counter(conv=total)

    def compute_output_shape(self, input_shape):
        for conv in self.convs:
            input_shape = conv.compute_output_shape(input_shape)
        return input_shape


@keras.saving.register_keras_serializable("keras_vit")
class ParallelBlock(keras.layers.Layer):
    """(b, n, d) -> (b, n, d): adds two pre-norm attentions side by side, then two MLPs (arXiv 2203.09795, section 3).

    What lies inside is tapped, as in `Block`: "attention_norm", "scores", "attention", "mlp_norm", "mlp", and each with "_2".

    Args: as `keras_vit.layers.Block`.
    """

    TAPS = tuple(f"{tap}{nth}" for tap in Block.TAPS for nth in ("", "_2"))

    def __init__(
        self,
        heads,
        mlp,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        drop_path_rate=0.0,
        flash_attention=None,
        gelu="exact",
        layer_scale=None,
        kernel_stddev=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.heads, self.mlp_width = heads, mlp
        common = dict(kernel_stddev=kernel_stddev, dtype=self.dtype_policy)
        names = [f"{branch}{nth}" for branch in ("attention", "mlp") for nth in ("", "_2")]
        norms = [f"{branch}_norm{nth}" for branch in ("attention", "mlp") for nth in ("", "_2")]
        self.branches = [
            Attention(heads, attention_dropout_rate, flash_attention, name=name, **common) if "attention" in name
            else MLP(mlp, dropout_rate, gelu, name=name, **common)
            for name in names
        ]  # fmt: skip
        self.norms = [keras.layers.LayerNormalization(epsilon=1e-6, dtype=self.dtype_policy, name=name) for name in norms]
        self.scales = []
        if layer_scale is not None:
            self.scales = [LayerScale(layer_scale, dtype=self.dtype_policy, name=f"{name}_scale") for name in names]
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy, name="dropout")
        self.drop_path = DropPath(drop_path_rate, dtype=self.dtype_policy, name="drop_path")

    def build(self, input_shape):
        for layer in (*self.norms, *self.branches, *self.scales, self.drop_path):
            layer.build(input_shape)

    def call(self, x, tap=None):
        check_tap(self, tap)
        for pair in ((0, 1), (2, 3)):
            added = []
            for index in pair:
                norm, branch, nth = self.norms[index], self.branches[index], "_2" * (index % 2)
                y = norm(x)
                if tap == norm.name:
                    return y
                if tap == f"scores{nth}" and index < 2:
                    return branch(y, tap="scores")
                y = branch(y)
                if tap == branch.name:
                    return y
                y = self.dropout(y) if index < 2 else y  # an MLP has its own
                added.append(self.drop_path(self.scales[index](y) if self.scales else y))
            x = x + added[0] + added[1]
        return x

    def multiply_adds(self, input_shape):
        """Those of both attentions and both MLPs for one example (b, n, d)."""
        return sum((branch.multiply_adds(input_shape) for branch in self.branches), collections.Counter())

    def compute_output_spec(self, x, tap=None):
        check_tap(self, tap)
        return self.branches[0].compute_output_spec(x, tap="scores" if tap in ("scores", "scores_2") else None)


@builder
def DeiT(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="auto",
    include_preprocessing=False,
    name="DeiT",
    *,
    patch_size,
    width,
    depth,
    heads,
    mlp,
    distilled=False,
    style="deit",
    layer_scale=None,
    parallel=False,
    stem="linear",
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0,
    flash_attention=None,
):
    """Builds a DeiT as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    Args:
        include_top: whether to end in the classifier: `head`, whose output are the logits, then the activation. With `distilled`
            there is a second one, `head_distillation`, which reads the distillation token, and `logits` is the mean of both.
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file, or None for random weights. `"imagenet"`
            is the ImageNet-1k classifier nearest to the resolution asked for.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), multiples of the patch; by default the checkpoint's own resolution, else 224.
        pooling: without top: None gives the grid of patch tokens (b, h, w, width), "token" the class token, "avg" the mean of the
            patch tokens (b, width).
        classes: outputs of the classifier; None takes the checkpoint's, or 1,000. Another number than the checkpoint's starts
            from heads of zeros.
        classifier_activation: "auto" is softmax; None for logits; or a Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        patch_size: side of a patch in pixels, or (height, width).
        width, depth, heads, mlp: width of the tokens, number of blocks, heads in each, hidden width of their MLPs.
        distilled: whether there is a distillation token behind the class token, and a head that reads it.
        style: "deit", or "deit3": the class token has no position, and stochastic depth is as probable in every block.
        layer_scale: start of the numbers that scale what each branch adds, 1e-4 in DeiT III; None for none.
        parallel: whether blocks have two attentions side by side, then two MLPs (`ParallelBlock`).
        stem: what makes tokens of patches: "linear", or "hmlp" (`HMLPStem`; patches of 16).
        dropout_rate: after positions, attention and in MLPs. attention_dropout_rate: on attention weights.
        stochastic_depth_rate: probability of skipping a residual branch in the last block; in style "deit" it grows linearly
            from 0.
        flash_attention: see `keras_vit.layers.Attention`.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    check_choices(name, pooling=(pooling, POOLINGS), style=(style, STYLES), stem=(stem, STEMS))
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if stem == "hmlp" and patch != (16, 16):
        raise errors.ArgumentError(f"{name}: stem='hmlp' makes patches of 16 x 16, got patch_size={patch_size}; give 16.")
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)

    x = top.images(default_size(top, patch, class_token=True), lambda h, w: check_size(name, (h, w), patch))
    x = HMLPStem(width, name="patches")(x) if stem == "hmlp" else Patches(width, patch, name="patches")(x)
    grid = x.shape[1:3]
    x = DeiTTokens(
        class_position=style == "deit", stddev=STDDEV, distillation_token=distilled, token_stddev=STDDEV, name="tokens"
    )(x)
    x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    block = ParallelBlock if parallel else Block
    for i in range(depth):
        drop_path_rate = stochastic_depth_rate * (i / max(depth - 1, 1) if style == "deit" else 1)
        x = block(
            heads, mlp, dropout_rate, attention_dropout_rate, drop_path_rate, flash_attention, gelu="exact",
            layer_scale=layer_scale, kernel_stddev=STDDEV, name=f"block_{i}",
        )(x)  # fmt: skip
    tokens = keras.layers.LayerNormalization(epsilon=1e-6, name="encoder_norm")(x)

    if include_top or pooling == "token":
        x = ClassToken(name="class_token")(tokens)
    else:
        x = PatchTokens(1 + distilled, name="patch_tokens")(tokens)
        x = MeanTokens(name="mean_tokens")(x) if pooling == "avg" else PatchGrid(grid, name="patch_grid")(x)
    if include_top:
        x = top.top(x, ClassToken(1, name="distillation_token")(tokens) if distilled else None)
    return top.model(x, name)


def _layouts():
    spelled = []
    for nth, ours in (("", ""), ("1", "_2")):  # of a block, and of the second branches of a parallel one
        spelled += torch.block("blocks.{i}", "block_{i}", nth, ours)
        spelled += torch.attention(f"blocks.{{i}}.attn{nth}", f"block_{{i}}/attention{ours}")
    for i in range(3):  # of the original's sequence: convolution, norm, GELU
        spelled += torch.conv(f"patch_embed.proj.{3 * i}", f"patches/conv_{i}")
        spelled += torch.batch_norm(f"patch_embed.proj.{3 * i + 1}", f"patches/norm_{i}")
    names = Names(
        torch.conv("patch_embed.proj", "patches"),
        torch.param("cls_token", "tokens/cls"),
        torch.param("dist_token", "tokens/dist"),
        torch.param("pos_embed", "tokens/positions"),
        spelled,
        torch.norm("norm", "encoder_norm"),
        torch.linear("head", "head"),
        torch.linear("head_dist", "head_distillation"),
    )
    return torch.spellings(names)


def _sizes(shapes):
    hmlp, rows = "patches/conv_0/kernel" in shapes, shapes["tokens/positions"][1]
    ph, pw, _, _ = (16, 16, None, None) if hmlp else shapes["patches/kernel"]
    found = dict(
        patch_size=ph if ph == pw else (ph, pw), width=shapes["tokens/cls"][2], depth=depth(shapes),
        mlp=shapes["block_0/mlp/fc1/kernel"][1], distilled="tokens/dist" in shapes, stem="hmlp" if hmlp else "linear",
        layer_scale=1e-4 if "block_0/attention_scale/gamma" in shapes else None,
        parallel="block_0/attention_2/qkv_kernel" in shapes,
    )  # fmt: skip
    if not found["distilled"] and math.isqrt(rows) ** 2 in (rows, rows - 1):  # else the grid is no square and does not tell
        found["style"] = "deit3" if math.isqrt(rows) ** 2 == rows else "deit"
    return found


def _adapters(model, *, grid, resize_patches):
    tokens = model.get_layer("tokens")
    return [Positions(tokens.grid, True, tokens.class_position, grid, tokens.distillation_token, resample_bicubic)]


def _any_size(model):
    patch = model.get_layer("patches").patch_size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    return patch, patch


FAMILY = Family(
    "DeiT",
    layouts=_layouts(),
    adapters=_adapters,
    grid=lambda model: model.get_layer("tokens").grid,
    sizes=_sizes,
    written=lambda model: "model/torch",  # as published
    any_size=_any_size,
    pixels=IMAGENET,
)

# Sizes: arXiv 2012.12877 Table 1, those of ViT; of DeiT III models_v2.py of the original
M = dict(width=512, depth=12, heads=8, mlp=2048)
PLAIN = dict(style="deit", distilled=False, layer_scale=None)
DISTILLED = dict(style="deit", distilled=True, layer_scale=None)
THIRD = dict(style="deit3", distilled=False, layer_scale=1e-4)
WHOLE = dataclasses.replace(IMAGENET, crop_fraction=1.0)  # arXiv 2204.07118 Table 1: the test crop


def _released(kind, hashes):
    """Weights and upstream names of a row; `hashes` is {resolution: the end of the file's name}."""
    weights, upstream = {}, {}
    for side, digest in hashes.items():
        tag, name = "imagenet1k" if side == 224 else f"imagenet1k-{side}", f"deit_{kind}_patch16_{side}"
        weights[tag], upstream[name] = deit(f"{name}-{digest}", side, tuned=side != 224, pixels=IMAGENET), tag
    return dict(weights=weights, upstream=upstream)


def _third(size, sides, patch=16, ending=""):
    """Weights and upstream names (the original's, timm's) of a row of DeiT III."""
    weights, upstream = {}, {f"deit_{size}_patch{patch}_LS": None}
    for data, start, origin in (("21k", "imagenet21k+", "fb_in22k_ft_in1k"), ("1k", "", "fb_in1k")):
        for side in sides:
            tag, name = f"{start}imagenet1k" + ("" if side == 224 else f"-{side}"), f"deit3_{size}_patch{patch}_{side}"
            file = f"deit_3_{size}_{side}_{data}{ending if data == '21k' else ''}"
            weights[tag] = deit(file, side, tuned=side != 224 or bool(start), pixels=WHOLE)
            upstream[f"{name}.{origin}"] = upstream[name] = tag  # a bare name of timm's is that of ImageNet-1k alone
    return dict(weights=weights, upstream=upstream)


DeiT_mu = variant("DeiT_mu", DeiT, **MU, **DISTILLED, patch_size=8, resolution=32, params=210_704, macs=1_587_200)
DeiT_Ti16 = variant(
    "DeiT_Ti16", DeiT, **TI, **PLAIN, patch_size=16, params=5_717_416, macs=1_253_683_200, **_released("tiny", {224: "a1311bcf"})
)
DeiT_S16 = variant(
    "DeiT_S16", DeiT, **S, **PLAIN, patch_size=16, params=22_050_664, macs=4_598_882_304, **_released("small", {224: "cd65a155"})
)
DeiT_B16 = variant(
    "DeiT_B16", DeiT, **B, **PLAIN, patch_size=16, params=86_567_656, macs=17_563_828_224,
    **_released("base", {224: "b5f2ef4d", 384: "8de9b5d1"}),
)  # fmt: skip
DeiT_Ti16_distilled = variant(
    "DeiT_Ti16_distilled", DeiT, **TI, **DISTILLED, patch_size=16, params=5_910_800, macs=1_261_003_776,
    **_released("tiny_distilled", {224: "b40b3cf7"}),
)  # fmt: skip
DeiT_S16_distilled = variant(
    "DeiT_S16_distilled", DeiT, **S, **DISTILLED, patch_size=16, params=22_436_432, macs=4_624_140_288,
    **_released("small_distilled", {224: "649709d9"}),
)  # fmt: skip
DeiT_B16_distilled = variant(
    "DeiT_B16_distilled", DeiT, **B, **DISTILLED, patch_size=16, params=87_338_192, macs=17_656_811_520,
    **_released("base_distilled", {224: "df68dfff", 384: "d0272ac0"}),
)  # fmt: skip
DeiT3_S16 = variant(
    "DeiT3_S16", DeiT, **S, **THIRD, patch_size=16, params=22_059_496, macs=4_598_882_304, **_third("small", (224, 384))
)
DeiT3_M16 = variant(
    "DeiT3_M16", DeiT, **M, **THIRD, patch_size=16, params=38_849_512, macs=7_990_968_320, **_third("medium", (224,))
)
DeiT3_B16 = variant(
    "DeiT3_B16", DeiT, **B, **THIRD, patch_size=16, params=86_585_320, macs=17_563_828_224, **_third("base", (224, 384))
)
DeiT3_L16 = variant(
    "DeiT3_L16", DeiT, **L, **THIRD, patch_size=16, params=304_374_760, macs=61_554_712_576, **_third("large", (224, 384))
)
DeiT3_H14 = variant(
    "DeiT3_H14", DeiT, **H, **THIRD, patch_size=14, params=632_126_440, macs=167_295_109_120,
    **_third("huge", (224,), 14, ending="_v1"),
)  # fmt: skip
