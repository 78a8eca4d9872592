"""The error that answers a user: its message names what is wrong and the way out, and is shown without a traceback."""

from __future__ import annotations

from collections.abc import Iterator


class AliceError(ValueError):
    """Something that a user can mend. Every error that this package raises on purpose is one.

    Any other error is a bug and keeps its traceback.
    """


def plain_message(error: BaseException) -> str | None:
    """The message of the first :class:`AliceError` in a chain of errors; None if there is none.

    A loader's worker passes an error on as text that ends with ``module.Name: message``. Only the message is returned.
    """
    for link in chain_of(error):
        if isinstance(link, AliceError):
            last = (
                str(link).strip().splitlines()[-1] if "Traceback (most recent call last)" in str(link) else ""
            )
            return last.partition(f"{type(link).__name__}: ")[2] or last or str(link)
    return None


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
