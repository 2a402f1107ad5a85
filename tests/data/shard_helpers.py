"""Tar shards of images with labels, for tests."""

import contextlib
import functools
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


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


class Ranges(SimpleHTTPRequestHandler):
    """Gives the parts of files that are asked for, which Python's own server does not."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        content = Path(self.translate_path(self.path)).read_bytes()
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        modified = Path(self.translate_path(self.path)).stat().st_mtime
        self.send_header("Last-Modified", self.date_time_string(modified))
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@contextlib.contextmanager
def served(folder: Path, handler: type = Ranges) -> Iterator[str]:
    """The URL of a server with the files of a folder."""
    handler = functools.partial(handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class Whole(Ranges):
    """As a server without ranges: all of a file."""

    do_GET = SimpleHTTPRequestHandler.do_GET
