"""Names from disks and headers cannot steer a terminal, forge a line, or become a spreadsheet's formula."""

import csv
import io
import logging
import re

import pytest
from conftest import write_scan
from seg_bundles import BUNDLES, parser_of

from custom.cli.main import main
from custom.errors import AliceError, ShownFormatter, plain_message, shown
from custom.evaluation.scores.csv_rows import read_rows, write_rows

FORGED = "a\nalice: all scans are fine\x1b[2J\x07"
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]")


@pytest.mark.parametrize(
    "name, said",
    [
        ("plain_Näme 3.nii.gz", "plain_Näme 3.nii.gz"), ("a\nb", r"a\nb"), ("a\x1b[31mb", r"a\x1b[31mb"), ("\x9b2J", r"\x9b2J"),
        ("abc\u202egz.iin", r"abc\u202egz.iin"), ("a\u2028b\rc\td", r"a\u2028b\rc\td"), ("\udcff.nii", r"\udcff.nii"), ("a\\n", "a\\n"),
    ],
)  # fmt: skip
def test_a_name_is_shown_on_one_line(name, said):
    assert shown(name) == said and shown(said) == said


def test_an_error_keeps_its_own_lines_and_no_other():
    error = AliceError(f"net.pt does not fit:\n  {FORGED} is missing\n  and 3 more")
    assert plain_message(error).splitlines() == [
        "net.pt does not fit:", r"  a\nalice: all scans are fine\x1b[2J\x07 is missing", "  and 3 more",
    ]  # fmt: skip


def test_a_log_line_is_shown():
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "Skipped: %s", (FORGED,), None)
    assert ShownFormatter("%(message)s").format(record) == r"Skipped: a\nalice: all scans are fine\x1b[2J\x07"


@pytest.mark.parametrize("words", [["scan"], ["build"], ["datalist"]])
def test_commands_that_meet_such_a_file_print_its_name_safely(words, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    folder = tmp_path / "scans"
    write_scan(folder / "good.nii.gz", 0)
    (folder / f"{FORGED}.nii.gz").write_bytes(b"no scan")
    (folder / f"{FORGED}_label.nii.gz").write_bytes(b"no label")
    (folder / f"other{FORGED}_label.nii.gz").write_bytes(b"no label")
    out = {"scan": ["-o", str(tmp_path / "m.json")], "build": [str(tmp_path / "store")]}.get(
        words[0], ["-o", str(tmp_path / "d.json")]
    )
    with pytest.raises(SystemExit):
        main([*words, str(folder), *out])
    printed = "".join(capfd.readouterr())
    assert "all scans are fine" in printed
    assert not STEERING.search(printed.replace("\r", "")) and "\nalice: all scans" not in printed


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_segmentation_bundle_says_such_a_name_on_one_line(bundle):
    from conftest import REPO

    stop = parser_of("inference", bundle=REPO / "bundles" / bundle).get_parsed_content("scripts").stop
    with pytest.raises(SystemExit) as ended:
        stop([f"{FORGED}: no CT.", "", "b: too thin."])
    assert ended.value.code == r"alice_seg: a\nalice: all scans are fine\x1b[2J\x07: no CT. b: too thin."


NAMES = ["=1+1", "+a", "-a", "@SUM(A1)", "\tx", "'=1", "''-a", "'plain", "plain=1", "", "\r=2"]


def test_a_spreadsheet_computes_no_name_and_the_names_come_back(tmp_path):
    rows = [{"case": name, "organ": "liver", "label": 1, "dsc": -0.5} for name in NAMES]
    write_rows(tmp_path / "rows.csv", rows)
    cells = list(csv.reader(io.StringIO((tmp_path / "rows.csv").read_bytes().decode(), newline="")))[1:]
    assert not [cell[0] for cell in cells if cell[0][:1] in ("=", "+", "-", "@", "\t", "\r")]
    assert [cell[3] for cell in cells] == ["-0.5"] * len(NAMES)
    assert [row["case"] for row in read_rows(tmp_path / "rows.csv")] == [*NAMES[:-1], r"\r=2"]
