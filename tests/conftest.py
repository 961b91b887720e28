import gc
import os
import pathlib
import re

import numpy as np
import pytest

GOLDENS = pathlib.Path(__file__).parent / "goldens"
MARKS = re.compile(r"<!-- (snippet|not run): (.*?) -->\n```(\w+)\n(.*?)```\n", re.DOTALL)  # of a page's fenced blocks
QUICK_XLA = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def pytest_configure(config):
    """Programs of XLA are compiled in half the time here; the slow tests have them as users do."""
    if config.getoption("markexpr") == "not slow":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_XLA}"


def pytest_collection_modifyitems(items):
    """A file's tests stay in one process, so that what they share is made once; those of parity share nothing and take long."""
    for item in items:
        if item.path.stem != "test_parity":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish():
    """What the imports made stays, and every collection of garbage, such as that of `clear_session`, would search it again."""
    gc.collect()
    gc.freeze()


def toys(*quick):
    """Parameters: the toy of every registered family of classifiers; all but the `quick` ones are for the slow tests."""
    import keras_vit

    names = [name for name in keras_vit.list_models("*_mu") if keras_vit.zoo.VARIANTS[name].family.classifies]
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def marked(page, kind):
    """{name: (language, text)} of a page's fenced blocks under a mark of this kind, "snippet" or "not run"."""
    return {name: (language, text) for found, name, language, text in MARKS.findall(page.read_text()) if found == kind}


def randomise(model, seed=0):
    """Gives every weight of a model non-degenerate values, zero-initialised heads included."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        name = weight.path.rpartition("/")[2]
        center = 1.0 if name in ("gamma", "moving_variance") else 0.0
        weight.assign(center + 0.1 * rng.standard_normal(weight.shape))
    return model


@pytest.fixture(autouse=True)
def _same_random_numbers():
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test sees the user's settings or cache, nor leaves anything there."""
    for name in [name for name in os.environ if name.startswith("KERAS_VIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path_factory.mktemp("home")))
