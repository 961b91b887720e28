"""big_vision's strings: its numbers, draws that seeds alone decide, and no string that does anything but fail or preprocess."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from keras_vit.data import augment, pipeline
from keras_vit.data.ops import MAX_OP, MAX_SPEC, OPS, preprocess
from keras_vit.errors import ArgumentError

GOLDEN = Path(__file__).parent / "goldens" / "preprocess" / "big_vision_ops"
LABELS = '|value_range(-1, 1)|onehot(1000, key="{lbl}", key_result="labels")|keep("image", "labels")'


def picture(height=24, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image(spec, value=None, **features):
    """The image that a string gives."""
    return preprocess(spec)({"image": picture() if value is None else value, **features})["image"].numpy()


def gradient(height=40, width=50):
    """A picture whose values say where they were: (y, x, 0)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, 0 * y], -1).astype(np.uint8)


def test_the_originals_numbers_are_met():
    items = json.loads((GOLDEN / "meta.json").read_text())["items"]
    with np.load(GOLDEN / "inputs.npz") as inputs, np.load(GOLDEN / "expected.npz") as expected:
        for item in items:
            got = image(item["spec"], inputs[item["name"]])
            error = np.abs(got - expected[item["name"]])
            assert got.dtype == item["out_dtype"]
            assert error.max() <= 2 / 255 + 1e-6 and (error > 1e-6).mean() <= 0.002, item["spec"]
    assert len(items) == 4


@pytest.mark.parametrize(
    "spec",
    [  # of vit_i21k, vit_s16_i1k, load_and_eval, transfer, flexivit/i21k_distill, i1k_deit3_distill, image_text/common
        "decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2,10)" + LABELS.format(lbl="label"),
        "decode_jpeg_and_inception_crop(224)|flip_lr" + LABELS.format(lbl="label"),
        "decode|resize_small(256)|central_crop(224)" + LABELS.format(lbl="real_label"),
        "decode|inception_crop(64, area_min=50)|" + LABELS.format(lbl="label"),
        "decode|resize_small(73)|random_crop(64)|flip_lr" + LABELS.format(lbl="label"),
        'decode|inception_crop|flip_lr|copy("image", "prof")|resize(48)|value_range|resize(64, key="prof")'
        '|value_range(key="prof")|onehot(1000, key="label", key_result="labels")|keep("image", "prof", "labels")',
        'decode|resize(256)|central_crop(224)|value_range(outkey="prof")|keep("image", "prof", "labels")',
        "decode|resize_small(74)|central_crop(56)|value_range(-1,1)",
    ],
)
def test_the_strings_of_big_visions_configs_run_in_tf_data(spec):
    examples = {"image": [tf.io.encode_jpeg(picture(80, 90, seed)).numpy() for seed in range(4)], "label": [3, 0, 999, 7]}
    examples["real_label"] = tf.ragged.constant([[1, 2], [], [5], [999]])
    data = tf.data.Dataset.from_tensor_slices(examples).enumerate()
    prepare = preprocess(spec)
    data = data.map(lambda index, features: prepare({**features, "seed": index}))
    (batch,) = (features for features in data.padded_batch(4))
    assert batch["image"].dtype == (tf.uint8 if "outkey" in spec else tf.float32)
    assert batch["image"].shape[0] == 4
    if "onehot" in spec:
        many = "real_label" in spec
        assert set(batch) >= {"image", "labels"} and not {"label", "seed"} & set(batch)
        np.testing.assert_array_equal(np.sum(batch["labels"], 1), [2, 0, 1, 1] if many else [1] * 4)


def test_static_shapes_survive_so_that_a_model_can_be_fed():
    for op, shape in [
        ("resize([8, 9])", (8, 9, 3)), ("central_crop([8, 9])", (8, 9, 3)), ("random_crop(8)", (8, 8, 3)),
        ("inception_crop(8)", (8, 8, 3)), ("inception_crop", (None, None, 3)), ("flip_lr", (None, None, 3)),
        ("resize_small(8)", (None, None, 3)), ("value_range", (None, None, 3)),
    ]:  # fmt: skip
        data = tf.data.Dataset.from_tensors({"image": tf.io.encode_png(picture()), "seed": 0})
        assert data.map(preprocess(f"decode|{op}")).element_spec["image"].shape.as_list() == list(shape), op


@pytest.mark.parametrize(
    "op, shape",
    [
        ("resize(8)", (8, 8)), ("resize((8, 5))", (8, 5)), ("resize_small(12)", (12, 15)), ("resize_long(15)", (12, 15)),
        ("resize_small(48)", (48, 60)), ("central_crop", (24, 24)), ("central_crop([9, 30])", (9, 30)),
        ("random_crop([9, 30])", (9, 30)), ("inception_crop([6, 7])", (6, 7)), ("flip_lr", (24, 30)),
        ("resize_small(9, antialias=True, method='lanczos3')", (9, 11)),
    ],
)  # fmt: skip
def test_sizes_come_out_and_dtypes_stay(op, shape):
    for dtype in (np.uint8, np.int32, np.float32):
        got = image(op, picture().astype(dtype), seed=3)
        assert got.shape == (*shape, 3) and got.dtype == dtype


def test_a_side_never_becomes_zero():
    assert image("resize_long(10)", picture(1, 200)).shape == (1, 10, 3)


def test_resizing_to_integers_saturates_and_cuts_the_fraction_off():
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 255
    smooth = tf.image.resize(edge, [16, 16], "bicubic").numpy()
    assert smooth.min() < 0 and smooth.max() > 255
    np.testing.assert_array_equal(image("resize(16, 'bicubic')", edge), smooth.clip(0, 255).astype(np.uint8))


def test_crops_lie_where_they_should():
    np.testing.assert_array_equal(image("central_crop([10, 20])", gradient()), gradient()[15:25, 15:35])
    corners = {tuple(image("random_crop([38, 48])", gradient(), seed=seed)[0, 0, :2]) for seed in range(60)}
    assert corners == set(itertools.product(range(3), range(3)))


def test_an_inception_crop_is_a_box_within_its_area_and_ratio():
    ratios, shares = [], []
    for seed in range(60):
        got = image("inception_crop(area_min=30, area_max=60)", gradient(80, 100), seed=seed)
        y, x, _ = got[0, 0]
        np.testing.assert_array_equal(got, gradient(80, 100)[y : y + got.shape[0], x : x + got.shape[1]])
        ratios.append(got.shape[1] / got.shape[0])
        shares.append(got.shape[0] * got.shape[1] / 8000)
    assert 0.29 < min(shares) < 0.35 and 0.55 < max(shares) < 0.61
    assert 0.73 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.36
    wide = "decode_jpeg_and_inception_crop(ratio_min=2, ratio_max=2.1, area_max=30)"
    got = image(wide, tf.io.encode_jpeg(picture(80, 100)), seed=1)
    assert 1.9 < got.shape[1] / got.shape[0] < 2.2


def test_the_default_inception_crop_has_the_boxes_of_the_pipeline():
    for seed in ([0, 1], [2, 3], [-4, 2**40]):
        y, x, height, width = pipeline.random_box([40, 50, 3], seed).numpy()
        got = OPS["inception_crop"].make()(gradient(), seed)
        np.testing.assert_array_equal(got, gradient()[y : y + height, x : x + width])


def test_decoding_and_cropping_at_once_is_decoding_then_cropping():
    data = tf.io.encode_jpeg(picture(60, 70)).numpy()
    np.testing.assert_array_equal(image("decode", data), pipeline.decode(data))
    joined = "decode_jpeg_and_inception_crop(16, area_min=20)"
    np.testing.assert_array_equal(
        image(joined, data, seed=2), image("inception_crop(16, area_min=20)", pipeline.decode(data), seed=2)
    )


def test_randaug_is_that_of_augment_with_a_seed_of_its_own_and_wants_bytes():
    results = [image("randaug(2, 15)", seed=seed) for seed in range(12)]
    assert len({each.tobytes() for each in results}) > 8 and all(each.dtype == np.uint8 for each in results)
    seed = tf.constant([3, 4], tf.int64)
    np.testing.assert_array_equal(OPS["randaug"].make()(picture(), seed), augment.randaugment(picture(), 2, 10, seed))
    np.testing.assert_array_equal(image("randaug(magnitude=15)", seed=5), results[5])
    for wrong in (picture().astype(np.float32), picture()[..., :1]):
        with pytest.raises(ArgumentError, match=r"randaug: feature 'image' must be a uint8 image \(height, width, 3\)"):
            image("randaug", wrong, seed=0)


def test_half_of_the_flips_flip():
    flips = [np.array_equal(image("flip_lr", seed=seed), picture()[:, ::-1]) for seed in range(100)]
    assert 30 < sum(flips) < 70
    assert all(flip or np.array_equal(image("flip_lr", seed=seed), picture()) for seed, flip in enumerate(flips))


def test_value_range_maps_the_ends_channels_and_clips():
    ends = np.uint8([[[0, 255, 51]]])
    np.testing.assert_allclose(image("value_range", ends), [[[-1, 1, -0.6]]], atol=1e-6)
    np.testing.assert_allclose(image("value_range(0, 2, in_min=[0, 0, 1], in_max=[1, 510, 51])", ends), [[[0, 1, 2]]], atol=1e-6)
    np.testing.assert_allclose(image("value_range(0, 1, 51, 102, True)", ends), [[[0, 1, 0]]], atol=1e-6)
    np.testing.assert_allclose(image("value_range(0, 1, 51, 102)", ends), [[[-1, 4, 0]]], atol=1e-6)


def test_onehot_is_multi_hot_unless_told_otherwise():
    def labels(spec, value, **features):
        return preprocess(spec)({"labels": np.array(value, np.uint8), **features})["labels"].numpy().tolist()

    assert labels("onehot(3)", 2) == [0, 0, 1]
    assert labels("onehot(3, multi=False)", 2) == [0, 0, 1]
    assert labels("onehot(3)", [2, 0, 2]) == [1, 0, 1]
    assert labels("onehot(3)", []) == [0, 0, 0]
    assert labels("onehot(2, multi=False)", [1, 0]) == [[0, 1], [1, 0]]
    assert labels("onehot(2, on=0.75, off=0.25)", 1) == [0.25, 0.75]
    assert labels("onehot(2, 'label', 'labels')", 0, label=1) == [0, 1]
    assert labels("onehot(1000)", 255)[255] == 1


def test_features_are_routed_kept_dropped_copied_and_the_dict_passed_in_is_left_alone():
    features = {"image": picture(), "a": picture(seed=1), "label": 1}
    before = dict(features)
    run = preprocess('copy("image", "b")|resize(4, key="a")|resize(5, inkey="b", outkey="c")|resize(6, outkey="d")')
    shapes = {name: np.shape(value) for name, value in run(features).items()}
    assert shapes == {
        "image": (24, 30, 3), "a": (4, 4, 3), "b": (24, 30, 3), "c": (5, 5, 3), "d": (6, 6, 3), "label": (),
    }  # fmt: skip
    assert features.keys() == before.keys() and all(features[name] is before[name] for name in features)
    assert set(preprocess("keep('label', 'none')")(features)) == {"label"}
    assert set(preprocess("drop('label', 'none')")(features)) == {"image", "a"}
    assert preprocess(" | |")(features) == features


def test_draws_depend_on_the_two_seeds_and_the_place_alone():
    spec = "inception_crop(8)|flip_lr|random_crop(6)"

    def draw(seed, index):
        return preprocess(spec, seed=seed)({"image": picture(), "seed": index})["image"].numpy().tobytes()

    first = {(seed, index): draw(seed, index) for seed in (0, 1, -(2**63)) for index in range(4)}
    tf.random.set_seed(7)
    np.random.default_rng(0)
    assert {key: draw(*key) for key in first} == first
    assert len(set(first.values())) == len(first)
    assert draw(0, np.uint8(3)) == draw(0, tf.constant(3, tf.int64)) == first[0, 3]
    twice = [preprocess("random_crop(20)|" * count)({"image": picture(), "seed": 0})["image"].numpy() for count in (1, 2)]
    corner = [
        preprocess(f"{'resize([40, 50])|' * place}random_crop(20)")({"image": gradient(), "seed": 0})["image"] for place in (1, 2)
    ]
    np.testing.assert_array_equal(*twice)
    assert not np.array_equal(*corner)


def test_a_parallel_pipeline_gives_what_eager_calls_give():
    prepare = preprocess(
        "decode|inception_crop(8)|flip_lr|random_crop(6)|value_range|onehot(9, 'label', 'labels')|drop('label')", seed=4
    )
    files = [tf.io.encode_png(picture(seed=seed)).numpy() for seed in range(9)]
    data = tf.data.Dataset.from_tensor_slices({"image": files, "label": range(9)}).enumerate()
    data = data.map(lambda index, features: prepare({**features, "seed": index}), num_parallel_calls=3).batch(4)
    eager = [prepare({"image": file, "label": label, "seed": label}) for label, file in enumerate(files)]
    for name in ("image", "labels"):
        got = np.concatenate([batch[name] for batch in data])
        np.testing.assert_allclose(got, [example[name] for example in eager], atol=1e-6)


HOSTILE = [
    "__import__('os')", "__import__('os').system('true')", "resize(__import__('os').getpid())", "os.getpid()", "eval('1')",
    "resize(size)", "resize((lambda: 3)())", "resize([n for n in [3]])", "resize(f'{3}')", "resize(3 if True else 4)",
    "resize((x := 3))", "resize(10**9)", "resize(2 * 3)", "resize(await x)", "resize(*[3])", "resize(**{'size': 3})",
    "resize({[1]})", "resize(3)(3)", "resize[3]", "resize.__class__", "(resize)(3).x", "resize(resize(3))", "resize" + ".a" * 490,
    "resize(" + "(" * 300 + "3" + ")" * 300 + ")", "resize(" + "[" * 15 + "]" * 15 + ")", "resize(" + "-" * 900 + "3)",
    "resize(" + "1-" * 480 + "1)", "resize(" + "not " * 240 + "3)", "resize(" + "9" * 900 + ")", "value_range(" + "9" * 900 + ")",
    "value_range(" + "9" * 900 + "+1j)", "value_range(1e999)", "x" * (MAX_OP + 1), "keep(" + "'a'," * 300 + ")",
    "flip_lr|" * (MAX_SPEC // 8 + 1), "resize(3", "resize(3))", "resize(3); flip_lr", "resize 3", "resize(\n3", "a\0b",
    "resize(3\0)", "\ud800", "resize(3)\\", "3", "'resize'", "-", "resize(3,,)", "# resize", None, 3, b"resize(3)", ["resize(3)"],
]  # fmt: skip


@pytest.mark.parametrize("spec", HOSTILE, ids=lambda spec: str(spec)[:24].encode("ascii", "replace").decode())
def test_a_string_that_is_no_list_of_ops_with_literals_is_refused(spec):
    with pytest.raises(ArgumentError) as error:
        preprocess(spec)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "spec, named, expected, got",
    [
        ("resise(3)", "'resise'", "Did you mean 'resize'", "flip_lr, randaug, value_range"),
        ("autoaug(2, 10)", "'autoaug'", "Known ops", "copy"),
        ("randaug(0)", "randaug:", "num_layers must be a whole number from 1 to 16", "got 0"),
        ("randaug(2, magnitude=-1)", "randaug:", "magnitude must be a number from 0 to 100", "got -1"),
        ("resize", "resize:", "missing a required argument: 'size'", "a whole number from 1 to 8,000"),
        ("resize(3, size=4)", "resize:", "multiple values", "resize(3, size=4)"),
        ("resize(size=3, size=4)", "resize:", "named once", "size=4"),
        ("resize(3, sise=4)", "resize:", "unexpected keyword argument 'sise'", "by name key, inkey, outkey"),
        ("resize(3, 'area', True, 4)", "resize:", "too many positional", "4)"),
        ("resize(0)", "resize:", "size must be a whole number from 1", "got 0"),
        ("resize(True)", "resize:", "whole number", "got True"),
        ("resize([3])", "resize:", "two of them", "got [3]"),
        ("resize(3, 'magic')", "resize:", "one of ('bilinear'", "got 'magic'"),
        ("resize(3, antialias=1)", "resize:", "True or False", "got 1"),
        ("resize(3, key=4)", "resize:", "key must be a string", "got 4"),
        ("flip_lr(inkey=None)", "flip_lr:", "inkey must be a string", "got None"),
        ("resize(name)", "resize:", "must be a literal", "'name'"),
        ("central_crop('a')", "central_crop:", "or None", "got 'a'"),
        ("inception_crop(area_min=0)", "inception_crop:", "area_min must be a number above 0", "got 0"),
        ("inception_crop(area_min=9, area_max=8)", "inception crop", "least area", "(9, 8)"),
        ("decode_jpeg_and_inception_crop(ratio_min=2)", "inception crop", "ratio", "(2, 1.33)"),
        ("value_range(in_max='a')", "value_range:", "in_max must be a number", "got 'a'"),
        ("value_range(in_min=3, in_max=3)", "value_range:", "must differ", "3 and 3"),
        ("value_range(in_min=[1, 2], in_max=[3, 4, 5])", "value_range:", "one length", "[3, 4, 5]"),
        ("onehot", "onehot:", "missing a required argument: 'depth'", "got 'onehot'"),
        ("onehot(9999999)", "onehot:", "depth must be a whole number", "got 9999999"),
        ("keep", "keep:", "missing a required argument", "a string"),
        ("drop('a', 3)", "drop:", "must be a string", "got 3"),
        ("copy('a')", "copy:", "missing a required argument: 'outkey'", "copy('a')"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_op_what_was_expected_and_what_was_got(spec, named, expected, got):
    with pytest.raises(ArgumentError) as error:
        preprocess("flip_lr|" + spec)
    assert named in str(error.value) and expected in str(error.value) and got in str(error.value)


def test_mutants_of_good_strings_are_read_or_refused_and_nothing_else():
    rng = np.random.default_rng(0)
    good = "decode|resize_small(256, method='area')|central_crop([2, 3])|value_range(-1, 1)|onehot(10, key=\"a\")|keep('image')"
    pieces = [*good, *OPS, "()", "**", "*", "lambda:", "1e9", "\\", "\n", "{", "None", "__", "é"]
    refused = 0
    for _ in range(3000):
        start = rng.integers(0, len(good))
        mutant = good[:start] + "".join(rng.choice(pieces, rng.integers(0, 3))) + good[start + rng.integers(0, 4) :]
        try:
            preprocess(mutant)
        except ArgumentError:
            refused += 1
    assert 1000 < refused < 3000


@pytest.mark.parametrize("seed", [1.0, True, "1", None, 2**63])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(ArgumentError, match="seed must be a whole number"):
        preprocess("flip_lr", seed=seed)


@pytest.mark.parametrize(
    "spec, features, match",
    [
        ("resize(3)", [picture()], "features must be a dict"),
        ("resize(3)", {"picture": picture()}, "resize: there is no feature 'image', only \\['picture'\\]"),
        ("copy('a', 'b')", {"image": 0}, "copy: there is no feature 'a'"),
        ("onehot(3, key='label')", {"labels": 0}, "onehot: there is no feature 'label'"),
        ("resize(3)", {"image": b"file"}, "resize: feature 'image' must be a decoded image"),
        ("resize(3)", {"image": picture()[None]}, "shape \\(1, 24, 30, 3\\)"),
        ("resize(3)", {"image": object()}, "got object"),
        ("decode", {"image": picture()}, "decode: feature 'image' must be the content of an image file"),
        ("value_range", {"image": "text"}, "value_range: feature 'image' must be numbers"),
        ("value_range(in_max=[1, 2])", {"image": picture()}, "the last axis must be 2"),
        ("flip_lr", {"image": picture()}, "flip_lr is random: features\\['seed'\\]"),
        ("flip_lr", {"image": picture(), "seed": 0.5}, "feature 'seed' must be one whole number"),
        ("flip_lr", {"image": picture(), "seed": [1, 2]}, "feature 'seed' must be one whole number"),
        ("central_crop(25)", {"image": picture()}, r"central_crop: the image must be at least \(25, 25\) pixels, got \(24, 30\)"),
        ("random_crop([3, 31])", {"image": picture(), "seed": 0}, "random_crop: the image must be at least"),
        ("onehot(3)", {"labels": 3}, "labels must lie in 0..2"),
        ("onehot(3)", {"labels": [0, -1]}, "labels must lie in 0..2"),
        ("onehot(3)", {"labels": 1.0}, "onehot: feature 'labels' must be whole numbers"),
    ],
)  # fmt: skip
def test_features_that_do_not_fit_are_refused_by_name(spec, features, match):
    with pytest.raises(ArgumentError, match=match):
        preprocess(spec)(features)


def test_what_only_values_show_stops_a_pipeline():
    data = tf.data.Dataset.from_tensors({"image": tf.io.encode_png(picture()), "labels": 3})
    for spec, match in [("decode|central_crop(25)", "at least"), ("onehot(3)", "labels must lie")]:
        with pytest.raises(tf.errors.InvalidArgumentError, match=match):
            list(data.map(preprocess(spec)))
    with pytest.raises(tf.errors.InvalidArgumentError):
        preprocess("decode")({"image": b"no image"})
