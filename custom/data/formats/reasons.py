"""Reasons to refuse a scan, or to accept it with a warning: each has a code and a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

ACCEPTED, WARNED, REJECTED = "accepted", "warned", "rejected"


class Reason(str, Enum):
    """A code for scripts, with a ``sentence`` for readers and the ``status`` that it gives a scan.

    A ``relational`` reason depends on other scans, so it is decided anew in every run.
    """

    status: str
    sentence: str
    relational: bool

    def __new__(cls, code: str, status: str = "", sentence: str = "", relational: bool = False) -> Reason:
        member = str.__new__(cls, code)
        member._value_ = code
        member.status, member.sentence, member.relational = status, sentence, relational
        return member

    def __str__(self) -> str:
        return str(self.value)

    # -- files and folders ----------------------------------------------------------------------------
    EMPTY_FILE = "empty_file", REJECTED, "The file has no content. Copy it again."
    TRUNCATED = "truncated", REJECTED, "The file ends before its data do. Copy it again."
    BAD_CHECKSUM = "bad_checksum", REJECTED, "The compressed data fail their checksum. Copy it again."
    NOT_AN_IMAGE = "not_an_image", REJECTED, "The content is not of the format that the name promises."
    BAD_HEADER = "bad_header", REJECTED, "The header is damaged or contradicts itself. Convert it again."
    BOMB = "too_large", REJECTED, "The header promises more data than the file can hold or most_bytes allows."
    UNREADABLE = "unreadable", REJECTED, "The file or folder cannot be opened. Check its permissions."
    READER_FAILED = "reader_failed", REJECTED, "The decoder failed on this file. Convert the scan again."
    SYMLINK_LOOP = "symlink_loop", REJECTED, "A link leads back to a folder that is being walked."
    LEAVES_FOLDER = "leaves_folder", REJECTED, "The path or its data lie outside the scanned folder."
    UNSUPPORTED = "unsupported", REJECTED, "This format is not read. Convert it to NIfTI, NRRD or MetaImage."

    # -- grids ------------------------------------------------------------------------------------------
    TWO_D = "two_d", REJECTED, "A flat image; a 3D volume is needed."
    ONE_SLICE = "one_slice", REJECTED, "A single slice along one of its axes; a 3D volume is needed."
    FEW_SLICES = "few_slices", REJECTED, "Fewer slices than asked for."
    FOUR_D = "four_d", REJECTED, "More than three dimensions. Split it into volumes."
    COLOUR = "colour", REJECTED, "Several values in each voxel (colour, vectors or complex numbers)."
    SINGULAR_AFFINE = "singular_affine", REJECTED, "The affine cannot be inverted or is not finite."
    SHEARED_AFFINE = "sheared_affine", REJECTED, "The voxel axes are not at right angles."
    NEGATIVE_SPACING = "negative_spacing", REJECTED, "A voxel size is negative."
    BAD_SPACING = "bad_spacing", REJECTED, "A voxel size is missing, zero or implausible."
    NOT_AXIAL = "not_axial", REJECTED, "The slices are not axial."
    FORMS_DISAGREE = "forms_disagree", WARNED, "qform and sform place the voxels differently; sform is used."
    SPACING_DISAGREES = "spacing_disagrees", WARNED, "Voxel sizes and affine differ; the affine is used."
    NO_ORIENTATION = "no_orientation", WARNED, "The header gives no orientation: left and right are guessed."
    OBLIQUE = "oblique", WARNED, "The grid is turned against the body's axes by more than 10 degrees."

    # -- voxels -----------------------------------------------------------------------------------------
    ZERO_SLOPE = "zero_slope", REJECTED, "The scale factor is zero or not finite. Convert the scan again."
    NOT_FINITE = "not_finite", REJECTED, "Voxels are NaN or infinite."
    OVERFLOW = "int16_overflow", REJECTED, "Values wrapped around or reach the ends of 16 bits."
    CONSTANT = "constant", REJECTED, "Every voxel has the same value."
    ALL_AIR = "all_air", REJECTED, "Nothing but air."
    NO_BODY = "no_body", REJECTED, "No body was found in it."
    NO_INTERCEPT = "no_intercept", REJECTED, "A CT stored without its intercept: water is near 1024, not 0."
    NOT_HU = "not_hu", REJECTED, "The values are not Hounsfield units."
    OTHER_MODALITY = "other_modality", REJECTED, "Not a modality of this profile. Scan it with its own."
    LOOKS_LIKE_LABEL = "looks_like_label", REJECTED, "Only a few whole numbers: is it a label map?"
    ZERO_PADDING = "zero_padding", WARNED, "Filled with 0 HU (water) where there should be air."

    # -- DICOM ------------------------------------------------------------------------------------------
    SPLIT_SERIES = "split_series", WARNED, "One of several acquisitions that were found in one series."
    DAMAGED_SLICES = (
        "damaged_slices",
        WARNED,
        "Files beside it are damaged; slices may be missing at its ends.",
    )
    LOCALIZER = "localizer", REJECTED, "A scout view, not a volume."
    PROJECTION = "projection", REJECTED, "A projection or rendering (MIP, VRT, curved), not the scan itself."
    GANTRY_TILT = "gantry_tilt", REJECTED, "Slices are stacked at a slant (gantry tilt)."
    MISSING_SLICES = "missing_slices", REJECTED, "Slices are missing from the series."
    DUPLICATE_SLICES = "duplicate_slices", REJECTED, "Several slices have the same position."
    UNEVEN_SLICES = "uneven_slices", REJECTED, "The gaps between slices differ: several acquisitions?"
    NO_POSITION = "no_position", REJECTED, "Slices do not say where they lie."
    MULTIFRAME = "multiframe", REJECTED, "A multi-frame object. Convert it to NIfTI or to single slices."
    NO_PIXELS = "no_pixels", REJECTED, "A DICOM object without a picture (report, structure set, directory)."

    # -- among other scans --------------------------------------------------------------------------------
    SPREAD_SERIES = "spread_series", REJECTED, "The series lies in several folders. Put it into one.", True
    DUPLICATE_ID = "duplicate_id", WARNED, "Two scans have the same id; a number was added.", True
    DUPLICATE = "duplicate", REJECTED, "The same voxels as another scan.", True
    NEAR_DUPLICATE = "near_duplicate", WARNED, "Looks like another scan, resampled or converted.", True
    LEAK = "leak", REJECTED, "The same voxels as a scan in the data compared against.", True
    NEAR_LEAK = "near_leak", WARNED, "Looks like a scan in the data compared against.", True
    PATIENT_LEAK = "patient_leak", WARNED, "This patient is in the data compared against.", True
    LABEL_VALUES = "label_values", REJECTED, "Label values must be whole numbers from 0 to 255."
    LABEL_MISMATCH = "label_mismatch", REJECTED, "The label's grid is not its image's.", True
    LABEL_UNUSABLE = "label_unusable", WARNED, "Its label cannot be used; the image is accepted alone.", True
    ORPHAN_LABEL = "orphan_label", WARNED, "A label without its image.", True


class Fault(Exception):
    """A scan cannot be read. Every caller turns it into a record or a ``ScanError``.

    Args:
        reason: the code.
        detail: numbers that explain it; never text from the file, since that may identify a patient.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.sentence} ({detail})" if detail else reason.sentence)
        self.reason, self.detail = reason, detail


def status_of(reasons: Iterable[Reason]) -> str:
    """``rejected`` if one of the reasons is, else ``warned`` if there is any, else ``accepted``."""
    found = {reason.status for reason in reasons}
    return REJECTED if REJECTED in found else WARNED if found else ACCEPTED
