"""Two towers learn that an image and its caption belong together (CLIP, arXiv 2103.00020; LiT, 2111.07991; SigLIP, 2303.15343).

    graph = paired(model, "Lu")  # the image tower stays as it is, the text tower learns
    learner = Learner(graph.inputs, graph.outputs, objective=Outputs(graph))
    learner.compile(optimizer)
    batches = pipeline.train_batches(open_captions("flickr", "train"), size=224, batch=256)
    learner.fit(tokenized(batches, model.tokenizer), steps_per_epoch=1000)

It trains the layers of `model` itself. The loss of a pair depends on all others of the batch, on whatever device they are: under
`tf.distribute` the embeddings of all replicas are gathered, and the gradient flows back to where each was made; on JAX a batch is
one array over all devices. A batch that goes through in parts would be another loss, of fewer pairs at a time: `check_parts`.
"""

import dataclasses
import functools

import keras
import numpy as np
from keras import ops

from keras_vit import zoo
from keras_vit.checkpoints.load import to_numpy
from keras_vit.errors import ArgumentError, DataError
from keras_vit.training.step import Learner

LOSSES = ("softmax", "sigmoid")
DUPLICATES = ("negative", "positive")
LETTERS = "LUu"
RECALLS = (1, 5, 10)
_ROWS = 1024  # of scores at once in an evaluation


def check_towers(towers):
    """Refuses what does not say how two towers are trained: "Lu", "Uu", "UU", "LU", "uu" and so on, as the paper's section 5.1.

    The first letter is the image tower's, the second the text tower's: L locked, U from pre-trained weights, u from random ones.

    Raises:
        ArgumentError: other letters, or both locked.
    """
    if len(towers) != 2 or set(towers) - set(LETTERS) or towers == "LL":
        raise ArgumentError(
            "towers: expected two letters of L (locked), U (pre-trained, trained on) and u (from scratch), the image tower's and "
            f"the text tower's, such as 'Lu', got {towers!r}{'; one of them must learn' if towers == 'LL' else ''}."
        )


def check_parts(parts):
    """Refuses to cut a batch into parts.

    Raises:
        ArgumentError: there are several.
    """
    if parts != 1:
        raise ArgumentError(
            f"contrastive training: accum_steps must be 1, got {parts}. Each pair is told from all others of its batch, so that "
            "the mean over parts is the loss of a batch as small as they. Take fewer pairs, more devices, or remat=True."
        )


# ---------------------------------------------------------------- losses


def pair_losses(images, texts, all_images, all_texts, positive, temperature, bias=None, kind="softmax"):
    """(b, d) images, (b, d) texts, (B, d) both of the whole batch, (b, B) which belong together -> (b,) losses.

    Args:
        images, texts, all_images, all_texts: embeddings of unit length.
        positive: 1 or 0; every row has a 1.
        temperature: scores are this times the embeddings' products.
        bias: added to the scores of "sigmoid", or None.
        kind: "softmax": the cross-entropy of an image's scores with all texts, and of a text's with all images, half of each
            (LiT, section 3); several that belong together share the target evenly. "sigmoid": binary cross-entropy of every
            score, summed over the batch (SigLIP, section 3.2).
    """
    scores = temperature * ops.matmul(images, ops.transpose(all_texts))
    if kind == "sigmoid":
        return -ops.sum(ops.log_sigmoid((2 * positive - 1) * (scores if bias is None else scores + bias)), axis=-1)
    back = temperature * ops.matmul(texts, ops.transpose(all_images))
    target = positive / ops.sum(positive, axis=-1, keepdims=True)
    return -ops.sum(target * (ops.log_softmax(scores) + ops.log_softmax(back)), axis=-1) / 2


def same_tokens(tokens, all_tokens):
    """(b, n), (B, n) -> float32 (b, B): 1 where all n are equal."""
    columns = (ops.equal(tokens[:, None, i], all_tokens[None, :, i]) for i in range(tokens.shape[-1]))
    return ops.cast(functools.reduce(ops.logical_and, columns), "float32")


def everywhere(x):
    """(b, n) of this replica -> ((replicas * b, n) of all in their order, the place of this one's first row there).

    The gradient of a row goes back to the replica that it came from, summed over all that used it.
    """
    if keras.config.backend() != "tensorflow":  # where an array is that of all devices
        return x, 0
    import tensorflow as tf

    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return x, 0
    number = replica.replica_id_in_sync_group
    # A sum of what each puts into its own place, for its gradient is a sum over the replicas on every kind of device
    place = tf.one_hot(number, replica.num_replicas_in_sync, dtype=x.dtype)[:, None, None]
    whole = replica.all_reduce(tf.distribute.ReduceOp.SUM, place * x[None])
    return tf.reshape(whole, (-1, x.shape[-1])), tf.cast(number, tf.int32) * tf.shape(x)[0]


@keras.saving.register_keras_serializable("keras_vit")
class PairLoss(keras.layers.Layer):
    """[(b, d) images, (b, d) texts, (b, n) tokens] -> (b, 1): the loss of each pair among those of all replicas.

    Args:
        scale: the layer that owns the logarithm of the temperature, `t`, and a bias, `b`, or None for that.
        kind: see `pair_losses`.
        duplicates: "negative" takes an image's own text alone as right, as CLIP, LiT and SigLIP do, also where another one has
            the same words; "positive" takes all that have the same tokens (UniCL, arXiv 2204.03610, equation 3).
    """

    def __init__(self, scale, kind="softmax", duplicates="negative", **kwargs):
        super().__init__(**kwargs)
        if kind not in LOSSES or duplicates not in DUPLICATES:
            raise ArgumentError(
                f"PairLoss: kind must be one of {', '.join(LOSSES)} and duplicates one of {', '.join(DUPLICATES)}, got {kind!r} "
                f"and {duplicates!r}."
            )
        self.scale, self.kind, self.duplicates = scale, kind, duplicates

    def call(self, inputs):
        images, texts, tokens = inputs
        tokens = ops.cast(tokens, images.dtype)  # exact below 2**24
        width = images.shape[-1]
        whole, first = everywhere(ops.concatenate([images, texts, ops.stop_gradient(tokens)], axis=-1))
        all_images, all_texts, all_tokens = whole[:, :width], whole[:, width : 2 * width], whole[:, 2 * width :]
        if self.duplicates == "positive":
            positive = same_tokens(tokens, all_tokens)
        else:
            positive = ops.one_hot(first + ops.arange(ops.shape(images)[0]), ops.shape(whole)[0], dtype=images.dtype)
        everything = images, texts, all_images, all_texts, positive, ops.exp(self.scale.t), self.scale.b, self.kind
        return pair_losses(*everything)[:, None]

    def compute_output_shape(self, input_shape):
        return (input_shape[0][0], 1)

    def get_config(self):
        own = dict(scale=keras.saving.serialize_keras_object(self.scale), kind=self.kind, duplicates=self.duplicates)
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "scale": keras.saving.deserialize_keras_object(config["scale"])})


# ---------------------------------------------------------------- towers


@keras.saving.register_keras_serializable("keras_vit")
class Locked(keras.layers.Layer):
    """What a model gives, as it is: without dropout, without a gradient.

    Args:
        model: with one input and one output.
    """

    def __init__(self, model, **kwargs):
        super().__init__(**kwargs)
        self.model = model

    def call(self, x):
        return ops.stop_gradient(self.model(x, training=False))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *self.model.output_shape[1:])

    def get_config(self):
        return {**super().get_config(), "model": keras.saving.serialize_keras_object(self.model)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "model": keras.saving.deserialize_keras_object(config["model"])})


def backbone(tower):
    """A tower up to the linear map that ends it, where it has one; else the whole tower."""
    last = zoo.tap_input(tower, tower.layers[-1].name)
    before = last._keras_history.operation
    return keras.Model(tower.inputs, zoo.tap_input(tower, before.name)) if isinstance(before, keras.layers.Dense) else tower


def paired(model, towers, kind="softmax", duplicates="negative", embedded=False):
    """A new graph of a model's layers: {"images", "tokens"} -> the loss of each pair (b, 1).

    A locked tower is locked up to the linear map that ends it, if it has one: that learns, for from random weights it would not
    mean anything.

    Args:
        model: with `image_tower`, `text_tower` and a layer `similarity`, such as `keras_vit.LiT`.
        towers: see `check_towers`.
        kind, duplicates: of `PairLoss`.
        embedded: whether in the place of images there is what the `backbone` of the locked image tower makes of them.

    Raises:
        ArgumentError: a value out of range, or a sigmoid loss of a model without a bias.
    """
    check_towers(towers)
    similarity = model.get_layer("similarity")
    if kind == "sigmoid" and similarity.b is None:
        raise ArgumentError(f"{model.name}: the sigmoid loss needs a model with a bias; build it with bias=-10.0.")
    inputs, embeddings, frozen = [], [], []
    for name, tower, letter in zip(("images", "tokens"), (model.image_tower, model.text_tower), towers):
        locked = backbone(tower) if letter == "L" else None
        given, dtype = (locked.output_shape[1:], "float32") if embedded and name == "images" else (tower.input_shape[1:], None)
        x = keras.Input(given, dtype=dtype or tower.inputs[0].dtype, name=name)
        inputs.append(x)
        if locked is None:
            embeddings.append(tower(x))
            continue
        locked.trainable = False
        frozen.append(locked)
        if not (embedded and name == "images"):
            x = Locked(locked, dtype="float32", name=f"locked_{name}")(x)
        if locked is not tower:
            x = keras.Model(locked.output, tower.output, name=f"projected_{name}")(x)
        embeddings.append(x)
    loss = PairLoss(similarity, kind, duplicates, dtype="float32", name="pair_loss")
    graph = keras.Model(inputs, loss([*embeddings, inputs[1]]), name=f"{model.name}_pairs")
    graph.frozen = frozen
    return graph


def tokenized(batches, tokenizer):
    """Batches of (images, texts) -> ({"images", "tokens"}, zeros (n, 1)), which is what a learner of `paired` takes."""
    import tensorflow as tf

    def both(images, texts):
        return {"images": images, "tokens": tokenizer.in_graph(texts)}, tf.zeros([tf.shape(texts)[0], 1])

    return batches.map(both, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(2)


# ---------------------------------------------------------------- how good it is


@dataclasses.dataclass(frozen=True)
class Judged:
    """What `Judge` found on all test images.

    Attributes:
        examples: how many images.
        loss: mean of the pairs' losses, in batches of a step's size; of an image's captions the first counts.
        image_to_text, text_to_image: {k: share of the images (captions) that have one of theirs among the k nearest}.
        zero_shot: of classes, the share of images whose class has the nearest mean of its sentences; else None.
    """

    examples: int
    loss: float
    image_to_text: dict
    text_to_image: dict
    zero_shot: float | None

    @property
    def figures(self):
        found = {"loss": self.loss}
        for way in ("image_to_text", "text_to_image"):
            found |= {f"{way}@{k}": share for k, share in getattr(self, way).items()}
        return found if self.zero_shot is None else {**found, "zero_shot_accuracy": self.zero_shot}


class Judge:
    """Judges a model whose towers train by its retrieval of test images and captions, both ways, over all of them at once.

    Args:
        model: as in `paired`, with a tokenizer.
        batch: pairs in a step, for the loss.
        kind, duplicates: of `PairLoss`.
        sentences: of classes, `data.captions.Captioned.sentences`; else empty.
        embedded: None, or what the `backbone` of the image tower makes of all test images, (n, d).
    """

    def __init__(self, model, batch, kind="softmax", duplicates="negative", sentences=(), embedded=None):
        self.model, self.batch, self.kind, self.duplicates, self.sentences = model, batch, kind, duplicates, sentences
        images = model.image_tower
        if embedded is not None:
            locked = backbone(images)
            images = None if locked is images else keras.Model(locked.output, images.output)
        self.embedded = embedded
        # Learners, whose predictions are right under every strategy
        self.images, self.texts = (each and Learner(each.input, each.output) for each in (images, model.text_tower))

    def __call__(self, learner, tests):
        """A `Judged`.

        Args:
            learner: what is fitted.
            tests: batches of (images, captions one a line), in the order of `embedded`.

        Raises:
            DataError: there are no examples.
        """
        if hasattr(learner, "jax_state_sync"):
            learner.jax_state_sync()
        images, said = [], []
        for x, texts in tests:
            said += [text.decode(errors="replace").split("\n") for text in np.asarray(texts)]
            if self.embedded is None:
                images.append(self.images.predict_on_batch(np.asarray(x)))
        if not said:
            raise DataError("judge: the data set has no examples; check its split.")
        images = np.concatenate(images) if self.embedded is None else self._projected()
        known = {text: i for i, text in enumerate(dict.fromkeys(text for texts in said for text in texts))}
        texts = self._embedded(list(known))
        theirs = [np.array([known[text] for text in each]) for each in said]
        owners = [[] for _ in known]
        for image, each in enumerate(theirs):
            for text in each:
                owners[text].append(image)
        loss = self._loss(images, texts[[each[0] for each in theirs]], [each[0] for each in said])
        recalls = [
            {k: float(np.mean(ranks(queries, keys, own) < k)) for k in RECALLS if k == 1 or k < len(keys)}
            for queries, keys, own in ((images, texts, theirs), (texts, images, owners))
        ]
        return Judged(len(images), loss, *recalls, self._zero_shot(images, said))

    def _projected(self):
        if self.images is None:
            return self.embedded
        cut = range(0, len(self.embedded), _ROWS)
        return np.concatenate([self.images.predict_on_batch(self.embedded[at : at + _ROWS]) for at in cut])

    def _embedded(self, texts):
        tokens = self.model.tokenizer(texts)
        cut = range(0, len(tokens), _ROWS)
        return np.concatenate([self.texts.predict_on_batch(tokens[at : at + _ROWS]) for at in cut])

    def _loss(self, images, texts, said):
        """In an order of their own, since tests often lie sorted by class."""
        similarity, tokens = self.model.get_layer("similarity"), self.model.tokenizer(said)
        temperature = float(np.exp(to_numpy(similarity.t)[0]))
        bias = None if similarity.b is None else float(to_numpy(similarity.b)[0])
        order, total = np.random.default_rng(0).permutation(len(images)), 0.0
        for at in range(0, len(order), self.batch):
            x, y, z = (part[order[at : at + self.batch]] for part in (images, texts, tokens))
            positive = same_tokens(z, z) if self.duplicates == "positive" else ops.eye(len(x))
            total += float(ops.sum(pair_losses(x, y, x, y, positive, temperature, bias, self.kind)))
        return total / len(order)

    def _zero_shot(self, images, said):
        if not self.sentences:
            return None
        labels = {texts: number for number, texts in enumerate(self.sentences)}
        centres = self._embedded([text for texts in self.sentences for text in texts])
        centres = centres.reshape(len(self.sentences), -1, centres.shape[-1]).mean(1)
        centres /= np.linalg.norm(centres, axis=-1, keepdims=True)
        found = np.argmax(images @ centres.T, axis=-1)
        return float(np.mean(found == [labels[tuple(texts)] for texts in said]))


def ranks(queries, keys, owned):
    """For each query, how many keys that are not its own are at least as near as the nearest of its own.

    Args:
        queries, keys: (n, d), (m, d) embeddings.
        owned: for each query the places of its own keys.

    Returns:
        int (n,): 0 where the nearest key is its own.
    """
    found = np.zeros(len(queries), "int64")
    for at in range(0, len(queries), _ROWS):
        scores = queries[at : at + _ROWS] @ keys.T
        for row, each in enumerate(scores):
            own = np.asarray(owned[at + row])
            best = each[own].max()
            each[own] = -np.inf
            found[at + row] = np.sum(each >= best)
    return found
