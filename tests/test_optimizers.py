"""Optimizers and schedules against formulas written out in numpy. Runs on TensorFlow, JAX and PyTorch, and on two devices."""

import importlib.util
import os
import subprocess
import sys

import keras
import ml_dtypes
import numpy as np
import pytest

import keras_vit
from keras_vit import zoo
from keras_vit.checkpoints.load import named_weights, to_numpy
from keras_vit.checkpoints.transforms import Part
from keras_vit.errors import ArgumentError
from keras_vit.training.optimizers import LINEAR_PROBE, Adafactor, AdamW, MomentumSGD, layerwise_decay
from keras_vit.training.schedules import WarmupDecay
from keras_vit.training.step import Learner

BACKEND = keras.config.backend()
CHILD = "KERAS_VIT_CHILD" in os.environ
JIT = BACKEND == "jax"  # where it can be chosen, compiling takes longer than these steps
OURS = {
    "sgd": lambda rate=0.1, **options: MomentumSGD(rate, trace_dtype="bfloat16", **options),
    "adamw": lambda rate=0.1, **options: AdamW(rate, moment_dtype="bfloat16", **options),
    "adafactor": lambda rate=0.1, **options: Adafactor(rate, min_dim_size_to_factor=3, **options),
}
every_optimizer = pytest.mark.parametrize("make", OURS.values(), ids=OURS)
RANDOM = np.random.default_rng(0)
if CHILD and BACKEND == "tensorflow":  # one for the process: a second one breaks the collectives of the first
    import tensorflow as tf

    STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def variable(value, name="kernel", fused_axis=None):
    made = keras.Variable(np.asarray(value, np.float32), name=name)
    if fused_axis is not None:
        made.fused_axis = fused_axis
    return made


def moved(optimizer, variables, gradients):
    """The values of variables after one update for each list of gradients."""
    for each in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(np.asarray(g, np.float32)) for g in each], variables)
    return [to_numpy(v) for v in variables]


def bfloat16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def network():
    """Layers of a transformer's names: (b, 6) -> (b, 4)."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6,))
    for name, width in (("patches", 8), ("block_0", 8), ("block_1", 8), ("head", 4)):
        x = keras.layers.Dense(width, "tanh", name=name)(x)
    return keras.Model(inputs, x)


def batch():
    random = np.random.default_rng(1)
    return random.standard_normal((8, 6), np.float32), random.standard_normal((8, 4), np.float32)


# -- schedules ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["cosine", "linear", "rsqrt"])
@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0), (5, 0), (5, 7), (1, 0)])
def test_schedule_is_the_formula_at_every_step_and_stays_at_its_end(decay, warmup, cooldown):
    total, base, end, timescale = 20, 0.3, 1e-3, 6
    schedule = WarmupDecay(total, base, decay, warmup, end, timescale, cooldown)
    expected = []
    for t in [*range(total + 1), total, total]:  # the last two are later steps
        done = max(t - warmup, 0) / (total - warmup)
        rate = {
            "cosine": base * (1 + np.cos(np.pi * done)) / 2,
            "linear": base + (end - base) * done,
            "rsqrt": base * np.sqrt(timescale / (timescale + max(t - warmup, 0))),
        }[decay]
        rising = t / warmup if t < warmup else 1
        falling = (total - t) / cooldown if total - t < cooldown else 1
        expected.append(rate * rising * falling)
    got = [float(schedule(t)) for t in [*range(total + 1), total + 1, 3 * total]]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


def test_schedule_survives_its_config():
    schedule = WarmupDecay(10, 0.1, "rsqrt", 3, 1e-3, timescale=5, cooldown_steps=2)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert [float(again(step)) for step in range(12)] == [float(schedule(step)) for step in range(12)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((10, 0.1, "cosine", 10), "warmup_steps.*10 of 10"),
        ((10, 0.1, "cosine", -1), "warmup_steps.*-1 of 10"),
        ((0, 0.1), "total_steps.*got 0"),
        ((10, 0.1, "step"), "'step'"),
        ((10, -0.1), "base.*-0.1"),
        ((10, float("nan")), "base.*nan"),
        ((10, 0.1, "linear", 0, -1.0), "linear_end.*-1.0"),
        ((10, 0.1, "rsqrt", 0, 0.0, 0), "timescale.*got 0"),
        ((10, 0.1, "rsqrt", 4, 0.0, 5, 7), "cooldown_steps.*6 steps.*got 7"),
    ],
)
def test_schedule_refuses_numbers_out_of_range(arguments, match):
    with pytest.raises(ArgumentError, match=match):
        WarmupDecay(*arguments)


# -- arithmetic -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_momentum_sgd_is_the_trace_of_optax_with_a_rounded_trace(dtype):
    gradients = RANDOM.standard_normal((4, 5, 3)).astype(np.float32)
    weight, trace, rounded = np.ones((5, 3), np.float32), 0, {"float32": np.float32, "bfloat16": bfloat16}[dtype]
    schedule = WarmupDecay(4, 0.1, warmup_steps=2)
    for step, g in enumerate(gradients):
        new = g + rounded(0.9) * trace
        trace, weight = rounded(new), weight - np.float32(schedule(step)) * new
    (got,) = moved(MomentumSGD(schedule, trace_dtype=dtype), [variable(np.ones((5, 3)))], gradients[:, None])
    np.testing.assert_allclose(got, weight, rtol=0, atol=1e-6)


def test_adamw_is_that_of_keras_in_float32():
    start, gradients = RANDOM.standard_normal((4, 3)), RANDOM.standard_normal((5, 1, 4, 3))
    schedule = WarmupDecay(5, 0.1, warmup_steps=2)
    ours = AdamW(schedule, weight_decay=0.05, decay_on="*", epsilon=1e-12)
    theirs = keras.optimizers.AdamW(schedule, weight_decay=0.05, epsilon=1e-12)
    np.testing.assert_allclose(
        *(moved(each, [variable(start, "bias")], gradients)[0] for each in (ours, theirs)), rtol=2e-6, atol=1e-7
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_is_the_formula_with_epsilon_beside_the_corrected_moment(dtype):
    gradients = RANDOM.standard_normal((4, 5)).astype(np.float32)
    rounded = {"float32": np.float32, "bfloat16": bfloat16}[dtype]
    weight, first, second = np.ones(5), 0, 0
    for step, g in enumerate(gradients, 1):
        new = 0.1 * g + rounded(0.9) * first
        second = 0.01 * g**2 + 0.99 * second
        weight = weight - 0.1 * (new / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 0.3)
        first = rounded(new)
    optimizer = AdamW(0.1, beta_2=0.99, epsilon=0.3, moment_dtype=dtype)
    np.testing.assert_allclose(moved(optimizer, [variable(np.ones(5))], gradients[:, None])[0], weight, rtol=0, atol=2e-6)


def adafactor_directions(gradients, least=32, threshold=None, cap=0.999, offset=0):
    """Of one original array, in float64, with the factored estimate written as the outer product of sums."""
    moment, axes = None, np.argsort(gradients[0].shape, kind="stable")[-2:]
    factored = gradients[0].ndim > 1 and gradients[0].shape[axes[0]] >= least
    for t, g in enumerate(np.asarray(gradients, np.float64)):
        beta = min(cap, 1 - (max(t - offset, 0) + 1.0) ** -0.8)
        moment = (1 - beta) * (g**2 + 1e-30) + (beta * moment if t else 0)
        estimate = moment
        if factored:
            rows, columns = (moment.sum(axis, keepdims=True) for axis in axes)
            estimate = rows * columns / moment.sum(tuple(axes), keepdims=True)
        direction = g / np.sqrt(estimate)
        yield direction / max(1, np.sqrt(np.mean(direction**2)) / threshold) if threshold else direction


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (2, 7, 4), (4, 2, 2, 8), (3, 9), (7,), ()])
def test_adafactor_factors_the_two_largest_axes_where_both_are_large(shape):
    gradients = RANDOM.standard_normal((4, *shape))
    optimizer = Adafactor(0.1, min_dim_size_to_factor=4, momentum=None, beta2_cap=0.5, decay_offset=1)
    (got,) = moved(optimizer, [variable(np.zeros(shape))], gradients[:, None])
    np.testing.assert_allclose(got, -0.1 * sum(adafactor_directions(gradients, 4, cap=0.5, offset=1)), rtol=0, atol=2e-6)
    kept = sum(int(np.prod(v.shape)) for v in optimizer.variables) - 2  # iteration and learning rate
    large = sorted(shape)[-2:]
    if len(large) == 2 and large[0] >= 4:
        assert kept == np.prod(shape) // large[0] + np.prod(shape) // large[1]
    else:
        assert kept == np.prod(shape)


@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 2, 6), 1), ((3, 5, 4), 0), ((3, 2, 4), 0)])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_adafactor_treats_what_is_fused_as_the_original_treats_its_parts(shape, axis, threshold):
    gradients = RANDOM.standard_normal((3, *shape)) * np.moveaxis(np.reshape([1, 10, 100], (3, 1, 1, 1)[: len(shape)]), 0, axis)
    optimizer = Adafactor(0.1, min_dim_size_to_factor=4, clipping_threshold=threshold, dtype_momentum="float32")
    (got,) = moved(optimizer, [variable(np.zeros(shape), fused_axis=axis)], gradients[:, None])
    for part in range(3):
        own, trace, weight = np.take(gradients, part, axis + 1), 0, 0
        for direction in adafactor_directions(own, 4, threshold):
            trace = 0.9 * trace + 0.1 * direction
            weight = weight - 0.1 * trace
        np.testing.assert_allclose(np.take(got, part, axis), weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["ViT_mu", "ViT_mu_bv", "FlexiViT_mu", "Hybrid_mu"])
def test_fused_axes_are_those_that_the_original_checkpoints_have_apart(name):
    arguments = {"classifier": "map"} if name == "ViT_mu_bv" else {}
    model = keras_vit.create_model(name, weights=None, **arguments)
    names = next(iter(zoo.FAMILIES[model.family].layouts.values()))
    apart = {}
    for ours, weight in named_weights(model).items():
        axes = {piece.transform.axis for piece in names.to_original(ours) if isinstance(piece.transform, Part)}
        apart[ours] = axes.pop() if axes else None
        assert getattr(weight, "fused_axis", None) == apart[ours], ours
    assert {axis for axis in apart.values()} == {None, 0, 1}


# -- rules, decay, guard --------------------------------------------------------------------------------------------------------


@every_optimizer
def test_a_rule_multiplies_every_step_and_the_first_that_fits_counts(make):
    data = RANDOM.standard_normal((5, 4)), RANDOM.standard_normal((3, 3, 5, 4))
    names = ("a", "b", "c")

    def run(**options):
        return [w - data[0] for w in moved(make(**options), [variable(data[0], name) for name in names], data[1])]

    plain, ruled = run(), run(rules=[("b", 0.5), ("[bc]", 3.0)])
    for once, got, factor in zip(plain, ruled, (1, 0.5, 3)):
        np.testing.assert_allclose(got, factor * once, rtol=0, atol=1e-6)


@every_optimizer
def test_a_factor_of_0_freezes_against_decay_and_numbers_that_are_not_finite_and_keeps_no_slots(make):
    start = RANDOM.standard_normal((5, 4))
    frozen, free = variable(start, "kernel"), variable(start, "head_kernel")
    optimizer = make(rules=[("kernel", 0.0)], weight_decay=0.1)
    moved(optimizer, [frozen, free], [[np.full((5, 4), np.nan), np.ones((5, 4))]])
    np.testing.assert_array_equal(to_numpy(frozen), np.float32(start))
    assert np.isfinite(to_numpy(free)).all() and (to_numpy(free) != np.float32(start)).all()
    assert all("head_kernel" in v.path for v in optimizer.variables if "kernel" in v.path)


@every_optimizer
@pytest.mark.parametrize("scale", ["learning_rate", "schedule"])
def test_decay_takes_its_share_of_kernels_alone(make, scale):
    schedule = WarmupDecay(10, 0.2, "linear", 0, 0.0)
    optimizer = make(schedule, weight_decay=0.3, decay_scale=scale, rules=[("out_kernel", 0.5)])
    variables = [variable(np.ones((5, 4)), name) for name in ("qkv_kernel", "out_kernel", "bias", "gamma")]
    got = moved(optimizer, variables, np.zeros((3, 4, 5, 4)))
    shares = [0.3 * (1.0 if scale == "schedule" else 0.2) * (1 - t / 10) for t in range(3)]
    for value, factor in zip(got, (1, 0.5, 0, 0)):
        np.testing.assert_allclose(value, np.prod([1 - factor * share for share in shares]), rtol=1e-6)


def test_decay_of_a_learning_rate_that_is_a_number_is_itself():
    (got,) = moved(MomentumSGD(0.01, weight_decay=0.3, decay_scale="schedule"), [variable([1.0])], np.zeros((1, 1, 1)))
    np.testing.assert_allclose(got, 0.7, rtol=1e-6)


@every_optimizer
def test_a_guard_that_is_false_leaves_everything_as_it_was_to_the_bit(make):
    def made():
        variables = [variable([[-0.0, 0.0, 1.0], [2.0, -1.0, 0.5], [3.0, 1.0, 4.0]]), variable([1.0, -0.0], "bias")]
        optimizer = make(weight_decay=0.1, use_ema=True)
        moved(optimizer, variables, [[np.ones((3, 3)), np.ones(2)]])
        return optimizer, variables

    def everything(optimizer, variables):
        return [np.asarray(to_numpy(v), np.float32).tobytes() for v in (*optimizer.variables, *variables)]

    optimizer, variables = made()
    before = everything(optimizer, variables)
    optimizer.guard = keras.ops.convert_to_tensor(False)
    moved(optimizer, variables, [[np.full((3, 3), np.nan), np.full(2, np.inf)]])
    assert everything(optimizer, variables) == before
    optimizer.guard = keras.ops.convert_to_tensor(True)
    moved(optimizer, variables, [[np.ones((3, 3)), np.ones(2)]])
    plain = made()
    moved(*plain, [[np.ones((3, 3)), np.ones(2)]])
    assert everything(optimizer, variables) == everything(*plain) != before


class Seen(keras.callbacks.Callback):
    """Weights and their moving averages after every step."""

    def __init__(self):
        super().__init__()
        self.weights, self.averages = [], []

    def on_train_batch_end(self, batch, logs=None):
        model = self.model  # asking for it brings the variables up to date on JAX
        self.weights.append([to_numpy(v).copy() for v in model.trainable_variables])
        self.averages.append([to_numpy(v).copy() for v in model.optimizer.variables if v.path.endswith("_average")])


@every_optimizer
def test_moving_averages_are_those_computed_by_hand_in_a_compiled_step(make):
    model, seen = network(), Seen()
    model.compile(make(use_ema=True, ema_momentum=0.7, rules=[("block_0/*", 0.0)]), "mse")
    model.fit(*batch(), batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[seen])
    averages = seen.weights[0]
    for weights, kept in zip(seen.weights, seen.averages):
        averages = [0.7 * a + 0.3 * w if kept is not seen.averages[0] else w for a, w in zip(averages, weights)]
        assert len(kept) == len(averages) == 8
        for got, expected in zip(kept, averages):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_a_rule_for_the_head_alone_is_a_linear_probe():
    model, seen = network(), Seen()
    before = [to_numpy(v).copy() for v in model.trainable_variables]
    model.compile(MomentumSGD(0.1, rules=LINEAR_PROBE, weight_decay=0.1), "mse", jit_compile=JIT)
    model.fit(*batch(), batch_size=8, verbose=0, callbacks=[seen])
    changed = [v.path for v, old, new in zip(model.trainable_variables, before, seen.weights[0]) if (old != new).any()]
    assert changed == ["head/kernel", "head/bias"]


@every_optimizer
def test_an_optimizer_survives_saving_with_its_slots(make, tmp_path):
    options = dict(weight_decay=0.1, decay_scale="schedule", decay_on=("head/*",), rules=LINEAR_PROBE[:1] + (("block_*", 0.5),))
    model = network()
    model.compile(make(WarmupDecay(9, 0.1, warmup_steps=2), use_ema=True, **options), "mse", jit_compile=JIT)
    x, y = batch()
    model.fit(x, y, epochs=3, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert type(again.optimizer) is type(model.optimizer)
    assert again.optimizer.get_config() == model.optimizer.get_config()
    assert [str(v.dtype) for v in again.optimizer.variables] == [str(v.dtype) for v in model.optimizer.variables]
    assert "bfloat16" in {str(v.dtype) for v in again.optimizer.variables}
    losses = [m.fit(x, y, epochs=2, verbose=0).history["loss"] for m in (model, again)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


# -- layer-wise decay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT_mu", "Hybrid_mu", "Mixer_mu"])
def test_layerwise_decay_falls_by_one_power_from_block_to_block(name):
    model = keras_vit.create_model(name, weights=None)
    optimizer = MomentumSGD(0.1, rules=layerwise_decay(model, 0.5))
    optimizer.build(model.trainable_variables)
    depth = sum(layer.name.startswith("block_") for layer in model.layers)
    late = {"encoder_norm", "pre_logits", "head"}
    for v, factor in zip(model.trainable_variables, optimizer.factors):
        layer = v.path.partition("/")[0]
        number = int(layer.removeprefix("block_")) if layer.startswith("block_") else depth if layer in late else -1
        assert factor == 0.5 ** (depth - number), v.path
    assert len(set(optimizer.factors)) == depth + 2


def test_layerwise_decay_needs_blocks_and_a_share():
    with pytest.raises(ArgumentError, match="above 0 and at most 1, got 0"):
        layerwise_decay(network(), 0)
    with pytest.raises(ArgumentError, match="no layers block_0.*inputs, outputs"):
        layerwise_decay(
            keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="inputs"), keras.layers.Dense(2, name="outputs")]),
            0.5,
        )


# -- refusals -------------------------------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize(
    ("option", "value", "ours"),
    [
        ("clipnorm", 1.0, "Learner.clip_norm"),
        ("global_clipnorm", 1.0, "Learner.clip_norm"),
        ("clipvalue", 1.0, "Learner.clip_norm"),
        ("gradient_accumulation_steps", 4, "Learner.parts"),
        ("ema_overwrite_frequency", 2, "SwapEMAWeights"),
    ],
)
def test_an_option_of_keras_that_is_wrong_under_a_strategy_is_refused_with_ours(make, option, value, ours):
    with pytest.raises(ArgumentError, match=f"{option}={value}.*{ours}"):
        make(**{option: value})


@pytest.mark.parametrize("argument", ["rules", "decay_on"])
def test_a_pattern_that_fits_no_variable_is_refused_with_the_nearest_paths(argument):
    pattern = {"rules": [("*", 1.0), ("blok_1/*", 0.5)], "decay_on": ["blok_1/*"]}[argument]
    optimizer = MomentumSGD(0.1, weight_decay=0.1, **{argument: pattern})
    with pytest.raises(ArgumentError, match=f"MomentumSGD: 'blok_1/.' of {argument} fits none of 8 .*block_1/"):
        optimizer.build(network().trainable_variables)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MomentumSGD(0.1, momentum=1.5), "MomentumSGD: momentum .* got 1.5"),
        (lambda: MomentumSGD(0.1, trace_dtype="float16"), "trace_dtype .* got 'float16'"),
        (lambda: MomentumSGD(0.1, weight_decay=-0.1), "weight_decay .* got -0.1"),
        (lambda: MomentumSGD(0.1, decay_scale="rate"), "decay_scale .* got 'rate'"),
        (lambda: MomentumSGD(0.1, rules=[("head/*", -1)]), "rule 'head/.' .* got -1"),
        (lambda: MomentumSGD(lambda: 0.1, weight_decay=0.1, decay_scale="schedule"), "decay_scale='schedule' .*`base`"),
        (lambda: MomentumSGD(0.1).exclude_from_weight_decay(var_names=["bias"]), "MomentumSGD: use decay_on"),
        (lambda: AdamW(0.1, beta_1=1.0), "AdamW: beta_1 .* got 1.0"),
        (lambda: AdamW(0.1, beta_2=-1), "AdamW: beta_2 .* got -1"),
        (lambda: AdamW(0.1, epsilon=0), "AdamW: epsilon .* got 0"),
        (lambda: AdamW(0.1, moment_dtype="int8"), "AdamW: moment_dtype .* got 'int8'"),
        (lambda: Adafactor(0.1, min_dim_size_to_factor=0), "min_dim_size_to_factor .* got 0"),
        (lambda: Adafactor(0.1, decay_rate=0), "decay_rate .* got 0"),
        (lambda: Adafactor(0.1, beta2_cap=1.0), "beta2_cap .* got 1.0"),
        (lambda: Adafactor(0.1, clipping_threshold=-1.0), "clipping_threshold .* got -1.0"),
        (lambda: Adafactor(0.1, momentum=1.0), "Adafactor: momentum .* got 1.0"),
        (lambda: Adafactor(0.1, dtype_momentum="float64"), "dtype_momentum .* got 'float64'"),
        (lambda: Adafactor(0.1, epsilon=-1), "Adafactor: epsilon .* got -1"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(make, match):
    with pytest.raises(ArgumentError, match=match):
        make()


# -- in other processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CHILD or BACKEND != "tensorflow", reason="needs a process with two logical devices")
@every_optimizer
def test_two_devices_make_the_update_of_one_and_none_of_a_batch_that_is_not_finite(make):
    import tensorflow as tf

    x, y = batch()
    broken = np.where(np.arange(8)[:, None] == 5, np.nan, x).astype(np.float32)  # of the second device
    found = []
    for strategy in (tf.distribute.get_strategy(), STRATEGY):
        with strategy.scope():
            model = network()
            trained = Learner(model.inputs, model.outputs, clip_norm=0.1)
            schedule = WarmupDecay(9, 0.1, warmup_steps=2)
            options = dict(weight_decay=0.1, decay_scale="schedule", use_ema=True, rules=layerwise_decay(model, 0.5))
            trained.compile(make(schedule, **options), "mse", jit_compile=False)
        seen = Seen()
        data = tf.data.Dataset.from_tensor_slices((np.stack([x, x, x, broken]), np.stack([y] * 4)))
        history = trained.fit(data, verbose=0, shuffle=False, callbacks=[seen]).history
        assert history["healthy"] == [0.0] and int(to_numpy(trained.optimizer.iterations)) == 3
        for kept in (seen.weights, seen.averages):
            for third, fourth in zip(*kept[2:]):
                np.testing.assert_array_equal(third, fourth)
        found.append((seen.weights, seen.averages, [to_numpy(v) for v in trained.optimizer.variables]))
    for one, two in zip(*map(keras.tree.flatten, found)):
        np.testing.assert_allclose(np.float32(one), np.float32(two), rtol=2e-5, atol=1e-6)


def run_here(test, backend):
    """Runs the tests of that name in a process of its own, on TensorFlow with two logical devices."""
    child = f"""
import sys
if {backend!r} == "tensorflow":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", {__file__!r}, "-k", {test!r}, "-m", ""]))
"""
    environment = {**os.environ, "KERAS_BACKEND": backend, "KERAS_VIT_CHILD": "1"}
    done = subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize("tests", ["adafactor", pytest.param("make", marks=pytest.mark.slow)])
def test_updates_are_the_same_on_two_devices(tests):
    if CHILD or BACKEND != "tensorflow":
        pytest.skip("this is another process")
    run_here(f"two_devices_make and {tests}", "tensorflow")


@pytest.mark.parametrize(
    "tests",
    [
        "bfloat16 and epsilon or None and parts and shape0 or survives and adafactor",
        pytest.param("not schedule_ and not refuse", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_optimizers_are_the_same_on_other_backends(backend, tests):
    if CHILD or BACKEND != "tensorflow" or importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed, or this is another process")
    run_here(tests, backend)
