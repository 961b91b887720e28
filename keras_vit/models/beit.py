"""BEiT: "BEiT: BERT Pre-Training of Image Transformers" (arXiv 2106.08254).

Weights: microsoft/unilm (`beit/`), also as Hugging Face's repositories microsoft/beit-* and timm's timm/beit_* have them.
"""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_vit import errors
from keras_vit.checkpoints import adapt
from keras_vit.checkpoints.dialects import torch
from keras_vit.checkpoints.names import Names, constant, rule
from keras_vit.checkpoints.transforms import Part, Turned
from keras_vit.checkpoints.weights import Weights
from keras_vit.data.pixels import Pixels
from keras_vit.layers import Block, ClassToken, MeanTokens, Patches, PatchGrid, PatchTokens, Tokens
from keras_vit.layers.taps import check_tap
from keras_vit.models import vit
from keras_vit.zoo import Contract, Family, builder, variant

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
    _check_choices(name, **chosen, relative_positions=(relative_positions, RELATIVE))
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


def _check_choices(name, **chosen):
    for argument, (value, allowed) in chosen.items():
        if value not in allowed:
            raise errors.ArgumentError(f"{name}: expected {argument} in {allowed}, got {value!r}.")


def _patches(top, name, width, patch_size):
    """The patches (b, h, w, width) of the model's images."""
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)

    def check(*size):
        if any(side % p for side, p in zip(size, patch)):
            nearest = tuple(max(round(side / p), 1) * p for side, p in zip(size, patch))
            raise errors.ArgumentError(
                f"{name}: an image of {size[0]} x {size[1]} cannot be cut into patches of {patch[0]} x {patch[1]}; the nearest "
                f"size is input_shape={(*nearest, 3)}."
            )

    return Patches(width, patch, name="patches")(top.images(_default_size(top, patch), check))


def _default_size(top, patch):
    """(H, W) where none is asked for: the record's, else that of the file's relative positions, else as a ViT's."""
    tables = [shape for name, shape in top.shapes.items() if name.endswith("relative_positions/table")]
    if tables and not (top.record.resolution or top.recorded_grid):
        side = (math.isqrt(max(tables[0][0] - 3, 1)) + 1) // 2
        return side * patch[0], side * patch[1]
    return vit.default_size(top, patch, class_token=True)


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
        *torch.norm(f"{block}.norm1", f"{ours}/attention_norm"),
        *(rule(f"{block}.attn.{part}_bias", f"{ours}/attention/qkv_bias", bias) for part, bias in zip("qv", _BIAS)),
        *torch.attention(f"{block}.attn", f"{ours}/attention", bias=False),
        *_relative_names(f"{block}.attn.", f"{ours}/relative_positions"),
        torch.param(f"{block}.gamma_1", f"{ours}/attention_scale/gamma"),
        *torch.norm(f"{block}.norm2", f"{ours}/mlp_norm"),
        *torch.mlp(f"{block}.mlp", f"{ours}/mlp"),
        torch.param(f"{block}.gamma_2", f"{ours}/mlp_scale/gamma"),
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


FAMILY = Family("BEiT", layouts=_layouts(), adapters=_adapters, grid=lambda model: model.get_layer("tokens").grid, sizes=_sizes)

# Sizes: arXiv 2106.08254 section 2.5; layer scale: README.md of microsoft/unilm/beit
SHARED = dict(relative_positions="block", absolute_positions=False, classifier="avg")
MU = dict(width=64, depth=2, heads=2, mlp=128, layer_scale=0.1)
B = dict(width=768, depth=12, heads=12, mlp=3072, layer_scale=0.1)
L = dict(width=1024, depth=24, heads=16, mlp=4096, layer_scale=1e-5)
LICENCE = "MIT, as its repository microsoft/unilm states"
RELEASES = "https://github.com/addf400/files/releases/download/v1.0"  # where its README links to
CLASSES_22K = 21_841  # of ImageNet-22k, in the paper's words: ImageNet-21k as a whole


def _record(source, classes=1000, resolution=224, **facts):
    """A file; images: `_cfg` of modeling_finetune.py, and of timm for 384 and 512 pixels."""
    crop = dict(crop="center", crop_fraction=0.9 if resolution == 224 else 1.0)
    pixels = Pixels(resize="bicubic", antialias=True, **crop)
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


BEiT_mu = variant("BEiT_mu", BEiT, **MU, **SHARED, patch_size=8, resolution=32, params=144_824, macs=1_448_704)
BEiT_B16 = variant(
    "BEiT_B16", BEiT, **B, **SHARED, patch_size=16, params=86_530_984, macs=17_563_828_224,
    upstream=("beit_base_patch16_224", "microsoft/beit-base-patch16-224"),
    weights=_released(
        "base", 224, 384,
        sizes={"imagenet21k-hf": 414_000_000, "imagenet21k-timm": 414_000_000, "imagenet21k+imagenet1k-224-timm": 350_000_000},
    ),
)  # fmt: skip
BEiT_L16 = variant(
    "BEiT_L16", BEiT, **L, **SHARED, patch_size=16, params=304_430_568, macs=61_554_712_576,
    upstream=("beit_large_patch16_224", "microsoft/beit-large-patch16-224"),
    weights=_released(
        "large", 224, 384, 512,
        sizes={
            "imagenet21k-hf": 1_310_000_000, "imagenet21k+imagenet1k-224-hf": 1_230_000_000,
            "imagenet21k+imagenet1k-384-hf": 1_280_000_000, "imagenet21k+imagenet1k-512-hf": 1_420_000_000,
        },
    ),
)  # fmt: skip
