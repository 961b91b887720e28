import collections

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_vit")
class MLP(keras.layers.Layer):
    """(b, n, d) -> (b, n, d): two dense layers with GELU between, the same for every token.

    Args:
        hidden: width of the hidden layer.
        dropout_rate: dropout after the activation and after the second layer, as in the original.
        gelu: "tanh" (Flax's default, the approximation) or "exact" (PyTorch's default, by the error function).
    """

    def __init__(self, hidden, dropout_rate=0.0, gelu="tanh", **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.dropout_rate, self.gelu = hidden, dropout_rate, gelu
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy, name="dropout")

    def build(self, input_shape):
        def dense(width, name):
            bias = keras.initializers.RandomNormal(stddev=1e-6)
            return keras.layers.Dense(width, bias_initializer=bias, dtype=self.dtype_policy, name=name)

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
