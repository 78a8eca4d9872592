"""Pages to look at: one HTML file each with everything inline, for light, dark, paper and no network."""

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
import matplotlib.colors
import matplotlib.image
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.spines import Spine
from matplotlib.text import Text
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from custom.evaluation.metrics import write_text
from custom.evaluation.statistics import COLUMNS, HOW, OVERALL, Comparison, table_cells

# Told apart by most colour-blind eyes, and legible on both papers (ours).
COLOUR_A, COLOUR_B = "#3d84c6", "#e08a1e"
_REFERENCE_RGB, _PREDICTION_RGB = (0.30, 0.85, 0.45), (1.0, 0.45, 0.75)
_METRICS = {"dsc": "DSC", "nsd": "NSD", "hd95": "HD95 in mm"}
_DARK_INK = "#e4e8ee"  # --ink of the template's dark half
_NUMBER_SIGNS = frozenset("0123456789.,;+-−–±×/%[]()<>≤≥~∞e ")
_LARGEST_SVG = 1_500_000  # bytes; beyond it (clouds of points) a bitmap is lighter (ours)


@dataclass
class Page:
    """An HTML page under construction: call its methods in reading order, then :meth:`write`.

    All text is escaped: markup comes from the template alone. Each method returns the page.
    """

    title: str
    lead: str = ""
    footer: str = ""
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
            ValueError: if a row is longer or shorter than the headers.
        """
        for index, row in enumerate(rows):
            if len(row) != len(headers):
                raise ValueError(
                    f"Row {index} has {len(row)} cells under {len(headers)} headers: {list(row)}."
                )
        cells = [[_cell(value) for value in row] for row in rows]
        columns = list(zip(*cells, strict=True)) or [()] * len(headers)
        numeric = [any(column) and set().union(*column) <= _NUMBER_SIGNS for column in columns]
        return self._add("table", headers=headers, rows=cells, numeric=numeric, caption=caption)

    def figure(self, figure: Figure, caption: str = "", *, alt: str = "") -> Page:
        """A matplotlib figure, drawn once for light and once for dark paper.

        Args:
            figure: made by ``Figure(...)``, not pyplot. What is black in it turns light on dark paper.
            caption: shown below.
            alt: what a reader who cannot see it should know; the caption if empty.
        """
        light, dark = _drawn(figure), _drawn(figure, ink=_DARK_INK)
        image = {"light": light, "dark": dark, "caption": caption, "alt": alt or caption or "Figure"}
        return self._add("images", images=[image])

    def image(self, array: ArrayLike, caption: str = "", *, alt: str = "") -> Page:
        """A picture: (H, W) grey or (H, W, 3) colours, as [0, 1] or uint8, the first row on top."""
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


# -- two runs compared ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlay:
    """A case worth a look: one organ on one slice, the reference and both predictions.

    Attributes:
        caption: the case, the organ and its scores.
        volume: intensities in [0, 1] (X, Y, Z); x towards Right, y Anterior, z Superior.
        reference: mask of the organ (X, Y, Z).
        prediction_a: the same from run A.
        prediction_b: the same from run B.
        spacing: millimetres per voxel along x, y, z.
    """

    caption: str
    volume: ArrayLike
    reference: ArrayLike
    prediction_a: ArrayLike
    prediction_b: ArrayLike
    spacing: Sequence[float] = (1.0, 1.0, 1.0)


def comparison_page(
    tables: Mapping[str, Sequence[Comparison]],
    rows_a: Sequence[Mapping[str, Any]],
    rows_b: Sequence[Mapping[str, Any]],
    *,
    name_a: str = "A",
    name_b: str = "B",
    overlays: Sequence[Overlay] = (),
) -> Page:
    """The page of ``alice compare``: intervals, box plots and tables per metric, then the worst cases.

    Args:
        tables: ``{metric: compare(rows_a, rows_b, metric)}``.
        rows_a: the rows themselves, for the box plots.
        rows_b: the same of run B.
        name_a: what run A is.
        name_b: what run B is.
        overlays: cases to show, worst first.
    """
    page = Page(f"{name_b} against {name_a}", f"A is {name_a}, B is {name_b}. Differences are B - A.")
    protocols = sorted({str(row.get("protocol", "")) for row in [*rows_a, *rows_b]} - {""})
    cases = {str(row["case"]) for row in rows_a} & {str(row["case"]) for row in rows_b}
    facts: dict[str, Any] = {"protocol": ", ".join(protocols) or "unnamed", "cases in both runs": len(cases)}
    for metric, lines in tables.items():
        *_, overall = table_cells(lines)
        facts[f"{_METRICS.get(metric, metric)}, B - A"] = overall[4]
    page.facts(facts)

    for metric, lines in tables.items():
        name = _METRICS.get(metric, metric)
        page.section(name)
        cells = table_cells(lines)
        overall = cells[-1]
        found = f"Overall {overall[4]} {overall[5]}, {overall[1]} pairs."
        page.figure(
            difference_figure(lines, metric),
            f"Mean paired difference in {name}, B - A, with its 95 % interval. {found}",
        )
        page.figure(
            box_figure(rows_a, rows_b, metric, name_a=name_a, name_b=name_b),
            f"{name} of each case, a dot each. Boxes hold the middle half, with a line at the median and "
            "whiskers to the extremes. Scores that are nan or infinite are not drawn; the table counts them.",
        )
        page.table(COLUMNS, cells, f"{name} per organ. A: {name_a}. B: {name_b}.")

    if overlays:
        page.section("Worst cases").text(
            "The axial slice on which reference and predictions differ most, patient's right on the left. "
            "Green outlines the reference, pink the prediction."
        )
    for overlay in overlays:
        worst = worst_slice(overlay.reference, overlay.prediction_a, overlay.prediction_b)
        pictures: list[tuple[ArrayLike, str]] = [
            (_axial(overlay, prediction, worst), f"{run} ({of})")
            for run, of, prediction in (
                ("A", name_a, overlay.prediction_a),
                ("B", name_b, overlay.prediction_b),
            )
        ]
        page.gallery(pictures, f"{overlay.caption}, slice {worst}")
    return page.section("How these numbers came about").text(HOW)


def difference_figure(lines: Sequence[Comparison], metric: str) -> Figure:
    """Each organ's mean difference and interval on one axis, zero marked."""
    figure = Figure(figsize=(7.5, 0.8 + 0.3 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#8a94a3", linewidth=1)
    for y, line in enumerate(lines):
        bold = line.organ == OVERALL
        if not math.isnan(line.interval.low):
            axes.plot(
                line.interval, (y, y), color=COLOUR_B, linewidth=3 if bold else 1.8, solid_capstyle="butt"
            )
        axes.plot(
            line.difference, y, marker="D" if bold else "o", color=COLOUR_B, markersize=7 if bold else 5
        )
    axes.set_yticks(range(len(lines)), [line.organ for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel(f"{_METRICS.get(metric, metric)}, B - A")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def box_figure(
    rows_a: Sequence[Mapping[str, Any]],
    rows_b: Sequence[Mapping[str, Any]],
    metric: str,
    *,
    name_a: str = "A",
    name_b: str = "B",
) -> Figure:
    """Box plots of two runs side by side, organ by organ, with a dot per case."""
    organs = list(dict.fromkeys(str(row["organ"]) for row in [*rows_a, *rows_b]))
    figure = Figure(figsize=(7.5, 1.1 + 0.5 * len(organs)), layout="constrained")
    axes = figure.add_subplot()
    runs = ((rows_a, -0.19, COLOUR_A), (rows_b, 0.19, COLOUR_B))
    for rows, shift, colour in runs:
        for y, organ in enumerate(organs):
            scores = [row[metric] for row in rows if row["organ"] == organ and math.isfinite(row[metric])]
            if not scores:
                continue
            lowest, first, median, third, highest = np.quantile(scores, (0, 0.25, 0.5, 0.75, 1))
            middle = y + shift
            axes.plot((lowest, highest), (middle, middle), color=colour, linewidth=1)
            box = Rectangle(
                (first, middle - 0.15), third - first, 0.3, facecolor=colour + "40", edgecolor=colour
            )
            axes.add_patch(box)
            axes.plot((median, median), (middle - 0.15, middle + 0.15), color=colour, linewidth=2.2)
            # spread over the box's width, in an order that is the same in every drawing
            offsets = 0.11 * np.sin(2.4 * np.arange(len(scores)))
            axes.plot(scores, middle + offsets, ".", color=colour, markersize=4, alpha=0.7)
    axes.set_yticks(range(len(organs)), organs)
    axes.invert_yaxis()
    axes.set_xlabel(_METRICS.get(metric, metric))
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=COLOUR_A, label=f"A: {name_a}"), Patch(color=COLOUR_B, label=f"B: {name_b}")]
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar in a name is a dollar
    return figure


def worst_slice(reference: ArrayLike, *predictions: ArrayLike) -> int:
    """The axial slice with most voxels on which a prediction and the reference differ."""
    masks = [np.asarray(mask, dtype=bool) for mask in (reference, *predictions)]
    differing = [(masks[0] ^ mask).sum(axis=(0, 1)) for mask in masks[1:]]
    # where nothing differs, show the organ's largest slice
    return int(np.argmax(sum(differing) if np.any(differing) else masks[0].sum(axis=(0, 1))))


def axial_overlay(
    image: ArrayLike, reference: ArrayLike, prediction: ArrayLike, spacing: Sequence[float] = (1.0, 1.0)
) -> NDArray[np.float64]:
    """A slice as radiologists hold it, with the outlines of reference (green) and prediction (pink).

    Args:
        image: intensities in [0, 1] (X, Y), x towards Right and y Anterior.
        reference: mask (X, Y).
        prediction: mask (X, Y).
        spacing: millimetres per pixel along x, y.

    Returns:
        Colours in [0, 1] (H, W, 3), square pixels, anterior on top and the patient's right on the left.
    """
    grey = np.clip(np.asarray(image, dtype=float), 0, 1)
    extent_mm = np.array(grey.shape) * np.asarray(spacing, dtype=float)
    size = np.maximum(1, np.round(extent_mm * max(384 / extent_mm.max(), 1e-6))).astype(int)

    columns, rows = (
        np.minimum((np.arange(new) + 0.5) * old / new, old - 1).astype(int)[::-1]
        for new, old in zip(size, grey.shape, strict=True)
    )
    enlarged = (np.asarray(part)[np.ix_(columns, rows)].T for part in (grey, reference, prediction))
    shown, mask_r, mask_p = enlarged
    colours = np.repeat(shown[..., None], 3, axis=2).astype(float)
    for mask, colour in ((mask_p, _PREDICTION_RGB), (mask_r, _REFERENCE_RGB)):
        inside = mask.astype(bool)
        colours[inside & ~ndimage.binary_erosion(inside, iterations=2)] = colour
    return colours


def _axial(overlay: Overlay, prediction: ArrayLike, z: int) -> NDArray[np.float64]:
    image, reference, predicted = (
        np.asarray(part)[..., z] for part in (overlay.volume, overlay.reference, prediction)
    )
    return axial_overlay(image, reference, predicted, overlay.spacing[:2])


# -- pictures and cells -----------------------------------------------------------------------------


def _drawn(figure: Figure, ink: str | None = None) -> str:
    """The figure as a data URI on transparent paper; with ``ink``, what is black has that colour."""
    FigureCanvasAgg(figure)
    restored = _reinked(figure, ink) if ink else []
    buffer = io.BytesIO()
    try:
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "alice"}):
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            if buffer.tell() <= _LARGEST_SVG:
                return _data_uri("image/svg+xml", buffer.getvalue())
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", transparent=True, dpi=180)
            return _data_uri("image/png", buffer.getvalue())
    finally:
        for set_colour, colour in restored:
            set_colour(colour)


def _reinked(figure: Figure, ink: str) -> list[tuple[Any, Any]]:
    """Give black texts, axes and lines another colour, and legends no paper; returns how to undo it."""
    restored: list[tuple[Any, Any]] = []

    def recolour(set_colour: Any, colour: Any, new: str) -> None:
        restored.append((set_colour, colour))
        set_colour(new)

    def black(colour: Any) -> bool:
        *rgb, alpha = matplotlib.colors.to_rgba(colour)
        return rgb == [0, 0, 0] and alpha > 0

    figure.canvas.draw()  # ticks exist only once drawn
    for artist in figure.findobj():
        if isinstance(artist, Spine) and black(artist.get_edgecolor()):
            recolour(artist.set_edgecolor, artist.get_edgecolor(), ink)
        elif isinstance(artist, Text) and black(artist.get_color()):
            recolour(artist.set_color, artist.get_color(), ink)
        elif isinstance(artist, Line2D):  # tick marks are lines with markers
            if black(artist.get_markeredgecolor()):
                recolour(artist.set_markeredgecolor, artist.get_markeredgecolor(), ink)
            if black(artist.get_markerfacecolor()):
                recolour(artist.set_markerfacecolor, artist.get_markerfacecolor(), ink)
            if black(artist.get_color()):
                recolour(artist.set_color, artist.get_color(), ink)
        elif isinstance(artist, Legend):
            frame = artist.get_frame()
            recolour(frame.set_facecolor, frame.get_facecolor(), "none")
    return restored


def _photo(array: ArrayLike, caption: str, alt: str) -> dict[str, Any]:
    pixels = np.asarray(array)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)) or not pixels.size:
        raise ValueError(
            f"A picture is (H, W) or (H, W, 3), got shape {pixels.shape}; choose a slice of the volume."
        )
    if pixels.dtype != np.uint8:
        if not np.isfinite(pixels.astype(float)).all():
            raise ValueError(
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
        "light": uri,
        "dark": None,
        "caption": caption,
        "alt": alt or caption or "Picture",
        "width": width,
    }


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _cell(value: Any) -> str:
    """A value as readers want it: four digits of a number, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)
