"""Hybrids: a Vision Transformer on the features of a ResNet (arXiv 2010.11929, section 3.1; R+Ti and R26+S: 2106.10270).

The ResNet is BiT's (1912.11370): standardised kernels, group norm. Weights: google-research/vision_transformer (`gs://vit_models`).
"""

import collections

import keras
from keras import ops

from keras_vit import errors
from keras_vit.checkpoints.names import Names, rule
from keras_vit.checkpoints.transforms import Whole, Wrapped
from keras_vit.layers import Block, ClassToken, GroupNorm, MeanTokens, Patches, PatchGrid, PatchTokens, StdConv, Tokens
from keras_vit.models import vit
from keras_vit.zoo import Contract, Family, builder, variant

CLASSIFIERS = ("token", "gap", "unpooled", "token_unpooled")
POOLINGS = (None, "token", "avg")
GROUPS = 32  # of every group norm


@keras.saving.register_keras_serializable("keras_vit")
class ResNetUnit(keras.layers.Layer):
    """(b, h, w, c) -> (b, h / stride, w / stride, 4 * width): `relu(x + conv3(conv2(conv1(x))))`, each convolution normalised.

    `conv1` and `conv3` have kernels of 1 x 1, `conv2` of 3 x 3 and the stride. Where c or the size changes, x goes through
    `conv_proj`.

    Args:
        width: channels of `conv1` and `conv2`, a multiple of 32.
        stride: sides are divided by it and rounded up.
    """

    def __init__(self, width, stride=1, **kwargs):
        super().__init__(**kwargs)
        dtype = self.dtype_policy
        self.width, self.stride = width, stride
        self.conv1 = StdConv(width, 1, dtype=dtype, name="conv1")
        self.gn1 = GroupNorm(GROUPS, dtype=dtype, name="gn1")
        self.conv2 = StdConv(width, 3, stride, dtype=dtype, name="conv2")
        self.gn2 = GroupNorm(GROUPS, dtype=dtype, name="gn2")
        self.conv3 = StdConv(4 * width, 1, dtype=dtype, name="conv3")
        self.gn3 = GroupNorm(GROUPS, gamma_initializer="zeros", dtype=dtype, name="gn3")  # a fresh unit passes x on

    def build(self, input_shape):
        branches = [[self.conv1, self.gn1, self.conv2, self.gn2, self.conv3, self.gn3]]
        self.projects = input_shape[-1] != 4 * self.width or self.stride != 1
        if self.projects:
            self.conv_proj = StdConv(4 * self.width, 1, self.stride, dtype=self.dtype_policy, name="conv_proj")
            self.gn_proj = GroupNorm(GROUPS, dtype=self.dtype_policy, name="gn_proj")
            branches.append([self.conv_proj, self.gn_proj])
        for branch in branches:
            shape = input_shape
            for layer in branch:
                layer.build(shape)
                shape = layer.compute_output_shape(shape)

    def call(self, x):
        y = ops.relu(self.gn1(self.conv1(x)))
        y = ops.relu(self.gn2(self.conv2(y)))
        y = self.gn3(self.conv3(y))
        return ops.relu(y + (self.gn_proj(self.conv_proj(x)) if self.projects else x))

    def multiply_adds(self, input_shape):
        """Those of all convolutions for one example (b, h, w, c)."""
        total, shape = collections.Counter(), input_shape
        for conv in (self.conv1, self.conv2, self.conv3):
            total += conv.multiply_adds(shape)
            shape = conv.compute_output_shape(shape)
        return total + self.conv_proj.multiply_adds(input_shape) if self.projects else total

    def compute_output_shape(self, input_shape):
        return (*self.conv2.compute_output_shape(input_shape)[:3], 4 * self.width)


@builder
def Hybrid(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="auto",
    include_preprocessing=False,
    name="Hybrid",
    *,
    patch_size,
    width,
    depth,
    heads,
    mlp,
    stages=(3, 4, 9),
    width_factor=1,
    classifier="token",
    representation_size="auto",
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0,
    flash_attention=None,
):
    """Builds a ViT on a ResNet's features as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    What its stages give is tapped as the output of their last unit, such as `stage_2_unit_4`.

    Args:
        include_top: whether to end in the classifier (`head`, whose output are the logits, then the activation).
        weights: a tag of `keras_vit.list_weights`, an AugReg file name, a path or URL of an original file, or None for random
            weights. `"imagenet"` is the ImageNet-1k classifier nearest to the resolution asked for.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3) of any size that gives a patch: each halving of the ResNet rounds up, and features that fill no
            patch are left out. By default the checkpoint's own resolution, else 224.
        pooling: without top: None gives the grid of patch tokens (b, h, w, width), or all tokens (b, 1 + n, width) with
            classifier="token_unpooled"; "token" the class token, "avg" the mean of the patch tokens, (b, width) or
            (b, representation_size).
        classes: outputs of the classifier; None takes the checkpoint's, or 1,000. Another number than the checkpoint's starts
            from a head of zeros.
        classifier_activation: "auto" is the checkpoint's own while its head is kept (softmax; sigmoid for ImageNet-21k), softmax
            otherwise; None for logits; or a Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        patch_size: side of a patch in pixels of the ResNet's features, or (height, width).
        width, depth, heads, mlp: width of the tokens, number of blocks, heads in each, hidden width of their MLPs.
        stages: number of units in each stage of the ResNet; the second stage and later ones halve the size. () leaves the root
            alone, which divides it by 4.
        width_factor: the root has 64 times as many channels, a multiple of 32.
        classifier: what the head reads: "token", "gap" (mean over all tokens, no class token), or every token: "unpooled" and
            "token_unpooled" (b, n, classes).
        representation_size: width of a tanh layer `pre_logits` before the head; None for none; "auto" as in the checkpoint.
        dropout_rate: after positions, attention and in MLPs. attention_dropout_rate: on attention weights.
        stochastic_depth_rate: probability of skipping a residual branch in the last block, growing linearly from 0.
        flash_attention: see `keras_vit.layers.Attention`.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    for argument, value, allowed in (("classifier", classifier, CLASSIFIERS), ("pooling", pooling, POOLINGS)):
        if value not in allowed:
            raise errors.ArgumentError(f"{name}: expected {argument} in {allowed}, got {value!r}.")
    class_token = classifier in ("token", "token_unpooled")
    if not include_top and pooling == "token" and not class_token:
        raise errors.ArgumentError(f"{name}: pooling='token' needs a class token, classifier={classifier!r} has none; use 'avg'.")
    channels = _channels(name, stages, width_factor)
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    stride = _stride(stages)
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)
    if representation_size == "auto":
        representation_size = (top.stored("pre_logits/kernel") or [None])[-1]

    size = vit.default_size(top, (patch[0] * stride, patch[1] * stride), class_token)
    x = top.images(size, lambda h, w: _check_size(name, (h, w), patch, stride))
    x = StdConv(channels, 7, 2, name="conv_root")(x)
    x = GroupNorm(GROUPS, name="gn_root")(x)
    x = keras.layers.Activation("relu", name="relu_root")(x)
    x = keras.layers.MaxPooling2D(3, 2, "same", "channels_last", name="pool_root")(x)
    for s, units in enumerate(stages, 1):
        for u in range(1, units + 1):
            x = ResNetUnit(channels * 2 ** (s - 1), 2 if s > 1 and u == 1 else 1, name=f"stage_{s}_unit_{u}")(x)
    x = Patches(width, patch, name="patches")(x)
    grid = x.shape[1:3]
    x = Tokens(class_token, name="tokens")(x)
    x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    for i in range(depth):
        drop_path_rate = stochastic_depth_rate * i / max(depth - 1, 1)
        x = Block(heads, mlp, dropout_rate, attention_dropout_rate, drop_path_rate, flash_attention, name=f"block_{i}")(x)
    x = keras.layers.LayerNormalization(epsilon=1e-6, name="encoder_norm")(x)

    reads = {"gap": "avg"}.get(classifier, classifier) if include_top else pooling
    if reads == "token":
        x = ClassToken(name="class_token")(x)
    elif not include_top and class_token and (pooling == "avg" or classifier == "token"):
        x = PatchTokens(name="patch_tokens")(x)
    if reads == "avg":
        x = MeanTokens(name="mean_tokens")(x)
    if not include_top and pooling is None and classifier != "token_unpooled":
        x = PatchGrid(grid, name="patch_grid")(x)
    if representation_size is not None and (include_top or pooling):
        x = keras.layers.Dense(representation_size, kernel_initializer="lecun_normal", name="pre_logits")(x)
        x = keras.layers.Activation("tanh", name="pre_logits_tanh")(x)
    return top.model(top.top(x) if include_top else x, name)


def _channels(name, stages, width_factor):
    """The root's channels."""
    if not isinstance(stages, (tuple, list)) or not all(isinstance(units, int) and units > 0 for units in stages):
        raise errors.ArgumentError(f"{name}: stages must be the units of each stage, such as (3, 4, 9), or (), got {stages!r}.")
    channels = int(64 * width_factor) if isinstance(width_factor, (int, float)) else 0
    if channels < GROUPS or channels % GROUPS:
        raise errors.ArgumentError(
            f"{name}: width_factor={width_factor!r} gives {channels} channels, expected a multiple of the {GROUPS} groups of its "
            "norms; use a multiple of 0.5."
        )
    return channels


def _stride(stages):
    """Pixels of the image for each feature: the root halves twice, and each stage after the first once."""
    return 4 * 2 ** max(len(stages) - 1, 0)


def _smallest(patch, stride):
    return tuple((p - 1) * stride + 1 for p in patch)


def _check_size(name, size, patch, stride):
    smallest = _smallest(patch, stride)
    if all(side >= least for side, least in zip(size, smallest)):
        return
    raise errors.ArgumentError(
        f"{name}: an image of {size[0]} x {size[1]} has no patch of {patch[0]} x {patch[1]} in features of 1 / {stride} its "
        f"size; the smallest is input_shape={(*smallest, 3)}."
    )


# How files keep the arrays of group norms: the older ones behind three axes of length 1, but each style is met with either
GROUP_NORMS = {
    "pre-linen": {"": Wrapped(3), "-flat-norms": Whole()},
    "linen": {"": Whole(), "-wrapped-norms": Wrapped(3)},
}


def resnet_names(norm):
    """The rules of root and units; `norm` is the transform of group-norm arrays."""
    unit, ours = "block{s}/unit{u}", "stage_{s}_unit_{u}"
    norms = [("gn_root", "gn_root"), *((f"{unit}/{gn}", f"{ours}/{gn}") for gn in ("gn1", "gn2", "gn3", "gn_proj"))]
    return [
        rule("conv_root/kernel", "conv_root/kernel"),
        *(rule(f"{unit}/{conv}/kernel", f"{ours}/{conv}/kernel") for conv in ("conv1", "conv2", "conv3", "conv_proj")),
        *(rule(f"{original}/scale", f"{mine}/gamma", norm) for original, mine in norms),
        *(rule(f"{original}/bias", f"{mine}/beta", norm) for original, mine in norms),
    ]


def layouts():
    """{layout: Names} of every spelling in which hybrids were released or are stored by training jobs."""
    found = {}
    for root in ("", "params/", "opt/target/"):
        for style, blocks in vit.STYLES_OF_BLOCKS.items():
            for wrapping, norm in GROUP_NORMS[style].items():
                names = Names(resnet_names(norm), vit.stem_names(vit.POSITION_NAMES[""]), vit.encoder_names(*blocks))
                found[f"{root}{style}{wrapping}"] = names.under(root, vit.ROOTS[root])
    return found


def _sizes(shapes):
    """The builder's arguments that a file's shapes, {our name: shape}, say."""
    (ph, pw, _, width), query = shapes["patches/kernel"], shapes["block_0/attention/qkv_kernel"]
    units = collections.Counter(ours.partition("_unit_")[0] for ours in shapes if ours.endswith("/conv1/kernel"))
    return dict(
        patch_size=ph if ph == pw else (ph, pw), width=width, depth=vit.depth(shapes), heads=query[1],
        mlp=shapes["block_0/mlp/fc1/kernel"][1], classifier="token" if "tokens/cls" in shapes else "gap",
        stages=tuple(units[f"stage_{s}"] for s in range(1, len(units) + 1)), width_factor=shapes["conv_root/kernel"][3] / 64,
    )  # fmt: skip


def _any_size(model):
    stages = {layer.name.split("_")[1] for layer in model.layers if isinstance(layer, ResNetUnit)}
    return _smallest(model.get_layer("patches").kernel_size, _stride(stages)), (1, 1)


def _pyramid(model):
    """Each stage's last unit; a root alone is no pyramid."""
    last = {}
    for layer in model.layers:
        if isinstance(layer, ResNetUnit):
            last[int(layer.name.split("_")[1]) + 1] = layer.name
    return last


FAMILY = Family(
    "Hybrid",
    layouts=layouts(),
    adapters=vit.adapters,
    grid=lambda model: model.get_layer("tokens").grid,
    sizes=_sizes,
    any_size=_any_size,
    pyramid=_pyramid,
)

# Stages: configs/models.py of the original, as is the dropout of R50+B/16 and R50+L/32; sizes of the transformer are ViT's.
# Parameter counts: models_test.py of the original
Hybrid_mu = variant(
    "Hybrid_mu", Hybrid, **vit.MU, patch_size=1, stages=(1, 1), width_factor=0.5, resolution=32, params=269_000, macs=5_798_656
)
R_ViT_Ti16 = variant(
    "R_ViT_Ti16", Hybrid, **vit.TI, patch_size=8, stages=(),
    params=6_337_704, macs=433_681_920, upstream=("R+ViT-Ti_16", "R_Ti_16"),
    weights=vit.augreg_files(
        "R+Ti/16", "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"
    ),
)  # fmt: skip
R26_ViT_S32 = variant(
    "R26_ViT_S32", Hybrid, **vit.S, patch_size=1, stages=(2, 2, 2, 2),
    params=36_431_912, macs=3_463_851_008, upstream=("R26+ViT-S_32", "R26_S_32"),
    weights=vit.augreg_files(
        "R26+S/32", "R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.03-res_224"
    ),
)  # fmt: skip
R26_ViT_B32 = variant(
    "R26_ViT_B32", Hybrid, **vit.B, patch_size=1, stages=(2, 2, 2, 2),
    params=101_383_976, macs=6_710_859_776, upstream=("R26+ViT-B_32",),
    weights=vit.imagenet21k("R26+ViT-B_32", 450.23),
)  # fmt: skip
R50_ViT_B16 = variant(
    "R50_ViT_B16", Hybrid, **vit.B, patch_size=1, stages=(3, 4, 9), dropout_rate=0.1, params=98_659_112, macs=21_535_358_976,
    upstream=("R50+ViT-B_16",),
    weights=vit.imagenet21k("R50+ViT-B_16", 439.85) | vit.imagenet2012("R50+ViT-B_16", 377.57),
)  # fmt: skip
R50_ViT_L32 = variant(
    "R50_ViT_L32", Hybrid, **vit.L, patch_size=1, stages=(3, 4, 6, 3), dropout_rate=0.1, params=328_994_856, macs=19_413_295_104,
    upstream=("R50+ViT-L_32", "R50_L_32"),
    weights=vit.imagenet21k("R50+ViT-L_32", 1.31 * 1024) | vit.augreg_files(
        "R50+L/32", "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224"
    ),
)  # fmt: skip
