"""As much of a W&B server as a run needs, on the loopback; it can be switched off in the middle."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PROJECT = {"name": "glassarmor", "entity": {"name": "someone"}}
_ANSWERS: dict[str, Any] = {
    "Viewer": {"viewer": {"id": "1", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}},
    "ServerFeaturesQuery": {"serverInfo": {"features": []}},
    "ServerInfo": {"serverInfo": {"features": []}},
    "RunResumeStatus": {"model": None},
    "UpsertBucket": {
        "upsertBucket": {
            "bucket": {
                "id": "b", "name": "run", "displayName": "run", "description": "", "config": "{}", "sweepName": None,
                "project": _PROJECT, "historyLineCount": 0, "summaryMetrics": "{}",
            },
            "inserted": True,
        }
    },
}  # fmt: skip


class Server:
    """``url`` answers until :meth:`stop`, or until somebody asks for ``/stop``; ``asked`` counts what came."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                found: dict[str, Any] = {}
                if self.path == "/graphql":
                    request = json.loads(body)
                    query = request["query"]
                    operation = re.search(r"(?:query|mutation)\s+(\w+)", query)
                    name = operation.group(1) if operation else "?"
                    server.asked[name] += 1
                    found = {"data": _ANSWERS.get(name, {})}
                    if name == "CreateRunFiles":
                        files = [
                            {"name": file, "uploadUrl": f"{server.url}/upload"} for file in request["variables"]["files"]
                        ]
                        found = {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
                else:
                    server.asked[self.path.rsplit("/", 1)[-1]] += 1
                data = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data)
                if self.path == "/stop":
                    threading.Thread(target=server.stop).start()

            do_GET = do_POST = do_PUT = _answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
