import base64
import io
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from custom import report
from custom.report import Page

EVIL = 'scan "<script>alert(1)</script>" & co'


class Elements(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def line_figure(**text) -> Figure:
    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="black", label="line")
    axes.plot([0, 1], [1, 0], color="red")
    axes.set(**text)
    axes.legend()
    return figure


def full_page() -> Page:
    page = Page(EVIL, lead=EVIL, footer=EVIL)
    page.section(EVIL).text(EVIL).facts({EVIL: EVIL}).table([EVIL, "n"], [[EVIL, 1]], EVIL)
    page.section("two").figure(line_figure(title=EVIL), EVIL, alt=EVIL)
    page.section("three").image(np.zeros((5, 7)), EVIL).gallery([(np.ones((5, 7, 3)), EVIL)] * 2, EVIL)
    return page


def svg(uri: str) -> str:
    kind, content = uri.split(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(content).decode()


def pixels(uri: str) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_names_cannot_become_markup():
    elements = Elements(full_page().html())
    assert not elements.all("script")
    assert elements.words.count(EVIL) >= 10
    assert [attributes["alt"] for attributes in elements.all("img")] == [EVIL] * 4


def test_nothing_is_loaded_from_elsewhere():
    html = full_page().html()
    elements = Elements(html)
    sources = [
        attributes[key]
        for _, attributes in elements.found
        for key in ("src", "srcset", "href")
        if key in attributes
    ]
    assert len(sources) == 7  # four pictures, three links to sections
    assert all(source.startswith(("data:image/", "#section-")) for source in sources)
    assert "url(" not in html
    assert "@import" not in html
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in elements.found}
    (policy,) = [meta["content"] for meta in elements.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")


def test_links_lead_to_their_sections():
    elements = Elements(full_page().html())
    targets = [f"#{attributes['id']}" for attributes in elements.all("h2")]
    assert (
        [attributes["href"] for attributes in elements.all("a")]
        == targets
        == ["#section-1", "#section-2", "#section-3"]
    )


def test_tables_read_aloud():
    page = Page("t").table(
        ["organ", "cases", "note"], [["liver", 12, "-"], ["spleen", 3.14159265, None]], "Scores"
    )
    elements = Elements(page.html())
    assert [attributes["scope"] for attributes in elements.all("th")] == ["col"] * 3 + ["row"] * 2
    assert [attributes.get("class") for attributes in elements.all("th")[:3]] == [None, "number", "number"]
    assert len(elements.all("caption")) == 1
    assert elements.all("html") == [{"lang": "en"}]
    assert "3.142" in elements.words
    assert "–" in elements.words


def test_a_row_of_other_length_is_refused():
    with pytest.raises(ValueError, match="Row 1 has 1 cells under 2 headers"):
        Page("t").table(["a", "b"], [[1, 2], [3]])


def test_figures_bring_their_own_white_paper_and_stay_as_they_were():
    figure = line_figure(xlabel="x")
    page = Page("t").figure(figure, "caption")
    (image,) = Elements(page.html()).all("img")
    assert image["class"] == "card"
    before_axes = svg(image["src"]).partition("axes_1")[0]
    assert "fill: #ffffff" in before_axes  # black ink stays legible where the page is dark
    assert ".card { border-radius: 8px; background: #fff;" in page.html()
    assert figure.axes[0].lines[0].get_color() == "black"
    assert Page("t").figure(figure, "caption").html() == page.html()


def test_clouds_of_points_become_bitmaps(monkeypatch):
    monkeypatch.setattr(report, "_LARGEST_SVG", 30_000)
    figure = Figure()
    figure.add_subplot().plot(np.random.default_rng(0).random(3000), ".")
    (image,) = Elements(Page("t").figure(figure, "cloud").html()).all("img")
    assert image["src"].startswith("data:image/png")


def test_pictures_keep_their_pixels():
    grey = np.linspace(0, 1, 35).reshape(5, 7)
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    images = Elements(Page("t").image(grey, "g").image(colours, "c").html()).all("img")
    np.testing.assert_allclose(pixels(images[0]["src"])[..., 0], grey, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(pixels(images[1]["src"])[..., :3], colours / 255, atol=1e-6)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((3, 4, 5)), r"got shape \(3, 4, 5\); choose a slice"),
        (np.full((3, 4), np.nan), "nan or infinite"),
    ],
)
def test_what_is_no_picture_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        Page("t").image(array)


def test_write_leaves_one_whole_file(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    page = full_page()
    assert page.write(path) == path
    assert path.read_text(encoding="utf-8") == page.html()
    page.table(["a"], [[1]]).blocks[-1].pop("rows")  # a page that cannot be rendered
    with pytest.raises(Exception, match="rows"):
        page.write(path)
    assert path.read_text(encoding="utf-8").endswith("</html>")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_page_opens_in_a_browser(tmp_path):
    path = full_page().write(tmp_path / "page.html")
    command = [
        "chromium",
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
    ]
    result = subprocess.run(
        [*command, "--window-size=800,1200", f"--screenshot={tmp_path}/page.png", path.as_uri()],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (tmp_path / "page.png").exists(), result.stderr
    assert "Refused to" not in result.stderr  # the page's own policy blocks nothing it needs
    assert np.ptp(matplotlib.image.imread(tmp_path / "page.png")) > 0.5
