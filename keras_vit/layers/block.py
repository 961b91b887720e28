import keras

from keras_vit.layers.attention import Attention
from keras_vit.layers.drop import DropPath
from keras_vit.layers.mlp import MLP
from keras_vit.layers.scale import LayerScale
from keras_vit.layers.taps import check_tap


@keras.saving.register_keras_serializable("keras_vit")
class Block(keras.layers.Layer):
    """(b, n, d) -> (b, n, d): pre-norm transformer encoder block, `x + attention(norm(x))`, then `x + mlp(norm(x))`.

    A second input (heads, n, n) is added to the attention's scores before the softmax.

    What lies inside is tapped: `block(x, tap=...)` returns "attention_norm", "scores" (b, heads, n, n), "attention",
    "mlp_norm" or "mlp" instead of the block's output, from the same code.

    Args:
        heads, mlp: number of heads; width of the hidden layer of the MLP.
        dropout_rate: after attention and twice in the MLP. attention_dropout_rate: on the attention weights.
        drop_path_rate: probability that an example skips a residual branch in training (stochastic depth).
        flash_attention: see `Attention`.
        gelu: of the MLP, "tanh" or "exact"; see `MLP`.
        layer_scale: start of the numbers that scale what both branches add (see `LayerScale`); None for none.
        kernel_stddev: see `Attention` and `MLP`.
        qkv_bias: see `Attention`. epsilon: of both norms.
    """

    TAPS = ("attention_norm", "scores", "attention", "mlp_norm", "mlp")
    ATTENTION = Attention  # its kind, which a descendant may change
    RENORMED = False  # whether the second norm is on the residual stream itself, which a descendant may change too

    def __init__(
        self,
        heads,
        mlp,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        drop_path_rate=0.0,
        flash_attention=None,
        gelu="tanh",
        layer_scale=None,
        kernel_stddev=None,
        qkv_bias="qkv",
        epsilon=1e-6,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.heads, self.mlp_width, self.dropout_rate = heads, mlp, dropout_rate
        self.attention_dropout_rate, self.drop_path_rate = attention_dropout_rate, drop_path_rate
        self.flash_attention, self.gelu, self.layer_scale = flash_attention, gelu, layer_scale
        self.kernel_stddev, self.qkv_bias, self.epsilon = kernel_stddev, qkv_bias, epsilon
        dtype = self.dtype_policy
        self.attention_norm = keras.layers.LayerNormalization(epsilon=epsilon, dtype=dtype, name="attention_norm")
        self.attention = self.ATTENTION(
            heads, attention_dropout_rate, flash_attention, qkv_bias, kernel_stddev, dtype=dtype, name="attention"
        )
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=dtype, name="dropout")
        self.mlp_norm = keras.layers.LayerNormalization(epsilon=epsilon, dtype=dtype, name="mlp_norm")
        self.mlp = MLP(mlp, dropout_rate, gelu, kernel_stddev, dtype=dtype, name="mlp")
        self.drop_path = DropPath(drop_path_rate, dtype=dtype, name="drop_path")
        self.scales = []
        if layer_scale is not None:
            self.scales = [LayerScale(layer_scale, dtype=dtype, name=f"{branch}_scale") for branch in ("attention", "mlp")]

    def build(self, x_shape, bias_shape=None):
        for layer in (self.attention_norm, self.attention, self.mlp_norm, self.mlp, self.drop_path, *self.scales):
            layer.build(x_shape)

    def call(self, x, bias=None, tap=None):
        check_tap(self, tap)
        y = self.attention_norm(x)
        if tap == "attention_norm":
            return y
        if tap in self.attention.INSIDE:
            return self.attention(y, bias=bias, tap=tap)
        y = self.attention(y, bias=bias)
        if tap == "attention":
            return y
        x = x + self.drop_path(self._scaled(0, self.dropout(y)))
        y = self.mlp_norm(x)
        if tap == "mlp_norm":
            return y
        x = y if self.RENORMED else x
        y = self.mlp(y)
        if tap == "mlp":
            return y
        return x + self.drop_path(self._scaled(1, y))

    def _scaled(self, branch, y):
        return self.scales[branch](y) if self.scales else y

    def multiply_adds(self, input_shape):
        """Those of attention and MLP for one example (b, n, d)."""
        return self.attention.multiply_adds(input_shape) + self.mlp.multiply_adds(input_shape)

    def compute_output_spec(self, x, bias=None, tap=None):
        check_tap(self, tap)
        return self.attention.compute_output_spec(x, tap=tap)
