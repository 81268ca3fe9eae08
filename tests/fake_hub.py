"""A loopback server that answers as the Hugging Face hub does, well or badly."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FakeHub:
    """Serves `files` (name -> bytes) of every repository, and behaves as `mode` says.

    `stated` (name -> hash) is said in place of the true hash; `requests` is what it was asked. Modes: good, hang, drip
    (never silent for long), drop (no answer), page (a web page, as of a hotel's network), an HTTP status, and "GET
    fails" (403 for a file that there is).
    """

    def __init__(self, files):
        self.files, self.stated, self.mode, self.requests = dict(files), {}, "good", []
        self.closing = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.requests.append((self.command, self.path))
                path = urlsplit(self.path).path
                name = re.sub(r".*/resolve/[^/]+", "", path).removeprefix("/")
                if hub.mode in ("hang", "drop"):
                    hub.closing.wait({"hang": 60, "drop": 0}[hub.mode])
                elif hub.mode == "drip":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                    while not hub.closing.wait(0.05):
                        self.wfile.write(b"X-Drip: drop\r\n")
                elif hub.mode == "page":
                    self.answer(b"<html>Welcome! Please accept our terms.</html>")
                elif hub.mode.isdigit():
                    self.send_error(int(hub.mode))
                elif path.startswith("/api/"):
                    about = {"id": path.removeprefix("/api/datasets/"), "sha": "c" * 40}
                    self.answer(json.dumps([*map(hub.entry, hub.files)] if "/tree/" in path else about).encode())
                elif name not in hub.files or (hub.mode == "GET fails" and self.command == "GET"):
                    self.send_error(403 if name in hub.files else 404)
                else:
                    etag = f'"{hub.entry(name)["lfs"]["oid"]}"'
                    self.answer(hub.files[name], X_Repo_Commit="c" * 40, X_Linked_Etag=etag, ETag='"another"')

            def answer(self, content, **headers):
                self.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_GET, log_message = do_HEAD, lambda *_: None

            def handle(self):
                with contextlib.suppress(ConnectionError):  # the client gave up, as it should
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def entry(self, name):
        """What the listing of a repository says of a file."""
        size, sha256 = len(self.files[name]), self.stated.get(name, hashlib.sha256(self.files[name]).hexdigest())
        lfs = {"oid": sha256, "size": size, "pointerSize": 134}
        return {"type": "file", "path": name, "size": size, "oid": "the hash of something else", "lfs": lfs}

    def sent(self, name):
        """How often a file itself was asked for."""
        return sum(command == "GET" and "/resolve/" in path and path.endswith(name) for command, path in self.requests)

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
