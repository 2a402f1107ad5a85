"""Shards on Google Cloud and on https servers are read right, or refused by name and reason."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import save_noise
from helpers import assert_same_tensors, train
from shard_helpers import Objects, Whole, certificate, pack, served
from shard_runs import SIDES, batches, faults, pack_sides, recipe, started, weights

from workbench import data, shard_store
from workbench.recipe import Recipe
from workbench.shard_store import StoreError

SCHEMES = ["gs", "https"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No credentials and no certificates of this machine's user."""
    for name in [*os.environ]:
        if name.startswith(("GOOGLE_", "SSL_CERT_")):
            monkeypatch.delenv(name)


def point(monkeypatch, server: str, pem: Path | None) -> str:
    """Makes a server the one of Google Cloud, or its certificate trusted; returns a bucket."""
    if pem:
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        return f"{server}/b"
    empty = dict.fromkeys(["client_email", "private_key", "private_key_id"], "")
    key = {"gcs_base_url": server, "disable_oauth": True, **empty}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    return "gs://b"


@contextlib.contextmanager
def bucket(monkeypatch, folder: Path, scheme: str, handler: type = Objects):
    """The URL of the bucket FOLDER/b."""
    pem = certificate(folder) if scheme == "https" else None
    with served(folder, handler, pem) as server:
        yield point(monkeypatch, server, pem)


def shard(folder: Path, name: str, seed: int, files: int = 2) -> list[bytes]:
    """Packs a shard of the bucket; returns its images."""
    images = [save_noise(folder / "x.png", seed + n).read_bytes() for n in range(files)]
    content = {f"{seed + n:03d}.png": image for n, image in enumerate(images)}
    labels = {f"{seed + n:03d}.cls": b"%d" % (n % 2) for n in range(files)}
    pack(folder / "b" / name, content | labels)
    return images


def index(folder: Path, *sources: str):
    """The rows of an index of these shards."""
    data.write_index(sources, folder / "train.arrow", progress=False)
    lists = {"train_list": "train.arrow", "val_list": "train.arrow"}
    return data.load_dataset(Recipe(dataset="files", data_dir=str(folder), **lists)).train


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards_are_found_by_pattern_and_range_whatever_their_names_are(
    tmp_path, monkeypatch, scheme
):
    """Lists of the server come in pages of two."""
    names = ["a b.tar", "a+b.tar", "a%20b.tar", "a#b.tar", "ä€.tar", "a&amp;b=c~'.tar", "07.tar"]
    images = [shard(tmp_path, f"x/{name}", 2 * n) for n, name in enumerate(names)]
    shard(tmp_path, "x/deeper/a.tar", 50), shard(tmp_path, "y/a.tar", 60)
    with bucket(monkeypatch, tmp_path, scheme) as url:
        found = index(tmp_path, *[f"{url}/x/{name}" for name in names])
        assert list(shard_store.read(found.path)) == sum(images, [])
        for n in range(3):
            shard(tmp_path, f"{n:02d}.tar", 100 + 2 * n)
        found = index(tmp_path, f"{url}/{{00..02}}.tar")
        assert found.file.tolist() == [f"{n:03d}.png" for n in range(100, 106)]
        data.check_shards(found)
        if scheme == "gs":
            found = index(tmp_path, f"{url}/x/*.tar")
            assert sorted(shard_store.read(found.path)) == sorted(sum(images, []))
            assert len(index(tmp_path, "gs://b/0[12].tar")) == 4


class Weak(Objects):
    """As nginx, where it may compress."""

    def about(self, path, content):
        found = super().about(path, content)
        return {**found, "ETag": f"W/{found['ETag']}"}


@pytest.mark.parametrize("scheme, handler", [("gs", Objects), ("https", Objects), ("https", Weak)])
def test_a_replaced_and_a_missing_object_are_refused_by_name(
    tmp_path, monkeypatch, scheme, handler
):
    images = shard(tmp_path, "a.tar", 0)
    with bucket(monkeypatch, tmp_path, scheme, handler) as url:
        found = index(tmp_path, f"{url}/a.tar")
        assert list(shard_store.read(found.path)) == images
        path = tmp_path / "b" / "a.tar"
        before, status = path.read_bytes(), path.stat()
        path.write_bytes(before[:-1] + b"x")  # of the same size, and in the same second
        os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
        for read in (lambda: list(shard_store.read(found.path)), lambda: data.check_shards(found)):
            with pytest.raises(StoreError, match=f"{url}/a.tar has changed since it was indexed"):
                read()
        path.unlink()
        with pytest.raises(StoreError, match=f"{url}/a.tar is missing; put it back"):
            data.check_shards(found)
        with pytest.raises(StoreError, match=f"{url}/a.tar is missing"):
            index(tmp_path, f"{url}/a.tar")
        with pytest.raises(StoreError, match="is missing; names stand here as they are"):
            index(tmp_path, f"{url}/a%20.tar")
        if scheme == "gs":
            with pytest.raises(StoreError, match="is in a bucket that does not exist|is missing"):
                index(tmp_path, "gs://nowhere/*.tar")


class Transcoded(Whole):
    """As Google Cloud gives an object with Content-Encoding: gzip.

    cloud.google.com/storage/docs/transcoding, and object_store's issue 774 for the ETag.
    """

    def about(self, path, content):
        self.close_connection = True
        return {"Last-Modified": super().about(path, content)["Last-Modified"],
                "Content-Length": None, "Connection": "close"}  # fmt: skip


class Undated(Objects):
    about = lambda self, path, content: {}


class NoHead(Objects):
    do_HEAD = lambda self: self.answer(405, {}, b"")


class Longer(Objects):
    """As a proxy that encodes parts."""

    def answer(self, status, headers, content):
        super().answer(status, headers, content + b"more" * (status == 206))


@pytest.mark.parametrize(
    "handler, scheme, says",
    [
        (Whole, "gs", "is on a server that gives no parts of a file"),
        (Whole, "https", "is on a server that gives no parts of a file"),
        (Transcoded, "gs", "comes without size or ETag, as one stored with Content-Encoding: gzip"),
        (Transcoded, "https", "comes without size or ETag"),
        (Undated, "https", "is on a server that does not say when or whether a file changed"),
        (NoHead, "https", "is on a server that does not answer HEAD requests"),
        (Longer, "gs", "does not answer for 1 s (10244 bytes came"),
        (Longer, "https", "does not answer for 1 s (10244 bytes came"),
    ],
)
def test_a_server_that_gives_other_bytes_than_asked_for_is_refused(
    tmp_path, monkeypatch, handler, scheme, says
):
    monkeypatch.setenv("WORKBENCH_STORE_SECONDS", "1" if handler is Longer else "20")
    shard(tmp_path, "a.tar", 0)
    with bucket(monkeypatch, tmp_path, scheme, handler) as url:
        with pytest.raises(StoreError, match=re.escape(f"{url}/a.tar {says}")):
            index(tmp_path, f"{url}/a.tar")


def test_a_redirect_is_followed_to_another_https_server_and_not_to_http(tmp_path, monkeypatch):
    images = shard(tmp_path, "a.tar", 0)
    pem, to = certificate(tmp_path), [""]

    class Elsewhere(Objects):
        def do_GET(self):
            self.answer(302, {"Location": to[0] + self.path}, b"")

        do_HEAD = do_GET

    with served(tmp_path, Objects, pem) as tls, served(tmp_path, Objects) as plain:
        with served(tmp_path, Elsewhere, pem) as server:
            url = point(monkeypatch, server, pem)
            to[0] = tls
            found = index(tmp_path, f"{url}/a.tar")
            assert list(shard_store.read(found.path)) == images
            to[0] = plain
            with pytest.raises(StoreError, match="a.tar is redirected from https:// to http://"):
                index(tmp_path, f"{url}/a.tar")


def test_a_server_that_is_not_trusted_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_STORE_SECONDS", "20")
    shard(tmp_path, "a.tar", 0)
    (tmp_path / "other").mkdir()
    with bucket(monkeypatch, tmp_path, "https") as url:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate(tmp_path / "other")))
        with pytest.raises(StoreError, match="certificate not trusted; set SSL_CERT_FILE to a"):
            index(tmp_path, f"{url}/a.tar")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "x.png"))
        with pytest.raises(StoreError, match="cannot be opened: set SSL_CERT_FILE to a file"):
            index(tmp_path, f"{url}/a.tar")
    with served(tmp_path) as plain:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate(tmp_path)))
        with pytest.raises(StoreError, match="a server that answers without TLS; write http://"):
            index(tmp_path, f"{plain.replace('http', 'https')}/b/a.tar")


@pytest.mark.parametrize("name", ["a.tar", "*.tar"])
def test_a_host_that_is_not_found_is_tried_again_and_ends_with_exit_code_3(
    tmp_path, monkeypatch, command, name
):
    """The names of RFC 6761 that nobody has end in .invalid."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate(tmp_path)))
    monkeypatch.setenv("WORKBENCH_STORE_SECONDS", "1")
    done = command("index", f"https://nobody.invalid/{name}", "--out", tmp_path / "x.arrow")
    assert done.returncode == 3, done.stderr
    assert "does not answer for 1 s" in done.stderr and "lookup address" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_batches_and_weights_are_those_of_local_shards_whatever_the_server_damages(
    tmp_path, monkeypatch, scheme
):
    """Every kind of fault: 503, reset connections, short answers, delays."""
    folder = pack_sides(tmp_path)
    for side in SIDES:
        shutil.move(folder / side, folder / "b" / side)
        data.write_index([f"{folder}/b/{side}/*.tar"], folder / f"local_{side}.arrow")
    pem = [certificate(tmp_path)] if scheme == "https" else []
    with started(folder, *pem) as server:
        url = point(monkeypatch, server, *pem or [None])
        for side, count in SIDES.items():
            names = "*" if scheme == "gs" else f"{{00000..{count - 1:05d}}}"
            data.write_index([f"{url}/{side}/{names}.tar"], folder / f"web_{side}.arrow")
        ours, theirs = [recipe(folder, kind, tmp_path, epochs=1) for kind in ("web", "local")]
        for one, other in zip(batches(ours), batches(theirs), strict=True):
            assert all(map(lambda a, b: a.equal(b), one, other))
        faults(server, 40)
        runs = train(ours), train(theirs)
        damaged = faults(server, 0)
    assert sum(damaged.values()) == 40 and min(damaged.values()) == 10
    assert_same_tensors(*map(weights, runs))
    assert runs[0].metrics().equals(runs[1].metrics()) and runs[0].quarantine().empty
