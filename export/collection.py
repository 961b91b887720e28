"""Writes a whole collection of TF-Hub modules, each with model card and .tar.gz, an index and the collection's own card.

    python -m export.collection --out=modules [--collection=recommended] [--only='vit_b*'] [--publisher=NAME]

Collections, of which several may lie in one folder:

    recommended  the ten AugReg files that their authors recommend (ViTs and hybrids), as classifier and as feature vector
    original     the first ViTs of the paper, likewise
    hybrid       the first hybrids
    mixer        MLP-Mixer, with those of SAM and GSAM
    mu           all toys with random weights: no network
    FAMILY       any other family of the registry, by its name in small letters: each of its files, likewise

A module is called `<variant>_classification` or `<variant>_fe`, with the name of its weights between where they are not the
recommended ones. Checkpoints with an all-zero head (the original imagenet21k files) only become feature vectors. The folder gets

    NAME/  NAME.tar.gz    for each module
    index.json            {"modules": {NAME: {archive_sha256, digest, parameters, macs, source, ...}}}
    collection.md         for the host of the collection

A run that was killed goes on when it is started again: a module whose files, archive and index agree is left alone, all else is
made again. A model that fails does not stop the others; it is named at the end, and the exit status is 1.
"""

import argparse
import collections
import dataclasses
import fnmatch
import gc
import json
import os
import re
import sys
from pathlib import Path

import filelock
import keras
import tensorflow as tf

import keras_vit
from export import common
from export import hub as modules
from keras_vit import errors, zoo
from keras_vit.checkpoints import augreg, fetch, files
from keras_vit.hub.manifest import digest_of

CLASSIFICATION, FEATURES = "classification", "feature_vector"
ENDINGS = {CLASSIFICATION: "classification", FEATURES: "fe"}
TAGS = {  # collection -> (family, {tag: (what it puts into the name, tasks)})
    "original": (
        "ViT",
        {"imagenet21k": ("i21k_", [FEATURES]), "imagenet21k+imagenet2012": ("i21k_", [CLASSIFICATION])},
    ),
    "hybrid": (
        "Hybrid",
        {"imagenet21k": ("i21k_", [FEATURES]), "imagenet21k+imagenet2012": ("i21k_", [CLASSIFICATION])},
    ),
    "mixer": (
        "Mixer",
        {
            "imagenet21k": ("", [FEATURES]),
            "imagenet1k": ("", [CLASSIFICATION]),
            "sam": ("sam_", [CLASSIFICATION, FEATURES]),
            "gsam": ("gsam_", [CLASSIFICATION, FEATURES]),
        },
    ),
}
_TAGGED = {family for family, _ in TAGS.values()}
OTHERS = {name.lower(): name for name, family in zoo.FAMILIES.items() if family.classifies and name not in _TAGGED}
COLLECTIONS = ("recommended", *TAGS, "mu", *OTHERS)
DEFAULT = ("recommended", "hybrid", "mixer")
INDEX, CARD, LOCK = "index.json", "collection.md", ".lock"
FAILURES = (errors.KerasViTError, OSError, tf.errors.OpError, ValueError, RuntimeError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Item:
    """One module to make: its name, the variant, its weights (a tag, or "none" for random ones) and the task."""

    name: str
    variant: str
    weights: str
    task: str


def items(collection):
    """The `Item`s of a collection, in the order of their names."""
    found = []
    for row in zoo.VARIANTS.values():
        for tag, inside, task in _chosen(collection, row):
            name = f"{row.name.lower()}_{inside}{ENDINGS[task]}"
            found.append(Item(name, row.name, tag, task))
    return sorted(found, key=lambda item: item.name)


def _chosen(collection, row):
    """(tag, what it puts into the name, task) of each module that a row of the registry adds to a collection."""
    if not row.family.classifies:
        return []
    if collection == "mu":
        return [(common.RANDOM, "", task) for task in ENDINGS] if "_mu" in row.name else []
    if collection == "recommended":
        picks = {pick.filename: FEATURES for pick in augreg.RECOMMENDED.values()}
        picks |= {pick.file: CLASSIFICATION for pick in augreg.RECOMMENDED.values()}
        named = {tag: Path(record.source).stem for tag, record in row.weights.items() if "/augreg/" in record.source}
        return [(tag, "", picks[name]) for tag, name in named.items() if name in picks]
    if collection in OTHERS:
        files = row.weights if row.family.name == OTHERS[collection] else {}
        tasks = {tag: [FEATURES] if record.classes is None else [CLASSIFICATION, FEATURES] for tag, record in files.items()}
        return [(tag, re.sub("[^a-z0-9]+", "_", tag.lower()) + "_", task) for tag in files for task in tasks[tag]]
    family, tags = TAGS[collection]
    wanted = tags if row.family.name == family else {}
    return [(tag, inside, task) for tag, (inside, tasks) in wanted.items() if tag in row.weights for task in tasks]


def make(item, out, publisher):
    """Writes a module and its archive into the folder `out` and returns its entry of the index."""
    keras.utils.clear_session()
    model = common.build(item.variant, item.weights)
    path = Path(keras_vit.hub.export(model, out / item.name, task=item.task, card={"publisher": publisher}))
    packed = out / f"{item.name}.tar.gz"
    sha256 = modules.archive(path, packed)
    record, info = keras_vit.hub.verify(path), model.weights_info
    return dict(
        **_asked(item, publisher), module=item.name, archive=packed.name, archive_sha256=sha256,
        archive_bytes=packed.stat().st_size, digest=digest_of(record["files"]), parameters=record["parameters"],
        macs=record["macs"], source=info["source"], source_sha256=info["sha256"],
        licence=info["licence"],
    )  # fmt: skip


def _asked(item, publisher):
    return dict(variant=item.variant, weights=item.weights, task=item.task, publisher=publisher)


def missing(item, out, entry, publisher):
    """Why a module has to be made, in a few words; None if it is there as its entry of the index says."""
    if entry is None:
        return "not in the index"
    if any(entry.get(key) != value for key, value in _asked(item, publisher).items()):
        return "made of something else"
    try:
        if digest_of(keras_vit.hub.verify(out / item.name)["files"]) != entry["digest"]:
            return "its files are other ones than the index says"
        if fetch.sha256(out / entry["archive"]) != entry["archive_sha256"]:
            return "its archive is another one than the index says"
    except (errors.KerasViTError, OSError, KeyError) as error:
        return str(error)
    return None


def read_index(out):
    """{name: entry} of a folder's index; {} without one."""
    path = out / INDEX
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["modules"]
        return {str(name): dict(entry) for name, entry in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.ExportError(
            f"{path}: expected the index of a collection, got {error!r}; remove it to make all again."
        ) from error


def write_text(path, text):
    """Replaces a file in one step, where it is another."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    with files.replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def card(entries, name, publisher):
    """The collection's page, in the Markdown that hosts in the manner of tfhub.dev read."""
    tasks = sorted({f"image-{entry['task'].replace('_', '-')}" for entry in entries.values()})
    count = collections.Counter(entry["task"] for entry in entries.values())
    lines = [
        f"# Collection {publisher}/{name}/1",
        "Vision transformers, hybrids and Mixers as TF-Hub modules that TensorFlow and Keras 3 can train further.",
        "",
        *(f"<!-- task: {task} -->" for task in tasks),
        "",
        "## Overview",
        f"{count[CLASSIFICATION]} classifiers and {count[FEATURES]} feature extractors, written by keras_vit "
        f"{keras_vit.__version__} from their authors' checkpoints. They take float32 RGB images in [0, 1] of any batch size; "
        "preprocessing is inside. Each module's own card says what it was trained on and under which licence.",
        "",
        "| module | parameters | multiply-adds | weights | archive's sha256 |",
        "|---|---:|---:|---|---|",
    ]
    for key, entry in sorted(entries.items()):
        handle = f"{publisher}/{key}/1"
        lines.append(
            f"| [{handle}](https://tfhub.dev/{handle}) | {entry['parameters']:,} | {entry['macs']:,} | "
            f"{entry['source'] or 'random'} | `{entry['archive_sha256']}` |"
        )
    return "\n".join(lines) + "\n"


def _clean(out, wanted):
    """Removes what killed runs left of archives, index and card; `keras_vit.hub.export` does so for modules."""
    for stem in (INDEX.partition(".")[0], CARD.partition(".")[0], *(f"{item.name}.tar" for item in wanted)):
        for left in out.glob(f".{stem}-*"):
            left.unlink()


def run(out, wanted, name, publisher):
    """Makes what is missing of `wanted` in the folder `out`; gives {name: reason} of those that failed."""
    entries, failed = read_index(out), {}
    _clean(out, wanted)
    for number, item in enumerate(wanted, 1):
        why = missing(item, out, entries.get(item.name), publisher)
        if why is None:
            common.say(f"{number}/{len(wanted)} {item.name}: there already")
            continue
        common.say(f"{number}/{len(wanted)} {item.name}: {why}; making it")
        try:
            entries[item.name] = make(item, out, publisher)
        except FAILURES as error:
            failed[item.name] = f"{type(error).__name__}: {error}"
            entries.pop(item.name, None)
        write_text(out / INDEX, json.dumps({"modules": dict(sorted(entries.items()))}, indent=1) + "\n")
        gc.collect()  # a model and its graphs hold each other
    if entries:
        write_text(out / CARD, card(entries, name, publisher))
    return failed


@common.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m export.collection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the collection")
    parser.add_argument(
        "--collection", choices=COLLECTIONS, action="append", help=f"may be given several times; default: {', '.join(DEFAULT)}"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only modules whose names match")
    parser.add_argument("--publisher", default="keras-vit", help="lowercase letters, digits and hyphens (default: %(default)s)")
    parser.add_argument("--name", default="vision-transformers", help="of the collection (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    options = parser.parse_args(argv)
    common.need_tensorflow("export.collection")
    for flag in ("publisher", "name"):
        if not re.fullmatch("[a-z0-9][a-z0-9-]*", getattr(options, flag)):
            parser.error(f"--{flag} must be of lowercase letters, digits and hyphens, got {getattr(options, flag)!r}")
    chosen = options.collection or DEFAULT
    known = [item for collection in dict.fromkeys(chosen) for item in items(collection)]
    wanted = [item for item in known if fnmatch.fnmatchcase(item.name, options.only)]
    if not wanted:
        names = ", ".join(item.name for item in known)
        raise errors.ArgumentError(f"--only={options.only}: expected a pattern of module names, matches none of: {names}.")
    if options.list:
        print("\n".join(item.name for item in wanted))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(options.out / LOCK, timeout=0):
            failed = run(options.out, wanted, options.name, options.publisher)
    except filelock.Timeout as error:
        raise errors.ExportError(
            f"{options.out}: expected no other run there, another one is at work; wait for its end."
        ) from error
    print(f"{len(wanted) - len(failed)} of {len(wanted)} modules are in {os.fspath(options.out)}, see {INDEX} and {CARD}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
