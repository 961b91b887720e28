import keras


@keras.saving.register_keras_serializable("keras_vit")
class LayerScale(keras.layers.Layer):
    """(..., d) -> (..., d): each channel of a residual branch times a learned number (CaiT, arXiv 2103.17239, section 2).

    Args:
        start: of the numbers, such as 1e-5; small ones let a deep network begin as the identity.
    """

    def __init__(self, start, **kwargs):
        super().__init__(**kwargs)
        self.start = start

    def build(self, input_shape):
        self.gamma = self.add_weight(shape=(input_shape[-1],), initializer=keras.initializers.Constant(self.start), name="gamma")

    def call(self, x):
        return x * self.gamma

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_vit")
class Affine(keras.layers.Layer):
    """(..., d) -> (..., d): each channel times a learned number plus another (ResMLP, arXiv 2105.03404, section 2.1)."""

    def build(self, input_shape):
        self.gamma = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="beta")

    def call(self, x):
        return x * self.gamma + self.beta

    def compute_output_shape(self, input_shape):
        return input_shape
