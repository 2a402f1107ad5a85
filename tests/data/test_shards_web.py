"""Shards on Google Cloud and on https servers are read right, or refused by name and reason."""

import contextlib
import os
import re
from pathlib import Path

import pytest
from conftest import save_noise
from shard_helpers import Objects, certificate, google, pack, served

from workbench import data, shard_store
from workbench.recipe import Recipe
from workbench.shard_store import StoreError


@contextlib.contextmanager
def bucket(monkeypatch, folder: Path, scheme: str, kind: str = ""):
    """The URL of the bucket FOLDER/b, of Google Cloud or an https server that is trusted."""
    pem = certificate(folder) if scheme == "https" else None
    with served(folder, type("Kind", (Objects,), {"kind": kind}), pem) as server:
        if pem:
            monkeypatch.delenv("SSL_CERT_DIR", raising=False)
            monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        yield f"{server}/b" if pem else google(monkeypatch, server)


def shard(folder: Path, name: str, seed: int) -> list[bytes]:
    """Packs two images as a shard of the bucket, and returns them."""
    images = [save_noise(folder / "x.png", seed + n).read_bytes() for n in range(2)]
    pack(folder / "b" / name, {f"{n}/{seed}.png": image for n, image in enumerate(images)})
    return images


def index(folder: Path, *sources: str):
    """The rows of an index of these shards."""
    data.write_index(sources, folder / "train.arrow", progress=False)
    lists = {"train_list": "train.arrow", "val_list": "train.arrow"}
    return data.load_dataset(Recipe(dataset="files", data_dir=str(folder), **lists)).train


@pytest.mark.parametrize("scheme", ["gs", "https"])
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
            shard(tmp_path, f"{n:02d}.tar", 100 + n)
        found = index(tmp_path, f"{url}/{{00..02}}.tar")
        assert found.file.tolist() == [f"{n}/{100 + m}.png" for m in range(3) for n in range(2)]
        data.check_shards(found)
        if scheme == "gs":
            found = index(tmp_path, f"{url}/x/*.tar")
            assert sorted(shard_store.read(found.path)) == sorted(sum(images, []))
            assert len(index(tmp_path, "gs://b/0[12].tar")) == 4


@pytest.mark.parametrize("scheme, kind", [("gs", ""), ("https", ""), ("https", "weak")])
def test_a_replaced_and_a_missing_object_are_refused_by_name(tmp_path, monkeypatch, scheme, kind):
    images = shard(tmp_path, "a.tar", 0)
    with bucket(monkeypatch, tmp_path, scheme, kind) as url:
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


@pytest.mark.parametrize(
    "kind, schemes, says",
    [
        ("whole", ["gs", "https"], "is on a server that gives no parts of a file"),
        ("transcoded", ["gs", "https"], "comes without size or ETag, as one stored with Content-E"),
        ("undated", ["https"], "is on a server that does not say when or whether a file changed"),
        ("headless", ["https"], "is on a server that does not answer HEAD requests"),
        ("longer", ["gs", "https"], "does not answer for 1 s (10244 bytes came"),
    ],
)
def test_a_server_that_gives_other_than_asked_for_is_refused(
    tmp_path, monkeypatch, kind, schemes, says
):
    monkeypatch.setenv("WORKBENCH_STORE_SECONDS", "1" if kind == "longer" else "20")
    shard(tmp_path, "a.tar", 0)
    for scheme in schemes:
        with bucket(monkeypatch, tmp_path, scheme, kind) as url:
            with pytest.raises(StoreError, match=re.escape(f"{url}/a.tar {says}")):
                index(tmp_path, f"{url}/a.tar")


def test_a_redirect_is_followed_to_another_https_server_and_not_to_http(tmp_path, monkeypatch):
    images = shard(tmp_path, "a.tar", 0)
    to = []

    class Elsewhere(Objects):
        def do_GET(self):
            self.answer(302, {"Location": to[-1] + self.path}, b"")

        do_HEAD = do_GET

    with bucket(monkeypatch, tmp_path, "https") as tls, served(tmp_path, Objects) as plain:
        with served(tmp_path, Elsewhere, tmp_path / "server.pem") as url:
            to.append(tls.removesuffix("/b"))
            found = index(tmp_path, f"{url}/b/a.tar")
            assert list(shard_store.read(found.path)) == images
            to.append(plain)
            with pytest.raises(StoreError, match="a.tar is redirected from https:// to http://"):
                index(tmp_path, f"{url}/b/a.tar")


def test_a_server_that_is_not_trusted_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_STORE_SECONDS", "20")
    shard(tmp_path, "a.tar", 0)
    (tmp_path / "other").mkdir()
    with bucket(monkeypatch, tmp_path, "https") as url:
        with pytest.raises(StoreError, match="certificate for other names or days"):
            index(tmp_path, f"{url}/a.tar".replace("127.0.0.1", "localhost"))
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
