"""How a transform refuses a file: one sentence that names it."""

from __future__ import annotations

import sys
from typing import Any


class Refusal(ValueError):
    """A file cannot be used.

    Args:
        path: of the file.
        why: what follows its name in the sentence.
    """

    def __init__(self, path: str, why: str = "") -> None:
        super().__init__(f"{path}{why}")
        self.path, self.why = path, why.strip(" :.")


def refuse(path: str, why: str) -> Exception:
    """The error to raise. Where MONAI Label serves the bundle, it becomes an HTTP answer (422) with the sentence."""
    if "monailabel" not in sys.modules:
        return Refusal(path, why)
    from starlette.exceptions import HTTPException  # of MONAI Label's server

    class RefusalOverHttp(HTTPException, Refusal):
        def __init__(self) -> None:
            HTTPException.__init__(self, status_code=422, detail=f"{path}{why}")
            self.path, self.why = path, why.strip(" :.")

    return RefusalOverHttp()


def refusal_in(error: BaseException, path: str) -> Refusal:
    """The refusal among the errors that one came from, as MONAI wraps those of transforms.

    Args:
        error: of a transform.
        path: of the file, where it is another error: then it could not be read.
    """
    while not isinstance(error, Refusal):
        origin = error.__cause__ or error.__context__
        if origin is None:
            lines = str(error).strip().splitlines()
            return Refusal(path, f" cannot be read ({lines[0] if lines else type(error).__name__}).")
        error = origin
    return error


def name_of(image: Any) -> str:
    """File that an image was read from."""
    return str(image.meta.get("filename_or_obj", "the image"))
