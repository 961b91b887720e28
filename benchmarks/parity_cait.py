"""CaiT's cases for `benchmarks.parity`: models of facebookresearch/deit."""

import keras

import keras_vit
from benchmarks import parity, parity_deit

OPTIONS = {**parity_deit.OPTIONS, "depth_token_only": "class_depth"}
TAPS = [
    *parity_deit.TAPS, (r"blocks\.(\d+)\.attn\.probs", "block_{0}/mixed_scores"),
    (r"blocks_token_only\.(\d+)", "class_block_{0}"), (r"blocks_token_only\.(\d+)\.attn", "class_block_{0}/attention"),
    (r"blocks_token_only\.(\d+)\.attn\.probs", "class_block_{0}/scores"),
]  # fmt: skip


def run_cait(case):
    model = keras_vit.CaiT(**parity_deit.options_of(case, OPTIONS))
    parity.load_and_write_back(case, model)
    taps = {"logits": "head"}
    for key in case.expected:
        if key.endswith(".attn.proj_l"):  # heads last
            logits = keras_vit.zoo.tap(model, f"block_{key.split('.')[1]}/mixed_logits")
            taps[key] = keras.ops.transpose(logits, (0, 2, 3, 1))
    return parity_deit.compare(case, model, TAPS, taps, ["logits"])
