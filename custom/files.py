"""Files: written completely or not at all, read as text of any system; their names and checksums."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from custom.errors import AliceError, chain_of


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str],
    *,
    sync: bool = False,
    error: type[AliceError] | None = AliceError,
    advice: str = "Make room on the disk, or choose another place.",
    failures: tuple[type[Exception], ...] = (OSError,),
) -> Iterator[Path]:
    """Write a file beside its place, then move it there, so that ``path`` holds all of it or what it held before.

    ``with replacing(path) as draft: writer.save(draft)`` works with any writer that takes a path. The file is moved at
    the end of the block. After an error in the block nothing is moved, and the draft is deleted.

    Args:
        path: the file to write. Its folder is made if it is missing.
        sync: wait until the data are on the disk before the file is moved, so that a power cut loses nothing.
        error: what a failure is raised as; None leaves it as it is.
        advice: the end of the error's message.
        failures: what counts as a failure to write.

    Yields:
        The path to write to: in the same folder, named ``<name>.<process>.tmp``.

    Raises:
        AliceError: (or ``error``) if the file cannot be written.
    """
    path = Path(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        mode = draft.stat().st_mode
        yield draft
        if draft.stat().st_mode != mode:
            draft.chmod(mode)  # safetensors makes files that only their owner can read
        if sync:
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(draft, path)
    except failures as failure:
        if error is None:
            raise
        told = (
            getattr(link, "strerror", None) for link in chain_of(failure)
        )  # torch hides it in a RuntimeError
        why = next(filter(None, told), failure)
        raise error(f"{path}: cannot be written ({why}). {advice}") from failure
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be missing
            draft.unlink(missing_ok=True)


def write_text(
    path: str | os.PathLike[str],
    text: str,
    *,
    sync: bool = False,
    error: type[AliceError] = AliceError,
    advice: str = "Make room on the disk, or choose another place.",
) -> None:
    """Write UTF-8 text; arguments and errors as :func:`replacing`."""
    with replacing(path, sync=sync, error=error, advice=advice) as draft:
        draft.write_text(text, encoding="utf-8", newline="")


def read_text(path: str | os.PathLike[str], *, error: type[AliceError] = AliceError, advice: str = "") -> str:
    """Read a text file of any system: UTF-8, or UTF-16 as Windows PowerShell writes it; with or without a byte-order mark.

    Args:
        path: of the file. Its lines may end in LF, CRLF or CR; the text has LF.
        error: what a failure is raised as.
        advice: the end of the error's message.

    Raises:
        AliceError: (or ``error``) if the file is missing or is not text.
    """
    try:
        return decoded(Path(path).read_bytes())
    except UnicodeError as failure:
        why = f"it is not UTF-8 text: {failure}"
    except OSError as failure:
        why = failure.strerror or type(failure).__name__
    raise error(f"{path}: cannot be read ({why}). {advice}".strip())


def decoded(content: bytes) -> str:
    """The text of a file's bytes, see :func:`read_text`."""
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if utf_16 else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], *, error: type[AliceError] = AliceError, advice: str = "") -> Any:
    """Read a JSON file; arguments and errors as :func:`read_text`."""
    return parse_json(read_text(path, error=error, advice=advice), path, error=error, advice=advice)


def parse_json(
    text: str, path: str | os.PathLike[str], *, error: type[AliceError] = AliceError, advice: str = ""
) -> Any:
    """The value of a JSON text; ``path`` is for the message, the rest is as in :func:`read_text`."""
    try:
        return json.loads(text)
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as failure:
        why = str(failure)
    raise error(f"{path}: not readable as JSON ({why}). {advice}".strip())


def read_torch(
    path: str | os.PathLike[str],
    *,
    map_location: Any = "cpu",
    error: type[AliceError] = AliceError,
    advice: str = "",
) -> Any:
    """Read a file of ``torch.save`` that holds tensors and plain values only; no code of the file is run.

    Args:
        path: of the file.
        map_location: where the tensors go.
        error: what a failure is raised as.
        advice: the end of the error's message.

    Raises:
        AliceError: (or ``error``) if the file is missing, empty, damaged, or of another kind.
    """
    import torch  # late: other users of this module do without it

    cause = None
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start and start[8:] != b"{":
            return torch.load(path, map_location=map_location, weights_only=True)
        why = "it is a .safetensors file, not one of torch.save" if start else "it is empty"
    except MemoryError:
        raise
    except Exception as failure:  # a damaged file can cause nearly any exception in torch
        why, cause = (str(failure).splitlines() or [type(failure).__name__])[0], failure
    raise error(f"{path}: not readable as weights ({why}). {advice}".strip()) from cause


class Mapped:
    """Notices that a file that is mapped into memory was cut short; reading behind its new end would end the process (SIGBUS).

    Args:
        path: of the file, as it is when it is mapped.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path, self._then = path, os.stat(path)

    def require_whole(self) -> None:
        """Call this before reading.

        Raises:
            OSError: if the file is shorter than it was.
        """
        with contextlib.suppress(FileNotFoundError):  # deleted: what is mapped stays until it is closed
            now = os.stat(self._path)
            if now.st_size < self._then.st_size and os.path.samestat(now, self._then):
                raise OSError(
                    f"it was cut short from {self._then.st_size} to {now.st_size} bytes while in use"
                )


def is_plain_name(name: object) -> bool:
    """Whether a name from a file, header or index can name a file in a folder: it has one part and leads nowhere else."""
    return (
        isinstance(name, str)
        and name.strip() not in ("", ".", "..")
        and not set(name) & set("/\\\0")
        and not Path(name).drive
    )


def stays_inside(path: object) -> bool:
    """Whether a relative path from a file, header or index stays in the folder that it is relative to."""
    return (
        isinstance(path, str)
        and "\0" not in path
        and not path.startswith(("/", "\\"))
        and not Path(path).drive
        and ".." not in re.split(r"[/\\]", path)
    )


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
