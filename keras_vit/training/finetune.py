"""The one loop: `fit` of a compiled model for exactly so many steps, with evaluation, progress and storing in between."""

import keras

from keras_vit.evaluation.classify import accuracy
from keras_vit.training.accumulate import Accumulating
from keras_vit.training.callbacks import Every, Progress


def learner(inputs, logits, parts=1):
    """What is compiled and fitted: a plain `keras.Model`, or an `Accumulating` one for several parts a batch."""
    return Accumulating(inputs, logits, parts=parts) if parts > 1 else keras.Model(inputs, logits)


def finetune(
    model,
    batches,
    tests,
    *,
    total_steps,
    batch,
    schedule,
    journal,
    store,
    progress_every=10,
    eval_every=100,
    checkpoint_every=1000,
):
    """Trains a compiled model that ends in logits, then evaluates it.

    Args:
        model: (b, H, W, 3) -> (b, classes) logits, compiled.
        batches: endless (images, one-hot labels). tests: finite ones.
        total_steps: exactly so many updates are made.
        batch: images in one of `batches`.
        schedule: step -> learning rate, for the report.
        journal: an open `callbacks.Journal`.
        store: called without arguments every `checkpoint_every` steps and at the end.
        progress_every, eval_every, checkpoint_every: steps between lines, evaluations and storing; 0 for only at the end.

    Returns:
        (test accuracy, seconds of training with compilation and evaluations).

    Raises:
        tf.errors.OpError: an image cannot be decoded; see `data.pipeline.raise_unreadable`.
    """

    def evaluate(step):
        share = accuracy(model, tests)
        journal.line(f"step {step}/{total_steps} test accuracy {share:.4f}")
        journal.scalars(step, accuracy_test=share)
        return share

    def before_last(action):
        return lambda step: action(step) if step < total_steps else None

    progress = Progress(journal, total_steps, batch, schedule)
    epoch = progress_every or total_steps
    model.fit(
        batches,
        steps_per_epoch=epoch,
        epochs=-(-total_steps // epoch),
        shuffle=False,
        verbose=0,
        callbacks=[
            progress,
            Every(eval_every, before_last(evaluate)),
            Every(checkpoint_every, before_last(lambda step: store())),
        ],
    )
    share = evaluate(total_steps)
    store()
    return share, progress.seconds
