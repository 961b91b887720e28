"""PoolFormer's cases for `benchmarks.parity`: any configuration of the original's `PoolFormer` and `MetaFormer`."""

import re

import keras_vit
from benchmarks import parity

# Every config key of the original -> ours; the rest is decided by what these give
OPTIONS = {
    "layers": "depth", "embed_dims": "width", "mlp_ratios": "ratios", "num_classes": "classes", "fork_feat": "pyramid",
    "norm_layer": "norm", "pool_size": "pool_size", "use_layer_scale": "scaled", "token_mixers": "mixer",
    "downsamples": "halves", "image": None, "drop_rate": None, "drop_path_rate": None, "layer_scale_init_value": None,
}  # fmt: skip
NORMS = {"GroupNorm": "group", "LayerNormChannel": "channel"}
MIXERS = {"Pooling": "pool", "Identity": "identity", "Attention": "attention", "SpatialFc": "dense"}
INSIDE = {None: "", "norm1": "/mixer_norm", "token_mixer": "/mixer", "norm2": "/mlp_norm", "mlp": "/mlp"}
NAMES = {"patch_embed": "patches", "norm": "encoder_norm", "logits": "head"}


def build(config, shape):
    """A random model of an original configuration for images (H, W, 3)."""
    options = parity.translated(config, OPTIONS)
    if not all(options.pop("halves", [True])):
        raise parity.Unknown("stages that do not halve the size")
    ratios, classes = options.pop("ratios"), options.pop("classes", 1000)
    options["mlp"] = [int(width * ratio) for width, ratio in zip(options["width"], ratios)]
    options["norm"] = NORMS[options.get("norm", "GroupNorm")]
    if "mixer" in options:
        options["mixer"] = [MIXERS[mixer] for mixer in options["mixer"]]
    if not options.pop("scaled", True):
        options["layer_scale"] = None
    top = bool(classes) and not options.get("pyramid")
    return keras_vit.PoolFormer(top, input_shape=shape, classes=classes if top else None, **options)


def tap(key, model):
    """What the original calls `key`: it counts stages, and the halvings between them, alike."""
    if level := re.fullmatch(r"feat(\d+)|norm(\d+)", key):
        return f"stage_{level[1] or int(level[2]) // 2}_norm"
    if not (found := re.fullmatch(r"network\.(\d+)(?:\.(\d+))?(?:\.(\w+))?", key)):
        return NAMES[key]
    stage, between = divmod(int(found[1]), 2)
    if between:
        return f"stage_{stage + 1}_patches"
    blocks = [layer.name for layer in model.layers if layer.name.startswith(f"stage_{stage}_block_")]
    return blocks[int(found[2]) if found[2] else -1] + INSIDE[found[3]]


def run_poolformer(case):
    images = case.inputs["x"].transpose(0, 2, 3, 1)
    model = build(case.meta["config"], images.shape[1:])
    parity.load_and_write_back(case, model)
    case.expected = {key: nhwc(value) for key, value in case.expected.items()}
    outputs = [key for key in case.expected if key == "logits" or key.startswith("feat")]
    parity.compare_taps(case, model, {key: tap(key, model) for key in case.expected}, outputs, images)
    return outputs


def nhwc(array):
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
