"""ResMLP: "ResMLP: Feedforward networks for image classification with data-efficient training" (arXiv 2105.03404).

Weights: facebookresearch/deit (`https://dl.fbaipublicfiles.com/deit`).
"""

import collections
import dataclasses

import keras
from keras import ops

from keras_vit.checkpoints.adapt import TokenCount
from keras_vit.checkpoints.dialects import torch
from keras_vit.checkpoints.names import Names
from keras_vit.checkpoints.weights import deit
from keras_vit.data.pixels import IMAGENET
from keras_vit.layers import MLP, Affine, DropPath, LayerScale, MeanTokens, Patches, PatchGrid
from keras_vit.layers.taps import check_tap
from keras_vit.models.vit import check_size, depth
from keras_vit.zoo import Contract, Family, builder, check_choices, tap, variant

POOLINGS = (None, "avg")
KERNEL = "block_0/token_mixing/kernel"  # by which a file says how many tokens it is for
STDDEV = 0.02  # of the normal distribution that kernels start from


@keras.saving.register_keras_serializable("keras_vit")
class ResMLPBlock(keras.layers.Layer):
    """(b, n, d) -> (b, n, d): mixes tokens by one matrix, then channels in every token by an MLP; both branches are scaled.

    What lies inside is tapped: `block(x, tap=...)` returns "token_norm", "token_mixing" (b, d, n), "channel_norm" or
    "channel_mixing" instead of the block's output, from the same code.

    Args:
        mlp: width of the hidden layer of the MLP.
        layer_scale: start of the numbers that scale what each branch adds (see `LayerScale`).
        dropout_rate: twice in the MLP.
        drop_path_rate: probability that an example skips a residual branch in training (stochastic depth).
    """

    TAPS = ("token_norm", "token_mixing", "channel_norm", "channel_mixing")

    def __init__(self, mlp, layer_scale, dropout_rate=0.0, drop_path_rate=0.0, **kwargs):
        super().__init__(**kwargs)
        self.mlp, self.layer_scale = mlp, layer_scale
        self.dropout_rate, self.drop_path_rate = dropout_rate, drop_path_rate
        dtype = self.dtype_policy
        self.token_norm = Affine(dtype=dtype, name="token_norm")
        self.token_scale = LayerScale(layer_scale, dtype=dtype, name="token_scale")
        self.channel_norm = Affine(dtype=dtype, name="channel_norm")
        self.channel_mixing = MLP(mlp, dropout_rate, "exact", STDDEV, dtype=dtype, name="channel_mixing")
        self.channel_scale = LayerScale(layer_scale, dtype=dtype, name="channel_scale")
        self.drop_path = DropPath(drop_path_rate, dtype=dtype, name="drop_path")

    def build(self, input_shape):
        b, n, d = input_shape
        start = keras.initializers.RandomNormal(stddev=STDDEV)
        self.token_mixing = keras.layers.Dense(n, kernel_initializer=start, dtype=self.dtype_policy, name="token_mixing")
        self.token_mixing.build((b, d, n))
        layers = (self.token_norm, self.token_scale, self.channel_norm, self.channel_mixing, self.channel_scale, self.drop_path)
        for layer in layers:
            layer.build(input_shape)

    def call(self, x, tap=None):
        check_tap(self, tap)
        y = self.token_norm(x)
        if tap == "token_norm":
            return y
        y = self.token_mixing(ops.swapaxes(y, 1, 2))
        if tap == "token_mixing":
            return y
        x = x + self.drop_path(self.token_scale(ops.swapaxes(y, 1, 2)))
        y = self.channel_norm(x)
        if tap == "channel_norm":
            return y
        y = self.channel_mixing(y)
        if tap == "channel_mixing":
            return y
        return x + self.drop_path(self.channel_scale(y))

    def multiply_adds(self, input_shape):
        """Those of the matrix over tokens and of the MLP for one example (b, n, d)."""
        _, n, d = input_shape
        return collections.Counter(linear=n * n * d) + self.channel_mixing.multiply_adds(input_shape)

    def compute_output_spec(self, x, tap=None):  # else Keras traces each block when a model is built
        check_tap(self, tap)
        b, n, d = x.shape
        return keras.KerasTensor((b, d, n) if tap == "token_mixing" else (b, n, d), dtype=self.compute_dtype)


@builder
def ResMLP(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="auto",
    include_preprocessing=False,
    name="ResMLP",
    *,
    patch_size,
    width,
    depth,
    mlp,
    layer_scale,
    dropout_rate=0.0,
    stochastic_depth_rate=0.0,
):
    """Builds a ResMLP as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    Its weights mix a fixed number of tokens, so that a checkpoint fits one number of patches only.

    Args:
        include_top: whether to end in the classifier (`head`, whose output are the logits, then the activation).
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file, or None for random weights. `"imagenet"`
            is the ImageNet-1k classifier.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), multiples of the patch; by default the checkpoint's, else 224.
        pooling: without top: None gives the grid of tokens (b, h, w, width), "avg" their mean (b, width).
        classes: outputs of the classifier; None takes the checkpoint's, or 1,000. Another number than the checkpoint's starts
            from a head of zeros.
        classifier_activation: "auto" is softmax; None for logits; or a Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        patch_size: side of a patch in pixels, or (height, width).
        width, depth, mlp: width of the tokens, number of blocks, hidden width of the MLPs over channels.
        layer_scale: start of the numbers that scale what each branch adds.
        dropout_rate: twice in each MLP.
        stochastic_depth_rate: probability of skipping a residual branch, the same in every block.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    check_choices(name, pooling=(pooling, POOLINGS))
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)
    fixed = TokenCount(KERNEL, None, patch, "square" if top.record and top.record.published else top.recorded_grid)

    def check(h, w):
        check_size(name, (h, w), patch)
        fixed.check(name, top.record, top.stored(KERNEL), (h // patch[0], w // patch[1]))

    x = top.images(fixed.pixels(top.stored(KERNEL)) or (224, 224), check)
    x = Patches(width, patch, name="patches")(x)
    h, w = x.shape[1:3]
    x = keras.layers.Reshape((h * w, width), name="tokens")(x)
    for i in range(depth):
        x = ResMLPBlock(mlp, layer_scale, dropout_rate, stochastic_depth_rate, name=f"block_{i}")(x)
    x = Affine(name="encoder_norm")(x)
    x = MeanTokens(name="mean_tokens")(x) if include_top or pooling else PatchGrid((h, w), name="patch_grid")(x)
    return top.model(top.top(x) if include_top else x, name)


def _affine(original, ours):
    return [torch.param(f"{original}.alpha", f"{ours}/gamma"), torch.param(f"{original}.beta", f"{ours}/beta")]


def _layouts():
    block = "blocks.{i}"
    names = Names(
        torch.conv("patch_embed.proj", "patches"),
        _affine(f"{block}.norm1", "block_{i}/token_norm"),
        torch.linear(f"{block}.attn", "block_{i}/token_mixing"),
        torch.param(f"{block}.gamma_1", "block_{i}/token_scale/gamma"),
        _affine(f"{block}.norm2", "block_{i}/channel_norm"),
        torch.mlp(f"{block}.mlp", "block_{i}/channel_mixing"),
        torch.param(f"{block}.gamma_2", "block_{i}/channel_scale/gamma"),
        _affine("norm", "encoder_norm"),
        torch.linear("head", "head"),
    )
    return torch.spellings(names)


def _grid(model):
    return tuple(tap(model, "patches").shape[1:3])


def _adapters(model, *, grid, resize_patches):
    return [TokenCount(KERNEL, _grid(model), model.get_layer("patches").kernel_size, grid)]


def _sizes(shapes):
    ph, pw, _, width = shapes["patches/kernel"]
    return dict(
        patch_size=ph if ph == pw else (ph, pw), width=width, depth=depth(shapes),
        mlp=shapes["block_0/channel_mixing/fc1/kernel"][1],
    )  # fmt: skip


FAMILY = Family("ResMLP", layouts=_layouts(), adapters=_adapters, grid=_grid, sizes=_sizes, pixels=IMAGENET)

# resmlp_models.py of the original
MU = dict(width=64, depth=2, mlp=128, layer_scale=0.1)
S = dict(width=384, mlp=1536)
B = dict(width=768, mlp=3072)
PIXELS = dataclasses.replace(IMAGENET, crop_fraction=0.9)  # README_resmlp.md


def _released(size, timm, *kinds):
    """Weights and upstream names (the original's, timm's) of a row; `kinds` are the ends of the files' names.

    All files have a head of 1,000 classes, those of DINO too, which were not fine-tuned: theirs means nothing.
    """
    tags = {
        "no_dist": ("imagenet1k", "fb_in1k"), "dist": ("imagenet1k+distilled", "fb_distilled_in1k"),
        "22k": ("imagenet21k+imagenet1k", "fb_in22k_ft_in1k"), "dino": ("dino", "fb_dino"),
    }  # fmt: skip
    weights = {tags[kind][0]: deit(f"{size}_{kind}", pixels=PIXELS, tuned=kind == "22k") for kind in kinds}
    upstream = {size: None, timm: "imagenet1k"} | {f"{timm}.{tags[kind][1]}": tags[kind][0] for kind in kinds}
    return dict(weights=weights, upstream=upstream)


ResMLP_mu = variant("ResMLP_mu", ResMLP, **MU, patch_size=8, resolution=32, params=111_944, macs=817_664)
ResMLP_S12 = variant(
    "ResMLP_S12", ResMLP, **S, depth=12, layer_scale=0.1, patch_size=16, params=15_350_872, macs=3_009_739_776,
    **_released("resmlp_12", "resmlp_12_224", "no_dist", "dist", "dino"),
)  # fmt: skip
ResMLP_S24 = variant(
    "ResMLP_S24", ResMLP, **S, depth=24, layer_scale=1e-5, patch_size=16, params=30_020_680, macs=5_961_292_800,
    **_released("resmlp_24", "resmlp_24_224", "no_dist", "dist", "dino"),
)  # fmt: skip
ResMLP_S36 = variant(
    "ResMLP_S36", ResMLP, **S, depth=36, layer_scale=1e-6, patch_size=16, params=44_690_488, macs=8_912_845_824,
    **_released("resmlp_36", "resmlp_36_224", "no_dist", "dist"),
)  # fmt: skip
ResMLP_B24 = variant(
    "ResMLP_B24", ResMLP, **B, depth=24, layer_scale=1e-6, patch_size=8, params=129_138_280, macs=100_230_739_968,
    **_released("resmlpB_24", "resmlp_big_24_224", "no_dist", "dist", "22k"),
)  # fmt: skip
