"""How soon the web page of a LiT is ready, how long it takes for a picture and for typed labels, in headless Chromium.

    python -m benchmarks.web LiT_mu [--out=docs]

Builds the page with `export.web`, serves it from this machine, and opens it in fresh profiles, whose caches are empty.
"ready" is from the start of the navigation until the first picture's result is shown, "picture" from its pixels to its embedding
(the resizing in JavaScript and the image tower), "typed" from a key to the changed result, of which 120 ms are the rest that the
page waits for. --out also writes its pictures web.png and web_phone.png. Needs Chromium (`apt-get install chromium`) and
`pip install playwright`.
"""

import argparse
import contextlib
import functools
import http.server
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
READY = "html[data-ready]"
WIDE, PHONE = dict(width=1100, height=820), dict(width=375, height=812)  # of a window, in CSS pixels


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder):
        self.asked = []
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=os.fspath(folder)))

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # of a page that was closed
            super().handle_error(request, client_address)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.asked.append(self.path)


@contextlib.contextmanager
def serving(folder):
    """Yields a server of a folder's files: `.url`, and in `.asked` the path of each request."""
    with _Server(folder) as server:
        server.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def chromium():
    """The path of an installed Chromium or Chrome; None without one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def launch(kind, *flags):
    """A headless browser of playwright's `kind`, in which no other host than this machine has an address."""
    alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium's sandbox refuses
    return kind.launch(executable_path=chromium(), args=[alone, *sandbox, *flags])


@contextlib.contextmanager
def browsing(*flags):
    """Yields a Chromium; see `launch`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver, launch(driver.chromium, *flags) as browser:
        yield browser


def opened(context, url):
    """A page of a context, once it is ready."""
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(READY, timeout=60_000)
    return page


def milliseconds(page):
    """What the page says of its last picture."""
    return float(page.locator("dt", has_text="Last picture").locator("xpath=following-sibling::dd[1]").inner_text().split()[0])


def measure(browser, url, rounds):
    """{"ready", "picture", "typed"}: lists of milliseconds."""
    found = {"ready": [], "picture": [], "typed": []}
    for _ in range(rounds):
        context = browser.new_context(viewport=WIDE)
        page = opened(context, url)
        found["ready"].append(page.evaluate("Number(document.documentElement.dataset.ready)"))
        context.close()
    context = browser.new_context(viewport=WIDE)
    page = opened(context, url)
    page.get_by_text("Ready, also without a network.").wait_for(timeout=60_000)
    buttons = page.locator("#samples button")
    for i in range(3 * rounds):
        buttons.nth(i % buttons.count()).click()
        page.wait_for_timeout(150)
        found["picture"].append(milliseconds(page))
        found["typed"].append(page.evaluate(_TYPE, f"label {i}"))
    context.close()
    return found


_TYPE = """async (label) => {
  const area = document.getElementById("labels"), list = document.getElementById("results"), began = performance.now();
  const changed = new Promise((resolve) => new MutationObserver(resolve).observe(list, { childList: true }));
  area.value += `\\n${label}`;
  area.dispatchEvent(new Event("input"));
  await changed;
  return performance.now() - began;
}"""


def photograph(browser, url, folder):
    """Writes web.png, light and wide, and web_phone.png, dark and of a phone's width, down to the end of the results."""
    from PIL import Image

    for name, size, scheme in (("web.png", WIDE, "light"), ("web_phone.png", PHONE, "dark")):
        context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        page = opened(context, url)
        page.get_by_text("Ready, also without a network.").wait_for(timeout=60_000)
        box = page.locator("main > section").nth(1).bounding_box()
        clip = dict(x=0, y=0, width=size["width"], height=box["y"] + box["height"] + 16)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip)))
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(Path(folder, name), optimize=True)
        context.close()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as of export.web; or the folder of a page that was built")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="folder for the pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options, rest = parser.parse_known_args(argv)
    if chromium() is None:
        parser.error(f"expected one of {', '.join(BROWSERS)} on the PATH; apt-get install chromium")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.model)
        if not folder.is_dir():
            from export import web

            folder = Path(temporary, "page")
            if web.main([options.model, f"--out={folder}", *rest]):
                return 1
        load = os.getloadavg()[0]
        with serving(folder) as server, browsing() as browser:
            found = measure(browser, server.url, options.rounds)
            if options.out:
                photograph(browser, server.url, options.out)
    document = {key: round(statistics.median(values), 1) for key, values in found.items()}
    document |= {"rounds": options.rounds, "processors": os.cpu_count(), "load_before": round(load, 1)}
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        for key, value in document.items():
            print(f"{key.replace('_', ' ')}: {value}{' ms' if key in found else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
