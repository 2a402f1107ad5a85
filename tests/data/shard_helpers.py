"""Tar shards of images with labels, for tests."""

import contextlib
import datetime
import functools
import hashlib
import io
import ipaddress
import ssl
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

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
    """A folder of buckets as the XML API of Google Cloud Storage gives it.

    cloud.google.com/storage/docs/xml-api: get-object-download, head-object, get-bucket-list,
    reference-headers. The ETag of an object is the MD5 of its content. Lists have pages of two.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def about(self, path: Path, content: bytes) -> dict:
        modified = self.date_time_string(path.stat().st_mtime)
        return {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Last-Modified": modified}

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if "?list-type=2" in self.path:
            return self.list(path, dict(parse_qsl(self.path.partition("?")[2])))
        if not path.is_file():
            return self.answer(404, {}, b"<Error><Code>NoSuchKey</Code></Error>")
        content, status = path.read_bytes(), 200
        headers = self.about(path, content)
        if self.headers["If-Match"] not in (None, headers.get("ETag")):
            return self.answer(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")
        if self.headers["Range"]:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            part, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            content = part
        self.answer(status, headers, content)

    do_HEAD = do_GET

    def list(self, bucket: Path, query: dict):
        if not bucket.is_dir():
            return self.answer(404, {}, b"<Error><Code>NoSuchBucket</Code></Error>")
        files = {path.relative_to(bucket).as_posix(): path for path in bucket.rglob("*.*")}
        first = query.get("continuation-token", "")
        names = sorted(n for n in files if n > first and n.startswith(query.get("prefix", "")))
        text = ""
        for name in names[:2]:
            size, modified = files[name].stat().st_size, "2026-01-01T00:00:00.000Z"
            text += f'<Contents><Key>{escape(name)}</Key><Size>{size}</Size><ETag>"1"</ETag>'
            text += f"<LastModified>{modified}</LastModified></Contents>"
        if names[2:]:
            text += f"<NextContinuationToken>{escape(name)}</NextContinuationToken>"
        self.answer(200, {}, f"<ListBucketResult>{text}</ListBucketResult>".encode())

    def answer(self, status: int, headers: dict, content: bytes):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Ranges(Objects):
    """As a web server without ETags."""

    def about(self, path: Path, content: bytes) -> dict:
        return {**super().about(path, content), "ETag": None}


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


class Whole(Objects):
    """As a server without ranges: all of a file."""

    def do_GET(self):
        del self.headers["Range"]
        super().do_GET()
