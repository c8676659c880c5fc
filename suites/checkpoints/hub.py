"""A hub on this machine that has one model: the folder of a checkpoint, over the requests that `snapshot_download` makes.

`cut` names a file whose first answer ends in the middle, as a network does that goes away.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "acme/DeepSeek-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `directory` as `NAME` while it is entered; `asked` holds (method, path, range) of every request."""

    def __init__(self, directory: Path, cut: str = "") -> None:
        self.directory, self.cut = directory, cut
        self.asked: list[tuple[str, str, str]] = []

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What a process must have in its environment to come here, and nowhere else."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "",
        }  # fmt: skip

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        """Answer one request of the client's."""
        path = request.path.partition("?")[0]
        self.asked.append((request.command, path, request.headers.get("Range", "")))
        if path.startswith(f"/api/models/{NAME}/revision/") or path == f"/api/models/{NAME}":
            self._json(request, {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in self._files()]})
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            self._json(request, [self._entry(file) for file in self._files()])
        elif found := re.fullmatch(f"/{NAME}/resolve/[^/]+/([^/]+)", path):
            self._file(request, self.directory / found[1], body)
        else:
            request.send_error(404)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.directory.iterdir() if path.is_file())

    @staticmethod
    def _digest(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def _entry(self, file: Path) -> dict[str, object]:
        size, digest = file.stat().st_size, self._digest(file)
        entry: dict[str, object] = {"type": "file", "path": file.name, "size": size, "oid": digest[:40]}
        if file.suffix == ".safetensors":
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
        return entry

    @staticmethod
    def _json(request: BaseHTTPRequestHandler, value: object) -> None:
        data = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _file(self, request: BaseHTTPRequestHandler, file: Path, body: bool) -> None:
        if not file.is_file():
            request.send_error(404)
            return
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        digest = self._digest(file)
        request.send_response(206 if asked else 200)
        request.send_header("ETag", f'"{digest if file.suffix == ".safetensors" else digest[:40]}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", str(len(data) - first))
        if asked:
            request.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if not body:
            return
        if file.name == self.cut:
            request.wfile.write(data[first : (first + len(data)) // 2])
            request.wfile.flush()
            request.connection.close()
            return
        request.wfile.write(data[first:])
