"""Search over 1,000 images: `python -m benchmarks.search [LiT_mu] [--images=1000]`.

Makes images of random shapes and a model with random weights, as search costs the same with any, and prints

    index     images a second, in a process that is killed after half of them and in the one that goes on
    again     seconds to see that an index is up to date, which every search begins with: files looked at, weights digested
    search    milliseconds from a text to the sorted images, on an index that is open: `once`, as the command does, then the first
              of many, which compiles the text tower, and the median of 50
    sheet     seconds to draw and write the 12 best
    command   seconds of the whole command `keras-vit search`, of which most is the start of Python, TensorFlow and the model

and the images that the killed process had done and the next one did not do again. The index is checked: every image is in it
once, and the embeddings are those that the model gives now.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np
from PIL import Image, ImageDraw

import keras_vit
from keras_vit.data import pipeline
from keras_vit.evaluation import search
from keras_vit.explain import gradcam

EVERY = 100
ROUNDS = 50
TEXTS = ("two dogs on grass", "a red circle", "a photo of a small blue square on a white background")
CHILD = """
import os, signal, sys
import keras
import keras_vit
from keras_vit.evaluation import search
folder, model, after, every = sys.argv[1:]
def told(done, whole):
    if done >= int(after):
        os.kill(os.getpid(), signal.SIGKILL)
search.index(keras.saving.load_model(model), folder, every=int(every), progress=told)
"""


def paint(folder, count):
    """JPEG files of 320 x 240, in ten folders, of random shapes in random colours."""
    rng = np.random.default_rng(0)
    for number in range(count):
        image = Image.new("RGB", (320, 240), tuple(rng.integers(0, 256, 3).tolist()))
        draw = ImageDraw.Draw(image)
        for shape in (draw.ellipse, draw.rectangle) * 3:
            (x, y), (w, h) = rng.integers(0, 200, 2).tolist(), rng.integers(20, 120, 2).tolist()
            shape((x, y, x + w, y + h), tuple(rng.integers(0, 256, 3).tolist()))
        path = folder / f"{number % 10}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def build(name, folder):
    """A model with random weights and a vocabulary of its size: that of the toy, filled up."""
    words = (pathlib.Path(keras_vit.__file__).parent / "models" / "lit_words.txt").read_text(encoding="utf-8").split()
    size = keras_vit.zoo.VARIANTS[name].arguments["vocabulary_size"]
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join([*words, *(f"[unused{i}]" for i in range(size - len(words)))]) + "\n", encoding="utf-8")
    return keras_vit.create_model(name, weights=None, vocabulary=str(vocabulary))


def timed(run):
    """(what it returns, seconds)."""
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="LiT_mu", help="whose texts are of words, such as LiT_B16B_2")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        folder, file = root / "images", root / "model.keras"
        paint(folder, args.images)
        model = build(args.model, root)
        model.save(file)
        killed = subprocess.run([sys.executable, "-c", CHILD, folder, file, str(args.images // 2), str(EVERY)], check=False)
        found, seconds = timed(lambda: search.index(model, folder, every=EVERY))
        print(
            f"index     {found.added / seconds:,.0f} images/s; {args.images - found.added:,} were done by a process that was "
            f"killed (signal {-killed.returncode}), {found.added:,} after it, {len(found.broken)} broken"
        )
        check(model, folder, found, args.images)
        found, seconds = timed(lambda: search.index(model, folder))
        print(f"again     {seconds:.3f} s, {found.added} images embedded")
        _, once = timed(lambda: search.search(model, found, TEXTS[0], once=True))
        _, first = timed(lambda: search.search(model, found, TEXTS[0]))
        rounds = [timed(lambda text=TEXTS[i % 3]: search.search(model, found, text))[1] for i in range(ROUNDS)]
        print(
            f"search    {1e3 * once:.1f} ms once; {1e3 * first:.1f} ms the first, {1e3 * np.median(rounds):.1f} ms the median of "
            f"{ROUNDS}, {1e3 * max(rounds):.1f} ms the slowest, among {len(found.names):,} images"
        )
        hits = search.search(model, found, TEXTS[0])
        sheet = root / "sheet.png"
        _, seconds = timed(lambda: gradcam.save_png(sheet, search.contact_sheet(found, hits, TEXTS[0])))
        print(f"sheet     {seconds:.2f} s, {sheet.stat().st_size:,} bytes")
        command = [sys.executable, "-m", "keras_vit.console", "search", folder, TEXTS[0], f"--model={file}", f"--out={sheet}"]
        _, seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True))
        print(f"command   {seconds:.1f} s on {keras.config.backend()}")
    return 0


def check(model, folder, found, count):
    """Refuses an index that is not that of the folder."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")}
    some = np.random.default_rng(1).choice(count, min(count, 20), replace=False)
    size, pixels = model.image_tower.input_shape[1:3], keras_vit.zoo.pixels_of(model)
    images = [pipeline.eval_image(pipeline.read_image(folder / found.names[i]), size, pixels).numpy() for i in some]
    difference = np.abs(model.encode_image(np.stack(images)) - found.embeddings[some]).max()
    if len(found.names) != count or set(found.names) != names or difference > 1e-5:
        raise SystemExit(f"expected {count} images once each, as the model embeds them now; the difference is {difference:g}.")
    print(f"checked   {count:,} images; the embeddings of {len(some)} differ from those made now by {difference:.1e} at most")


if __name__ == "__main__":
    sys.exit(main())
