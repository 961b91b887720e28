"""What the loop promises. Runs on TensorFlow and, once, on JAX."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_vit
from keras_vit.checkpoints.load import to_numpy
from keras_vit.training.callbacks import Every, Journal
from keras_vit.training.finetune import Run, averaged, finetune
from keras_vit.training.metrics import Metrics, read
from keras_vit.training.optimizers import MomentumSGD
from keras_vit.training.schedules import WarmupDecay
from keras_vit.training.step import Learner

LOSS = keras.losses.CategoricalCrossentropy(from_logits=True)


def toy():
    model = keras_vit.ViT_mu(classes=4, weights=None, classifier_activation=None)
    return Learner(model.inputs, model.outputs)


def examples(count, classes=4):
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, 32, 32, 3), np.float32), np.eye(classes, dtype=np.float32)[np.arange(count) % classes]


def test_the_loop_passes_on_jax():
    if keras.config.backend() == "jax":
        pytest.skip("this is the JAX process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "fit_makes or averages"]
    done = subprocess.run(command, env={**os.environ, "KERAS_BACKEND": "jax"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


def test_fit_makes_exactly_total_steps_and_acts_when_asked(tmp_path, capsys):
    x, y = examples(8)
    learner = toy()
    learner.compile(MomentumSGD(WarmupDecay(7, 0.1)), LOSS)
    stored = []

    def store():
        head = keras.ops.convert_to_numpy(learner.get_layer("head").kernel)
        stored.append((int(learner.optimizer.iterations), float(np.sum(head**2))))

    batches = tf.data.Dataset.from_tensors((x, y)).repeat()
    with Journal(tmp_path) as journal, Metrics(tmp_path / "metrics.jsonl") as metrics:
        outcome = finetune(
            learner, batches, [(x, y)],
            Run(
                total_steps=7, batch=8, schedule=WarmupDecay(7, 0.1), journal=journal, metrics=metrics, store=store,
                progress_every=3, eval_every=2, checkpoint_every=3,
            ),
        )  # fmt: skip
    assert int(learner.optimizer.iterations) == 7
    assert [step for step, _ in stored] == [3, 6, 7]
    assert len({norm for _, norm in stored}) == 3  # the weights of that moment, on JAX too
    assert outcome.preempted_at is None and outcome.evaluation.examples == 8 and outcome.seconds > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "loss" in line] == ["3/7", "6/7", "7/7"]
    assert [line.split()[1] for line in lines if "test accuracy" in line] == ["2/7", "4/7", "6/7", "7/7"]
    records = read(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 8))
    assert records[-1]["accuracy_test"] == outcome.evaluation.accuracy


def test_averages_are_evaluated_and_the_weights_come_back_to_the_bit():
    x, y = examples(8)
    learner = toy()
    learner.compile(MomentumSGD(0.1, use_ema=True, ema_momentum=0.5), LOSS)
    found = {}

    def at(step):
        before = [to_numpy(weight).copy() for weight in learner.trainable_variables]
        with averaged(learner):
            inside = [to_numpy(weight).copy() for weight in learner.trainable_variables]
        found[step] = before, inside, [to_numpy(weight) for weight in learner.trainable_variables]

    learner.fit(x, y, batch_size=8, epochs=3, verbose=0, shuffle=False, callbacks=[Every(1, at)])
    average = found[1][0]
    for step in (2, 3):
        before, inside, after = found[step]
        average = [0.5 * a + 0.5 * b for a, b in zip(average, before)]
        for old, new, mean, expected in zip(before, after, inside, average):
            np.testing.assert_array_equal(old, new)
            np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-7)
    for weight, mean in zip(learner.trainable_variables, found[3][1]):
        np.testing.assert_array_equal(to_numpy(weight), mean)  # `fit` ends with the averages
