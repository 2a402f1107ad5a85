"""moto's S3 server behind a proxy that injects faults; `python shard_server.py` prints its URL.

`python shard_server.py FOLDER [PEM]` gives the objects of a folder, with a certificate as https.

GET /faults?200 lets it damage this many of the next range requests; GET /faults says how many of
each kind there were, GET /ranges how many range requests. Kinds: status 503, a reset connection,
half of the bytes, a delay. With a count over 10^8 every range gets status 503.
"""

import collections
import functools
import http.client
import json
import logging
import random
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from shard_helpers import Objects, encrypt

KINDS = ("503", "reset", "short", "delay")
left, seen, rng, lock = [0], collections.Counter(), random.Random(0), threading.Lock()
ranges = [0]


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behind = ("", 0)

    def log_message(self, *_):
        pass

    def forward(self):
        if self.path.startswith("/faults"):
            left[0] = int(self.path.partition("?")[2] or left[0])
            return self.answer(200, {}, json.dumps(seen).encode())
        if self.path == "/ranges":
            return self.answer(200, {}, json.dumps(ranges[0]).encode())
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.fault()
        if kind == "503":
            return self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
        if kind == "delay":
            time.sleep(0.3)
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)  # closing sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return self.connection.close()
        upstream = http.client.HTTPConnection(*self.behind)
        upstream.request(self.command, self.path, body, dict(self.headers))
        found = upstream.getresponse()
        content, headers = found.read(), dict(found.getheaders())
        upstream.close()
        self.answer(found.status, headers, content, kind == "short")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def fault(self) -> str:
        """The kind of fault for this request, or none: about every second range is damaged."""
        with lock:
            ranges[0] += self.command == "GET" and bool(self.headers.get("Range"))
            if self.command != "GET" or not self.headers.get("Range") or not left[0]:
                return ""
            if left[0] > 10**8:
                return "503"
            if rng.random() < 0.5:
                return ""
            left[0] -= 1
            kind = KINDS[seen.total() % len(KINDS)]
            seen[kind] += 1
            return kind

    def answer(self, status: int, headers: dict, content: bytes, half: bool = False):
        length = headers.pop("Content-Length", None) or len(content)
        headers = {k: v for k, v in headers.items() if k not in ("Connection", "Transfer-Encoding")}
        try:
            self.send_response_only(status)
            for name, value in {**headers, "Content-Length": length}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if half else content)
            self.close_connection = half or self.close_connection
        except (BrokenPipeError, ConnectionResetError):  # a client that was killed
            self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):  # the resets of this file
        pass


if __name__ == "__main__":
    if folder := sys.argv[1:2]:
        behind = Server(("127.0.0.1", 0), functools.partial(Objects, directory=folder[0]))
        threading.Thread(target=behind.serve_forever).start()
        Proxy.behind = behind.server_address
    else:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        moto.start()
        Proxy.behind = moto.get_host_and_port()
    proxy = Server(("127.0.0.1", 0), Proxy)
    if pem := sys.argv[2:3]:
        encrypt(proxy, pem[0])
    print(f"http{'s' * len(pem)}://127.0.0.1:{proxy.server_port}", flush=True)
    proxy.serve_forever()
