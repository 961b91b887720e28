import collections
import math

import keras
from keras import ops

from keras_vit.layers.mlp import normal


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
    `bias` (heads, n, n), which a caller may pass, is added to the scores before the softmax. `pairs` (b, n, n) says which pairs
    of query and key count: False means a score of -1e10, so that a query none of whose keys count attends to all alike.

    Args:
        heads: number of heads; must divide the width.
        dropout_rate: dropout on the attention weights.
        flash_attention: True computes by `keras.ops.dot_product_attention`, which takes the fused kernel of an accelerator where
            there is one; False by two matrix products; None by the former on JAX and PyTorch devices that are no CPU. The
            numbers are the same. `pairs`, and attention dropout in training, always take the matrix products.
        qkv_bias: which of query, key and value have a bias: "qkv", "qv" (BEiT's; `qkv_bias` is (2, heads, d / heads)) or "".
        kernel_stddev: of the normal distribution that kernels start from; None for Xavier's uniform.
    """

    INSIDE = ("scores",)  # what `tap` names

    def __init__(self, heads, dropout_rate=0.0, flash_attention=None, qkv_bias="qkv", kernel_stddev=None, **kwargs):
        super().__init__(**kwargs)
        self.kernel_stddev = kernel_stddev
        self.heads, self.dropout_rate, self.flash_attention = heads, dropout_rate, flash_attention
        if qkv_bias not in ("qkv", "qv", ""):
            raise ValueError(f"Attention {self.name!r}: qkv_bias must be 'qkv', 'qv' or '', got {qkv_bias!r}.")
        self.biased = qkv_bias
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy, name="dropout")

    def build(self, input_shape):
        width = input_shape[-1]
        if width % self.heads:
            raise ValueError(f"Attention {self.name!r}: width {width} is not divisible by heads={self.heads}; choose a divisor.")
        size, init = width // self.heads, normal(self.kernel_stddev) or _uniform(width, width)
        self.qkv_kernel = self.add_weight(shape=(width, 3, self.heads, size), initializer=init, name="qkv_kernel")
        self.qkv_kernel.fused_axis, self.qkv_bias = 1, None  # the axis is for `training.optimizers.Adafactor`
        if self.biased:
            shape = (len(self.biased), self.heads, size)
            self.qkv_bias = self.add_weight(shape=shape, initializer="zeros", name="qkv_bias")
            self.qkv_bias.fused_axis = 0
        self.out_kernel = self.add_weight(shape=(self.heads, size, width), initializer=init, name="out_kernel")
        self.out_bias = self.add_weight(shape=(width,), initializer="zeros", name="out_bias")

    def call(self, x, query=None, bias=None, pairs=None, training=None, tap=None):
        """Returns (b, n, d), or the attention weights (b, heads, query, key) in float32 with tap="scores"."""
        if query is None:
            projected = [self._project(x, 0, 3)]
        else:
            projected = [self._project(query, 0, 1), self._project(x, 1, 3)]
        tokens, width = ops.shape(projected[0])[1], x.shape[-1]
        scale = (width // self.heads) ** -0.5
        if tap is None and pairs is None and self._fused(x, training):
            q, k, v = (part for each in projected for part in ops.unstack(each, each.shape[2], axis=2))
            bias = None if bias is None else ops.cast(bias, q.dtype)[None]
            mixed = ops.dot_product_attention(q, k, v, bias, scale=scale)
        else:
            projected = [ops.transpose(each, (2, 0, 3, 1, 4)) for each in projected]
            q, k, v = (part for each in projected for part in ops.unstack(each, each.shape[0], axis=0))
            scores = ops.matmul(q * ops.cast(scale, q.dtype), ops.transpose(k, (0, 1, 3, 2)))
            scores = ops.cast(scores, "float32")
            scores = scores if bias is None else scores + ops.cast(bias, "float32")
            scores = self._weights(scores if pairs is None else ops.where(pairs[:, None], scores, -1e10), tap)
            if tap in self.INSIDE:
                return scores
            scores = self.dropout(ops.cast(scores, self.compute_dtype), training=training)
            mixed = ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3))
        mixed = ops.matmul(ops.reshape(mixed, (-1, width)), ops.reshape(self.out_kernel, (width, width))) + self.out_bias
        return ops.reshape(mixed, (-1, tokens, width))

    def _weights(self, scores, tap):
        """The attention weights of scores (b, heads, query, key), or what `tap` names of what leads to them."""
        return ops.softmax(scores, axis=-1)

    def _project(self, x, start, end):
        """(b, n, d) -> (b, n, end - start, heads, d / heads): parts of query (0), key (1) and value (2)."""
        kernel, tokens, width = self.qkv_kernel[:, start:end], ops.shape(x)[1], x.shape[-1]
        x = ops.reshape(x, (-1, width))  # one matrix product over all tokens is faster than one for each image
        x = ops.matmul(x, ops.reshape(kernel, (width, -1)))
        if self.biased:
            x = x + ops.reshape(self._biases()[start:end], (-1,))
        return ops.reshape(x, (-1, tokens, *kernel.shape[1:]))

    def _biases(self):
        """(3, heads, d / heads), zeros for the key where only query and value have a bias."""
        biases = ops.convert_to_tensor(self.qkv_bias)
        if self.biased == "qkv":
            return biases
        query, value = ops.unstack(biases, 2)
        return ops.stack([query, ops.zeros_like(query), value])

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

    def compute_output_spec(self, x, query=None, bias=None, pairs=None, training=None, tap=None):
        b, n, d = x.shape
        m = n if query is None else query.shape[1]
        if tap in self.INSIDE:
            return keras.KerasTensor((b, self.heads, m, n), dtype="float32")
        return keras.KerasTensor((b, m, d), dtype=self.compute_dtype)


def _on_accelerator(x):
    """Whether x is computed by an accelerator for which Keras has a fused kernel, which it has not on TensorFlow."""
    if keras.config.backend() == "torch":
        return x.device.type != "cpu"
    return keras.config.backend() == "jax" and not keras.distribution.list_devices()[0].startswith("cpu")
