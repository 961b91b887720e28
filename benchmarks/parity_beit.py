"""BEiT's cases for `benchmarks.parity`: any configuration of timm's `Beit` and of Hugging Face's models; resized positions."""

import keras
import numpy as np
from keras import ops

import keras_vit
from benchmarks import parity
from keras_vit.checkpoints import adapt
from keras_vit.layers import Bilinear

# Every config key of timm's Beit -> ours; what None stands for is said by others, or decided by what these give
TIMM_OPTIONS = {
    "patch_size": "patch_size", "embed_dim": "width", "depth": "depth", "num_heads": "heads", "mlp_ratio": "mlp",
    "num_classes": "classes", "use_abs_pos_emb": "absolute_positions", "use_rel_pos_bias": "block",
    "use_shared_rel_pos_bias": "shared", "init_values": "layer_scale", "global_pool": "classifier", "img_size": None,
    "norm_layer": None,
}  # fmt: skip
# Of Hugging Face's BeitConfig, those that say what is computed
HF_OPTIONS = {
    "patch_size": "patch_size", "hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "heads",
    "intermediate_size": "mlp", "layer_norm_eps": "epsilon", "layer_scale_init_value": "layer_scale",
    "use_absolute_position_embeddings": "absolute_positions", "use_relative_position_bias": "block",
    "use_shared_relative_position_bias": "shared", "use_mean_pooling": "classifier",
}  # fmt: skip


def run_beit(case):
    model = case.meta["model"]
    runs = {
        "timm_beit": _timm, "hf_beit_classification": _hf_classifier, "hf_beit_masked_image_modeling": _hf_masked,
        "hf_beit_semantic_segmentation": _hf_segmenter, "beit_relative_position_resize": _resize,
    }  # fmt: skip
    if model not in runs:
        raise parity.Unknown(f"model {model!r}")
    return runs[model](case)


def _finished(options):
    """The builder's arguments out of translated ones."""
    relative = {"block": options.pop("block", False), "shared": options.pop("shared", False)}
    if all(relative.values()):
        raise parity.Unknown("relative positions both shared and in each block")
    options["relative_positions"] = next((kind for kind, asked in relative.items() if asked), None)
    options["layer_scale"] = options.get("layer_scale") or None
    return options


def _loaded(case, build, options, images):
    """The model of a case with its weights, read from the real checkpoint where there is one, and written back."""
    model = build(input_shape=images.shape[1:], **options)
    parity.load_and_write_back(case, model)
    return model


def _images(case, key):
    return np.moveaxis(case.inputs[key], 1, -1)


def _timm(case):
    config = case.meta["config"]
    options = _finished(parity.translated(config, TIMM_OPTIONS))
    options["mlp"] = int(options["width"] * options["mlp"])
    images = _images(case, "x")
    model = _loaded(case, keras_vit.BEiT, options, images)
    names, grid = {layer.name for layer in model.layers}, model.get_layer("tokens").grid
    taps = parity.expected_taps(case, [
        (r"pos_drop", "dropout"), (r"blocks\.(\d+)", "block_{0}"), (r"blocks\.(\d+)\.norm1", "block_{0}/attention_norm"),
        (r"blocks\.(\d+)\.attn\.probs", "block_{0}/scores"), (r"blocks\.(\d+)\.attn", "block_{0}/attention"),
        (r"blocks\.(\d+)\.mlp", "block_{0}/mlp"), (r"blocks\.(\d+)\.attn\.rel_pos_bias", "block_{0}/bias"),
        (r"rel_pos_bias", "relative_positions"),
    ])  # fmt: skip
    last = f"block_{options['depth'] - 1}"
    tokens, pooled = ("encoder_norm", "class_token") if "encoder_norm" in names else (last, "fc_norm")
    taps |= {"norm": tokens, "features": tokens, "fc_norm": pooled, "pre_logits": pooled, "logits": "head"}
    taps["patch_embed"] = parity.as_tokens(parity.zoo.tap(model, "patches"))
    if "blocks.0.attn.rel_pos_bias" in taps:
        taps["blocks.0.attn.rel_pos_bias"] = ops.expand_dims(parity.zoo.tap(model, "block_0/bias"), 0)
    parity.compare_taps(case, model, taps, ["logits"], images)
    if "relative_position_index" in case.expected:
        case.compare("relative_position_index", keras_vit.models.beit.relative_index(grid), 0)
    return list(case.expected)


def _hf_options(config):
    return _finished({ours: config[key] for key, ours in HF_OPTIONS.items()})


HF_TAPS = [(r"attentions\.(\d+)", "block_{0}/scores")]


def _hidden_states(case, depth):
    """{key: tap}: the tokens before the first block, and after each."""
    names = ["dropout", *(f"block_{i}" for i in range(depth))]
    return {f"hidden_states.{i}": name for i, name in enumerate(names)} | parity.expected_taps(case, HF_TAPS)


def cross_entropy(logits, labels):
    """The mean over labels, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    scores = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(scores, labels[..., None], axis=-1).mean()


def _hf_classifier(case):
    config = case.meta["config"]
    options = _hf_options(config)
    options["classifier"] = "avg" if options["classifier"] else "token"
    images = _images(case, "pixel_values")
    model = _loaded(case, keras_vit.BEiT, {**options, "classes": len(config["id2label"])}, images)
    taps = _hidden_states(case, options["depth"])
    last = f"block_{options['depth'] - 1}"
    ends = ("encoder_norm", "class_token") if options["classifier"] == "token" else (last, "fc_norm")
    taps |= {"last_hidden_state": ends[0], "pooler_output": ends[1], "logits": "head"}
    parity.compare_taps(case, model, taps, ["logits"], images)
    logits = keras.Model(model.input, parity.zoo.tap(model, "head")).predict_on_batch(images)
    case.compare("loss", cross_entropy(logits, case.inputs["labels"]), case.meta["tolerance"])
    return list(case.expected)


def _hf_masked(case):
    config = case.meta["config"]
    options = _hf_options(config)
    options["norm_twice"] = not options.pop("classifier")
    images = _images(case, "pixel_values")
    model = _loaded(case, keras_vit.BEiTMasked, {**options, "classes": config["vocab_size"]}, images)
    mask = case.inputs["bool_masked_pos"]
    inputs = [images, mask.reshape(-1, *model.get_layer("tokens").grid)]
    taps = _hidden_states(case, options["depth"])
    last = "inner_norm" if options["norm_twice"] else f"block_{options['depth'] - 1}"
    parity.compare_taps(case, model, taps | {"last_hidden_state": last, "logits": "head"}, ["logits"], inputs)
    logits = model.predict_on_batch(inputs)[mask]
    case.compare("loss", cross_entropy(logits, case.inputs["labels"]), case.meta["tolerance"])
    return list(case.expected)


def _hf_segmenter(case):
    config = case.meta["config"]
    options = _hf_options(config)
    del options["classifier"]  # norms nothing here
    if config["use_auxiliary_head"] and (config["auxiliary_num_convs"], config["auxiliary_concat_input"]) != (1, False):
        raise parity.Unknown("an auxiliary head of several convolutions")
    options["features"] = [at - 1 for at in config["out_indices"]]
    options["auxiliary"] = config["auxiliary_channels"] if config["use_auxiliary_head"] else None
    options |= {"pool_scales": config["pool_scales"], "classes": len(config["id2label"])}
    images = _images(case, "pixel_values")
    model = _loaded(case, keras_vit.BEiTSegmenter, options, images)
    maps = {
        **{f"fpn.out{i}": f"pyramid_{i}" for i in range(4)}, **{f"fpn.fpn{i + 1}": f"pyramid_{i}" for i in range(4)},
        "decode_head.psp_bottleneck": "pools_conv", "decode_head.fpn_bottleneck": "levels_conv",
        "auxiliary_head": "auxiliary_head", "logits": "head",
    }  # fmt: skip
    taps = {key: ops.transpose(parity.zoo.tap(model, name), (0, 3, 1, 2)) for key, name in maps.items() if key in case.expected}
    taps |= _hidden_states(case, options["depth"]) | {"last_hidden_state": f"block_{options['depth'] - 1}"}
    parity.compare_taps(case, model, taps, ["logits", "auxiliary_head"], images)
    labels = case.inputs["labels"]
    seen, loss = labels != config["semantic_loss_ignore_index"], 0.0
    outputs = model.predict_on_batch(images)
    outputs = outputs if isinstance(outputs, dict) else {"logits": outputs}
    for key, share in (("logits", 1.0), ("auxiliary", config["auxiliary_loss_weight"])):
        if key in outputs:
            resized = ops.convert_to_numpy(Bilinear(labels.shape[1:])(outputs[key]))
            loss += share * cross_entropy(resized[seen], labels[seen])
    case.compare("loss", loss, case.meta["tolerance"])
    return list(case.expected)


def _resize(case):
    """What timm does where there is no scipy, to which `timm_resize_rel_pos_bias_table` is equal, and its "simple" way.

    The original's cubic splines, which models are loaded with, are held against scipy in tests/test_beit.py.
    """
    config, table = case.meta["config"], case.inputs["table"]
    grids = [(config[f"window_{which}"],) * 2 for which in ("old", "new")]
    lines = adapt.resample_relative(table, *grids, line=adapt.broken_line)
    case.compare("timm_resize_rel_pos_bias_table", lines, case.meta["tolerance"])
    case.compare("timm_resize_simple", adapt.resample_relative_simply(table, *grids), case.meta["tolerance"])
    return list(case.expected)
