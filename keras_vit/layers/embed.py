import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("keras_vit")
class Patches(keras.layers.Conv2D):
    """(b, H, W, c) -> (b, H / p, W / p, d): cuts the image into patches and maps each linearly to d numbers.

    Args:
        width: d, the width of the tokens.
        patch_size: p, or (height, width) of a patch in pixels.
    """

    def __init__(self, width, patch_size, **kwargs):
        self.width, self.patch_size = width, patch_size
        super().__init__(
            width,
            patch_size,
            strides=patch_size,
            padding="valid",
            data_format="channels_last",
            kernel_initializer="lecun_normal",
            **kwargs,
        )

    def get_config(self):
        kept = ("name", "trainable", "dtype")
        config = {key: value for key, value in super().get_config().items() if key in kept}
        return {**config, "width": self.width, "patch_size": self.patch_size}


def sincos2d(h, w, d):
    """(1, h * w, d) float32: fixed positions of a grid, the sines and cosines of x, then of y (MoCo v3, arXiv 2104.02057)."""
    y, x = (axis.reshape(-1, 1) for axis in np.mgrid[:h, :w])
    omega = 10_000.0 ** -(np.arange(d // 4) / (d // 4 - 1))
    return np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], 1, dtype="float32")[None]


@keras.saving.register_keras_serializable("keras_vit")
class Tokens(keras.layers.Layer):
    """(b, h, w, d) -> (b, n, d): rows of the grid one after the other, a class token before them, plus positions.

    n is h * w, and one more with a class token.

    Args:
        class_token: whether to put a learned token before the grid's.
        class_position: whether a class token has a position too, the first of the table; without one, positions are added
            before it is put in front.
        positions: "learned", or "sincos2d" for the fixed ones of `sincos2d`.
        stddev: of the learned positions' random values at the start.
    """

    def __init__(self, class_token=True, class_position=True, positions="learned", stddev=0.02, **kwargs):
        super().__init__(**kwargs)
        self.class_token, self.class_position, self.kind, self.stddev = class_token, class_position, positions, stddev

    def get_config(self):
        config = dict(class_token=self.class_token, class_position=self.class_position, positions=self.kind, stddev=self.stddev)
        return {**super().get_config(), **config}

    def build(self, input_shape):
        _, h, w, d = input_shape
        self.grid = (h, w)
        if self.class_token:
            self.cls = self.add_weight(shape=(1, 1, d), initializer="zeros", name="cls")
        if self.kind == "sincos2d":
            if d % 4 or d < 8:
                raise ValueError(f"Tokens {self.name!r}: positions='sincos2d' need a width that is a multiple of 4, got {d}.")
            self.positions = sincos2d(h, w, d)
        else:
            normal = keras.initializers.RandomNormal(stddev=self.stddev)
            rows = h * w + (self.class_token and self.class_position)
            self.positions = self.add_weight(shape=(1, rows, d), initializer=normal, name="positions")

    def call(self, x):
        h, w = self.grid
        x = ops.reshape(x, (-1, h * w, x.shape[-1]))
        positions = ops.cast(self.positions, x.dtype)
        if not self.class_token:
            return x + positions
        cls = ops.broadcast_to(ops.cast(self.cls, x.dtype), (ops.shape(x)[0], 1, x.shape[-1]))
        if self.class_position:
            return ops.concatenate([cls, x], axis=1) + positions
        return ops.concatenate([cls, x + positions], axis=1)

    def compute_output_shape(self, input_shape):
        b, h, w, d = input_shape
        return (b, h * w + self.class_token, d)
