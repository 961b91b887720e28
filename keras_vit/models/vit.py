"""Vision Transformer: "An Image is Worth 16x16 Words" (arXiv 2010.11929).

Weights: google-research/vision_transformer (`gs://vit_models`), among them those of "How to train your ViT?" (AugReg, arXiv
2106.10270), SAM (2106.01548) and GSAM (2203.08065); google-research/big_vision (`gs://big_vision`; rows that end in `_bv`):
"Better plain ViT baselines" (2205.01580), converted DeiT III (2204.07118), image towers of SigLIP (2303.15343) and SigLIP 2
(2502.14786).
"""

import math

import keras

from keras_vit import errors
from keras_vit.checkpoints import augreg
from keras_vit.checkpoints.adapt import PatchKernel, Positions
from keras_vit.checkpoints.dialects import flax
from keras_vit.checkpoints.names import Names
from keras_vit.checkpoints.weights import BIG_VISION_LICENCE, IMAGENET21K, google
from keras_vit.layers import Block, ClassToken, MapHead, MeanTokens, Patches, PatchGrid, PatchTokens, Tokens
from keras_vit.zoo import Contract, Family, builder, check_choices, variant

CLASSIFIERS = ("token", "gap", "map", "unpooled", "token_unpooled")
POOLINGS = (None, "token", "avg", "map")
POSITIONS = ("learned", "sincos2d")
STYLES = ("vision_transformer", "big_vision")


@builder
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
    positions="learned",
    style="vision_transformer",
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0,
    flash_attention=None,
):
    """Builds a Vision Transformer as a functional `keras.Model`: images (b, H, W, 3) -> scores (b, classes).

    Args:
        include_top: whether to end in the classifier (`head`, whose output are the logits, then the activation).
        weights: a tag of `keras_vit.list_weights`, an AugReg file name, a path or URL of an original file, or None for random
            weights. `"imagenet"` is the ImageNet-1k classifier nearest to the resolution asked for.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), multiples of the patch (any size in style "big_vision"); by default the checkpoint's own
            resolution, else 224.
        pooling: without top: None gives the grid of patch tokens (b, h, w, width), or all tokens (b, 1 + n, width) with
            classifier="token_unpooled"; "token" the class token, "avg" the mean of the patch tokens, "map" the attention pooling
            of classifier="map", (b, width) or (b, representation_size).
        classes: outputs of the classifier; None takes the checkpoint's, or 1,000. Another number than the checkpoint's starts
            from a head of zeros.
        classifier_activation: "auto" is the checkpoint's own while its head is kept (softmax; sigmoid for ImageNet-21k), softmax
            otherwise; None for logits; or a Keras activation.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        patch_size: side of a patch in pixels, or (height, width).
        width, depth, heads, mlp: width of the tokens, number of blocks, heads in each, hidden width of their MLPs.
        classifier: what the head reads: "token", "gap" (mean over all tokens, no class token), "map" (attention pooling, no class
            token; `keras_vit.layers.MapHead`), or every token: "unpooled" and "token_unpooled" (b, n, classes).
        representation_size: width of a tanh layer `pre_logits` before the head; None for none; "auto" as in the checkpoint.
        positions: "learned", or the fixed "sincos2d".
        style: whose wiring: in "big_vision" the class token has no position, and pixels that fill no patch are left out.
        dropout_rate: after positions, attention and in MLPs. attention_dropout_rate: on attention weights.
        stochastic_depth_rate: probability of skipping a residual branch in the last block, growing linearly from 0.
        flash_attention: see `keras_vit.layers.Attention`.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    check_choices(
        name, classifier=(classifier, CLASSIFIERS), pooling=(pooling, POOLINGS), positions=(positions, POSITIONS),
        style=(style, STYLES),
    )  # fmt: skip
    class_token = classifier in ("token", "token_unpooled")
    if not include_top and ((pooling == "token" and not class_token) or (pooling == "map" and classifier != "map")):
        raise errors.ArgumentError(f"{name}: pooling={pooling!r} needs what classifier={classifier!r} has not; use 'avg'.")
    big_vision = style == "big_vision"
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    top = Contract(FAMILY, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing)
    if representation_size == "auto":
        representation_size = (top.stored("pre_logits/kernel") or [None])[-1]

    x = top.images(default_size(top, patch, class_token), lambda h, w: check_size(name, (h, w), patch, drop=big_vision))
    x = Patches(width, patch, name="patches")(x)
    grid = x.shape[1:3]
    x = Tokens(class_token, not big_vision, positions, width**-0.5 if big_vision else 0.02, name="tokens")(x)
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
    if reads == "map":
        x = MapHead(heads, mlp, name="map_head")(x)
    if not include_top and pooling is None and classifier != "token_unpooled":
        x = PatchGrid(grid, name="patch_grid")(x)
    if representation_size is not None and (include_top or pooling):
        x = keras.layers.Dense(representation_size, kernel_initializer="lecun_normal", name="pre_logits")(x)
        x = keras.layers.Activation("tanh", name="pre_logits_tanh")(x)
    return top.model(top.top(x) if include_top else x, name)


def check_size(name, size, patch, drop=False):
    """Raises ArgumentError for an image that is no whole number of patches, or, where `drop` drops the rest, that has none."""
    if min(size[0] // patch[0], size[1] // patch[1]) and (drop or not (size[0] % patch[0] or size[1] % patch[1])):
        return
    nearest = tuple(max(round(side / p), 1) * p for side, p in zip(size, patch))
    raise errors.ArgumentError(
        f"{name}: an image of {size[0]} x {size[1]} cannot be cut into patches of {patch[0]} x {patch[1]}; the nearest size "
        f"is input_shape={(*nearest, 3)}."
    )


def default_size(top, patch, class_token, under=""):
    """(H, W) of the input where none is asked for: the record's, else that of the file's table of positions, else 224.

    Args:
        top: the `Contract`. patch: (height, width) in pixels of the image for each position. under: what our names of the
            weights begin with.
    """
    if top.record and top.record.resolution:
        return (top.record.resolution,) * 2
    grid, positions = top.recorded_grid, top.stored(f"{under}tokens/positions")
    if grid is None and positions and len(positions) == 3 and positions[1] > class_token:
        side = math.isqrt(positions[1])  # with or without a row for the class token
        grid = (side, side)
    return (grid[0] * patch[0], grid[1] * patch[1]) if grid else (224, 224)


STYLES_OF_BLOCKS = {
    "pre-linen": ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
    "linen": ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
}
# Where an original keeps its table: in a module of its own (google-research/vision_transformer), in the encoder (big_vision
# before 2022), or on top
POSITION_NAMES = {
    "": "Transformer/posembed_input/pos_embedding", "-posemb-in-encoder": "Transformer/pos_embedding",
    "-posemb-on-top": "pos_embedding",
}  # fmt: skip
# Where all arrays of a file lie, and what lies beside them: bare as released; as training jobs store them; one of two towers
ROOTS = {
    "": (), "params/": (), "opt/target/": ("opt/state/*",), "img/": ("txt/*", "t", "b"),
    "params/img/": ("params/txt/*", "params/t", "params/b"),
}  # fmt: skip


def encoder_names(norm_1, attention, norm_2, mlp, encoder="Transformer", head="head"):
    """The rules of blocks, the norm after them and the classifier, which the descendants of ViT share."""
    block = f"{encoder}/encoderblock_{{i}}"
    return [
        *flax.norm(f"{block}/{norm_1}", "block_{i}/attention_norm"),
        *flax.attention(f"{block}/{attention}", "block_{i}/attention"),
        *flax.norm(f"{block}/{norm_2}", "block_{i}/mlp_norm"),
        *flax.mlp(f"{block}/{mlp}", "block_{i}/mlp"),
        *flax.norm(f"{encoder}/encoder_norm", "encoder_norm"),
        *flax.dense("pre_logits", "pre_logits"),
        *flax.dense("head", head),
    ]


def stem_names(positions):
    """The rules of patches, class token and the table of positions, kept under the name `positions`."""
    return [*flax.conv("embedding", "patches"), flax.param("cls", "tokens/cls"), flax.param(positions, "tokens/positions")]


def map_names(under):
    """The rules of the attention pooling, kept under `under`."""
    return [
        flax.param(f"{under}probe", "map_head/probe"),
        *flax.attention(f"{under}MultiHeadDotProductAttention_0", "map_head/attention"),
        *flax.norm(f"{under}LayerNorm_0", "map_head/norm"),
        *flax.mlp(f"{under}MlpBlock_0", "map_head/mlp"),
    ]


def layouts():
    """{layout: Names} of every spelling in which ViTs of both repositories were released."""
    found = {}
    for root, beside in ROOTS.items():
        for inlined, under in {"": "MAPHead_0/", "-inlined-map": ""}.items():
            for where, positions in POSITION_NAMES.items():
                for style, blocks in STYLES_OF_BLOCKS.items():
                    names = Names(stem_names(positions), encoder_names(*blocks), map_names(under))
                    found[f"{root}{style}{where}{inlined}"] = names.under(root, beside)
                stacked = names.stacked("Transformer/encoderblock_{i}/", "Transformer/encoderblock/")  # of linen, the last
                found[f"{root}scan{where}{inlined}"] = stacked.under(root, beside)
    return found


def adapters(model, *, grid, resize_patches):
    """The lossy steps of loading into `model`; see `zoo.Family`."""
    tokens, patches = model.get_layer("tokens"), model.get_layer("patches")
    return [
        Positions(tokens.grid, tokens.class_token, tokens.class_position, grid),
        *([PatchKernel(patches.kernel.shape[:2])] if resize_patches else []),
    ]


def _sizes(shapes):
    """The builder's arguments that a file's shapes, {our name: shape}, say."""
    (ph, pw, _, width), query = shapes["patches/kernel"], shapes["block_0/attention/qkv_kernel"]
    tokens = "map" if "map_head/probe" in shapes else "token" if "tokens/cls" in shapes else "gap"
    return dict(
        patch_size=ph if ph == pw else (ph, pw), width=width, depth=depth(shapes), heads=query[1],
        mlp=shapes["block_0/mlp/fc1/kernel"][1], classifier=tokens,
        positions="learned" if "tokens/positions" in shapes else "sincos2d",
    )  # fmt: skip


def depth(shapes):
    """How many blocks {our name: shape} has."""
    return len({name.partition("/")[0] for name in shapes if name.startswith("block_")})


def _any_size(model):
    patch = tuple(model.get_layer("patches").kernel_size)
    return patch, patch if model.get_layer("tokens").class_position else (1, 1)  # style "big_vision" leaves pixels out


def _written(model):
    return "pre-linen" if model.get_layer("tokens").class_position else "linen-posemb-on-top"


FAMILY = Family(
    "ViT",
    layouts=layouts(),
    adapters=adapters,
    grid=lambda model: model.get_layer("tokens").grid,
    sizes=_sizes,
    written=_written,
    any_size=_any_size,
)

# Sizes: arXiv 2010.11929 Table 1 and 2106.10270 Table 2; dropout of L/16 and H/14: configs/models.py of the original
MU = dict(width=64, depth=2, heads=2, mlp=128)
TI = dict(width=192, depth=12, heads=3, mlp=768)
S = dict(width=384, depth=12, heads=6, mlp=1536)
B = dict(width=768, depth=12, heads=12, mlp=3072)
L = dict(width=1024, depth=24, heads=16, mlp=4096)
H = dict(width=1280, depth=32, heads=16, mlp=5120)


def imagenet21k(file, mib):
    return {"imagenet21k": google(f"imagenet21k/{file}", mib, classes=IMAGENET21K)}


def imagenet2012(file, mib, resolution=384):
    tag = "imagenet21k+imagenet2012" + ("-224" if resolution == 224 else "")
    return {tag: google(f"imagenet21k+imagenet2012/{file}", mib, resolution=resolution, tuned=True)}


def _sam(file, mib):
    return {"sam": google(f"sam/{file}", mib)}


def augreg_files(name, *others):
    """The recommended ImageNet-21k file of a model ("B/16"), its ImageNet-1k classifier, and that of another resolution."""
    pick = augreg.RECOMMENDED[name]
    found = {"augreg": augreg.weights(pick.filename, pick.mib)}
    for file in (pick.file, *others):
        record = augreg.weights(file)
        found["augreg+imagenet2012" + ("-224" if record.resolution == 224 else "")] = record
    return found


# Parameter counts: models_test.py of the original
ViT_mu = variant("ViT_mu", ViT, **MU, patch_size=8, resolution=32, params=145_576, macs=1_448_704)
ViT_Ti16 = variant(
    "ViT_Ti16", ViT, **TI, patch_size=16, params=5_717_416, macs=1_253_683_200, upstream=("ViT-Ti_16",),
    weights=augreg_files(
        "Ti/16", "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"
    ),
)  # fmt: skip
ViT_S16 = variant(
    "ViT_S16", ViT, **S, patch_size=16, params=22_050_664, macs=4_598_882_304, upstream=("ViT-S_16",),
    weights=_sam("ViT-S_16", 252.57) | augreg_files(
        "S/16", "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"
    ),
)  # fmt: skip
ViT_S32 = variant(
    "ViT_S32", ViT, **S, patch_size=32, params=22_878_952, macs=1_142_909_952, upstream=("ViT-S_32",),
    weights=augreg_files(
        "S/32", "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224"
    ),
)  # fmt: skip
ViT_B8 = variant(
    "ViT_B8", ViT, **B, patch_size=8, params=86_576_872, macs=78_148_337_664, upstream=("ViT-B_8",),
    weights=imagenet21k("ViT-B_8", 393.72) | imagenet2012("ViT-B_8", 334.78) | augreg_files("B/8"),
)  # fmt: skip
ViT_B16 = variant(
    "ViT_B16", ViT, **B, patch_size=16, params=86_567_656, macs=17_563_828_224, upstream=("ViT-B_16",),
    weights=imagenet21k("ViT-B_16", 393.69) | imagenet2012("ViT-B_16", 331.4) | imagenet2012("ViT-B_16-224", 330.29, 224)
    | _sam("ViT-B_16", 330.3) | {"gsam": google("gsam/ViT-B_16", activation="sigmoid")} | augreg_files(
        "B/16", "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224"
    ),
)  # fmt: skip
ViT_B32 = variant(
    "ViT_B32", ViT, **B, patch_size=32, params=88_224_232, macs=4_409_186_304, upstream=("ViT-B_32",),
    weights=imagenet21k("ViT-B_32", 400.01) | imagenet2012("ViT-B_32", 336.89) | _sam("ViT-B_32", 336.61) | augreg_files(
        "B/32", "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"
    ),
)  # fmt: skip
ViT_L16 = variant(
    "ViT_L16", ViT, **L, patch_size=16, dropout_rate=0.1, params=304_326_632, macs=61_554_712_576, upstream=("ViT-L_16",),
    weights=imagenet21k("ViT-L_16", 1.22 * 1024) | imagenet2012("ViT-L_16", 1.14 * 1024)
    | imagenet2012("ViT-L_16-224", 1.13 * 1024, 224) | _sam("ViT-L_16", 1.13 * 1024) | augreg_files(
        "L/16", "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224"
    ),
)  # fmt: skip
ViT_L32 = variant(
    "ViT_L32", ViT, **L, patch_size=32, params=306_535_400, macs=15_377_539_072, upstream=("ViT-L_32",),
    weights=imagenet21k("ViT-L_32", 1.23 * 1024) | imagenet2012("ViT-L_32", 1.14 * 1024) | _sam("ViT-L_32", 1.14 * 1024),
)  # fmt: skip
ViT_H14 = variant(
    "ViT_H14", ViT, **H, patch_size=14, dropout_rate=0.1, params=632_045_800, macs=167_295_109_120, upstream=("ViT-H_14",),
    weights=imagenet21k("ViT-H_14", 2.46 * 1024),
)  # fmt: skip
GAP = dict(classifier="gap", representation_size=None)
ViT_S16_gap = variant(
    "ViT_S16_gap", ViT, **S, patch_size=16, **GAP, params=22_049_896, macs=4_574_026_752, upstream=("ViT-S_16-gap-norep",)
)
ViT_S32_gap = variant(
    "ViT_S32_gap", ViT, **S, patch_size=32, **GAP, params=22_878_184, macs=1_120_763_904, upstream=("ViT-S_32-gap-norep",)
)
ViT_B16_gap = variant(
    "ViT_B16_gap", ViT, **B, patch_size=16, **GAP, params=86_566_120, macs=17_471_649_792, upstream=("ViT-B_16-gap-norep",)
)
ViT_B32_gap = variant(
    "ViT_B32_gap", ViT, **B, patch_size=32, **GAP, params=88_222_696, macs=4_322_426_880, upstream=("ViT-B_32-gap-norep",)
)

# Sizes: arXiv 2106.04560 Table 2 and 2305.13035 (So400m), as `decode_variant` of big_vision has them
MU_BV = dict(width=32, depth=1, heads=2, mlp=128)
M = dict(width=512, depth=12, heads=8, mlp=2048)
G_SMALL = dict(width=1408, depth=40, heads=16, mlp=6144)
G_BIG = dict(width=1664, depth=48, heads=16, mlp=8192)
G_OPT = dict(width=1536, depth=40, heads=16, mlp=6144)
SO400M = dict(width=1152, depth=27, heads=16, mlp=4304)
BV_GAP = dict(style="big_vision", classifier="gap")
BV_MAP = dict(style="big_vision", classifier="map")
DEIT3 = dict(style="big_vision", classifier="token", representation_size=None)
SIGLIP = dict(include_top=False, pooling="map", **BV_MAP)


def _big_vision(path, **facts):
    return google(path, bucket="big_vision", licence=BIG_VISION_LICENCE, **facts)


def _better_plain():
    """The ImageNet-1k classifiers of arXiv 2205.01580, by epochs."""
    return {
        "i1k" + ("" if epochs == 300 else f"-{epochs}ep"): _big_vision(f"vit_s16_i1k_{epochs}ep") for epochs in (300, 150, 90)
    }


def _deit3(size):
    """ImageNet-1k classifiers of DeiT III, trained on it alone or after ImageNet-21k; at 224 and 384."""
    sources = {"imagenet21k+imagenet1k": "21k", "imagenet1k": "1k"}
    return {
        f"{tag}-{side}": _big_vision(f"zoo/deit3/bv_deit_3_{size}_{side}_{ds}", resolution=side, tuned=side != 224 or ds == "21k")
        for tag, ds in sources.items() for side in (224, 384)
    }  # fmt: skip


def _siglip(size, *siglip2, **webli):
    """Image towers of SigLIP 2, by resolution, and of SigLIP, by tag and file name."""
    files = {tag.replace("_", "-"): f"siglip/webli_{file}" for tag, file in webli.items()}
    files |= {f"siglip2-{side}": f"siglip2/siglip2_{size}_{side}" for side in siglip2}
    return {
        tag: _big_vision(file, resolution=int(tag.rpartition("-")[2]), classes=None, activation=None)
        for tag, file in files.items()
    }


ViT_mu_bv = variant("ViT_mu_bv", ViT, **MU_BV, patch_size=8, **BV_GAP, resolution=32, params=52_456, macs=343_296)
ViT_Ti16_bv = variant("ViT_Ti16_bv", ViT, **TI, patch_size=16, **BV_GAP, params=5_717_032, macs=1_246_563_840)
ViT_S16_bv = variant(
    "ViT_S16_bv", ViT, **S, patch_size=16, **BV_GAP, positions="sincos2d", representation_size=384,
    params=22_122_472, macs=4_574_174_208,
    weights=_better_plain(),
)  # fmt: skip
ViT_M16_bv = variant("ViT_M16_bv", ViT, **M, patch_size=16, **BV_GAP, params=38_836_712, macs=7_948_390_400)
ViT_B16_bv = variant("ViT_B16_bv", ViT, **B, patch_size=16, **BV_GAP, params=86_566_120, macs=17_471_649_792)
ViT_L16_bv = variant("ViT_L16_bv", ViT, **L, patch_size=16, **BV_GAP, params=304_324_584, macs=61_233_405_952)
ViT_H14_bv = variant("ViT_H14_bv", ViT, **H, patch_size=14, **BV_GAP, params=632_043_240, macs=166_623_938_560)
ViT_g14_bv = variant("ViT_g14_bv", ViT, **G_SMALL, patch_size=14, **BV_MAP, params=1_037_857_384, macs=267_001_461_760)
ViT_G14_bv = variant(
    "ViT_G14_bv", ViT, **G_BIG, patch_size=14, **BV_MAP, params=1_882_797_416, macs=483_276_678_144, upstream=("ViT-G_14",)
)
ViT_So400m14_bv = variant("ViT_So400m14_bv", ViT, **SO400M, patch_size=14, **BV_MAP, params=428_833_704, macs=110_178_100_224)
DeiT3_S16_bv = variant(
    "DeiT3_S16_bv", ViT, **S, patch_size=16, **DEIT3, params=22_050_280, macs=4_598_882_304, weights=_deit3("small")
)
DeiT3_B16_bv = variant(
    "DeiT3_B16_bv", ViT, **B, patch_size=16, **DEIT3, params=86_566_888, macs=17_563_828_224, weights=_deit3("base")
)
DeiT3_L16_bv = variant(
    "DeiT3_L16_bv", ViT, **L, patch_size=16, **DEIT3, params=304_325_608, macs=61_554_712_576, weights=_deit3("large")
)
SigLIP_B16_bv = variant(
    "SigLIP_B16_bv", ViT, **B, patch_size=16, **SIGLIP, params=92_884_224, macs=17_708_292_096,
    weights=_siglip(
        "b16", 224, 256, 384, 512, webli_224="en_b16_224_63724782", webli_256="en_b16_256_60500360",
        webli_384="en_b16_384_68578854", webli_512="en_b16_512_68580893", webli_i18n_256="i18n_b16_256_66117334",
    ),
)  # fmt: skip
SigLIP_B32_bv = variant(
    "SigLIP_B32_bv", ViT, **B, patch_size=32, **SIGLIP, params=94_540_800, macs=4_385_435_136, weights=_siglip("b32", 256)
)
SigLIP_L16_bv = variant(
    "SigLIP_L16_bv", ViT, **L, patch_size=16, **SIGLIP, params=315_894_784, macs=61_654_310_912,
    weights=_siglip("l16", 256, 384, 512, webli_256="en_l16_256_60552751", webli_384="en_l16_384_63634585"),
)  # fmt: skip
SigLIP_So400m14_bv = variant(
    "SigLIP_So400m14_bv", ViT, **SO400M, patch_size=14, **SIGLIP, params=427_680_704, macs=110_176_948_224,
    weights=_siglip("so400m14", 224, 384, webli_224="en_so400m_224_57633886", webli_384="en_so400m_384_58765454"),
)  # fmt: skip
SigLIP_So400m16_bv = variant(
    "SigLIP_So400m16_bv",
    ViT,
    **SO400M,
    patch_size=16,
    **SIGLIP,
    params=427_818_944,
    macs=83_666_248_704,
    weights=_siglip("so400m16", 256, 384, 512),
)
SigLIP_g16_bv = variant(
    "SigLIP_g16_bv",
    ViT,
    **G_OPT,
    patch_size=16,
    **SIGLIP,
    params=1_163_076_096,
    macs=227_863_375_872,
    weights=_siglip("g-opt16", 256, 384),
)
