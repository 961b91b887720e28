"""CaiT: "Going deeper with Image Transformers" (arXiv 2103.17239).

Weights: facebookresearch/deit (`https://dl.fbaipublicfiles.com/deit`).
"""

import collections
import dataclasses

import keras
import numpy as np
from keras import ops

from keras_vit.checkpoints.adapt import Positions, bicubic, resample_bicubic
from keras_vit.checkpoints.dialects import torch
from keras_vit.checkpoints.names import Names, rule
from keras_vit.checkpoints.weights import deit
from keras_vit.data.pixels import IMAGENET
from keras_vit.layers import MLP, Attention, Block, ClassToken, LayerScale, MeanTokens, Patches, PatchGrid, PatchTokens, Tokens
from keras_vit.layers.taps import check_tap
from keras_vit.models.vit import check_size, default_size, depth
from keras_vit.zoo import Contract, Family, builder, check_choices, variant

POOLINGS = (None, "token", "avg")
STDDEV = 0.02  # of the values that kernels, token and positions start from


@keras.saving.register_keras_serializable("keras_vit")
class CaiTTokens(Tokens):
    """(b, h, w, d) -> (b, n, d): `Tokens` without a class token, whose positions are resampled bicubically.

    Args:
        stddev: see `Tokens`.
    """

    def __init__(self, stddev=STDDEV, **kwargs):
        kwargs = {key: kwargs[key] for key in ("name", "trainable", "dtype") if key in kwargs}
        super().__init__(class_token=False, class_position=False, stddev=stddev, **kwargs)

    @staticmethod
    def line(old, new):
        return bicubic(old, new, np if isinstance(new, int) else ops)


@keras.saving.register_keras_serializable("keras_vit")
class LearnedToken(keras.layers.Layer):
    """(b, n, d) -> (b, 1, d): a learned token for each sequence, whatever it holds."""

    def build(self, input_shape):
        start = keras.initializers.RandomNormal(stddev=STDDEV)
        self.token = self.add_weight(shape=(1, 1, input_shape[-1]), initializer=start, name="token")

    def call(self, x):
        return ops.broadcast_to(ops.cast(self.token, x.dtype), (ops.shape(x)[0], 1, x.shape[-1]))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1, input_shape[-1])


@keras.saving.register_keras_serializable("keras_vit")
class TalkingAttention(Attention):
    """(b, n, d) -> (b, n, d): self-attention whose heads are mixed before and after the softmax (arXiv 2003.02436).

    Weights beside those of `Attention`: `before_kernel` and `after_kernel` (heads, heads), from which head to which, and
    `before_bias` and `after_bias` (heads,). Mixing is computed in float32, as the softmax. tap="mixed_logits" gives what enters
    the softmax, "scores" what comes out, "mixed_scores" what the values are summed by, whose rows are no distributions; all
    (b, heads, n, n).

    Args: as `Attention`. No fused operation mixes heads, so `flash_attention` changes nothing.
    """

    INSIDE = ("mixed_logits", "scores", "mixed_scores")

    def build(self, input_shape):
        super().build(input_shape)
        start = keras.initializers.RandomNormal(stddev=self.kernel_stddev) if self.kernel_stddev else "glorot_uniform"
        for when in ("before", "after"):
            kernel = self.add_weight(shape=(self.heads, self.heads), initializer=start, name=f"{when}_kernel")
            setattr(self, f"{when}_kernel", kernel)
            setattr(self, f"{when}_bias", self.add_weight(shape=(self.heads,), initializer="zeros", name=f"{when}_bias"))

    def _weights(self, scores, tap):
        scores = self._mixed(scores, self.before_kernel, self.before_bias)
        if tap == "mixed_logits":
            return scores
        scores = ops.softmax(scores, axis=-1)
        return scores if tap == "scores" else self._mixed(scores, self.after_kernel, self.after_bias)

    def _mixed(self, scores, kernel, bias):
        m, n = ops.shape(scores)[2:]
        flat = ops.reshape(scores, (-1, self.heads, m * n))
        mixed = ops.matmul(ops.transpose(ops.cast(kernel, "float32")), flat) + ops.cast(bias, "float32")[:, None]
        return ops.reshape(mixed, (-1, self.heads, m, n))

    def _fused(self, x, training):
        return False

    def multiply_adds(self, input_shape, queries=None):
        """As `Attention`, and "linear" of both mixtures of heads."""
        n = input_shape[1]
        mixtures = 2 * self.heads**2 * n * (n if queries is None else queries)
        return super().multiply_adds(input_shape, queries) + collections.Counter(linear=mixtures)


@keras.saving.register_keras_serializable("keras_vit")
class TalkingBlock(Block):
    """(b, n, d) -> (b, n, d): `Block` with `TalkingAttention`, whose "mixed_logits" and "mixed_scores" are tapped too."""

    TAPS = (*Block.TAPS, "mixed_logits", "mixed_scores")
    ATTENTION = TalkingAttention


@keras.saving.register_keras_serializable("keras_vit")
class ClassBlock(keras.layers.Layer):
    """(b, n, d), (b, 1, d) -> (b, 1, d): a class token looks at itself and all tokens, then an MLP; the tokens stay as they are.

    Of section 2.2. What lies inside is tapped: "attention_norm" (b, 1 + n, d), "scores" (b, heads, 1, 1 + n), "attention",
    "mlp_norm" and "mlp" (b, 1, d).

    Args:
        heads, mlp: number of heads; width of the hidden layer of the MLP.
        layer_scale: start of the numbers that scale what each branch adds (see `LayerScale`).
    """

    TAPS = ("attention_norm", "scores", "attention", "mlp_norm", "mlp")

    def __init__(self, heads, mlp, layer_scale, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.mlp_width, self.layer_scale = heads, mlp, layer_scale
        dtype = self.dtype_policy
        self.attention_norm = keras.layers.LayerNormalization(epsilon=1e-6, dtype=dtype, name="attention_norm")
        self.attention = Attention(heads, flash_attention=False, kernel_stddev=STDDEV, dtype=dtype, name="attention")
        self.attention_scale = LayerScale(layer_scale, dtype=dtype, name="attention_scale")
        self.mlp_norm = keras.layers.LayerNormalization(epsilon=1e-6, dtype=dtype, name="mlp_norm")
        self.mlp = MLP(mlp, 0.0, "exact", STDDEV, dtype=dtype, name="mlp")
        self.mlp_scale = LayerScale(layer_scale, dtype=dtype, name="mlp_scale")

    def get_config(self):
        return {**super().get_config(), "heads": self.heads, "mlp": self.mlp_width, "layer_scale": self.layer_scale}

    def build(self, x_shape, cls_shape):
        for layer in (self.attention_norm, self.attention, self.attention_scale):
            layer.build(x_shape)
        for layer in (self.mlp_norm, self.mlp, self.mlp_scale):
            layer.build(cls_shape)

    def call(self, x, cls, tap=None):
        check_tap(self, tap)
        y = self.attention_norm(ops.concatenate([cls, x], axis=1))
        if tap == "attention_norm":
            return y
        y = self.attention(y, query=y[:, :1], tap="scores" if tap == "scores" else None)
        if tap in ("scores", "attention"):
            return y
        cls = cls + self.attention_scale(y)
        y = self.mlp_norm(cls)
        if tap == "mlp_norm":
            return y
        y = self.mlp(y)
        if tap == "mlp":
            return y
        return cls + self.mlp_scale(y)

    def multiply_adds(self, input_shape):
        """Those of attention with one query and of the MLP on one token, for one example (b, n, d)."""
        b, n, d = input_shape
        return self.attention.multiply_adds((b, 1 + n, d), queries=1) + self.mlp.multiply_adds((b, 1, d))

    def compute_output_spec(self, x, cls, tap=None):
        check_tap(self, tap)
        b, n, d = x.shape
        n = n and 1 + n
        if tap == "scores":
            return keras.KerasTensor((b, self.heads, 1, n), dtype="float32")
        return keras.KerasTensor((b, n if tap == "attention_norm" else 1, d), dtype=self.compute_dtype)


@builder
def CaiT(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="auto",
    include_preprocessing=False,
    name="CaiT",
    *,
    patch_size,
    width,
    depth,
    heads,
    mlp,
    layer_scale,
    class_depth=2,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0,
):
    """Builds a CaiT as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    Args:
        include_top: whether to end in the classifier (`head`, whose output are the logits, then the activation).
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file, or None for random weights. `"imagenet"`
            is the ImageNet-1k classifier nearest to the resolution asked for.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), multiples of the patch; by default the checkpoint's own resolution, else 224.
        pooling: without top: None gives the grid of patch tokens (b, h, w, width), "token" the class token, "avg" the mean of the
            patch tokens (b, width).
        classes: outputs of the classifier; None takes the checkpoint's, or 1,000. Another number than the checkpoint's starts
            from a head of zeros.
        classifier_activation: "auto" is softmax; None for logits; or a Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        patch_size: side of a patch in pixels, or (height, width).
        width, depth, heads, mlp: width of the tokens, number of blocks without the class token, heads in each, hidden width of
            their MLPs.
        layer_scale: start of the numbers that scale what each branch adds.
        class_depth: number of blocks behind them in which the class token looks at the others.
        dropout_rate: after positions, attention and in MLPs. attention_dropout_rate: on attention weights.
        stochastic_depth_rate: probability of skipping a residual branch, the same in every block; neither these rates nor this
            one hold in the blocks of the class token.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    check_choices(name, pooling=(pooling, POOLINGS))
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)

    x = top.images(default_size(top, patch, class_token=False), lambda h, w: check_size(name, (h, w), patch))
    x = Patches(width, patch, name="patches")(x)
    grid = x.shape[1:3]
    x = CaiTTokens(name="tokens")(x)
    x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    for i in range(depth):
        x = TalkingBlock(
            heads, mlp, dropout_rate, attention_dropout_rate, stochastic_depth_rate, gelu="exact", layer_scale=layer_scale,
            kernel_stddev=STDDEV, name=f"block_{i}",
        )(x)  # fmt: skip
    token = LearnedToken(name="cls")(x)
    for i in range(class_depth):
        token = ClassBlock(heads, mlp, layer_scale, name=f"class_block_{i}")(x, token)
    x = keras.layers.Concatenate(axis=1, name="all_tokens")([token, x])
    x = keras.layers.LayerNormalization(epsilon=1e-6, name="encoder_norm")(x)

    if include_top or pooling == "token":
        x = ClassToken(name="class_token")(x)
    else:
        x = PatchTokens(name="patch_tokens")(x)
        x = MeanTokens(name="mean_tokens")(x) if pooling == "avg" else PatchGrid(grid, name="patch_grid")(x)
    return top.model(top.top(x) if include_top else x, name)


def _layouts():
    block, last = "blocks.{i}", "blocks_token_only.{i}"
    names = Names(
        torch.conv("patch_embed.proj", "patches"),
        torch.param("cls_token", "cls/token"),
        torch.param("pos_embed", "tokens/positions"),
        torch.block(block, "block_{i}"),
        torch.attention(f"{block}.attn", "block_{i}/attention"),
        _mixture(f"{block}.attn.proj_l", "block_{i}/attention/before"),
        _mixture(f"{block}.attn.proj_w", "block_{i}/attention/after"),
        torch.block(last, "class_block_{i}"),
        torch.split_attention(f"{last}.attn", "class_block_{i}/attention", f"{last}.attn.proj", ("q", "k", "v")),
        torch.norm("norm", "encoder_norm"),
        torch.linear("head", "head"),
    )
    return torch.spellings(names)


def _mixture(original, ours):
    return [
        rule(f"{original}.weight", f"{ours}_kernel", torch.MATRIX),
        rule(f"{original}.bias", f"{ours}_bias"),
    ]


def _sizes(shapes):
    ph, pw, _, width = shapes["patches/kernel"]
    return dict(
        patch_size=ph if ph == pw else (ph, pw), width=width, depth=depth(shapes),
        heads=shapes["block_0/attention/before_kernel"][0], mlp=shapes["block_0/mlp/fc1/kernel"][1],
        class_depth=len({name.partition("/")[0] for name in shapes if name.startswith("class_block_")}),
    )  # fmt: skip


def _adapters(model, *, grid, resize_patches):
    return [Positions(model.get_layer("tokens").grid, False, file_grid=grid, resample=resample_bicubic)]


def _any_size(model):
    patch = tuple(model.get_layer("patches").kernel_size)
    return patch, patch


FAMILY = Family(
    "CaiT",
    layouts=_layouts(),
    adapters=_adapters,
    grid=lambda model: model.get_layer("tokens").grid,
    sizes=_sizes,
    written=lambda model: "model/module.torch",  # as published
    any_size=_any_size,
    pixels=dataclasses.replace(IMAGENET, crop_fraction=1.0),  # README_cait.md
)

# Table 1, with the released depths; layer scale: cait_models.py of the original
MU = dict(width=48, depth=2, heads=4, mlp=96, layer_scale=1e-5, class_depth=2)
XXS = dict(width=192, heads=4, mlp=768)
XS = dict(width=288, heads=6, mlp=1152)
S = dict(width=384, heads=8, mlp=1536)
M = dict(width=768, heads=16, mlp=3072)


def _released(size, original, *sides):
    """Weights and upstream names (timm's, and `original`'s by resolution) of a row; 224 is the resolution without a number."""
    weights, upstream = {}, {}
    for side in sides:
        tag = "imagenet1k" if side == min(sides) else f"imagenet1k-{side}"
        weights[tag] = deit(f"{size}_{side}", side, tuned=side > 224, pixels=FAMILY.pixels)
        for name in (f"cait_{size.lower()}_{side}", f"cait_{size.lower()}_{side}.fb_dist_in1k", original[side]):
            upstream[name] = tag
    return dict(weights=weights, upstream=upstream, resolution=min(sides))


CaiT_mu = variant("CaiT_mu", CaiT, **MU, patch_size=8, resolution=32, params=135_480, macs=1_038_400)
CaiT_XXS24 = variant(
    "CaiT_XXS24", CaiT, **XXS, depth=24, layer_scale=1e-5, patch_size=16, params=11_956_264, macs=2_523_475_200,
    **_released("XXS24", {224: "cait_XXS24_224", 384: "cait_XXS24"}, 224, 384),
)  # fmt: skip
CaiT_XXS36 = variant(
    "CaiT_XXS36", CaiT, **XXS, depth=36, layer_scale=1e-5, patch_size=16, params=17_299_720, macs=3_755_697_408,
    **_released("XXS36", {224: "cait_XXS36_224", 384: "cait_XXS36"}, 224, 384),
)  # fmt: skip
CaiT_XS24 = variant(
    "CaiT_XS24", CaiT, **XS, depth=24, layer_scale=1e-5, patch_size=16, params=26_670_088, macs=19_240_642_944,
    **_released("XS24", {384: "cait_XS24"}, 384),
)  # fmt: skip
CaiT_S24 = variant(
    "CaiT_S24", CaiT, **S, depth=24, layer_scale=1e-5, patch_size=16, params=46_916_200, macs=9_327_327_744,
    **_released("S24", {224: "cait_S24_224", 384: "cait_S24"}, 224, 384),
)  # fmt: skip
CaiT_S36 = variant(
    "CaiT_S36", CaiT, **S, depth=36, layer_scale=1e-6, patch_size=16, params=68_366_632, macs=47_907_955_200,
    **_released("S36", {384: "cait_S36"}, 384),
)  # fmt: skip
CaiT_M36 = variant(
    "CaiT_M36", CaiT, **M, depth=36, layer_scale=1e-6, patch_size=16, params=271_221_352, macs=172_943_655_936,
    **_released("M36", {384: "cait_M36"}, 384),
)  # fmt: skip
CaiT_M48 = variant(
    "CaiT_M48", CaiT, **M, depth=48, layer_scale=1e-6, patch_size=16, params=356_460_520, macs=329_107_670_016,
    **_released("M48", {448: "cait_M48"}, 448),
)  # fmt: skip
