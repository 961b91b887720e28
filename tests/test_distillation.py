"""Distillation: what the loss is, what a teacher sees, what is refused. Runs on TensorFlow, JAX and PyTorch."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import errors, main, teachers
from keras_vit.checkpoints.load import to_numpy
from keras_vit.configs import digits
from keras_vit.data import pipeline
from keras_vit.data.pixels import Pixels
from keras_vit.training import state
from keras_vit.training.objectives import Distillation, Seen, Teacher, logits
from keras_vit.training.optimizers import MomentumSGD
from keras_vit.training.step import Learner

CLASSES = 3
IMAGENET = Pixels(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
LOSS = keras.losses.CategoricalCrossentropy(from_logits=True)


def classifier(name, side=8, classes=CLASSES, activation="softmax", two=False):
    """A toy with the layers of a student: `head`, and with `two` also `head_distillation`; its output is their mean."""
    images = keras.Input((side, side, 3), name="images")
    x = keras.layers.Flatten(name="flat")(images)
    x = keras.layers.Dense(4, name="body")(x)
    scores = keras.layers.Dense(classes, name="head")(x)
    if two:
        scores = keras.layers.Average(name="mean")([scores, keras.layers.Dense(classes, name="head_distillation")(x)])
    if activation:
        scores = keras.layers.Activation(activation, name="predictions")(scores)
    return randomise(keras.Model(images, scores, name=name))


def batch(count=4, side=8):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count, side, side, 3), np.float32)
    return images, np.eye(CLASSES, dtype="float32")[np.arange(count) % CLASSES]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def of(model, layer, images):
    return to_numpy(keras.Model(model.input, model.get_layer(layer).output)(images))


def learner(model, objective, **options):
    trained = Learner(model.inputs, logits(model), objective=objective, **options)
    trained.compile(MomentumSGD(0.1), LOSS)
    return trained


def step(trained, images, labels):
    return trained.fit(images, labels, batch_size=len(images), verbose=0, shuffle=False).history["step_loss"][0]


@pytest.mark.parametrize("two", [False, True], ids=["one head", "a distillation token's head"])
@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_the_loss_of_a_step_is_the_share_of_labels_and_that_of_the_teacher(kind, two):
    student, teacher, (images, labels) = classifier("student", two=two), classifier("teacher"), batch()
    ours, theirs = of(student, "head", images), of(teacher, "head", images)
    kd = of(student, "head_distillation", images) if two else ours
    base = -(labels * np.log(softmax(ours))).sum(-1).mean()
    p, q = softmax(theirs / 2), softmax(kd / 2)
    distance = {
        "soft": (p * np.log(p / q)).sum() * 4 / q.size,
        "hard": -np.log(softmax(kd)[np.arange(len(kd)), theirs.argmax(-1)]).mean(),
        "none": base,
    }[kind]
    before = [to_numpy(variable).copy() for variable in teacher.variables]
    trained = learner(student, Distillation.of(student, kind, 2.0, 0.3, Teacher(teacher, "toy")), parts=2)
    assert step(trained, images, labels) == pytest.approx(0.7 * base + 0.3 * distance, rel=1e-5)
    for old, variable in zip(before, teacher.variables):
        np.testing.assert_array_equal(old, to_numpy(variable))
    assert trained.predict_on_batch(images).shape == (len(images), CLASSES)


def test_logits_that_come_with_the_labels_stand_for_the_teacher():
    student, teacher, (images, labels) = classifier("student"), classifier("teacher"), batch()
    with_teacher = learner(student, Distillation.of(student, "soft", teacher=Teacher(teacher, "toy")))
    weights = [to_numpy(variable).copy() for variable in student.variables]
    expected = step(with_teacher, images, labels)
    for variable, value in zip(student.variables, weights):
        variable.assign(value)
    without = learner(student, Distillation.of(student, "soft"))
    wide = np.concatenate([labels, of(teacher, "head", images)], -1)
    assert step(without, images, wide) == pytest.approx(expected, rel=1e-6)


def test_a_teacher_sees_the_students_images_in_its_own_size_and_range():
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (2, 8, 8, 3)).astype("float32")
    seen = Seen(Pixels(), IMAGENET, (8, 8))(Pixels().normalize(raw))
    np.testing.assert_allclose(to_numpy(seen), IMAGENET.normalize(raw), atol=1e-5)
    larger = to_numpy(Seen(Pixels(), IMAGENET, (16, 12))(Pixels().normalize(raw)))
    np.testing.assert_allclose(larger, pipeline.eval_image(raw, (16, 12), IMAGENET).numpy(), atol=1e-5)
    student, teacher = classifier("student"), classifier("teacher", side=16)
    scores = Teacher(teacher, "toy", IMAGENET).seen_by(student)(IMAGENET.normalize(raw))
    np.testing.assert_allclose(
        to_numpy(scores), of(teacher, "head", pipeline.eval_image(raw, 16, IMAGENET).numpy()), rtol=1e-4, atol=1e-4
    )


def test_logits_are_found_before_a_softmax_of_either_kind():
    images, _ = batch()
    for fused in (False, True):
        model = classifier("model", activation=None)
        if fused:
            model.get_layer("head").activation = keras.activations.softmax
        else:
            model = classifier("model")
        found = to_numpy(keras.Model(model.input, logits(model))(images))
        np.testing.assert_allclose(softmax(found), to_numpy(model(images)), rtol=1e-5)


def test_the_state_of_a_run_holds_no_teacher():
    student, teacher = classifier("student"), classifier("teacher")
    kinds = [Distillation.of(student, kind, teacher=Teacher(teacher, "toy")) for kind in ("none", "soft")]
    alone, taught = (learner(student, kind) for kind in kinds)
    assert state.variables(alone).keys() == state.variables(taught).keys()
    assert len(taught.non_trainable_variables) == len(teacher.variables) + len(alone.non_trainable_variables)


def test_cached_logits_are_the_teachers_and_those_of_another_are_refused(tmp_path):
    source = pipeline.open_source("digits", "test")
    teacher, path = Teacher(classifier("teacher"), "toy"), tmp_path / "logits.npz"
    table = teacher.cached(source, path)
    (images, _), *_ = pipeline.eval_batches(source, size=8, batch=5)
    np.testing.assert_allclose(table[:5], of(teacher.model, "head", images.numpy()), rtol=1e-5)
    written = path.stat().st_mtime_ns
    np.testing.assert_array_equal(teacher.cached(source, path), table)
    with pytest.raises(errors.ArgumentError, match="another data"):
        teacher.cached(pipeline.open_source("digits", "train"), path)
    teacher.model.get_layer("head").bias.assign(np.ones(CLASSES))
    with pytest.raises(errors.ArgumentError, match="another teacher"):
        teacher.cached(source, path)
    assert path.stat().st_mtime_ns == written and [file.name for file in tmp_path.iterdir()] == ["logits.npz"]


def test_targets_follow_their_examples_through_the_shuffled_stream():
    source = pipeline.open_source("digits", "test")
    numbers = np.arange(360, dtype="float32")[:, None]
    options = dict(size=8, batch=16, augment=False, seed=3)
    images, labels = next(iter(pipeline.train_batches(source, targets=numbers, **options)))
    found = labels[:, 10:].numpy().ravel()
    assert found.tolist() == [place.index for place in pipeline.positions(source, seed=3, start=0, count=16)]
    plain, one_hot = next(iter(pipeline.train_batches(source, **options)))
    np.testing.assert_array_equal(images, plain)
    np.testing.assert_array_equal(labels[:, :10], one_hot)
    with pytest.raises(errors.ArgumentError, match="cannot be mixed"):
        pipeline.train_batches(source, targets=numbers, mixup=0.2, **options)


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(type="softer"), "type must be one of 'none', 'soft', 'hard', got 'softer'"),
        (dict(tau=0.0), "temperature tau must be above 0, got 0"),
        (dict(alpha=1.5), r"alpha, the share of the teacher in the loss, must lie in \[0, 1\], got 1.5"),
        (dict(teacher="ViT_M16:imagenet"), "nearest: ViT_"),
        (dict(teacher="nowhere/teacher.keras"), "no such file or folder"),
        (dict(), "needs a teacher"),
        (dict(teacher="ViT_mu:none", cache="x.npz"), "set config.mixup"),
    ],
)
def test_what_distillation_cannot_use_is_refused_before_anything_is_opened(options, expected, tmp_path):
    config = digits.get_config()
    config.distillation.type = "soft"
    config.distillation.update(options)
    config.mixup = 0.2
    with pytest.raises(errors.ConfigError, match=expected):
        main.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_is_refused_by_name(tmp_path):
    path = tmp_path / "toy.keras"
    classifier("toy", classes=7).save(path)
    config = digits.get_config()
    config.distillation.update(dict(type="hard", teacher=str(path)))
    with pytest.raises(errors.ArgumentError, match=f"teacher {path}: has 7 classes, config.dataset='digits' has 10"):
        main.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_module_is_no_teacher(tmp_path):
    with pytest.raises(errors.ArgumentError, match="no saved_model.pb"):
        teachers.find(str(tmp_path))


def test_a_run_learns_from_a_stored_teacher_through_a_cache(tmp_path):
    teacher = keras_vit.ViT_mu(weights=None, classes=10, input_shape=(8, 8, 3), patch_size=4, width=16, heads=2, depth=1)
    randomise(teacher).save(tmp_path / "teacher.keras")
    config = digits.get_config()
    config.model.hidden_size, config.model.transformer.num_layers, config.model.transformer.mlp_dim = 24, 1, 24
    config.update(dict(total_steps=4, warmup_steps=1, batch=8, export=False, checkpoint_every=2, eval_every=0))
    config.distillation.update(dict(type="soft", teacher=str(tmp_path / "teacher.keras"), cache=str(tmp_path / "logits.npz")))
    trained = main.train(config, tmp_path / "run")
    assert trained.evaluation.examples == 360
    assert (tmp_path / "logits.npz").is_file()
    randomise(teacher, seed=1).save(tmp_path / "teacher.keras")
    (tmp_path / "logits.npz").unlink()
    with pytest.raises(errors.ResumeError, match="teacher: "):
        main.train(config, tmp_path / "run")


PLACES = """
import contextlib, json, sys
import keras, numpy as np
if keras.config.backend() == "tensorflow":
    import tensorflow as tf
    one = [tf.config.LogicalDeviceConfiguration()]
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], one * 2)
from test_distillation import IMAGENET, Distillation, Teacher, batch, classifier, learner
from keras_vit.training import strategy
images, labels = batch(8)
found = []
for name in ("one_device", sys.argv[1]):
    with strategy.open_strategy(name).scope():
        student, teacher = classifier("student", two=True), classifier("teacher", side=16)
        trained = learner(student, Distillation.of(student, "soft", 2.0, 0.3, Teacher(teacher, "toy", IMAGENET)), parts=2)
    losses = trained.fit(images, labels, batch_size=8, epochs=3, shuffle=False, verbose=0).history["step_loss"]
    found.append(losses + trained.predict_on_batch(images).ravel().tolist())
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend, name", [("tensorflow", "mirrored"), ("jax", "data_parallel")])
def test_two_devices_learn_from_a_teacher_as_one_does(backend, name):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"XLA_FLAGS": flags} if backend == "jax" else {}
    here = pathlib.Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here), str(here.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", PLACES, name], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)
