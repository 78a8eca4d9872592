"""A MONAI Label server with one bundle and some studies, started as a user starts it, on a free port of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import requests

SECONDS_TO_START = 300


class LabelServer:
    """``with LabelServer(bundle, studies, scratch) as server``; ``server.bundle`` is the served copy.

    ``beside`` is another bundle that the same server serves.
    """

    def __init__(self, bundle: Path, studies: Path, scratch: Path, beside: Path | None = None) -> None:
        self.name = bundle.name
        self.studies = studies
        self.log = scratch / "server.log"
        self.app = scratch / "app" / "monaibundle"
        self.bundle = self.app / "model" / bundle.name
        # no GPU, so that serving and `monai.bundle run` can be compared to the voxel; MONAI Label reads PYTHONPATH unasked
        self.environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
        label = [sys.executable, "-m", "monailabel.main"]
        self._get_app = [
            *label,
            "apps",
            "--download",
            "--name",
            "monaibundle",
            "--output",
            str(scratch / "app"),
        ]
        self._start = [*label, "start_server", "--app", str(self.app), "--studies", str(studies)]
        self._start += [
            "--conf",
            "models",
            f"{beside.name},{self.name}" if beside else self.name,
            "--conf",
            "zoo_source",
            "local",
            "--conf",
            "sam2",
            "false",
        ]
        subprocess.run(self._get_app, env=self.environment, check=True, capture_output=True)
        for served in filter(None, (bundle, beside)):
            shutil.copytree(served, self.app / "model" / served.name)
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy has no business on 127.0.0.1

    def __enter__(self) -> LabelServer:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._stream = self.log.open("w")
        self._process = subprocess.Popen(
            [*self._start, "--host", "127.0.0.1", "--port", str(port)],
            cwd=self.app.parent,
            env=self.environment,
            stdout=self._stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.session.get(f"{self.url}/info/", timeout=20)
                return self
            except requests.ConnectionError:
                time.sleep(1)
        self._stop()
        raise RuntimeError(f"The server did not start. Its last lines:\n{self.last_lines()}")

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        """Ends the server and what it started, and nothing else: it leads a process group of its own."""
        for end in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, end)
                self._process.wait(10)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._stream.close()

    def last_lines(self, count: int = 15) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def get(self, path: str, **parameters: object) -> requests.Response:
        """GET, an hour's patience."""
        return self.session.get(self.url + path, params=parameters, timeout=3600)

    def infer(
        self, image: str, options: dict | None = None, output: str | None = None, bundle: str | None = None
    ) -> requests.Response:
        """A segmentation: with ``output='image'`` the file; else mask and parameters in parts, as viewers ask."""
        query = {"image": image, **({"output": output} if output else {})}
        form = {"params": json.dumps(options)} if options else None
        url = f"{self.url}/infer/{bundle or self.name}"
        return self.session.post(url, params=query, data=form, timeout=3600)

    def put_label(self, image: str, path: Path) -> requests.Response:
        """An annotator's finished label."""
        query = {"image": image, "tag": "final"}
        with path.open("rb") as file:
            files = {"label": file}
            return self.session.put(f"{self.url}/datastore/label", params=query, files=files, timeout=600)

    def train(self, options: dict) -> dict:
        """Fine-tune, wait, and return the task's last report."""
        answer = self.session.post(f"{self.url}/train/{self.name}", json=options, timeout=600)
        if answer.status_code != 200:
            return {"status": answer.status_code, "details": [answer.text]}
        while True:  # check_if_running says no before the task has started, too
            task = self.get("/train/").json()
            if task["status"] not in ("SUBMITTED", "RUNNING"):
                return task
            time.sleep(2)
