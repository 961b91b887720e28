"""PoolFormer: "MetaFormer Is Actually What You Need for Vision" (arXiv 2111.11418), and the ablations of its section 4.4.

Weights: sail-sg/poolformer, release v1.0.
"""

import collections
import dataclasses
import math
import re

import keras
from keras import ops

from keras_vit import errors
from keras_vit.checkpoints.dialects import torch
from keras_vit.checkpoints.names import Names, rule
from keras_vit.checkpoints.transforms import Turned
from keras_vit.checkpoints.weights import Weights
from keras_vit.data.pixels import IMAGENET
from keras_vit.layers import MLP, Attention, DropPath, GroupNorm, LayerScale, MeanTokens
from keras_vit.layers.taps import check_tap
from keras_vit.zoo import Contract, Family, builder, variant

POOLINGS = (None, "avg")
MIXERS = ("pool", "identity", "attention", "dense", "random")
NORMS = ("group", "channel")
STAGES = 4
SMALLEST = 3  # side of an image
STDDEV = 0.02  # of the numbers that kernels start from
FIXED = ("dense", "random")  # mixers whose weights are for one number of places


@keras.saving.register_keras_serializable("keras_vit")
class PoolMixer(keras.layers.Layer):
    """(b, h, w, d) -> (b, h, w, d): the mean of each place's neighbours minus the place itself; no weights.

    Args:
        pool_size: side of the window, odd; what of it lies outside of the image does not count.
    """

    def __init__(self, pool_size=3, **kwargs):
        super().__init__(**kwargs)
        self.pool_size = pool_size

    def call(self, x):
        return ops.average_pool(x, self.pool_size, 1, "same", "channels_last") - x

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_vit")
class AttentionMixer(keras.layers.Layer):
    """(b, h, w, d) -> (b, h, w, d): self-attention of all places, without biases of query, key and value.

    Args:
        head_size: width of a head; must divide d.
        flash_attention: see `keras_vit.layers.Attention`.
    """

    def __init__(self, head_size=32, flash_attention=None, **kwargs):
        super().__init__(**kwargs)
        self.head_size, self.flash_attention = head_size, flash_attention

    def build(self, input_shape):
        width = input_shape[-1]
        if width % self.head_size:
            raise ValueError(f"AttentionMixer {self.name!r}: {width} channels are no multiple of head_size={self.head_size}.")
        heads = width // self.head_size
        self.attention = Attention(heads, 0.0, self.flash_attention, "", STDDEV, dtype=self.dtype_policy, name="attention")
        self.attention.build((None, None, width))

    @property
    def heads(self):
        return self.attention.heads

    def call(self, x, tap=None):
        """Returns (b, h, w, d), or the attention weights (b, heads, h * w, h * w) with tap="scores"."""
        _, h, w, d = ops.shape(x)
        y = self.attention(ops.reshape(x, (-1, h * w, d)), tap=tap)
        return y if tap else ops.reshape(y, (-1, h, w, d))

    def multiply_adds(self, input_shape):
        """Those of attention for one example (b, h, w, d)."""
        return self.attention.multiply_adds(_as_tokens(input_shape))

    def compute_output_spec(self, x, tap=None):
        tokens = keras.KerasTensor(_as_tokens(x.shape), dtype=x.dtype)
        return self.attention.compute_output_spec(tokens, tap=tap) if tap else keras.KerasTensor(x.shape, self.compute_dtype)


@keras.saving.register_keras_serializable("keras_vit")
class DenseMixer(keras.layers.Layer):
    """(b, h, w, d) -> (b, h, w, d): one matrix (h * w, h * w), the same for all channels, mixes the places.

    The sum over the places is taken in float32 whatever the compute type. Weight: `kernel`, whose first axis is what goes in.

    Args:
        frozen: whether the matrix is random and not trained. Its numbers are then uniform ones through a softmax, as of
            RandFormer (arXiv 2210.13452, section 2.2).
    """

    def __init__(self, frozen=False, **kwargs):
        super().__init__(**kwargs)
        self.frozen = frozen

    def build(self, input_shape):
        tokens = math.prod(input_shape[1:3])
        values = _random_mixing if self.frozen else keras.initializers.RandomNormal(stddev=STDDEV)
        self.kernel = self.add_weight(
            shape=(tokens, tokens), initializer=values, trainable=not self.frozen, autocast=False, name="kernel"
        )

    def call(self, x):
        _, h, w, d = x.shape
        y = ops.matmul(ops.transpose(self.kernel), ops.cast(ops.reshape(x, (-1, h * w, d)), "float32"))
        return ops.cast(ops.reshape(y, (-1, h, w, d)), self.compute_dtype)

    def multiply_adds(self, input_shape):
        """ "linear" of one example (b, h, w, d)."""
        return collections.Counter(linear=math.prod(input_shape[1:3]) ** 2 * input_shape[3])

    def compute_output_shape(self, input_shape):
        return input_shape


def _random_mixing(shape, dtype=None):
    """(n, n): what every place takes of all places, random shares that add up to 1."""
    return ops.softmax(keras.random.uniform(shape, dtype=dtype), axis=0)


def _as_tokens(shape):
    b, h, w, d = shape
    return b, None if None in (h, w) else h * w, d


@keras.saving.register_keras_serializable("keras_vit")
class PointwiseMLP(MLP):
    """(b, h, w, d) -> (b, h, w, d): an `MLP` whose layers the original has, and counts, as convolutions with kernels of 1 x 1."""

    def multiply_adds(self, input_shape):
        """ "conv" of both layers for one example (b, h, w, d)."""
        return collections.Counter(conv=2 * math.prod(input_shape[1:]) * self.hidden)


@keras.saving.register_keras_serializable("keras_vit")
class GridPositions(keras.layers.Layer):
    """(b, h, w, d) -> (b, h, w, d): adds a learned vector to each place. Weight: `positions` (1, h, w, d)."""

    def build(self, input_shape):
        self.positions = self.add_weight(shape=(1, *input_shape[1:]), initializer="zeros", name="positions")

    def call(self, x):
        return x + self.positions

    def compute_output_shape(self, input_shape):
        return input_shape


def _norm(kind, **options):
    """A norm over the whole image ("group", of one group) or over each place's channels ("channel")."""
    if kind == "group":
        return GroupNorm(1, 1e-5, **options)
    return keras.layers.LayerNormalization(epsilon=1e-5, **options)


@keras.saving.register_keras_serializable("keras_vit")
class MetaFormerBlock(keras.layers.Layer):
    """(b, h, w, d) -> (b, h, w, d): mixes places, `x + mixer(norm(x))`, then channels, `x + mlp(norm(x))`.

    What lies inside is tapped: `block(x, tap=...)` returns "mixer_norm", "mixer", "mlp_norm" or "mlp" instead of the block's
    output, from the same code; with attention also "scores" (b, heads, h * w, h * w).

    Args:
        mlp: width of the hidden layer of the MLP.
        mixer: "pool", "identity", "attention", "dense" (a learned matrix) or "random" (one that is not trained).
        norm: "group" (over the whole image) or "channel".
        dropout_rate: twice in the MLP.
        drop_path_rate: probability that an example skips a residual branch in training (stochastic depth).
        layer_scale: start of the numbers that scale what both branches add (see `LayerScale`); None for none.
        pool_size: of `PoolMixer`. head_size, flash_attention: of `AttentionMixer`.
    """

    def __init__(
        self,
        mlp,
        mixer="pool",
        norm="group",
        dropout_rate=0.0,
        drop_path_rate=0.0,
        layer_scale=1e-5,
        pool_size=3,
        head_size=32,
        flash_attention=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.mlp_width, self.kind, self.norm, self.layer_scale = mlp, mixer, norm, layer_scale
        self.dropout_rate, self.drop_path_rate = dropout_rate, drop_path_rate
        self.pool_size, self.head_size, self.flash_attention = pool_size, head_size, flash_attention
        self.TAPS = ("mixer_norm", *(["scores"] if mixer == "attention" else []), "mixer", "mlp_norm", "mlp")
        dtype = self.dtype_policy
        mixers = {
            "pool": lambda **options: PoolMixer(pool_size, **options),
            "identity": keras.layers.Identity,
            "attention": lambda **options: AttentionMixer(head_size, flash_attention, **options),
            "dense": DenseMixer,
            "random": lambda **options: DenseMixer(frozen=True, **options),
        }
        self.mixer_norm = _norm(norm, dtype=dtype, name="mixer_norm")
        self.mixer = mixers[mixer](dtype=dtype, name="mixer")
        self.mlp_norm = _norm(norm, dtype=dtype, name="mlp_norm")
        self.mlp = PointwiseMLP(mlp, dropout_rate, "exact", STDDEV, dtype=dtype, name="mlp")
        self.drop_path = DropPath(drop_path_rate, dtype=dtype, name="drop_path")
        self.scales = []
        if layer_scale is not None:
            self.scales = [LayerScale(layer_scale, dtype=dtype, name=f"{branch}_scale") for branch in ("mixer", "mlp")]

    def build(self, input_shape):
        for layer in (self.mixer_norm, self.mixer, self.mlp_norm, self.mlp, self.drop_path, *self.scales):
            layer.build(input_shape)

    @property
    def heads(self):
        return self.mixer.heads

    def call(self, x, tap=None):
        check_tap(self, tap)
        y = self.mixer_norm(x)
        if tap == "mixer_norm":
            return y
        if tap == "scores":
            return self.mixer(y, tap="scores")
        y = self.mixer(y)
        if tap == "mixer":
            return y
        x = x + self.drop_path(self._scaled(0, y))
        y = self.mlp_norm(x)
        if tap == "mlp_norm":
            return y
        y = self.mlp(y)
        if tap == "mlp":
            return y
        return x + self.drop_path(self._scaled(1, y))

    def _scaled(self, branch, y):
        return self.scales[branch](y) if self.scales else y

    def multiply_adds(self, input_shape):
        """Those of mixer and MLP for one example (b, h, w, d)."""
        own = getattr(self.mixer, "multiply_adds", None)
        return self.mlp.multiply_adds(input_shape) + (own(input_shape) if own else collections.Counter())

    def get_config(self):
        kept = ("norm", "dropout_rate", "drop_path_rate", "layer_scale", "pool_size", "head_size", "flash_attention")
        config = {"mlp": self.mlp_width, "mixer": self.kind, **{name: getattr(self, name) for name in kept}}
        return {**super().get_config(), **config}

    def compute_output_spec(self, x, tap=None):
        check_tap(self, tap)
        if tap == "scores":
            return self.mixer.compute_output_spec(x, tap=tap)
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)


@builder
def PoolFormer(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="auto",
    include_preprocessing=False,
    name="PoolFormer",
    *,
    width,
    depth,
    mlp,
    mixer="pool",
    norm="group",
    positions=(),
    pyramid=False,
    layer_scale=1e-5,
    pool_size=3,
    head_size=32,
    dropout_rate=0.0,
    stochastic_depth_rate=0.0,
    flash_attention=None,
):
    """Builds a PoolFormer or another MetaFormer as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    What its four stages give, 1/4, 1/8, 1/16 and 1/32 of the image's size, is tapped as the output of their last block, such as
    `stage_0_block_1`. A block's mixing of places is tapped as `stage_0_block_1/mixer`.

    Args:
        include_top: whether to end in the classifier (`head`, whose output are the logits, then the activation).
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file, or None for random weights. `"imagenet"` is
            the ImageNet-1k classifier.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3) of any size from 3 pixels on; by default the checkpoint's, else 224. Positions and the mixers
            "dense" and "random" tie the weights to the size they were made for.
        pooling: without top: None gives the grid (b, h, w, width), "avg" its mean (b, width).
        classes: outputs of the classifier; None takes the checkpoint's, or 1,000. Another number than the checkpoint's starts
            from a head of zeros.
        classifier_activation: "auto" is softmax; None for logits; or a Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        width, depth, mlp: of each of the four stages: channels, number of blocks, hidden width of their MLPs.
        mixer: how places are mixed, in all stages or in each: "pool" (mean of the neighbours), "identity", "attention", "dense"
            (a learned matrix) or "random" (one that is not trained).
        norm: "group" (over the whole image) or "channel" (over the channels of each place).
        positions: the stages, of 0 to 3, that begin with learned positions.
        pyramid: without top: whether to give all stages, {"P2": (b, h, w, width[0]), ... "P5"}, each through a norm of its own,
            as the authors' backbones of detectors do. Their classifiers lack these norms: `keras_vit.dense.pyramid` adds some.
        layer_scale: start of the numbers that scale what residual branches add; None for none.
        pool_size: side of the window of the mixer "pool", odd.
        head_size: width of a head of attention.
        dropout_rate: twice in each MLP.
        stochastic_depth_rate: probability of skipping a residual branch in the last block, growing linearly from 0.
        flash_attention: see `keras_vit.layers.Attention`.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    mixers = [mixer] * STAGES if isinstance(mixer, str) else list(mixer)
    _check(name, include_top, pooling, pyramid, norm, positions, pool_size, dict(width=width, depth=depth, mlp=mlp, mixer=mixers))
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)
    if pyramid and top.shapes and "stage_0_norm/gamma" not in top.shapes:
        raise errors.ArgumentError(
            f"{name}: pyramid=True needs weights with a norm for each stage, {top.record.source} has none (a classifier's); use "
            "keras_vit.dense.pyramid(model), which puts new ones on a model without."
        )

    x = top.images((224, 224), lambda h, w: _check_size(name, h, w))
    x = keras.layers.ZeroPadding2D(2, "channels_last", name="patches_padding")(x)  # 2 of 7, where 3 would center the window
    x = _patches(x, width[0], 7, 4, "patches")
    levels, block = {}, 0
    for s in range(STAGES):
        if s:
            x = keras.layers.ZeroPadding2D(1, "channels_last", name=f"stage_{s}_padding")(x)
            x = _patches(x, width[s], 3, 2, f"stage_{s}_patches")
        if s in positions:
            x = GridPositions(name=f"stage_{s}_positions")(x)
        for i in range(depth[s]):
            drop_path_rate = stochastic_depth_rate * block / max(sum(depth) - 1, 1)
            rates, sizes = (dropout_rate, drop_path_rate), (pool_size, head_size, flash_attention)
            x = MetaFormerBlock(mlp[s], mixers[s], norm, *rates, layer_scale, *sizes, name=f"stage_{s}_block_{i}")(x)
            block += 1
        if pyramid:
            levels[f"P{s + 2}"] = _norm(norm, name=f"stage_{s}_norm")(x)
    if pyramid:
        return top.model(levels, name)
    x = _norm(norm, name="encoder_norm")(x)
    if include_top or pooling:
        x = MeanTokens(name="mean_tokens")(x)
    return top.model(top.top(x) if include_top else x, name)


def _patches(x, width, kernel_size, stride, name):
    """The stem, or the halving before a stage; the start of its weights is PyTorch's."""
    bound = (kernel_size**2 * x.shape[-1]) ** -0.5
    uniform = keras.initializers.RandomUniform(-bound, bound)
    options = dict(data_format="channels_last", kernel_initializer=uniform, bias_initializer=uniform, name=name)
    return keras.layers.Conv2D(width, kernel_size, stride, **options)(x)


def _check(name, include_top, pooling, pyramid, norm, positions, pool_size, by_stage):
    for argument, value, allowed in (("pooling", pooling, POOLINGS), ("norm", norm, NORMS)):
        if value not in allowed:
            raise errors.ArgumentError(f"{name}: expected {argument} in {allowed}, got {value!r}.")
    for argument, values in by_stage.items():
        if not isinstance(values, (tuple, list)) or len(values) != STAGES:
            raise errors.ArgumentError(f"{name}: {argument} must have a value for each of the {STAGES} stages, got {values!r}.")
    unknown = [mixer for mixer in by_stage["mixer"] if mixer not in MIXERS]
    if unknown:
        raise errors.ArgumentError(f"{name}: expected mixers in {MIXERS}, got {unknown[0]!r}.")
    if not set(positions) <= set(range(STAGES)):
        raise errors.ArgumentError(f"{name}: positions are the stages, of 0 to {STAGES - 1}, that have some, got {positions!r}.")
    if not isinstance(pool_size, int) or pool_size < 1 or pool_size % 2 == 0:
        raise errors.ArgumentError(f"{name}: pool_size must be an odd number of places, got {pool_size!r}.")
    if pyramid and (include_top or pooling):
        raise errors.ArgumentError(f"{name}: pyramid=True gives all stages; it needs include_top=False and pooling=None.")


def _check_size(name, h, w):
    if min(h, w) < SMALLEST:
        raise errors.ArgumentError(
            f"{name}: an image of {h} x {w} is too small; the smallest is input_shape=({SMALLEST}, {SMALLEST}, 3)."
        )


def _layouts():
    """{layout: Names}. In the original a stage, its halving and its positions count alike in one list, so that stages after
    positions move by one.
    """
    found = {}
    for style, with_positions in {"torch": None, "torch-positions-3": 3, "torch-positions-2": 2}.items():
        rules, at = [*torch.conv("patch_embed.proj", "patches"), *torch.norm("norm", "encoder_norm")], 0
        for s in range(STAGES):
            if s:
                rules += torch.conv(f"network.{at}.proj", f"stage_{s}_patches")
                at += 1
            if s == with_positions:
                table = Turned((0, 3, 1, 2))
                rules.append(rule(f"network.{at}.pos_embed", f"stage_{s}_positions/positions", table))
                at += 1
            rules += _block_names(f"network.{at}.{{i}}", f"stage_{s}_block_{{i}}")
            rules += torch.norm(f"norm{at}", f"stage_{s}_norm")
            at += 1
        names = Names(*rules, *torch.linear("head", "head"))
        found |= torch.spellings(names, style)
    return found


def _block_names(original, ours):
    return [
        *torch.norm(f"{original}.norm1", f"{ours}/mixer_norm"),
        *torch.attention(f"{original}.token_mixer", f"{ours}/mixer/attention", bias=False),
        *torch.weight(f"{original}.token_mixer.fc", f"{ours}/mixer"),
        *torch.norm(f"{original}.norm2", f"{ours}/mlp_norm"),
        *torch.pointwise(f"{original}.mlp.fc1", f"{ours}/mlp/fc1"),
        *torch.pointwise(f"{original}.mlp.fc2", f"{ours}/mlp/fc2"),
        torch.param(f"{original}.layer_scale_1", f"{ours}/mixer_scale/gamma"),
        torch.param(f"{original}.layer_scale_2", f"{ours}/mlp_scale/gamma"),
    ]


def _sizes(shapes):
    """The builder's arguments that a file's shapes, {our name: shape}, say; they do not tell "pool" from "identity"."""
    first = [f"stage_{s}_block_0" for s in range(STAGES)]
    weights = {"attention": "mixer/attention/qkv_kernel", "dense": "mixer/kernel"}
    mixers = tuple(next((kind for kind, w in weights.items() if f"{block}/{w}" in shapes), "pool") for block in first)
    blocks = {name.partition("/")[0] for name in shapes}
    return dict(
        width=tuple(shapes[f"{block}/mlp/fc1/kernel"][0] for block in first),
        depth=tuple(sum(name.startswith(f"stage_{s}_block_") for name in blocks) for s in range(STAGES)),
        mlp=tuple(shapes[f"{block}/mlp/fc1/kernel"][1] for block in first),
        mixer="pool" if set(mixers) == {"pool"} else mixers,
        positions=tuple(s for s in range(STAGES) if f"stage_{s}_positions" in blocks),
        pyramid="stage_0_norm/gamma" in shapes,
        **({} if f"{first[0]}/mixer_scale/gamma" in shapes else {"layer_scale": None}),
    )


def _any_size(model):
    blocks = [layer for layer in model.layers if isinstance(layer, MetaFormerBlock)]
    fixed = any(block.kind in FIXED for block in blocks) or any(isinstance(layer, GridPositions) for layer in model.layers)
    return None if fixed else ((SMALLEST, SMALLEST), (1, 1))


def _written(model):
    at = [int(layer.name.split("_")[1]) for layer in model.layers if isinstance(layer, GridPositions)]
    return f"torch-positions-{at[0]}" if at else "torch"


def _pixels(crop_fraction):
    return dataclasses.replace(IMAGENET, crop_fraction=crop_fraction)


def _pyramid(model):
    """Each stage's norm where it has one, else its last block."""
    last = {}
    for layer in model.layers:
        if found := re.fullmatch(r"stage_(\d+)_(block_\d+|norm)", layer.name):
            last[int(found[1]) + 2] = layer.name
    return last


FAMILY = Family(
    "PoolFormer",
    layouts=_layouts(),
    sizes=_sizes,
    written=_written,
    any_size=_any_size,
    pixels=_pixels(0.9),
    pyramid=_pyramid,
)

# Table 1; starts of the scales: models/poolformer.py of the original
MU = dict(width=(16, 24, 32, 48), depth=(1, 1, 2, 1), mlp=(64, 96, 128, 192))
S = dict(width=(64, 128, 320, 512), mlp=(256, 512, 1280, 2048))
M = dict(width=(96, 192, 384, 768), mlp=(384, 768, 1536, 3072))
S12 = dict(**S, depth=(2, 2, 6, 2))
LICENCE = "Apache-2.0, as its repository sail-sg/poolformer states"


def _released(file, crop_fraction):
    """What a row says of its file: its name, and {tag: record}."""
    source = f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{file}.pth.tar"
    record = Weights(source, pixels=_pixels(crop_fraction), licence=LICENCE)
    return dict(upstream=(file,), weights={"imagenet1k": record})


# What models/poolformer.py and models/metaformer.py of the original say of each file
PoolFormer_mu = variant("PoolFormer_mu", PoolFormer, **MU, resolution=32, params=118_904, macs=584_064)
PoolFormer_S12 = variant(
    "PoolFormer_S12", PoolFormer, **S12, params=11_915_176, macs=1_812_267_008,
    **_released("poolformer_s12", 0.9),
)  # fmt: skip
PoolFormer_S24 = variant(
    "PoolFormer_S24", PoolFormer, **S, depth=(4, 4, 12, 4), params=21_388_968, macs=3_392_208_896,
    **_released("poolformer_s24", 0.9),
)  # fmt: skip
PoolFormer_S36 = variant(
    "PoolFormer_S36", PoolFormer, **S, depth=(6, 6, 18, 6), layer_scale=1e-6, params=30_862_760, macs=4_972_150_784,
    **_released("poolformer_s36", 0.9),
)  # fmt: skip
PoolFormer_M36 = variant(
    "PoolFormer_M36", PoolFormer, **M, depth=(6, 6, 18, 6), layer_scale=1e-6, params=56_172_520, macs=8_758_788_096,
    **_released("poolformer_m36", 0.95),
)  # fmt: skip
PoolFormer_M48 = variant(
    "PoolFormer_M48", PoolFormer, **M, depth=(8, 8, 24, 8), layer_scale=1e-6, params=73_473_448, macs=11_533_320_192,
    **_released("poolformer_m48", 0.95),
)  # fmt: skip
MetaFormer_S12_id = variant(
    "MetaFormer_S12_id", PoolFormer, **S12, mixer="identity", params=11_915_176, macs=1_812_267_008,
    **_released("metaformer_id_s12", 0.9),
)  # fmt: skip
MetaFormer_S12_pppa = variant(
    "MetaFormer_S12_pppa", PoolFormer, **S12, mixer=(*["pool"] * 3, "attention"), norm="channel", positions=(3,),
    params=14_038_440, macs=1_919_944_704,
    **_released("metaformer_pppa_s12_224", 0.95),
)  # fmt: skip
MetaFormer_S12_ppaa = variant(
    "MetaFormer_S12_ppaa", PoolFormer, **S12, mixer=("pool", "pool", "attention", "attention"), norm="channel", positions=(2,),
    params=16_535_592, macs=2_549_151_744,
    **_released("metaformer_ppaa_s12_224", 0.95),
)  # fmt: skip
MetaFormer_S12_pppf = variant(
    "MetaFormer_S12_pppf", PoolFormer, **S12, mixer=(*["pool"] * 3, "dense"),
    params=11_919_978, macs=1_814_725_632,
    **_released("metaformer_pppf_s12_224", 0.9),
)  # fmt: skip
MetaFormer_S12_ppff = variant(
    "MetaFormer_S12_ppff", PoolFormer, **S12, mixer=("pool", "pool", "dense", "dense"),
    params=12_150_474, macs=1_888_484_352,
    **_released("metaformer_ppff_s12_224", 0.95),
)  # fmt: skip
