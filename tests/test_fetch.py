"""Downloads, against a server on this machine.

The names in brackets are the rows of the list of faults that these tests are made from.
"""

import contextlib
import fcntl
import hashlib
import http.server
import io
import json
import os
import pathlib
import queue
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints import download, fetch, files

PATH = "vit_models/imagenet21k/ViT-B_16.npz"
SOURCE = f"gs://{PATH}"
BODY = random.Random(0).randbytes(200_000)
BIT = bytes([BODY[0] ^ 1]) + BODY[1:]  # one bit of it flipped


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as `server.answer` says: (status, body, announced length), a function of the handler, or a list of them in turn."""

    def do_GET(self):
        with self.server.guard:
            self.server.asked.append(self.path)
            self.server.ranges.append(self.headers.get("Range"))
            answer = self.server.answer
            if isinstance(answer, list):
                answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            answer(self)
        else:
            status, body, length = answer
            self.reply(status, body, Content_Length=length)

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Silent."""


def serve(body, etag='"v1"', cut=None, at=None, do=None, ranges=True):
    """An answer like that of a good file server.

    Args:
        cut: bytes of the file after which the connection ends.
        at: bytes of the file after which `do` is called, before the rest is sent.
        ranges: whether it knows `Range`.
    """

    def answer(handler):
        start, wanted = 0, handler.headers.get("Range")
        if ranges and wanted and handler.headers["If-Range"] == etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        handler.server.starts.append(start)
        part = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        handler.reply(206 if start else 200, Content_Length=len(body) - start, ETag=etag, **part)
        middle = start if at is None else max(at, start)
        with contextlib.suppress(OSError):  # nobody listens any more
            handler.wfile.write(body[start:middle])
            if do:
                do()
            handler.wfile.write(body[middle:cut])

    return answer


def reset(handler):
    """An answer that is none: the connection breaks."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.wfile = handler.rfile = io.BytesIO()


def chunked(body, end=True):
    """An answer without a stated length that marks its end, or breaks off before it."""

    def answer(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        handler.reply(
            200, b"%x\r\n%s\r\n" % (len(body), body) + (b"0\r\n\r\n" if end else b""), Transfer_Encoding="chunked", ETag='"v1"'
        )

    return answer


@pytest.fixture(autouse=True)
def _no_cache_yet_and_no_pauses(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "BACKOFF", 0)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server named by KERAS_VIT_BASE_URL; `answer` is (status, body, announced length), `asked` the paths."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked, running.ranges, running.starts, running.guard = [], [], [], threading.Lock()
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("KERAS_VIT_BASE_URL", f"http://127.0.0.1:{running.server_port}")
        yield running
        running.shutdown()
        thread.join()


CHILD = r"""
import json, os, resource, signal, sys, types
package = types.ModuleType("keras_vit")  # without its __init__, which imports Keras
package.__path__ = [sys.argv[1]]
sys.modules["keras_vit"] = package
from keras_vit import errors
from keras_vit.checkpoints import fetch

def run(source, force, most, nobody):
    done = []
    if most:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    if nobody:
        os.chdir(os.environ["KERAS_VIT_HOME"])
        os.environ["KERAS_VIT_HOME"] = "."
        if os.getuid() == 0:
            os.setuid(65534)
        sys.addaudithook(lambda event, args: event in WRITES and done.append(event) or
                         event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and done.append(args[0]))
    try:
        return ["Fetched", fetch.fetch(source, force=force).sha256, done]
    except errors.KerasViTError as error:
        return [type(error).__name__, str(error), done]

WRITES = {"socket.connect", "os.mkdir", "os.rename", "os.remove", "os.chmod", "os.utime"}
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    environment, *rest = json.loads(line)
    os.environ.update(environment)
    pid = os.fork()
    if pid == 0:
        os.write(1, (json.dumps([os.getpid(), *run(*rest)]) + "\n").encode())  # in one piece
        os._exit(0)
    os.write(1, (json.dumps([pid]) + "\n").encode())
"""


class Children:
    """Calls of `fetch` in processes of their own, forked from one that has imported it."""

    def __init__(self):
        command = [sys.executable, "-c", CHILD, str(pathlib.Path(keras_vit.__file__).parent)]
        self.parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.started, self.results, self.news = [], {}, threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.parent.stdout:
            pid, *result = json.loads(line)
            with self.news:
                self.results.update({pid: result} if result else {})
                self.started += [] if result else [pid]
                self.news.notify_all()

    def start(self, source=SOURCE, force=False, most=None, nobody=False):
        """Its process id."""
        environment = {name: value for name, value in os.environ.items() if name.startswith("KERAS_VIT_")}
        count = len(self.started)
        print(json.dumps([environment, source, force, most, nobody]), file=self.parent.stdin, flush=True)
        with self.news:
            assert self.news.wait_for(lambda: len(self.started) > count, 20)
            return self.started[-1]

    def result(self, pid):
        """["Fetched", sha256, what it wrote] or [class of the error, message, what it wrote]."""
        with self.news:
            assert self.news.wait_for(lambda: pid in self.results, 20), "still running"
            return self.results.pop(pid)


@pytest.fixture(scope="module")
def children():
    running = Children()
    yield running
    running.parent.stdin.close()
    running.parent.wait(20)


def calls(*sources):
    """Starts a call of `fetch` for each in a thread; returns where their results, or errors, come in."""
    results = queue.SimpleQueue()

    def call(source):
        try:
            results.put(fetch.fetch(source))
        except errors.KerasViTError as error:
            results.put(error)

    for source in sources:
        threading.Thread(target=call, args=(source,), daemon=True).start()
    return results


def digest(body):
    return hashlib.sha256(body).hexdigest()


def final(tmp_path, path=PATH):
    return tmp_path / "home" / "storage.googleapis.com" / path


def parts(tmp_path):
    return list((tmp_path / "home").rglob("*.part"))


def lock(tmp_path):
    return json.loads((tmp_path / "home" / "keras_vit.lock").read_text())


# -- sources, cache, lock file


def test_a_file_is_downloaded_once_recorded_and_verified_ever_after(server, tmp_path):
    server.answer = (200, b"weights", 7)
    found = fetch.fetch(SOURCE)
    assert found == (final(tmp_path), digest(b"weights"))
    assert found.path.read_bytes() == b"weights"
    assert fetch.fetch(SOURCE) == fetch.fetch(f"https://storage.googleapis.com/{PATH}") == found
    assert server.asked == [f"/{PATH}"]
    assert lock(tmp_path) == {SOURCE: {"sha256": digest(b"weights"), "size": 7}}
    assert fetch.cached() == [(SOURCE, found.path, 7)]


def test_a_plus_in_a_name_is_escaped_and_equal_basenames_stay_apart(server):
    server.answer = (200, b"one", 3)
    one = fetch.fetch("gs://vit_models/imagenet21k+imagenet2012/ViT-B_16.npz")
    server.answer = (200, b"two", 3)
    two = fetch.fetch("gs://vit_models/sam/ViT-B_16.npz")
    assert (one.path.read_bytes(), two.path.read_bytes()) == (b"one", b"two")
    assert server.asked[0] == "/vit_models/imagenet21k%2Bimagenet2012/ViT-B_16.npz"


def test_a_source_has_one_url_and_what_is_cached_is_listed_by_its_source(tmp_path, monkeypatch):
    plus = "gs://vit_models/imagenet21k+imagenet2012/ViT-B_16.npz"
    there = "https://storage.googleapis.com/vit_models/imagenet21k%2Bimagenet2012/ViT-B_16.npz"
    assert fetch.url(plus) == fetch.url(there) == fetch.url(there.replace("%2B", "+")) == there
    assert fetch.url("HTTPS://Example.org:8443/a%20b.npz") == "https://example.org:8443/a%20b.npz"
    for path in ("storage.googleapis.com/vit_models/imagenet21k+imagenet2012/ViT-B_16.npz", "example.org_8443/a b.npz"):
        (tmp_path / "home" / path).parent.mkdir(parents=True)
        (tmp_path / "home" / path).write_bytes(b"x")
    assert [source for source, _, _ in fetch.cached()] == ["https://example.org:8443/a%20b.npz", plus]
    monkeypatch.setenv("KERAS_VIT_BASE_URL", "https://mirror.example.org/models/")
    assert fetch.url(SOURCE) == f"https://mirror.example.org/models/{PATH}"
    assert fetch.url("https://example.org/x.npz") == "https://example.org/x.npz"
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path))
    assert fetch.url(SOURCE) == f"file://{tmp_path}/{PATH}"


def test_files_of_hugging_face_have_their_public_url():
    there = "https://huggingface.co/timm/deit_tiny_patch16_224.fb_in1k/resolve/main/model.safetensors"
    assert fetch.url("hf://timm/deit_tiny_patch16_224.fb_in1k/model.safetensors") == there
    assert fetch.url("hf://a/b/c/d.npz@v1.0") == "https://huggingface.co/a/b/resolve/v1.0/c/d.npz"
    assert zoo.find_weights("timm/deit_tiny_patch16_224.fb_in1k", "x").source == there.replace(
        "https://huggingface.co", "hf:/"
    ).replace("/resolve/main", "")


def test_what_lies_under_a_name_that_timm_has_too_is_taken_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "deit").write_bytes(b"x")
    assert zoo.find_weights("timm/deit", "x").source == "timm/deit"


@pytest.mark.parametrize("ending", [".pth", ".pt", ".pth.tar", ".pyth"])
def test_a_name_that_carries_the_beginning_of_its_sha256_is_held_to_it(server, ending):
    """[D3]"""
    server.answer = serve(BODY)
    for wrong in (f"gs://a/deit-00000000{ending}", f"gs://a/deit-20210101-00000000{ending}"):
        for _ in range(2):
            with pytest.raises(errors.IntegrityError, match=f"sha256 begins with 00000000, as its name says, got {digest(BODY)}"):
                fetch.fetch(wrong)
        assert fetch.cached() == [] and not fetch.lock_file().exists()
    right = f"gs://a/deit-{digest(BODY)[:8]}{ending}"
    assert fetch.fetch(right).path.read_bytes() == BODY
    fetch.fetch(f"gs://a/deit-20210101{ending}")  # a date
    fetch.fetch("gs://a/deit-00000000.npz")  # nothing that a hub wrote


def test_a_local_path_is_used_as_it_is(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"x")
    assert fetch.fetch(tmp_path / "x.npz") == (tmp_path / "x.npz", None)
    with pytest.raises(errors.ArgumentError, match="check the path"):
        fetch.fetch(str(tmp_path / "y.npz"))
    assert not (tmp_path / "home").exists()


def test_a_base_folder_serves_the_same_paths_without_a_network_and_is_held_by_the_lock_file(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path))
    monkeypatch.setenv("KERAS_VIT_OFFLINE", "1")
    with pytest.raises(errors.DownloadError, match=f"no file {PATH}"):
        fetch.fetch(SOURCE)
    (tmp_path / PATH).parent.mkdir(parents=True)
    (tmp_path / PATH).write_bytes(b"x")
    found = (tmp_path / PATH, digest(b"x"))
    assert fetch.fetch(SOURCE) == fetch.fetch(f"https://storage.googleapis.com/{PATH}") == found
    (tmp_path / PATH).write_bytes(b"y")
    with pytest.raises(errors.IntegrityError, match=f"expected sha256 {digest(b'x')}.* got sha256 {digest(b'y')}"):
        fetch.fetch(SOURCE)
    assert (tmp_path / PATH).read_bytes() == b"y"


def test_another_mirror_is_held_by_the_same_record(server, tmp_path):
    server.answer = serve(BODY)
    fetch.fetch(SOURCE).path.unlink()
    server.answer = serve(BIT, etag='"other"')
    with pytest.raises(errors.IntegrityError, match=str(tmp_path / "home" / "keras_vit.lock")):
        fetch.fetch(f"https://storage.googleapis.com/{PATH}")


def test_a_lock_file_can_be_kept_anywhere_and_a_cached_file_enters_it_unchanged(server, tmp_path, monkeypatch):
    server.answer = serve(BODY)
    fetch.fetch(SOURCE)
    project = tmp_path / "project" / "weights.lock"
    monkeypatch.setenv("KERAS_VIT_LOCK", str(project))
    assert fetch.fetch(SOURCE).sha256 == digest(BODY)
    assert json.loads(project.read_text()) == lock(tmp_path)
    assert len(server.asked) == 1


def test_parallel_first_downloads_all_enter_the_lock_file(server, tmp_path, monkeypatch):
    replacing = files.replacing
    monkeypatch.setattr(files, "replacing", lambda path: time.sleep(0.05) or replacing(path))
    server.answer = serve(BODY[:1000])
    sources = [f"gs://bucket/{i}.npz" for i in range(4)]
    results = calls(*reversed(sources))
    for _ in sources:
        assert isinstance(results.get(timeout=20), fetch.Fetched)
    assert list(lock(tmp_path)) == sources


def test_of_two_first_uses_at_once_the_first_recorded_counts(server, tmp_path, monkeypatch):
    class Lock(fetch.filelock.FileLock):
        def __enter__(self):
            if self.lock_file.endswith(".writing"):  # another process has just been here
                fetch.lock_file().write_text(json.dumps({SOURCE: {"sha256": digest(BODY), "size": len(BODY)}}))
            return super().__enter__()

    monkeypatch.setattr(fetch.filelock, "FileLock", Lock)
    server.answer = serve(BIT)
    with pytest.raises(errors.IntegrityError, match=digest(BODY)):
        fetch.fetch(SOURCE)
    assert lock(tmp_path)[SOURCE]["sha256"] == digest(BODY)


def test_digests_may_be_upper_case(server, tmp_path):
    """[D19]"""
    server.answer = serve(BODY)
    fetch.fetch(SOURCE)
    (tmp_path / "home" / "keras_vit.lock").write_text(json.dumps({SOURCE: {"sha256": digest(BODY).upper(), "size": len(BODY)}}))
    assert fetch.fetch(SOURCE).sha256 == digest(BODY)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "text, match",
    [
        ("<<<<<<< HEAD", "in JSON"),
        ("[]", "object of sources"),
        ('{"gs://a/b": "0"}', "gs://a/b"),
        (json.dumps({"gs://a/b": {"sha256": 63 * "0", "size": 1}}), "gs://a/b.*64 hex"),
        (json.dumps({"gs://a/b": {"sha256": 64 * "g", "size": 1}}), "gs://a/b"),
        (json.dumps({"gs://a/b": {"sha256": 64 * "0"}}), "gs://a/b"),
        (json.dumps({"gs://a/b": {"sha256": 64 * "0", "size": "1"}}), "gs://a/b"),
    ],
)
def test_a_malformed_lock_file_is_refused_by_name_and_left_as_it_is(server, tmp_path, text, match):
    """[D19]"""
    server.answer = serve(BODY)
    path = tmp_path / "home" / "keras_vit.lock"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(errors.CacheError, match=f"keras_vit.lock.*{match}"):
        fetch.fetch(SOURCE)
    assert path.read_text() == text
    assert not final(tmp_path).exists()


@pytest.mark.parametrize(
    "source",
    ["http://example.com/x.npz", "file:///etc/hostname", "ftp://host/x", "gs://bucket/../x", "https://host/", "https://host/a/%2e%2e/x",
     "hf://a/b", "hf://a//b", "hf://a/b/../c", "hf://a/b/c@d@e", "hf://a/b/c@..",
     "https://host/.x.npz", "https://user@host/x", "https://host/x?y=1", "https://[host/x", "gs://bucket//x", "gs://bucket/a\0b"],
)  # fmt: skip
def test_other_schemes_and_paths_that_climb_are_refused(source):
    """[D17]"""
    with pytest.raises(errors.DownloadError, match="expected (gs|hf|a host)"):
        fetch.fetch(source)


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/hostname",
        "http://localhost:1/x",
        "https://127.0.0.1.example.org/x",
        "ftp://127.0.0.1:{}/x",
        "https://hf.co.example.org/x",
        "https://example.org:443.hf.co/x",
        "https://user@us.aws.cdn.hf.co/x",
        "http://127.0.0.1/",
    ],
)
def test_a_redirect_to_another_host_or_scheme_is_not_followed(server, tmp_path, target):
    """[D17]"""
    target = target.format(server.server_port)
    server.answer = lambda handler: handler.reply(302, Location=target, Content_Length=0)
    with pytest.raises(errors.DownloadError, match=f"{PATH}: redirects to {target}"):
        fetch.fetch(SOURCE)
    assert len(server.asked) == 1
    assert not final(tmp_path).exists()


@pytest.mark.parametrize("target", ["http://[x", "/there"])
def test_a_redirect_to_no_address_or_in_circles_is_an_error(server, target):
    server.answer = lambda handler: handler.reply(302, Location=target, Content_Length=0)
    with pytest.raises(errors.DownloadError, match="could not be downloaded"):
        fetch.fetch(SOURCE)


def test_redirects_are_followed_on_the_same_host_and_to_allowed_ones(server, monkeypatch):
    """[D17]"""
    server.answer = [lambda handler: handler.reply(302, Location="/there", Content_Length=0), serve(BODY)]
    assert fetch.fetch(SOURCE).sha256 == digest(BODY)
    assert server.asked == [f"/{PATH}", "/there"]
    looked_up = []
    real = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        looked_up.append(host)
        if host == "127.0.0.1":
            return real(host, *args, **kwargs)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    server.answer = lambda handler: handler.reply(302, Location="https://storage.googleapis.com/x", Content_Length=0)
    with pytest.raises(errors.DownloadError, match="no network"):
        fetch.fetch("gs://a/b")
    assert looked_up[-1] == "storage.googleapis.com"
    for host in (
        "us.aws.cdn.hf.co",
        "cas-bridge.xethub.hf.co",
        "cdn-lfs-us-1.huggingface.co",
        "release-assets.githubusercontent.com",
    ):
        server.answer = lambda handler, host=host: handler.reply(302, Location=f"https://{host}/x?y=1", Content_Length=0)
        with pytest.raises(errors.DownloadError, match="no network"):
            fetch.fetch("gs://a/b")
        assert looked_up[-1] == host


def test_offline_serves_the_cache_and_lists_it_without_a_socket(server, tmp_path, monkeypatch):
    """[D16]"""
    server.answer = serve(BODY)
    found = fetch.fetch(SOURCE)
    monkeypatch.setenv("KERAS_VIT_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("opened a socket"))
    assert fetch.fetch(SOURCE) == found
    with pytest.raises(errors.CacheError, match=rf"(?s)gs://a/b: .*KERAS_VIT_OFFLINE.*{SOURCE} \(200,000 bytes\)"):
        fetch.fetch("gs://a/b")
    found.path.write_bytes(BIT)
    with pytest.raises(errors.CacheError, match="no intact copy"):
        fetch.fetch(SOURCE)
    with pytest.raises(errors.CacheError, match="anew"):
        fetch.fetch(SOURCE, force=True)


# -- what a server may do


@pytest.mark.parametrize(
    "answer, size, error, match",
    [
        ((200, b"half", 8), None, errors.IntegrityError, "could not be downloaded"),
        ((200, b"<html>sign in</html>", 20), 400_000_000, errors.IntegrityError, "got 20"),
        (
            lambda handler: handler.reply(200, b"x", Content_Encoding="gzip", Content_Length=1),
            None,
            errors.IntegrityError,
            "gzip",
        ),
    ],
)
def test_a_failed_download_leaves_nothing_behind(server, tmp_path, answer, size, error, match):
    server.answer = answer
    with pytest.raises(error, match=match):
        fetch.fetch(SOURCE, size)
    assert fetch.cached() == parts(tmp_path) == []
    assert not fetch.lock_file().exists()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418, 501])
def test_a_refusal_is_not_asked_again(server, status):
    """[D7] What else there is to try is named in general: a mirror or a folder; the names of other files are not known here."""
    server.answer = (status, b"no", 2)
    with pytest.raises(errors.DownloadError, match=rf"{PATH}: .*HTTP {status}.*KERAS_VIT_BASE_URL"):
        fetch.fetch(SOURCE)
    assert len(server.asked) == 1


@pytest.mark.parametrize("fault", [(429, b"", 0), (500, b"", 0), (502, b"", 0), (503, b"", 0), (504, b"", 0), reset])
def test_a_passing_fault_is_tried_again_with_growing_pauses_and_five_times_at_most(server, monkeypatch, fault):
    """[D8]"""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(download, "BACKOFF", 0.5)
    server.answer = [fault] * 4 + [serve(BODY)]
    assert fetch.fetch(SOURCE).sha256 == digest(BODY)
    assert (len(server.asked), pauses) == (5, [1, 2, 4])
    server.answer = fault
    with pytest.raises(errors.DownloadError, match="could not be downloaded"):
        fetch.fetch("gs://a/b")
    assert len(server.asked) == 10


def test_a_servers_own_pause_is_kept_within_bounds(server, monkeypatch):
    """[D8]"""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    busy = [lambda handler, after=after: handler.reply(503, Retry_After=after, Content_Length=0) for after in ("7", "1000000")]
    server.answer = [*busy, serve(BODY)]
    assert fetch.fetch(SOURCE).sha256 == digest(BODY)
    assert pauses == [7, download.RETRY_AFTER]
    server.answer = lambda handler: handler.reply(503, Retry_After="soon", Content_Length=0)
    with pytest.raises(errors.DownloadError, match="HTTP 503"):
        fetch.fetch("gs://a/b")


def test_a_server_that_is_not_there_is_named_at_once(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    monkeypatch.setenv("KERAS_VIT_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(errors.DownloadError, match=f"http://127.0.0.1:9/{PATH}"):
        fetch.fetch(SOURCE)


def silent(handler):
    handler.server.hold.wait(20)


@pytest.mark.parametrize("cut, asked", [(None, 1), (0, 1), (50_000, 2)])
def test_a_stalled_server_fails_within_the_time_out(server, tmp_path, monkeypatch, cut, asked):
    """[D9] Silence before an answer, before the body, in it: the call returns while the server still holds it back."""
    monkeypatch.setattr(download, "READ_TIMEOUT", 0.3)
    server.hold = threading.Event()
    server.answer = silent if cut is None else [serve(BODY, at=cut, do=lambda: server.hold.wait(20)), silent]
    with pytest.raises(errors.DownloadError, match="no byte for 0.3 seconds|timed out"):
        fetch.fetch(SOURCE)
    assert not server.hold.is_set()
    assert len(server.asked) == asked
    assert sum(part.stat().st_size for part in parts(tmp_path)) == (cut or 0)
    server.hold.set()
    server.answer = serve(BODY)
    assert fetch.fetch(SOURCE).sha256 == digest(BODY)
    assert server.ranges[-1] == (f"bytes={cut - 1}-" if cut else None)


def test_a_page_with_status_200_is_refused_by_name(server, tmp_path):
    """[D4]"""
    page = b"<html>" + 42 * b"x"
    server.answer = lambda handler: handler.reply(200, page, Content_Type="text/html; charset=utf-8", Content_Length=48)
    with pytest.raises(errors.IntegrityError, match="server sent text/html, 48 bytes"):
        fetch.fetch(SOURCE)
    assert fetch.cached() == parts(tmp_path) == []


def test_a_page_under_the_name_of_a_checkpoint_is_refused_as_what_it_is(server):
    server.answer = (200, b"<html>sign in</html>", 20)
    with pytest.raises(errors.CheckpointFormatError, match="HTML"):
        keras_vit.load_weights(randomise(keras_vit.ViT_mu(weights=None)), SOURCE)


def test_a_server_is_asked_for_plain_bytes(server):
    def answer(handler):
        plain = handler.headers["Accept-Encoding"] == "identity"
        handler.reply(200, BODY, Content_Length=len(BODY), Content_Encoding=None if plain else "gzip")

    server.answer = answer
    assert fetch.fetch(SOURCE).sha256 == digest(BODY)


def test_a_body_cut_short_is_continued_where_it_ended(server, tmp_path):
    """[D5]"""
    server.answer = [serve(BODY, cut=70_000), serve(BODY, cut=150_000), serve(BODY)]
    assert fetch.fetch(SOURCE).path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=69999-", "bytes=149999-"]
    assert parts(tmp_path) == []


def test_a_body_cut_short_again_and_again_is_an_error_and_continued_by_the_next_call(server, tmp_path):
    """[D5]"""
    server.answer = [serve(BODY, cut=cut) for cut in (10, 20, 30, 40, 50)]
    with pytest.raises(errors.IntegrityError, match="next call goes on after 50 bytes"):
        fetch.fetch(SOURCE)
    assert not final(tmp_path).exists()
    server.answer = serve(BODY)
    assert fetch.fetch(SOURCE).path.read_bytes() == BODY
    assert server.ranges[5:] == ["bytes=49-"]


def test_a_body_of_unknown_length_is_whole_when_its_end_is_marked(server):
    """[D5] Without a length a cut is seen in a chunked body. In a bare one it could not be, so that is refused at once."""
    server.answer = chunked(BODY)
    assert fetch.fetch("gs://a/whole").sha256 == digest(BODY)
    server.answer = [chunked(BODY[:70_000], end=False), serve(BODY)]
    assert fetch.fetch("gs://a/cut").sha256 == digest(BODY)
    assert server.ranges[-1] == "bytes=69999-"
    server.answer = lambda handler: handler.reply(200, BODY, ETag='"v1"')
    with pytest.raises(errors.IntegrityError, match="states no length"):
        fetch.fetch("gs://a/bare")


def spliced(handler):
    """A 206 answer of another version than asked for."""
    handler.reply(206, BIT[99:], ETag='"v2"', Content_Range=f"bytes 99-{len(BIT) - 1}/{len(BIT)}", Content_Length=len(BIT) - 99)


def shifted(handler):
    """A 206 answer of one byte before the place asked for."""
    handler.reply(
        206, BODY[98:-1], ETag='"v1"', Content_Range=f"bytes 98-{len(BODY) - 2}/{len(BODY)}", Content_Length=len(BODY) - 99
    )


@pytest.mark.parametrize(
    "then, asked",
    [
        ([serve(BIT, etag='"v2"')], 2),  # answers If-Range with the whole of another version
        ([serve(BIT, etag='"v2"', ranges=False)], 2),
        ([serve(BIT, etag='"v1"', ranges=False)], 2),  # ignores Range
        ([spliced, serve(BIT, etag='"v2"')], 3),
        ([shifted, serve(BIT, etag='"v2"')], 3),
        ([lambda handler: (spliced if handler.headers["Range"] else serve(BIT))(handler)], 3),
        ([(416, b"", 0), serve(BIT, etag='"v2"')], 3),
    ],
)
def test_bytes_of_two_versions_never_meet(server, then, asked):
    """[D6]"""
    server.answer = [serve(BODY, cut=100), *then]
    assert fetch.fetch(SOURCE).path.read_bytes() == BIT
    assert len(server.asked) == asked


def test_once_there_is_a_newer_version_that_is_continued(server):
    """[D6]"""
    server.answer = [serve(BODY, cut=100), serve(BIT, etag='"v2"', cut=50_000), serve(BIT, etag='"v2"')]
    assert fetch.fetch(SOURCE).path.read_bytes() == BIT
    assert server.ranges == [None, "bytes=99-", "bytes=49999-"]


@pytest.mark.parametrize("etag", [None, 'W/"v1"', '"' + 300 * "x" + '"'])
def test_what_cannot_be_verified_is_not_continued(server, tmp_path, etag):
    """[D6]"""
    server.answer = serve(BODY, etag=etag, cut=100)
    with pytest.raises(errors.IntegrityError, match="nothing was kept"):
        fetch.fetch(SOURCE)
    assert parts(tmp_path) == []
    (final(tmp_path).with_name(".ViT-B_16.npz") / "~0.part").write_bytes(BODY[:100])  # as a kill leaves it
    server.answer = [serve(BODY, etag=etag, cut=100), (500, b"", 0), serve(BODY, etag=etag)]
    assert fetch.fetch(SOURCE).path.read_bytes() == BODY
    assert server.ranges == [None] * 8
    assert parts(tmp_path) == []


def test_an_answer_that_gives_less_than_the_rest_is_continued(server):
    def little(handler):
        handler.reply(206, BODY[99:200], ETag='"v1"', Content_Range=f"bytes 99-199/{len(BODY)}", Content_Length=101)

    server.answer = [serve(BODY, cut=100), little, serve(BODY)]
    assert fetch.fetch(SOURCE).path.read_bytes() == BODY
    assert server.ranges[-1] == "bytes=199-"


def test_wrong_bytes_are_refused_and_never_served(server, tmp_path):
    """[D3]"""
    server.answer = serve(BODY)
    fetch.fetch(SOURCE).path.unlink()
    server.answer = serve(BIT, etag='"v2"')
    for _ in range(2):
        with pytest.raises(
            errors.IntegrityError, match=f"(?s)expected sha256 {digest(BODY)}.*got sha256 {digest(BIT)}.*delete the record"
        ):
            fetch.fetch(SOURCE)
        assert fetch.cached() == parts(tmp_path) == []
    server.answer = serve(BODY[:-1], etag='"v3"')
    with pytest.raises(errors.IntegrityError, match="got 199,999 bytes"):
        fetch.fetch(SOURCE)
    fetch.lock_file().unlink()
    assert fetch.fetch(SOURCE).sha256 == digest(BODY[:-1])


# -- what may happen to the cache


def flip(path):
    times = path.stat()
    path.write_bytes(BIT)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("alter", [flip, swap, lambda path: path.write_bytes(b"")])
def test_an_altered_cached_file_is_downloaded_again_once(server, tmp_path, alter, caplog):
    """[D18]"""
    server.answer = serve(BODY)
    found = fetch.fetch(SOURCE)
    alter(found.path)
    assert fetch.fetch(SOURCE) == fetch.fetch(SOURCE) == found
    assert found.path.read_bytes() == BODY
    assert not found.path.is_symlink()
    assert len(server.asked) == 2
    assert caplog.text.count("downloaded again") == 1


def test_an_altered_cached_file_does_not_outlive_the_refusal_of_fresh_bytes(server, tmp_path):
    """[D18] Else it would be recorded as good once the user deletes the record, as the message says."""
    server.answer = serve(BODY)
    found = fetch.fetch(SOURCE)
    found.path.write_bytes(b"altered")
    server.answer = serve(BIT, etag='"v2"')
    with pytest.raises(errors.IntegrityError):
        fetch.fetch(SOURCE)
    assert fetch.cached() == []


def test_a_failed_refresh_leaves_the_old_file(server, caplog):
    """[D13]"""
    server.answer = serve(BODY)
    found = fetch.fetch(SOURCE)
    for answer, error in (((500, b"", 0), errors.DownloadError), (serve(BIT, etag='"v2"'), errors.IntegrityError)):
        server.answer = answer
        with pytest.raises(error):
            fetch.fetch(SOURCE, force=True)
        assert found.path.read_bytes() == BODY
    server.answer = serve(BODY)
    asked = len(server.asked)
    assert fetch.fetch(SOURCE, force=True) == fetch.fetch(SOURCE) == found
    assert len(server.asked) == asked + 1
    assert caplog.text == ""


def test_a_file_larger_than_the_disk_is_refused_before_its_body(server, tmp_path, monkeypatch):
    """[D10]"""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=199_999))
    server.answer = serve(BODY)
    with pytest.raises(errors.CacheError, match=r"200,000 bytes, 199,999 are free.*KERAS_VIT_HOME"):
        fetch.fetch(SOURCE)
    assert parts(tmp_path) == []


def test_a_disk_that_fills_up_costs_only_the_new_file(server, children, tmp_path):
    """[D10] The limit on a file's size stands for the full disk; writing fails in the same way."""
    server.answer = serve(b"old")
    found = fetch.fetch(SOURCE)
    fetch.lock_file().unlink()
    server.answer = serve(BODY, etag='"v2"')
    kind, message, _ = children.result(children.start(force=True, most=100_000))
    assert kind == "CacheError", message
    assert "KERAS_VIT_HOME" in message
    assert found.path.read_bytes() == b"old"
    assert parts(tmp_path) == []


def read_only(folder):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_read_only_cache_serves_what_it_has_without_a_write_or_a_request(server, children, tmp_path):
    """[D11]"""
    server.answer = serve(BODY)
    fetch.fetch(SOURCE)
    read_only(tmp_path / "home")
    assert children.result(children.start(nobody=True)) == ["Fetched", digest(BODY), []]
    assert len(server.asked) == 1


def test_a_read_only_cache_refuses_what_it_lacks_by_name(server, children, tmp_path):
    """[D12]"""
    server.answer = serve(BODY)
    fetch.fetch(SOURCE)
    read_only(tmp_path / "home")
    for other in ("gs://vit_models/other.npz", "gs://vit_models/imagenet21k/other.npz"):
        kind, message, _ = children.result(children.start(other, nobody=True))
        assert (kind, "KERAS_VIT_HOME" in message) == ("CacheError", True), message
    assert len(server.asked) == 1


def test_an_unwritable_cache_is_named(server, tmp_path, monkeypatch):
    """[D12]"""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "file"))
    with pytest.raises(errors.CacheError, match="KERAS_VIT_HOME"):
        fetch.fetch(SOURCE)


def test_an_unwritable_lock_file_is_named(server, monkeypatch):
    server.answer = serve(BODY)
    for path in ("/proc/none/x.lock", "/dev/null/x.lock"):
        monkeypatch.setenv("KERAS_VIT_LOCK", path)
        with pytest.raises(errors.CacheError, match="KERAS_VIT_LOCK"):
            fetch.fetch(SOURCE)
    assert fetch.cached() == []


@pytest.mark.parametrize("change, words", [
    (lambda home: home.chmod(0o777), r"may be written by everybody \(mode 777\)"),
    (lambda home: os.chown(home, 12345, -1), "belongs to user 12345"),
    (lambda home: home.chmod(0o755), None),
])  # fmt: skip
def test_a_cache_in_the_hands_of_others_is_told_once(change, words, server, tmp_path, caplog):
    """[S4]"""
    server.answer = serve(BODY)
    (tmp_path / "home").mkdir()
    try:
        change(tmp_path / "home")
    except PermissionError:
        pytest.skip("only root gives a folder away")
    for _ in range(2):
        assert fetch.fetch(SOURCE).sha256 == digest(BODY)
    told = [record.getMessage() for record in caplog.records if "trust" in record.getMessage()]
    assert len(told) == (1 if words else 0)
    assert not words or re.search(f"home {words}; .*KERAS_VIT_HOME", told[0])


# -- several processes, and dying ones


@pytest.mark.parametrize("turn", range(3))
def test_eight_processes_share_one_download(server, children, turn):
    """[D2]"""
    server.answer = serve(BODY, at=100_000, do=lambda: time.sleep(0.3))
    results = [children.result(pid) for pid in [children.start() for _ in range(8)]]
    assert results == [["Fetched", digest(BODY), []]] * 8
    assert len(server.asked) == 1


def test_fifty_downloads_killed_at_random_bytes_all_end_right_and_fetch_little_twice(server, children, tmp_path):
    """[D1] Every other kill comes when all that was sent is on disk, so that it is known what must not be fetched again."""
    rng, again = random.Random(0), 0
    for i in range(50):
        path, body, waits = f"bucket/{i}.npz", rng.randbytes(rng.randrange(2, 200_000)), i % 2
        stop = rng.randrange(len(body) + (not waits))
        victim, partial, killed = queue.SimpleQueue(), [], threading.Event()

        def kill(path=path, body=body, waits=waits, stop=stop, victim=victim, partial=partial, killed=killed):
            pid = victim.get(timeout=20)
            while waits and sum(part.stat().st_size for part in parts(tmp_path)) < stop:
                time.sleep(0.001)
            partial.append(final(tmp_path, path).exists() and final(tmp_path, path).read_bytes() != body)
            with contextlib.suppress(ProcessLookupError):  # it may be done when everything was sent
                os.kill(pid, signal.SIGKILL)
            killed.set()

        server.answer = serve(body, at=stop, do=kill)
        victim.put(children.start(f"gs://{path}"))
        assert killed.wait(20)
        partial.append(final(tmp_path, path).exists() and final(tmp_path, path).read_bytes() != body)
        server.answer, asked = serve(body), len(server.starts)
        assert children.result(children.start(f"gs://{path}"))[:2] == ["Fetched", digest(body)]
        assert final(tmp_path, path).read_bytes() == body
        assert partial == [False, False]
        assert parts(tmp_path) == []
        if waits:
            again += stop - server.starts[asked]
    assert again <= 25


def test_the_next_process_goes_on_when_the_one_that_downloads_is_killed(server, children):
    """[D15] The lock is the kernel's and dies with its holder: the second is served while the first's answer still hangs."""
    half, hold = threading.Event(), threading.Event()
    server.answer = [serve(BODY, at=100_000, do=lambda: half.set() or hold.wait(20)), serve(BODY)]
    holder = children.start()
    assert half.wait(20)
    second = children.start()
    assert len(server.asked) == 1
    os.kill(holder, signal.SIGKILL)
    assert children.result(second)[:2] == ["Fetched", digest(BODY)]
    assert len(server.asked) == 2
    assert not hold.is_set()
    hold.set()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system whose locks do nothing."""
    monkeypatch.setattr(fcntl, "flock", lambda *args: None)


def test_without_working_locks_only_the_number_of_downloads_grows(server, tmp_path, no_locks):
    """[D14]"""
    together = threading.Barrier(4)
    server.answer = [serve(BODY, at=100_000, do=lambda: together.wait(20))] * 4 + [serve(BODY)]
    results = calls(*[SOURCE] * 4)
    assert [results.get(timeout=20) for _ in range(4)] == [(final(tmp_path), digest(BODY))] * 4
    assert final(tmp_path).read_bytes() == BODY
    assert len(server.asked) >= 4


@pytest.mark.parametrize("first", [0, 1])
def test_without_working_locks_two_downloads_may_share_a_part_and_end_in_any_order(server, tmp_path, no_locks, first):
    """[D14]"""
    half, go = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    halts = [serve(BODY, at=(i + 1) * 50_000, do=lambda i=i: half[i].set() or go[i].wait(20)) for i in range(2)]
    server.answer = [*halts, serve(BODY)]
    one = calls(SOURCE)
    assert half[0].wait(20)
    while sum(part.stat().st_size for part in parts(tmp_path)) < 50_000:
        time.sleep(0.001)
    two = calls(SOURCE)
    assert half[1].wait(20)
    assert server.ranges == [None, "bytes=49999-"]
    results = (one, two)
    for i in (first, 1 - first):
        go[i].set()
        assert results[i].get(timeout=20) == (final(tmp_path), digest(BODY))
        assert final(tmp_path).read_bytes() == BODY
    assert fetch.fetch(SOURCE).sha256 == digest(BODY)


def test_class_names_come_from_the_base_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path))
    index = tmp_path / "download.tensorflow.org" / "data" / "imagenet_class_index.json"
    index.parent.mkdir(parents=True)
    index.write_text("{" + ",".join(f'"{i}": ["n{i:08}", "name_{i}"]' for i in range(1000)) + "}")
    scores = np.eye(1000)[[7]]
    assert keras_vit.decode_predictions(scores, top=1) == [[("n00000007", "name_7", 1.0)]]
