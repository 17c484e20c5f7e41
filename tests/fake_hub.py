"""A Hub on the loopback interface: it serves model and dataset repositories out of dicts, and refuses others."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

TOKEN = "hf_secret_test"
COMMIT = "c0ffee" * 6 + "c0ff"
# repositories that are refused: status and the Hub's error code
REFUSALS = {
    "team/private": (401, "RepoNotFound"),
    "team/gated": (403, "GatedRepo"),
    "team/unknown": (404, "RepoNotFound"),
    "team/broken": (500, None),
}
NO_SERVER = "http://127.0.0.1:9"  # the discard port: connections are refused
# huggingface_hub tries again for 23 seconds where there is no server, and has no setting for it
SHORT_WAITS = "import time\nsleep = time.sleep\ntime.sleep = lambda seconds: sleep(min(seconds, 0.01))\n"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers for the server's `models` and `datasets`, {repository: {path: bytes}}, what the libraries ask for.

    Routes, for datasets with /datasets in front of the repository or in place of /models:
    /<repo>/resolve/<revision>/<file>, /api/models/<repo> and below it revision/<revision>, tree/<revision>/<folder>,
    paths-info/<revision> and auth-check.
    """

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Authorization")))
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        path, _, query = self.path.partition("?")
        parts = urllib.parse.unquote(path).strip("/").removeprefix("api/").split("/")
        repositories = self.server.datasets if parts[0] == "datasets" else self.server.models
        parts = parts[1:] if parts[0] in ("datasets", "models") else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        if name in repositories:
            options = urllib.parse.parse_qs(query) | form
            status, headers, body = self.answer(name, repositories[name], rest, options)
        else:
            status, code = REFUSALS.get(name, (404, "RepoNotFound"))
            headers, body = {"X-Error-Code": code} if code else {}, b""
        self.send_response(status)
        for header, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def answer(self, name, files, rest, options):
        """Return (status, headers, body) for a path behind the name of a repository that exists."""
        route, path = rest[0] if rest else "revision", "/".join(rest[2:])
        missing = (404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        if route == "resolve":
            if path not in files:
                return missing
            etag = hashlib.sha256(files[path]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, files[path]
        if route == "revision":
            siblings = [{"rfilename": file} for file in files]
            reply = {"id": name, "sha": COMMIT, "tags": [], "siblings": siblings}
        elif route == "tree":
            inside = f"{path}/" if path else ""
            deep = options.get("recursive", ["false"])[0].lower() in ("true", "1")
            below = {entry for entry in entries(files) if entry.startswith(inside)}
            if not below:
                return missing
            reply = [describe(files, entry) for entry in sorted(below) if deep or "/" not in entry[len(inside) :]]
        elif route == "paths-info":
            reply = [describe(files, entry) for entry in options.get("paths", []) if entry in entries(files)]
        elif route == "auth-check":
            reply = {}
        else:
            return missing
        return 200, {"Content-Type": "application/json"}, json.dumps(reply).encode()

    def log_message(self, *args):
        pass


def entries(files):
    """The paths of a repository's files and of the folders around them."""
    folders = {path.rsplit("/", depth)[0] for path in files for depth in range(1, path.count("/") + 1)}
    return set(files) | folders


def describe(files, path):
    """A file or folder as the Hub lists it."""
    if path in files:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40}
    return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


@contextlib.contextmanager
def serve(models=None, datasets=None):
    """A running FakeHub: `url`, and `requests`, which are (path, Authorization header) each."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.url, server.requests = f"http://127.0.0.1:{server.server_port}", []
    server.models, server.datasets = models or {}, datasets or {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def environment(url, folder, offline="0"):
    """Environment variables under which the libraries ask this Hub alone, with a token, and keep to the folder."""
    (folder / "path").mkdir(exist_ok=True)
    (folder / "path/sitecustomize.py").write_text(SHORT_WAITS)
    return {
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": TOKEN,
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would count them on a server elsewhere
        "NO_PROXY": "*",
        "PYTHONPATH": str(folder / "path"),
        "OMP_NUM_THREADS": "1",
    }
