"""Vision Transformer: "An Image is Worth 16x16 Words" (arXiv 2010.11929).

Weights: google-research/vision_transformer (`gs://vit_models`), among them those of "How to train your ViT?" (AugReg, arXiv
2106.10270), SAM (2106.01548) and GSAM (2203.08065).
"""

import math

import keras

from keras_vit import errors
from keras_vit.checkpoints import augreg
from keras_vit.checkpoints.adapt import Positions
from keras_vit.checkpoints.dialects import flax
from keras_vit.checkpoints.names import Names
from keras_vit.checkpoints.weights import IMAGENET21K, google
from keras_vit.layers import Block, ClassToken, MeanTokens, Patches, PatchGrid, PatchTokens, Tokens
from keras_vit.zoo import Contract, Family, variant

CLASSIFIERS = ("token", "gap", "unpooled", "token_unpooled")
POOLINGS = (None, "token", "avg")


def ViT(
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="auto",
    include_preprocessing=False,
    name="ViT",
    *,
    patch_size,
    width,
    depth,
    heads,
    mlp,
    classifier="token",
    representation_size="auto",
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0,
    flash_attention=None,
):
    """Builds a Vision Transformer as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    Args:
        include_top: whether to end in the classifier (`head`, whose output are the logits, then the activation).
        weights: a tag of `keras_vit.list_weights`, an AugReg file name, a path or URL of an original `.npz`, or None for random
            weights. `"imagenet"` is the ImageNet-1k classifier nearest to the resolution asked for.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), multiples of the patch; by default the checkpoint's own resolution, else 224.
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
        patch_size: side of a patch in pixels, or (height, width).
        width, depth, heads, mlp: width of the tokens, number of blocks, heads in each, hidden width of their MLPs.
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
    if classifier not in CLASSIFIERS or pooling not in POOLINGS:
        raise errors.ArgumentError(
            f"{name}: expected classifier in {CLASSIFIERS} and pooling in {POOLINGS}, got {classifier!r} and {pooling!r}."
        )
    class_token = classifier in ("token", "token_unpooled")
    if not include_top and pooling == "token" and not class_token:
        raise errors.ArgumentError(f"{name}: pooling='token' needs a class token, classifier={classifier!r} has none; use 'avg'.")
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)
    if representation_size == "auto":
        representation_size = (top.stored("pre_logits/kernel") or [None])[-1]

    x = top.images(_size(top, patch, class_token), lambda h, w: _check_size(name, (h, w), patch))
    x = Patches(width, patch, name="patches")(x)
    grid = x.shape[1:3]
    x = Tokens(class_token, name="tokens")(x)
    x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    for i in range(depth):
        drop_path_rate = stochastic_depth_rate * i / max(depth - 1, 1)
        x = Block(heads, mlp, dropout_rate, attention_dropout_rate, drop_path_rate, flash_attention, name=f"block_{i}")(x)
    x = keras.layers.LayerNormalization(epsilon=1e-6, name="encoder_norm")(x)

    if (classifier if include_top else pooling) == "token":
        x = ClassToken(name="class_token")(x)
    elif not include_top and class_token and (pooling == "avg" or classifier == "token"):
        x = PatchTokens(name="patch_tokens")(x)
    if (classifier == "gap") if include_top else (pooling == "avg"):
        x = MeanTokens(name="mean_tokens")(x)
    if not include_top and pooling is None and classifier != "token_unpooled":
        x = PatchGrid(grid, name="patch_grid")(x)
    if representation_size is not None and (include_top or pooling):
        x = keras.layers.Dense(representation_size, kernel_initializer="lecun_normal", name="pre_logits")(x)
        x = keras.layers.Activation("tanh", name="pre_logits_tanh")(x)
    return top.model(top.top(x) if include_top else x, name)


def _check_size(name, size, patch):
    if size[0] % patch[0] or size[1] % patch[1]:
        nearest = tuple(max(round(side / p), 1) * p for side, p in zip(size, patch))
        raise errors.ArgumentError(
            f"{name}: an image of {size[0]} x {size[1]} cannot be cut into patches of {patch[0]} x {patch[1]}; the nearest size "
            f"is input_shape={(*nearest, 3)}."
        )


def _size(top, patch, class_token):
    """(H, W) of the input where none is asked for: the record's, else that of the file's table of positions, else 224."""
    if top.record and top.record.resolution:
        return (top.record.resolution,) * 2
    grid, positions = top.recorded_grid, top.stored("tokens/positions")
    if grid is None and positions and len(positions) == 3 and positions[1] > class_token:
        grid = (math.isqrt(positions[1] - class_token),) * 2
    return (grid[0] * patch[0], grid[1] * patch[1]) if grid else (224, 224)


def _names(norm_1, attention, norm_2, mlp):
    block = "Transformer/encoderblock_{i}"
    return Names(
        flax.conv("embedding", "patches"),
        flax.param("cls", "tokens/cls"),
        flax.param("Transformer/posembed_input/pos_embedding", "tokens/positions"),
        flax.norm(f"{block}/{norm_1}", "block_{i}/attention_norm"),
        flax.attention(f"{block}/{attention}", "block_{i}/attention"),
        flax.norm(f"{block}/{norm_2}", "block_{i}/mlp_norm"),
        flax.dense(f"{block}/{mlp}/Dense_0", "block_{i}/mlp/fc1"),
        flax.dense(f"{block}/{mlp}/Dense_1", "block_{i}/mlp/fc2"),
        flax.norm("Transformer/encoder_norm", "encoder_norm"),
        flax.dense("pre_logits", "pre_logits"),
        flax.dense("head", "head"),
    )


def _adapters(model, file_grid):
    tokens = model.get_layer("tokens")
    return {"tokens/positions": Positions("tokens/positions", tokens.grid, tokens.class_token, file_grid)}


NAMES = {
    "pre-linen": _names("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
    "linen": _names("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
}
ROOTS = ("", "params/", "opt/target/")  # bare as released, and as training jobs of the original store them

FAMILY = Family(
    "ViT",
    layouts={f"{root}{style}": names.under(root) for root in ROOTS for style, names in NAMES.items()},
    adapters=_adapters,
    grid=lambda model: model.get_layer("tokens").grid,
)

# Sizes: arXiv 2010.11929 Table 1 and 2106.10270 Table 2; dropout of L/16 and H/14: configs/models.py of the original
MU = dict(width=64, depth=2, heads=2, mlp=128)
TI = dict(width=192, depth=12, heads=3, mlp=768)
S = dict(width=384, depth=12, heads=6, mlp=1536)
B = dict(width=768, depth=12, heads=12, mlp=3072)
L = dict(width=1024, depth=24, heads=16, mlp=4096)
H = dict(width=1280, depth=32, heads=16, mlp=5120)


def _imagenet21k(file, mib):
    return {"imagenet21k": google(f"imagenet21k/{file}", mib, classes=IMAGENET21K)}


def _imagenet2012(file, mib, resolution=384):
    tag = "imagenet21k+imagenet2012" + ("-224" if resolution == 224 else "")
    return {tag: google(f"imagenet21k+imagenet2012/{file}", mib, resolution=resolution, tuned=True)}


def _sam(file, mib):
    return {"sam": google(f"sam/{file}", mib)}


def _augreg(name, mib, *tuned):
    """The recommended ImageNet-21k file of a model, and its ImageNet-1k classifiers at 384 and 224."""
    found = {"augreg": augreg.weights(name, mib)}
    for file in tuned:
        record = augreg.weights(file)
        found["augreg+imagenet2012" + ("-224" if record.resolution == 224 else "")] = record
    return found


# Parameter counts: models_test.py of the original
ViT_mu = variant("ViT_mu", ViT, **MU, patch_size=8, resolution=32, params=145_576)
ViT_Ti16 = variant(
    "ViT_Ti16", ViT, **TI, patch_size=16, params=5_717_416, upstream=("ViT-Ti_16",),
    weights=_augreg(
        "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", 37,
        "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
        "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    ),
)  # fmt: skip
ViT_S16 = variant(
    "ViT_S16", ViT, **S, patch_size=16, params=22_050_664, upstream=("ViT-S_16",),
    weights=_sam("ViT-S_16", 252.57) | _augreg(
        "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", 115,
        "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
        "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    ),
)  # fmt: skip
ViT_S32 = variant(
    "ViT_S32", ViT, **S, patch_size=32, params=22_878_952, upstream=("ViT-S_32",),
    weights=_augreg(
        "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0", 118,
        "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
        "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224",
    ),
)  # fmt: skip
ViT_B8 = variant(
    "ViT_B8", ViT, **B, patch_size=8, params=86_576_872, upstream=("ViT-B_8",),
    weights=_imagenet21k("ViT-B_8", 393.72) | _imagenet2012("ViT-B_8", 334.78) | _augreg(
        "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0", None,
        "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    ),
)  # fmt: skip
ViT_B16 = variant(
    "ViT_B16", ViT, **B, patch_size=16, params=86_567_656, upstream=("ViT-B_16",),
    weights=_imagenet21k("ViT-B_16", 393.69) | _imagenet2012("ViT-B_16", 331.4) | _imagenet2012("ViT-B_16-224", 330.29, 224)
    | _sam("ViT-B_16", 330.3) | {"gsam": google("gsam/ViT-B_16")} | _augreg(
        "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", 391,
        "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
        "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224",
    ),
)  # fmt: skip
ViT_B32 = variant(
    "ViT_B32", ViT, **B, patch_size=32, params=88_224_232, upstream=("ViT-B_32",),
    weights=_imagenet21k("ViT-B_32", 400.01) | _imagenet2012("ViT-B_32", 336.89) | _sam("ViT-B_32", 336.61) | _augreg(
        "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", 398,
        "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
        "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    ),
)  # fmt: skip
ViT_L16 = variant(
    "ViT_L16", ViT, **L, patch_size=16, dropout_rate=0.1, params=304_326_632, upstream=("ViT-L_16",),
    weights=_imagenet21k("ViT-L_16", 1.22 * 1024) | _imagenet2012("ViT-L_16", 1.14 * 1024)
    | _imagenet2012("ViT-L_16-224", 1.13 * 1024, 224) | _sam("ViT-L_16", 1.13 * 1024) | _augreg(
        "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0", 1243,
        "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
        "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224",
    ),
)  # fmt: skip
ViT_L32 = variant(
    "ViT_L32", ViT, **L, patch_size=32, params=306_535_400, upstream=("ViT-L_32",),
    weights=_imagenet21k("ViT-L_32", 1.23 * 1024) | _imagenet2012("ViT-L_32", 1.14 * 1024) | _sam("ViT-L_32", 1.14 * 1024),
)  # fmt: skip
ViT_H14 = variant(
    "ViT_H14", ViT, **H, patch_size=14, dropout_rate=0.1, params=632_045_800, upstream=("ViT-H_14",),
    weights=_imagenet21k("ViT-H_14", 2.46 * 1024),
)  # fmt: skip
GAP = dict(classifier="gap", representation_size=None)
ViT_S16_gap = variant("ViT_S16_gap", ViT, **S, patch_size=16, **GAP, params=22_049_896, upstream=("ViT-S_16-gap-norep",))
ViT_S32_gap = variant("ViT_S32_gap", ViT, **S, patch_size=32, **GAP, params=22_878_184, upstream=("ViT-S_32-gap-norep",))
ViT_B16_gap = variant("ViT_B16_gap", ViT, **B, patch_size=16, **GAP, params=86_566_120, upstream=("ViT-B_16-gap-norep",))
ViT_B32_gap = variant("ViT_B32_gap", ViT, **B, patch_size=32, **GAP, params=88_222_696, upstream=("ViT-B_32-gap-norep",))
