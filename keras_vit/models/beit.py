"""BEiT: "BEiT: BERT Pre-Training of Image Transformers" (arXiv 2106.08254).

Weights: microsoft/unilm (`beit/`), also as Hugging Face's repositories microsoft/beit-* and timm's timm/beit_* have them.
"""

import collections
import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_vit import errors
from keras_vit.checkpoints import adapt, load
from keras_vit.checkpoints.dialects import torch
from keras_vit.checkpoints.names import Names, constant, rule
from keras_vit.checkpoints.transforms import Part, Turned, Wrapped
from keras_vit.checkpoints.weights import Weights
from keras_vit.data.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from keras_vit.layers import (
    AdaptivePooling,
    Bilinear,
    Block,
    ClassToken,
    Doubling,
    MaskToken,
    MeanTokens,
    Patches,
    PatchGrid,
    PatchTokens,
    Tokens,
)
from keras_vit.layers.conv import batch_norm
from keras_vit.layers.taps import check_tap
from keras_vit.models import vit
from keras_vit.zoo import Contract, Family, builder, check_choices, variant

CLASSIFIERS = ("avg", "token")
POOLINGS = (None, "token", "avg")
RELATIVE = ("block", "shared", None)


def relative_index(grid):
    """(1 + h * w, 1 + h * w) int64: the row of a table of relative positions for each pair of tokens, the class token first.

    Two patches have the row of their distance: its vertical part counts lines of 2 * w - 1 rows, its horizontal part rows. The
    last three are of the class token to a patch, of a patch to the class token, and of the class token to itself.
    """
    h, w = grid
    y, x = np.divmod(np.arange(h * w), w)
    at, rows = y * (2 * w - 1) + x, adapt.relative_distances(grid)
    index = np.empty((1 + h * w, 1 + h * w), np.int64)
    index[1:, 1:] = at[:, None] - at + (rows - 4) // 2
    index[0], index[1:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return index


@keras.saving.register_keras_serializable("keras_vit")
class RelativePositions(keras.layers.Layer):
    """(b, 1 + h * w, d) -> (heads, 1 + h * w, 1 + h * w): a learned number for each pair of tokens by their distance, in float32.

    Weights: `table` (rows, heads); see `relative_index`. The tokens' values do not matter.

    Args:
        heads: number of heads. grid: (h, w) of the patches.
    """

    def __init__(self, heads, grid, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.grid = heads, tuple(grid)

    def build(self, input_shape):
        shape = (adapt.relative_distances(self.grid), self.heads)
        self.table = self.add_weight(shape=shape, initializer="zeros", autocast=False, name="table")

    def call(self, x):
        (h, w), rows = self.grid, self.table.shape[0]
        y, x = np.divmod(np.arange(h * w, dtype="int32"), w)
        at = ops.convert_to_tensor(y * (2 * w - 1) + x)  # the index is computed here, since for 512 pixels it takes 4 MiB
        index = at[:, None] - at + (rows - 4) // 2
        index = ops.concatenate([np.full((h * w, 1), rows - 2, "int32"), index], axis=1)
        first = np.array([[rows - 1] + [rows - 3] * (h * w)], "int32")
        index = ops.concatenate([first, index], axis=0)
        return ops.transpose(ops.take(self.table, index, axis=0), (2, 0, 1))

    def compute_output_spec(self, x):
        n = 1 + math.prod(self.grid)
        return keras.KerasTensor((self.heads, n, n), dtype="float32")


@keras.saving.register_keras_serializable("keras_vit")
class BEiTBlock(Block):
    """(b, n, d) -> (b, n, d): a `Block` whose attention has no bias of keys, with exact GELU, and with relative positions.

    A second input (heads, n, n), of positions that blocks share, is added to its own. Taps: those of `Block` and "bias"
    (heads, n, n), what is added to the scores.

    Args:
        heads, mlp, dropout_rate, attention_dropout_rate, drop_path_rate, flash_attention, layer_scale, epsilon: see `Block`.
        relative_grid: (h, w) of the patches for relative positions of its own; None for none.
    """

    TAPS = (*Block.TAPS, "bias")

    def __init__(
        self,
        heads,
        mlp,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        drop_path_rate=0.0,
        flash_attention=None,
        layer_scale=None,
        epsilon=1e-6,
        relative_grid=None,
        **kwargs,
    ):
        rates = (dropout_rate, attention_dropout_rate, drop_path_rate)
        super().__init__(heads, mlp, *rates, flash_attention, "exact", layer_scale, 0.02, "qv", epsilon, **kwargs)
        self.relative_positions = None
        if relative_grid is not None:
            self.relative_positions = RelativePositions(heads, relative_grid, dtype=self.dtype_policy, name="relative_positions")

    def build(self, x_shape, bias_shape=None):
        super().build(x_shape, bias_shape)
        if self.relative_positions is not None:
            self.relative_positions.build(x_shape)

    def call(self, x, bias=None, tap=None):
        self._check_tap(bias, tap)
        if self.relative_positions is not None:
            own = self.relative_positions(x)
            bias = own if bias is None else bias + own
        return bias if tap == "bias" else super().call(x, bias, tap)

    def _check_tap(self, bias, tap):
        check_tap(self, tap)
        if tap == "bias" and bias is None and self.relative_positions is None:
            raise ValueError(f"BEiTBlock {self.name!r}: it has no relative positions to tap.")

    def compute_output_spec(self, x, bias=None, tap=None):
        self._check_tap(bias, tap)
        if tap == "bias":
            return keras.KerasTensor((self.heads, x.shape[1], x.shape[1]), dtype="float32")
        return super().compute_output_spec(x, bias, tap)


def _encoder(
    x, *, depth, heads, mlp, relative_positions, absolute_positions, layer_scale, epsilon, dropout_rate, attention_dropout_rate,
    stochastic_depth_rate, flash_attention,
):  # fmt: skip
    """(b, h, w, d) patches -> the tokens (b, 1 + h * w, d) before the first block and after each."""
    grid = x.shape[1:3]
    x = Tokens(positions="learned" if absolute_positions else "none", token_stddev=0.02, name="tokens")(x)
    x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    shared = [RelativePositions(heads, grid, name="relative_positions")(x)] if relative_positions == "shared" else []
    found = [x]
    for i in range(depth):
        drop_path_rate = stochastic_depth_rate * i / max(depth - 1, 1)
        x = BEiTBlock(
            heads, mlp, dropout_rate, attention_dropout_rate, drop_path_rate, flash_attention, layer_scale, epsilon,
            grid if relative_positions == "block" else None, name=f"block_{i}",
        )(x, *shared)  # fmt: skip
        found.append(x)
    return found


@builder
def BEiT(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="auto",
    include_preprocessing=False,
    name="BEiT",
    *,
    patch_size,
    width,
    depth,
    heads,
    mlp,
    classifier="avg",
    relative_positions="block",
    absolute_positions=False,
    layer_scale=0.1,
    epsilon=1e-6,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0,
    flash_attention=None,
):
    """Builds a BEiT as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    Args:
        include_top: whether to end in the classifier (`head`, whose output are the logits, then the activation).
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file (microsoft/unilm, timm or Hugging Face), or
            None for random weights. `"imagenet"` is the ImageNet-1k classifier nearest to the resolution asked for.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), multiples of the patch; by default the checkpoint's own resolution, else 224. Positions of another
            one are resampled as the original's fine-tuning does.
        pooling: without top: None gives the grid of patch tokens (b, h, w, width); "avg" the mean of the patch tokens, normed
            with classifier="avg"; "token" the class token of classifier="token", (b, width).
        classes: outputs of the classifier; None takes the checkpoint's, or 1,000. Another number than the checkpoint's starts
            from a head of zeros.
        classifier_activation: "auto" is softmax; None for logits; or a Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        patch_size: side of a patch in pixels, or (height, width).
        width, depth, heads, mlp: width of the tokens, number of blocks, heads in each, hidden width of their MLPs.
        classifier: what the head reads: "avg", the mean of the patch tokens, then a norm (`fc_norm`), or "token", the class token
            after a norm of all tokens (`encoder_norm`).
        relative_positions: "block" for a table in each block, "shared" for one that all have (as in pre-training), None.
        absolute_positions: whether tokens have learned positions.
        layer_scale: start of the numbers that scale what each branch adds: 0.1 in the base model, 1e-5 in the large one; None for
            none.
        epsilon: of all norms: 1e-6 in the original and in timm. The configurations of Hugging Face's repositories, which hold the
            same weights, say 1e-12 (`layer_norm_eps`).
        dropout_rate: after tokens, attention and in MLPs. attention_dropout_rate: on attention weights.
        stochastic_depth_rate: probability of skipping a residual branch in the last block, growing linearly from 0.
        flash_attention: see `keras_vit.layers.Attention`.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    chosen = dict(classifier=(classifier, CLASSIFIERS), pooling=(pooling, POOLINGS))
    check_choices(name, **chosen, relative_positions=(relative_positions, RELATIVE))
    if not include_top and pooling == "token" and classifier == "avg":
        raise errors.ArgumentError(f"{name}: pooling='token' needs classifier='token', which norms the class token; use 'avg'.")
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)

    x = _patches(top, name, width, patch_size)
    grid = x.shape[1:3]
    x = _encoder(
        x, depth=depth, heads=heads, mlp=mlp, relative_positions=relative_positions, absolute_positions=absolute_positions,
        layer_scale=layer_scale, epsilon=epsilon, dropout_rate=dropout_rate, attention_dropout_rate=attention_dropout_rate,
        stochastic_depth_rate=stochastic_depth_rate, flash_attention=flash_attention,
    )[-1]  # fmt: skip
    if classifier == "token":
        x = keras.layers.LayerNormalization(epsilon=epsilon, name="encoder_norm")(x)
    reads = classifier if include_top else pooling
    x = ClassToken(name="class_token")(x) if reads == "token" else PatchTokens(name="patch_tokens")(x)
    if reads == "avg":
        x = MeanTokens(name="mean_tokens")(x)
        if classifier == "avg":
            x = keras.layers.LayerNormalization(epsilon=epsilon, name="fc_norm")(x)
    if reads is None:
        x = PatchGrid(grid, name="patch_grid")(x)
    return top.model(top.top(x) if include_top else x, name)


def _patches(top, name, width, patch_size):
    """The patches (b, h, w, width) of the model's images."""
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)

    size = _default_size(top, patch)
    return Patches(width, patch, name="patches")(top.images(size, lambda h, w: vit.check_size(name, (h, w), patch)))


def _default_size(top, patch):
    """(H, W) where none is asked for: the record's, else that of the file's relative positions, else as a ViT's."""
    tables = [shape for name, shape in top.shapes.items() if name.endswith("relative_positions/table")]
    if tables and not (top.record.resolution or top.recorded_grid):
        side = (math.isqrt(max(tables[0][0] - 3, 1)) + 1) // 2
        return side * patch[0], side * patch[1]
    return vit.default_size(top, patch, class_token=True)


@builder
def BEiTMasked(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation=None,
    include_preprocessing=False,
    name="BEiTMasked",
    *,
    patch_size,
    width,
    depth,
    heads,
    mlp,
    relative_positions="shared",
    absolute_positions=False,
    layer_scale=0.1,
    epsilon=1e-6,
    norm_twice=False,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0,
    flash_attention=None,
):
    """Builds a BEiT that guesses masked patches: images (b, H, W, 3), mask (b, h, w) -> logits (b, h * w, classes) of codes.

    The mask is True where a patch is hidden: a learned token takes its place before the first block. `start_from` gives what such
    a model has learned to a classifier. The model takes [images, mask].

    Args:
        include_top: whether to end in `head`, which maps the normed patch tokens to the logits.
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file (microsoft/unilm or Hugging Face), or None.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), multiples of the patch; by default the checkpoint's own resolution, else 224.
        pooling: None; without top the model gives the grid of patch tokens (b, h, w, width).
        classes: size of the vocabulary; None takes the checkpoint's, or 8,192.
        classifier_activation: None for logits; "softmax", or another Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights.
        name: of the model.
        patch_size: side of a patch in pixels, or (height, width).
        width, depth, heads, mlp: width of the tokens, number of blocks, heads in each, hidden width of their MLPs.
        relative_positions, absolute_positions, layer_scale, epsilon: see `BEiT`.
        norm_twice: whether all tokens are normed (`inner_norm`) before the norm that the head reads (`encoder_norm`), as those of
            Hugging Face's models without use_mean_pooling are.
        dropout_rate: after tokens, attention and in MLPs. attention_dropout_rate: on attention weights.
        stochastic_depth_rate: probability of skipping a residual branch in the last block, growing linearly from 0.
        flash_attention: see `keras_vit.layers.Attention`.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    check_choices(name, pooling=(pooling, (None,)), relative_positions=(relative_positions, RELATIVE))
    classes = VOCABULARY if classes is None and weights is None else classes
    top = Contract(MASKED, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)
    x = _patches(top, name, width, patch_size)
    grid = x.shape[1:3]
    mask = keras.Input(grid, dtype="bool", name="mask")
    x = MaskToken(name="mask_token")([x, mask])
    x = _encoder(
        x, depth=depth, heads=heads, mlp=mlp, relative_positions=relative_positions, absolute_positions=absolute_positions,
        layer_scale=layer_scale, epsilon=epsilon, dropout_rate=dropout_rate, attention_dropout_rate=attention_dropout_rate,
        stochastic_depth_rate=stochastic_depth_rate, flash_attention=flash_attention,
    )[-1]  # fmt: skip
    if norm_twice:
        x = keras.layers.LayerNormalization(epsilon=epsilon, name="inner_norm")(x)
    x = keras.layers.LayerNormalization(epsilon=epsilon, name="encoder_norm")(x)
    x = PatchTokens(name="patch_tokens")(x)
    x = top.top(x) if include_top else PatchGrid(grid, name="patch_grid")(x)
    return top.model(x, name, [mask])


@keras.saving.register_keras_serializable("keras_vit")
class FeatureMaps(keras.layers.Layer):
    """n or more of (b, 1 + h * w, d) -> n of (b, h, w, d): the patch tokens of each, on their grid.

    Tokens behind the first n are given only so that the blocks before them belong to the model, whose files have their weights.

    Args:
        grid: (h, w). count: n.
    """

    def __init__(self, grid, count, **kwargs):
        super().__init__(**kwargs)
        self.grid, self.count = tuple(grid), count

    def call(self, inputs):
        return [ops.reshape(x[:, 1:], (-1, *self.grid, x.shape[-1])) for x in inputs[: self.count]]

    def compute_output_shape(self, input_shape):
        return [(b, *self.grid, d) for b, _, d in input_shape[: self.count]]


@keras.saving.register_keras_serializable("keras_vit")
class ConvUnit(keras.layers.Layer):
    """(b, h, w, c) -> (b, h, w, d): `relu(norm(conv(x)))`, a convolution without bias, zeros around the image, and a batch norm.

    Args:
        width: d. kernel_size: side of the window, odd.
    """

    def __init__(self, width, kernel_size, **kwargs):
        super().__init__(**kwargs)
        dtype = self.dtype_policy
        self.conv = keras.layers.Conv2D(
            width, kernel_size, padding="same", data_format="channels_last", use_bias=False, dtype=dtype, name="conv"
        )
        self.norm = batch_norm(dtype=dtype, name="norm")

    def build(self, input_shape):
        self.conv.build(input_shape)
        self.norm.build(self.conv.compute_output_shape(input_shape))

    def call(self, x, training=None):
        return ops.relu(self.norm(self.conv(x), training=training))

    def compute_output_shape(self, input_shape):
        return self.conv.compute_output_shape(input_shape)

    def multiply_adds(self, input_shape):
        """ "conv" of one example (b, h, w, c)."""
        return collections.Counter(conv=math.prod(input_shape[1:3]) * math.prod(self.conv.kernel.shape))


@builder
def BEiTSegmenter(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation=None,
    include_preprocessing=False,
    name="BEiTSegmenter",
    *,
    patch_size,
    width,
    depth,
    heads,
    mlp,
    features=None,
    pool_scales=(1, 2, 3, 6),
    auxiliary=256,
    relative_positions="block",
    absolute_positions=False,
    layer_scale=0.1,
    epsilon=1e-6,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0,
    flash_attention=None,
):
    """Builds a BEiT that labels every pixel: images (b, H, W, 3) -> logits (b, 4 h, 4 w, classes), for h x w patches.

    The tokens of four depths become feature maps of 4, 2, 1 and 1 / 2 times the patches' grid (`pyramid_0` to `pyramid_3`), which
    UPerNet (arXiv 1807.10221) puts together. `label_maps` makes labels of the image's size out of the logits. With `auxiliary`
    the model gives a dict of "logits" and "auxiliary", the guesses (b, h, w, classes) of a small head on the third map that
    helps in training: the loss is the cross-entropy of the logits, resized to the labels' size, plus 0.4 times that of the
    auxiliary ones.

    Args:
        include_top: whether to end in `head`, which maps every place to its classes.
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file (microsoft/unilm or Hugging Face), or None.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), multiples of the patch; by default the checkpoint's own resolution, else 224.
        pooling: None; without top the model gives what the head reads, (b, 4 h, 4 w, width).
        classes: of a pixel; None takes the checkpoint's, or 150.
        classifier_activation: None for logits; "softmax", or another Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights.
        name: of the model.
        patch_size: side of a patch in pixels, or (height, width).
        width, depth, heads, mlp: width of tokens and maps, number of blocks, heads in each, hidden width of their MLPs.
        features: after how many blocks each of the four maps is taken, 0 being before the first. None for a third, half, two
            thirds and all of them, as in the original. Hugging Face's models of the same weights take each two blocks
            earlier: (2, 4, 6, 10) of 12.
        pool_scales: sides of the grids that the last map is averaged to.
        auxiliary: width of the auxiliary head; None for none.
        relative_positions, absolute_positions, layer_scale, epsilon: see `BEiT`.
        dropout_rate: after tokens, attention and in MLPs. attention_dropout_rate: on attention weights.
        stochastic_depth_rate: probability of skipping a residual branch in the last block, growing linearly from 0.
        flash_attention: see `keras_vit.layers.Attention`.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    check_choices(name, pooling=(pooling, (None,)), relative_positions=(relative_positions, RELATIVE))
    features = tuple(depth * n // 6 for n in (2, 3, 4, 6)) if features is None else tuple(features)
    if len(features) != 4 or not all(isinstance(at, int) and 0 <= at <= depth for at in features):
        raise errors.ArgumentError(f"{name}: features must be four whole numbers from 0 to depth={depth}, got {features}.")
    classes = ADE20K if classes is None and weights is None else classes
    top = Contract(
        SEGMENTER, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing
    )
    x = _patches(top, name, width, patch_size)
    grid = x.shape[1:3]
    tokens = _encoder(
        x, depth=depth, heads=heads, mlp=mlp, relative_positions=relative_positions, absolute_positions=absolute_positions,
        layer_scale=layer_scale, epsilon=epsilon, dropout_rate=dropout_rate, attention_dropout_rate=attention_dropout_rate,
        stochastic_depth_rate=stochastic_depth_rate, flash_attention=flash_attention,
    )  # fmt: skip
    read = [tokens[at] for at in features] + ([] if depth in features else [tokens[-1]])
    maps = FeatureMaps(grid, len(features), name="feature_maps")(read)

    up = Doubling(width, name="pyramid_0_up")(maps[0])
    up = batch_norm(name="pyramid_0_norm")(up)
    up = keras.layers.Activation("gelu", name="pyramid_0_gelu")(up)
    maps[0] = Doubling(width, name="pyramid_0")(up)
    maps[1] = Doubling(width, name="pyramid_1")(maps[1])
    maps[2] = keras.layers.Identity(name="pyramid_2")(maps[2])
    maps[3] = keras.layers.MaxPooling2D(2, data_format="channels_last", name="pyramid_3")(maps[3])
    sizes = [each.shape[1:3] for each in maps]

    pooled = [maps[3]]
    for i, scale in enumerate(pool_scales):
        x = AdaptivePooling(scale, name=f"pool_{i}")(maps[3])
        x = ConvUnit(width, 1, name=f"pool_{i}_conv")(x)
        pooled.append(Bilinear(sizes[3], name=f"pool_{i}_resized")(x))
    x = keras.layers.Concatenate(name="pools")(pooled)
    x = ConvUnit(width, 3, name="pools_conv")(x)
    levels = [x]
    for i in (2, 1, 0):
        x = Bilinear(sizes[i], name=f"level_{i}_from_above")(x)
        x = keras.layers.Add(name=f"level_{i}")([ConvUnit(width, 1, name=f"level_{i}_lateral")(maps[i]), x])
        levels.insert(0, ConvUnit(width, 3, name=f"level_{i}_conv")(x))
    levels[1:] = [Bilinear(sizes[0], name=f"level_{i}_resized")(level) for i, level in enumerate(levels[1:], 1)]
    x = keras.layers.Concatenate(name="levels")(levels)
    x = ConvUnit(width, 3, name="levels_conv")(x)
    if not include_top:
        return top.model(x, name)
    x = top.top(x)
    if auxiliary is None:
        return top.model(x, name)
    y = ConvUnit(auxiliary, 3, name="auxiliary_conv")(maps[2])
    y = keras.layers.Dense(top.classes, kernel_initializer="zeros", dtype="float32", name="auxiliary_head")(y)
    return top.model({"logits": x, "auxiliary": y}, name)


def label_maps(logits, sizes):
    """(b, h, w, classes) -> int32 labels of images: the logits resized bilinearly to the image, and the largest at each pixel.

    Args:
        logits: of a `BEiTSegmenter`, or its dict of outputs.
        sizes: (H, W) of all images, for an array (b, H, W); or one (H, W) for each, for a list of arrays (H, W).
    """
    logits = logits["logits"] if isinstance(logits, dict) else logits
    if np.ndim(sizes) == 1:
        return _labels(logits, sizes)
    if len(sizes) != len(logits):
        raise errors.ArgumentError(f"label_maps: expected one (H, W) for each of {len(logits)} images, got {len(sizes)}.")
    return [_labels(logits[i : i + 1], size)[0] for i, size in enumerate(sizes)]


def _labels(logits, size):
    resized = Bilinear(tuple(map(int, size)), dtype="float32")(ops.convert_to_tensor(logits))
    return keras.ops.convert_to_numpy(ops.argmax(resized, axis=-1)).astype("int32")


def start_from(model, other):
    """Gives a BEiT what another one has learned, such as a classifier that of a `BEiTMasked`, as the original fine-tunes.

    Patches, tokens, blocks and norms of the same names are taken over, heads are not. A table of relative positions that the
    other's blocks share becomes each block's own, and positions of another grid are resampled.

    Args:
        model: a BEiT of this package; changed in place.
        other: another one, of the same width, depth and patch size.

    Returns:
        Names of the weights that keep their own values.

    Raises:
        errors.ArgumentError: weights of the same name have other shapes; lists all; nothing was changed.
    """
    ours, theirs = load.named_weights(model), load.named_weights(other)
    old, new = (each.get_layer("tokens").grid for each in (other, model))
    values, kept, problems = {}, [], []
    for name, weight in ours.items():
        table = name.endswith("relative_positions/table")
        source = theirs.get(name, theirs.get("relative_positions/table") if table else None)
        if source is None or "head" in name.partition("/")[0]:
            kept.append(name)
            continue
        value = load.to_numpy(source)
        if table and old != new:
            value = adapt.resample_relative(value, old, new)
        elif name == "tokens/positions" and old != new:
            value = adapt.Positions(new, True, file_grid=old, resample=adapt.resample_bicubic)({name: value})[name]
        if value.shape != tuple(weight.shape):
            problems.append(f"{name}: {tuple(weight.shape)}, of the other {value.shape}")
        values[name] = value
    if problems:
        raise errors.ArgumentError(
            f"start_from: {model.name!r} and {other.name!r} are of different sizes: {'; '.join(problems[:8])}. Nothing was "
            "changed; build both with the same width, depth, heads, mlp and patch_size."
        )
    for name, value in values.items():
        ours[name].assign(value)
    return kept


# A part of two, query and value, of our bias, which has none of keys
_BIAS = [Turned((0, 1), (2,), Part(index, 2, 0)) for index in (0, 1)]


def _index(shape, grid):
    """The `relative_position_index` that stands beside a table of this shape; see `names.Constant`."""
    side = (math.isqrt(max(shape[0] - 3, 0)) + 1) // 2
    return relative_index(grid or (side, side))


def _relative_names(original, ours):
    """A table, and the index beside it that files of the authors and of Hugging Face hold."""
    table = f"{ours}/table"
    return [
        rule(f"{original}relative_position_bias_table", table),
        constant(f"{original}relative_position_index", table, _index),
    ]


def original_encoder(root=""):
    """The rules of patches, tokens and blocks in the spelling of microsoft/unilm, which timm shares."""
    block, ours = f"{root}blocks.{{i}}", "block_{i}"
    return [
        *torch.conv(f"{root}patch_embed.proj", "patches"),
        torch.param(f"{root}cls_token", "tokens/cls"),
        torch.param(f"{root}pos_embed", "tokens/positions"),
        *_relative_names(f"{root}rel_pos_bias.", "relative_positions"),
        *torch.block(block, ours),
        *(rule(f"{block}.attn.{part}_bias", f"{ours}/attention/qkv_bias", bias) for part, bias in zip("qv", _BIAS)),
        *torch.attention(f"{block}.attn", f"{ours}/attention", bias=False),
        *_relative_names(f"{block}.attn.", f"{ours}/relative_positions"),
    ]


def hugging_face_encoder():
    """The same in the spelling of Hugging Face's transformers."""
    layer, ours = "beit.encoder.layer.{i}", "block_{i}"
    attention = f"{layer}.attention.attention"
    return [
        *torch.conv("beit.embeddings.patch_embeddings.projection", "patches"),
        torch.param("beit.embeddings.cls_token", "tokens/cls"),
        torch.param("beit.embeddings.position_embeddings", "tokens/positions"),
        *_relative_names("beit.encoder.relative_position_bias.", "relative_positions"),
        *torch.norm(f"{layer}.layernorm_before", f"{ours}/attention_norm"),
        *torch.split_attention(attention, f"{ours}/attention", f"{layer}.attention.output.dense", biases=(0, 2)),
        *_relative_names(f"{attention}.relative_position_bias.", f"{ours}/relative_positions"),
        torch.param(f"{layer}.lambda_1", f"{ours}/attention_scale/gamma"),
        *torch.norm(f"{layer}.layernorm_after", f"{ours}/mlp_norm"),
        *torch.linear(f"{layer}.intermediate.dense", f"{ours}/mlp/fc1"),
        *torch.linear(f"{layer}.output.dense", f"{ours}/mlp/fc2"),
        torch.param(f"{layer}.lambda_2", f"{ours}/mlp_scale/gamma"),
    ]


def _masked_layouts():
    """Those of `BEiTMasked`. Hugging Face's models have a norm more where use_mean_pooling is off; released ones have not."""
    original = Names(
        original_encoder(),
        rule("mask_token", "mask_token/token", Wrapped(2)),
        torch.norm("norm", "encoder_norm"),
        torch.linear("lm_head", "head"),
    )
    hugging_face = Names(
        hugging_face_encoder(),
        rule("beit.embeddings.mask_token", "mask_token/token", Wrapped(2)),
        torch.norm("beit.layernorm", "inner_norm"),
        torch.norm("layernorm", "encoder_norm"),
        torch.linear("lm_head", "head"),
    )
    return {**torch.spellings(original, "beit"), "hugging-face": hugging_face}


def _segmenter_names(pyramid, classifier):
    """The rules of pyramid and heads, which both spellings share but for two names."""

    def unit(original, ours):
        conv = torch.weight(f"{original}.conv", f"{ours}/conv", torch.FILTER)
        return [*conv, *torch.batch_norm(f"{original}.bn", f"{ours}/norm")]

    return [
        *torch.conv(f"{pyramid}fpn1.0", "pyramid_0_up"),
        *torch.batch_norm(f"{pyramid}fpn1.1", "pyramid_0_norm"),
        *torch.conv(f"{pyramid}fpn1.3", "pyramid_0"),
        *torch.conv(f"{pyramid}fpn2.0", "pyramid_1"),
        *unit("decode_head.psp_modules.{i}.1", "pool_{i}_conv"),
        *unit("decode_head.bottleneck", "pools_conv"),
        *unit("decode_head.lateral_convs.{i}", "level_{i}_lateral"),
        *unit("decode_head.fpn_convs.{i}", "level_{i}_conv"),
        *unit("decode_head.fpn_bottleneck", "levels_conv"),
        *torch.pointwise(f"decode_head.{classifier}", "head"),
        *unit("auxiliary_head.convs.0", "auxiliary_conv"),
        *torch.pointwise(f"auxiliary_head.{classifier}", "auxiliary_head"),
    ]


def _segmenter_layouts():
    """Those of `BEiTSegmenter`; the original is a model of mmsegmentation."""
    original = Names(original_encoder("backbone."), _segmenter_names("backbone.", "conv_seg"))
    hugging_face = Names(hugging_face_encoder(), _segmenter_names("", "classifier"))
    return {
        "state_dict/mmseg": original.under("state_dict/", ("meta/*", "optimizer/*")), "mmseg": original,
        "hugging-face": hugging_face,
    }  # fmt: skip


def _layouts():
    original = Names(
        original_encoder(),
        torch.norm("norm", "encoder_norm"),
        torch.norm("fc_norm", "fc_norm"),
        torch.linear("head", "head"),
    )
    hugging_face = Names(
        hugging_face_encoder(),
        torch.norm("beit.layernorm", "encoder_norm"),
        torch.norm("beit.pooler.layernorm", "fc_norm"),
        torch.linear("classifier", "head"),
    )
    return {**torch.spellings(original, "beit"), "hugging-face": hugging_face}


def _adapters(model, *, grid, resize_patches):
    """The lossy steps of loading into `model`; see `zoo.Family`."""
    tokens = model.get_layer("tokens")
    found = []
    if tokens.kind == "learned":
        found.append(adapt.Positions(tokens.grid, True, file_grid=grid, resample=adapt.resample_bicubic))
    for layer in model.layers:
        table = f"{layer.name}/relative_positions/table" if isinstance(layer, BEiTBlock) else f"{layer.name}/table"
        if isinstance(layer, RelativePositions) or getattr(layer, "relative_positions", None) is not None:
            found.append(adapt.RelativePositions(table, tokens.grid, grid))
    return found + ([adapt.PatchKernel(model.get_layer("patches").kernel.shape[:2])] if resize_patches else [])


def _encoder_sizes(shapes):
    """The builders' arguments that a file's shapes, {our name: shape}, say."""
    ph, pw, _, width = shapes["patches/kernel"]
    tables = {"block": "block_0/relative_positions/table", "shared": "relative_positions/table"}
    relative = next((kind for kind, table in tables.items() if table in shapes), None)
    sizes = dict(
        patch_size=ph if ph == pw else (ph, pw), width=width, depth=vit.depth(shapes), mlp=shapes["block_0/mlp/fc1/kernel"][1],
        relative_positions=relative, absolute_positions="tokens/positions" in shapes,
    )  # fmt: skip
    return sizes | ({"heads": shapes[tables[relative]][1]} if relative else {})


def _sizes(shapes):
    return _encoder_sizes(shapes) | {"classifier": "avg" if "fc_norm/gamma" in shapes else "token"}


def _masked_sizes(shapes):
    return _encoder_sizes(shapes) | {"norm_twice": "inner_norm/gamma" in shapes, "width": shapes["mask_token/token"][-1]}


def _segmenter_sizes(shapes):
    pools = len({name for name in shapes if name.startswith("pool_") and name.endswith("/conv/kernel")})
    found = {"pool_scales": (1, 2, 3, 6)} if pools == 4 else {}
    return _encoder_sizes(shapes) | found | {"width": shapes["levels_conv/conv/kernel"][-1]}


# Of images in evaluation: `_cfg` of modeling_finetune.py, and of timm for 384 and 512 pixels
PIXELS = Pixels(resize="bicubic", antialias=True, crop="center", crop_fraction=0.9)
ENCODER = dict(adapters=_adapters, grid=lambda model: model.get_layer("tokens").grid, pixels=PIXELS)
FAMILY = Family("BEiT", layouts=_layouts(), sizes=_sizes, **ENCODER)
MASKED = Family("BEiTMasked", layouts=_masked_layouts(), sizes=_masked_sizes, classifies=False, **ENCODER)
SEGMENTER = Family(
    "BEiTSegmenter", layouts=_segmenter_layouts(), sizes=_segmenter_sizes, classifies=False,
    **{**ENCODER, "pixels": Pixels(IMAGENET_MEAN, IMAGENET_STD)},  # as mmsegmentation gives images of ADE20K
)  # fmt: skip
ADE20K = 150  # classes
VOCABULARY = 8192  # of DALL-E's tokenizer, whose visual tokens the original guesses

# Sizes: arXiv 2106.08254 section 2.5; layer scale: README.md of microsoft/unilm/beit
SHARED = dict(relative_positions="block", absolute_positions=False, classifier="avg")
MU = dict(width=64, depth=2, heads=2, mlp=128, layer_scale=0.1)
B = dict(width=768, depth=12, heads=12, mlp=3072, layer_scale=0.1)
L = dict(width=1024, depth=24, heads=16, mlp=4096, layer_scale=1e-5)
LICENCE = "MIT, as its repository microsoft/unilm states"
RELEASES = "https://github.com/addf400/files/releases/download/v1.0"  # where its README links to
CLASSES_22K = 21_841  # of ImageNet-22k, in the paper's words: ImageNet-21k as a whole


def _record(source, classes=1000, resolution=224, **facts):
    pixels = PIXELS if resolution == 224 else dataclasses.replace(PIXELS, crop_fraction=1.0)
    return Weights(source, classes, "softmax", resolution, pixels=pixels, licence=LICENCE, **facts)


def _released(size, *resolutions, sizes):
    """{tag: record}: classifiers of ImageNet-21k, and of ImageNet-1k after it or straight after masked pre-training.

    Tags that end in "-hf" and "-timm" are the same weights in the repositories of Hugging Face and timm.

    Args:
        sizes: {tag: bytes as Hugging Face lists them}.
    """
    name, repository = f"beit_{size}_patch16", f"hf://microsoft/beit-{size}-patch16"
    found = {
        "imagenet21k": _record(f"{RELEASES}/{name}_224_pt22k_ft22k.pth", CLASSES_22K, tuned=True),
        "imagenet21k-hf": _record(f"{repository}-224-pt22k-ft22k/pytorch_model.bin", CLASSES_22K, tuned=True),
        "imagenet21k-timm": _record(f"hf://timm/{name}_224.in22k_ft_in22k/model.safetensors", CLASSES_22K, tuned=True),
        "imagenet1k": _record(f"{RELEASES}/{name}_224_pt22k_ft1k.pth", tuned=True),
    }
    for side in resolutions:
        tag, facts = f"imagenet21k+imagenet1k-{side}", dict(resolution=side, tuned=True)
        found[tag] = _record(f"{RELEASES}/{name}_{side}_pt22k_ft22kto1k.pth", **facts)
        found[f"{tag}-hf"] = _record(f"{repository}-{side}/pytorch_model.bin", **facts)
        found[f"{tag}-timm"] = _record(f"hf://timm/{name}_{side}.in22k_ft_in22k_in1k/model.safetensors", **facts)
    return {tag: dataclasses.replace(record, size=sizes.get(tag)) for tag, record in found.items()}


def _upstream(size, *resolutions):
    """{name in timm or at Hugging Face: tag}."""
    tags = {side: f"imagenet21k+imagenet1k-{side}" for side in resolutions}
    return {f"beit_{size}_patch16_{side}": tag for side, tag in tags.items()} | {
        f"microsoft/beit-{size}-patch16-{side}": f"{tag}-hf" for side, tag in tags.items()
    }


BEiT_mu = variant("BEiT_mu", BEiT, **MU, **SHARED, patch_size=8, resolution=32, params=144_824, macs=1_448_704)
BEiT_B16 = variant(
    "BEiT_B16", BEiT, **B, **SHARED, patch_size=16, params=86_530_984, macs=17_563_828_224,
    upstream=_upstream("base", 224, 384),
    weights=_released(
        "base", 224, 384,
        sizes={"imagenet21k-hf": 414_000_000, "imagenet21k-timm": 414_000_000, "imagenet21k+imagenet1k-224-timm": 350_000_000},
    ),
)  # fmt: skip
BEiT_L16 = variant(
    "BEiT_L16", BEiT, **L, **SHARED, patch_size=16, params=304_430_568, macs=61_554_712_576,
    upstream=_upstream("large", 224, 384, 512),
    weights=_released(
        "large", 224, 384, 512,
        sizes={
            "imagenet21k-hf": 1_310_000_000, "imagenet21k+imagenet1k-224-hf": 1_230_000_000,
            "imagenet21k+imagenet1k-384-hf": 1_280_000_000, "imagenet21k+imagenet1k-512-hf": 1_420_000_000,
        },
    ),
)  # fmt: skip

PRETRAINING = dict(relative_positions="shared", absolute_positions=False, classes=VOCABULARY)


def _masked(size, bytes_of_hugging_face=None):
    return {
        "imagenet21k": _record(f"{RELEASES}/beit_{size}_patch16_224_pt22k.pth", VOCABULARY),
        "imagenet21k-hf": _record(
            f"hf://microsoft/beit-{size}-patch16-224-pt22k/pytorch_model.bin", VOCABULARY, size=bytes_of_hugging_face
        ),
    }


BEiT_mu_masked = variant(
    "BEiT_mu_masked", BEiTMasked, **MU, **{**PRETRAINING, "classes": 64}, patch_size=8, resolution=32,
    params=83_944, macs=1_450_240,
)  # fmt: skip
BEiT_B16_masked = variant(
    "BEiT_B16_masked", BEiTMasked, **B, **PRETRAINING, patch_size=16, params=91_965_776, macs=18_796_185_600,
    upstream={"beit_base_patch16_224_8k_vocab": "imagenet21k", "microsoft/beit-base-patch16-224-pt22k": "imagenet21k-hf"},
    weights=_masked("base", 368_000_000),
)  # fmt: skip
BEiT_L16_masked = variant(
    "BEiT_L16_masked", BEiTMasked, **L, **PRETRAINING, patch_size=16, params=311_534_016, macs=63_197_855_744,
    upstream={"beit_large_patch16_224_8k_vocab": "imagenet21k", "microsoft/beit-large-patch16-224-pt22k": "imagenet21k-hf"},
    weights=_masked("large"),
)  # fmt: skip


def _segmenter(size, bytes_of_hugging_face):
    pixels = SEGMENTER.pixels
    original = _record(f"{RELEASES}/beit_{size}_patch16_640_pt22k_ft22ktoade20k.pth", ADE20K, 640, tuned=True)
    hugging_face = dataclasses.replace(
        original, source=f"hf://microsoft/beit-{size}-finetuned-ade-640-640/pytorch_model.bin", size=bytes_of_hugging_face
    )
    return {tag: dataclasses.replace(each, pixels=pixels) for tag, each in (("ade20k", original), ("ade20k-hf", hugging_face))}


BEiT_mu_segmenter = variant(
    "BEiT_mu_segmenter", BEiTSegmenter, **{**MU, "width": 32}, relative_positions="block", auxiliary=16, patch_size=8,
    classes=8, resolution=32, params=168_768, macs=14_200_960,
)  # fmt: skip
BEiT_B16_segmenter = variant(
    "BEiT_B16_segmenter", BEiTSegmenter, **B, relative_positions="block", patch_size=16, classes=ADE20K, resolution=640,
    params=163_428_460, macs=965_068_965_888,
    upstream={"upernet_beit_base_12_640": "ade20k", "microsoft/beit-base-finetuned-ade-640-640": "ade20k-hf"},
    weights=_segmenter("base", 900_000_000),
)  # fmt: skip
BEiT_L16_segmenter = variant(
    "BEiT_L16_segmenter", BEiTSegmenter, **L, relative_positions="block", patch_size=16, classes=ADE20K, resolution=640,
    params=441_298_220, macs=1_996_380_323_840,
    upstream={"upernet_beit_large_24_640": "ade20k", "microsoft/beit-large-finetuned-ade-640-640": "ade20k-hf"},
    weights=_segmenter("large", 2_260_000_000),
)  # fmt: skip
