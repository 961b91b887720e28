"""Classifies a folder of images with an exported module, by Apache Beam's `RunInference`: on one machine or many.

    python -m export.beam_predict --module=modules/vit_b16_classification --images=photos --output=out/photos

writes out/photos-*.jsonl, one line {"path", "class", "name" with --names, "score", "top5"} for each image (of a feature-vector
module {"path", "feature_vector"}), in no order, and out/photos.bad-*.jsonl, one line {"path", "reason"} for each file that is no
image that can be read. Bad files are counted and named; they stop nothing. The exit status is 1 if no file could be read.

The module's signature "serving_bytes" does the work: it decodes and resizes in its graph as `keras_vit.data.pipeline` does, so a
worker need not know the model. A worker loads a module only if its files are those of its manifest.

Options that are not listed here go to Beam. Without --runner the pipeline runs in this process on FnApiRunner, the part of Beam's
DirectRunner that runs batches; `--direct_num_workers=4 --direct_running_mode=multi_processing` uses more processes.
(--runner=DirectRunner first tries to download Beam's runner Prism, a program of its own.)

The same pipeline is made to run elsewhere, if every worker has keras_vit, this folder `export` on its PYTHONPATH, and the module
at the path that --module names. One container image has all three:

    FROM apache/beam_python3.11_sdk:2.77.0
    COPY . /opt/keras_vit
    RUN pip install '/opt/keras_vit[export]'
    ENV PYTHONPATH=/opt/keras_vit
    COPY modules/vit_b16_classification /opt/module

Dataflow (the launching machine needs `apache-beam[gcp]`, and the module at the same path):

    python -m export.beam_predict --module=/opt/module --images='gs://BUCKET/photos/**' --output=gs://BUCKET/out/photos \
        --runner=DataflowRunner --project=PROJECT --region=REGION --temp_location=gs://BUCKET/tmp \
        --sdk_container_image=IMAGE --sdk_location=container

Flink (images and output on a file system that all of its task managers share):

    python -m export.beam_predict ... --runner=FlinkRunner --flink_master=HOST:8081 \
        --environment_type=DOCKER --environment_config=IMAGE

It was run on FnApiRunner only: neither on Dataflow nor on Flink.
"""

import argparse
import glob
import json
import os
import re
import sys
from pathlib import Path

import apache_beam as beam
import numpy as np
import tensorflow as tf
from apache_beam.io import fileio
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from keras_vit import errors, hub
from keras_vit.checkpoints.weights import head_activation

LARGEST = 2**28  # bytes of a file that is read at all; no image of at most 64 million pixels has as many
TOP = 5
SCORES = {"softmax": tf.nn.softmax, "sigmoid": tf.nn.sigmoid}
_COUNTED = "beam_predict"


class ModuleHandler(ModelHandler):
    """Contents of image files -> for each the module's output, float32 (n,), or a text that says why it is none.

    Args:
        path: folder of a module with manifest and signature "serving_bytes", where each worker finds it.
        batch_size: files that the module is given at once.
    """

    def __init__(self, path, batch_size):
        super().__init__(min_batch_size=batch_size, max_batch_size=batch_size)
        self.path = os.fspath(path)

    def load_model(self):
        hub.verify(self.path)
        return tf.saved_model.load(self.path)

    def run_inference(self, batch, model, inference_args=None):
        try:
            (outputs,) = model.signatures["serving_bytes"](image_bytes=tf.constant(batch, tf.string)).values()
            return list(outputs.numpy())
        except tf.errors.InvalidArgumentError as error:  # one bad image fails its batch
            if len(batch) == 1:
                return [_reason(error)]
            middle = len(batch) // 2
            return [row for part in (batch[:middle], batch[middle:]) for row in self.run_inference(part, model)]

    def get_num_bytes(self, batch):
        return sum(map(len, batch))

    def get_metrics_namespace(self):
        return "keras_vit"


class Read(beam.DoFn):
    """A file that was found -> (path, content); under the tag "bad" (path, reason)."""

    def process(self, found):
        path = os.fsencode(found.path)  # not text: a name may be no Unicode, which Beam's coders refuse
        try:
            if found.size_in_bytes > LARGEST:
                raise OSError(f"{found.size_in_bytes:,} bytes, more than {LARGEST:,}")
            with FileSystems.open(found.path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
                yield path, file.read()
        except OSError as error:
            yield beam.pvalue.TaggedOutput("bad", (path, error.strerror or str(error)))


class Answer(beam.DoFn):
    """(path, output of the module) -> a line of JSON; under the tag "bad" (path, reason).

    Args:
        record: the module's manifest.
        scores: a key of `SCORES`.
        names: of the classes, or None.
    """

    def __init__(self, record, scores, names):
        self.record, self.scores, self.names = record, scores, names
        self.predicted = Metrics.counter(_COUNTED, "predicted")

    def process(self, answered):
        path, output = answered
        if isinstance(output, str) or not np.isfinite(output).all():
            reason = output if isinstance(output, str) else "the module's output for it is not finite"
            yield beam.pvalue.TaggedOutput("bad", (path, reason))
            return
        self.predicted.inc()
        yield json.dumps({"path": os.fsdecode(path), **self.said(output)})

    def said(self, output):
        if self.record["task"] == "feature_vector":
            return {"feature_vector": output.tolist()}
        scores = SCORES[self.scores](output).numpy()
        best = np.argsort(-output, kind="stable")[:TOP]
        ranked = [{"class": int(i), **({"name": self.names[i]} if self.names else {}), "score": float(scores[i])} for i in best]
        return {**ranked[0], "top5": ranked}


def predictions(pipeline, module, pattern, *, batch_size=32, scores=None, names=None):
    """Adds to a Beam pipeline what reads and classifies files.

    Args:
        pipeline: `beam.Pipeline`.
        module: folder of a module for "classification" or "feature_vector"; see `ModuleHandler`.
        pattern: of files, as Beam spells it: * stays within a folder, ** does not.
        batch_size: see there.
        scores: "softmax" or "sigmoid", what makes scores of logits; None is the former, but for the classes of ImageNet-21k.
        names: of the classes.

    Returns:
        (lines of JSON with an answer each, lines of JSON with a bad file each), both a `PCollection`.

    Raises:
        errors.ArgumentError: the module is for another task, or the names are not as many as its classes.
        errors.UntrustedArtifactError, errors.IntegrityError: of `keras_vit.hub.verify`.
    """
    record = hub.verify(module)
    if record["task"] not in ("classification", "feature_vector"):
        raise errors.ArgumentError(
            f"{module}: expected a module for classification or feature_vector, got one for {record['task']!r}. Export it for "
            "one of these."
        )
    (width,) = record["shape"]
    if names is not None and (record["task"] != "classification" or len(names) != width):
        raise errors.ArgumentError(
            f"{module}: gives {width} numbers for {record['task']}, got names of {len(names)} classes; pass one for each class."
        )
    found = pipeline | fileio.MatchFiles(pattern) | beam.Reshuffle()
    files = found | beam.ParDo(Read()).with_outputs("bad", main="read")
    answers = files.read | RunInference(KeyedModelHandler(ModuleHandler(module, batch_size)))
    lines = answers | beam.ParDo(Answer(record, scores or head_activation(width), names)).with_outputs("bad", main="lines")
    return lines.lines, (files.bad, lines.bad) | beam.Flatten() | beam.Map(_bad)


def _bad(item):
    path, reason = item
    Metrics.counter(_COUNTED, "bad").inc()
    return json.dumps({"path": os.fsdecode(path), "reason": reason})


def _reason(error):
    """What TensorFlow says of an image, without the frame that it puts around."""
    text = re.sub(r"\n\t .*$|\[Op:\w+\].*$", "", error.message, flags=re.S)
    text = re.sub(r"assertion failed: \[(.*?)\]", r"\1", text)
    text = text.rpartition("\n")[2] or text
    return re.sub(r"^(\{\{.*?\}\} |.*?\d root error\(s\) found\.)", "", text).strip()


def _pattern(images):
    """What Beam is to match: everything below a folder, or the pattern itself. Raises ArgumentError where nothing matches."""
    if "://" not in images and os.path.isdir(images):
        images = os.path.join(glob.escape(images), "**")
    elif images.endswith("/"):
        images += "**"
    if not FileSystems.match([images], limits=[1])[0].metadata_list:
        raise errors.ArgumentError(f"--images={images}: expected a folder or pattern of files, matches none. Quote patterns.")
    return images


def _check_output(output):
    patterns = [f"{glob.escape(output)}{kind}-*.jsonl" for kind in ("", ".bad")]
    old = [found.path for result in FileSystems.match(patterns) for found in result.metadata_list]
    if old:
        raise errors.ArgumentError(
            f"--output={output}: expected a new prefix, since a run with other shards would leave old lines beside new ones; "
            f"there are {len(old)} files already, such as {old[0]}. Remove them or name another prefix."
        )


def _beam_options(words):
    """Beam's options; ArgumentError for one that it does not know, which it would only log."""
    known, given = PipelineOptions([]), PipelineOptions(words)
    unknown = set(given.get_all_options(retain_unknown_options=True)) - set(known.get_all_options())
    stray = [word for word in words[:1] if not word.startswith("--")]
    if unknown or stray:
        raise errors.ArgumentError(
            f"expected options of this command or of Apache Beam {beam.__version__}, got {', '.join(sorted(unknown) + stray)}; "
            "see --help, and beam.apache.org for Beam's."
        )
    standard = given.view_as(StandardOptions)
    standard.runner = standard.runner or "FnApiRunner"
    return given


def main(argv=None):
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m export.beam_predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--module", required=True, help="folder of an exported module, the same on all workers")
    parser.add_argument("--images", required=True, help="a folder, all files below it; or a pattern, gs://bucket/photos/**.jpg")
    parser.add_argument("--output", required=True, help="beginning of the output files' paths")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once, by default 32")
    parser.add_argument(
        "--scores", choices=tuple(SCORES), help="what makes scores of logits; by default what the classes suggest"
    )
    parser.add_argument("--names", type=Path, help="text file with the name of a class on each line")
    given, rest = parser.parse_known_args(argv)
    if given.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {given.batch_size}")
    try:
        options, pattern = _beam_options(rest), _pattern(given.images)
        _check_output(given.output)
        names = given.names.read_text(encoding="utf-8").splitlines() if given.names else None
        pipeline = beam.Pipeline(options=options)
        settings = dict(batch_size=given.batch_size, scores=given.scores, names=names)
        lines, bad = predictions(pipeline, given.module, pattern, **settings)
    except (errors.KerasViTError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _ = lines | "Write" >> beam.io.WriteToText(given.output, ".jsonl")
    _ = bad | "WriteBad" >> beam.io.WriteToText(f"{given.output}.bad", ".jsonl")
    result = pipeline.run()
    result.wait_until_finish()
    found = result.metrics().query(MetricsFilter().with_namespace(_COUNTED))["counters"]
    counts = {counter.key.metric.name: counter.result for counter in found}
    predicted, bad = counts.get("predicted", 0), counts.get("bad", 0)
    print(f"{predicted:,} images in {given.output}-*.jsonl; {bad:,} bad files in {given.output}.bad-*.jsonl")
    return 0 if predicted else 1


if __name__ == "__main__":
    from export import beam_predict  # workers find these classes under that name, not in __main__

    sys.exit(beam_predict.main())
