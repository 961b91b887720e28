"""Every weight tag of BEiT leads to a published file, and the whole file, at full size, fits the model that the tag builds."""

import math
import warnings

import keras
import numpy as np
import pytest
from released_beit import FILES, arrays

from keras_vit import zoo
from keras_vit.checkpoints import files, load
from keras_vit.models.beit import relative_index

PUBLISHED = {source: facts for source, *facts in FILES}
TAGS = [(row, tag) for row in zoo.VARIANTS.values() for tag in row.weights if row.family.name.startswith("BEiT")]


class Shapes(files.Npz):
    """An archive that has names, shapes and the indices of relative positions, but no other numbers."""

    def __init__(self, source):
        self.path, self.sha256, self.metadata = source, "0" * 64, {}
        self.entries = {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in arrays(*PUBLISHED[source][:-1]).items()}

    def scan(self, name):
        return 0, 1.0

    def exact(self, name):
        if name.endswith("num_batches_tracked"):
            return np.int64(160_000)
        side = math.isqrt(self.entries[name][0][0] - 1)
        return relative_index((side, side))


@pytest.fixture
def from_shapes(monkeypatch):
    """Sources are opened as the names and shapes of the published files, and nothing is allocated or assigned."""
    monkeypatch.setattr(zoo, "_open", lambda source, size: Shapes(source))
    monkeypatch.setattr(load, "_assign", lambda *args: None)
    with keras.StatelessScope(initialize_variables=False):
        yield


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    """Keras forgets at the end the variables that were never given a value; else the next traced step allocates them."""
    yield
    keras.utils.clear_session()


def test_every_published_file_has_a_tag_and_every_tag_a_published_file():
    assert {row.weights[tag].source for row, tag in TAGS} == set(PUBLISHED)


def test_the_arrays_of_a_file_add_up_to_its_published_size():
    listed = [(source, facts) for source, facts in PUBLISHED.items() if facts[-1]]
    assert len(listed) == 10
    for source, (*facts, mb) in listed:
        total = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays(*facts).values())
        assert total / 1e6 == pytest.approx(mb, rel=0.005), source


@pytest.mark.parametrize("row, tag", TAGS, ids=lambda value: getattr(value, "name", value))
def test_a_published_file_fits_whole_and_unchanged(row, tag, from_shapes):
    record = row.weights[tag]
    *facts, side, classes, mb = PUBLISHED[record.source]
    assert (record.resolution, record.classes, record.size) == (side, classes, mb and mb * 1_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = row.build(weights=tag)
    info = model.weights_info
    assert (info["adapted"], info["reset"], info["ignored"]) == ([], [], [])
    assert zoo.tap(model, "head").shape[-1] == classes
    assert zoo.tap(model, "patches").shape[1:3] == (side // 16, side // 16)
    entries = arrays(*facts, side, classes).items()
    assert model.count_params() == sum(math.prod(shape) for _, (shape, dtype) in entries if dtype == "<f4")
    assert set(info["constants"]) == {name for name, (_, dtype) in entries if dtype == "<i8"}
