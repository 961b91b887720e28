"""Training against the original's numbers (goldens `train`), and what the loop promises. Runs on TensorFlow and, once, on JAX."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import GOLDENS

import keras_vit
from keras_vit.errors import ArgumentError
from keras_vit.training.accumulate import Accumulating
from keras_vit.training.augment import shifted
from keras_vit.training.callbacks import Journal
from keras_vit.training.finetune import finetune, learner
from keras_vit.training.optimizers import MomentumSGD, clip_by_global_norm
from keras_vit.training.schedules import WarmupDecay

FOLDER = GOLDENS / "train"
CASES = ("cosine_accum1_f32_clip8", "linear_accum2_f32", "cosine_accum2_bf16")
LOSS = keras.losses.CategoricalCrossentropy(from_logits=True)


def meta_of(case):
    return json.loads((FOLDER / case / "meta.json").read_text())


def schedule_of(item):
    return WarmupDecay(*(item[key] for key in ("total_steps", "base_lr", "decay_type", "warmup_steps", "linear_end")))


def toy(**arguments):
    model = keras_vit.ViT_mu(classes=4, weights=None, classifier_activation=None, **arguments)
    return model, keras.Model(model.inputs, model.outputs)


def examples(count, classes=4):
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, 32, 32, 3), np.float32), np.eye(classes, dtype=np.float32)[np.arange(count) % classes]


@pytest.mark.parametrize("item", meta_of("schedules")["items"], ids=lambda item: item["name"])
def test_schedule_equals_the_original_at_every_step(item):
    expected = np.load(FOLDER / "schedules/expected.npz")[item["name"]]
    schedule = schedule_of(item)
    got = [float(schedule(step)) for step in range(len(expected))]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-8)


def test_schedule_survives_its_config_and_refuses_warmup_to_the_end():
    schedule = WarmupDecay(10, 0.1, "linear", 3, 1e-3)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert float(again(5)) == float(schedule(5))
    with pytest.raises(ArgumentError, match="warmup_steps.*10 of 10"):
        WarmupDecay(10, 0.1, warmup_steps=10)
    with pytest.raises(ArgumentError, match="'step'"):
        WarmupDecay(10, 0.1, "step")


@pytest.mark.parametrize("case", CASES)
def test_golden_losses_and_final_weights_equal_the_original(case, tmp_path):
    meta, expected = meta_of(case), np.load(FOLDER / case / "expected.npz")
    data, config, transformer = np.load(FOLDER / case / "inputs.npz"), meta["config"], meta["config"]["transformer"]
    model = keras_vit.ViT(
        classes=config["num_classes"],
        input_shape=data["images"].shape[2:],
        classifier_activation=None,
        patch_size=tuple(config["patches"]["size"]),
        width=config["hidden_size"],
        depth=transformer["num_layers"],
        heads=transformer["num_heads"],
        mlp=transformer["mlp_dim"],
        classifier=config["classifier"],
    )
    keras_vit.load_weights(model, FOLDER / case / "checkpoint.npz")
    trained = learner(model.inputs, model.outputs[0], meta["accum_steps"])
    optimizer = MomentumSGD(
        schedule_of(meta["schedule"]), meta["momentum"], clip_norm=meta["grad_norm_clip"], trace_dtype=meta["accumulator_dtype"]
    )
    # Compiled as the original is: a stored bfloat16 that is rounded the other way moves a weight by 1e-5.
    trained.compile(optimizer, LOSS, jit_compile=True)
    batches = tf.data.Dataset.from_tensor_slices((data["images"], data["labels"]))
    losses = trained.fit(batches, steps_per_epoch=1, epochs=len(data["images"]), verbose=0, shuffle=False).history["loss"]
    np.testing.assert_allclose(losses, expected["loss"], rtol=0, atol=meta["tolerance"])
    keras_vit.save_npz(model, tmp_path / "final.npz")
    final = np.load(tmp_path / "final.npz")
    for name in final.files:
        np.testing.assert_allclose(final[name], expected[f"params_final/{name}"], rtol=0, atol=meta["tolerance"], err_msg=name)


def test_golden_and_loop_tests_pass_on_jax():
    if keras.config.backend() == "jax":
        pytest.skip("this is the JAX process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "golden_losses or fit_makes or accumulated"]
    done = subprocess.run(command, env={**os.environ, "KERAS_BACKEND": "jax"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


def test_accumulated_update_is_that_of_the_whole_batch():
    x, y = examples(8)
    results = []
    for parts in (1, 4):
        keras.utils.set_random_seed(0)
        model, _ = toy()
        trained = learner(model.inputs, model.outputs[0], parts)
        trained.compile(MomentumSGD(0.1, clip_norm=1.0), LOSS, metrics=["accuracy"])
        history = trained.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history
        results.append((history, [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]))
    for key in ("loss", "accuracy"):
        np.testing.assert_allclose(results[0][0][key], results[1][0][key], rtol=1e-5)
    for one, four in zip(results[0][1], results[1][1]):
        np.testing.assert_allclose(one, four, rtol=0, atol=1e-6)


def test_accumulating_refuses_a_batch_that_is_no_multiple():
    model, _ = toy()
    trained = Accumulating(model.inputs, model.outputs, parts=3)
    trained.compile(MomentumSGD(0.1), LOSS)
    batches = tf.data.Dataset.from_tensors(examples(8))
    with pytest.raises(ArgumentError, match="batch of 8 cannot be cut into 3"):
        trained.fit(batches, verbose=0, shuffle=False)
    with pytest.raises(ArgumentError, match="at least 1"):
        Accumulating(model.inputs, model.outputs, parts=0)


def test_clipping_leaves_small_gradients_bit_for_bit_and_scales_large_ones():
    small, large = np.float32([0.3, 0.4]), np.float32([30.0, 40.0])
    kept, none = clip_by_global_norm([keras.ops.convert_to_tensor(small), None], 1.0)
    assert none is None
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(kept), small)
    (clipped,) = clip_by_global_norm([keras.ops.convert_to_tensor(large)], 1.0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(clipped), small * 2, rtol=1e-6)


def test_optimizer_survives_saving_with_its_traces(tmp_path):
    x, y = examples(4)
    _, model = toy()
    model.compile(MomentumSGD(WarmupDecay(9, 0.1), clip_norm=1.0, trace_dtype="bfloat16"), LOSS)
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert {str(v.dtype) for v in again.optimizer.variables if v.path.endswith("_trace")} == {"bfloat16"}
    losses = [m.fit(x, y, epochs=2, verbose=0).history["loss"] for m in (model, again)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_fit_makes_exactly_total_steps_and_acts_when_asked(tmp_path, capsys):
    x, y = examples(8)
    model, trained = toy()
    optimizer = MomentumSGD(WarmupDecay(7, 0.1))
    trained.compile(optimizer, LOSS)
    stored = []

    def store():
        head = keras.ops.convert_to_numpy(model.get_layer("head").kernel)
        stored.append((int(optimizer.iterations), float(np.sum(head**2))))

    batches = tf.data.Dataset.from_tensors((x, y)).repeat()
    with Journal(tmp_path) as journal:
        share, seconds = finetune(
            trained, batches, [(x, y)], total_steps=7, batch=8, schedule=WarmupDecay(7, 0.1), journal=journal, store=store,
            progress_every=3, eval_every=2, checkpoint_every=3,
        )  # fmt: skip
    assert int(optimizer.iterations) == 7
    assert [step for step, _ in stored] == [3, 6, 7]
    assert len({norm for _, norm in stored}) == 3  # the weights of that moment, on JAX too
    assert 0 <= share <= 1 and seconds > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "loss" in line] == ["3/7", "6/7", "7/7"]
    assert [line.split()[1] for line in lines if "test accuracy" in line] == ["2/7", "4/7", "6/7", "7/7"]
    assert (tmp_path / "train.log").read_text().count("test accuracy") == 4
    scalars = {}
    (events,) = tmp_path.glob("events.out.tfevents.*")
    for event in tf.compat.v1.train.summary_iterator(str(events)):
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            scalars.setdefault(value.tag, []).append((event.step, float(tf.make_ndarray(value.tensor))))
    assert set(scalars) == {"train_loss", "lr", "img_sec_core_train", "accuracy_test"}
    assert [step for step, _ in scalars["train_loss"]] == [3, 6, 7]
    assert scalars["accuracy_test"][-1] == (7, pytest.approx(share))


def test_shifts_are_small_and_follow_from_seed_and_batch_number():
    images = np.zeros((64, 8, 8, 3), np.float32)
    images[:, 4, 4] = 1.0
    source = tf.data.Dataset.from_tensors((images, np.zeros((64, 2), np.float32))).repeat(2)
    first, second = (batch.numpy() for batch, _ in shifted(source, seed=1))
    np.testing.assert_array_equal(first.sum((1, 2)), 1.0)
    places = {tuple(place) for place in np.argwhere(first)[:, 1:3]}
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}
    assert (first != second).any()
    np.testing.assert_array_equal(next(iter(shifted(source, seed=1, start=1)))[0], second)
    assert (next(iter(shifted(source, seed=2)))[0].numpy() != first).any()
