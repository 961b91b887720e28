"""The Python snippets of docs/training.md run as they stand, but for fewer steps."""

import pathlib
import re

import numpy as np
import pytest

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "training.md"
SNIPPETS = dict(re.findall(r"<!-- snippet: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_runs_and_trains(name):
    kept = {}
    exec(SNIPPETS[name].replace("steps_per_epoch=100", "steps_per_epoch=2"), kept)  # noqa: S102 - this repository's own page
    for key in ("learner", "student"):
        assert np.isfinite(kept[key].history.history["step_loss"]).all() and kept[key].optimizer.iterations == 2
