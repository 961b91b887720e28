import keras
from keras import ops

from keras_vit.layers.attention import Attention
from keras_vit.layers.mlp import MLP
from keras_vit.layers.taps import check_tap


@keras.saving.register_keras_serializable("keras_vit")
class ClassToken(keras.layers.Layer):
    """(b, n, d) -> (b, d): the first token, or the one that is `at` another place.

    Args:
        at: its place; DeiT's distillation token is at 1.
    """

    def __init__(self, at=0, **kwargs):
        super().__init__(**kwargs)
        self.at = at

    def call(self, x):
        return x[:, self.at]


@keras.saving.register_keras_serializable("keras_vit")
class PatchTokens(keras.layers.Layer):
    """(b, m + n, d) -> (b, n, d): all tokens but the learned ones before them.

    Args:
        learned: m; 1 is the class token alone.
    """

    def __init__(self, learned=1, **kwargs):
        super().__init__(**kwargs)
        self.learned = learned

    def call(self, x):
        return x[:, self.learned :]


@keras.saving.register_keras_serializable("keras_vit")
class MeanTokens(keras.layers.Layer):
    """(b, n, d) or (b, h, w, d) -> (b, d): the mean over the tokens, summed in float32."""

    def call(self, x):
        inner = tuple(range(1, len(x.shape) - 1))
        return ops.cast(ops.mean(ops.cast(x, "float32"), axis=inner), self.compute_dtype)


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


@keras.saving.register_keras_serializable("keras_vit")
class MapHead(keras.layers.Layer):
    """(b, n, d) -> (b, d): multi-head attention pooling; a learned query looks at all tokens, then x + mlp(norm(x)).

    Of "Scaling Vision Transformers" (arXiv 2106.04560). `MapHead(...)(x, tap=...)` gives "scores" (b, heads, 1, n) or
    "attention" (b, 1, d) instead.

    Args:
        heads, mlp: number of heads; width of the hidden layer of the MLP.
    """

    TAPS = ("scores", "attention")

    def __init__(self, heads, mlp, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.mlp_width = heads, mlp
        self.attention = Attention(heads, dtype=self.dtype_policy, name="attention")
        self.norm = keras.layers.LayerNormalization(epsilon=1e-6, dtype=self.dtype_policy, name="norm")
        self.mlp = MLP(mlp, dtype=self.dtype_policy, name="mlp")

    def get_config(self):
        return {**super().get_config(), "heads": self.heads, "mlp": self.mlp_width}

    def build(self, input_shape):
        one = (None, 1, input_shape[-1])
        self.probe = self.add_weight(shape=(1, *one[1:]), initializer="glorot_uniform", name="probe")
        self.attention.build(input_shape)
        self.norm.build(one)
        self.mlp.build(one)

    def call(self, x, tap=None):
        check_tap(self, tap)
        query = ops.broadcast_to(ops.cast(self.probe, x.dtype), (ops.shape(x)[0], 1, x.shape[-1]))
        x = self.attention(x, query=query, tap="scores" if tap == "scores" else None)
        if tap:
            return x
        return (x + self.mlp(self.norm(x)))[:, 0]

    def multiply_adds(self, input_shape):
        """Those of attention with one query and of the MLP on its result, for one example (b, n, d)."""
        one = (None, 1, input_shape[-1])
        return self.attention.multiply_adds(input_shape, queries=1) + self.mlp.multiply_adds(one)

    def compute_output_spec(self, x, tap=None):
        check_tap(self, tap)
        b, n, d = x.shape
        if tap == "scores":
            return keras.KerasTensor((b, self.heads, 1, n), dtype="float32")
        return keras.KerasTensor((b, 1, d) if tap else (b, d), dtype=self.compute_dtype)
