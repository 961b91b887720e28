"""Compact Transformers' cases for `benchmarks.parity`: models of SHI-Labs/Compact-Transformers, and tables of positions."""

import keras
import numpy as np

import keras_vit
from benchmarks import parity
from keras_vit.checkpoints import adapt
from keras_vit.models import cct

# Every key of the original's configurations -> ours
OPTIONS = {
    "embedding_dim": "width", "num_layers": "depth", "num_heads": "heads", "num_classes": "classes",
    "positional_embedding": "positions", "kernel_size": "kernel_size", "n_conv_layers": "conv_layers", "img_size": None,
    "mlp_ratio": None, "stride": None, "padding": None,
}  # fmt: skip
TAPS = [
    (r"tokenizer\.conv_layers\.(\d+)", "tokenizer_{0}"), (r"classifier\.norm", "encoder_norm"),
    (r"classifier\.attention_pool", "sequence_pool/importance"), (r"classifier\.blocks\.(\d+)", "block_{0}"),
    (r"classifier\.blocks\.(\d+)\.pre_norm", "block_{0}/attention_norm"),
    (r"classifier\.blocks\.(\d+)\.self_attn", "block_{0}/attention"),
    (r"classifier\.blocks\.(\d+)\.self_attn\.probs", "block_{0}/scores"),
    (r"classifier\.blocks\.(\d+)\.norm1", "block_{0}/mlp_norm"),
]  # fmt: skip


def run_cct(case):
    if case.meta["model"] == "cct_posembed_resize":
        return _run_tables(case)
    config = case.meta["config"]
    options = parity.translated(config, OPTIONS)
    options["mlp"] = int(options["width"] * config["mlp_ratio"])
    options["positions"] = {"learnable": "learned"}.get(options["positions"], options["positions"])
    options["classifier"] = "token" if case.meta["model"] == "vitlite" else "sequence"
    if case.meta["model"] != "cct":
        options["patch_size"] = options.pop("kernel_size")
    elif (config["stride"], config["padding"]) != (max(1, config["kernel_size"] // 2 - 1), config["kernel_size"] // 2):
        raise parity.Unknown("stride and padding that do not follow from kernel_size")
    model = keras_vit.CCT(input_shape=(config["img_size"],) * 2 + (3,), **options)
    parity.load_and_write_back(case, model)

    taps = parity.expected_taps(case, TAPS)
    for key, tap in taps.items():
        if key.startswith("tokenizer.conv_layers."):
            taps[key] = keras.ops.transpose(keras_vit.zoo.tap(model, tap), (0, 3, 1, 2))
    last = keras_vit.zoo.tap(model, max(layer.name for layer in model.layers if layer.name.startswith("tokenizer_")))
    taps |= {"tokenizer": parity.as_tokens(last), "logits": "head"}
    parity.compare_taps(case, model, taps, ["logits"], np.moveaxis(case.inputs["x"], 1, -1))
    return list(case.expected)


def _run_tables(case):
    """Positions resampled to another grid, and the fixed ones."""
    config = case.meta["config"]
    resample = adapt.Positions(
        (config["grid_new"],) * 2, config["num_tokens"], file_grid=(config["grid_old"],) * 2, resample=adapt.resample_bilinear
    )
    table = {resample.TABLE: case.inputs["posemb"], resample.TOKEN: np.zeros((1, 1, case.inputs["posemb"].shape[-1]))}
    case.compare("posemb_resized", resample(table)[resample.TABLE], case.meta["tolerance"])
    rows, width = case.expected["sine_table_16x24"].shape[1:]
    case.compare("sine_table_16x24", cct.sine(rows, width), case.meta["tolerance"])
    return list(case.expected)
