import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_vit")
class ClassToken(keras.layers.Layer):
    """(b, n, d) -> (b, d): the first token."""

    def call(self, x):
        return x[:, 0]


@keras.saving.register_keras_serializable("keras_vit")
class PatchTokens(keras.layers.Layer):
    """(b, 1 + n, d) -> (b, n, d): all tokens but the class token."""

    def call(self, x):
        return x[:, 1:]


@keras.saving.register_keras_serializable("keras_vit")
class MeanTokens(keras.layers.Layer):
    """(b, n, d) -> (b, d): the mean over the tokens, summed in float32."""

    def call(self, x):
        return ops.cast(ops.mean(ops.cast(x, "float32"), axis=1), self.compute_dtype)


@keras.saving.register_keras_serializable("keras_vit")
class PatchGrid(keras.layers.Layer):
    """(b, h * w, d) -> (b, h, w, d): tokens back on their grid.

    Args:
        grid: (h, w).
    """

    def __init__(self, grid, **kwargs):
        super().__init__(**kwargs)
        self.grid = tuple(grid)

    def call(self, x):
        return ops.reshape(x, (-1, *self.grid, x.shape[-1]))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *self.grid, input_shape[-1])
