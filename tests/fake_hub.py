"""A loopback server that answers as the Hugging Face hub does, well or badly."""

import contextlib
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What the hub keeps as large files and states the SHA-256 of; of others it states git's SHA-1.
LARGE = (".tar", "corpus.jsonl")


class FakeHub:
    """Serves `files` (name -> bytes) of every repository, and behaves as `mode` says.

    `stated` (name -> hash) is said in place of the true hash; `requests` is what it was asked. Modes: good, redirect (large
    files lie on another host), hang, drip (never silent for long enough to be a time-out of the connection), an HTTP
    status, and "GET fails".
    """

    def __init__(self, files):
        self.files, self.stated, self.mode, self.requests = dict(files), {}, "good", []
        self.closing = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.requests.append((self.command, self.path))
                name = re.sub(r".*/resolve/[^/]+", "", self.path).removeprefix("/")
                if hub.mode == "hang":
                    hub.closing.wait(60)
                elif hub.mode == "drip":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                    while not hub.closing.wait(0.05):
                        self.wfile.write(b"X-Drip: drop\r\n")
                elif hub.mode.isdigit():
                    self.send_error(int(hub.mode))
                elif hub.mode == "GET fails" and self.command == "GET":
                    self.send_error(403)
                elif name not in hub.files:
                    self.send_error(404)
                else:
                    self.send_file(name, hub.files[name])

            do_GET = do_HEAD

            def send_file(self, name, content):
                large, away = name.endswith(LARGE), hub.mode == "redirect" and "/resolve/" in self.path
                self.send_response(302 if away else 200)
                self.send_header("X-Repo-Commit", "c" * 40)
                if large:
                    self.send_header("X-Linked-Etag", f'"{hub.stated.get(name, hashlib.sha256(content).hexdigest())}"')
                    self.send_header("X-Linked-Size", str(len(content)))
                    self.send_header("ETag", '"the hash of something else"')
                else:
                    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                    self.send_header("ETag", f'"{hub.stated.get(name, git)}"')
                self.send_header("Content-Length", str(0 if away else len(content)))
                if away:
                    self.send_header("Location", f"{hub.url.replace('127.0.0.1', 'localhost')}/{name}")
                self.end_headers()
                if self.command == "GET" and not away:
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(ConnectionError):  # the client gave up, as it should
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
