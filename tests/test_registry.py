"""Every variant, by being registered. Under another backend: KERAS_BACKEND=jax pytest tests/test_registry.py."""

import functools
import inspect
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import zoo
from keras_vit.checkpoints.load import named_weights
from keras_vit.explain.cost import cost
from keras_vit.explain.gradcam import gradcam

# models_test.py of google-research/vision_transformer: parameters at 224 x 224 with 1,000 classes
ORIGINAL_SIZES = {
    "Mixer-B_16": 59_880_472, "Mixer-B_32": 60_293_428, "Mixer-L_16": 208_196_168,
    "R+ViT-Ti_16": 6_337_704, "R26+ViT-B_32": 101_383_976, "R26+ViT-S_32": 36_431_912, "R50+ViT-B_16": 98_659_112,
    "R50+ViT-L_32": 328_994_856,
    "ViT-B_8": 86_576_872, "ViT-B_16": 86_567_656, "ViT-B_16-gap-norep": 86_566_120, "ViT-B_32": 88_224_232,
    "ViT-B_32-gap-norep": 88_222_696, "ViT-H_14": 632_045_800, "ViT-L_16": 304_326_632, "ViT-L_32": 306_535_400,
    "ViT-S_16": 22_050_664, "ViT-S_16-gap-norep": 22_049_896, "ViT-S_32": 22_878_952, "ViT-S_32-gap-norep": 22_878_184,
    "ViT-Ti_16": 5_717_416,
}  # fmt: skip

JIT = keras.config.backend() == "jax"  # which compiles each operation apart otherwise
VARIANTS = list(zoo.VARIANTS.values())
each_variant = pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)


def wiring(row):
    """What distinguishes a row from others of its family once both are shrunk; of a mixer for each stage, that of the last."""
    small = {*SMALL[row.family.name][1], "representation_size"}
    options = {**row.arguments, **({"mixer": row.arguments["mixer"][-1]} if "mixer" in row.arguments else {})}
    return row.family.name, *sorted((key, str(value)) for key, value in options.items() if key not in small)


# A toy of each family: the shape of its images, and what makes a row small
SMALL = {
    "ViT": ((8, 24, 3), dict(width=16, depth=2, heads=2, mlp=24, patch_size=(4, 8))),
    "Mixer": ((8, 22, 3), dict(width=16, depth=2, tokens_mlp=12, channels_mlp=24, patch_size=(4, 8))),
    "BEiT": ((8, 24, 3), dict(width=16, depth=2, heads=2, mlp=24, patch_size=(4, 8), layer_scale=0.1)),
    "Hybrid": ((12, 17, 3), dict(width=16, depth=2, heads=2, mlp=24, patch_size=(1, 2), stages=(1,), width_factor=0.5)),
    "FlexiViT": (
        (8, 24, 3),
        dict(width=16, depth=2, heads=2, mlp=24, patch_size=(4, 8), stored_patch_size=(5, 3), stored_grid=(3, 2)),
    ),
    "CCT": (
        (8, 24, 3),
        dict(
            width=16,
            depth=2,
            heads=2,
            mlp=24,
            kernel_size=3,
            conv_layers=2,
            attention_dropout_rate=0.0,
            stochastic_depth_rate=0.0,
        ),
    ),
    "DeiT": ((8, 24, 3), dict(width=16, depth=2, heads=2, mlp=24, patch_size=(4, 8))),
    "CaiT": (
        (8, 24, 3),
        dict(width=16, depth=2, heads=2, mlp=24, layer_scale=1e-5, class_depth=2, patch_size=(4, 8)),
    ),
    "ResMLP": ((8, 24, 3), dict(width=16, depth=2, mlp=24, layer_scale=0.1, patch_size=(4, 8))),
    "PoolFormer": (
        (70, 50, 3),
        dict(width=(8, 8, 16, 16), depth=(1,) * 4, mlp=(24, 24, 32, 32), head_size=8, layer_scale=0.1, positions=(3,)),
    ),
}
BLOCKS = {"PoolFormer": ("stage_0_block_0", "stage_3_block_0")}  # families that do not count their blocks in a row
WIRINGS = list({wiring(row): row for row in reversed(VARIANTS) if row.family.classifies}.values())[::-1]  # the first row of each
each_wiring = pytest.mark.parametrize("row", WIRINGS, ids=lambda row: row.name)


def shrunk(row, **kwargs):
    """A classifier of the row's own options at toy size, on a rectangular image, with random weights everywhere."""
    shape, small = SMALL[row.family.name]
    options = {"weights": None, "input_shape": shape, "classes": 5, "name": row.name, **row.arguments, **small}
    return randomise(row.builder(**{**options, "include_top": True, "pooling": None, **kwargs}))


def block(row, number):
    """The name of the first block, 0, or a later one, 1."""
    return BLOCKS.get(row.family.name, ("block_0", "block_1"))[number]


def takes(row, keyword):
    return keyword in inspect.signature(row.build).parameters


def images(row, count=2):
    return np.random.default_rng(1).uniform(-1, 1, (count, *SMALL[row.family.name][0])).astype("float32")


def computed(model, x):
    """What a model makes of x: on JAX as one program, since it compiles each operation apart otherwise, elsewhere without XLA."""
    return keras.tree.map_structure(keras.ops.convert_to_numpy, (model.predict_on_batch if JIT else model)(x))


@functools.cache
def at_full_size(name):
    """({our weight name: shape}, multiply-adds) of a variant, made once and without its memory."""
    with keras.StatelessScope(initialize_variables=False):
        model = zoo.VARIANTS[name].build(weights=None)
    shapes, macs = {name: tuple(weight.shape) for name, weight in named_weights(model).items()}, cost(model).macs
    keras.utils.clear_session()  # else the next step that traces a graph allocates all these variables
    return shapes, macs


@each_variant
def test_parameters_and_multiply_adds_are_exact(row):
    shapes, macs = at_full_size(row.name)
    assert (sum(map(math.prod, shapes.values())), macs) == (row.params, row.macs)
    for name in set(row.upstream) & set(ORIGINAL_SIZES):
        assert row.params == ORIGINAL_SIZES[name]


def test_every_model_of_the_original_table_is_registered():
    assert {name for row in VARIANTS for name in row.upstream} >= set(ORIGINAL_SIZES)


@each_wiring
def test_every_weight_has_one_name_in_every_layout_and_every_name_leads_back(row):
    for layout, names in row.family.layouts.items():
        seen = set()
        for ours, shape in at_full_size(row.name)[0].items():
            written = names.to_original(ours)
            staged = row.family.name == "PoolFormer" and "_positions/" in ours
            if staged and not layout.endswith(f"-positions-{ours.split('_')[1]}"):
                assert not written  # each layout of PoolFormer's family is for positions before one stage, or none
                continue
            assert {piece.transform.index for piece in written} == set(range(written[0].transform.of)), (layout, ours)
            for original, transform, layer in written:
                assert names.to_ours(original, (layer or 0) + 1)[-1] == (ours, transform, layer)
                assert (original, layer) not in seen
                seen.add((original, layer))
                assert math.prod(transform.file_shape(shape)) * transform.of == math.prod(shape)


@each_wiring
def test_output_is_a_distribution_over_classes(row):
    model = shrunk(row)
    scores = model.predict_on_batch(images(row, 3))
    assert scores.shape == (3, 5)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert scores.std(axis=0).min() > 0


@each_wiring
def test_a_training_step_reaches_every_weight(row):
    model = shrunk(row, classifier_activation=None, **({"dropout_rate": 0.0} if takes(row, "dropout_rate") else {}))
    before = {name: np.array(weight) for name, weight in named_weights(model).items()}
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss, jit_compile=JIT, run_eagerly=not JIT)
    model.train_on_batch(images(row), np.eye(5, dtype="float32")[[1, 3]])
    for name, weight in named_weights(model).items():
        moved = np.abs(np.array(weight) - before[name])
        if not weight.trainable:
            assert moved.max() == 0, name
            continue
        if name.endswith("qkv_bias") and len(moved) == 3:  # a key's shifts a query's scores alike: the softmax does not see it
            assert moved[1].max() < 1e-6
            moved = moved[[0, 2]]
        # Shifts all channels of a token, all scores of a query, or what is made of all tokens, alike: no norm or softmax sees it
        if name.endswith(("token_mixing/fc2/bias", "attention/before_bias", "sequence_pool/bias")):
            assert moved.max() < 1e-6
            continue
        # Shifts a place and its neighbours alike: their mean minus the place does not see it
        if name.endswith("mixer_norm/beta") and model.get_layer(name.partition("/")[0]).kind == "pool":
            assert moved.max() < 1e-6
            continue
        assert moved.max() > 1e-7, name


@each_wiring
def test_features_and_what_lies_inside_blocks_are_tapped_from_the_same_graph(row):
    model = shrunk(row)
    later = model.get_layer(block(row, 1))
    taps = {tap: later(later.input, tap=tap) for tap in later.TAPS}
    outputs = {**taps, "features": model.get_layer(block(row, 0)).output, "logits": zoo.logits(model)}
    again = {tap: zoo.tap(model, f"{later.name}/{tap}") for tap in later.TAPS}
    got, again = (computed(keras.Model(model.input, each), images(row)) for each in (outputs, again))
    for tap in later.TAPS:
        np.testing.assert_allclose(again[tap], got[tap], atol=1e-6)
    tokens = math.prod(got["mlp"].shape[1:-1]) if "mlp" in got else None
    if "scores" in taps:
        assert got["scores"].shape == (2, later.heads, tokens, tokens)
        np.testing.assert_allclose(got["scores"].sum(axis=-1), 1, atol=1e-5)
    exp = np.exp(got["logits"] - got["logits"].max(axis=1, keepdims=True))
    np.testing.assert_allclose(exp / exp.sum(axis=1, keepdims=True), computed(model, images(row)), atol=1e-6)


@each_wiring
def test_gradcam_finds_a_place_that_the_scores_depend_on(row):
    maps, classes, _ = gradcam(shrunk(row), images(row, 3), [0, 1, 4])
    assert maps.shape == (3, *SMALL[row.family.name][0][:2]) and classes.tolist() == [0, 1, 4]
    assert np.isin(maps.max((1, 2)), (0, 1)).all() and maps.max() == 1 and maps.min() == 0


@each_wiring
def test_mixed_bfloat16_is_finite_and_close_with_softmax_and_logits_in_float32(row):
    model = shrunk(row, classifier_activation=None)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = shrunk(row, classifier_activation=None)
    finally:
        keras.config.set_dtype_policy(before)
    assert mixed.output.dtype == "float32"
    assert zoo.tap(mixed, block(row, 0)).dtype == "bfloat16"
    if "scores" in mixed.get_layer(block(row, 1)).TAPS:
        assert zoo.tap(mixed, f"{block(row, 1)}/scores").dtype == "float32"
    got, expected = computed(mixed, images(row)), computed(model, images(row))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, atol=0.03 * np.abs(expected).max())
    assert gradcam(mixed, images(row)).layer == gradcam(model, images(row)).layer


@each_wiring
def test_flash_attention_gives_the_numbers_of_the_matrix_products(row):
    if not takes(row, "flash_attention"):
        pytest.skip("a family without attention")
    flash, plain = (computed(shrunk(row, flash_attention=flash), images(row)) for flash in (True, False))
    np.testing.assert_allclose(flash, plain, atol=1e-6)


@each_wiring
def test_a_layers_configuration_has_all_arguments_of_its_constructor(row):
    for layer in shrunk(row).layers:
        if type(layer).__module__.startswith("keras_vit"):
            arguments = set(inspect.signature(type(layer).__init__).parameters) - {"self", "kwargs"}
            assert arguments <= set(layer.get_config()), (layer.name, arguments - set(layer.get_config()))


def test_saved_models_reload_in_a_process_that_only_imports_keras_vit(tmp_path):
    for row in WIRINGS:
        rates = {rate: 0.1 for rate in ("dropout_rate", "stochastic_depth_rate") if takes(row, rate)}
        model = shrunk(row, **rates)
        model.save(tmp_path / f"{row.name}.keras")
        np.save(tmp_path / f"{row.name}.npy", computed(model, images(row)))
        np.save(tmp_path / f"{row.name}.images.npy", images(row))
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        shrunk(zoo.VARIANTS["ViT_mu"], name="mixed").save(tmp_path / "mixed.keras")
    finally:
        keras.config.set_dtype_policy(before)
    np.save(tmp_path / "mixed.images.npy", images(zoo.VARIANTS["ViT_mu"]))
    child = """
import pathlib, sys
import keras
import numpy as np
import keras_vit
from keras.saving import load_model
from keras_vit.zoo import FAMILIES
folder = pathlib.Path(sys.argv[1])
for path in sorted(folder.glob("*.keras")):
    model = load_model(path)
    call = model.predict_on_batch if keras.config.backend() == "jax" else model
    scores = keras.ops.convert_to_numpy(call(np.load(path.with_suffix(".images.npy"))))
    assert model.family and model.weights_info["preprocessing"] == FAMILIES[model.family].pixels.asdict()
    if path.stem == "mixed":
        assert model.get_layer("block_0").compute_dtype == "bfloat16" and np.isfinite(scores).all()
    else:
        np.testing.assert_allclose(scores, np.load(path.with_suffix(".npy")), atol=1e-6)
    print(path.stem)
"""
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path)], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) >= {"mixed", *(row.name for row in WIRINGS)}


def test_names_of_the_original_work_in_create_model():
    for row in VARIANTS:
        for name in row.upstream:
            assert zoo._row(name) is row
    with pytest.raises(keras_vit.errors.ArgumentError, match="ViT_B16"):
        keras_vit.create_model("ViT_B61", weights=None)


def test_list_models_takes_patterns():
    assert keras_vit.list_models("ViT_B*") == [
        "ViT_B16", "ViT_B16_bv", "ViT_B16_gap", "ViT_B32", "ViT_B32_gap", "ViT_B8",
    ]  # fmt: skip


def test_list_weights_names_the_published_files():
    tags = {"imagenet", "imagenet21k", "imagenet21k+imagenet2012", "sam", "gsam", "augreg", "augreg+imagenet2012"}
    assert tags <= set(keras_vit.list_weights("ViT_B16"))
    assert keras_vit.list_weights("ViT-H_14") == ["imagenet21k"]
    assert keras_vit.list_weights("ViT_mu") == []
