"""Augmentation: the original's numbers, and draws that follow from seeds alone."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import GOLDENS

from keras_vit.data import augment
from keras_vit.data.augment import (
    LEVELS,
    OPERATIONS,
    SIGNED,
    augreg_level,
    cutmix,
    cutout,
    mix,
    mixup,
    randaugment,
    random_erasing,
    shifted,
    smooth_labels,
)
from keras_vit.errors import ArgumentError

CASES = sorted(path.parent for path in (GOLDENS / "randaug").rglob("meta.json"))


def picture(height=24, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def drawn(function, count):
    """`function(seed)` for `count` seeds, in a parallel pipeline, as one array or a tuple of them."""
    data = tf.data.Dataset.range(count).map(lambda i: function(tf.stack([i, 7 * i + 3])), num_parallel_calls=4)
    found = list(data.as_numpy_iterator())
    return tuple(map(np.stack, zip(*found))) if isinstance(found[0], tuple) else np.stack(found)


# ---------------------------------------------------------------- RandAugment


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_every_operation_gives_the_values_of_the_original(folder):
    meta = json.loads((folder / "meta.json").read_text())
    assert list(OPERATIONS) == meta["config"]["op_order"] and meta["tolerance"] == 0
    for name, arguments in meta["config"]["arguments"].items():
        for magnitude, values in arguments.items():
            assert list(OPERATIONS[name][1](int(magnitude))) == values
    with np.load(folder / "inputs.npz") as inputs, np.load(folder / "expected.npz") as expected:
        for key in expected.files:
            name, at, image = key.split("/")
            function, arguments = OPERATIONS[name]
            values = [value if at.endswith("+") else -value for value in arguments(int(at[1:-1]))]
            equal = function(inputs[image], *values).numpy() == expected[key]
            assert equal.all() or (name == "Rotate" and equal.mean() >= 0.995), key  # ties of nearest neighbours
    assert len(CASES) == 2


def test_the_operations_give_the_same_in_a_pipeline():
    image = picture()

    def arguments(name):
        return (*OPERATIONS[name][1](15), *([(5, 20)] if name == "Cutout" else []))

    functions = {name: OPERATIONS[name][0] for name in OPERATIONS}
    data = tf.data.Dataset.from_tensors(image).map(lambda x: {name: f(x, *arguments(name)) for name, f in functions.items()})
    (found,) = data.as_numpy_iterator()
    for name, function in functions.items():
        np.testing.assert_array_equal(found[name], function(image, *arguments(name)), err_msg=name)


def test_cutout_is_a_square_cut_off_at_the_border():
    image = np.zeros((24, 30, 3), np.uint8)
    for centre, rows, columns in (((12, 15), (8, 16), (11, 19)), ((1, 28), (0, 5), (24, 30))):
        expected = image.copy()
        expected[slice(*rows), slice(*columns)] = 128
        np.testing.assert_array_equal(cutout(image, 4, centre), expected)


def test_operations_are_drawn_equally_often_signed_ones_both_ways_and_centres_everywhere(monkeypatch):
    def recorder(number, name):
        def record(image, *values):
            sign = tf.cast(values[0] > 0, tf.int32) if name in SIGNED else 0
            return tf.cast(tf.stack([number, sign, *(tf.unstack(values[1]) if name == "Cutout" else (0, 0))]), tf.uint8)[
                None, :, None
            ]

        return record

    fakes = {name: (recorder(i, name), arguments) for i, (name, (_, arguments)) in enumerate(OPERATIONS.items())}
    monkeypatch.setattr(augment, "OPERATIONS", fakes)
    monkeypatch.setattr(tf, "ensure_shape", lambda x, shape: x)
    found = drawn(lambda seed: randaugment(tf.zeros([24, 30, 3], tf.uint8), 1, 10, seed)[0, :, 0], 3200)
    counts = np.bincount(found[:, 0], minlength=16)
    assert counts.min() > 200 - 5 * 14 and counts.max() < 200 + 5 * 14  # five standard deviations
    signed = found[np.isin(found[:, 0], [list(OPERATIONS).index(name) for name in SIGNED])]
    assert 0.4 < signed[:, 1].mean() < 0.6
    centres = found[found[:, 0] == list(OPERATIONS).index("Cutout")][:, 2:]
    assert centres.min(0).max() <= 1 and (centres.max(0) >= (22, 28)).all() and (centres.max(0) <= (23, 29)).all()


def test_randaugment_follows_from_its_seed_and_its_layers_from_different_parts_of_it():
    image = picture()
    two = drawn(lambda seed: randaugment(image, 2, 10, seed), 40)
    assert two.shape == (40, 24, 30, 3) and two.dtype == np.uint8
    for i in (0, 7, 39):
        np.testing.assert_array_equal(randaugment(image, 2, 10, tf.constant([i, 7 * i + 3], tf.int64)), two[i])
    assert len({each.tobytes() for each in two}) > 25
    one = drawn(lambda seed: randaugment(image, 1, 10, seed), 40)
    assert np.mean([(a == b).all() for a, b in zip(one, two)]) < 0.5
    np.testing.assert_array_equal(randaugment(image, 0, 10, [1, 2]), image)


def test_randaugment_refuses_what_it_cannot_use():
    image = picture()
    for wrong in (image.astype(np.float32), image[None], image[..., :1]):
        with pytest.raises(ArgumentError, match="uint8 image"):
            randaugment(wrong, 2, 10, [0, 0])
    for layers in (-1, 17, 2.0, True):
        with pytest.raises(ArgumentError, match="layers"):
            randaugment(image, layers, 10, [0, 0])
    for magnitude in (-1, 101, "10", float("nan")):
        with pytest.raises(ArgumentError, match="magnitude"):
            randaugment(image, 2, magnitude, [0, 0])


def test_levels_are_those_of_the_recipe_and_light0_of_the_files_is_light1():
    notes = json.loads((CASES[0] / "meta.json").read_text())["notes"]
    recipe = next(note for note in notes if note.startswith("AugReg levels"))
    for name, (layers, magnitude, alpha) in LEVELS.items():
        described = f"{name}: no RandAugment, mixup {alpha:g}" if name == "none" else f"({layers},{magnitude}), {alpha:g}"
        assert f"{name}: " in recipe and described in recipe
        assert augreg_level(name) == (layers, magnitude, alpha)
    assert augreg_level("light0") == LEVELS["light1"]
    for wrong in ("medium", "", None, 3):
        with pytest.raises(ArgumentError, match="none, light1"):
            augreg_level(wrong)


# ---------------------------------------------------------------- Mixup and CutMix


def batch(count=6, height=16, width=20):
    rng = np.random.default_rng(1)
    images = rng.standard_normal((count, height, width, 3)).astype(np.float32)
    return images, np.eye(count, dtype=np.float32)


def rolled(pair):
    return tuple(np.roll(part, 1, 0) for part in pair)


def test_mixup_is_a_share_of_one_and_the_rest_of_the_other():
    pair = batch()
    images, labels = mixup(pair, rolled(pair), 0.75)
    np.testing.assert_allclose(images, 0.75 * pair[0] + 0.25 * np.roll(pair[0], 1, 0), rtol=1e-6)
    np.testing.assert_array_equal(labels[1, :3], [0.25, 0.75, 0])


def test_mixups_share_is_of_a_beta_distribution_and_at_least_one_half():
    stats = pytest.importorskip("scipy.stats")
    pair = batch(2, 2, 2)
    for alpha in (0.2, 0.8):
        shares = drawn(lambda seed: mix(pair, rolled(pair), seed, mixup_alpha=alpha)[1][0, 0], 600)  # noqa: B023 - drawn at once
        assert shares.min() >= 0.5
        folded = stats.beta(alpha, alpha)
        assert stats.kstest(shares, lambda x: np.clip(2 * folded.cdf(x) - 1, 0, 1)).pvalue > 1e-3  # noqa: B023


def test_labels_of_a_cutmix_say_how_many_pixels_come_from_whom():
    pair = batch()
    mine, other = (np.full_like(pair[0], value) for value in (1.0, 0.0))
    for centre in ((8, 10), (0, 0), (15, 19), (3, 18)):
        for share in (0.0, 0.3, 0.9, 1.0):
            images, labels = cutmix((mine, pair[1]), (other, np.roll(pair[1], 1, 0)), share, centre)
            assert images.shape == mine.shape
            kept = images.numpy()[0, ..., 0]
            np.testing.assert_allclose(labels[0, 0], kept.mean(), rtol=1e-6)
            np.testing.assert_allclose(np.sum(labels, -1), 1, rtol=1e-6)
            rows, columns = np.nonzero(kept == 0)
            if len(rows):  # a box, of the image's aspect ratio where it is not cut off
                assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    images, labels = cutmix((mine, pair[1]), (other, np.roll(pair[1], 1, 0)), 0.75, (8, 10))
    np.testing.assert_allclose(labels[0, 0], 0.75, atol=0.02)
    assert np.flatnonzero(images.numpy()[0, 8, :, 0] == 0).tolist() == list(range(5, 15))


def test_mix_gives_half_of_the_batches_to_cutmix_and_follows_from_its_seed():
    pair = batch(4)

    def mixed(seed, **alphas):
        return mix(pair, rolled(pair), seed, **alphas)

    images, labels = drawn(lambda seed: mixed(seed, mixup_alpha=0.8, cutmix_alpha=1.0), 200)
    pasted = np.array([np.isin(image, pair[0]).all() for image in images])  # CutMix leaves every value as it is
    assert 0.35 < pasted.mean() < 0.65
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-6)
    again = mixed(tf.constant([5, 38], tf.int64), mixup_alpha=0.8, cutmix_alpha=1.0)
    np.testing.assert_array_equal(again[0], images[5])
    np.testing.assert_array_equal(again[1], labels[5])
    assert all(a is b for a, b in zip(mixed([0, 0]), pair))
    cut = drawn(lambda seed: mixed(seed, cutmix_alpha=1.0)[0], 20)
    assert np.isin(cut, pair[0]).all() and (cut != pair[0]).any()


# ---------------------------------------------------------------- random erasing, label smoothing, shifts


def test_random_erasing_fills_a_box_of_the_drawn_size_with_noise():
    image = np.full((40, 50, 3), 9.0, np.float32)
    found = drawn(lambda seed: random_erasing(image, seed, 0.25), 600)
    erased = (found != 9).all(-1)
    changed = erased.any((1, 2))
    assert 0.17 < changed.mean() < 0.33
    areas, ratios = [], []
    for one in erased[changed]:
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        assert one.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        areas.append(one.mean())
        ratios.append(len(rows) / len(columns))
    assert 0.015 < min(areas) < 0.07 and 0.33 < max(areas) < 0.42
    assert 0.25 < min(ratios) < 0.7 and 2 < max(ratios) < 3.8
    noise = found[changed][erased[changed]]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    np.testing.assert_array_equal(random_erasing(image, tf.constant([3, 24], tf.int64), 0.25), found[3])


def test_random_erasing_can_fill_with_a_number_always_and_never():
    image = picture().astype(np.float32) + 1
    always = drawn(lambda seed: random_erasing(image, seed, 1.0, fill=0.0), 30)
    assert ((always == 0).any((1, 2, 3))).all() and set((always == image).ravel() | (always == 0).ravel()) == {True}
    np.testing.assert_array_equal(random_erasing(image, [1, 2], 0.0), image)


def test_smoothed_labels_are_those_of_keras_losses():
    labels, scores = np.eye(5, dtype=np.float32), np.random.default_rng(0).standard_normal((5, 5)).astype(np.float32)
    theirs = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)(labels, scores)
    ours = keras.losses.CategoricalCrossentropy(from_logits=True)(smooth_labels(labels, 0.1), scores)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_shifts_are_small_and_follow_from_seed_and_place_whoever_reads_them():
    images = np.zeros((64, 8, 8, 3), np.float32)
    images[:, 4, 4] = 1.0
    source = tf.data.Dataset.from_tensors((images, np.zeros((64, 2), np.float32))).repeat(2)
    first, second = (batch.numpy() for batch, _ in shifted(source, seed=1))
    np.testing.assert_array_equal(first.sum((1, 2)), 1.0)
    places = {tuple(place) for place in np.argwhere(first)[:, 1:3]}
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}
    assert (first != second).any()
    np.testing.assert_array_equal(next(iter(shifted(source, seed=1, start=64)))[0], second)
    assert (next(iter(shifted(source, seed=2)))[0].numpy() != first).any()
    part = tf.data.Dataset.from_tensors((images[:16], np.zeros((16, 2), np.float32))).repeat(2)
    parts = [[batch.numpy() for batch, _ in shifted(part, seed=1, shard=(worker, 4))] for worker in range(4)]
    for number, whole in enumerate((first, second)):
        np.testing.assert_array_equal(np.concatenate([batches[number] for batches in parts]), whole)


@pytest.mark.parametrize("name", augment.INCREASING)
def test_timms_operations_do_more_at_a_higher_level(name):
    image, of = tf.constant(picture() // 2 + 30), augment.INCREASING[name]
    least, most = (np.asarray(of(image, tf.constant(level), tf.constant(level))).astype(int) for level in (0.0, 1.0))
    assert most.shape == image.shape and np.any(most != image)
    if name not in ("AutoContrast", "Equalize", "Invert", "PosterizeIncreasing"):  # which have no level, or keep 4 bits at 0
        assert np.abs(least - image.numpy()).max() <= 1 < np.abs(most - image.numpy()).max()


def test_timms_bits_thresholds_and_factors():
    ramp = tf.constant(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1))
    values = np.arange(256)

    def at(name, level, sign=1):
        return np.asarray(augment.INCREASING[name](ramp, tf.constant(level), tf.constant(level * sign)))[..., 0].ravel()

    np.testing.assert_array_equal(at("PosterizeIncreasing", 0.0), values & 0xF0)
    np.testing.assert_array_equal(at("PosterizeIncreasing", 0.9), values & 0x80)
    np.testing.assert_array_equal(at("PosterizeIncreasing", 1.0), 0 * values)
    np.testing.assert_array_equal(at("SolarizeIncreasing", 0.9), np.where(values < 256 - 230, values, 255 - values))
    np.testing.assert_array_equal(at("SolarizeAdd", 0.9), np.where(values < 128, values + 99, values))
    np.testing.assert_allclose(at("BrightnessIncreasing", 1.0, -1), values * 0.1, atol=1)
    np.testing.assert_allclose(at("ContrastIncreasing", 0.5), np.clip(128 + (values - 128) * 1.45, 0, 255), atol=1)


def test_increasing_randaugment_depends_on_its_seed_alone_and_leaves_a_quarter_as_they_are():
    image = tf.constant(picture())
    draw = tf.function(lambda seed: augment.increasing_randaugment(image, 2, 9.0, 0.5, seed), autograph=False)
    found = [draw(tf.constant([0, number], tf.int64)).numpy() for number in range(60)]
    np.testing.assert_array_equal(found[7], draw(tf.constant([0, 7], tf.int64)).numpy())
    same = sum(np.array_equal(each, image) for each in found)
    assert 5 <= same <= 27 and len({each.tobytes() for each in found}) > 30
    with pytest.raises(ArgumentError, match="deviation must be a number from 0 to 10"):
        augment.check_randaugment(2, 9.0, -1.0)
