import collections

import keras
from keras import ops


def normal(stddev):
    """The initialiser of a normal distribution, None for None."""
    return stddev and keras.initializers.RandomNormal(stddev=stddev)


@keras.saving.register_keras_serializable("keras_vit")
class MLP(keras.layers.Layer):
    """(b, n, d) -> (b, n, d): two dense layers with GELU between, the same for every token.

    Args:
        hidden: width of the hidden layer.
        dropout_rate: dropout after the activation and after the second layer, as in the original.
        gelu: "tanh" (Flax's default, the approximation) or "exact" (PyTorch's default, by the error function).
        kernel_stddev: of the normal distribution that kernels start from, biases then from 0; None for Xavier's uniform.
    """

    def __init__(self, hidden, dropout_rate=0.0, gelu="tanh", kernel_stddev=None, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.dropout_rate, self.gelu, self.kernel_stddev = hidden, dropout_rate, gelu, kernel_stddev
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy, name="dropout")

    def build(self, input_shape):
        def dense(width, name):
            kernel, bias = normal(self.kernel_stddev) or "glorot_uniform", "zeros" if self.kernel_stddev else normal(1e-6)
            return keras.layers.Dense(
                width, kernel_initializer=kernel, bias_initializer=bias, dtype=self.dtype_policy, name=name
            )

        self.fc1, self.fc2 = dense(self.hidden, "fc1"), dense(input_shape[-1], "fc2")
        self.fc1.build((None, input_shape[-1]))
        self.fc2.build((None, self.hidden))

    def call(self, x):
        shape = (-1, *ops.shape(x)[1:])
        x = ops.reshape(x, (-1, x.shape[-1]))  # one matrix product over all tokens is faster than one for each image
        x = keras.activations.gelu(self.fc1(x), approximate=self.gelu == "tanh")
        return ops.reshape(self.dropout(self.fc2(self.dropout(x))), shape)

    def multiply_adds(self, input_shape):
        """ "linear" of both layers for one example (b, n, d)."""
        _, n, d = input_shape
        return collections.Counter(linear=2 * n * d * self.hidden)

    def compute_output_shape(self, input_shape):
        return input_shape
