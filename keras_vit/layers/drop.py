import keras


@keras.saving.register_keras_serializable("keras_vit")
class DropPath(keras.layers.Dropout):
    """(b, ...) -> (b, ...): in training, zeroes whole examples of a residual branch and scales the others by 1 / (1 - rate).

    Stochastic depth (arXiv 1603.09382), a draw for each example.
    """

    def __init__(self, rate, **kwargs):
        super().__init__(rate, **kwargs)

    def build(self, input_shape):
        self.noise_shape = (None, *(1 for _ in input_shape[1:]))

    def get_config(self):
        config = super().get_config()
        config.pop("noise_shape", None)
        return config
