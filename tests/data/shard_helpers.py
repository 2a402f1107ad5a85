"""Tar shards of images with labels, for tests."""

import contextlib
import datetime
import functools
import hashlib
import io
import ipaddress
import json
import ssl
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """An uncompressed tar with these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pack_list(listed: Path, root: Path, out: Path, shards: int) -> list[Path]:
    """The images of a list file in its order as WebDataset shards: KEY.png and KEY.cls."""
    rows = [line.rsplit(" ", 1) for line in listed.read_text().splitlines()]
    size, made = -(-len(rows) // shards), []
    for number in range(shards):
        files = {}
        for name, label in rows[number * size : (number + 1) * size]:
            files[name] = (root / name).read_bytes()
            files[name.rpartition(".")[0] + ".cls"] = label.encode()
        made.append(pack(out / f"{number:05d}.tar", files))
    return made


class Objects(SimpleHTTPRequestHandler):
    """A folder of buckets as the XML API of Google Cloud Storage gives it, or a web server.

    cloud.google.com/storage/docs: xml-api/get-object-download, head-object, get-bucket-list (two
    a page), reference-headers; transcoding, as that of an object with Content-Encoding: gzip.
    """

    protocol_version, kind = "HTTP/1.1", ""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if "?list-type=2" in self.path:
            return self.list(path, dict(parse_qsl(self.path.partition("?")[2])))
        if not path.is_file():
            return self.answer(404, {}, b"<Error><Code>NoSuchKey</Code></Error>")
        content, modified = path.read_bytes(), self.date_time_string(path.stat().st_mtime)
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Last-Modified": modified}
        if self.headers["If-Match"] not in (None, headers["ETag"]):
            return self.answer(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")
        if not self.headers["Range"] or self.kind in ("whole", "transcoded"):
            return self.answer(200, headers, content)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part, size = content[first : last + 1], len(content)
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{size}"
        self.answer(206, headers, part + b"more" * (self.kind == "longer"))

    def do_HEAD(self):
        return self.answer(405, {}, b"") if self.kind == "headless" else self.do_GET()

    def list(self, bucket: Path, query: dict):
        if not bucket.is_dir():
            return self.answer(404, {}, b"<Error><Code>NoSuchBucket</Code></Error>")
        first, prefix = (query.get(key, "") for key in ("continuation-token", "prefix"))
        names = sorted(path.relative_to(bucket).as_posix() for path in bucket.rglob("*.*"))
        names, text = [n for n in names if n > first and n.startswith(prefix)], ""
        for name in names[:2]:
            text += f"<Contents><Key>{escape(name)}</Key><Size>1</Size><ETag>1</ETag>"
            text += "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        if names[2:]:
            text += f"<NextContinuationToken>{escape(name)}</NextContinuationToken>"
        self.answer(200, {}, f"<ListBucketResult>{text}</ListBucketResult>".encode())

    def answer(self, status: int, headers: dict, content: bytes):
        headers = {"Content-Length": str(len(content)), **headers}
        if self.kind == "weak" and "ETag" in headers:
            headers["ETag"] = f"W/{headers['ETag']}"
        if self.kind == "transcoded":
            headers["Connection"] = "close"
        missing = {"transcoded": "ETag Content-Length", "untagged": "ETag"}
        missing["undated"] = "ETag Last-Modified"
        self.send_response(status)
        for name in headers.keys() - missing.get(self.kind, "").split():
            self.send_header(name, headers[name])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Ranges(Objects):
    kind = "untagged"


def google(monkeypatch: pytest.MonkeyPatch, server: str) -> str:
    """Makes a server the one of Google Cloud; returns the URL of a bucket."""
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT", raising=False)
    key = dict.fromkeys(["client_email", "private_key", "private_key_id"], "")
    key |= {"gcs_base_url": server, "disable_oauth": True}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    return "gs://b"


def certificate(folder: Path) -> Path:
    """A file with a new key, and a certificate for 127.0.0.1 that nobody else signed."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    days = [now - datetime.timedelta(1), now + datetime.timedelta(1)]
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, *days)
    made = made.add_extension(host, critical=False).sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    content = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    (folder / "server.pem").write_bytes(content + made.public_bytes(pem))
    return folder / "server.pem"


def encrypt(server: ThreadingHTTPServer, pem: Path | str) -> None:
    """Makes a server that was not started one of https."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)


@contextlib.contextmanager
def served(folder: Path, handler: type = Ranges, pem: Path | None = None) -> Iterator[str]:
    """The URL of a server with the files of a folder, https with a certificate."""
    handler = functools.partial(handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if pem:
            encrypt(server, pem)
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http{'s' * bool(pem)}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
