"""What a `Learner` minimises in place of its compiled loss alone, such as distillation from a teacher (DeiT, arXiv 2012.12877).

    teacher = Teacher(keras_vit.ViT_B16(), "ViT_B16", Pixels(), digest)
    learner = Learner(model.inputs, logits(model), objective=Distillation.of(model, "hard", alpha=0.5, teacher=teacher))
    learner.compile(optimizer, loss)

An objective is called in the train step, inside what is differentiated: `objective(learner, x, y, weight) -> (loss, scores)`. The
loop, accumulation, two-pass gradients and strategies are the `Learner`'s and know nothing of it.
"""

import dataclasses
import hashlib
import json
import os

import keras
import numpy as np
from keras import ops

from keras_vit import zoo
from keras_vit.checkpoints import files
from keras_vit.checkpoints.load import to_numpy
from keras_vit.data import pipeline
from keras_vit.data.pixels import Pixels
from keras_vit.errors import ArgumentError
from keras_vit.training.step import Learner

TYPES = ("none", "soft", "hard")
_ACTIVATIONS = {"softmax": "softmax", "sigmoid": "sigmoid", "linear": None}


class Objective:
    """What takes the place of the compiled loss; see the top of this file.

    Attributes:
        frozen: models that it calls. Their weights travel with the learner's into the step, are not trained, and are not saved
            with its state: whoever goes on makes them again.
    """

    frozen = ()

    def __call__(self, learner, x, y, weight):
        raise NotImplementedError

    def labels(self, y):
        """What of the targets of a batch are the labels of the compiled loss and metrics."""
        return y


@keras.saving.register_keras_serializable("keras_vit")
class Given(keras.losses.Loss):
    """anything, (b, 1) -> (): the mean of the losses that the model itself gives."""

    def call(self, y_true, y_pred):
        return y_pred


class Outputs(Objective):
    """What a model gives is the loss of each image.

    Args:
        graph: the model, whose `frozen` models, if it has any, are not trained.
    """

    def __init__(self, graph):
        self.frozen, self.mean = tuple(getattr(graph, "frozen", ())), Given()

    def __call__(self, learner, x, y, weight):
        losses = learner(x, training=True)
        return self.mean(losses, losses, weight), losses


# ---------------------------------------------------------------- distillation


@keras.saving.register_keras_serializable("keras_vit")
class SoftDistillation(keras.losses.Loss):
    """(b, c) logits of the teacher, (b, c) logits -> (): their divergence at a temperature, as facebookresearch/deit has it.

    That is KL(softmax(teacher / tau) || softmax(logits / tau)) * tau**2 / c, its mean over the batch: there the sum is divided by
    the number of all logits, by c more than elsewhere.

    Args:
        tau: temperature, above 0.
    """

    def __init__(self, tau=1.0, name="soft_distillation", **kwargs):
        super().__init__(name=name, **kwargs)
        self.tau = tau

    def call(self, y_true, y_pred):
        theirs, ours = (ops.log_softmax(logits / self.tau) for logits in (y_true, y_pred))
        return ops.sum(ops.exp(theirs) * (theirs - ours), axis=-1) * (self.tau**2 / y_pred.shape[-1])

    def get_config(self):
        return {**super().get_config(), "tau": self.tau}


@keras.saving.register_keras_serializable("keras_vit")
class HardDistillation(keras.losses.Loss):
    """(b, c) logits of the teacher, (b, c) logits -> (): cross-entropy with the teacher's best class as the label."""

    def __init__(self, name="hard_distillation", **kwargs):
        super().__init__(name=name, **kwargs)

    def call(self, y_true, y_pred):
        return ops.sparse_categorical_crossentropy(ops.argmax(y_true, axis=-1), y_pred, from_logits=True)


def check_distillation(type, tau, alpha):
    """Refuses values that distillation cannot use.

    Raises:
        ArgumentError: names the value.
    """
    if type not in TYPES:
        raise ArgumentError(f"distillation: type must be one of {', '.join(map(repr, TYPES))}, got {type!r}.")
    if not tau > 0 or not np.isfinite(tau):
        raise ArgumentError(f"distillation: the temperature tau must be above 0, got {tau!r}; 1 leaves logits as they are.")
    if not 0 <= alpha <= 1:
        raise ArgumentError(f"distillation: alpha, the share of the teacher in the loss, must lie in [0, 1], got {alpha!r}.")


class Distillation(Objective):
    """The loss becomes (1 - alpha) * its own + alpha * that between a student's distillation head and a teacher.

    A student with layers `head` and `head_distillation` has its own loss on the first and the teacher's on the second; any other
    has both on its only output. The teacher sees the images that the student sees, augmented and mixed. Where the targets of a
    batch have more columns than there are classes, the rest are the teacher's logits, and no teacher is called.

    Args:
        type: "none", "soft" (`SoftDistillation`) or "hard" (`HardDistillation`).
        tau, alpha: temperature of "soft"; share of the teacher.
        teacher: model (b, H, W, 3) -> (b, classes) logits of the student's images (`Teacher.seen_by`), or None.
        heads: model (b, H, W, 3) -> [logits of `head`, logits of `head_distillation`], of the student's layers, or None.
        classes: how many.

    Raises:
        ArgumentError: a value out of range.
    """

    def __init__(self, type="soft", tau=1.0, alpha=0.5, *, teacher=None, heads=None, classes):
        check_distillation(type, tau, alpha)
        self.type, self.alpha, self.teacher, self.classes = type, alpha, teacher, classes
        self.heads = None if heads is None else heads.__call__  # as a function, since its weights are the learner's
        self.distance = SoftDistillation(tau) if type == "soft" else HardDistillation()
        if teacher is not None:
            teacher.trainable = False
            self.frozen = (teacher,)

    @classmethod
    def of(cls, model, type="soft", tau=1.0, alpha=0.5, teacher=None):
        """The objective for a student model.

        Args:
            model: the student.
            teacher: a `Teacher`, or None where the logits come with the batches.

        Raises:
            ArgumentError: a value out of range, or other classes of the teacher.
        """
        check_distillation(type, tau, alpha)
        seen = teacher.seen_by(model) if teacher and type != "none" else None
        two = set(zoo.HEADS) <= {layer.name for layer in model.layers}
        heads = keras.Model(model.inputs, [zoo.tap(model, name) for name in zoo.HEADS]) if two else None
        return cls(type, tau, alpha, teacher=seen, heads=heads, classes=logits(model).shape[-1])

    def labels(self, y):
        return y[..., : self.classes]

    def __call__(self, learner, x, y, weight):
        scores, student = self.heads(x, training=True) if self.heads else [learner(x, training=True)] * 2
        loss = learner.compute_loss(x, y, scores, weight, training=True)
        if self.type == "none":
            return loss, scores
        if y.shape[-1] > self.classes:
            theirs = y[..., self.classes :]
        elif self.teacher is None:
            raise ArgumentError(f"distillation of type {self.type!r}: there is no teacher, nor its logits with the labels.")
        else:
            theirs = ops.stop_gradient(self.teacher(x, training=False))
        return loss * (1 - self.alpha) + self.distance(theirs, student, weight) * self.alpha, scores


def logits(model):
    """The KerasTensor of a classifier's scores before a softmax or sigmoid that is a layer of its own."""
    (output,) = keras.tree.flatten(model.outputs)
    last = output._keras_history.operation
    kind = "softmax" if isinstance(last, keras.layers.Softmax) else _activation(last)
    if kind and isinstance(last, (keras.layers.Activation, keras.layers.Softmax)):
        return zoo.tap_input(model, last.name)
    return Unsquashed(kind, name="logits")(output) if kind else output


def _activation(layer):
    """The name of a layer's activation, None for none; a softmax or sigmoid in any of Keras's classes."""
    name = getattr(getattr(layer, "activation", None), "__name__", "linear")
    return _ACTIVATIONS.get(name)


@keras.saving.register_keras_serializable("keras_vit")
class Unsquashed(keras.layers.Layer):
    """(..., c) -> (..., c): logits, up to a number for each row, of the probabilities that a softmax or sigmoid made.

    Args:
        kind: "softmax" or "sigmoid".
    """

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def call(self, x):
        least = float(np.finfo("float32").tiny)
        logs = ops.log(ops.maximum(x, least))
        return logs if self.kind == "softmax" else logs - ops.log(ops.maximum(1 - x, least))

    def get_config(self):
        return {**super().get_config(), "kind": self.kind}


@keras.saving.register_keras_serializable("keras_vit")
class Seen(keras.layers.Layer):
    """(b, H, W, 3) -> (b, h, w, 3): images prepared for one model, as another one wants them.

    Undoes the first preprocessing, resizes as the second says if the sizes differ, and applies the second.

    Args:
        given, wanted: `Pixels`, or their dicts.
        size: (h, w).
    """

    def __init__(self, given, wanted, size, **kwargs):
        super().__init__(**kwargs)
        self.given, self.wanted = (p if isinstance(p, Pixels) else Pixels.from_dict(p) for p in (given, wanted))
        self.size = tuple(size)

    def call(self, x):
        if (self.given.mean, self.given.std) != (self.wanted.mean, self.wanted.std):
            (mean, std), (their_mean, their_std) = ((np.float32(p.mean), np.float32(p.std)) for p in (self.given, self.wanted))
            x = x * ops.cast(std / their_std, x.dtype) + ops.cast((mean - their_mean) / their_std, x.dtype)
        if tuple(x.shape[1:3]) == self.size:
            return x
        return ops.image.resize(
            x, self.size, interpolation=self.wanted.resize, antialias=self.wanted.antialias, data_format="channels_last"
        )

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *self.size, input_shape[-1])

    def get_config(self):
        own = dict(given=self.given.asdict(), wanted=self.wanted.asdict(), size=self.size)
        return {**super().get_config(), **own}


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A model that others learn from.

    Attributes:
        model: images (b, H, W, 3) of one size -> scores: logits, or what a softmax or sigmoid makes of them.
        name: for errors.
        pixels: its preprocessing.
    """

    model: keras.Model
    name: str
    pixels: Pixels = Pixels()

    def digest(self):
        """The sha256, in hexadecimal, of the names, shapes and values of its weights, and of its preprocessing."""
        found = hashlib.sha256(repr((self.pixels, self.model.input_shape[1:])).encode())
        for variable in self.model.variables:
            if not variable.path.endswith("seed_generator_state"):
                value = np.ascontiguousarray(to_numpy(variable))
                found.update(repr((variable.name, value.shape, value.dtype.name)).encode())
                found.update(value.tobytes())
        return found.hexdigest()

    def cached(self, source, path, batch=128):
        """Its logits of all examples of a source, as `pipeline.eval_batches` prepares them for it, from a file or into it.

        Args:
            source: of `pipeline.open_source`; how many examples it has must be known.
            path: `.npz`, written in one step where there is none; None keeps them in memory.
            batch: images at once.

        Returns:
            float32 (examples, classes), by the example's number in the source: `targets` of `pipeline.train_batches`.

        Raises:
            ArgumentError: the file is of other data or another teacher, and is left as it is; or the source is endless.
        """
        if source.num_examples is None:
            raise ArgumentError(f"{source.dataset} ({source.split}): how many examples it has is not known; leave the cache out.")
        data = hashlib.sha256(json.dumps(source.fingerprint(), sort_keys=True).encode()).hexdigest()
        wanted = {"data": data, "teacher": self.digest()}
        dropped = getattr(source, "dropped", ())  # whose numbers are left out
        numbers = np.setdiff1d(np.arange(source.num_examples + len(dropped)), dropped)
        shape = (int(numbers.max(initial=-1)) + 1, self.model.output_shape[-1])
        if path and os.path.exists(path):
            archive = files.Npz(path)
            other = [key for key in wanted if archive.metadata.get(key) != wanted[key]]
            if other or [tuple(found) for found, _ in archive.entries.values()] != [shape]:
                raise ArgumentError(
                    f"{path}: expected the logits of teacher {self.name} on {source.dataset} ({source.split}), {shape}, got a "
                    f"file of another {' and '.join(other) or 'shape'}. Name another file, or remove it so that it is made again."
                )
            return archive.read("logits")
        scorer = Learner(self.model.inputs, logits(self.model))  # whose predictions are right under every strategy
        batches = pipeline.eval_batches(source, size=self.model.input_shape[1:3], batch=batch, pixels=self.pixels)
        table = np.zeros(shape, "float32")
        table[numbers] = np.concatenate([scorer.predict_on_batch(np.asarray(images)) for images, _ in batches])
        if path:
            files.write(path, {"logits": table}, wanted)
        return table

    def check(self, classes, student="the student"):
        """Refuses a teacher whose scores a student cannot learn from.

        Raises:
            ArgumentError: it is no classifier of RGB images of one size, or of another number of classes.
        """
        shapes = self.model.input_shape, self.model.output_shape
        several = any(isinstance(shape, list) for shape in shapes)
        if several or len(shapes[0]) != 4 or None in shapes[0][1:] or len(shapes[1]) != 2:
            raise ArgumentError(
                f"teacher {self.name}: expected a classifier of images of one size, (b, H, W, 3) -> (b, classes), got input "
                f"{shapes[0]} and output {shapes[1]}."
            )
        if shapes[1][-1] != classes:
            raise ArgumentError(
                f"teacher {self.name}: has {shapes[1][-1]} classes, {student} has {classes}; a teacher must have the student's "
                "classes, in the same order. Fine-tune the teacher on the student's data first."
            )
        if zoo.zero_head(self.model):
            raise ArgumentError(f"teacher {self.name}: its head is all zeros, so that it teaches nothing; take other weights.")

    def seen_by(self, student):
        """A model that takes the student's images, as prepared for it, to the teacher's logits.

        Args:
            student: a model that knows its preprocessing (`weights_info`), else it is taken to be the teacher's.
        """
        self.check(logits(student).shape[-1], student.name)
        images = keras.Input(student.input_shape[1:], name="images")
        given = zoo.pixels_of(student, self.pixels)
        seen = Seen(given, self.pixels, self.model.input_shape[1:3], dtype="float32", name="seen")(images)
        scores = keras.Model(self.model.inputs, logits(self.model), name="teacher_logits")(seen)
        return keras.Model(images, scores, name="teacher")
