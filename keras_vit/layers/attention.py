import collections
import math

import keras
from keras import ops


def _uniform(fan_in, fan_out):
    """Xavier's uniform initialiser for a matrix that is stored with more than two axes."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    return keras.initializers.RandomUniform(-limit, limit)


@keras.saving.register_keras_serializable("keras_vit")
class Attention(keras.layers.Layer):
    """(b, n, d) -> (b, n, d): multi-head self-attention; query, key and value by one fused product.

    With `query` (b, m, d) it is cross-attention, (b, m, d): m queries on n keys and values.

    The softmax is computed in float32 whatever the compute type. Weights: `qkv_kernel` (d, 3, heads, d / heads), `qkv_bias`
    (3, heads, d / heads), `out_kernel` (heads, d / heads, d), `out_bias` (d,); the first axis of size 3 is query, key, value.

    Args:
        heads: number of heads; must divide the width.
        dropout_rate: dropout on the attention weights.
        flash_attention: True computes by `keras.ops.dot_product_attention`, which takes the fused kernel of an accelerator where
            there is one; False by two matrix products; None by the former on JAX and PyTorch devices that are no CPU. The
            numbers are the same. Attention dropout in training always takes the matrix products, since the fused op has none.
    """

    def __init__(self, heads, dropout_rate=0.0, flash_attention=None, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.dropout_rate, self.flash_attention = heads, dropout_rate, flash_attention
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy, name="dropout")

    def build(self, input_shape):
        width = input_shape[-1]
        if width % self.heads:
            raise ValueError(f"Attention {self.name!r}: width {width} is not divisible by heads={self.heads}; choose a divisor.")
        size, init = width // self.heads, _uniform(width, width)
        self.qkv_kernel = self.add_weight(shape=(width, 3, self.heads, size), initializer=init, name="qkv_kernel")
        self.qkv_bias = self.add_weight(shape=(3, self.heads, size), initializer="zeros", name="qkv_bias")
        self.qkv_kernel.fused_axis, self.qkv_bias.fused_axis = 1, 0  # for `training.optimizers.Adafactor`
        self.out_kernel = self.add_weight(shape=(self.heads, size, width), initializer=init, name="out_kernel")
        self.out_bias = self.add_weight(shape=(width,), initializer="zeros", name="out_bias")

    def call(self, x, query=None, training=None, tap=None):
        """Returns (b, n, d), or the attention weights (b, heads, query, key) in float32 with tap="scores"."""
        if query is None:
            projected = [self._project(x, self.qkv_kernel, self.qkv_bias)]
        else:
            projected = [self._project(query, self.qkv_kernel[:, :1], self.qkv_bias[:1])]
            projected += [self._project(x, self.qkv_kernel[:, 1:], self.qkv_bias[1:])]
        tokens, width = ops.shape(projected[0])[1], x.shape[-1]
        scale = (width // self.heads) ** -0.5
        if tap is None and self._fused(x, training):
            q, k, v = (part for each in projected for part in ops.unstack(each, each.shape[2], axis=2))
            mixed = ops.dot_product_attention(q, k, v, scale=scale)
        else:
            projected = [ops.transpose(each, (2, 0, 3, 1, 4)) for each in projected]
            q, k, v = (part for each in projected for part in ops.unstack(each, each.shape[0], axis=0))
            scores = ops.matmul(q * ops.cast(scale, q.dtype), ops.transpose(k, (0, 1, 3, 2)))
            scores = ops.softmax(ops.cast(scores, "float32"), axis=-1)
            if tap == "scores":
                return scores
            scores = self.dropout(ops.cast(scores, self.compute_dtype), training=training)
            mixed = ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3))
        mixed = ops.matmul(ops.reshape(mixed, (-1, width)), ops.reshape(self.out_kernel, (width, width))) + self.out_bias
        return ops.reshape(mixed, (-1, tokens, width))

    def _project(self, x, kernel, bias):
        """(b, n, d) -> (b, n, parts, heads, d / heads), for a kernel (d, parts, heads, d / heads)."""
        tokens, width = ops.shape(x)[1], x.shape[-1]
        x = ops.reshape(x, (-1, width))  # one matrix product over all tokens is faster than one for each image
        x = ops.matmul(x, ops.reshape(kernel, (width, -1))) + ops.reshape(bias, (-1,))
        return ops.reshape(x, (-1, tokens, *kernel.shape[1:]))

    def _fused(self, x, training):
        if training and self.dropout_rate:
            return False
        if self.flash_attention is None:
            return _on_accelerator(x)
        return self.flash_attention

    def multiply_adds(self, input_shape, queries=None):
        """Of one example: "linear" of the four projections, "matmul" of the scores and their use.

        Args:
            input_shape: (b, n, d).
            queries: m; n if None.
        """
        n, d = input_shape[1:]
        m = n if queries is None else queries
        return collections.Counter(linear=2 * (m + n) * d * d, matmul=2 * m * n * d)

    def compute_output_spec(self, x, query=None, training=None, tap=None):
        b, n, d = x.shape
        m = n if query is None else query.shape[1]
        if tap == "scores":
            return keras.KerasTensor((b, self.heads, m, n), dtype="float32")
        return keras.KerasTensor((b, m, d), dtype=self.compute_dtype)


def _on_accelerator(x):
    """Whether x is computed by an accelerator for which Keras has a fused kernel, which it has not on TensorFlow."""
    if keras.config.backend() == "torch":
        return x.device.type != "cpu"
    return keras.config.backend() == "jax" and not keras.distribution.list_devices()[0].startswith("cpu")
