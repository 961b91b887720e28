"""DeiT's, DeiT III's and ResMLP's cases for `benchmarks.parity`: models of facebookresearch/deit, and tables of positions."""

import numpy as np

import keras_vit
from benchmarks import parity
from keras_vit.checkpoints import adapt

# Every key of the original's configurations -> ours; the rest is decided by what these give
OPTIONS = {
    "img_size": None, "patch_size": "patch_size", "embed_dim": "width", "depth": "depth", "num_heads": "heads",
    "num_classes": "classes", "mlp_ratio": None, "qkv_bias": None, "norm_layer": None, "block_layers": None, "Patch_layer": None,
    "init_scale": "layer_scale",
}  # fmt: skip
BLOCKS = {
    "Block": dict(), "Layer_scale_init_Block": dict(layer_scale=1e-4), "Block_paralx2": dict(parallel=True),
    "Layer_scale_init_Block_paralx2": dict(parallel=True, layer_scale=1e-4),
}  # fmt: skip
STEMS = {"PatchEmbed": "linear", "hMLP": "hmlp"}
TAPS = [
    (r"norm", "encoder_norm"), (r"blocks\.(\d+)", "block_{0}"), (r"blocks\.(\d+)\.norm1", "block_{0}/attention_norm"),
    (r"blocks\.(\d+)\.attn\.probs", "block_{0}/scores"), (r"blocks\.(\d+)\.attn", "block_{0}/attention"),
    (r"blocks\.(\d+)\.attn1", "block_{0}/attention_2"), (r"blocks\.(\d+)\.mlp", "block_{0}/mlp"),
]  # fmt: skip


def options_of(case, known=OPTIONS):
    """Our builder's arguments of an original configuration."""
    config = case.meta["config"]
    if config.get("norm_layer", "LayerNorm eps=1e-6") != "LayerNorm eps=1e-6" or not config.get("qkv_bias", True):
        raise parity.Unknown("another norm, or attention without biases")
    options = {"heads": 1, **parity.translated(config, known)}
    options["mlp"] = int(options["width"] * config.get("mlp_ratio", 4))
    return options | dict(input_shape=(config["img_size"],) * 2 + (3,), classifier_activation=None)


def compare(case, model, table, taps, outputs):
    """Runs the case's images through a model: what `table` and `taps` name, and the tokens of patches."""
    found = parity.expected_taps(case, table) | taps
    found["patch_embed"] = parity.as_tokens(parity.zoo.tap(model, "patches"))
    parity.compare_taps(case, model, found, outputs, np.moveaxis(case.inputs["x"], 1, -1))
    return list(case.expected)


def run_deit(case):
    kind, config = case.meta["model"], case.meta["config"]
    if kind == "deit_posembed_interp":
        return _run_table(case)
    if kind == "resmlp":
        return _run_resmlp(case)
    options = options_of(case)
    distilled = kind == "deit_distilled"
    options |= dict(distilled=distilled, style="deit3" if kind.startswith("deit3") else "deit")
    for key, table in (("block_layers", BLOCKS), ("Patch_layer", STEMS)):
        if config.get(key, "PatchEmbed") not in table and key in config:
            raise parity.Unknown(f"{key} {config[key]!r}")
    options |= BLOCKS[config.get("block_layers", "Block")]
    model = keras_vit.DeiT(stem=STEMS[config.get("Patch_layer", "PatchEmbed")], **options)
    parity.load_and_write_back(case, model)
    if not distilled:
        return compare(case, model, TAPS, {"logits": "head"}, ["logits"])
    taps = {
        "logits_eval": "logits", "logits_train_cls": "head", "logits_train_dist": "head_distillation",
        "feature_cls": "class_token", "feature_dist": "distillation_token",
    }  # fmt: skip
    return compare(case, model, TAPS, taps, [key for key in taps if key.startswith("logits")])


def _run_table(case):
    """A table of positions resampled to another grid."""
    config = case.meta["config"]
    resample = adapt.Positions(
        (config["grid_new"],) * 2, True, file_grid=(config["grid_old"],) * 2,
        distillation_token=config["num_extra_tokens"] == 2, resample=adapt.resample_bicubic,
    )  # fmt: skip
    table = {resample.TABLE: case.inputs["pos_embed"]}
    case.compare("pos_embed_resized", resample(table)[resample.TABLE], case.meta["tolerance"])
    return list(case.expected)


RESMLP_TAPS = [
    (r"norm", "encoder_norm"), (r"blocks\.(\d+)", "block_{0}"), (r"blocks\.(\d+)\.norm1", "block_{0}/token_norm"),
    (r"blocks\.(\d+)\.attn", "block_{0}/token_mixing"), (r"blocks\.(\d+)\.mlp", "block_{0}/channel_mixing"),
]  # fmt: skip


def _run_resmlp(case):
    options = options_of(case)
    del options["heads"]
    model = keras_vit.ResMLP(**options)
    parity.load_and_write_back(case, model)
    return compare(case, model, RESMLP_TAPS, {"logits": "head"}, ["logits"])
