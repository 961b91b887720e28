"""The train step: what an update is, whatever the number of parts, and what it refuses. Runs on TensorFlow, JAX and PyTorch."""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_vit
from keras_vit.checkpoints.load import to_numpy
from keras_vit.errors import ArgumentError
from keras_vit.training.optimizers import LINEAR_PROBE, MomentumSGD
from keras_vit.training.step import Learner
from keras_vit.training.twopass import GSAM, SAM, global_norm

BACKEND = keras.config.backend()
LOSS = keras.losses.CategoricalCrossentropy(from_logits=True)
CLASSES = 4


def examples(count=8):
    random = np.random.default_rng(0)
    return random.standard_normal((count, 32, 32, 3), np.float32), np.eye(CLASSES, dtype=np.float32)[np.arange(count) % CLASSES]


def learner(dropout_rate=0.0, optimizer=None, compiled=(), **options):
    keras.utils.set_random_seed(0)
    model = keras_vit.ViT_mu(classes=CLASSES, weights=None, classifier_activation=None, dropout_rate=dropout_rate)
    trained = Learner(model.inputs, model.outputs, **options)
    trained.compile(optimizer or MomentumSGD(0.1), LOSS, **dict(compiled))
    return trained


def steps(trained, count=3, data=None):
    """The logs of so many updates with one batch."""
    x, y = data or examples()
    return trained.fit(x, y, batch_size=len(x), epochs=count, verbose=0, shuffle=False).history


def weights(trained):
    return [to_numpy(weight).copy() for weight in trained.trainable_variables]


@pytest.mark.parametrize("two_pass", [None, SAM(0.05)], ids=["one pass", "SAM"])
def test_an_update_in_parts_is_that_of_the_whole_batch(two_pass):
    found = []
    for parts in (1, 4):
        trained = learner(parts=parts, clip_norm=1.0, two_pass=two_pass, compiled={"metrics": ["accuracy"]})
        found.append((steps(trained), weights(trained)))
    for key in ("loss", "step_loss", "grad_norm", "accuracy"):
        np.testing.assert_allclose(found[0][0][key], found[1][0][key], rtol=2e-5)
    for one, four in zip(found[0][1], found[1][1]):
        np.testing.assert_allclose(one, four, rtol=0, atol=1e-6)


def test_an_update_without_clipping_is_that_of_keras():
    trained = learner()
    keras.utils.set_random_seed(0)
    model = keras_vit.ViT_mu(classes=CLASSES, weights=None, classifier_activation=None)
    model.compile(MomentumSGD(0.1), LOSS)
    np.testing.assert_allclose(steps(trained)["loss"], steps(model)["loss"], rtol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="others build the optimizer before")
def test_a_step_is_traced_once(monkeypatch):
    plain = keras_vit.ViT_mu(classes=CLASSES, weights=None, classifier_activation=None)
    plain.compile(MomentumSGD(0.1), LOSS)
    for trained in (plain, learner()):
        traces, step = [], trained.train_step
        monkeypatch.setattr(trained, "train_step", lambda data, step=step, traces=traces: traces.append(1) or step(data))
        steps(trained, 2)
        assert len(traces) == 1


def test_clipping_limits_the_update_to_the_norm():
    free, clipped = learner(), learner(clip_norm=0.5)
    before = weights(free)
    norm = steps(free, 1)["grad_norm"][0]
    assert steps(clipped, 1)["grad_norm"][0] == pytest.approx(norm, rel=1e-6) and norm > 0.5
    moved = [float(global_norm([a - b for a, b in zip(weights(each), before)])) for each in (free, clipped)]
    assert moved == pytest.approx([0.1 * norm, 0.1 * 0.5], rel=1e-3)


@pytest.mark.parametrize("two_pass", [None, GSAM(0.05, 0.05, lr_max=0.1)], ids=["one pass", "GSAM"])
def test_frozen_weights_count_in_no_norm(two_pass):
    options = dict(clip_norm=0.01, two_pass=two_pass)
    ruled, fixed = learner(optimizer=MomentumSGD(0.1, rules=LINEAR_PROBE), **options), learner(**options)
    for layer in fixed.layers:
        layer.trainable = layer.name == "head"
    fixed.compile(MomentumSGD(0.1), LOSS)
    before, logs = weights(ruled), [steps(each, 2) for each in (ruled, fixed)]
    for key in ("step_loss", "grad_norm"):
        np.testing.assert_allclose(logs[0][key], logs[1][key], rtol=1e-6)
    for i, (old, new) in enumerate(zip(before[:-2], weights(ruled))):
        np.testing.assert_array_equal(old, new, err_msg=str(i))
    for one, other in zip(weights(ruled)[-2:], weights(fixed)):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    assert logs[0]["grad_norm"][0] > 0.01


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.skipif(BACKEND == "torch", reason="as without"))])
@pytest.mark.parametrize("optimizer", [lambda: MomentumSGD(0.1), lambda: keras.optimizers.SGD(0.1)], ids=["ours", "of Keras"])
def test_a_step_with_a_number_that_is_not_finite_changes_no_weight(optimizer, jit):
    trained = learner(optimizer=optimizer(), clip_norm=1.0, compiled={"jit_compile": jit})
    steps(trained, 1)
    before = weights(trained), [to_numpy(v).copy() for v in trained.optimizer.variables if v.path.endswith("_trace")]
    x, y = examples()
    x[3, 0, 0, 0] = np.nan
    assert steps(trained, 1, (x, y))["healthy"] == [0.0]
    after = weights(trained), [to_numpy(v) for v in trained.optimizer.variables if v.path.endswith("_trace")]
    for old, new in zip(sum(before, []), sum(after, [])):
        np.testing.assert_array_equal(old, new)
    assert steps(trained, 1)["healthy"] == [1.0]


def test_dropout_draws_anew_for_each_part_and_each_step_and_the_same_again():
    x, y = examples(1)
    same = np.repeat(x, 4, axis=0), np.repeat(y, 4, axis=0)

    def norms(parts):
        return steps(learner(0.5, parts=parts, optimizer=MomentumSGD(0.0)), 3, same)["grad_norm"]

    once, four = norms(1), norms(4)
    assert len(set(once)) == 3  # the weights stay: only the masks differ
    assert four == norms(4) != once


def test_float16_scales_its_loss_and_an_overflow_is_no_fault():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        trained = learner(clip_norm=1.0)
    finally:
        keras.config.set_dtype_policy("float32")
    scaled = trained.optimizer
    assert scaled.inner_optimizer.__class__ is MomentumSGD
    history = steps(trained, 3)
    assert history["healthy"] == [1.0] * 3 and history["loss"][-1] < history["loss"][0]
    scaled.dynamic_scale.assign(2.0**60)
    before = weights(trained)
    assert steps(trained, 1)["healthy"] == [1.0]
    assert float(to_numpy(scaled.dynamic_scale)) == 2.0**59
    for old, new in zip(before, weights(trained)):
        np.testing.assert_array_equal(old, new)


def test_the_clean_loss_of_sam_is_reported_and_its_gradient_is_taken_at_the_moved_weights():
    plain, sam, far = learner(), learner(two_pass=SAM(1e-6)), learner(two_pass=SAM(1.0))
    first = [steps(each, 1) for each in (plain, sam, far)]
    assert first[0]["step_loss"] == first[1]["step_loss"] == first[2]["step_loss"]
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-3)
    assert abs(first[2]["grad_norm"][0] / first[0]["grad_norm"][0] - 1) > 0.05


def test_rematerialised_blocks_give_the_same_update_and_are_computed_again():
    def rematerialised(**options):
        with keras.RematScope("list_of_layers", layer_names=["block_0", "block_1"]):
            return learner(**options)

    plain, again = learner(), rematerialised()
    np.testing.assert_allclose(steps(plain)["step_loss"], steps(again)["step_loss"], rtol=1e-6)
    if BACKEND == "jax":
        import jax

        x, y = examples()
        others = [variable.value for variable in again.non_trainable_variables]
        values = [variable.value for variable in again.trainable_variables]
        for trained, remat in ((plain, False), (again, True)):
            jaxpr = jax.make_jaxpr(lambda w, trained=trained: trained.gradient(w, others, (x, y))[0])(values)
            assert ("remat" in str(jaxpr) or "checkpoint" in str(jaxpr)) == remat
    if BACKEND == "tensorflow":
        with pytest.raises(ArgumentError, match="rematerialisation cannot take two passes"):
            rematerialised(two_pass=SAM(0.05))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: learner(parts=0), "parts=0"),
        (lambda: learner(clip_norm=-1.0), "clip_norm=-1.0"),
        (lambda: GSAM(rho_max=0.1, rho_min=0.2), "rho_min=0.2"),
        (lambda: GSAM(lr_max=0.1, lr_min=0.2), "lr_min=0.2"),
        (lambda: steps(learner(parts=3)), "batch of 8 cannot be cut into 3"),
    ],
)
def test_wrong_arguments_are_refused_by_name(make, match):
    with pytest.raises(ArgumentError, match=match):
        make()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="for tf.data and several updates in one graph")
def test_several_updates_on_the_device_are_those_of_several_calls():
    import tensorflow as tf

    batches = tf.data.Dataset.from_tensor_slices(examples(32)).batch(8).repeat()
    one, two = learner(clip_norm=1.0), learner(clip_norm=1.0, steps_on_device=2)
    one.fit(batches, steps_per_epoch=4, verbose=0)
    two.fit(batches, steps_per_epoch=2, verbose=0)
    for a, b in zip(weights(one), weights(two)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "tests", ["in_parts and one or not_finite and ours or float16", pytest.param("not other", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_step_is_the_same_on_other_backends(backend, tests):
    if BACKEND != "tensorflow" or importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed, or this is not the first process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    done = subprocess.run(command, env={**os.environ, "KERAS_BACKEND": backend}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
