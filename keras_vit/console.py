"""The command `keras-vit`: what there is, what a file is, downloads, other layouts, how good a model is, what it looks at, which
images fit a text, and whether this machine is in order.

  keras-vit list 'ViT_B*'
  keras-vit inspect ViT_B16:imagenet21k
  keras-vit fetch ViT_B16:augreg ViT-L_32:sam
  keras-vit convert scanned.npz single.npz --layout=linen
  keras-vit convert theirs.pth theirs.safetensors
  keras-vit evaluate ViT_B16 imagenet2012:validation
  keras-vit validate ViT_B16 imagenet/val
  keras-vit fewshot ViT_B16:imagenet21k flowers --shots=1,5,10
  keras-vit zeroshot LiT_B16B_2 imagenet/val --prompts=lit
  keras-vit retrieval LiT_B16B_2 coco/captions.jsonl
  keras-vit search photos 'two dogs on grass'
  keras-vit explain gradcam ViT_B16 flower.jpg --class=985
  keras-vit doctor

A file (.npz, .safetensors, or .pth and its like of PyTorch) is a path, a gs://, hf:// or https:// URL, timm/MODEL.TAG, an AugReg
file name, or VARIANT:TAG with the names that `list` shows or upstream ones; VARIANT alone stands for VARIANT:imagenet. The exit
status is 0, 1 after an error, which is one line on stderr, and 2 after wrong usage. Where Keras cannot be imported with its usual
backend, all of these run under KERAS_BACKEND=numpy but those that run models on images, which TensorFlow reads: evaluate,
validate, fewshot, zeroshot, retrieval, search and explain.
"""

import argparse
import dataclasses
import difflib
import fnmatch
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings

import keras
import numpy as np

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints import augreg, fetch, files, load
from keras_vit.checkpoints.weights import IMAGENET21K, head_activation
from keras_vit.evaluation import classify, fewshot, prompts, real, retrieval, search, validate, zeroshot

BACKENDS = ("tensorflow", "jax", "torch")
PACKAGES = (
    "keras", "numpy", "tensorflow", "tensorflow-cpu", "tensorflow-hub", "tensorflow-datasets", "jax", "jaxlib", "torch", "libtpu",
)  # fmt: skip
VARIABLES = re.compile("KERAS_.*|CUDA_VISIBLE_DEVICES|JAX_PLATFORMS|TF_CONFIG|(TF_)?XLA_FLAGS")
TIMEOUT = 300  # seconds for one backend
_SHOWN = 8  # entries of a list in text; JSON has all
_STYLES = {"yes": "green", "no": "red"}


# --- what the words of a command line mean


def _rows():
    return {name: row for row in zoo.VARIANTS.values() for name in (row.name, *row.upstream)}


def parse(words):
    """Joins "ViT_B16", "imagenet21k" to "ViT_B16:imagenet21k": a variant and a word that is neither another nor a file."""
    rows, joined = _rows(), []
    for word in words:
        if joined and joined[-1] in rows and word not in rows and not re.search("[/:.]", word):
            joined[-1] += f":{word}"
        else:
            joined.append(word)
    return joined


def _near(word, known):
    spelled = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), spelled, 3)
    return f"nearest: {', '.join(spelled[each] for each in found)}" if found else "nothing is called so"


def find(word):
    """The `Weights` record of the file that a word means.

    Raises:
        errors.ArgumentError: it means none.
    """
    rows = _rows()
    name, _, tag = word.replace(" ", ":", 1).partition(":")
    if name in rows:
        return zoo.find_weights(tag or "imagenet", name, rows[name])
    if "://" in word or augreg.parse(word):
        return zoo.find_weights(word, "keras-vit")
    if "/" in word or files.ending(word):
        return zoo.find_weights(word, "keras-vit")
    if os.path.isfile(word):
        return zoo.find_weights(pathlib.Path(word), "keras-vit")
    known = [*rows, *(f"{name}:{tag}" for name, row in rows.items() for tag in row.tags())]
    raise errors.ArgumentError(
        f"{word}: expected a file, its URL (gs://, hf://, https://), an AugReg file name or VARIANT:TAG as keras-vit list "
        f"shows them; {_near(word, known)}."
    )


def _fetched(record, force=False):
    """(path, sha256) of a record's file."""
    path, digest = fetch.fetch(record.source, record.size, force=force)
    return path, digest or fetch.sha256(path)


def _some(entries):
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return ", ".join(entries[:_SHOWN]) + more


# --- the commands: arguments -> (JSON-able document, [(header, rows)] to show of it, exit status)


def list_(args):
    rows = [row for row in zoo.VARIANTS.values() if fnmatch.filter((row.name, *row.upstream), args.pattern)]
    if not rows:
        raise errors.ArgumentError(
            f"{args.pattern}: expected a name or a pattern such as 'ViT_B*'; {_near(args.pattern, _rows())}. "
            "keras-vit list shows all."
        )
    document = [
        dict(
            name=row.name, family=row.family.name, upstream=list(row.upstream), parameters=row.params, macs=row.macs,
            resolution=row.resolution, imagenet=row.imagenet(224),
            weights={tag: dict(source=record.source, size=record.size) for tag, record in row.weights.items()},
        )
        for row in rows
    ]  # fmt: skip
    shown = []
    for row in rows:
        sizes = {tag: f" ({record.size / 2**20:,.0f} MiB)" for tag, record in row.weights.items() if record.size}
        tags = ", ".join(tag + sizes.get(tag, "") for tag in row.tags())
        shown.append(
            (
                row.name,
                ", ".join(row.upstream),
                f"{row.params:,}",
                f"{row.macs / 1e9:,.3g}",
                row.resolution,
                tags or "none published",
            )
        )
    return document, [(("name", "upstream", "parameters", "GMACs", "pixels", "weights"), shown)], 0


def inspect(args):
    words = parse(args.file)
    if len(words) > 1:
        raise errors.ArgumentError(f"inspect: expected one file, got {', '.join(words)}; inspect them one after the other.")
    record = find(words[0])
    path, digest = _fetched(record)
    archive = files.open_file(path)
    reading = zoo.identify(archive)
    names = zoo.FAMILIES[reading.family].layouts[reading.layout]
    known, whole = bool(reading.arguments), bool(reading.arguments) and not reading.unknown
    beside = [name for name in archive.entries if names.is_beside(name) and not names.to_ours(name)]
    entries = {name: entry for name, entry in archive.entries.items() if name not in set(beside)}
    document = dict(
        source=record.source, path=str(path), sha256=digest, size=path.stat().st_size, family=reading.family if known else None,
        layout=reading.layout if whole else None, resembles=reading.layout if known and not whole else None,
        unknown=reading.unknown, beside=beside, arguments=reading.arguments,
        parameters=sum(math.prod(shape) for shape, _ in entries.values()), classes=reading.classes,
        zero_head=_zero_head(archive, names),
        activation=record.activation or (head_activation(reading.classes) if reading.classes else None),
        preprocessing=record.pixels.asdict() if record.published else None, licence=record.licence,
        variants={name: zoo.explain(archive, zoo.VARIANTS[name]) for name in reading.variants},
        arrays=[dict(name=name, shape=shape, dtype=_type(dtype)) for name, (shape, dtype) in archive.entries.items()],
    )  # fmt: skip
    variants = (("variant", "fits", "what loading does at its resolution"), _fits(document["variants"]))
    arrays = (("array", "times", "shape", "type"), _arrays(archive, names, args.arrays))
    return document, [((), _facts(document)), variants, arrays], 0


def _type(dtype):
    return "bfloat16" if dtype.str == "|V2" else str(dtype)


def _zero_head(archive, names):
    """Whether a file's classifier is all zeros, by its kernel; None without one."""
    for name, (_, dtype) in archive.entries.items():
        if dtype.str in files.FLOATS and any(ours == "head/kernel" for ours, *_ in names.to_ours(name)):
            return archive.scan(name) == (0, 0.0)
    return None


def _facts(document):
    """What `inspect` says of a file as a whole."""
    layout, pixels = document["layout"] or "unknown", document["preprocessing"]
    if document["resembles"]:
        layout = f"unknown; resembles {document['resembles']}, which has no {_some(document['unknown'])}"
    return [
        *((key, document[key]) for key in ("source", "path", "sha256") if key != "path" or document[key] != document["source"]),
        ("size", f"{document['size']:,} bytes"),
        ("family", document["family"] or f"unknown; none of {', '.join(zoo.FAMILIES)}"),
        ("layout", layout),
        *([("left out", _some(document["beside"]))] if document["beside"] else []),
        ("arguments", ", ".join(f"{key}={value!r}" for key, value in document["arguments"].items()) or "unknown"),
        ("parameters", f"{document['parameters']:,}"),
        ("classes", f"{document['classes']:,}" if document["classes"] else "no classifier"),
        *([("classifier", "all zeros, for fine-tuning and features only")] if document["zero_head"] else []),
        ("activation", document["activation"] or "none"),
        ("pixels", ", ".join(f"{key} {value}" for key, value in pixels.items()) if pixels else "not recorded; [-1, 1] assumed"),
        ("licence", document["licence"] or "not recorded"),
    ]


def _fits(variants):
    rows = []
    for name, told in variants.items():
        dropped = [f"leaves out {_some(told['ignored'])}"] if told["ignored"] else []
        does = "; ".join(told["adapted"] + dropped) or "takes it as it is"
        rows.append((name, "no" if told["problems"] else "yes", _problems(told) or does))
    return rows or [("none registered", "", "")]


def _problems(told):
    """What `zoo.explain` has against a file, in short."""
    return "; ".join(f"{heading} ({len(entries)}): {entries[0]}" for heading, entries in told["problems"].items())


def _arrays(archive, names, each):
    """The rows of a file's arrays; those of one shape and type whose names differ in the number of their block share a row."""
    groups = {}
    for name, (shape, dtype) in archive.entries.items():
        forms = [name] if each else [rule.original.text for rule in names.rules if rule.original.match(name) is not None]
        form = forms[0] if forms else re.sub(r"\d+", "{i}", name, count=1)
        groups.setdefault((form, shape, _type(dtype)), []).append(name)
    return [
        (form if len(members) > 1 else members[0], len(members), " x ".join(map(str, shape)) or "scalar", dtype)
        for (form, shape, dtype), members in groups.items()
    ]


def fetch_(args):
    document, status = [], 0
    for word in parse(args.file):
        try:
            record = find(word)
            path, digest = _fetched(record, args.force)
            document.append(dict(source=record.source, path=str(path), size=path.stat().st_size, sha256=digest))
        except errors.KerasViTError as error:  # the others are still wanted
            status = _complain(error)
    rows = [(each["path"], each["size"], each["sha256"]) for each in document]
    return document, [(("path", "bytes", "sha256"), rows)] if rows else [], status


def convert(args):
    record, target = find(args.source), pathlib.Path(args.target)
    if files.ending(target) is None:
        raise errors.ArgumentError(f"{target}: expected a name that ends in {', '.join(files.ENDINGS)}, as the formats to write.")
    if args.variant and args.variant not in _rows():
        raise errors.ArgumentError(f"--variant={args.variant}: expected a registered variant; {_near(args.variant, _rows())}.")
    archive = files.open_file(_fetched(record)[0])
    reading = zoo.identify(archive)
    layouts = zoo.FAMILIES[reading.family].layouts
    format_only = args.layout is None and not isinstance(archive, files.FORMATS[files.ending(target)])
    layout = args.layout or (reading.layout if format_only else next(iter(layouts)))
    if layout not in layouts:
        raise errors.ArgumentError(
            f"--layout={layout}: expected a layout of family {reading.family}; {_near(layout, layouts)}. "
            "keras-vit convert --help has all."
        )
    if args.variant:
        problems = _problems(zoo.explain(archive, _rows()[args.variant]))
        if problems:
            raise errors.CheckpointMismatchError(
                f"{archive.path} does not fit {args.variant}: {problems}. Nothing was written; leave out --variant to convert it."
            )
    if format_only:
        files.copy(archive, target)
        left_out = []
    else:
        left_out = load.convert(archive, target, layouts[reading.layout], layouts[layout])
    if reading.unknown:  # only a change of format takes such
        reading, layout = dataclasses.replace(reading, family=None, layout=None), None
    document = dict(source=record.source, family=reading.family, read_as=reading.layout, layout=layout, left_out=left_out)
    document |= dict(path=str(target), size=target.stat().st_size, sha256=fetch.sha256(target))
    shown = [(key, _some(fact) or "nothing" if key == "left_out" else fact or "unknown") for key, fact in document.items()]
    return document, [((), shown)], 0


def evaluate(args):
    return _evaluated(args, _source(*_split(args.dataset), args), *_model(args.model))


def validate_(args):
    return _evaluated(args, _classes_of(args.folder), *_model(args.model))


def zero_shot(args):
    source = _classes_of(args.dataset) if os.path.isdir(args.dataset) else _source(*_split(args.dataset), args)
    model = _pair(args.model)
    chosen = dict(class_names=_class_names(args.classes, source), prompts=_prompts(args.prompts), canonicalize=not args.verbatim)
    classifier = zeroshot.zero_shot(model, **chosen)
    told = {key: classifier.weights_info[key] for key in ("class_names", "prompts")}
    document, ((header, facts), *tables), status = _evaluated(args, source, classifier, zoo.pixels_of(model))
    facts.insert(2, ("prompts", f"{len(told['prompts'])}: {_some(told['prompts'])}"))
    return document | told, [(header, facts), *tables], status


def _class_names(word, source):
    """What `zeroshot.zero_shot` takes as class names, in the order of a data set's labels, of the argument --classes."""
    labels, lists = list(source.class_names), zeroshot.lists()
    if word is None:
        return "imagenet" if labels == classify.imagenet_ids() else labels
    if word in lists:
        if zeroshot.SHORT.get(word, word) == "imagenet2012":  # of which data sets know ids, not names
            if len(labels) != 1000:
                raise errors.ArgumentError(f"{source.dataset}: expected 1,000 classes for --classes={word}, got {len(labels):,}.")
            classify.check_classes(labels, 1000, source.dataset)
            return word
        return dict(zip(labels, prompts.class_names(zeroshot.SHORT.get(word, word), labels)))
    if not os.path.isfile(word):
        raise errors.ArgumentError(
            f"--classes={word}: expected a file of names or one of {', '.join(lists)}; {_near(word, lists)}."
        )
    names = _read_names(word)
    if isinstance(names, dict):
        if set(names) != set(labels):
            missing, unknown = (_some(sorted(a - b)) or "none" for a, b in itertools.permutations((set(labels), set(names))))
            raise errors.ArgumentError(
                f"{word}: expected names for the classes of {source.dataset}; missing: {missing}; unknown: {unknown}."
            )
        return {label: names[label] for label in labels}
    if len(names) != len(labels):
        raise errors.ArgumentError(
            f"{word}: expected a line for each of the {len(labels)} classes of {source.dataset}: {_some(labels)}; got "
            f"{len(names)} lines."
        )
    return names


def _read_names(path):
    """The lines of a text file, or what a .json file holds: {label: names}."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        if not path.endswith(".json"):
            return text.splitlines()
        found = json.loads(text)
        if isinstance(found, dict):
            return found
        raise ValueError(f"a {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise errors.ArgumentError(
            f"{path}: expected lines of UTF-8 text, or in JSON {{label: name or names}}: {error}."
        ) from error


def _prompts(words):
    """What `zeroshot.zero_shot` takes as prompts."""
    if words is None:
        return "lit"
    if len(words) > 1:
        return words
    return _read_names(words[0]) if os.path.isfile(words[0]) else words[0]


def retrieval_(args):
    from keras_vit.data import captions  # imports TensorFlow

    dataset, split = (args.captions, None) if os.path.exists(args.captions) else _split(args.captions)
    source = captions.open_captions(dataset, split, text=args.text, data_dir=args.data_dir)
    model = _pair(args.model)
    found, broken = _reading(lambda: retrieval.evaluate(model, source, batch=args.batch), source)
    ways = {"image to text": found.image_to_text, "text to image": found.text_to_image}
    document = dict(
        model=args.model, dataset=source.dataset, split=source.split, notes=source.notes, backend=keras.config.backend(),
        unreadable=[dict(file=path, reason=why) for path, why in broken],
        **{way.replace(" ", "_"): dataclasses.asdict(recall) for way, recall in ways.items()},
    )  # fmt: skip
    facts = [
        ("model", args.model), ("data", ", ".join(filter(None, (source.dataset, source.split)))),
        ("images", f"{found.image_to_text.queries:,}"), ("captions", f"{found.text_to_image.queries:,}"),
        *(("note", note) for note in source.notes),
    ]  # fmt: skip
    if broken:
        named = _some([f"{path} ({why})" for path, why in broken])
        facts.append(("unreadable", f"{len(broken):,}, counted as not found: {named}"))
    rows = [
        (way, *(f"{recall.at[k]:.1%}" for k in retrieval.AT), recall.median_rank or "none", recall.tied)
        for way, recall in ways.items()
    ]
    header = ("", *(f"recall@{k}" for k in retrieval.AT), "median rank", "tied")
    return document, [((), facts), (header, rows)], 0


def search_(args):
    from keras_vit.explain import gradcam

    gradcam.check_png(args.out)
    search.check_text(args.text)
    model = _pair(args.model)
    times = [time.perf_counter()]
    progress = functools.partial(print, "keras-vit: embedded", file=sys.stderr)
    found = search.index(
        model, args.folder, cache=args.cache, batch=args.batch, progress=lambda done, whole: progress(f"{done:,} of {whole:,}")
    )
    times.append(time.perf_counter())
    hits = search.search(model, found, args.text, args.top, once=True)
    times.append(time.perf_counter())
    gradcam.save_png(args.out, search.contact_sheet(found, hits, args.text))
    document = dict(
        model=args.model, folder=args.folder, text=args.text, images=len(found.names), added=found.added, removed=found.removed,
        others=found.others, unreadable=[dict(zip(("file", "reason"), each)) for each in found.broken], index=str(found.place),
        seconds=dict(zip(("index", "search"), np.diff(times).tolist())), hits=[hit._asdict() for hit in hits], path=str(args.out),
    )  # fmt: skip
    facts = [
        ("model", args.model), ("images", f"{len(found.names):,} of {args.folder}, of which {found.added:,} embedded now"),
        *([("not looked into", f"{found.others:,} other files")] if found.others else []),
        *([("unreadable", _line(_some([f"{name} ({why})" for name, why in found.broken])))] if found.broken else []),
        ("search", f"{document['seconds']['search']:.3f} s"), ("written", str(args.out)),
    ]  # fmt: skip
    return document, [((), facts), (("score", "image"), [(f"{hit.score:.4f}", _line(hit.name)) for hit in hits])], 0


def _classes_of(folder):
    from keras_vit.data import pipeline  # imports TensorFlow

    root, split = _folder(folder)
    return pipeline.open_source(root, split, on_error="keep")


def _evaluated(args, source, model, pixels):
    """What `evaluate`, `validate_` and `zero_shot` do once data set and model are there."""
    dataset = source.dataset
    options = _kind(model)
    classify.check_classes(source.class_names, model.output_shape[-1], dataset)
    if model.output_shape[-1] != source.num_classes:
        raise errors.ArgumentError(
            f"{dataset} has {source.num_classes:,} classes ({_some(source.class_names)}) and {args.model} has "
            f"{model.output_shape[-1]:,}: expected the same. Fine-tune the model on that data set, or see keras-vit fewshot."
        )
    if zoo.zero_head(model):
        raise errors.ArgumentError(
            f"{args.model}: its classifier is all zeros and prefers no class. Fine-tune it, or see keras-vit fewshot."
        )
    if args.real:
        options["sets"] = real.sets(real.real_labels(args.real), real.file_names(source, getattr(args, "data_dir", None)))
    settings = dict(size=model.input_shape[1:3], batch=args.batch, pixels=pixels, state=args.resume, worst=_SHOWN, **options)
    if args.resume:
        settings["identity"] = validate.identity(model)
    done = _reading(lambda: validate.validate(model.predict_on_batch, source, **settings), source)
    found, speed = done.evaluation, done.images_per_second
    classes = [
        dict(name=name, examples=int(count), accuracy=float(share) if count else None)
        for name, count, share in zip(source.class_names, found.class_examples, found.class_accuracy)
    ]
    document = dict(
        model=args.model, source=_info(model).get("source"), dataset=source.dataset, split=source.split, examples=found.examples,
        classes=source.num_classes, resolution=model.input_shape[1:3], preprocessing=pixels.asdict(), top1=found.accuracy,
        interval=found.interval, top5=found.top5, real=dataclasses.asdict(found.real) if found.real else None, nll=found.nll,
        ece=found.ece, backend=keras.config.backend(), images_per_second=speed, resumed=done.resumed,
        unreadable=[dict(zip(("file", "reason"), each)) for each in done.unreadable], per_class=classes,
        worst=[dict(zip(("index", "label", "predicted", "probability"), each)) for each in found.worst],
    )  # fmt: skip
    facts = [
        *_of_both(document), ("resize", pixels.describe(model.input_shape[1:3])), ("images", f"{found.examples:,}"),
        ("top-1", f"{found.accuracy:.2%} ({found.interval[0]:.2%} to {found.interval[1]:.2%}, 95% Wilson)"),
        *([("top-5", f"{found.top5:.2%}")] if found.top5 is not None else []),
    ]  # fmt: skip
    if done.unreadable:
        named = _some([f"{path} ({why})" for path, why in done.unreadable])
        facts.append(("unreadable", f"{len(done.unreadable):,}, counted as wrong: {named}"))
    if found.real:
        low, high = found.real.interval
        facts.append(("ReaL", f"{found.real.accuracy:.2%} ({low:.2%} to {high:.2%}) of {found.real.examples:,} images"))
    facts += [
        ("expected calibration error", f"{found.ece:.2%}, {classify.BINS} bins"),
        ("negative log-likelihood", f"{found.nll:.4f}"),
        ("speed", f"{speed:,.1f} images/s with reading, on {keras.config.backend()}" if speed else "nothing was left to do"),
    ]
    if done.resumed:
        facts.append(("resumed", f"from {args.resume}, which had {done.resumed:,} of the images"))
    order = np.argsort(found.class_accuracy, kind="stable")[: np.count_nonzero(found.class_examples)]  # NaN comes last
    rows = [
        (each["name"], f"{each['accuracy']:.1%}", f"{each['examples']:,}", _taken_for(found.confusion, number, source))
        for number, each in ((number, classes[number]) for number in order[:5])
    ]
    return document, [((), facts), (("worst classes", "top-1", "images", "most often taken for"), rows)], 0


def few_shot(args):
    training, test = (_source(args.dataset, split, args) for split in (args.train, args.test))
    if training.class_names != test.class_names:
        raise errors.ArgumentError(f"{args.dataset}: {args.train} and {args.test} have different classes; expected the same.")
    model, pixels = _model(args.model)
    model = fewshot.representation(model)
    taken = [
        _reading(lambda source=source: fewshot.features(model, _batches(source, model, pixels, args)), source)
        for source in (training, test)
    ]
    seeds = tuple(range(args.seeds))
    options = dict(shots=args.shots, l2=args.l2, seeds=seeds, classes=training.num_classes)
    rows = fewshot.fewshot(*taken[0], *taken[1], **options)
    document = dict(
        model=args.model, dataset=training.dataset, train=training.split, test=test.split, classes=training.num_classes,
        train_examples=len(taken[0][1]), examples=len(taken[1][1]), features=taken[0][0].shape[1],
        resolution=model.input_shape[1:3], preprocessing=pixels.asdict(), seeds=seeds, backend=keras.config.backend(),
        rows=[dataclasses.asdict(row) for row in rows],
    )  # fmt: skip
    shown = [
        (row.shots, f"{row.l2:g}", f"{row.accuracy:.2%}", " ".join(f"{each:.2%}" for each in row.accuracies), row.examples)
        for row in rows
    ]
    splits = f"{args.train} to learn from, {args.test} to test"
    facts = [*_of_both(document | dict(split=splits)), ("features", document["features"])]
    return document, [((), facts), (("shots", "l2", "top-1", "each seed", "images"), shown)], 0


def _of_both(document):
    """What `evaluate` and `few_shot` say first."""
    height, width = document["resolution"]
    return [
        ("model", document["model"]), ("data", ", ".join(filter(None, (document["dataset"], document["split"])))),
        ("classes", f"{document['classes']:,}"), ("pixels", f"{height} x {width}"),
    ]  # fmt: skip


def _taken_for(confusion, number, source):
    if confusion is None:
        return ""
    row = np.where(np.arange(len(confusion)) == number, 0, confusion[number])
    return f"{source.class_names[row.argmax()]} ({row.max():,})" if row.any() else "none"


def _split(word):
    """ "cifar10:train[:5%]" -> ("cifar10", "train[:5%]"); the split is "test" where none is named, and 5.1.0 is a version."""
    found = re.fullmatch(r"(.+?):([A-Za-z][\w-]*(?:\[[^]]*\])?)", word)
    return found.groups() if found and not os.path.isdir(word) else (word, "test")


def _folder(word):
    """(root, split) of a folder of <class>/<image>, of one that has it as val, validation or test, or of ROOT:SPLIT."""
    if not os.path.isdir(word):
        root, split = _split(word)
        if os.path.isdir(root):
            return root, split
        raise errors.ArgumentError(f"{word}: expected a folder of <class>/<image>; see keras-vit evaluate for other data sets.")
    inside = [split for split in ("val", "validation", "test", "train") if os.path.isdir(os.path.join(word, split))]
    if inside and inside != ["train"]:
        return word, inside[0]
    root, name = os.path.split(os.path.abspath(word))
    return (root, name) if name in ("val", "validation", "test", "train") else (word, None)


def _source(dataset, split, args):
    from keras_vit.data import pipeline  # imports TensorFlow

    return pipeline.open_source(dataset, split, data_dir=args.data_dir)


def _batches(source, model, pixels, args):
    from keras_vit.data import pipeline

    return pipeline.eval_batches(source, size=model.input_shape[1:3], batch=args.batch, pixels=pixels)


def _reading(run, source):
    """`run()`, with the files named that cannot be decoded."""
    import tensorflow as tf

    from keras_vit.data import pipeline

    try:
        return run()
    except tf.errors.OpError as error:
        return pipeline.raise_unreadable(error, source)


def _info(model):
    return getattr(model, "weights_info", {})


def _built(word):
    """The model of VARIANT, VARIANT:WEIGHTS or a .keras file.

    Raises:
        errors.ArgumentError: it is none of them.
    """
    name, _, weights = word.partition(":")
    if name in _rows():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is all zeros")  # evaluate refuses it, fewshot does not use it
            return _rows()[name].build(**({"weights": weights} if weights else {}))
    if word.endswith(".keras"):
        try:
            return keras.saving.load_model(word, compile=False)
        except Exception as error:  # Keras says in many ways that a file is missing, damaged or of unknown classes
            raise errors.ArgumentError(f"{word}: expected a model stored by Keras, which cannot load it: {error}") from error
    raise errors.ArgumentError(f"{word}: expected VARIANT[:WEIGHTS] or a .keras file; {_near(name, _rows())}.")


def _pair(word):
    """The model of images and texts that `_built` finds."""
    model = _built(word)
    if not all(isinstance(getattr(model, tower, None), keras.Model) for tower in ("image_tower", "text_tower")):
        pairs = [name for name, row in zoo.VARIANTS.items() if row.takes("towers")]
        raise errors.ArgumentError(f"{word}: expected a model of images and texts, such as {', '.join(pairs)}, got another one.")
    return model


def _model(word):
    """(classifier or other model of images, the `Pixels` it wants) that `_built` finds."""
    model = _built(word)
    shapes = model.input_shape, model.output_shape
    if (
        any(isinstance(shape, (list, dict)) for shape in shapes)
        or len(shapes[0]) != 4
        or None in shapes[0][1:]
        or shapes[0][3] != 3
    ):
        raise errors.ArgumentError(
            f"{word}: expected a model of RGB images of one size, got input {shapes[0]}, output {shapes[1]}."
        )
    return model, zoo.pixels_of(model)


def _kind(model):
    """What the scores of a classifier are, as options of `classify.evaluate`, by the activation of its last layer."""
    last = model.layers[-1]
    activation = keras.activations.softmax if isinstance(last, keras.layers.Softmax) else getattr(last, "activation", None)
    kinds = {
        keras.activations.softmax: {}, keras.activations.sigmoid: dict(multi_label=True),
        keras.activations.linear: dict(from_logits=True),
    }  # fmt: skip
    if activation not in kinds or len(model.output_shape) != 2:
        raise errors.ArgumentError(
            f"{model.name}: expected a classifier that ends in logits, a softmax or a sigmoid, (b, classes), got layer "
            f"{last.name!r} of output {model.output_shape}; see keras-vit fewshot for features."
        )
    return dict(kinds[activation])


def gradcam(args):
    from keras_vit.data import pipeline
    from keras_vit.explain import gradcam

    target = args.out or pathlib.Path(f"{pathlib.Path(args.image).stem}-gradcam.png")
    gradcam.check_png(target)
    content = pipeline.read_image(args.image)
    model, pixels = _model(args.model)
    size = model.input_shape[1:3]
    image = pipeline.eval_image(content, size, pixels).numpy()[None]
    (heat,), (number,), layer = gradcam.gradcam(model, image, args.class_, args.layer)
    scores = keras.ops.convert_to_numpy(model(image, training=False))[0]
    names, missing = {}, []
    try:
        if len(scores) in (1000, IMAGENET21K):
            names = dict(enumerate(name for _, name in classify.class_names(len(scores))))
    except errors.DownloadError as error:
        missing = [("names", f"of the classes could not be had: {error}")]
    best = [
        {"class": int(each), "name": names.get(each), "score": float(scores[each])}
        for each in np.argsort(-scores, kind="stable")[:5]
    ]
    seen = pipeline.eval_image(content, size, dataclasses.replace(pixels, mean=(0,) * 3, std=(1,) * 3)).numpy()
    gradcam.save_png(target, gradcam.overlay(seen, heat))
    document = {
        "model": args.model, "image": args.image, "layer": layer, "class": int(number), "name": names.get(number),
        "resolution": size, "backend": keras.config.backend(), "predictions": best, "path": str(target),
    }  # fmt: skip
    facts = [
        ("model", args.model), ("image", args.image), ("class", " ".join(map(str, filter(None, (number, names.get(number)))))),
        ("layer", layer), *missing, ("written", f"{target}, {size[0]} x {size[1]} as the model sees it"),
    ]  # fmt: skip
    rows = [(each["class"], f"{each['score']:.4f}", each["name"] or "") for each in best]
    return document, [((), facts), (("class", "score", "name" if names else ""), rows)], 0


def doctor(args):
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    home, lock, cached = fetch.home(), fetch.lock_file(), fetch.cached()
    place = next(folder for folder in (home, *home.absolute().parents) if folder.is_dir())
    cache = dict(
        folder=str(home), writable=os.access(place, os.W_OK), files=len(cached), size=sum(size for _, _, size in cached),
        free=shutil.disk_usage(place).free, lock_file=str(lock), lock_file_exists=lock.is_file(),
    )  # fmt: skip
    environment = {name: _without_password(value) for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)}
    tried = args.backend or [name for name in BACKENDS if importlib.util.find_spec(name)]
    document = dict(
        python=platform.python_version(), platform=platform.platform(), keras_vit=keras_vit.__version__, versions=versions,
        backend=keras.config.backend(), cache=cache, environment=environment,
        backends={name: _try(name, args.timeout) for name in tried},
    )  # fmt: skip
    facts = [
        ("python", f"{document['python']}, {document['platform']}"), ("keras_vit", document["keras_vit"]), *versions.items(),
        ("backend", document["backend"]), ("cache", f"{home}{'' if cache['writable'] else ', which cannot be written'}"),
        ("cached", f"{len(cached)} files, {cache['size'] / 2**30:.1f} GiB; {cache['free'] / 2**30:.1f} GiB free"),
        ("lock file", f"{lock}{'' if cache['lock_file_exists'] else ' (none yet)'}"), *environment.items(),
    ]  # fmt: skip
    rows = []
    for name, told in document["backends"].items():
        if told["problem"]:
            rows.append((name, "no", "", "", told["problem"]))
        else:
            rows.append((name, "yes", f"{told['forward']:.2f} s", f"{told['step']:.2f} s", ", ".join(told["devices"])))
    table = (("backend", "works", "forward", "training step", "devices"), rows)
    return document, [((), facts), table], int(any(told["problem"] for told in document["backends"].values()))


def _without_password(value):
    return re.sub(r"//[^/@\s]*@", "//***@", value)


def _try(backend, timeout):
    """dict(problem, devices, forward, step) of `step` in a process of its own; problem is one line, or None."""
    places = [str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, "-P", "-c", "from keras_vit import console; console.step()"]
    options = dict(env=environment, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
    told = dict(problem=None, devices=[], forward=None, step=None)
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return told | dict(problem=f"no answer within {timeout:g} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return told | dict(problem=f"exit status {done.returncode}: {_line(last)}")
    return json.loads(done.stdout.splitlines()[-1])


def step():
    """What `doctor` runs on a backend: a forward and a training step of ViT_mu on random images; prints one line of JSON."""
    model = keras_vit.ViT_mu(weights=None, classes=10, classifier_activation=None)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 32, 32, 3)).astype("float32")
    times = [time.perf_counter()]
    scores = model.predict_on_batch(images)
    times.append(time.perf_counter())
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loss = float(model.train_on_batch(images, np.arange(4)))
    times.append(time.perf_counter())
    head, problem = load.to_numpy(model.get_layer("head").kernel), None
    if np.any(scores) or not abs(loss - math.log(10)) < 1e-3:  # the head starts at zero, so all classes are equally likely
        problem = f"expected scores of 0 and a loss of {math.log(10):.4f}, got up to {np.abs(scores).max():g} and {loss:.4f}"
    elif not np.any(head) or not np.isfinite(head).all():
        problem = "expected a finite classifier that is not 0 after a training step, got another"
    seconds = dict(forward=times[1] - times[0], step=times[2] - times[1])
    print(json.dumps(dict(problem=problem, devices=_devices(), **seconds)))


def _devices():
    """What this process's backend computes on."""
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        found, details = tf.config.list_physical_devices(), tf.config.experimental.get_device_details
        return [f"{each.name.removeprefix('/physical_device:')} {details(each).get('device_name', '')}".strip() for each in found]
    if backend == "jax":
        import jax

        return [f"{each} {each.device_kind}" for each in jax.devices()]
    import torch

    return ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))]


# --- the command line


def _show(header, rows):
    """Prints a table, with colours on a terminal, else as aligned text."""
    cells = [[str(cell) for cell in row] for row in ([header] if header else []) + rows]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(*cells)]
        for row in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        return
    from rich import console, table, text

    grid = table.Table(box=None, show_header=bool(header), pad_edge=False)
    for title in header or [""] * len(cells[0]):
        grid.add_column(title, overflow="fold")
    for first, *others in cells[bool(header) :]:
        grid.add_row(text.Text(first, "cyan"), *(text.Text(cell, _STYLES.get(cell, "")) for cell in others))
    console.Console(file=sys.stdout, force_terminal=True).print(grid)


def _line(text):
    return "".join(each if each.isprintable() else " " for each in text)


def _complain(error):
    """Says what is wrong in one line; the exit status."""
    print(f"keras-vit: {_line(str(error))}", file=sys.stderr)
    return 1


def _parser():
    parser = argparse.ArgumentParser("keras-vit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {keras_vit.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, does, among=commands):
        added = among.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print one JSON document")
        return added

    added = command("list", list_, "list the registered variants and the tags of their weights")
    added.add_argument("pattern", nargs="?", default="*", help="names to show, here or upstream, such as 'ViT_B*'")
    added = command("inspect", inspect, "say what a checkpoint is and which variants take it")
    added.add_argument("file", nargs="+", help="path, URL, AugReg file name or VARIANT:TAG")
    added.add_argument("--arrays", action="store_true", help="a row for every array, those of all blocks")
    added = command("fetch", fetch_, "download checkpoints into the cache, verified")
    added.add_argument("file", nargs="+", help="VARIANT:TAG, AugReg file name or URL")
    added.add_argument("--force", action="store_true", help="download also what the cache has")
    added = command(
        "convert", convert, "rename, stack or unstack a checkpoint's arrays into another layout or write them in another format, "
        "bit for bit; no array's content changes, so a table of positions keeps its row for the class token or goes on without it"
    )  # fmt: skip
    added.add_argument("source", help="path, URL, AugReg file name or VARIANT:TAG")
    added.add_argument("target", help="the file to write, in the format of its ending; an existing one is replaced in one step")
    added.add_argument(
        "--layout", help="the layout to write, by default the family's commonest, or that of the file if its format changes"
    )
    added.add_argument("--variant", help="insist that the file fits this variant")
    added.epilog = " ".join(f"Layouts of {name}: {', '.join(family.layouts)}." for name, family in zoo.FAMILIES.items())
    added = command("evaluate", evaluate, "top-1 and top-5 with their certainty, calibration and speed of a model on a data set")
    added.add_argument("model", help="VARIANT[:WEIGHTS] or FILE.keras; WEIGHTS is a tag, AugReg file name, path or URL")
    added.add_argument("dataset", help="digits, a folder of SPLIT/<class>/<image>, or a TFDS name; with :SPLIT, by default test")
    _add_evaluating(added)
    added.add_argument("--data-dir", metavar="FOLDER", help="where TFDS keeps its data sets")
    added = command(
        "validate", validate_, "top-1, top-5 and images/s of a model on a folder of classes such as ImageNet's val; a file that "
        "cannot be read is named and counts as wrong"
    )  # fmt: skip
    added.add_argument("model", help="VARIANT[:WEIGHTS] or FILE.keras; WEIGHTS is a tag, AugReg file name, path or URL")
    added.add_argument("folder", help="of <class>/<image>, labels in the order of the names; or of val/<class>/<image>")
    _add_evaluating(added)
    added = command(
        "fewshot", few_shot, "accuracy of a linear classifier learned in closed form from a few features of each class"
    )
    added.add_argument("model", help="VARIANT[:WEIGHTS] or FILE.keras; what its head reads are the features")
    added.add_argument("dataset", help="digits, a folder of SPLIT/<class>/<image>, or a TFDS name")
    added.add_argument("--train", default="train", metavar="SPLIT", help="to learn from, by default train")
    added.add_argument("--test", default="test", metavar="SPLIT", help="by default test")
    shots, l2 = ",".join(map(str, fewshot.SHOTS)), f"{fewshot.L2:g}"
    added.add_argument(
        "--shots", type=functools.partial(_numbers, int), default=fewshot.SHOTS, help=f"images of each class, by default {shots}"
    )
    added.add_argument(
        "--l2", type=functools.partial(_numbers, float), default=fewshot.L2, help=f"regularisation, one or more, by default {l2}"
    )
    added.add_argument("--seeds", type=_number, default=len(fewshot.SEEDS), help="draws of the images, by default 3")
    _add_batch(added)
    added.add_argument("--data-dir", metavar="FOLDER", help="where TFDS keeps its data sets")
    added = command(
        "zeroshot", zero_shot, "as validate, of a model of images and texts, whose classifier is made of the classes' names"
    )  # fmt: skip
    added.add_argument("model", help="VARIANT[:WEIGHTS] or FILE.keras of images and texts, such as LiT_B16B_2")
    added.add_argument("dataset", help="a folder as of validate, or a data set as of evaluate")
    added.add_argument(
        "--classes", metavar="NAME|FILE", help=f"what the classes are called: {', '.join(zeroshot.lists())}; a text file of a "
        "line for each, in the order of the labels; or a file of JSON, {label: name or names}. By default as in the data set, "
        "or, where these are ImageNet's ids, as published for it"
    )  # fmt: skip
    added.add_argument(
        "--prompts", action="append", metavar="NAME|FILE|TEXT", help=f"{', '.join(prompts.list_prompts())}; a file of a line for "
        "each; or a text with {} for the name, which may be repeated. By default lit, as the figures of LiT's model card"
    )  # fmt: skip
    added.add_argument("--verbatim", action="store_true", help="leave names and prompts their capitals and punctuation")
    _add_evaluating(added)
    added.add_argument("--data-dir", metavar="FOLDER", help="where TFDS keeps its data sets")
    added = command("retrieval", retrieval_, "recall of images by their captions and of captions by their images")
    added.add_argument("model", help="VARIANT[:WEIGHTS] or FILE.keras of images and texts, such as LiT_B16B_2")
    added.add_argument(
        "captions", help="a .tsv or .jsonl file, a folder of images with .txt files, or a TFDS name; with :SPLIT, by default test"
    )
    added.add_argument("--text", metavar="FEATURE", help="of TFDS, that has the captions, such as captions/text")
    _add_batch(added)
    added.add_argument("--data-dir", metavar="FOLDER", help="where TFDS keeps its data sets")
    added = command("search", search_, "find the images of a folder that fit a text, and write them on a contact sheet")
    added.add_argument("folder", help="of images, at any depth; what is known of them is kept in its hidden folder .keras_vit")
    added.add_argument("text", help="what to look for, such as 'two dogs on grass'")
    added.add_argument("--model", default="LiT_B16B_2", help="VARIANT[:WEIGHTS] or FILE.keras, by default LiT_B16B_2")
    added.add_argument("--top", type=_number, default=search.TOP, help=f"images to show, by default {search.TOP}")
    added.add_argument("--cache", metavar="FOLDER", help="keep what is known of the images there")
    added.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("search.png"), metavar="FILE.png", help="by default search.png, here"
    )  # fmt: skip
    _add_batch(added)
    explain = commands.add_parser("explain", help="show what a model looks at").add_subparsers(required=True, metavar="HOW")
    added = command("gradcam", gradcam, "write where in an image a class's score comes from, in colour over the image", explain)
    added.add_argument("model", help="VARIANT[:WEIGHTS] or FILE.keras")
    added.add_argument("image", help="file, such as a JPEG or PNG")
    added.add_argument("--class", type=int, dest="class_", metavar="NUMBER", help="by default the one of the highest score")
    added.add_argument("--layer", help="such as block_11/attention_norm; by default in the last block")
    added.add_argument("--out", type=pathlib.Path, metavar="FILE.png", help="by default IMAGE-gradcam.png in this folder")
    added = command("doctor", doctor, "versions, devices and cache, and a training step on every backend installed")
    added.add_argument("--backend", action="append", choices=BACKENDS, help="only this one; may be repeated")
    added.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help=f"for one backend, by default {TIMEOUT}")
    return parser


def _add_evaluating(command):
    command.add_argument("--real", metavar="REAL.JSON", help="ImageNet-ReaL labels, for a data set that names its files")
    command.add_argument("--resume", metavar="FILE", help="keep the counts there, and go on from it after an interruption")
    _add_batch(command)


def _add_batch(command):
    command.add_argument("--batch", type=_number, default=64, help="images at once, by default 64")


def _numbers(kind, text):
    """Reads "1,5,10"; numbers above 0."""
    try:
        found = tuple(kind(each) for each in text.split(","))
    except ValueError:
        found = (0,)
    if not all(0 < each < math.inf for each in found):
        raise argparse.ArgumentTypeError(f"expected numbers above 0 with commas between, got {text!r}")
    return found


def _number(text):
    numbers = _numbers(int, text)
    if len(numbers) != 1:
        raise argparse.ArgumentTypeError(f"expected one number, got {text!r}")
    return numbers[0]


def main(argv=None):
    """The console command on a list of arguments, by default the process's. Returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        document, tables, status = args.run(args)
    except (errors.KerasViTError, OSError) as error:
        return _complain(error)
    try:
        if args.json:
            print(json.dumps(document, indent=1))
        for number, (header, rows) in enumerate([] if args.json else tables):
            print(end="\n" if number else "")
            _show(header, rows)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; Python shall not flush the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())
