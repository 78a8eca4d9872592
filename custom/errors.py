"""The error that answers a user: its message names what is wrong and the way out, and is shown without a traceback."""

from __future__ import annotations

import logging
from collections.abc import Iterator


class AliceError(ValueError):
    """Something that a user can mend. Every error that this package raises on purpose is one.

    Any other error is a bug and keeps its traceback.
    """


def shown(text: object, *, lines: bool = False) -> str:
    """Text for a terminal or a log: characters that steer a terminal or break a line are spelt out, such as ``\\x1b``.

    Names come from disks, headers and archives, and may hold anything.

    Args:
        text: a name, or a message that holds names.
        lines: keep a line break before an indented line, which is how this package continues a message.
    """
    made = []
    for i, sign in enumerate(said := str(text)):
        keep = sign.isprintable() or (lines and sign == "\n" and said.startswith("  ", i + 1))
        made.append(sign if keep else sign.encode("unicode_escape").decode())
    return "".join(made)


class ShownFormatter(logging.Formatter):
    """Log lines that pass through :func:`shown`."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message, lines=True)
        return super().formatMessage(record)


def plain_message(error: BaseException) -> str | None:
    """The message of the first :class:`AliceError` in a chain of errors; None if there is none.

    Control characters in it are spelt out, see :func:`shown`. A loader's worker passes an error on as text that ends with ``module.Name: message``. Only the message is returned.
    """
    for link in chain_of(error):
        if isinstance(link, AliceError):
            last = (
                str(link).strip().splitlines()[-1] if "Traceback (most recent call last)" in str(link) else ""
            )
            return shown(last.partition(f"{type(link).__name__}: ")[2] or last or str(link), lines=True)
    return None


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
