"""Every weight tag leads to a published file, and the whole of that file, at full size, fits the model that the tag builds."""

import dataclasses
import math
import warnings

import keras
import pytest
from released import FILES, Shapes, arrays

from keras_vit import zoo
from keras_vit.checkpoints import load

PUBLISHED = {path if "://" in path else f"gs://{path}.npz": facts for path, *facts in FILES}
ELSEWHERE = ("BEiT", "BEiTMasked", "BEiTSegmenter", "LiT")  # of whose files test_released_beit.py and test_lit.py know
TAGS = [(row, tag) for row in zoo.VARIANTS.values() for tag in row.weights if row.family.name not in ELSEWHERE]


@pytest.fixture
def from_shapes(monkeypatch):
    """Sources are opened as the names and shapes of the published files, and nothing is allocated or assigned."""
    monkeypatch.setattr(zoo, "_open", lambda source, size: Shapes(source, arrays(*PUBLISHED[source][:4])))
    monkeypatch.setattr(load, "_assign", lambda *args: None)
    with keras.StatelessScope(initialize_variables=False):
        yield


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    """Keras forgets at the end the variables that were never given a value; else the next traced step allocates them."""
    yield
    keras.utils.clear_session()


def test_every_published_file_has_a_tag_and_every_tag_a_published_file():
    assert {row.weights[tag].source for row, tag in TAGS} == set(PUBLISHED) - UNTAGGED


# Two fine-tuned S/32 files are named in different places; a tag has one of them
UNTAGGED = {
    f"gs://vit_models/augreg/{name}.npz"
    for name in ["S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"]
}


@pytest.mark.parametrize("path, facts", [(path, facts) for path, *facts in FILES if facts[4]], ids=lambda value: str(value))
def test_the_shapes_add_up_to_the_published_size(path, facts):
    *facts, mib = facts
    total = 4 * sum(math.prod(shape) for shape in arrays(*facts).values()) / 2**20
    assert total == pytest.approx(mib, rel=0.015 if mib < 50 else 0.005)


def test_records_say_the_resolution_and_the_classes_of_their_files():
    for row, tag in TAGS:
        record = row.weights[tag]
        _, side, classes, *_ = PUBLISHED[record.source]
        assert (record.resolution, record.classes) == (side, classes), (row.name, tag)


def _alike(row, tag):
    """What building and loading look at; of tags that agree in it, one is built."""
    record = row.weights[tag]
    return row.name, PUBLISHED[record.source][:4], dataclasses.replace(record, source="", size=None, licence="", pixels=None)


@pytest.mark.parametrize(
    "row, tag", {str(_alike(*each)): each for each in reversed(TAGS)}.values(), ids=lambda value: getattr(value, "name", value)
)
def test_a_published_file_fits_whole_and_unchanged(row, tag, from_shapes):
    record = row.weights[tag]
    _, _, classes, *_ = PUBLISHED[record.source]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = row.build(weights=tag)
    info = model.weights_info
    assert (info["adapted"], info["reset"]) == ([], [])
    assert set(info["ignored"]) <= {"params/t", "params/b"}
    assert model.output_shape[-1] == (classes or model.get_layer("encoder_norm").output.shape[-1])
    stored = sum(math.prod(shape) for name, shape in arrays(*PUBLISHED[record.source][:4]).items() if name not in info["ignored"])
    assert model.count_params() == stored


def test_another_resolution_warns_once_with_its_cost_and_the_file_that_would_fit(from_shapes):
    with pytest.warns(UserWarning, match="fine-tuned at 384 x 384 and is used at 224 x 224") as caught:
        zoo.create_model("ViT_B16", weights="imagenet21k+imagenet2012", input_shape=(224, 224, 3))
    (message,) = [str(each.message) for each in caught if each.category is UserWarning]
    assert "9.5 points" in message
    assert "ViT_B16(weights='imagenet21k+imagenet2012-224')" in message
    with pytest.warns(UserWarning, match="Fine-tune it there"):
        zoo.create_model("ViT_B16", weights="imagenet21k+imagenet2012", input_shape=(512, 512, 3))


def test_the_trunks_of_vit_g_have_the_sizes_of_their_paper():
    """arXiv 2106.04560, Table 2: 1,011 and 1,843 million, without the pooling and the head."""
    for name, millions in {"ViT_g14_bv": 1011, "ViT_G14_bv": 1843}.items():
        with keras.StatelessScope(initialize_variables=False):
            model = zoo.create_model(name, weights=None)
        trunk = model.count_params() - sum(model.get_layer(layer).count_params() for layer in ("map_head", "head"))
        assert round(trunk / 1e6) == millions
