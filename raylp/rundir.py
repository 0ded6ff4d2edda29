"""The run directory: the only state of a run. Local, or on an object store through fsspec.

Files appear whole: a local file is written beside its place and renamed, an object is put at once. A directory is
complete when its `manifest.json`, written last, is there. One driver at a time holds the lock, a lease it renews.
"""

import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import psutil

from raylp.errors import UserError
from raylp.models.source import cache_dir

LEASE_S = 60.0
RENEW_S = 10.0
LEFT_BEHIND_S = 86400.0


class RunDir:
    """Paths are relative to the run directory, with `/`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"run_dir {url}: {error}") from error
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def full(self, name: str) -> str:
        """The path on the file system."""
        return f"{self.root}/{name}" if name else self.root

    def uri(self, name: str) -> str:
        """The path with its scheme, for other libraries; an absolute path when local."""
        return self.full(name) if self.is_local else f"{self.url}/{name}"

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.full(name))

    def names(self, name: str) -> list[str]:
        """Names of what is directly in the directory `name`, sorted; nothing when it is not there."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.full(name), detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)

    def read_text(self, name: str) -> str:
        with self.fs.open(self.full(name), "rb") as stream:
            return stream.read().decode("utf-8")

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_text(name))
        except ValueError as error:
            raise UserError(f"{self.uri(name)} is not JSON; move it away and run again", 1) from error

    def write_text(self, name: str, text: str) -> None:
        """Whole or not at all."""
        data = text.encode("utf-8")
        if not self.is_local:
            self.fs.pipe_file(self.full(name), data)
            return
        path = Path(self.full(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}")
        try:
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"cannot write {path}: {error.strerror}; free space or choose another run_dir", 1
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def remove(self, name: str) -> None:
        if self.exists(name):
            self.fs.rm(self.full(name), recursive=True)

    @contextmanager
    def building(self, name: str) -> Iterator[Path]:
        """A local directory to fill; after the block it appears whole as `name`, with a manifest."""
        parent = Path(self.full(name)).parent if self.is_local else cache_dir() / "building" / _digest(self.url)
        parent.mkdir(parents=True, exist_ok=True)
        stem = f".building-{name.rsplit('/', 1)[-1]}"
        for other in parent.glob(f"{stem}@*@*@*"):
            if _left_behind(other):
                shutil.rmtree(other, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{stem}@{socket.gethostname()}@{os.getpid()}@", dir=parent))
        try:
            yield scratch
            scratch.chmod(0o755)
            manifest = directory_manifest(scratch)
            self.remove(name)
            if self.is_local:
                (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
                scratch.rename(self.full(name))
            else:
                self.fs.put(f"{scratch}/", self.full(name), recursive=True)
                self.write_json(f"{name}/manifest.json", manifest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def complete(self, name: str) -> bool:
        """Whether the directory `name` is whole: manifest there, every file there with its size."""
        if not self.exists(f"{name}/manifest.json"):
            return False
        files = self.read_json(f"{name}/manifest.json")["files"]
        return all(
            self.exists(f"{name}/{file}") and self.fs.size(self.full(f"{name}/{file}")) == entry["bytes"]
            for file, entry in files.items()
        )

    def local(self, name: str) -> Path:
        """A local directory with the contents of `name`; fetched once when the run directory is remote."""
        if self.is_local:
            return Path(self.full(name))
        manifest = self.read_text(f"{name}/manifest.json")
        key = hashlib.sha256(f"{self.url}/{name}\n{manifest}".encode()).hexdigest()[:16]
        target = cache_dir() / "fetched" / key
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=target.parent))
            self.fs.get(self.full(name).rstrip("/") + "/", f"{scratch}/", recursive=True)
            scratch.replace(target)
        return target

    def logs(self) -> Path:
        """Where logs go: in the run directory, or, when that is remote, in the cache directory."""
        path = Path(self.full("logs")) if self.is_local else cache_dir() / "logs" / _digest(self.url)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def scratch(self, name: str) -> Path:
        """A local directory for unfinished work that a later start may go on with."""
        path = Path(self.full(f".work/{name}")) if self.is_local else cache_dir() / "work" / _digest(self.url) / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def check_writable(self, needed_bytes: int = 0) -> None:
        """Before the start: can files be made here, and is there room for `needed_bytes`?"""
        probe = f".probe-{os.getpid()}"
        try:
            if self.is_local:
                Path(self.root).mkdir(parents=True, exist_ok=True)
                Path(self.full(probe)).write_text("x")
                Path(self.full(probe)).unlink()
                free = shutil.disk_usage(self.root).free
                if free < needed_bytes:
                    raise UserError(
                        f"run_dir {self.root}: about {needed_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are "
                        f"free; free space or choose another run_dir"
                    )
            else:
                self.fs.pipe_file(self.full(probe), b"x")
                self.fs.rm(self.full(probe))
        except OSError as error:
            raise UserError(f"run_dir {self.url} cannot be written: {error.strerror or error}") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run directory for this process; another live driver is refused.

        Raises:
            UserError: somebody else holds it, with who and for how long still.
        """
        lease = _Lease(self)
        lease.acquire()
        try:
            yield
        finally:
            lease.release()


class _Lease:
    name = "lock.json"

    def __init__(self, rundir: RunDir) -> None:
        self.rundir = rundir
        self.owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "token": secrets.token_hex(8),
        }
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)

    def acquire(self) -> None:
        held = self._read()
        if held and self._alive(held):
            left = max(0, held["expires"] - time.time())
            raise UserError(
                f"run directory {self.rundir.url} is in use by process {held['pid']} on {held['host']} (its lease "
                f"ends in {left:.0f} s unless renewed): wait for it, stop it, or use another run_dir"
            )
        if self.rundir.is_local:
            self._claim_local(held)
        else:
            self._write()
            time.sleep(2.0)
        current = self._read()
        if current is None or current["token"] != self.owner["token"]:
            raise UserError(f"run directory {self.rundir.url} was taken by another driver at the same moment")
        self.thread.start()

    def release(self) -> None:
        self.stopped.set()
        self.thread.join()
        held = self._read()
        if held and held["token"] == self.owner["token"]:
            self.rundir.remove(self.name)

    def _claim_local(self, stale: dict[str, Any] | None) -> None:
        """The stale lease is moved away (only one process can), then the new one is made exclusively."""
        path = Path(self.rundir.full(self.name))
        if stale:
            aside = path.with_name(f".lock-{self.owner['token']}")
            try:
                path.rename(aside)
            except FileNotFoundError:
                return
            if json.loads(aside.read_text())["token"] != stale["token"]:  # somebody was quicker: it is theirs
                with suppress(FileExistsError):
                    os.link(aside, path)
                aside.unlink()
                return
            aside.unlink()
        partial = path.with_name(f".lock-new-{self.owner['token']}")
        partial.write_text(self._content())
        try:
            os.link(partial, path)
        except FileExistsError:
            return
        finally:
            partial.unlink()

    def _content(self) -> str:
        return json.dumps({**self.owner, "expires": time.time() + LEASE_S})

    def _write(self) -> None:
        self.rundir.write_text(self.name, self._content())

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.rundir.read_text(self.name))
        except (FileNotFoundError, ValueError):
            return None

    def _alive(self, held: dict[str, Any]) -> bool:
        if held["host"] != self.owner["host"]:
            return held["expires"] > time.time()
        try:
            return abs(psutil.Process(held["pid"]).create_time() - held["started"]) < 1
        except psutil.NoSuchProcess:
            return False

    def _renew(self) -> None:
        while not self.stopped.wait(RENEW_S):
            with suppress(OSError, UserError):  # a full disk or a lost connection may come back before the lease ends
                held = self._read()
                if held and held["token"] != self.owner["token"]:
                    message = (
                        f"run directory {self.rundir.url} was taken over by process {held['pid']} on {held['host']}"
                    )
                    print(f"{message} while this one was held up: stopping", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._write()


def directory_manifest(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of every file below `path`."""
    files = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        files[str(file.relative_to(path))] = {"bytes": file.stat().st_size, "sha256": digest}
    return {"schema": 1, "files": files}


def _left_behind(scratch: Path) -> bool:
    """Whether the process that was filling this directory is gone; of another machine's, only its age tells."""
    _, host, pid, _ = scratch.name.rsplit("@", 3)
    if host == socket.gethostname():
        return not psutil.pid_exists(int(pid))
    return time.time() - scratch.stat().st_mtime > LEFT_BEHIND_S


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
