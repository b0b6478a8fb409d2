"""A small Hugging Face hub on loopback, enough of it for the real clients to list and fetch files."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

COMMIT = "0" * 39 + "1"


@contextlib.contextmanager
def serve_hub(repositories, cache, cuts=None):
    """Serve {"datasets/owner/name" or "model": {path: bytes}}; yields the environment that leads a script there.

    `cuts` is {path: how many of its next downloads break off half-way}, counted down as they do.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, body, status=200, cut=False, **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
                self.close_connection = cut

        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            for name, files in repositories.items():
                kind = name if name.startswith("datasets/") else f"models/{name}"
                for revision in ("main", COMMIT):
                    if path.startswith(f"{name}/resolve/{revision}/"):
                        return self.file(files, path.split(f"/resolve/{revision}/", 1)[1])
                    if path.startswith(f"api/{kind}/tree/{revision}"):
                        return self.tree(files, path.split(f"/tree/{revision}", 1)[1].strip("/"))
                    if path in (f"api/{kind}", f"api/{kind}/revision/{revision}"):
                        siblings = [{"rfilename": file} for file in files]
                        return self.reply(
                            {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings}
                        )
            self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_POST = do_GET

        def file(self, files, name):
            if name not in files:
                return self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            body = files[name]
            cut = self.command == "GET" and cuts is not None and cuts.get(name, 0) > 0
            if cut:
                cuts[name] -= 1
            requests.append(f"{self.command} {name} {self.headers.get('Range')}")
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
            if wanted := self.headers.get("Range"):
                start, _, end = wanted.removeprefix("bytes=").partition("-")
                first, last = int(start), min(int(end or len(body)), len(body) - 1)
                headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
                return self.reply(body[first : last + 1], 206, cut, **headers)
            return self.reply(body, 200, cut, **headers)

        def tree(self, files, folder):
            inside = [name for name in files if name.startswith(folder + "/" if folder else "")]
            if not inside:
                return self.reply({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            entries = {}
            for name in inside:
                head, slash, _ = name[len(folder) :].lstrip("/").partition("/")
                path = f"{folder}/{head}".strip("/")
                kind = (
                    {"type": "directory", "size": 0} if slash else {"type": "file", "size": len(files[name])}
                )
                entries[path] = {"path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), **kind}
            return self.reply(list(entries.values()))

    requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield (
            {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"},
            requests,
        )
    finally:
        server.shutdown()
        server.server_close()
