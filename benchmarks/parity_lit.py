"""Goldens of LiT for `benchmarks.parity`: both towers, alone and together, and all that lies inside them."""

import keras

import keras_vit
from benchmarks import parity
from keras_vit.checkpoints import load

# Every key of the original's configuration of a text tower -> ours; `config` names one of two sizes, which `bert_config` replaces
BERT_OPTIONS = {
    "bert_config.hidden_size": "text_width", "bert_config.num_hidden_layers": "text_depth",
    "bert_config.num_attention_heads": "text_heads", "bert_config.intermediate_dim": "text_mlp",
    "bert_config.vocab_size": "vocabulary_size", "bert_config.max_length": "positions", "bert_config.num_segments": None,
    "config": None,
}  # fmt: skip
TRANSFORMER_OPTIONS = {
    "width": "text_width", "num_layers": "text_depth", "num_heads": "text_heads", "mlp_dim": "text_mlp",
    "vocab_size": "vocabulary_size",
}  # fmt: skip
IMAGE_TAPS = [
    (r"Transformer/posembed_input", "tokens"), (r"Transformer/encoderblock_(\d+)", "block_{0}"),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_0/attention_weights", "block_{0}/scores"),
    (r"Transformer/encoder_norm", "encoder_norm"),
]  # fmt: skip
TEXT_TAPS = [
    (r"BertEncoder_0/embedder", "embedding"), (r"BertEncoder_0/layer_norm", "embedding_norm"),
    (r"BertEncoder_0/encoder_block/layer_sequence/layers_(\d+)", "block_{0}"),
    (r"Encoder_0/encoderblock_(\d+)", "block_{0}"),
    (r"Encoder_0/encoderblock_(\d+)/MultiHeadDotProductAttention_0/attention_weights", "block_{0}/scores"),
    (r"Encoder_0/encoder_norm", "encoder_norm"),
]  # fmt: skip


def build(config, inputs, **options):
    """A random LiT of an original configuration."""
    image = parity.translated(parity.flattened(config["image"]), parity.VIT_OPTIONS)
    bert = config["text_model"] == "bert"
    text = parity.translated(parity.flattened(config["text"]), BERT_OPTIONS if bert else TRANSFORMER_OPTIONS)
    return keras_vit.LiT(
        input_shape=inputs["images"].shape[1:], length=inputs["tokens"].shape[1], out_dim=config["out_dim"],
        text_model="bert" if bert else {"text_transformer": "transformer"}[config["text_model"]], **image, **text, **options,
    )  # fmt: skip


def run_lit(case):
    config, inputs, file = case.meta["config"], case.inputs, parity.checkpoint(case)
    model = build(config, inputs)
    parity.load_and_write_back(case, model)
    _compare_tower(case, model.image_tower, IMAGE_TAPS, "img", "zimg", inputs["images"])
    _compare_tower(case, model.text_tower, TEXT_TAPS, "txt", "ztxt", inputs["tokens"])

    embeddings = model.encode_image(inputs["images"]), model.encode_text(inputs["tokens"])
    for key, got in zip(("zimg", "ztxt"), embeddings):
        case.compare(key, got, case.meta["tolerance"])
    case.compare("t", [model.temperature], case.meta["tolerance"])
    case.compare("logits_img_txt", keras.ops.convert_to_numpy(model.logits(*embeddings)), case.meta["tolerance"])

    for tower, name, key in (("image", "images", "zimg"), ("text", "tokens", "ztxt")):  # alone, from the file of both
        alone = build(config, inputs, towers=tower)
        keras_vit.load_weights(alone, file)
        encode = alone.encode_image if tower == "image" else alone.encode_text
        case.compare(key, encode(inputs[name]), case.meta["tolerance"])
    return ["zimg", "ztxt", "t", "logits_img_txt"]


def _compare_tower(case, tower, table, root, output, inputs):
    """Compares what the original returns of a tower: `inter/ROOT/...`, what lies inside, and `out/ROOT/...`."""
    names = [layer.name for layer in tower.layers]
    last = names[names.index("unit_length") - 1]
    blocks = [name for name in names if name.startswith("block_")]
    before = names[names.index("projection") - 1] if "projection" in names else last
    x = tower.get_layer(last).output
    taps = parity.expected_taps(case, table, f"inter/{root}/") | {
        output: "unit_length", f"out/{root}/normalized": "unit_length", f"out/{root}/pre_logits": before,
        f"out/{root}/logits": last, f"out/{root}/transformed": blocks[-1],
        f"inter/{root}/BertEncoder_0/encoder_block": blocks[-1],
        f"out/{root}/norm": keras.ops.sqrt(keras.ops.sum(keras.ops.square(x), axis=1, keepdims=True)),
    }  # fmt: skip
    parity.compare_taps(case, tower, taps, [output], inputs)
    if f"out/{root}/embedded" in case.expected:
        words = load.to_numpy(tower.get_layer("embedding").words)
        case.compare(f"out/{root}/embedded", words[inputs], case.meta["tolerance"])
