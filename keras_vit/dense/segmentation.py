"""Semantic segmentation on a pyramid of features."""

import keras
from keras import ops

from keras_vit.dense.pyramid import pyramid
from keras_vit.errors import ArgumentError
from keras_vit.layers import GroupNorm
from keras_vit.layers.resize import resized

GROUPS = 32


@keras.saving.register_keras_serializable("keras_vit")
class ResizeTo(keras.layers.Layer):
    """(b, h, w, d), (b, H, W, ...) -> (b, H, W, d): the first `resized` to the second's size.

    Args:
        interpolation: "nearest" or "bilinear".
    """

    def __init__(self, interpolation="bilinear", **kwargs):
        super().__init__(**kwargs)
        self.interpolation = interpolation

    def call(self, x, like):
        return resized(x, ops.shape(like)[1:3], self.interpolation)

    def compute_output_shape(self, x_shape, like_shape):
        return (x_shape[0], *like_shape[1:3], x_shape[3])


def semantic_fpn(model, classes, channels=256, width=128, norms=True, dropout_rate=0.1, name=None):
    """A segmenter on a model's pyramid: images (b, H, W, 3) -> logits (b, H, W, classes).

    A feature pyramid network (arXiv 1612.03144) and the semantic branch of Panoptic FPN (1901.02446, section 3.1): every level
    grows to 1/4 of the image by convolutions, norms and bilinear doublings, all are added up and classified, and the scores are
    resized to the image. It is the head of PoolFormer's segmenters (2111.11418, section 4.3). For a map of labels:
    `keras.ops.argmax(logits, axis=-1)`; train it by `SparseCategoricalCrossentropy(from_logits=True)` on maps (b, H, W).

    Args:
        model: a classifier with a pyramid; see `pyramid`, as for `norms`.
        classes: number of classes.
        channels: of the feature pyramid network. width: channels of the branch, a multiple of 32.
        dropout_rate: of whole channels before the scores.
        name: of the segmenter.

    Returns:
        A functional `keras.Model`, which shares the weights of `model`. Its layer `segmentation_head` gives the scores at 1/4.

    Raises:
        ArgumentError: the model has no pyramid, or a number is not usable.
    """
    for argument, value, step in (("classes", classes, 1), ("channels", channels, 1), ("width", width, GROUPS)):
        if not isinstance(value, int) or value < step or value % step:
            raise ArgumentError(f"semantic_fpn: {argument} must be a multiple of {step} above 0, got {value!r}.")
    features = pyramid(model, norms)
    merged = _top_down(features.output, channels)
    finest = min(merged)
    scaled = [_grown(merged[n], n, n - finest, merged[finest], width) for n in sorted(merged)]
    x = keras.layers.Add(name="segmentation_sum")(scaled) if len(scaled) > 1 else scaled[0]
    x = keras.layers.SpatialDropout2D(dropout_rate, data_format="channels_last", name="segmentation_dropout")(x)
    x = _conv(classes, 1, "segmentation_head", dtype="float32")(x)
    x = ResizeTo(dtype="float32", name="segmentation")(x, features.inputs[0])
    return keras.Model(features.inputs, x, name=name or f"{model.name}_semantic_fpn")


def _conv(width, kernel_size, name, **options):
    return keras.layers.Conv2D(width, kernel_size, padding="same", data_format="channels_last", name=name, **options)


def _top_down(levels, channels):
    """{n: (b, h, w, channels)}: each level plus all coarser ones, resized by repetition, through a convolution."""
    found, above = {}, None
    for n in sorted((int(level[1:]) for level in levels), reverse=True):
        x = _conv(channels, 1, f"fpn_lateral_{n}")(levels[f"P{n}"])
        if above is not None:
            x = keras.layers.Add(name=f"fpn_sum_{n}")([x, ResizeTo("nearest", name=f"fpn_up_{n}")(above, x)])
        found[n], above = _conv(channels, 3, f"fpn_{n}")(x), x
    return found


def _grown(x, level, doublings, like, width):
    """A level brought to the finest one's size: a convolution before each doubling, and one where there is none."""
    for i in range(max(doublings, 1)):
        at = f"segmentation_{level}_{i}"
        x = _conv(width, 3, f"{at}_conv", use_bias=False)(x)
        x = GroupNorm(GROUPS, 1e-5, name=f"{at}_norm")(x)
        x = keras.layers.Activation("relu", name=f"{at}_relu")(x)
        if i < doublings - 1:
            x = keras.layers.UpSampling2D(2, "channels_last", "bilinear", name=f"{at}_up")(x)
    return ResizeTo(name=f"segmentation_{level}_up")(x, like) if doublings else x
