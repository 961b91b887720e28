import collections
import math

import keras
import numpy as np
from keras import ops


def resized(x, size, interpolation="bilinear"):
    """(b, h, w, c) -> (b, h', w', c) by "bilinear" (half-pixel centres, no antialiasing) or "nearest"; computed in float32.

    The bilinear one is PyTorch's `interpolate(mode="bilinear", align_corners=False)`.
    """
    if tuple(size) == tuple(x.shape[1:3]):
        return x
    return ops.cast(ops.image.resize(ops.cast(x, "float32"), size, interpolation, data_format="channels_last"), x.dtype)


@keras.saving.register_keras_serializable("keras_vit")
class Bilinear(keras.layers.Layer):
    """(b, h, w, c) -> (b, h', w', c): `resized` to a fixed size, bilinearly.

    Args:
        size: (h', w').
    """

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = tuple(size)

    def call(self, x):
        return resized(x, self.size)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *self.size, input_shape[-1])


def shares(old, new):
    """(new, old) float32 matrix: row i takes the mean from place floor(i * old / new) up to ceil((i + 1) * old / new)."""
    first = np.arange(new) * old // new
    end = -(-np.arange(1, new + 1) * old // new)
    inside = (np.arange(old) >= first[:, None]) & (np.arange(old) < end[:, None])
    return (inside / (end - first)[:, None]).astype("float32")


@keras.saving.register_keras_serializable("keras_vit")
class AdaptivePooling(keras.layers.Layer):
    """(b, h, w, c) -> (b, n, n, c): means over n x n areas of the image, which may overlap; PyTorch's `AdaptiveAvgPool2d`.

    Args:
        count: n.
    """

    def __init__(self, count, **kwargs):
        super().__init__(**kwargs)
        self.count = count

    def call(self, x):
        rows, columns = (ops.cast(shares(side, self.count), x.dtype) for side in x.shape[1:3])
        return ops.einsum("yh,xw,bhwc->byxc", rows, columns, x)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.count, self.count, input_shape[-1])


@keras.saving.register_keras_serializable("keras_vit")
class Doubling(keras.layers.Conv2DTranspose):
    """(b, h, w, c) -> (b, 2 h, 2 w, d): every place becomes 2 x 2, each a linear map of it; a transposed convolution.

    Args:
        width: d.
    """

    def __init__(self, width, **kwargs):
        self.width = width
        super().__init__(width, 2, strides=2, data_format="channels_last", **kwargs)

    def get_config(self):
        config = {key: value for key, value in super().get_config().items() if key in ("name", "trainable", "dtype")}
        return {**config, "width": self.width}

    def multiply_adds(self, input_shape):
        """ "conv" of one example (b, h, w, c)."""
        return collections.Counter(conv=math.prod(input_shape[1:3]) * math.prod(self.kernel.shape))
