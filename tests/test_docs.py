"""What is generated from the registry is current. To write it anew: python tests/test_docs.py"""

import inspect
import pathlib
import re

import keras_vit
from keras_vit import zoo

ROOT = pathlib.Path(__file__).parents[1]
README, STUB = ROOT / "README.md", ROOT / "keras_vit" / "__init__.pyi"
TABLE = re.compile(r"(?<=<!-- models -->\n).*?(?=<!-- /models -->)", re.DOTALL)


def table():
    """The README's table of models."""
    lines = ["| constructor | upstream name | parameters | G multiply-adds | weights |", "|---|---|---:|---:|---|"]
    for name in keras_vit.list_models():
        row = zoo.VARIANTS[name]
        tags = ", ".join(f"`{tag}`" for tag in row.tags()) or "none published"
        lines.append(f"| `{name}` | {', '.join(row.upstream) or '-'} | {row.params:,} | {row.macs / 1e9:,.3g} | {tags} |")
    return "\n".join(lines) + "\n"


def stub():
    """Signatures for editors, which cannot see what the registry makes."""
    lines = ['"""Generated from the registry: python tests/test_docs.py"""', "", "import keras", "import numpy as np", ""]
    lines += ["from keras_vit import errors as errors", "from keras_vit import hub as hub"]
    lines += ["from keras_vit.checkpoints import augreg as augreg", "", "__version__: str", ""]
    for name in keras_vit.__all__:
        made = getattr(keras_vit, name)
        if not inspect.isfunction(made):
            continue
        built = name in zoo.VARIANTS or name in zoo.FAMILIES
        returns = {"preprocess_input": "np.ndarray", "list_models": "list[str]", "list_weights": "list[str]"}
        returns |= {
            "zero_shot": "keras.Model",
            "load_weights": "None",
            "save_npz": "None",
            "decode_predictions": "list[list[tuple]]",
        }
        kind = "keras.Model" if built or name == "create_model" else returns[name]
        lines.append(f"def {name}{inspect.signature(made)} -> {kind}: ...")
    return "\n".join(lines) + "\n"


def test_the_readmes_table_is_the_registry():
    assert TABLE.search(README.read_text())[0] == table(), "run: python tests/test_docs.py"


def test_the_stub_is_the_public_api():
    assert STUB.read_text() == stub(), "run: python tests/test_docs.py"


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: table(), README.read_text()))
    STUB.write_text(stub())
