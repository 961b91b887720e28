"""FlexiViT: one Vision Transformer for all patch sizes (arXiv 2212.08013).

Weights: google-research/big_vision (`gs://big_vision/flexivit`), with the wiring of its models/proj/flexi/vit.py. They are stored
at one patch size and one grid of positions, and resized from there, in the model, to the patch size that is used.
"""

import collections
import math
import numbers

import keras
import numpy as np
from keras import ops

from keras_vit import errors
from keras_vit.checkpoints.adapt import antialiased, pi_matrices
from keras_vit.checkpoints.weights import BIG_VISION_LICENCE, IMAGENET21K, google
from keras_vit.layers import Block, ClassToken, MapHead, MeanTokens, PatchTokens, Tokens
from keras_vit.layers.embed import resampled
from keras_vit.models import vit
from keras_vit.models.vit import POOLINGS, POSITIONS, B, L, S, depth
from keras_vit.zoo import Contract, Family, Model, builder, calls, check_choices, variant

CLASSIFIERS = ("token", "gap", "map")
RESOLUTION = 240  # pixels; divisible by all of PATCH_SIZES
PATCH_SIZES = (48, 40, 30, 24, 20, 16, 15, 12, 10, 8)  # drawn alike in training: configs/proj/flexivit/i21k_sup.py


@keras.saving.register_keras_serializable("keras_vit")
class FlexiPatches(keras.layers.Layer):
    """(b, H, W, c) -> (b, H // h, W // w, d): cuts the image into patches of any size and maps each linearly to d numbers.

    The kernel is kept at one patch size; each call names the one that it uses, to which it is brought by PI-resize (arXiv
    2212.08013, section 3.4), always from the kernel as it is kept. Pixels that fill no patch are left out.

    Args:
        width: d, the width of the tokens.
        stored_patch_size: (h, w) of the kernel as it is kept.
    """

    def __init__(self, width, stored_patch_size, **kwargs):
        super().__init__(**kwargs)
        self.width, self.stored_patch_size = width, stored_patch_size

    def build(self, input_shape):
        shape = (*self.stored_patch_size, input_shape[-1], self.width)
        normal = keras.initializers.RandomNormal(stddev=self.width**-0.5)
        # Read in float32 also where the model computes in half precision, since the resizing amplifies errors
        self.kernel = self.add_weight(shape=shape, initializer=normal, autocast=False, name="kernel")
        self.bias = self.add_weight(shape=(self.width,), initializer="zeros", name="bias")

    def kernel_at(self, patch_size):
        """(h, w, c, d): the kernel for patches of another size (h, w)."""
        stored, used = tuple(self.stored_patch_size), tuple(patch_size)
        return resampled(self.kernel, *pi_matrices(stored, used)) if used != stored else ops.convert_to_tensor(self.kernel)

    def call(self, x, patch_size):
        kernel = ops.cast(self.kernel_at(patch_size), x.dtype)
        return ops.conv(x, kernel, strides=tuple(patch_size), padding="valid", data_format="channels_last") + self.bias

    def compute_output_spec(self, x, patch_size):
        grid = (side and side // p for side, p in zip(x.shape[1:3], patch_size))
        return keras.KerasTensor((x.shape[0], *grid, self.width), dtype=self.compute_dtype)

    def multiply_adds(self, input_shape, patch_size):
        """ "conv" of one example (b, H, W, c)."""
        grid = (side // p for side, p in zip(input_shape[1:3], patch_size))
        return collections.Counter(conv=math.prod(grid) * math.prod(patch_size) * input_shape[-1] * self.width)

    def at(self, model, patch_size):
        """The model that this layer belongs to, at another patch size; see `at_patch_size`."""
        size, patch_size = self.input.shape[1:3], _pair(patch_size, "patch_size")
        _check_size(model.name, size, patch_size)

        def call(layer, *args, **kwargs):
            return layer(*args, **(kwargs | {"patch_size": patch_size} if layer is self else kwargs))

        graph = Model(model.input, model.output, name=model.name)  # without what the model was compiled with
        other = keras.models.clone_model(graph, clone_function=lambda layer: layer, call_function=call)
        other.remember(**model._facts)
        return other


@keras.saving.register_keras_serializable("keras_vit")
class FlexiTokens(Tokens):
    """(b, h, w, d) -> (b, n, d): `Tokens` on any grid; the class token has no position.

    The table of positions is kept for one grid and resized to another linearly, with antialiasing when shrinking. (The original
    compares lengths alone, so that it takes a table of 4 x 6 on a grid of 6 x 4 as it is.)

    Args:
        stored_grid: (h, w) of the table as it is kept.
        class_token, positions, stddev: see `Tokens`.
    """

    def __init__(self, stored_grid, class_token=True, positions="learned", stddev=0.02, **kwargs):
        super().__init__(class_token, False, positions, stddev, **kwargs)
        self.stored_grid = stored_grid

    def get_config(self):
        config = {**super().get_config(), "stored_grid": self.stored_grid}
        del config["class_position"]
        return config

    def build(self, input_shape):
        super().build((None, *self.stored_grid, input_shape[-1]))

    @staticmethod
    def line(old, new):
        return antialiased(old, new, np if isinstance(new, int) else ops)


@keras.saving.register_keras_serializable("keras_vit")
class GridOf(keras.layers.Layer):
    """(b, h * w, d), (b, h, w, ...) -> (b, h, w, d): tokens on the grid of the patches that they came from."""

    def call(self, x, patches):
        return ops.reshape(x, (-1, *patches.shape[1:3], x.shape[-1]))


@builder
def FlexiViT(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="auto",
    include_preprocessing=False,
    name="FlexiViT",
    *,
    width,
    depth,
    heads,
    mlp,
    patch_size=16,
    stored_patch_size=None,
    stored_grid=None,
    classifier="gap",
    positions="learned",
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0,
    flash_attention=None,
):
    """Builds a FlexiViT as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    The weights are the same at any patch size: one file, and one `.keras` model's weights, fit all. `at_patch_size` gives a built
    model at another one, and `keras_vit.training.flexible` trains it at many.

    Args:
        include_top: whether to end in the classifier (`head`, whose output are the logits, then the activation).
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file, or None for random weights. `"imagenet"`
            is the ImageNet-1k classifier.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), at least one patch; pixels that fill no patch are left out. By default the checkpoint's own
            resolution, else 240.
        pooling: without top: None gives the grid of patch tokens (b, h, w, width); "token" the class token, "avg" the mean of the
            patch tokens, "map" the attention pooling of classifier="map", (b, width).
        classes: outputs of the classifier; None takes the checkpoint's, or 1,000. Another number than the checkpoint's starts
            from a head of zeros.
        classifier_activation: "auto" is the checkpoint's own while its head is kept (softmax; sigmoid for ImageNet-21k), softmax
            otherwise; None for logits; or a Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        width, depth, heads, mlp: width of the tokens, number of blocks, heads in each, hidden width of their MLPs.
        patch_size: side of the patches that the model uses, in pixels, or (height, width). Smaller ones are more accurate and
            slower; those of `PATCH_SIZES` were trained on, at 240 pixels.
        stored_patch_size: patch size, a number or (height, width), at which the weights are kept and stored; None takes the
            checkpoint's, or 32.
        stored_grid: (h, w) of the table of positions as it is kept and stored; None takes the checkpoint's, or (7, 7).
        classifier: what the head reads: "token", "gap" (mean over all tokens, no class token) or "map" (attention pooling, no
            class token; `keras_vit.layers.MapHead`).
        positions: "learned", or the fixed "sincos2d".
        dropout_rate: after positions, attention and in MLPs. attention_dropout_rate: on attention weights.
        stochastic_depth_rate: probability of skipping a residual branch in the last block, growing linearly from 0.
        flash_attention: see `keras_vit.layers.Attention`.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    check_choices(name, classifier=(classifier, CLASSIFIERS), pooling=(pooling, POOLINGS), positions=(positions, POSITIONS))
    class_token = classifier == "token"
    if not include_top and pooling in ("token", "map") and pooling != classifier:
        raise errors.ArgumentError(f"{name}: pooling={pooling!r} needs what classifier={classifier!r} has not; use 'avg'.")
    patch_size = _pair(patch_size, "patch_size")
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)

    stored_patch_size, stored_grid = _stored(top, stored_patch_size, stored_grid)
    side = top.record and top.record.resolution or RESOLUTION
    x = top.images((side, side), lambda h, w: _check_size(name, (h, w), patch_size))
    x = patches = FlexiPatches(width, stored_patch_size, name="patches")(x, patch_size=patch_size)
    x = FlexiTokens(stored_grid, class_token, positions, width**-0.5, name="tokens")(x)
    x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    for i in range(depth):
        drop_path_rate = stochastic_depth_rate * i / max(depth - 1, 1)
        x = Block(heads, mlp, dropout_rate, attention_dropout_rate, drop_path_rate, flash_attention, name=f"block_{i}")(x)
    x = keras.layers.LayerNormalization(epsilon=1e-6, name="encoder_norm")(x)

    reads = {"gap": "avg"}.get(classifier, classifier) if include_top else pooling
    if reads == "token":
        x = ClassToken(name="class_token")(x)
    elif class_token:
        x = PatchTokens(name="patch_tokens")(x)
    if reads == "avg":
        x = MeanTokens(name="mean_tokens")(x)
    if reads == "map":
        x = MapHead(heads, mlp, name="map_head")(x)
    if reads is None:
        x = GridOf(name="patch_grid")(x, patches)
    return top.model(top.top(x) if include_top else x, name)


def at_patch_size(model, patch_size):
    """A FlexiViT at another patch size: a functional model that calls the same layers again, so that all weights are shared.

    Args:
        model: built by `FlexiViT` or one of its variants, for images of its size.
        patch_size: side of the patches in pixels, or (height, width).

    Raises:
        errors.ArgumentError: the model is none, or its images have no such patch.
    """
    patches = [layer for layer in model.layers if isinstance(layer, FlexiPatches)] if isinstance(model, Model) else []
    if len(patches) != 1:
        raise errors.ArgumentError(f"at_patch_size: expected a model built by FlexiViT, got {model!r}; pass the model itself.")
    return patches[0].at(model, patch_size)


def _pair(value, argument):
    """(h, w) of a whole number or two."""
    pair = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(n, numbers.Integral) and n > 0 for n in pair):
        raise errors.ArgumentError(f"FlexiViT: {argument} must be a whole number above 0, or (height, width), got {value!r}.")
    return tuple(map(int, pair))


def _stored(top, patch_size, grid):
    """(patch size, grid) at which the weights are kept: as asked for, else the checkpoint's, else those of the released files."""
    kernel, table = top.stored("patches/kernel"), top.stored("tokens/positions")
    if patch_size is None:
        patch_size = kernel[:2] if kernel and len(kernel) == 4 else 32
    if grid is None:
        side = math.isqrt(table[1]) if table and len(table) == 3 else 7
        grid = top.recorded_grid or (side, side)
    return _pair(patch_size, "stored_patch_size"), _pair(grid, "stored_grid")


def _check_size(name, size, patch_size):
    if min(size[0] // patch_size[0], size[1] // patch_size[1]) == 0:
        raise errors.ArgumentError(
            f"{name}: an image of {size[0]} x {size[1]} has no patch of {patch_size[0]} x {patch_size[1]}; choose a smaller "
            "patch_size or a larger input_shape."
        )


class _AsStored:
    """Refuses a file that keeps its weights at another patch size or grid than the model."""

    names = ("patches/kernel", "tokens/positions")

    def __init__(self, patch_size, grid, file_grid):
        self.patch_size, self.grid, self.file_grid = tuple(patch_size), tuple(grid), file_grid

    def plan(self, shapes):
        kernel, table = (shapes.get(name) for name in self.names)
        recorded = self.file_grid not in (None, "square")
        other_grid = table and (table[1:2] != (math.prod(self.grid),) or (recorded and tuple(self.file_grid) != self.grid))
        if other_grid or (kernel and kernel[:2] != self.patch_size):
            raise errors.CheckpointMismatchError(
                f"{' and '.join(self.names)}: the file keeps arrays of {kernel} and {table}"
                f"{f', a grid of {self.file_grid}' if recorded else ''}, the model patches of {self.patch_size} and a grid of "
                f"{self.grid}. Build it with the file's own stored_patch_size and stored_grid, or resample the file with "
                "load_weights(..., resize_patches=True)"
            )
        return shapes, None


def adapters(model, *, grid, resize_patches):
    """The lossy steps of loading into `model`; see `zoo.Family`."""
    if resize_patches:
        return vit.adapters(model, grid=grid, resize_patches=True)
    patches, tokens = model.get_layer("patches"), model.get_layer("tokens")
    return [_AsStored(patches.stored_patch_size, tokens.grid, grid)]


def _sizes(shapes):
    """The builder's arguments that a file's shapes, {our name: shape}, say."""
    (h, w, _, width), query = shapes["patches/kernel"], shapes["block_0/attention/qkv_kernel"]
    found = dict(
        stored_patch_size=h if h == w else (h, w), width=width, depth=depth(shapes), heads=query[1],
        mlp=shapes["block_0/mlp/fc1/kernel"][1], positions="sincos2d",
        classifier="map" if "map_head/probe" in shapes else "token" if "tokens/cls" in shapes else "gap",
    )  # fmt: skip
    if "tokens/positions" in shapes:
        side = math.isqrt(shapes["tokens/positions"][1])
        if side**2 != shapes["tokens/positions"][1]:
            raise KeyError("tokens/positions: no square grid without a class token")
        found |= dict(positions="learned", stored_grid=(side, side))
    return found


def _any_size(model):
    (patch_size,) = (options["patch_size"] for layer, _, options in calls(model) if isinstance(layer, FlexiPatches))
    return tuple(patch_size), (1, 1)


FAMILY = Family(
    "FlexiViT",
    layouts=vit.layouts(),
    adapters=adapters,
    grid=lambda model: model.get_layer("tokens").grid,
    sizes=_sizes,
    written=lambda model: "params/linen-posemb-on-top",
    any_size=_any_size,
)


def _released(size, *i21k, **baselines):
    """The ImageNet-1k files of a model by epochs, 1,200 without a number; those of ImageNet-21k; and other files by tag."""
    files = {"i1k": f"flexivit_{size}_i1k"}
    files |= {f"i1k-{epochs}ep": f"flexivit_{size}_i1k_{epochs}ep" for epochs in (90, 300, 600)}
    files |= {f"i21k-{epochs}ep": f"flexivit_{size}_i21k_{epochs}ep" for epochs in i21k}
    files |= {tag.replace("_", "-"): file for tag, file in baselines.items()}
    return {
        tag: google(
            f"flexivit/{file}", bucket="big_vision", licence=BIG_VISION_LICENCE, resolution=RESOLUTION,
            classes=IMAGENET21K if "i21k" in tag else 1000,
        )
        for tag, file in files.items()
    }  # fmt: skip


# Sizes are those of ViT; what is stored (patches of 32 on a grid of 7 x 7): arXiv 2212.08013, figure 17; the class token:
# configs/proj/flexivit of the original
FlexiViT_mu = variant(
    "FlexiViT_mu", FlexiViT, width=32, depth=2, heads=2, mlp=64, patch_size=8, stored_patch_size=8, stored_grid=(4, 4),
    classifier="token", resolution=32, params=56_872, macs=445_824,
)  # fmt: skip
FlexiViT_S = variant(
    "FlexiViT_S", FlexiViT, **S, classifier="token", resolution=RESOLUTION,
    params=22_878_568, macs=5_336_263_680, upstream=("flexivit_small",),
    weights=_released("s"),
)  # fmt: skip
# The last two are plain ViTs, kept at the same sizes, for patch_size=16 and patch_size=30 only
FlexiViT_B = variant(
    "FlexiViT_B", FlexiViT, **B, classifier="token", resolution=RESOLUTION,
    params=88_223_464, macs=20_270_143_488, upstream=("flexivit_base",),
    weights=_released("b", 90, 300, 1000, i21k_vit_b16="vit_b16_i21k_300ep", i21k_vit_b30="vit_b30_i21k_300ep"),
)  # fmt: skip
FlexiViT_L = variant(
    "FlexiViT_L", FlexiViT, **L, classifier="token", resolution=RESOLUTION,
    params=306_534_376, macs=70_938_173_440, upstream=("flexivit_large",),
    weights=_released("l"),
)  # fmt: skip
