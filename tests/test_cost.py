"""What a model costs: against the table of the originals, and against the operations of the graph that TensorFlow makes of it."""

import json
import math
import pathlib

import keras
import pytest

import keras_vit
from keras_vit.errors import ArgumentError
from keras_vit.explain.cost import cost

TABLE = json.loads((pathlib.Path(__file__).parent / "goldens/macs/table.json").read_text())["models"]
# Rows of the table that are models here
OURS = {
    "vit_tiny_16": "ViT_Ti16", "vit_small_16": "ViT_S16", "vit_small_32": "ViT_S32", "vit_base_16": "ViT_B16",
    "vit_base_32": "ViT_B32", "vit_large_16": "ViT_L16", "vit_large_32": "ViT_L32", "vit_huge_14": "ViT_H14",
    "vit_base_16_in21k": "ViT_B16", "r50_vit_base_16": "R50_ViT_B16", "mixer_b16": "Mixer_B16", "mixer_l16": "Mixer_L16",
    "cct_7_3x1_32": "CCT_7_3x1", "cct_7_7x2_224": "CCT_7_7x2", "cct_14_7x2_224": "CCT_14_7x2",
    "beit_base": "BEiT_B16", "beit_large": "BEiT_L16",
    "deit_tiny": "DeiT_Ti16", "deit_small": "DeiT_S16", "deit_base": "DeiT_B16", "deit_tiny_distilled": "DeiT_Ti16_distilled",
    "deit_small_distilled": "DeiT_S16_distilled", "deit_base_distilled": "DeiT_B16_distilled", "deit3_small": "DeiT3_S16",
    "deit3_base": "DeiT3_B16", "resmlp_12": "ResMLP_S12", "cait_xxs24": "CaiT_XXS24", "cait_xxs36": "CaiT_XXS36",
    "cait_s24": "CaiT_S24",
    **{f"poolformer_{size.lower()}": f"PoolFormer_{size}" for size in ("S12", "S24", "S36", "M36", "M48")},
}  # fmt: skip
CLASSES = {"cct_7_3x1_32": 10, "cct_7_7x2_224": 102, "cct_14_7x2_224": 1000}  # where the table has them in words only


@pytest.fixture(autouse=True)
def _leave_no_variables():
    yield
    keras.utils.clear_session()  # else the next step that traces a graph allocates those of all models without values


def made(name, **options):
    """A model without values."""
    with keras.StatelessScope(initialize_variables=False):
        return keras_vit.create_model(name, weights=None, **options)


@pytest.mark.parametrize("row", OURS)
def test_costs_are_those_of_the_table(row):
    expected = TABLE[row]
    classes = expected["classes"] or CLASSES.get(row)
    top = {"classes": classes} if classes else {"include_top": False, "pooling": "token"}
    found = cost(made(OURS[row], input_shape=(expected["input_size"],) * 2 + (3,), **top))
    operators = expected["macs_by_operator"]
    assert (found.conv, found.linear, found.matmul) == tuple(operators.get(name, 0) for name in ("conv", "linear", "matmul"))
    assert found.macs == sum(operators.get(name, 0) for name in ("conv", "linear", "matmul", "einsum"))
    assert found.parameters == expected["params"]


def counted(model):
    """Multiply-adds of the products in the graph of one image."""
    import tensorflow as tf

    call = tf.function(lambda *x: model(x if len(x) > 1 else x[0], training=False), autograph=False)
    graph = call.get_concrete_function(*(tf.TensorSpec((1, *x.shape[1:]), x.dtype) for x in model.inputs)).graph
    total = 0
    for operation in graph.get_operations():
        shapes = [tensor.shape.as_list() for tensor in operation.inputs]
        if operation.type == "Conv2D":
            total += math.prod(operation.outputs[0].shape.as_list()) * math.prod(shapes[1][:3])
        elif operation.type == "Conv2DBackpropInput":  # of a transposed convolution
            total += math.prod(shapes[2]) * math.prod(shapes[1][:3])
        elif operation.type in ("MatMul", "BatchMatMulV2"):
            assert not any(operation.get_attr(name) for name in ("transpose_a", "adj_x") if name in operation.node_def.attr)
            total += math.prod(operation.outputs[0].shape.as_list()) * shapes[0][-1]
    return total


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="it counts operations of TensorFlow")
@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {}) for name in keras_vit.list_models("*_mu*")),
        ("ViT_mu", dict(input_shape=(48, 16, 3), classifier="unpooled", representation_size=24)),
        ("ViT_mu_bv", dict(classifier="map")),
        ("Hybrid_mu", dict(input_shape=(40, 56, 3))),
        ("DeiT_mu", dict(patch_size=16, stem="hmlp", parallel=True)),
        ("PoolFormer_mu", dict(input_shape=(50, 70, 3), mixer=("pool", "identity", "dense", "attention"), head_size=16)),
        ("CCT_mu", dict(patch_size=4, classifier="token")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_costs_are_those_of_the_graph(name, options):
    model = keras_vit.create_model(name, weights=None, **options)
    assert cost(model).macs == counted(model)


def test_a_nested_model_costs_what_it_does_alone():
    model = keras_vit.ViT_mu(weights=None)
    inner = keras.Model(model.inputs, model.outputs)
    nested = keras.Sequential([keras.Input(model.input_shape[1:]), inner, keras.layers.Softmax()])
    assert cost(nested) == cost(model)


def test_a_layer_of_unknown_cost_and_an_open_size_are_refused():
    x = keras.Input((8, 8, 3))
    with pytest.raises(ArgumentError, match="'up' of Conv2DTranspose has a kernel.*multiply_adds"):
        cost(keras.Model(x, keras.layers.Conv2DTranspose(4, 2, name="up")(x)))
    x = keras.Input((None, None, 3))
    with pytest.raises(ArgumentError, match="'open' takes .None, None, None, 3., of no fixed size"):
        cost(keras.Model(x, keras.layers.Conv2D(4, 2, name="open")(x)))
