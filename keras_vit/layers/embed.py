import keras
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


@keras.saving.register_keras_serializable("keras_vit")
class Tokens(keras.layers.Layer):
    """(b, h, w, d) -> (b, n, d): rows of the grid one after the other, a class token before them, plus learned positions.

    n is h * w, and one more with a class token, whose position is the first of the table.

    Args:
        class_token: whether to put a learned token before the grid's.
    """

    def __init__(self, class_token=True, **kwargs):
        super().__init__(**kwargs)
        self.class_token = class_token

    def build(self, input_shape):
        _, h, w, d = input_shape
        self.grid = (h, w)
        if self.class_token:
            self.cls = self.add_weight(shape=(1, 1, d), initializer="zeros", name="cls")
        positions = keras.initializers.RandomNormal(stddev=0.02)
        self.positions = self.add_weight(shape=(1, h * w + self.class_token, d), initializer=positions, name="positions")

    def call(self, x):
        h, w = self.grid
        x = ops.reshape(x, (-1, h * w, x.shape[-1]))
        if self.class_token:
            cls = ops.broadcast_to(ops.cast(self.cls, x.dtype), (ops.shape(x)[0], 1, x.shape[-1]))
            x = ops.concatenate([cls, x], axis=1)
        return x + ops.cast(self.positions, x.dtype)

    def compute_output_shape(self, input_shape):
        b, h, w, d = input_shape
        return (b, h * w + self.class_token, d)
