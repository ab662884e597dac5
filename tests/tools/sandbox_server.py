"""A small server that speaks SandboxFusion's `POST /run_code` for Python, without isolation: for these tests only.

`python sandbox_server.py` listens on a free port of the loopback interface, prints it, and ends when its standard input
does. Like the real one it runs each request's code as a script in a directory of its own, kills it when its time is
over, and keeps the first mebibyte of each stream.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MAX_KEPT_BYTES = 1 << 20
RUNNING: set[int] = set()


def kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def run_script(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request's code; returns a `run_result`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in request.get("files", {}).items():
            (Path(folder) / name).write_bytes(base64.b64decode(content))
        script = Path(folder) / "script.py"
        script.write_text(request["code"], encoding="ascii")
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            cwd=folder,
            env={"PATH": os.environ.get("PATH", "")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        RUNNING.add(process.pid)
        status, code = "Finished", None
        try:
            streams = process.communicate(timeout=request.get("run_timeout", 10))
            code = process.returncode
        except subprocess.TimeoutExpired:
            status = "TimeLimitExceeded"
            kill(process.pid)
            streams = process.communicate()
        finally:
            kill(process.pid)
            RUNNING.discard(process.pid)
    stdout, stderr = (stream[:MAX_KEPT_BYTES].decode("utf-8", "replace") for stream in streams)
    seconds = time.monotonic() - started
    return {"status": status, "execution_time": seconds, "return_code": code, "stdout": stdout, "stderr": stderr}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    reply = {"message": "", "compile_result": None, "run_result": None, "executor_pod_name": None, "files": {}}
    if request.get("language") != "python":
        return {**reply, "status": "SandboxError", "message": f"no language {request.get('language')!r} here"}
    result = run_script(request)
    ok = result["status"] == "Finished" and result["return_code"] == 0
    return {**reply, "status": "Success" if ok else "Failed", "run_result": result}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/run_code":
            self.reply(200, answer(json.loads(body)))
        else:
            self.reply(404, {"detail": "Not Found"})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Be silent."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def main() -> None:
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.buffer.read()
    server.shutdown()
    for pid in list(RUNNING):
        kill(pid)


if __name__ == "__main__":
    main()
