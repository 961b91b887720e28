"""MLP-Mixer: "MLP-Mixer: An all-MLP Architecture for Vision" (arXiv 2105.01601).

Weights: google-research/vision_transformer (`gs://mixer_models`), among them those of SAM (arXiv 2106.01548) and GSAM
(2203.08065).
"""

import keras
from keras import ops

from keras_vit.checkpoints.adapt import PatchKernel, TokenCount
from keras_vit.checkpoints.dialects import flax
from keras_vit.checkpoints.names import Names
from keras_vit.checkpoints.weights import IMAGENET21K, google
from keras_vit.layers import MLP, DropPath, MeanTokens, Patches, PatchGrid
from keras_vit.layers.taps import check_tap
from keras_vit.models.vit import ROOTS, depth
from keras_vit.zoo import Contract, Family, builder, check_choices, tap, variant

POOLINGS = (None, "avg")
KERNEL = "block_0/token_mixing/fc1/kernel"  # by which a file says how many tokens it is for


@keras.saving.register_keras_serializable("keras_vit")
class MixerBlock(keras.layers.Layer):
    """(b, n, d) -> (b, n, d): mixes tokens in every channel, then channels in every token; both are pre-norm residual MLPs.

    What lies inside is tapped: `block(x, tap=...)` returns "token_norm", "token_mixing" (b, d, n), "channel_norm" or
    "channel_mixing" instead of the block's output, from the same code.

    Args:
        tokens_mlp, channels_mlp: widths of the hidden layers of the MLPs over the n tokens and over the d channels.
        dropout_rate: twice in each MLP.
        drop_path_rate: probability that an example skips a residual branch in training (stochastic depth).
    """

    TAPS = ("token_norm", "token_mixing", "channel_norm", "channel_mixing")

    def __init__(self, tokens_mlp, channels_mlp, dropout_rate=0.0, drop_path_rate=0.0, **kwargs):
        super().__init__(**kwargs)
        self.tokens_mlp, self.channels_mlp = tokens_mlp, channels_mlp
        self.dropout_rate, self.drop_path_rate = dropout_rate, drop_path_rate
        dtype = self.dtype_policy
        self.token_norm = keras.layers.LayerNormalization(epsilon=1e-6, dtype=dtype, name="token_norm")
        self.token_mixing = MLP(tokens_mlp, dropout_rate, dtype=dtype, name="token_mixing")
        self.channel_norm = keras.layers.LayerNormalization(epsilon=1e-6, dtype=dtype, name="channel_norm")
        self.channel_mixing = MLP(channels_mlp, dropout_rate, dtype=dtype, name="channel_mixing")
        self.drop_path = DropPath(drop_path_rate, dtype=dtype, name="drop_path")

    def build(self, input_shape):
        b, n, d = input_shape
        self.token_mixing.build((b, d, n))
        for layer in (self.token_norm, self.channel_norm, self.channel_mixing, self.drop_path):
            layer.build(input_shape)

    def call(self, x, tap=None):
        check_tap(self, tap)
        y = self.token_norm(x)
        if tap == "token_norm":
            return y
        y = self.token_mixing(ops.swapaxes(y, 1, 2))
        if tap == "token_mixing":
            return y
        x = x + self.drop_path(ops.swapaxes(y, 1, 2))
        y = self.channel_norm(x)
        if tap == "channel_norm":
            return y
        y = self.channel_mixing(y)
        if tap == "channel_mixing":
            return y
        return x + self.drop_path(y)

    def multiply_adds(self, input_shape):
        """Those of both MLPs for one example (b, n, d)."""
        b, n, d = input_shape
        return self.token_mixing.multiply_adds((b, d, n)) + self.channel_mixing.multiply_adds(input_shape)

    def compute_output_spec(self, x, tap=None):  # else Keras traces each block when a model is built
        check_tap(self, tap)
        b, n, d = x.shape
        return keras.KerasTensor((b, d, n) if tap == "token_mixing" else (b, n, d), dtype=self.compute_dtype)


@builder
def Mixer(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="auto",
    include_preprocessing=False,
    name="Mixer",
    *,
    patch_size,
    width,
    depth,
    tokens_mlp,
    channels_mlp,
    dropout_rate=0.0,
    stochastic_depth_rate=0.0,
):
    """Builds an MLP-Mixer as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    Its weights mix a fixed number of tokens, so that a checkpoint fits one number of patches only.

    Args:
        include_top: whether to end in the classifier (`head`, whose output are the logits, then the activation).
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file, or None for random weights.
            `"imagenet"` is the ImageNet-1k classifier, where there is one.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3); by default the checkpoint's, else 224. A side that is no multiple of the patch is
            padded with zeros on both ends, the odd one at the far end.
        pooling: without top: None gives the grid of tokens (b, h, w, width), "avg" their mean (b, width).
        classes: outputs of the classifier; None takes the checkpoint's, or 1,000. Another number than the checkpoint's starts
            from a head of zeros.
        classifier_activation: "auto" is the one the checkpoint was trained with while its head is kept (sigmoid, but softmax for
            "sam"), softmax otherwise; None for logits; or a Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        patch_size: side of a patch in pixels, or (height, width).
        width, depth: width of the tokens, number of blocks.
        tokens_mlp, channels_mlp: hidden widths of the MLPs that mix tokens and channels.
        dropout_rate: twice in each MLP.
        stochastic_depth_rate: probability of skipping a residual branch in the last block, growing linearly from 0.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    check_choices(name, pooling=(pooling, POOLINGS))
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)
    known = "square" if top.record and top.record.published else top.recorded_grid
    fixed = TokenCount(KERNEL, None, patch, known)

    def check(h, w):
        fixed.check(name, top.record, top.stored(KERNEL), _grid((h, w), patch))

    x = top.images(fixed.pixels(top.stored(KERNEL)) or (224, 224), check)
    padding = [_same(side, p) for side, p in zip(top.size, patch)]
    if any(map(any, padding)):
        x = keras.layers.ZeroPadding2D(padding, data_format="channels_last", name="padding")(x)
    x = Patches(width, patch, name="patches")(x)
    h, w = x.shape[1:3]
    x = keras.layers.Reshape((h * w, width), name="tokens")(x)
    for i in range(depth):
        drop_path_rate = stochastic_depth_rate * i / max(depth - 1, 1)
        x = MixerBlock(tokens_mlp, channels_mlp, dropout_rate, drop_path_rate, name=f"block_{i}")(x)
    x = keras.layers.LayerNormalization(epsilon=1e-6, name="encoder_norm")(x)
    if include_top or pooling:
        x = MeanTokens(name="mean_tokens")(x)
    else:
        x = PatchGrid((h, w), name="patch_grid")(x)
    return top.model(top.top(x) if include_top else x, name)


def _grid(size, patch):
    """(h, w) patches of an image of `size`, the last of each row and column filled up with padding."""
    return tuple(-(-side // p) for side, p in zip(size, patch))


def _same(side, p):
    """(before, after): the zeros that "SAME" padding puts on both ends of a side, as the original's convolution does."""
    missing = -side % p
    return missing // 2, missing - missing // 2


def _model_grid(model):
    return tuple(tap(model, "patches").shape[1:3])


def _adapters(model, *, grid, resize_patches):
    patch = model.get_layer("patches").kernel.shape[:2]
    return [TokenCount(KERNEL, _model_grid(model), patch, grid), *([PatchKernel(patch)] if resize_patches else [])]


def _layouts():
    """{layout: Names}: linen and pre-linen spell a Mixer alike, since it names its MLPs itself."""
    block = "MixerBlock_{i}"
    names = Names(
        flax.conv("stem", "patches"),
        flax.norm(f"{block}/LayerNorm_0", "block_{i}/token_norm"),
        flax.mlp(f"{block}/token_mixing", "block_{i}/token_mixing"),
        flax.norm(f"{block}/LayerNorm_1", "block_{i}/channel_norm"),
        flax.mlp(f"{block}/channel_mixing", "block_{i}/channel_mixing"),
        flax.norm("pre_head_layer_norm", "encoder_norm"),
        flax.dense("head", "head"),
    )
    return {f"{root}linen": names.under(root, ROOTS[root]) for root in ("", "params/", "opt/target/")}


def _sizes(shapes):
    (ph, pw, _, width), block = shapes["patches/kernel"], "block_0/{}/fc1/kernel".format
    return dict(
        patch_size=ph if ph == pw else (ph, pw), width=width, depth=depth(shapes),
        tokens_mlp=shapes[block("token_mixing")][1], channels_mlp=shapes[block("channel_mixing")][1],
    )  # fmt: skip


FAMILY = Family("Mixer", layouts=_layouts(), adapters=_adapters, grid=_model_grid, sizes=_sizes)

# Table 1
MU = dict(width=64, depth=2, tokens_mlp=32, channels_mlp=128)
S = dict(width=512, depth=8, tokens_mlp=256, channels_mlp=2048)
B = dict(width=768, depth=12, tokens_mlp=384, channels_mlp=3072)
L = dict(width=1024, depth=24, tokens_mlp=512, channels_mlp=4096)


def _released(file, **mib):
    """{tag: record}, of which the tag is the folder of the file.

    What the heads were trained with: big_vision trains Mixers (configs/mlp_mixer_i1k.py) and with GSAM
    (configs/proj/gsam/vit_i1k_gsam_no_aug.py) by a sigmoid, whatever the number of classes; nothing is published of SAM.
    """
    facts = {"imagenet21k": dict(classes=IMAGENET21K), "sam": dict(activation="softmax")}
    shared = dict(bucket="mixer_models", activation="sigmoid")
    return {tag: google(f"{tag}/{file}", size, **{**shared, **facts.get(tag, {})}) for tag, size in mib.items()}


# Parameter counts of B and L: models_test.py of the original; sizes of the files in MiB: the bucket
Mixer_mu = variant("Mixer_mu", Mixer, **MU, patch_size=8, resolution=32, params=113_288, macs=915_968)
Mixer_S8 = variant(
    "Mixer_S8", Mixer, **S, patch_size=8, params=20_646_504, macs=14_875_086_848, upstream=("Mixer-S_8",),
    weights=_released("Mixer-S_8", gsam=78.79),
)  # fmt: skip
Mixer_S16 = variant(
    "Mixer_S16", Mixer, **S, patch_size=16, params=18_528_264, macs=3_776_958_464, upstream=("Mixer-S_16",),
    weights=_released("Mixer-S_16", gsam=70.71),
)  # fmt: skip
Mixer_S32 = variant(
    "Mixer_S32", Mixer, **S, patch_size=32, params=19_104_624, macs=1_002_426_368, upstream=("Mixer-S_32",),
    weights=_released("Mixer-S_32", gsam=72.91),
)  # fmt: skip
Mixer_B16 = variant(
    "Mixer_B16", Mixer, **B, patch_size=16, params=59_880_472, macs=12_601_767_936, upstream=("Mixer-B_16",),
    weights=_released("Mixer-B_16", imagenet1k=228.47, imagenet21k=289.61, sam=228.47, gsam=228.47),
)  # fmt: skip
Mixer_B32 = variant(
    "Mixer_B32", Mixer, **B, patch_size=32, params=60_293_428, macs=3_237_722_112, upstream=("Mixer-B_32",),
    weights=_released("Mixer-B_32", sam=230.04, gsam=230.04),
)  # fmt: skip
Mixer_L16 = variant(
    "Mixer_L16", Mixer, **L, patch_size=16, params=208_196_168, macs=44_547_678_208, upstream=("Mixer-L_16",),
    weights=_released("Mixer-L_16", imagenet1k=794.29, imagenet21k=875.78),
)  # fmt: skip
