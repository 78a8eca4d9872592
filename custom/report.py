"""HTML reports: one file with everything inside, readable offline, in light and dark mode, and on paper."""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from custom.errors import AliceError
from custom.files import write_text

# Most colour-blind readers can tell these two apart (ours).
COLOUR_A, COLOUR_B = "#3d84c6", "#e08a1e"
_NUMBER_SIGNS = frozenset("0123456789.,;+-−–±×/%[]()<>≤≥~∞e ")
_LARGEST_SVG = 1_500_000  # bytes; a figure with very many points is smaller as a bitmap (ours)


@dataclass
class Page:
    """An HTML page under construction: call its methods in reading order, then :meth:`write`.

    All text is escaped; markup comes only from the template. Each method returns the page.
    """

    title: str
    lead: str = ""
    footer: str = ""
    refresh: int | None = None  # seconds after which a browser loads the page again
    blocks: list[dict[str, Any]] = field(default_factory=list, init=False)

    @property
    def sections(self) -> list[str]:
        return [block["title"] for block in self.blocks if block["kind"] == "section"]

    def section(self, title: str) -> Page:
        """A heading; three or more of them get links at the top of the page."""
        return self._add("section", title=title, number=len(self.sections) + 1)

    def text(self, text: str) -> Page:
        """Plain text; a blank line starts a new paragraph."""
        return self._add("text", paragraphs=[part for part in re.split(r"\n\s*\n", text.strip()) if part])

    def facts(self, facts: Mapping[str, Any]) -> Page:
        """A row of cards, ``{name: value}``."""
        return self._add("facts", facts=[(name, _cell(value)) for name, value in facts.items()])

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> Page:
        """A table whose first column names the rows; columns of numbers align to the right.

        Raises:
            AliceError: if a row is longer or shorter than the headers.
        """
        for index, row in enumerate(rows):
            if len(row) != len(headers):
                raise AliceError(
                    f"Row {index} has {len(row)} cells under {len(headers)} headers: {list(row)}."
                )
        cells = [[_cell(value) for value in row] for row in rows]
        columns = list(zip(*cells, strict=True)) or [()] * len(headers)
        numeric = [any(column) and set().union(*column) <= _NUMBER_SIGNS for column in columns]
        return self._add("table", headers=headers, rows=cells, numeric=numeric, caption=caption)

    def figure(self, figure: Figure, caption: str = "", *, alt: str = "") -> Page:
        """A matplotlib figure on a white card, on light and on dark pages alike.

        Args:
            figure: made by ``Figure(...)``, not pyplot.
            caption: shown below.
            alt: describes the figure for readers who cannot see it; the caption if empty.
        """
        alt = alt or caption or "Figure"
        image = {"kind": "card", "src": _drawn(figure), "caption": caption, "alt": alt, "width": None}
        return self._add("images", images=[image])

    def image(self, array: ArrayLike, caption: str = "", *, alt: str = "") -> Page:
        """A picture: (H, W) grey or (H, W, 3) colours, in [0, 1] or uint8, first row at the top."""
        return self._add("images", images=[_photo(array, caption, alt)])

    def gallery(self, images: Sequence[tuple[ArrayLike, str]], caption: str = "") -> Page:
        """Pictures side by side, each with its caption, under a common one."""
        return self._add(
            "images", images=[_photo(array, text, "") for array, text in images], caption=caption
        )

    def html(self) -> str:
        """The page as one string."""
        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        environment = jinja2.Environment(
            loader=loader,
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        return environment.get_template("report.html.j2").render(page=self)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, all or nothing."""
        write_text(path, self.html())
        return Path(path)

    def _add(self, kind: str, **block: Any) -> Page:
        self.blocks.append({"kind": kind, "caption": "", **block})
        return self


# -- pictures and cells -----------------------------------------------------------------------------


def _drawn(figure: Figure) -> str:
    """The figure as a data URI: an SVG, or a PNG where that would be very large."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "alice"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    if buffer.tell() <= _LARGEST_SVG:
        return _data_uri("image/svg+xml", buffer.getvalue())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180)
    return _data_uri("image/png", buffer.getvalue())


def _photo(array: ArrayLike, caption: str, alt: str) -> dict[str, Any]:
    pixels = np.asarray(array)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)) or not pixels.size:
        raise AliceError(
            f"A picture is (H, W) or (H, W, 3), got shape {pixels.shape}; choose a slice of the volume."
        )
    if pixels.dtype != np.uint8:
        if not np.isfinite(pixels.astype(float)).all():
            raise AliceError(
                "A picture has nan or infinite pixels; replace them, with np.nan_to_num for example."
            )
        pixels = np.round(np.clip(pixels.astype(float), 0, 1) * 255).astype(np.uint8)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, format="png")
    width = max(pixels.shape[1], 384)  # small crops are enlarged
    uri = _data_uri("image/png", buffer.getvalue())
    return {
        "kind": "photo",
        "src": uri,
        "caption": caption,
        "alt": alt or caption or "Picture",
        "width": width,
    }


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _cell(value: Any) -> str:
    """The text of a table's cell: numbers with four digits, a dash for None and nan."""
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)
