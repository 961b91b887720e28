"""The one loop: `fit` of a compiled `Learner` up to an exact step, with evaluation, progress and exact saving in between."""

import contextlib
import dataclasses

import keras
import numpy as np

from keras_vit import errors
from keras_vit.checkpoints.load import to_numpy
from keras_vit.evaluation.classify import Evaluation, accuracy
from keras_vit.evaluation.classify import evaluate as evaluate_all
from keras_vit.training.callbacks import Counting, Every, Profile, Progress
from keras_vit.training.strategy import Place


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run needs besides its model and data.

    Attributes:
        total_steps: after which training ends.
        batch: images of an update, on all devices.
        schedule: updates made before -> learning rate, for the report.
        journal: an open `callbacks.Journal`, or `callbacks.Silent`.
        metrics: an open `metrics.Metrics`, or None.
        store: called without arguments every `checkpoint_every` steps and at the end, with the averaged weights in place if there
            are any; writes what people take away.
        checkpoints: a `state.Checkpoints` for resuming, or None.
        about: what a checkpoint says of its run: configuration, data.
        start: steps made before.
        preemption: a `state.Preemption`, or None.
        blame: step -> text that names the examples of that step's batch, for errors.
        place: a `strategy.Place`.
        progress_every, eval_every, checkpoint_every: steps between lines, evaluations and storing; 0 for only at the end.
        steps_on_device: of the learner.
        profile: None, or the first and the last step to profile.
        multi_label: whether the loss takes each class on its own.
        judge: None for a classifier, whose accuracy is told; or (learner, test batches) -> what has `figures`, {name: number}.
    """

    total_steps: int
    batch: int
    schedule: callable
    journal: object
    store: callable
    metrics: object = None
    checkpoints: object = None
    about: dict = dataclasses.field(default_factory=dict)
    start: int = 0
    preemption: object = None
    blame: callable = None
    place: Place = dataclasses.field(default_factory=Place)
    progress_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 1000
    steps_on_device: int = 1
    profile: tuple | None = None
    multi_label: bool = False
    judge: callable = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `finetune` returns.

    Attributes:
        evaluation: a `classify.Evaluation` of the test examples, or what `Run.judge` gives; None where the run was preempted.
        seconds: of training, compilation and evaluations included, also before a resume.
        preempted_at: the step after which a preempted run stopped and was saved, or None.
    """

    evaluation: Evaluation | object | None
    seconds: float
    preempted_at: int | None = None


def finetune(learner, batches, tests, run):
    """Trains a compiled model, then evaluates it: one that ends in logits, or whatever `run.judge` takes.

    Args:
        learner: a `step.Learner`, compiled, with the state after `run.start` steps.
        batches: endless (images, one-hot labels) from there on.
        tests: finite ones.
        run: a `Run`.

    Returns:
        An `Outcome`.

    Raises:
        NonFiniteError: a loss, gradient or weight is not finite; names step, examples and the last good checkpoint.
        tf.errors.OpError: an image cannot be decoded; see `data.pipeline.raise_unreadable`.
    """
    counting = dict(start=run.start, stride=run.steps_on_device)
    total, chief = run.total_steps, run.place.chief

    def tell(step, figures):
        run.journal.line(f"step {step}/{total} test {', '.join(f'{name} {value:.4f}' for name, value in figures.items())}")
        figures = {f"{name}_test": value for name, value in figures.items()}
        run.journal.scalars(step, **figures)
        if run.metrics:
            run.metrics.write(step, **figures)

    def evaluate(step):
        with averaged(learner):
            tell(step, run.judge(learner, tests).figures if run.judge else {"accuracy": accuracy(learner, tests)})

    def store(step):
        try:
            with averaged(learner), run.place.readable(learner.variables):
                if chief:
                    run.store()
        except OSError as error:
            if not run.checkpoints or run.checkpoints.on_error == "stop":
                raise
            run.journal.line(f"step {step}: the model could not be stored ({error}). Training goes on without it.")

    def before_last(action):
        return lambda step: action(step) if step < total else None

    progress = Progress(
        run.journal, total, run.batch, run.schedule, run.progress_every, run.metrics, run.place.replicas, **counting
    )
    profile = [Profile(run.journal, *run.profile, **counting)] if run.profile and chief else []
    saving = _Saving(run, counting)
    if run.start < total:
        learner.fit(
            batches,
            steps_per_epoch=-(-(total - run.start) // run.steps_on_device),
            shuffle=False,
            verbose=0,
            callbacks=[
                _Health(run, counting),
                progress,
                *profile,
                Every(run.eval_every, before_last(evaluate), **counting),
                saving,  # before the model is stored: it looks whether the weights are finite
                Every(run.checkpoint_every, before_last(store), **counting),
            ],
        )
    if saving.preempted and saving.step < total:
        return Outcome(None, progress.seconds, saving.step)
    for variable, average in zip(learner.trainable_variables, _averages(learner)):
        variable.assign(_copied(average))  # as Keras does at the end of `fit`
    if run.judge:
        evaluation = run.judge(learner, tests)
        tell(total, evaluation.figures)
    else:
        evaluation = evaluate_all(learner, tests, from_logits=True, multi_label=run.multi_label)
        tell(total, {"accuracy": evaluation.accuracy})
    with run.place.readable(learner.variables):
        if chief:
            run.store()
    if run.checkpoints:
        run.checkpoints.wait()
    return Outcome(evaluation, progress.seconds)


class _Health(Counting):
    """Ends the run at a step that was not made because a number is not finite."""

    def __init__(self, run, counting):
        super().__init__(**counting)
        self.run = run

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if logs["healthy"] < 1:
            raise errors.NonFiniteError(
                f"step {self.step}: loss {logs['step_loss']}, gradient norm {logs['grad_norm']}; the step was not made. "
                f"{_last_good(self.run, self.step)}"
            )


def _last_good(run, step):
    if run.checkpoints:
        run.checkpoints.wait()  # for the last good one may still be under way
    examples = f"Its batch: {run.blame(step - 1)}. " if run.blame else ""
    kept = run.checkpoints.steps() if run.checkpoints else []
    last = f"Last good checkpoint: {run.checkpoints.path(kept[-1])}" if kept else "There is no checkpoint yet"
    return f"{examples}{last}. Look at these examples, lower the learning rate or clip the gradient."


class _Saving(Counting):
    """Saves the whole state every so many steps, and when the run is asked to end."""

    def __init__(self, run, counting):
        super().__init__(**counting)
        self.run, self.preempted = run, False

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if self.run.checkpoints is None:
            return
        self.run.checkpoints.check()  # a save in the background that failed ends the run here
        if self.run.preemption and self.run.place.agree(self.run.preemption.requested):
            self.preempted = self.model.stop_training = True
        if self.preempted or self.passed(self.run.checkpoint_every) or self.step >= self.run.total_steps:
            self.save()
        if self.preempted:
            self.run.checkpoints.wait()

    def save(self):
        """Copies the state, which is then written in the background."""
        run = self.run
        run.checkpoints.wait()  # so that there is one copy in memory at a time
        arrays = run.place.capture(self.model)
        for name, array in arrays.items():
            if not name.startswith("metrics/") and array.dtype.kind not in "iub" and not _finite(array):
                raise errors.NonFiniteError(
                    f"step {self.step}: {name} is not finite and was not saved. {_last_good(run, self.step)}"
                )
        run.place.save(run.checkpoints, self.step, arrays, {**run.about, "examples": self.step * run.batch})


def _finite(array):
    """Whether all numbers of an array of numpy or JAX are finite; overflowing sums count as such of the numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(float(array.astype("float32").sum()))


@contextlib.contextmanager
def averaged(learner):
    """The moving average of the weights in their place for the time of a `with`, where the optimizer keeps one."""
    averages = _averages(learner)
    # keras.callbacks.SwapEMAWeights exchanges the two by sums and differences, which rounds the weights.
    kept = [_copied(variable) for variable in learner.trainable_variables] if averages else []
    for variable, average in zip(learner.trainable_variables, averages):
        variable.assign(_copied(average))
    try:
        yield
    finally:
        for variable, value in zip(learner.trainable_variables, kept):
            variable.assign(value)


def _copied(variable):
    """Its value, which later steps leave alone; on JAX divided over the same devices."""
    if keras.config.backend() == "jax":
        import jax

        return jax.numpy.copy(variable.value)
    return np.array(to_numpy(variable))


def _averages(learner):
    """The optimizer's moving averages of the trainable variables, in their order; empty where it keeps none."""
    optimizer = getattr(learner.optimizer, "inner_optimizer", learner.optimizer)
    return [variable for variable in optimizer.variables if optimizer.use_ema and variable.path.endswith("_average")]
