"""`report.md`: what a run was, how it went and what came out, for a person; its pictures lie in `report/` beside it."""

import collections
import dataclasses
import io
import pathlib
import platform
import re
import subprocess
import sys

import keras
import numpy as np
from ml_collections import ConfigDict

from keras_vit.checkpoints import files
from keras_vit.training import metrics
from keras_vit.training.callbacks import duration
from keras_vit.version import __version__

MATRIX_CLASSES = 30  # up to so many are a picture, more are a table of pairs
PAIRS = 20
MISTAKES = 24
PICTURES = ("curves.png", "confusion.png", "mistakes.png")
# Told apart with every form of colour blindness (Okabe and Ito, "Color Universal Design", 2008)
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


@dataclasses.dataclass(frozen=True)
class About:
    """What `write` cannot read from `metrics.jsonl`.

    Attributes:
        config: the run's; dataset, batch, seed, total_steps and grad_norm_clip are shown where it has them.
        model: its name.
        parameters: how many numbers are in its weights.
        strategy: name, such as "mirrored".
        devices: a name for each, such as ("CPU", "CPU").
        precision: name of the dtype policy.
        command: a shell's line that repeats the run.
        train_images, test_images: how many; None where unknown.
        class_names: of all classes, in order; empty to number them.
        evaluation: None, or an `evaluation.classify.Evaluation` of the test images.
        mistakes: (H, W, 3) uint8 images of `evaluation.worst`, in its order; may be fewer.
        resumed: steps after which the run was resumed.
    """

    config: ConfigDict
    model: str
    parameters: int
    strategy: str
    devices: tuple
    precision: str
    command: str
    train_images: int | None = None
    test_images: int | None = None
    class_names: tuple = ()
    evaluation: object = None
    mistakes: tuple = ()
    resumed: tuple = ()


def write(folder, about):
    """Writes `folder/report.md` and its pictures, each complete or not at all; those of an earlier report are replaced.

    Args:
        folder: of a run, with its `metrics.jsonl`.
        about: an `About`.

    Returns:
        The path of `report.md`.

    Raises:
        FileNotFoundError, DataError: `metrics.jsonl` is missing or damaged.
    """
    folder = pathlib.Path(folder)
    records = metrics.read(folder / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    names, pictures = _Names(about), {}
    sections = [
        [f"# {_escape(about.model)} on {_escape(about.config.get('dataset'))}", _outcome(about, records, steps)],
        ["## Run", _table(("what", "value"), _facts(about, records, steps))],
        _curves_section(about, records, steps, pictures),
        _confusion_section(about, names, pictures),
        _mistakes_section(about, names, pictures),
        ["## Repeat", _fence(about.command, "bash")],
        ["## Versions", _table(("what", "version"), _versions())],
        ["## Configuration", _fence(about.config.to_json_best_effort(indent=2), "json")],
    ]
    text = "\n\n".join(block for section in sections for block in section) + "\n"
    (folder / "report").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        _replace(folder / "report" / name, picture)
    _replace(folder / "report.md", text.encode("utf-8", "replace"))
    for name in set(PICTURES) - set(pictures):
        (folder / "report" / name).unlink(missing_ok=True)
    return folder / "report.md"


def _replace(path, content):
    with files.replacing(path) as temporary:
        pathlib.Path(temporary).write_bytes(content)


def commit():
    """The git commit of this package's source, with a word on changes; None outside of a repository."""
    package = pathlib.Path(__file__).parents[1]

    def git(*words):
        return subprocess.run(
            ["git", "-C", package, *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "version.py")  # or it is merely installed somewhere below a repository
        return git("rev-parse", "HEAD") + (", with uncommitted changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# What is said


def _outcome(about, records, steps):
    evaluation, config = about.evaluation, about.config
    accuracies = [record for record in records if record.get("accuracy_test") is not None]
    if evaluation is not None:
        low, high = evaluation.interval
        interval = f"95% Wilson interval {low:.2%} to {high:.2%}, n = {evaluation.examples:,}"
        result = f"**Test accuracy {evaluation.accuracy:.2%}** ({interval})"
    elif accuracies:
        result = f"**Test accuracy {accuracies[-1]['accuracy_test']:.2%}** at step {accuracies[-1]['step']:,}"
    else:
        result = "**Not evaluated**"
    if not steps:
        return f"{result}; no step was made."
    last, total = steps[-1]["step"], config.get("total_steps") or steps[-1]["step"]
    made = f"{_count(last, 'step')}" if last >= total else f"{last:,} of {total:,} steps"
    return (
        f"{result} after {made} in {duration(steps[-1]['seconds'])}; training loss {_number(steps[-1]['loss'])} at the last step."
    )


def _facts(about, records, steps):
    config, evaluation = about.config, about.evaluation
    classes = len(about.class_names) or (len(evaluation.class_accuracy) if evaluation is not None else 0)
    counts = [(about.train_images, "training image"), (about.test_images, "test image"), (classes or None, "class")]
    data = ", ".join(_count(number, word) for number, word in counts if number is not None)
    yield "model", f"{_escape(about.model)}, {about.parameters:,} parameters"
    yield "data", f"{_escape(config.get('dataset'))}{': ' if data else ''}{data}"
    if steps:
        last, batch = steps[-1]["step"], config.get("batch")
        epochs = f" ({last * batch / about.train_images:.3g} epochs)" if batch and about.train_images else ""
        yield "steps", f"{last:,}{' of ' + _count(batch, 'image') if batch else ''}{epochs}"
        yield "training time", f"{duration(steps[-1]['seconds'])}, compilation and evaluations included"
        ends = np.array([(record["step"], record["seconds"]) for record in steps])
        steps_between, times = np.diff(ends, axis=0).T
        times = times[times > 0] / steps_between[times > 0]  # a resumed run counts on from its checkpoint
        if len(times) and batch:
            typical = float(np.median(times))
            yield "speed", f"{batch / typical:,.4g} images/s (median step {_seconds(typical)})"
    if about.resumed:
        yield (
            "resumed",
            f"after {'step' if len(about.resumed) == 1 else 'steps'} {', '.join(f'{step:,}' for step in about.resumed)}",
        )
    yield "strategy", _escape(about.strategy)
    alike = collections.Counter(about.devices)
    yield "devices", ", ".join(f"{number} x {_escape(name)}" if number > 1 else _escape(name) for name, number in alike.items())
    yield "precision", _escape(about.precision)
    yield "seed", f"{config.get('seed')}"
    for name, value in {name: value for record in records if "loss" not in record for name, value in record.items()}.items():
        if name not in ("step", "accuracy_test"):
            yield f"`{name}`", "not finite" if value is None else f"{value:.4f}"
    if evaluation is not None:
        if evaluation.top5 is not None:
            yield "top-5 accuracy", f"{evaluation.top5:.2%}"
        yield "negative log-likelihood", f"{evaluation.nll:.4f}"
        yield "expected calibration error", f"{evaluation.ece:.2%}"
        if evaluation.real is not None:
            low, high = evaluation.real.interval
            of = f"(95% Wilson interval {low:.2%} to {high:.2%}, n = {evaluation.real.examples:,})"
            yield "accuracy against sets of labels (ReaL)", f"{evaluation.real.accuracy:.2%} {of}"


def _versions():
    yield "keras_vit", __version__
    found = commit()
    if found:
        yield "commit", f"`{found[:40]}`{found[40:]}"
    yield "Python", platform.python_version()
    yield "backend", keras.config.backend()
    for name in ("keras", "tensorflow", "jax", "torch", "numpy"):
        if name in sys.modules:
            yield name, sys.modules[name].__version__
    yield "system", _escape(f"{platform.system()} {platform.release()}, {platform.machine()}")


def _curves_section(about, records, steps, pictures):
    if not steps:
        return []
    pictures["curves.png"], shown = _draw_curves(about, records)
    course = f"the loss goes from {_number(steps[0]['loss'])} to {_number(steps[-1]['loss'])}"
    alt = f"{', '.join(shown)} over {_count(len(steps), 'step')}; {course}"
    return ["## Curves", f"![{_escape(alt)}](report/curves.png)", "The numbers of every step: [metrics.jsonl](metrics.jsonl)."]


def _confusion_section(about, names, pictures):
    if about.evaluation is None or about.evaluation.confusion is None:
        return []
    confusion = np.asarray(about.evaluation.confusion)
    classes, title = len(confusion), "## Confusion"
    wrong = confusion * (1 - np.eye(classes, dtype=confusion.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [(*np.unravel_index(place, wrong.shape), wrong.flat[place]) for place in order if wrong.flat[place]]
    worst = "no mistakes"
    if pairs:
        label, predicted, number = pairs[0]
        worst = f"most often {names.text(label)} is taken for {names.text(predicted)} ({number:,} of {confusion[label].sum():,})"
    if classes <= MATRIX_CLASSES:
        pictures["confusion.png"] = _draw_confusion(confusion, names)
        alt = f"Confusion matrix of {_count(classes, 'class')}: {worst}"
        return [title, f"![{_escape(alt)}](report/confusion.png)", *names.key(range(classes))]
    if not pairs:
        return [title, "No mistakes."]
    rows = (
        (_escape(names.text(label)), _escape(names.text(predicted)), f"{number:,}", f"{number / confusion[label].sum():.1%}")
        for label, predicted, number in pairs
    )
    return [
        title,
        f"The {_count(len(pairs), 'most confused pair')} of {_count(classes, 'class')}:",
        _table(("true class", "predicted", "images", "of the true class"), rows),
    ]


def _mistakes_section(about, names, pictures):
    if about.evaluation is None:
        return []
    title, worst = "## Worst mistakes", list(about.evaluation.worst)[:MISTAKES]
    if not worst:
        return [title, "None."]
    blocks = [title, "The wrong predictions of highest loss, that first."]
    images = list(about.mistakes)[: len(worst)]
    if images:
        pictures["mistakes.png"] = _draw_mistakes(images, worst, names)
        alt = f"The {_count(len(images), 'image')} of the worst mistakes with true and predicted class, as in the table below"
        blocks += [f"![{alt}](report/mistakes.png)", *names.key({each for _, *pair, _ in worst for each in pair})]
    rows = (
        (f"{index:,}", _escape(names.text(label)), _escape(names.text(predicted)), f"{probability:.1%}")
        for index, label, predicted, probability in worst
    )
    return [*blocks, _table(("test image", "true class", "predicted", "probability"), rows)]


class _Names:
    """Names of the classes, for the text and for pictures, whose font has not every letter."""

    def __init__(self, about):
        from matplotlib import font_manager

        self._names = [_plain(name) for name in about.class_names]
        self._letters = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()

    def text(self, number):
        return (self._names[number] if number < len(self._names) else "") or str(number)

    def drawable(self, number):
        return all(ord(letter) in self._letters for letter in self.text(number))

    def short(self, number, length):
        """For a picture: cut to `length` letters; the class's number where letters are missing."""
        name = self.text(number) if self.drawable(number) else f"class {number}"
        return name if len(name) <= length else name[: length - 1] + "…"

    def key(self, numbers):
        """A paragraph, or none, that names what pictures number."""
        odd = [f"class {number} is {_escape(self.text(number))}" for number in sorted(numbers) if not self.drawable(number)]
        return [f"In the picture {', '.join(odd)}."] if odd else []


# Pictures


def _figure(width, height):
    """A figure of so many inches; without pyplot, whose global state threads share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure):
    stored = io.BytesIO()
    figure.savefig(stored, format="png", bbox_inches="tight", pad_inches=0.12)
    return stored.getvalue()


def _series(records, name):
    """(steps, values) of the records that have it, NaN where it was not finite."""
    found = [(record["step"], np.nan if record[name] is None else record[name]) for record in records if name in record]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], float)


def _draw_curves(about, records):
    """Returns the picture and the titles of its panels."""
    panels = [
        ("Training loss", "loss"),
        ("Learning rate", "lr"),
        ("Gradient norm", "grad_norm"),
        ("Test accuracy", "accuracy_test"),
    ]
    panels = [(title, name) for title, name in panels if any(name in record for record in records)]
    figure = _figure(10, 6.6)
    places = figure.subplots(2, 2).flat
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, name) in zip(places, panels):
        x, y = _series(records, name)
        finite = y[np.isfinite(y)]
        _CURVES[name](axes, x, y, about)
        first = axes.get_subplotspec().is_first_row() and axes.get_subplotspec().is_first_col()
        for step in about.resumed:
            label = "resumed" if first and step == about.resumed[0] else None
            axes.axvline(step, color=GREY, linestyle=":", linewidth=1.2, label=label)
        last = "-" if not len(finite) else f"{finite[-1]:.2%}" if name == "accuracy_test" else _number(finite[-1])
        axes.set_title(f"{title} (last {last})", fontsize=12, loc="left")
        axes.set_xlabel("step", fontsize=11)
        axes.set_xlim(0, 1.03 * records[-1]["step"])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if len(x) == 1:
            axes.set_xticks(x)
        axes.tick_params(labelsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            place = "lower right" if name == "accuracy_test" else "best"
            axes.legend(fontsize=9, loc=place, framealpha=0.85, edgecolor="none")
    return _png(figure), [title for title, _ in panels]


def _draw_line(axes, x, y):
    marker = {"marker": "o", "markersize": 4} if len(x) <= 30 else {}
    axes.plot(x, y, color=BLUE, linewidth=1.8, **marker)


def _draw_noisy(axes, x, y):
    """Every value pale, with a running mean where there are many."""
    window = len(y) // 40
    if window < 2:
        return _draw_line(axes, x, y)
    axes.plot(x, y, color=BLUE, alpha=0.3, linewidth=0.8, label="each step")
    means = np.convolve(y, np.ones(window) / window, "valid")
    axes.plot(x[window - 1 :], means, color=BLUE, linewidth=2, label=f"mean of {window:,} steps")


def _draw_loss(axes, x, y, about):
    _draw_noisy(axes, x, y)
    axes.set_ylabel("loss", fontsize=11)


def _draw_rate(axes, x, y, about):
    _draw_line(axes, x, y)
    axes.set_ylabel("learning rate", fontsize=11)


def _draw_norm(axes, x, y, about):
    from matplotlib.ticker import LogLocator

    _draw_noisy(axes, x, y)
    limit = about.config.get("grad_norm_clip")
    if limit:
        axes.axhline(limit, color=ORANGE, linestyle="--", linewidth=1.5, label=f"clipped to {limit:g}")
    positive = y[y > 0]
    if len(positive) and positive.max() > 10 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if positive.max() < 1000 * positive.min() else (1,)))
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("norm before clipping", fontsize=11)


def _draw_accuracy(axes, x, y, about):
    axes.plot(x, 100 * y, color=BLUE, linewidth=1.8, marker="o", markersize=4)
    if about.evaluation is not None:
        low, high = (100 * value for value in about.evaluation.interval)
        axes.vlines(x[-1], low, high, color=ORANGE, linewidth=2.5, label="95% interval at the end")
    axes.set_ylabel("accuracy (%)", fontsize=11)


_CURVES = {"loss": _draw_loss, "lr": _draw_rate, "grad_norm": _draw_norm, "accuracy_test": _draw_accuracy}


def _draw_confusion(confusion, names):
    """Counts; blue for what is right, orange for mistakes, darker for a larger share of the true class."""
    from matplotlib import colormaps

    classes = len(confusion)
    totals = confusion.sum(axis=1)
    shares = confusion / np.maximum(totals, 1)[:, None]
    colours = colormaps["Oranges"](0.75 * np.sqrt(shares))  # the root lets single mistakes be seen
    diagonal = np.arange(classes)
    colours[diagonal, diagonal] = colormaps["Blues"](0.85 * shares[diagonal, diagonal])
    colours[confusion == 0] = 1.0
    labels = [names.short(number, 18) for number in range(classes)]
    own = [f"{share:.1%}" if total else "-" for share, total in zip(shares.diagonal(), totals)]
    cell = max(0.42 if classes <= 12 else 0.34, 2.5 / classes)  # inches
    font = 10 if classes <= 12 else 9
    upright = max(map(len, labels)) * 0.1 < cell
    figure = _figure(cell * classes + 2.6, cell * classes + (1.2 if upright else 2.2))
    axes = figure.subplots()
    axes.imshow(colours, aspect="equal")
    for row, column in np.argwhere(confusion):
        dark = colours[row, column, :3] @ (0.299, 0.587, 0.114) < 0.55
        style = dict(fontsize=font if confusion[row, column] < 1000 else 7, color="white" if dark else "black")
        axes.text(column, row, f"{confusion[row, column]}", ha="center", va="center", **style)
    axes.set_xticks(diagonal, labels, fontsize=font, rotation=0 if upright else 90, parse_math=False)
    axes.set_yticks(diagonal, labels, fontsize=font, parse_math=False)
    axes.set_xlabel("predicted class", fontsize=11)
    axes.set_ylabel("true class", fontsize=11)
    right = axes.secondary_yaxis("right")
    right.set_yticks(diagonal, own, fontsize=font)
    right.set_ylabel("accuracy of the class", fontsize=11)
    for each in (axes, right):
        each.tick_params(length=0)
    axes.set_xticks(np.arange(1, classes) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, classes) - 0.5, minor=True)
    axes.grid(which="minor", color="#DDDDDD", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set_title("Test images by true and predicted class", fontsize=12, loc="left")
    return _png(figure)


def _draw_mistakes(images, worst, names):
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = _figure(1.75 * max(columns, 2), 2.45 * rows)
    figure.get_layout_engine().set(h_pad=0.09)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, image, (_, label, predicted, probability) in zip(grid, images, worst):
        axes.set_axis_on()
        axes.imshow(image, interpolation="nearest")
        axes.set(xticks=(), yticks=())
        axes.set_title(f"true: {names.short(label, 18)}", fontsize=10, color=BLUE, parse_math=False)
        text = f"predicted: {names.short(predicted, 12)}\n{probability:.1%}"
        axes.set_xlabel(text, fontsize=10, color=ORANGE, parse_math=False)
    return _png(figure)


# Markdown


def _plain(text):
    """One line of printable letters."""
    return "".join(letter if letter.isprintable() else "�" for letter in " ".join(str(text).split()))


def _escape(text):
    """Keeps Markdown from reading anything into a text; an underscore inside a word means nothing to it."""
    return re.sub(r"[\\`*\[\]<>|~$&#]|\b_|_\b", r"\\\g<0>", _plain(text))


def _fence(text, language):
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _count(number, word):
    return f"{number:,} {word if number == 1 else word + ('es' if word.endswith('s') else 's')}"


def _number(value):
    return "not finite" if value is None else f"{value:.4g}"


def _seconds(value):
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
