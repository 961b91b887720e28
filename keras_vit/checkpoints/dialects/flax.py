"""Flax's spelling: kernel / bias, scale / bias in norms, query / key / value apart. Arrays have Keras's own axis order."""

from keras_vit.checkpoints.names import rule
from keras_vit.checkpoints.transforms import Part


def param(original, ours):
    return rule(original, ours)


def dense(original, ours):
    return [rule(f"{original}/{leaf}", f"{ours}/{leaf}") for leaf in ("kernel", "bias")]


conv = dense


def mlp(original, ours):
    """The two dense layers of an MLP block."""
    return [*dense(f"{original}/Dense_0", f"{ours}/fc1"), *dense(f"{original}/Dense_1", f"{ours}/fc2")]


def norm(original, ours):
    return [rule(f"{original}/scale", f"{ours}/gamma"), rule(f"{original}/bias", f"{ours}/beta")]


def attention(original, ours):
    """Kernels (d, heads, d / heads) and biases (heads, d / heads) into slices of ours, which keep heads as an axis."""
    parts = [
        rule(f"{original}/{part}/{leaf}", f"{ours}/qkv_{leaf}", Part(index, 3, axis))
        for index, part in enumerate(("query", "key", "value"))
        for leaf, axis in (("kernel", 1), ("bias", 0))
    ]
    return [*parts, *(rule(f"{original}/out/{leaf}", f"{ours}/out_{leaf}") for leaf in ("kernel", "bias"))]
