"""LiT: images and texts in one space, "LiT: Zero-Shot Transfer with Locked-image text Tuning" (arXiv 2111.07991).

Weights: google-research/vision_transformer (`gs://vit_models/lit`), with the wiring of its models_lit.py. Its text towers are
BERT (arXiv 1810.04805, as google/flaxformer has it) and a plain transformer.
"""

import math
import numbers
import pathlib

import keras
import numpy as np
from keras import ops

from keras_vit import errors
from keras_vit.checkpoints import adapt, load
from keras_vit.checkpoints.dialects import flax
from keras_vit.checkpoints.names import Names, rule, within
from keras_vit.checkpoints.transforms import Part, Turned, Wrapped
from keras_vit.checkpoints.weights import google
from keras_vit.data.pixels import Pixels
from keras_vit.data.text import Tokenizer, from_dict, open_tokenizer
from keras_vit.layers import MLP, Attention, Block, ClassToken
from keras_vit.layers.taps import check_tap
from keras_vit.models import vit
from keras_vit.zoo import Contract, Family, Model, builder, check_choices, variant

TOWERS = ("both", "image", "text")
TEXT_MODELS = ("bert", "transformer")
POOLINGS = {"token": "token", "gap": "avg"}  # classifier of the image tower -> what a ViT calls it
WORDS = pathlib.Path(__file__).with_name("lit_words.txt")  # the vocabulary of LiT_mu


@keras.saving.register_keras_serializable("keras_vit")
class TextTokens(keras.layers.Layer):
    """(b, n) -> (b, n, d): looks up the vector of each token and adds that of its place.

    Args:
        vocabulary_size: how many tokens there are; they are whole numbers from 0.
        width: d.
        positions: rows of the table of places, n or more.
        segments: rows of BERT's table of segments, of which the first is added to all; 0 for none.
        stddev: of the tables' random values at the start.
    """

    def __init__(self, vocabulary_size, width, positions, segments=0, stddev=0.02, **kwargs):
        super().__init__(**kwargs)
        self.vocabulary_size, self.width, self.segment_count, self.stddev = vocabulary_size, width, segments, stddev
        self.position_count = positions

    def get_config(self):
        config = dict(vocabulary_size=self.vocabulary_size, width=self.width, positions=self.position_count)
        return {**super().get_config(), **config, "segments": self.segment_count, "stddev": self.stddev}

    def build(self, input_shape):
        def table(rows, name):
            start = keras.initializers.RandomNormal(stddev=self.stddev)
            return self.add_weight(shape=(rows, self.width), initializer=start, name=name)

        self.words, self.positions = table(self.vocabulary_size, "words"), table(self.position_count, "positions")
        self.segments = table(self.segment_count, "segments") if self.segment_count else None

    def call(self, tokens):
        x = ops.take(self.words, tokens, axis=0) + self.positions[: tokens.shape[1]]
        return x + self.segments[0] if self.segment_count else x

    def compute_output_spec(self, tokens):
        return keras.KerasTensor((*tokens.shape, self.width), dtype=self.compute_dtype)


@keras.saving.register_keras_serializable("keras_vit")
class PostNormBlock(keras.layers.Layer):
    """(b, n, d), (b, n) -> (b, n, d): BERT's block, `norm(x + attention(x))`, then `norm(x + mlp(x))`.

    The second input are the tokens: those that are 0 fill up a text and are attended to by none. What lies inside is tapped:
    `block(x, tokens, tap=...)` returns "scores" (b, heads, n, n), "attention", "attention_norm" or "mlp" instead.

    Args:
        heads, mlp: number of heads; width of the hidden layer of the MLP.
        dropout_rate: after attention and twice in the MLP.
        epsilon: of both norms.
    """

    TAPS = ("scores", "attention", "attention_norm", "mlp")

    def __init__(self, heads, mlp, dropout_rate=0.0, epsilon=1e-12, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.mlp_width, self.dropout_rate, self.epsilon = heads, mlp, dropout_rate, epsilon
        dtype = self.dtype_policy
        self.attention = Attention(heads, dtype=dtype, name="attention")
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=dtype, name="dropout")
        self.attention_norm = keras.layers.LayerNormalization(epsilon=epsilon, dtype=dtype, name="attention_norm")
        self.mlp = MLP(mlp, dropout_rate, dtype=dtype, name="mlp")
        self.mlp_norm = keras.layers.LayerNormalization(epsilon=epsilon, dtype=dtype, name="mlp_norm")

    def get_config(self):
        config = dict(heads=self.heads, mlp=self.mlp_width, dropout_rate=self.dropout_rate, epsilon=self.epsilon)
        return {**super().get_config(), **config}

    def build(self, x_shape, tokens_shape):
        for layer in (self.attention, self.attention_norm, self.mlp, self.mlp_norm):
            layer.build(x_shape)

    def call(self, x, tokens, tap=None):
        check_tap(self, tap)
        word = tokens != 0
        pairs = ops.logical_and(word[:, :, None], word[:, None, :])
        if tap == "scores":
            return self.attention(x, pairs=pairs, tap=tap)
        y = self.attention(x, pairs=pairs)
        if tap == "attention":
            return y
        x = self.attention_norm(x + self.dropout(y))
        if tap == "attention_norm":
            return x
        y = self.mlp(x)
        if tap == "mlp":
            return y
        return self.mlp_norm(x + y)

    def multiply_adds(self, input_shape):
        """Those of attention and MLP for one example (b, n, d)."""
        return self.attention.multiply_adds(input_shape) + self.mlp.multiply_adds(input_shape)

    def compute_output_spec(self, x, tokens, tap=None):
        check_tap(self, tap)
        return self.attention.compute_output_spec(x, tap=tap)


@keras.saving.register_keras_serializable("keras_vit")
class UnitLength(keras.layers.Layer):
    """(b, d) -> (b, d): each vector divided by its length plus 1e-8."""

    def call(self, x):
        length = ops.sqrt(ops.maximum(ops.sum(ops.square(x), axis=-1, keepdims=True), 1e-30))  # a slope at 0 too
        return x / (length + 1e-8)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_vit")
class Similarity(keras.layers.Layer):
    """(b, d), (c, d) -> the same: embeddings of images and of texts, beside what turns their products into logits.

    Weights: `t` (1,), and `b` (1,) where there is a bias.

    Args:
        temperature: exp(t) at the start.
        bias: b at the start (SigLIP, arXiv 2303.15343, section 3.2: -10); None for none.
    """

    def __init__(self, temperature=10.0, bias=None, **kwargs):
        super().__init__(**kwargs)
        self.first_temperature, self.first_bias = temperature, bias

    def get_config(self):
        return {**super().get_config(), "temperature": self.first_temperature, "bias": self.first_bias}

    def build(self, images_shape, texts_shape):
        def number(value, name):
            return self.add_weight(shape=(1,), initializer=keras.initializers.Constant(value), autocast=False, name=name)

        self.t = number(math.log(self.first_temperature), "t")
        self.b = None if self.first_bias is None else number(self.first_bias, "b")

    def call(self, images, texts):
        return images, texts

    def logits(self, images, texts):
        """(b, c) float32: `exp(t) * images @ texts.T`, plus b where there is a bias."""
        products = ops.matmul(ops.cast(images, "float32"), ops.transpose(ops.cast(texts, "float32")))
        logits = ops.exp(self.t) * products
        return logits if self.b is None else logits + self.b

    def compute_output_shape(self, images_shape, texts_shape):
        return images_shape, texts_shape


@keras.saving.register_keras_serializable("keras_vit")
class Tower(Model):
    """One tower of a LiT: images, or tokens, -> embeddings (b, d) of unit length.

    Attributes:
        tokenizer: of a text tower, see `LiTModel`.
    """

    @property
    def tokenizer(self):
        return _tokenizer(self)


@keras.saving.register_keras_serializable("keras_vit")
class LiTModel(Model):
    """A LiT: {"images", "tokens"} -> {"image_embeddings", "text_embeddings"}, or one half of it where it has one tower.

    Attributes:
        image_tower, text_tower: the nested functional models, None for one that it has not.
        tokenizer: of `keras_vit.data.text`: texts -> tokens (n, length) int32; None where no vocabulary is known.
        temperature: exp(t), by which products of embeddings are multiplied for logits; can be set.
        bias: added to the logits of models trained with a sigmoid; None for those without.
    """

    @property
    def image_tower(self):
        return self._part("image_tower")

    @property
    def text_tower(self):
        return self._part("text_tower")

    @property
    def tokenizer(self):
        return _tokenizer(self)

    @property
    def temperature(self):
        with np.errstate(over="ignore"):
            value = float(np.exp(load.to_numpy(self._similarity("temperature").t)[0], dtype="float32"))
        if not math.isfinite(value):
            raise errors.NonFiniteError(
                f"{self.name!r}: its temperature, the exponential of its weight t, is {value}; load intact weights, or set "
                "model.temperature = 10."
            )
        return value

    @temperature.setter
    def temperature(self, value):
        if not isinstance(value, numbers.Real) or not 0 < value < 1e30:
            raise errors.ArgumentError(f"{self.name!r}: expected a finite temperature above 0, such as 100, got {value!r}.")
        self._similarity("temperature").t.assign([math.log(value)])

    def __setattr__(self, name, value):
        if name == "temperature":  # Keras would read what is replaced, which a temperature that is not finite refuses
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def bias(self):
        b = self._similarity("bias").b
        return None if b is None else float(load.to_numpy(b)[0])

    def logits(self, image_embeddings, text_embeddings):
        """(b, d), (c, d) -> (b, c) tensor: temperature times the products of all pairs, plus the bias where there is one."""
        return self._similarity("logits").logits(image_embeddings, text_embeddings)

    def encode_image(self, images, batch_size=32):
        """Embeds images.

        Args:
            images: (n, H, W, 3) of the model's size, floats in its range (`keras_vit.preprocess_input(images, model)`).
            batch_size: images in a step.

        Returns:
            float32 (n, d), of unit length.
        """
        tower = self._needed("image_tower", "encode_image")
        images = np.asarray(images)
        size = tuple(tower.input_shape[1:])
        ready = np.issubdtype(images.dtype, np.floating) or self.weights_info.get("include_preprocessing")
        if images.ndim != 4 or images.shape[1:] != size or not ready:
            raise errors.ArgumentError(
                f"encode_image of {self.name!r}: expected floats of shape (n, {', '.join(map(str, size))}), got {images.dtype} "
                f"of shape {images.shape}; resize them, then keras_vit.preprocess_input(images, model)."
            )
        return _embedded(tower, images.astype("float32"), batch_size)

    def encode_text(self, texts, batch_size=64):
        """Embeds texts.

        Args:
            texts: a str, a list of str, or tokens (n, length), whole numbers.
            batch_size: texts in a step.

        Returns:
            float32 (n, d), of unit length.
        """
        tower = self._needed("text_tower", "encode_text")
        if isinstance(texts, str) or (not isinstance(texts, np.ndarray) and all(isinstance(each, str) for each in texts)):
            if self.tokenizer is None:
                raise errors.ArgumentError(
                    f"encode_text of {self.name!r}: it has no tokenizer for texts; build it with vocabulary=, the path or URL of "
                    "the vocabulary it was trained with, or pass tokens."
                )
            texts = self.tokenizer(texts)
        tokens, length = np.asarray(texts), tower.input_shape[1]
        known = tower.get_layer("embedding").vocabulary_size
        if tokens.ndim != 2 or tokens.shape[1] != length or not np.issubdtype(tokens.dtype, np.integer):
            raise errors.ArgumentError(
                f"encode_text of {self.name!r}: expected str, a list of str, or whole numbers of shape (n, {length}), got "
                f"{tokens.dtype} of shape {tokens.shape}; use model.tokenizer(texts)."
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < known:
            raise errors.ArgumentError(
                f"encode_text of {self.name!r}: expected tokens from 0 to {known - 1}, got {tokens.min()} to {tokens.max()}; "
                "they are of another vocabulary. Use model.tokenizer(texts)."
            )
        return _embedded(tower, tokens.astype("int32"), batch_size)

    def remember(self, **facts):
        super().remember(**facts)
        for name in ("image_tower", "text_tower"):
            if self._part(name) is not None:
                self._part(name).remember(**{**self._facts, "outside": [], "under": f"{name}/", "of": self.name})

    def _part(self, name):
        return next((layer for layer in self.layers if layer.name == name), None)

    def _needed(self, name, asked):
        if self._part(name) is None:
            raise errors.ArgumentError(f"{asked} of {self.name!r}: it has no {name}; build it with towers='both'.")
        return self._part(name)

    def _similarity(self, asked):
        return self._needed("similarity", asked)


def _tokenizer(model):
    """The tokenizer of a model's facts, made once."""
    record = model._facts.get("tokenizer")
    if record is None:
        return None
    if getattr(model, "_made_tokenizer", (None, None))[0] is not record:
        object.__setattr__(model, "_made_tokenizer", (record, from_dict(record)))
    return model._made_tokenizer[1]


def _embedded(tower, inputs, batch_size):
    """(n, d) float32: a tower's outputs, in steps of `batch_size`; the last is filled up to a power of two, for few shapes."""
    found = np.zeros((len(inputs), tower.output_shape[-1]), "float32")
    for at in range(0, len(inputs), batch_size):
        batch = inputs[at : at + batch_size]
        size = min(batch_size, 1 << (len(batch) - 1).bit_length())
        filled = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        found[at : at + len(batch)] = keras.ops.convert_to_numpy(tower.predict_on_batch(filled))[: len(batch)]
    return found


@builder
def LiT(
    weights=None,
    input_tensor=None,
    input_shape=None,
    include_preprocessing=False,
    name="LiT",
    *,
    towers="both",
    vocabulary=None,
    patch_size,
    width,
    depth,
    heads,
    mlp,
    classifier="token",
    representation_size=None,
    text_model,
    text_width,
    text_depth,
    text_heads,
    text_mlp,
    vocabulary_size,
    length=16,
    positions=512,
    out_dim=(None, None),
    temperature=10.0,
    bias=None,
    dropout_rate=0.0,
    flash_attention=None,
):
    """Builds a LiT as a functional `keras.Model` of two towers: {"images", "tokens"} -> embeddings of both in one space.

    Images are (b, H, W, 3), tokens (b, length) int32; the outputs "image_embeddings" and "text_embeddings" are (b, d) float32 of
    unit length. `LiTModel` has `encode_image`, `encode_text`, `logits`, `temperature`, `tokenizer` and each tower by itself.

    Args:
        weights: a tag of `keras_vit.list_weights`, a path or URL of an original file, or None for random weights.
        input_tensor: a symbolic Keras tensor (b, H, W, 3) to build on.
        input_shape: (H, W, 3), multiples of the patch; by default the checkpoint's own resolution, else 224.
        include_preprocessing: whether the model itself maps 0..255 into the range of its weights; otherwise call
            `keras_vit.preprocess_input`.
        name: of the model.
        towers: "both", or "image" or "text" for one alone, also from a file of both.
        vocabulary: the file of the text tower's vocabulary, a path or URL (".txt" WordPiece, ".model" SentencePiece), or a
            tokenizer of `keras_vit.data.text`; "words" is a small one of this package. None takes that which was published with
            the weights; without one, texts are given as tokens.
        patch_size: side of a patch in pixels, or (height, width).
        width, depth, heads, mlp: of the image tower, a ViT: width of the tokens, number of blocks, heads in each, hidden width of
            their MLPs.
        classifier: what embeds an image: "token", or "gap", the mean over all tokens, without a class token.
        representation_size: width of a tanh layer `pre_logits` behind it; None for none.
        text_model: "bert", which reads the first token of a text and takes 0 for the end of it, or "transformer", which reads
            the last.
        text_width, text_depth, text_heads, text_mlp: of the text tower.
        vocabulary_size: how many tokens it knows. length: of a text in tokens.
        positions: rows of BERT's table of places.
        out_dim: (images, texts): d of a linear map behind each tower, None for none; both towers must come to one d.
        temperature, bias: at the start of training; see `Similarity`.
        dropout_rate: in both towers, see `ViT` and `PostNormBlock`.
        flash_attention: see `keras_vit.layers.Attention`.

    Raises:
        errors.ArgumentError: an argument is not usable; errors.DownloadError, CheckpointFormatError, CheckpointMismatchError:
            the weights are not.
    """
    check_choices(name, towers=(towers, TOWERS), text_model=(text_model, TEXT_MODELS), classifier=(classifier, tuple(POOLINGS)))
    dims = [dim or own for dim, own in zip(out_dim, (representation_size or width, text_width))]
    if towers == "both" and dims[0] != dims[1]:
        raise errors.ArgumentError(
            f"{name}: expected both towers to give embeddings of one size, got {dims[0]} of images and {dims[1]} of texts; "
            "choose out_dim=(images, texts)."
        )
    top = Contract(FAMILY, False, weights, input_tensor, input_shape, None, None, include_preprocessing)
    inputs, embeddings = {}, {}
    if towers != "text":
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        size = vit.default_size(top, patch, classifier == "token", "image_tower/")
        x = top.given(size, lambda h, w: vit.check_size(name, (h, w), patch))
        tower = vit.ViT(
            False, None, input_shape=(*top.size, 3), pooling=POOLINGS[classifier], include_preprocessing=include_preprocessing,
            patch_size=patch_size, width=width, depth=depth, heads=heads, mlp=mlp, classifier=classifier,
            representation_size=representation_size, dropout_rate=dropout_rate, flash_attention=flash_attention,
        )  # fmt: skip
        tower = _tower("image_tower", tower.input, tower.output, out_dim[0])
        inputs["images"], embeddings["image_embeddings"] = x, tower(x)
    if towers != "image":
        tokens = keras.Input((length,), dtype="int32", name="tokens")
        encoder = _bert if text_model == "bert" else _transformer
        x = encoder(
            tokens, vocabulary_size, text_width, text_depth, text_heads, text_mlp, positions, dropout_rate, flash_attention
        )
        tower = _tower("text_tower", tokens, x, out_dim[1])
        inputs["tokens"] = keras.Input((length,), dtype="int32", name="tokens")
        embeddings["text_embeddings"] = tower(inputs["tokens"])
    if towers == "both":
        similarity = Similarity(temperature, bias, dtype="float32", name="similarity")
        embeddings = dict(zip(embeddings, similarity(*embeddings.values())))
    if "images" in inputs:
        (inputs["images"],) = keras.utils.get_source_inputs(inputs["images"])
    model = LiTModel(inputs, embeddings, name=name)
    tokenizer = None
    if towers != "image":
        tokenizer = open_vocabulary(top, name, vocabulary, text_model, vocabulary_size, length)
    model.remember(tokenizer=tokenizer and tokenizer.to_dict())
    return top.finish(model, name)


def _tower(name, inputs, x, out_dim):
    """The nested model that ends in the linear map, where there is one, and in unit length; both in float32."""
    if out_dim is not None:
        x = keras.layers.Dense(out_dim, kernel_initializer="lecun_normal", dtype="float32", name="projection")(x)
    return Tower(inputs, UnitLength(dtype="float32", name="unit_length")(x), name=name)


def _bert(tokens, vocabulary_size, width, depth, heads, mlp, positions, dropout_rate, flash_attention):
    """(b, n) -> (b, width): the first token behind the blocks of BERT; padding of zeros is attended to by none."""
    x = TextTokens(vocabulary_size, width, positions, segments=2, name="embedding")(tokens)
    x = keras.layers.LayerNormalization(epsilon=1e-12, name="embedding_norm")(x)
    x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    for i in range(depth):
        x = PostNormBlock(heads, mlp, dropout_rate, name=f"block_{i}")(x, tokens)
    return ClassToken(name="class_token")(x)


def _transformer(tokens, vocabulary_size, width, depth, heads, mlp, positions, dropout_rate, flash_attention):
    """(b, n) -> (b, width): the last token behind the blocks of a ViT's encoder; all tokens are attended to."""
    x = TextTokens(vocabulary_size, width, tokens.shape[1], stddev=width**-0.5, name="embedding")(tokens)
    for i in range(depth):
        x = Block(heads, mlp, dropout_rate, flash_attention=flash_attention, name=f"block_{i}")(x)
    x = keras.layers.LayerNormalization(epsilon=1e-6, name="encoder_norm")(x)
    return ClassToken(-1, name="last_token")(x)


def open_vocabulary(top, name, vocabulary, text_model, vocabulary_size, length):
    """The tokenizer of a text tower: of what the caller gave, else of what was published with the weights, else None."""
    if vocabulary is None and top.record is not None:
        vocabulary = top.record.vocabulary
    if vocabulary is None:
        return None
    tokenizer = vocabulary
    if not isinstance(vocabulary, Tokenizer):
        tokenizer = open_tokenizer(WORDS if vocabulary == "words" else vocabulary, length=length)
    fits = dict(kind="wordpiece" if text_model == "bert" else None, vocabulary_size=vocabulary_size, length=length)
    for what, expected in fits.items():
        if expected is not None and getattr(tokenizer, what) != expected:
            raise errors.ArgumentError(
                f"{name}: expected a vocabulary of {what.replace('_', ' ')} {expected}, got {getattr(tokenizer, what)}; "
                "it belongs to another model. Give the one that was published with the weights."
            )
    return tokenizer


# Kernels (d, heads * d / heads) of flaxformer into ours, which keep heads as an axis
_KERNEL = [Turned((0, 1, 2), (1, 2), Part(index, 3, 1)) for index in range(3)]
_BIAS = [Turned((0, 1), (2,), Part(index, 3, 0)) for index in range(3)]


def _bert_names():
    """The rules of a BERT in the spelling of google/flaxformer (architectures/bert/bert.py)."""
    root = "BertEncoder_0"
    layer = f"{root}/encoder_block/layer_sequence/layers_{{i}}"
    attention = f"{layer}/attention_block"
    parts = [
        each
        for index, part in enumerate(("query", "key", "value"))
        for each in (
            rule(f"{attention}/attention_layer/{part}/kernel", "block_{i}/attention/qkv_kernel", _KERNEL[index]),
            rule(f"{attention}/attention_layer/{part}/bias", "block_{i}/attention/qkv_bias", _BIAS[index]),
        )
    ]
    tables = {"token_ids": "words", "position_ids": "positions", "segment_ids": "segments"}
    return [
        *(rule(f"{root}/embedder/embedders_{ids}/embedding", f"embedding/{table}") for ids, table in tables.items()),
        *flax.norm(f"{root}/layer_norm", "embedding_norm"),
        *parts,
        rule(f"{attention}/dense_layer/kernel", "block_{i}/attention/out_kernel", Turned((0, 1, 2), (2, 1))),
        rule(f"{attention}/dense_layer/bias", "block_{i}/attention/out_bias"),
        *flax.norm(f"{attention}/layer_norm", "block_{i}/attention_norm"),
        *flax.dense(f"{layer}/mlp_block/mlp/dense_layer", "block_{i}/mlp/fc1"),
        *flax.dense(f"{layer}/mlp_block/dense_layer", "block_{i}/mlp/fc2"),
        *flax.norm(f"{layer}/mlp_block/layer_norm", "block_{i}/mlp_norm"),
        *flax.dense("head", "projection"),
    ]


def _transformer_names(style):
    """The rules of the plain text transformer, in a style of `vit.STYLES_OF_BLOCKS`."""
    return [
        rule("Embed_0/embedding", "embedding/words"),
        rule("pos_embedding", "embedding/positions", Wrapped(1)),
        *vit.encoder_names(*vit.STYLES_OF_BLOCKS[style], encoder="Encoder_0", head="projection"),
    ]


def _layouts():
    """{layout: Names}: files of both towers, then of each alone, which leave out the other's arrays."""
    found, similarity = {}, [rule("t", "similarity/t"), rule("b", "similarity/b")]
    stem = vit.stem_names(vit.POSITION_NAMES[""])
    images = {
        style: within(stem + vit.encoder_names(*names, head="projection"), "img/", "image_tower/")
        for style, names in vit.STYLES_OF_BLOCKS.items()
    }
    texts = {f"{style}-transformer": _transformer_names(style) for style in images}
    texts = {kind: within(rules, "txt/", "text_tower/") for kind, rules in {"bert": _bert_names(), **texts}.items()}
    for root in ("", "params/"):
        beside = {"image": ("txt/*", "t", "b"), "text": ("img/*", "t", "b")}
        beside = {tower: [root + name for name in names] for tower, names in beside.items()}
        for style, image in images.items():
            found[f"{root}{style}-bert"] = Names(image, texts["bert"], similarity).under(root)
            found[f"{root}{style}-transformer"] = Names(image, texts[f"{style}-transformer"], similarity).under(root)
        found |= {f"{root}image-{style}": Names(image).under(root, beside["image"]) for style, image in images.items()}
        found |= {f"{root}text-{kind}": Names(text).under(root, beside["text"]) for kind, text in texts.items()}
    return found


class _Positions(adapt.Positions):
    TABLE, TOKEN = "image_tower/tokens/positions", "image_tower/tokens/cls"


def _tower_of(model, tower):
    """The "image" or "text" tower of a LiT, or of itself; None where it has none."""
    return model if model._facts.get("under") == f"{tower}_tower/" else getattr(model, f"{tower}_tower", None)


def _adapters(model, *, grid, resize_patches):
    """The lossy steps of loading into `model`; see `zoo.Family`."""
    tower = _tower_of(model, "image")
    if tower is None:
        return []
    tokens = tower.get_layer("tokens")
    found = [_Positions(tokens.grid, tokens.class_token, file_grid=grid)]
    if resize_patches:
        found.append(adapt.PatchKernel(tower.get_layer("patches").kernel.shape[:2], "image_tower/patches/kernel"))
    return found


def _grid(model):
    tower = _tower_of(model, "image")
    return tower and tower.get_layer("tokens").grid


def _sizes(shapes):
    """The builder's arguments that a file's shapes, {our name: shape}, say."""
    image, text = (
        {name.removeprefix(under): shape for name, shape in shapes.items() if name.startswith(under)}
        for under in ("image_tower/", "text_tower/")
    )
    found = dict(towers="both" if image and text else "image" if image else "text")
    if image:
        (ph, pw, _, width), query = image["patches/kernel"], image["block_0/attention/qkv_kernel"]
        found |= dict(
            patch_size=ph if ph == pw else (ph, pw), width=width, depth=vit.depth(image), heads=query[1],
            mlp=image["block_0/mlp/fc1/kernel"][1], classifier="token" if "tokens/cls" in image else "gap",
            representation_size=image.get("pre_logits/kernel", (None,))[-1],
        )  # fmt: skip
    if found["towers"] != "image":
        words, mlp, query = text["embedding/words"], text["block_0/mlp/fc1/kernel"], text["block_0/attention/qkv_kernel"]
        found |= dict(vocabulary_size=words[0], text_width=words[1], text_depth=vit.depth(text), text_mlp=mlp[1])
        if "embedding/segments" in text:  # whose kernels do not tell how many heads they are for
            found |= dict(text_model="bert", positions=text["embedding/positions"][0])
        else:
            found |= dict(text_model="transformer", text_heads=query[1], length=text["embedding/positions"][0])
    if image and text:
        found["out_dim"] = tuple(tower.get("projection/kernel", (None,))[-1] for tower in (image, text))
    return found


def _written(model):
    """The layout to write where a model was loaded from none."""
    image, text = (_tower_of(model, tower) for tower in ("image", "text"))
    kind = text and ("transformer" if isinstance(text.get_layer("block_0"), Block) else "bert")
    if text is None:
        return "image-linen"
    if image is None:
        return "text-bert" if kind == "bert" else "text-linen-transformer"
    return f"linen-{kind}"


PIXELS = Pixels(whole=True)  # preprocess.py of the original
FAMILY = Family(
    "LiT",
    layouts=_layouts(),
    adapters=_adapters,
    grid=_grid,
    sizes=_sizes,
    written=_written,
    pixels=PIXELS,
    classifies=False,
)

# Sizes: configs/models.py of the original, and of BERT configs.py of google/flaxformer
BERT_B = dict(text_model="bert", text_width=768, text_depth=12, text_heads=12, text_mlp=3072, vocabulary_size=30_522)
BERT_L = dict(text_model="bert", text_width=1024, text_depth=24, text_heads=16, text_mlp=4096, vocabulary_size=30_522)
PLAIN_S = dict(text_model="transformer", text_width=384, text_depth=12, text_heads=6, text_mlp=1536, vocabulary_size=16_000)
PLAIN_TI = dict(text_model="transformer", text_width=192, text_depth=12, text_heads=3, text_mlp=768, vocabulary_size=16_000)


CARD = """The model card of google-research/vision_transformer (model_cards/lit.md) says of these models:

- No deployment, commercial or not, is within their scope. Whoever uses them in a closed setting should first test them in depth
  on that very task and its labels.
- They know English alone; texts in other languages mostly fail.
- They were started from an AugReg ViT (ImageNet-21k) and, those with a BERT, from one trained on BookCorpus and the English
  Wikipedia, and tuned on images with captions of CC12M and YFCC100M. Pictures of people are among all of these images.
- Nobody has examined their biases and their fairness. Biases of that data are to be expected in embeddings and predictions, as
  others found them in a model of the same kind, CLIP (arXiv 2103.00020, section 7): of gender, age and skin colour. Such a model
  can also be turned to coarse surveillance.

The card states no licence of its own; that of its repository is Apache-2.0.
"""
# Of the card: zero-shot accuracy in percent, and share of captions, or images, found first, on MS-COCO
_MEASURES = ("ImageNet", "CIFAR-100", "Oxford-IIIT Pets", "RESISC45", "MS-COCO image to text", "MS-COCO text to image")
_FIGURES = {
    "LiT-B16B": (72.1, 79.7, 81.1, 26.7, 49.3, 31.2), "LiT-B16B_2": (73.9, 79.0, 83.3, 25.3, 51.6, 31.8),
    "LiT-L16L": (75.7, 80.5, 83.3, 25.6, 48.5, 31.1),
}  # fmt: skip


def _card(name):
    if name not in _FIGURES:
        return f"{CARD}\nIt gives no figures of {name}.\n"
    figures = ", ".join(f"{measure} {value} %" for measure, value in zip(_MEASURES, _FIGURES[name]))
    return f"{CARD}\nIts figures for {name}, without a training example: {figures}.\n"


def _released(name, vocabulary):
    """What rows have of the file of a model, and of the vocabulary beside it, that it was trained with."""
    source = f"gs://vit_models/lit/{name}.{vocabulary}"
    record = google(f"lit/{name}", classes=None, activation=None, pixels=PIXELS, vocabulary=source, card=_card(name))
    return dict(weights={"lit": record}, upstream=(name,), default="lit", patch_size=16)


MU = dict(text_model="bert", text_width=64, text_depth=2, text_heads=2, text_mlp=128, vocabulary_size=397, positions=16)
LiT_mu = variant(
    "LiT_mu", LiT, **vit.MU, **MU, patch_size=8, vocabulary="words", out_dim=(None, 64), resolution=32, default="lit",
    params=178_369, macs=2_502_912,
)  # fmt: skip
LiT_B16B = variant(
    "LiT_B16B", LiT, **vit.B, **BERT_B, out_dim=(768, 768), params=195_871_489, macs=18_927_912_960,
    **_released("LiT-B16B", "txt"),
)  # fmt: skip
LiT_B16B_2 = variant(
    "LiT_B16B_2", LiT, **vit.B, **BERT_B, out_dim=(None, 768), params=195_280_897, macs=18_927_323_136,
    **_released("LiT-B16B_2", "txt"),
)  # fmt: skip
LiT_L16L = variant(
    "LiT_L16L", LiT, **vit.L, **BERT_L, out_dim=(None, 1024), params=638_443_521, macs=66_399_158_272,
    **_released("LiT-L16L", "txt"),
)  # fmt: skip
LiT_L16S = variant(
    "LiT_L16S", LiT, **vit.L, **PLAIN_S, out_dim=(None, 1024), params=331_140_353, macs=61_896_179_712,
    **_released("LiT-L16S", "model"),
)  # fmt: skip
LiT_L16Ti = variant(
    "LiT_L16Ti", LiT, **vit.L, **PLAIN_TI, out_dim=(None, 1024), params=311_913_089, macs=61_639_999_488,
    **_released("LiT-L16Ti", "model"),
)  # fmt: skip
