"""Compact Transformers: "Escaping the Big Data Paradigm with Compact Transformers" (CCT, CVT, ViT-Lite; arXiv 2104.05704).

Weights: SHI-Labs/Compact-Transformers, those of its README (https://shi-labs.com/projects/cct) and of examples/README.md (files
attached to GitHub, trained by the repository's first script).
"""

import collections
import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_vit import errors
from keras_vit.checkpoints.adapt import Positions, bilinear, resample_bilinear
from keras_vit.checkpoints.dialects import torch
from keras_vit.checkpoints.names import Names
from keras_vit.checkpoints.weights import Weights
from keras_vit.data.pixels import IMAGENET
from keras_vit.layers import Block, ClassToken, MeanTokens, Patches, PatchGrid, PatchTokens, Tokens
from keras_vit.layers.taps import check_tap
from keras_vit.models.vit import check_size, default_size, depth
from keras_vit.zoo import Contract, Family, builder, check_choices, variant

CLASSIFIERS = ("sequence", "token")
POOLINGS = (None, "sequence", "token", "avg")
POSITIONS = ("learned", "sine")
EPSILON = 1e-5  # of all norms: PyTorch's default
STDDEV = 0.02  # of kernels at the start; the original cuts the normal distribution off at 2, a hundred of them


@keras.saving.register_keras_serializable("keras_vit")
class ConvTokenizer(keras.layers.Layer):
    """(b, h, w, c) -> (b, h / 2s, w / 2s, d): convolution without bias, ReLU, the largest of each 3 x 3 at every second pixel.

    Sides are rounded up. Weights: `kernel` (kernel_size, kernel_size, c, d).

    Args:
        width: d, the number of output channels.
        kernel_size, stride: of the convolution; it pads the image by kernel_size // 2 zeros on all four sides.
    """

    def __init__(self, width, kernel_size, stride=1, **kwargs):
        super().__init__(**kwargs)
        self.width, self.kernel_size, self.stride = width, kernel_size, stride

    def build(self, input_shape):
        shape = (self.kernel_size, self.kernel_size, input_shape[-1], self.width)
        normal = keras.initializers.VarianceScaling(2.0, "fan_in", "untruncated_normal")  # Kaiming's, before a ReLU
        self.kernel = self.add_weight(shape=shape, initializer=normal, name="kernel")

    def call(self, x):
        x = ops.relu(ops.conv(self._padded(x, self.kernel_size // 2), self.kernel, self.stride, "valid", "channels_last"))
        return ops.max_pool(self._padded(x, 1), 3, 2, "valid", "channels_last")  # nothing is below the zeros after a ReLU

    @staticmethod
    def _padded(x, zeros):
        return ops.pad(x, ((0, 0), (zeros, zeros), (zeros, zeros), (0, 0)))

    def _convolved(self, side):
        return side and (side + 2 * (self.kernel_size // 2) - self.kernel_size) // self.stride + 1

    def multiply_adds(self, input_shape):
        """ "conv" of one example (b, h, w, c)."""
        return collections.Counter(conv=math.prod(map(self._convolved, input_shape[1:3])) * math.prod(self.kernel.shape))

    def compute_output_shape(self, input_shape):
        b, *sides, _ = input_shape
        return (b, *(side and (self._convolved(side) + 1) // 2 for side in sides), self.width)


def sine(n, d, xp=np):
    """(1, n, d) float64: fixed positions of a sequence, sines in even and cosines in odd columns (arXiv 1706.03762, section 3.5).

    Args:
        xp: numpy, or `keras.ops` for an n that is a tensor.
    """
    columns = np.arange(d)
    angles = xp.arange(n, dtype="float64")[:, None] * 10_000.0 ** -(2 * (columns // 2) / d)
    return xp.where(columns % 2 == 0, xp.sin(angles), xp.cos(angles))[None]


@keras.saving.register_keras_serializable("keras_vit")
class CompactTokens(Tokens):
    """(b, h, w, d) -> (b, n, d): `Tokens` whose positions are resampled linearly between the centres of pixels.

    Fixed positions, "sine", are a weight that is not trained, since files have them; on another grid they are computed anew.

    Args:
        class_token: see `Tokens`; it has a position, the first.
        positions: "learned", or "sine" for the fixed ones of `sine`.
    """

    def __init__(self, class_token=False, positions="learned", **kwargs):
        super().__init__(class_token, True, positions, 0.2, **kwargs)

    def get_config(self):
        base = keras.layers.Layer.get_config(self)
        return {**base, "class_token": self.class_token, "positions": self.kind}

    def first_positions(self, shape, dtype=None):
        return ops.cast(sine(*shape[1:]), dtype) if self.kind == "sine" else super().first_positions(shape, dtype)

    def positions_at(self, grid):
        if self.kind == "learned" or (all(isinstance(side, int) for side in grid) and tuple(grid) == self.grid):
            return super().positions_at(grid)
        return ops.cast(sine(grid[0] * grid[1] + self.before, self.positions.shape[-1], ops), "float32")

    @staticmethod
    def line(old, new):
        return bilinear(old, new, np if isinstance(new, int) else ops)


@keras.saving.register_keras_serializable("keras_vit")
class CompactBlock(Block):
    """(b, n, d) -> (b, n, d): `y = norm(x + attention(norm(x)))`, then `y + mlp(y)`: its second norm is on the residual stream.

    Taps: those of `Block`.

    Args:
        heads, mlp, dropout_rate, attention_dropout_rate, drop_path_rate, flash_attention: see `Block`.
    """

    RENORMED = True

    def __init__(
        self,
        heads,
        mlp,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        drop_path_rate=0.0,
        flash_attention=None,
        **kwargs,
    ):
        rates = (dropout_rate, attention_dropout_rate, drop_path_rate)
        super().__init__(heads, mlp, *rates, flash_attention, "exact", None, STDDEV, "", EPSILON, **kwargs)


@keras.saving.register_keras_serializable("keras_vit")
class SequencePool(keras.layers.Layer):
    """(b, n, d) -> (b, d): the mean over the tokens, weighted by how much a learned map makes of each; softmax in float32.

    `SequencePool()(x, tap=...)` gives "importance" (b, n, 1), what the map makes of the tokens, or "scores" (b, n, 1), its
    softmax over them, instead. Weights: `kernel` (d, 1), `bias` (1,).
    """

    TAPS = ("importance", "scores")

    def build(self, input_shape):
        normal = keras.initializers.RandomNormal(stddev=STDDEV)
        self.kernel = self.add_weight(shape=(input_shape[-1], 1), initializer=normal, name="kernel")
        self.bias = self.add_weight(shape=(1,), initializer="zeros", name="bias")

    def call(self, x, tap=None):
        check_tap(self, tap)
        importance = ops.cast(ops.matmul(x, self.kernel) + self.bias, "float32")
        if tap == "importance":
            return importance
        scores = ops.softmax(importance, axis=1)
        if tap == "scores":
            return scores
        return ops.matmul(ops.transpose(ops.cast(scores, x.dtype), (0, 2, 1)), x)[:, 0]

    def multiply_adds(self, input_shape):
        """Of one example (b, n, d): "linear" of the map, "matmul" of the weighted sum."""
        _, n, d = input_shape
        return collections.Counter(linear=n * d, matmul=n * d)

    def compute_output_spec(self, x, tap=None):
        check_tap(self, tap)
        b, n, d = x.shape
        return keras.KerasTensor((b, n, 1), dtype="float32") if tap else keras.KerasTensor((b, d), dtype=self.compute_dtype)


@builder
def CCT(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="auto",
    include_preprocessing=False,
    name="CCT",
    *,
    width,
    depth,
    heads,
    mlp,
    kernel_size=None,
    conv_layers=None,
    patch_size=None,
    classifier="sequence",
    positions="learned",
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0,
    flash_attention=None,
):
    """Builds a Compact Transformer as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    CCT makes its tokens by convolutions (`kernel_size`, `conv_layers`), CVT and ViT-Lite by cutting patches (`patch_size`); CCT
    and CVT pool the sequence, ViT-Lite has a class token (`classifier`).

    Args:
        include_top: whether to end in the classifier (`head`, whose output are the logits, then the activation).
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file, or None for random weights. `"imagenet"` is
            the ImageNet-1k classifier nearest to the resolution asked for, where there is one.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), multiples of the patch, or any size where convolutions make the tokens; by default the
            checkpoint's own resolution, else 224.
        pooling: without top: None gives the grid of tokens (b, h, w, width); "sequence" their weighted mean of
            classifier="sequence", "token" the class token of classifier="token", "avg" the mean of the tokens, (b, width).
        classes: outputs of the classifier; None takes the checkpoint's, or 1,000. Another number than the checkpoint's starts
            from a head of zeros.
        classifier_activation: "auto" is softmax; None for logits; or a Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        width, depth, heads, mlp: width of the tokens, number of blocks, heads in each, hidden width of their MLPs.
        kernel_size, conv_layers: side of the convolutions that make the tokens, and how many there are, each with ReLU and
            pooling behind it; all but the last have 64 channels.
        patch_size: side of the patches in pixels, which then make the tokens without convolutions.
        classifier: what the head reads: "sequence", a learned weighted mean of the tokens, or "token", the class token.
        positions: "learned", or the fixed "sine".
        dropout_rate: after positions, attention and in MLPs. attention_dropout_rate: on attention weights.
        stochastic_depth_rate: probability of skipping a residual branch in the last block, growing linearly from 0.
        flash_attention: see `keras_vit.layers.Attention`.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    check_choices(name, classifier=(classifier, CLASSIFIERS), pooling=(pooling, POOLINGS), positions=(positions, POSITIONS))
    if patch_size is None and not (kernel_size and conv_layers):
        raise errors.ArgumentError(
            f"{name}: expected kernel_size and conv_layers (CCT), or patch_size (CVT, ViT-Lite), got "
            f"kernel_size={kernel_size!r}, conv_layers={conv_layers!r}, patch_size=None."
        )
    class_token = classifier == "token"
    if not include_top and pooling in CLASSIFIERS and pooling != classifier:
        raise errors.ArgumentError(f"{name}: pooling={pooling!r} needs what classifier={classifier!r} has not; use 'avg'.")
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)
    stride = max(1, kernel_size // 2 - 1) if patch_size is None else None
    pixels = patch_size or (2 * stride) ** conv_layers  # to a side of what becomes a token

    def check(h, w):
        if patch_size:
            check_size(name, (h, w), (patch_size, patch_size))

    x = top.images(default_size(top, (pixels, pixels), class_token), check)
    if patch_size:
        x = Patches(width, patch_size, name="tokenizer_0")(x)
    else:
        for i in range(conv_layers):
            x = ConvTokenizer(width if i == conv_layers - 1 else 64, kernel_size, stride, name=f"tokenizer_{i}")(x)
    grid = x.shape[1:3]
    x = CompactTokens(class_token, positions, name="tokens")(x)
    x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    for i in range(depth):
        drop_path_rate = stochastic_depth_rate * i / max(depth - 1, 1)
        x = CompactBlock(heads, mlp, dropout_rate, attention_dropout_rate, drop_path_rate, flash_attention, name=f"block_{i}")(x)
    x = keras.layers.LayerNormalization(epsilon=EPSILON, name="encoder_norm")(x)

    reads = classifier if include_top else pooling
    if reads == "token":
        x = ClassToken(name="class_token")(x)
    elif class_token:
        x = PatchTokens(name="patch_tokens")(x)
    if reads == "sequence":
        x = SequencePool(name="sequence_pool")(x)
    if reads == "avg":
        x = MeanTokens(name="mean_tokens")(x)
    if reads is None:
        x = PatchGrid(grid, name="patch_grid")(x)
    return top.model(top.top(x) if include_top else x, name)


class SinePositions:
    """Replaces fixed positions of a file for another grid by the model's own, as the original's `_cct` does.

    Args:
        rows: of the model's table.
    """

    TABLE = "tokens/positions"
    names = (TABLE,)

    def __init__(self, rows):
        self.rows = rows

    def plan(self, shapes):
        shape = shapes[self.TABLE]
        if len(shape) != 3 or shape[1] == self.rows:
            return shapes, None
        does = f"{self.TABLE}: sines of {self.rows} positions instead of the file's {shape[1]}"
        return {self.TABLE: (shape[0], self.rows, shape[2])}, does

    def __call__(self, arrays):
        return {self.TABLE: sine(self.rows, arrays[self.TABLE].shape[-1]).astype(np.float32)}


def _adapters(model, *, grid, resize_patches):
    tokens = model.get_layer("tokens")
    if tokens.kind == "sine":
        return [SinePositions(tokens.positions.shape[1])]
    return [Positions(tokens.grid, tokens.class_token, file_grid=grid, resample=resample_bilinear)]


def _names():
    block = "classifier.blocks.{i}"
    return Names(
        torch.conv("tokenizer.conv_layers.{i}.0", "tokenizer_{i}"),
        torch.param("classifier.class_emb", "tokens/cls"),
        torch.param("classifier.positional_emb", "tokens/positions"),
        torch.norm(f"{block}.pre_norm", "block_{i}/attention_norm"),
        torch.attention(f"{block}.self_attn", "block_{i}/attention", bias=False),
        torch.norm(f"{block}.norm1", "block_{i}/mlp_norm"),
        torch.linear(f"{block}.linear1", "block_{i}/mlp/fc1"),
        torch.linear(f"{block}.linear2", "block_{i}/mlp/fc2"),
        torch.norm("classifier.norm", "encoder_norm"),
        torch.linear("classifier.attention_pool", "sequence_pool"),
        torch.linear("classifier.fc", "head"),
    )


def _sizes(shapes):
    kernel = shapes["tokenizer_0/kernel"]
    stages = sum(name.startswith("tokenizer_") and name.endswith("/kernel") for name in shapes)
    if "tokenizer_0/bias" in shapes:
        tokenizer = dict(patch_size=kernel[0], kernel_size=None, conv_layers=None)
    else:
        tokenizer = dict(patch_size=None, kernel_size=kernel[0], conv_layers=stages)
    return dict(
        width=shapes["encoder_norm/gamma"][0], depth=depth(shapes), mlp=shapes["block_0/mlp/fc1/kernel"][1],
        classifier="token" if "tokens/cls" in shapes else "sequence", **tokenizer,
    )  # fmt: skip


def _any_size(model):
    tokenizer = model.get_layer("tokenizer_0")
    step = tokenizer.kernel_size if isinstance(tokenizer, Patches) else (1, 1)
    return step, step


def _pixels(mean, std):
    """Of configs/datasets/*.yml of the original: numbers on the 0..1 scale, no more cut off than the aspect ratio asks for."""
    mean, std = ([255 * number for number in numbers] for numbers in (mean, std))
    return dataclasses.replace(IMAGENET, mean=mean, std=std, crop_fraction=1.0)


LICENCE = "Apache-2.0, as its repository SHI-Labs/Compact-Transformers states"
CLASSES = {"cifar10": 10, "cifar100": 100, "flowers102": 102, "imagenet": 1000}
PIXELS = {
    "cifar10": _pixels((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _pixels((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "flowers102": _pixels((0.4353, 0.3773, 0.2872), (0.2966, 0.2455, 0.2698)),
    "imagenet": dataclasses.replace(IMAGENET, crop_fraction=0.9),
}
FAMILY = Family(
    "CCT",
    layouts=torch.spellings(_names()),
    adapters=_adapters,
    grid=lambda model: model.get_layer("tokens").grid,
    sizes=_sizes,
    any_size=_any_size,
    pixels=PIXELS["imagenet"],
)

# Sizes and rates: the functions `cct_2` to `cct_14` of the original's src/cct.py, and its constructors' defaults
RATES = dict(attention_dropout_rate=0.1, stochastic_depth_rate=0.1)
MU = dict(width=48, depth=2, heads=2, mlp=96)
SIZE_2 = dict(width=128, depth=2, heads=2, mlp=128, **RATES)
SIZE_4 = dict(width=128, depth=4, heads=2, mlp=128, **RATES)
SIZE_6 = dict(width=256, depth=6, heads=4, mlp=512, **RATES)
SIZE_7 = dict(width=256, depth=7, heads=4, mlp=512, **RATES)
SIZE_14 = dict(width=384, depth=14, heads=6, mlp=1152, **RATES)
CONV_3X1 = dict(kernel_size=3, conv_layers=1)
CONV_3X2 = dict(kernel_size=3, conv_layers=2)
CONV_7X2 = dict(kernel_size=7, conv_layers=2)
CVT_4 = dict(patch_size=4, classifier="sequence")
VIT_4 = dict(patch_size=4, classifier="token")


def _record(source, data, resolution, tuned=False, **pixels):
    pixels = dataclasses.replace(PIXELS[data], **pixels)
    return Weights(source, CLASSES[data], "softmax", resolution, tuned, pixels=pixels, licence=LICENCE)


def _site(path, data, resolution=32, tuned=False):
    return _record(f"https://shi-labs.com/projects/cct/checkpoints/{path}.pth", data, resolution, tuned=tuned)


def _attached(epochs, **files):
    """{tag: record} of the first script's classifiers (examples/main.py), by data: number and name of the attachment."""
    where = "https://github.com/SHI-Labs/Compact-Transformers/files"
    return {data + epochs: _record(f"{where}/{file}.pth.zip", data, 32, resize="bilinear") for data, file in files.items()}


# A tag without a number of epochs is the longest training
CCT_mu = variant("CCT_mu", CCT, **MU, **CONV_3X2, resolution=32, params=119_225, macs=12_047_232)
CCT_2_3x2 = variant(
    "CCT_2_3x2", CCT, **SIZE_2, **CONV_3X2, resolution=32, params=411_433, macs=35_468_288, upstream=("cct_2_3x2_32",),
    weights=_attached("", cifar10="6666059/cct2-3x2_cifar10", cifar100="6666060/cct2-3x2_cifar100"),
)  # fmt: skip
CCT_4_3x2 = variant(
    "CCT_4_3x2", CCT, **SIZE_4, **CONV_3X2, resolution=32, params=609_833, macs=50_148_352, upstream=("cct_4_3x2_32",),
    weights=_attached("", cifar10="6666061/cct4-3x2_cifar10", cifar100="6666066/cct4-3x2_cifar100"),
)  # fmt: skip
CCT_6_3x1 = variant(
    "CCT_6_3x1", CCT, **SIZE_6, **CONV_3X1, resolution=32, params=3_488_233, macs=1_014_097_920, upstream=("cct_6_3x1_32",),
    weights=_attached("", cifar10="6730781/cct6-3x1_cifar10_500", cifar100="6730783/cct6-3x1_cifar100_500")
    | _attached("-200ep", cifar10="6657185/cct6-3x1_cifar10_best", cifar100="6657221/cct6-3x1_cifar100_best"),
)  # fmt: skip
CCT_6_3x2 = variant(
    "CCT_6_3x2", CCT, **SIZE_6, **CONV_3X2, resolution=32, params=3_581_353, macs=253_716_480, upstream=("cct_6_3x2_32",),
    weights=_attached("", cifar10="6658604/cct6-3x2_cifar10_best", cifar100="6658605/cct6-3x2_cifar100_best"),
)  # fmt: skip
CCT_7_3x1 = variant(
    "CCT_7_3x1", CCT, **SIZE_7, **CONV_3X1, resolution=32, params=4_014_569, macs=1_181_870_080,
    upstream={"cct_7_3x1_32": "cifar10", "cct_7_3x1_32_c100": "cifar100"},
    weights={data: _site(f"pretrained/cct_7_3x1_32_{data}_300epochs", data) for data in ("cifar10", "cifar100")}
    | _attached("-200ep", cifar10="6644400/cct7-3x1_cifar10_best", cifar100="6657226/cct7-3x1_cifar100_best"),
)  # fmt: skip
CCT_7_3x1_sine = variant(
    "CCT_7_3x1_sine", CCT, **SIZE_7, **CONV_3X1, positions="sine", resolution=32, params=4_014_569, macs=1_181_870_080,
    upstream={"cct_7_3x1_32_sine": "cifar10", "cct_7_3x1_32_sine_c100": "cifar100"},
    weights={
        data + tag: _site(f"pretrained/cct_7_3x1_32_sine_{data}_{epochs}epochs", data)
        for tag, epochs in {"": 5000, "-1500ep": 1500}.items() for data in ("cifar10", "cifar100")
    },
)  # fmt: skip
CCT_7_3x2 = variant(
    "CCT_7_3x2", CCT, **SIZE_7, **CONV_3X2, resolution=32, params=4_107_689, macs=289_368_064, upstream=("cct_7_3x2_32",),
    weights=_attached("", cifar10="6657152/cct7-3x2_cifar10_best", cifar100="6657154/cct7-3x2_cifar100_best"),
)  # fmt: skip
CCT_7_7x2 = variant("CCT_7_7x2", CCT, **SIZE_7, **CONV_7X2, params=4_804_521, macs=1_604_784_128, upstream=("cct_7_7x2_224",))
CCT_7_7x2_sine = variant(
    "CCT_7_7x2_sine", CCT, **SIZE_7, **CONV_7X2, positions="sine", params=4_804_521, macs=1_604_784_128,
    upstream={"cct_7_7x2_224_sine": "flowers102"},
    weights={"flowers102": _site("pretrained/cct_7_7x2_224_flowers102", "flowers102", 224)},
)  # fmt: skip
CCT_14_7x2 = variant(
    "CCT_14_7x2", CCT, **SIZE_14, **CONV_7X2, params=22_367_273, macs=5_521_901_568,
    upstream={
        "cct_14_7x2_224": "imagenet1k-224", "cct_14_7x2_384": "imagenet1k-384", "cct_14_7x2_384_fl": "imagenet1k+flowers102",
    },
    weights={
        "imagenet1k-224": _site("pretrained/cct_14_7x2_224_imagenet", "imagenet", 224),
        "imagenet1k-384": _site("finetuned/cct_14_7x2_384_imagenet", "imagenet", 384, tuned=True),
        "imagenet1k+flowers102": _site("finetuned/cct_14_7x2_384_flowers102", "flowers102", 384, tuned=True),
    },
)  # fmt: skip
CVT_6_4 = variant(
    "CVT_6_4", CCT, **SIZE_6, **CVT_4, resolution=32, params=3_444_713, macs=214_984_704, upstream=("cvt_6_4_32",),
    weights=_attached("", cifar10="6666075/cvt6-4_cifar10", cifar100="6666076/cvt6-4_cifar100"),
)  # fmt: skip
CVT_7_4 = variant(
    "CVT_7_4", CCT, **SIZE_7, **CVT_4, resolution=32, params=3_971_049, macs=250_636_288, upstream=("cvt_7_4_32",),
    weights=_attached("", cifar10="6666077/cvt7-4_cifar10", cifar100="6666078/cvt7-4_cifar100"),
)  # fmt: skip
ViTLite_6_4 = variant(
    "ViTLite_6_4", CCT, **SIZE_6, **VIT_4, resolution=32, params=3_444_968, macs=218_493_952, upstream=("vit_6_4_32",),
    weights=_attached("", cifar10="6666085/vitlite6-4_cifar10", cifar100="6666086/vitlite6-4_cifar100"),
)  # fmt: skip
ViTLite_7_4 = variant(
    "ViTLite_7_4", CCT, **SIZE_7, **VIT_4, resolution=32, params=3_971_304, macs=254_735_872, upstream=("vit_7_4_32",),
    weights=_attached("", cifar10="6666087/vitlite7-4_cifar10", cifar100="6666088/vitlite7-4_cifar100"),
)  # fmt: skip
