"""A corpus of damage: one good scan, spoilt in every way we know, each with the reason it must be given."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from custom.data.formats.reasons import Reason

SHAPE, SPACING = (37, 41, 23), (3.0, 3.1, 4.0)
DAMAGES: dict[str, Damage] = {}


@dataclass(frozen=True)
class Damage:
    """``make(folder)`` leaves a folder in which the scan must be given ``reason``."""

    reason: Reason
    make: Callable[[Path], None]


def damage(reason: Reason):
    def keep(make: Callable[[Path], None]):
        DAMAGES[make.__name__] = Damage(reason, make)
        return make

    return keep


# -- the good scan --------------------------------------------------------------------------------------


def good_volume(seed: int = 0, shape=SHAPE) -> np.ndarray:
    """A body with two organs in air, int16 HU."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    volume = np.full(shape, -1000.0)
    body = (x / 0.8) ** 2 + (y / 0.7) ** 2 < 1
    volume[body] = 40 + 30 * np.sin(5 * z[body] + seed)
    for _ in range(6):
        cx, cy, cz = rng.uniform(-0.5, 0.5, 3)
        organ = ((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) < rng.uniform(0.04, 0.15)
        volume[organ & body] = rng.uniform(-700, 500)
    volume += rng.normal(0, 8, shape)
    return np.maximum(volume, -1024).round().astype(np.int16)


def good_affine() -> np.ndarray:
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    affine[:3, 3] = (55.0, 60.0, -46.0)
    return affine


def write_nifti(path: Path, volume=None, affine=None, header: Callable | None = None) -> Path:
    """A NIfTI with both forms set; ``header(header)`` may change what is written, unchecked."""
    volume = good_volume() if volume is None else volume
    image = nib.Nifti1Image(volume, good_affine() if affine is None else affine)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    content = bytearray(image.to_bytes())
    if header:
        raw = nib.Nifti1Header(bytes(content[:348]), check=False)
        header(raw)
        content[:348] = raw.binaryblock
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(bytes(content), 1) if path.name.endswith(".gz") else bytes(content))
    return path


def nrrd_bytes(volume=None, encoding="gzip", **changes) -> bytes:
    """A NRRD; ``changes`` replace header fields (None leaves one out)."""
    volume = good_volume() if volume is None else volume
    fields = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, volume.shape)),
        "space directions": "(3,0,0) (0,3.1,0) (0,0,4)",
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": encoding,
        "space origin": "(-55,-60,-46)",
    }
    fields |= {key.replace("_", " "): value for key, value in changes.items()}
    head = "NRRD0004\n" + "".join(f"{k}: {v}\n" for k, v in fields.items() if v is not None) + "\n"
    data = volume.astype("<i2").tobytes(order="F")
    return head.encode() + (gzip.compress(data, 1) if encoding == "gzip" else data)


def mha_bytes(volume=None, packed=True, local=True, **changes) -> bytes:
    """A MetaImage; ``changes`` replace header fields."""
    volume = good_volume() if volume is None else volume
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(packed),
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "-55 -60 -46",
        "ElementSpacing": "3 3.1 4",
        "DimSize": " ".join(map(str, volume.shape)),
        "ElementType": "MET_SHORT",
    }
    fields |= changes
    fields["ElementDataFile"] = fields.pop("ElementDataFile", "LOCAL")
    data = volume.astype("<i2").tobytes(order="F")
    data = zlib.compress(data, 1) if packed else data
    if packed:  # without it ITK returns whatever its memory held
        fields = {"ObjectType": "Image", "CompressedDataSize": str(len(data))} | fields
    head = "".join(f"{k} = {v}\n" for k, v in fields.items() if v is not None)
    return head.encode() + (data if local else b"")


TAGS = {
    "ImageType": (0x0008, 0x0008, b"CS"),
    "SOPClassUID": (0x0008, 0x0016, b"UI"),
    "SOPInstanceUID": (0x0008, 0x0018, b"UI"),
    "StudyDate": (0x0008, 0x0020, b"DA"),
    "AccessionNumber": (0x0008, 0x0050, b"SH"),
    "Modality": (0x0008, 0x0060, b"CS"),
    "InstitutionName": (0x0008, 0x0080, b"LO"),
    "PatientName": (0x0010, 0x0010, b"PN"),
    "PatientID": (0x0010, 0x0020, b"LO"),
    "PatientBirthDate": (0x0010, 0x0030, b"DA"),
    "GantryTilt": (0x0018, 0x1120, b"DS"),
    "StudyInstanceUID": (0x0020, 0x000D, b"UI"),
    "SeriesInstanceUID": (0x0020, 0x000E, b"UI"),
    "AcquisitionNumber": (0x0020, 0x0012, b"IS"),
    "InstanceNumber": (0x0020, 0x0013, b"IS"),
    "Position": (0x0020, 0x0032, b"DS"),
    "Orientation": (0x0020, 0x0037, b"DS"),
    "Temporal": (0x0020, 0x0100, b"IS"),
    "Samples": (0x0028, 0x0002, b"US"),
    "Photometric": (0x0028, 0x0004, b"CS"),
    "Frames": (0x0028, 0x0008, b"IS"),
    "Rows": (0x0028, 0x0010, b"US"),
    "Columns": (0x0028, 0x0011, b"US"),
    "PixelSpacing": (0x0028, 0x0030, b"DS"),
    "BitsAllocated": (0x0028, 0x0100, b"US"),
    "BitsStored": (0x0028, 0x0101, b"US"),
    "HighBit": (0x0028, 0x0102, b"US"),
    "Signed": (0x0028, 0x0103, b"US"),
    "Intercept": (0x0028, 0x1052, b"DS"),
    "Slope": (0x0028, 0x1053, b"DS"),
}


def element(group: int, number: int, vr: bytes, value: bytes) -> bytes:
    if len(value) % 2:
        value += b"\0" if vr in (b"UI", b"OB", b"OW") else b" "
    if vr in (b"OB", b"OW", b"SQ", b"UN"):
        return struct.pack("<HH2sHI", group, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", group, number, vr, len(value)) + value


def dicom_bytes(
    plane: np.ndarray | None, syntax: str = "1.2.840.10008.1.2.1", pixels: bytes | None = None, **changes
) -> bytes:
    """One slice in explicit little endian: ``plane`` (columns, rows) in HU, ``changes`` by the names in TAGS."""
    fields = {
        "ImageType": "ORIGINAL\\PRIMARY\\AXIAL",
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SOPInstanceUID": "1.2.3.4.5",
        "Modality": "CT",
        "PatientID": "MRN-4711",
        "StudyInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": "1.2.3.4.1",
        "AcquisitionNumber": "1",
        "Orientation": "1\\0\\0\\0\\1\\0",
        "Samples": 1,
        "Photometric": "MONOCHROME2",
        "PixelSpacing": "3.1\\3",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "Signed": 1,
        "Intercept": "-1024",
        "Slope": "1",
    }
    if plane is not None:
        fields |= {"Columns": plane.shape[0], "Rows": plane.shape[1]}
        pixels = (plane.T + 1024).astype("<i2").tobytes() if pixels is None else pixels
    fields |= changes
    meta = element(2, 0x0001, b"OB", b"\0\1")
    meta += element(2, 0x0002, b"UI", str(fields["SOPClassUID"]).encode())
    meta += element(2, 0x0003, b"UI", str(fields["SOPInstanceUID"]).encode())
    meta += element(2, 0x0010, b"UI", syntax.encode())
    body = b""
    for name, (group, number, vr) in sorted(TAGS.items(), key=lambda item: item[1][:2]):
        value = fields.get(name)
        if value is not None:
            coded = struct.pack("<H", value) if vr == b"US" else str(value).encode("latin-1")
            body += element(group, number, vr, coded)
    if pixels is not None:
        body += element(0x7FE0, 0x0010, b"OW", pixels)
    return b"\0" * 128 + b"DICM" + element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta + body


def write_series(
    folder: Path, change: Callable[[int], dict | None] | None = None, volume=None, **changes
) -> list[Path]:
    """A series of axial slices; ``change(z)`` gives each slice's own fields, or None to leave it out."""
    volume = good_volume() if volume is None else volume
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for z in range(volume.shape[2]):
        fields = {
            "Position": f"-55\\-60\\{-46 + SPACING[2] * z:g}",
            "InstanceNumber": str(z + 1),
            "SOPInstanceUID": f"1.2.3.4.5.{z}",
        }
        own = change(z) if change else {}
        if own is None:
            continue
        path = folder / f"slice{z:03d}.dcm"
        path.write_bytes(dicom_bytes(volume[:, :, z], **(fields | changes | own)))
        paths.append(path)
    return paths


# -- NIfTI: bytes ---------------------------------------------------------------------------------------


def packed(content: bytes, level: int = 1) -> bytes:
    return gzip.compress(content, level)


def good_nifti(folder: Path) -> bytes:
    path = write_nifti(folder / "tmp.nii")
    content = path.read_bytes()
    path.unlink()
    return content


@damage(Reason.EMPTY_FILE)
def zero_bytes(folder):
    (folder / "case.nii.gz").touch()


@damage(Reason.EMPTY_FILE)
def zero_bytes_unpacked(folder):
    (folder / "case.nii").touch()


@damage(Reason.NOT_AN_IMAGE)
def text_named_nii(folder):
    (folder / "case.nii").write_text("patient notes\n" * 100)


@damage(Reason.NOT_AN_IMAGE)
def text_named_nii_gz(folder):
    (folder / "case.nii.gz").write_text("patient notes\n" * 100)


@damage(Reason.NOT_AN_IMAGE)
def packed_text(folder):
    (folder / "case.nii.gz").write_bytes(packed(b"patient notes\n" * 100))


@damage(Reason.NOT_AN_IMAGE)
def packed_nothing(folder):
    (folder / "case.nii.gz").write_bytes(packed(b""))


@damage(Reason.TRUNCATED)
def truncated_gz(folder):
    content = packed(good_nifti(folder))
    (folder / "case.nii.gz").write_bytes(content[: len(content) // 2])


@damage(Reason.TRUNCATED)
def truncated_by_its_trailer(folder):
    (folder / "case.nii.gz").write_bytes(packed(good_nifti(folder))[:-8])


@damage(Reason.TRUNCATED)
def truncated_in_gz_header(folder):
    (folder / "case.nii.gz").write_bytes(packed(good_nifti(folder))[:7])


@damage(Reason.TRUNCATED)
def truncated_nii(folder):
    (folder / "case.nii").write_bytes(good_nifti(folder)[:-1000])


@damage(Reason.TRUNCATED)
def truncated_in_header(folder):
    (folder / "case.nii").write_bytes(good_nifti(folder)[:200])


@damage(Reason.TRUNCATED)
def shorter_content_packed(folder):
    (folder / "case.nii.gz").write_bytes(packed(good_nifti(folder)[:-1000]))


@damage(Reason.BAD_CHECKSUM)
def wrong_crc(folder):
    content = bytearray(packed(good_nifti(folder)))
    content[-8] ^= 0xFF
    (folder / "case.nii.gz").write_bytes(content)


@damage(Reason.BAD_CHECKSUM)
def wrong_length_in_trailer(folder):
    content = bytearray(packed(good_nifti(folder)))
    content[-1] ^= 0xFF
    (folder / "case.nii.gz").write_bytes(content)


@damage(Reason.BAD_CHECKSUM)
def flipped_bits(folder):
    content = bytearray(packed(good_nifti(folder)))
    content[len(content) // 2] ^= 0xFF
    (folder / "case.nii.gz").write_bytes(content)


@damage(Reason.BOMB)
def promises_gigabytes(folder):
    write_nifti(
        folder / "case.nii.gz", header=lambda h: h["dim"].__setitem__(slice(1, 4), (1024, 1024, 1000))
    )


@damage(Reason.BOMB)
def promises_terabytes(folder):
    write_nifti(
        folder / "case.nii", header=lambda h: h["dim"].__setitem__(slice(1, 4), (32767, 32767, 32767))
    )


@damage(Reason.BOMB)
def holds_more_than_it_tells(folder):
    (folder / "case.nii.gz").write_bytes(packed(good_nifti(folder) + bytes(4_000_000)))


def header_damage(name: str, reason: Reason, change: Callable):
    def make(folder):
        write_nifti(folder / "case.nii.gz", header=change)

    DAMAGES[name] = Damage(reason, make)


def put(key, value):
    return lambda header: header.__setitem__(key, value)


def put_at(key, index, value):
    return lambda header: header[key].__setitem__(index, value)


header_damage("nine_dimensions", Reason.BAD_HEADER, put_at("dim", 0, 9))
header_damage("swapped_dimensions", Reason.BAD_HEADER, put_at("dim", 0, -3))
header_damage("negative_dimension", Reason.BAD_HEADER, put_at("dim", 2, -41))
header_damage("no_voxels", Reason.BAD_HEADER, put_at("dim", 1, 0))
header_damage("unknown_voxel_type", Reason.BAD_HEADER, put("datatype", 77))
header_damage("wrong_magic", Reason.BAD_HEADER, put("magic", b"abc"))
header_damage("header_of_a_pair", Reason.BAD_HEADER, put("magic", b"ni1"))
header_damage("data_far_away", Reason.BAD_HEADER, put("vox_offset", 1e12))
header_damage("data_inside_header", Reason.BAD_HEADER, put("vox_offset", 16))
header_damage("data_nowhere", Reason.BAD_HEADER, put("vox_offset", np.nan))
header_damage("wider_type_than_data", Reason.TRUNCATED, put("datatype", 64))
header_damage("zero_slope", Reason.ZERO_SLOPE, lambda h: (put("scl_slope", 0)(h), put("scl_inter", -1024)(h)))
header_damage(
    "infinite_slope", Reason.ZERO_SLOPE, lambda h: (put("scl_slope", np.inf)(h), put("scl_inter", 0)(h))
)
header_damage("negative_spacing", Reason.NEGATIVE_SPACING, put_at("pixdim", 2, -3.1))
header_damage("zero_spacing", Reason.BAD_SPACING, put_at("pixdim", 3, 0))
header_damage("nan_spacing", Reason.BAD_SPACING, put_at("pixdim", 1, np.nan))
header_damage("singular_sform", Reason.SINGULAR_AFFINE, put("srow_z", (0, 0, 0, 0)))
header_damage("dependent_axes", Reason.SINGULAR_AFFINE, lambda h: put("srow_y", h["srow_x"] * 2)(h))
header_damage("nan_sform", Reason.SINGULAR_AFFINE, put("srow_x", (np.nan, 0, 0, 0)))
header_damage("sheared_sform", Reason.SHEARED_AFFINE, put("srow_y", (0, -3.1, 0.8, 60)))
header_damage("forms_disagree", Reason.FORMS_DISAGREE, put("qoffset_x", 0))
header_damage("mirrored_qform", Reason.FORMS_DISAGREE, put_at("pixdim", 0, -1))
header_damage(
    "spacing_disagrees",
    Reason.SPACING_DISAGREES,
    lambda h: (put_at("pixdim", 3, 5.0)(h), put("qform_code", 0)(h)),
)
header_damage(
    "no_orientation", Reason.NO_ORIENTATION, lambda h: (put("qform_code", 0)(h), put("sform_code", 0)(h))
)


# -- NIfTI: grids and voxels ------------------------------------------------------------------------------


def volume_damage(name: str, reason: Reason, volume: Callable[[], np.ndarray], affine=None):
    def make(folder):
        write_nifti(folder / "case.nii.gz", volume(), affine)

    DAMAGES[name] = Damage(reason, make)


def with_voxel(value) -> np.ndarray:
    volume = good_volume().astype(np.float32)
    volume[5, 6, 7] = value
    return volume


def turned(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]]) @ good_affine()


CORONAL = np.array([[3.0, 0, 0, 0], [0, 0, 9.0, 0], [0, 3.0, 0, 0], [0, 0, 0, 1]])
HUGE = np.diag([300.0, 300.0, 400.0, 1.0])
COLOUR = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])

volume_damage("movie", Reason.FOUR_D, lambda: np.stack([good_volume()] * 2, -1))
volume_damage("picture_in_colour", Reason.COLOUR, lambda: np.zeros(SHAPE, COLOUR))
volume_damage("complex_numbers", Reason.COLOUR, lambda: good_volume().astype(np.complex64))
volume_damage("flat_picture", Reason.TWO_D, lambda: good_volume()[:, :, 9])
volume_damage("one_slice", Reason.ONE_SLICE, lambda: good_volume()[:, :, 9:10])
volume_damage("few_slices", Reason.FEW_SLICES, lambda: good_volume()[:, :, :7])
volume_damage("coronal_slices", Reason.NOT_AXIAL, good_volume, CORONAL)
volume_damage("voxels_of_a_foot", Reason.BAD_SPACING, good_volume, HUGE)
volume_damage("oblique", Reason.OBLIQUE, good_volume, turned(20))
volume_damage("nan_voxel", Reason.NOT_FINITE, lambda: with_voxel(np.nan))
volume_damage("infinite_voxel", Reason.NOT_FINITE, lambda: with_voxel(-np.inf))
volume_damage("wrapped_into_uint16", Reason.OVERFLOW, lambda: good_volume().view(np.uint16))
volume_damage("saturated_int16", Reason.OVERFLOW, lambda: with_voxel(32767).astype(np.int16))
volume_damage("beyond_int16", Reason.OVERFLOW, lambda: with_voxel(1e6))
volume_damage("constant", Reason.CONSTANT, lambda: np.full(SHAPE, 7, np.int16))
volume_damage("nothing_but_air", Reason.ALL_AIR, lambda: (good_volume() // 40 - 900).astype(np.int16))
volume_damage(
    "without_intercept", Reason.NO_INTERCEPT, lambda: np.maximum(good_volume() + 1024, 0).astype(np.int16)
)
volume_damage(
    "eight_bits", Reason.NOT_HU, lambda: np.clip((good_volume() + 1024) / 8, 0, 255).astype(np.float32)
)
volume_damage(
    "between_0_and_1", Reason.NOT_HU, lambda: np.clip((good_volume() + 1024) / 2048, 0, 1).astype(np.float32)
)
volume_damage(
    "mr_like", Reason.OTHER_MODALITY, lambda: np.maximum(good_volume() // 2 + 500, 0).astype(np.int16)
)
volume_damage("label_as_image", Reason.LOOKS_LIKE_LABEL, lambda: (good_volume() > 0).astype(np.uint8) * 3)


@damage(Reason.ZERO_PADDING)
def filled_with_water(folder):
    volume = good_volume()
    volume[volume < -900] = 0
    volume[10:14, 18:22] = -1000  # some air is left inside
    write_nifti(folder / "case.nii.gz", volume)


# -- labels and neighbours --------------------------------------------------------------------------------


@damage(Reason.LABEL_MISMATCH)
def label_of_another_grid(folder):
    write_nifti(folder / "case.nii.gz")
    write_nifti(folder / "case_label.nii.gz", np.ones((37, 41, 22), np.uint8))


@damage(Reason.LABEL_UNUSABLE)
def label_shifted(folder):
    affine = good_affine()
    affine[0, 3] += 30
    write_nifti(folder / "case.nii.gz")
    write_nifti(folder / "case_label.nii.gz", np.ones(SHAPE, np.uint8), affine)


@damage(Reason.LABEL_VALUES)
def label_of_fractions(folder):
    write_nifti(folder / "case.nii.gz")
    write_nifti(
        folder / "case_label.nii.gz", np.linspace(0, 1, 37 * 41 * 23, dtype=np.float32).reshape(SHAPE)
    )


@damage(Reason.LABEL_VALUES)
def scan_as_label(folder):
    write_nifti(folder / "labels" / "case.nii.gz")


@damage(Reason.ORPHAN_LABEL)
def label_alone(folder):
    write_nifti(folder / "case_label.nii.gz", (good_volume() > 0).astype(np.uint8))


@damage(Reason.DUPLICATE_ID)
def two_with_one_id(folder):
    write_nifti(folder / "case.nii.gz", good_volume(1))
    (folder / "case.nrrd").write_bytes(nrrd_bytes(good_volume(2)))


@damage(Reason.DUPLICATE)
def the_same_in_two_formats(folder):
    write_nifti(folder / "a.nii.gz")
    (folder / "b.nrrd").write_bytes(nrrd_bytes())


@damage(Reason.NEAR_DUPLICATE)
def the_same_with_noise(folder):
    write_nifti(folder / "a.nii.gz")
    noise = np.random.default_rng(3).normal(0, 10, SHAPE)
    write_nifti(folder / "b.nii.gz", (good_volume() + noise).astype(np.int16))


@damage(Reason.SYMLINK_LOOP)
def linked_to_its_parent(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "loop").symlink_to(folder, target_is_directory=True)


@damage(Reason.SYMLINK_LOOP)
def linked_to_itself(folder):
    (folder / "case.nii.gz").symlink_to("case.nii.gz")


@damage(Reason.UNREADABLE)
def linked_to_nothing(folder):
    (folder / "case.nii.gz").symlink_to("gone.nii.gz")


@damage(Reason.LEAVES_FOLDER)
def linked_outside(folder):
    write_nifti(folder.parent / "outside" / "case.nii.gz")
    (folder / "case.nii.gz").symlink_to(folder.parent / "outside" / "case.nii.gz")


@damage(Reason.LEAVES_FOLDER)
def folder_linked_outside(folder):
    write_nifti(folder.parent / "outside2" / "case.nii.gz")
    (folder / "sub").symlink_to(folder.parent / "outside2", target_is_directory=True)


@damage(Reason.UNSUPPORTED)
def numpy_archive(folder):
    np.savez(folder / "case.npz", volume=good_volume())


# -- NRRD and MetaImage -----------------------------------------------------------------------------------


def file_damage(name: str, reason: Reason, file: str, content: Callable[[], bytes]):
    def make(folder):
        (folder / file).write_bytes(content())

    DAMAGES[name] = Damage(reason, make)


def cut(content: bytes, count: int) -> bytes:
    return content[:-count]


def flip(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 0xFF
    return bytes(changed)


file_damage("nrrd_text", Reason.NOT_AN_IMAGE, "case.nrrd", lambda: b"hello\n" * 50)
file_damage("nrrd_empty", Reason.EMPTY_FILE, "case.nrrd", lambda: b"")
file_damage("nrrd_truncated", Reason.TRUNCATED, "case.nrrd", lambda: cut(nrrd_bytes(), 900))
file_damage("nrrd_raw_truncated", Reason.TRUNCATED, "case.nrrd", lambda: cut(nrrd_bytes(encoding="raw"), 900))
file_damage("nrrd_wrong_crc", Reason.BAD_CHECKSUM, "case.nrrd", lambda: flip(nrrd_bytes(), -8))
file_damage("nrrd_promises_gigabytes", Reason.BOMB, "case.nrrd", lambda: nrrd_bytes(sizes="1024 1024 1000"))
file_damage(
    "nrrd_promises_too_much", Reason.BOMB, "case.nrrd", lambda: nrrd_bytes(sizes="1000000 1000000 1000000")
)
file_damage("nrrd_vectors", Reason.COLOUR, "case.nrrd", lambda: nrrd_bytes(kinds="vector domain domain"))
file_damage("nrrd_unknown_type", Reason.BAD_HEADER, "case.nrrd", lambda: nrrd_bytes(type="quaternion"))
file_damage("nrrd_without_sizes", Reason.BAD_HEADER, "case.nrrd", lambda: nrrd_bytes(sizes=None))
file_damage("nrrd_words_for_sizes", Reason.BAD_HEADER, "case.nrrd", lambda: nrrd_bytes(sizes="a few voxels"))
file_damage("nrrd_negative_size", Reason.BAD_HEADER, "case.nrrd", lambda: nrrd_bytes(sizes="37 -41 23"))
file_damage("nrrd_four_dimensions", Reason.FOUR_D, "case.nrrd",
            lambda: nrrd_bytes(sizes="37 41 23 5", dimension="4", kinds=None))  # fmt: skip
file_damage("nrrd_singular", Reason.SINGULAR_AFFINE, "case.nrrd",
            lambda: nrrd_bytes(space_directions="(3,0,0) (0,3.1,0) (0,0,0)"))  # fmt: skip
file_damage("nrrd_sheared", Reason.SHEARED_AFFINE, "case.nrrd",
            lambda: nrrd_bytes(space_directions="(3,0,0) (1,3.1,0) (0,0,4)"))  # fmt: skip
file_damage("nrrd_negative_spacing", Reason.NEGATIVE_SPACING, "case.nrrd",
            lambda: nrrd_bytes(space_directions=None, space=None, space_origin=None, spacings="3 -3 4"))  # fmt: skip
file_damage("nrrd_no_space", Reason.NO_ORIENTATION, "case.nrrd",
            lambda: nrrd_bytes(space_directions=None, space=None, space_origin=None, spacings="3 3 4"))  # fmt: skip
file_damage("nrrd_data_outside", Reason.LEAVES_FOLDER, "case.nhdr",
            lambda: nrrd_bytes(data_file="../../etc/passwd"))  # fmt: skip
file_damage("nrrd_data_missing", Reason.TRUNCATED, "case.nhdr", lambda: nrrd_bytes(data_file="gone.raw"))
file_damage("nrrd_as_text", Reason.UNSUPPORTED, "case.nrrd", lambda: nrrd_bytes(encoding="ascii"))
file_damage("mha_text", Reason.NOT_AN_IMAGE, "case.mha", lambda: b"hello\n" * 50)
file_damage("mha_header_cut", Reason.TRUNCATED, "case.mha", lambda: mha_bytes()[:150])
file_damage("mha_truncated", Reason.TRUNCATED, "case.mha", lambda: cut(mha_bytes(), 900))
file_damage("mha_raw_truncated", Reason.TRUNCATED, "case.mha", lambda: cut(mha_bytes(packed=False), 900))
file_damage("mha_flipped_bits", Reason.BAD_CHECKSUM, "case.mha", lambda: flip(mha_bytes(), -3))
file_damage("mha_promises_gigabytes", Reason.BOMB, "case.mha", lambda: mha_bytes(DimSize="1024 1024 1000"))
file_damage("mha_colour", Reason.COLOUR, "case.mha", lambda: mha_bytes(ElementNumberOfChannels="3"))
file_damage(
    "mha_singular", Reason.SINGULAR_AFFINE, "case.mha", lambda: mha_bytes(TransformMatrix="1 0 0 0 0 0 0 0 1")
)
file_damage(
    "mha_negative_spacing", Reason.NEGATIVE_SPACING, "case.mha", lambda: mha_bytes(ElementSpacing="3 3 -4")
)
file_damage("mha_zero_spacing", Reason.BAD_SPACING, "case.mha", lambda: mha_bytes(ElementSpacing="3 0 4"))
file_damage("mha_unknown_type", Reason.BAD_HEADER, "case.mha", lambda: mha_bytes(ElementType="MET_STRING"))
file_damage("mhd_data_outside", Reason.LEAVES_FOLDER, "case.mhd",
            lambda: mha_bytes(local=False, ElementDataFile="../case.raw"))  # fmt: skip
file_damage("mhd_data_missing", Reason.TRUNCATED, "case.mhd",
            lambda: mha_bytes(local=False, ElementDataFile="case.raw"))  # fmt: skip


# -- DICOM ------------------------------------------------------------------------------------------------


def series_damage(
    name: str, reason: Reason, change: Callable[[int], dict | None] | None = None, volume=None, **changes
):
    def make(folder):
        write_series(folder / "series", change, volume() if volume else None, **changes)

    DAMAGES[name] = Damage(reason, make)


def at(z: float, x: float = -55, y: float = -60) -> str:
    return f"{x:g}\\{y:g}\\{z:g}"


series_damage("slice_missing", Reason.MISSING_SLICES, lambda z: None if z == 9 else {})
series_damage("slice_twice", Reason.DUPLICATE_SLICES, lambda z: {"Position": at(-46 + 4 * min(z, 21))})
series_damage(
    "gaps_uneven", Reason.UNEVEN_SLICES, lambda z: {"Position": at(-46 + 4 * z + (1.3 if z > 9 else 0))}
)
series_damage("two_interleaved", Reason.SPLIT_SERIES,
              lambda z: {"Position": at(4 * (z // 2) + 0.75 * (z % 2)), "AcquisitionNumber": str(z % 2 + 1)})  # fmt: skip
series_damage(
    "two_times", Reason.SPLIT_SERIES, lambda z: {"Position": at(4 * (z // 2)), "Temporal": str(z % 2 + 1)}
)
series_damage(
    "two_interleaved_untold", Reason.UNEVEN_SLICES, lambda z: {"Position": at(4 * (z // 2) + 0.75 * (z % 2))}
)
series_damage("tilted_gantry", Reason.GANTRY_TILT, lambda z: {"Position": at(-46 + 4 * z, y=-60 + 0.5 * z)})
series_damage("scout", Reason.LOCALIZER, ImageType="ORIGINAL\\PRIMARY\\LOCALIZER")
series_damage("projection", Reason.PROJECTION, ImageType="DERIVED\\SECONDARY\\MIP")
series_damage("short_series", Reason.FEW_SLICES, lambda z: None if z > 6 else {})
series_damage("single_slice", Reason.FEW_SLICES, lambda z: None if z > 0 else {})
series_damage("coronal_series", Reason.NOT_AXIAL, lambda z: {"Position": f"-55\\{4 * z}\\60"},
              Orientation="1\\0\\0\\0\\0\\-1")  # fmt: skip
series_damage("slices_in_colour", Reason.COLOUR, Samples=3, Photometric="RGB", BitsAllocated=8, BitsStored=8, HighBit=7,
              pixels=bytes(37 * 41 * 3))  # fmt: skip
series_damage("slope_of_zero", Reason.ZERO_SLOPE, Slope="0")
series_damage("negative_pixel_spacing", Reason.NEGATIVE_SPACING, PixelSpacing="3.1\\-3")
series_damage("no_pixel_spacing", Reason.BAD_SPACING, PixelSpacing=None)
series_damage("no_position", Reason.NO_POSITION, Position=None)
series_damage("words_for_position", Reason.BAD_HEADER, Position="here\\there\\everywhere")
series_damage("sheared_rows", Reason.SHEARED_AFFINE, Orientation="1\\0\\0\\0.5\\0.86\\0")
series_damage("many_frames", Reason.MULTIFRAME, Frames="2", pixels=bytes(37 * 41 * 4))
series_damage("no_rows", Reason.BAD_HEADER, Rows=0)
series_damage("slices_promise_too_much", Reason.BOMB, Rows=65535, Columns=65535)
series_damage("slices_promise_more", Reason.TRUNCATED, Rows=60)
series_damage(
    "no_intercept_in_series",
    Reason.NOT_HU,
    Intercept=None,
    Slope=None,
    volume=lambda: good_volume() // 2 + 500,
)
series_damage("series_of_mr", Reason.OTHER_MODALITY, Modality="MR", Intercept="0")
series_damage("series_of_masks", Reason.UNSUPPORTED, Modality="SEG")


@damage(Reason.NO_PIXELS)
def a_report(folder):
    content = dicom_bytes(None, Modality="SR", Samples=None, PixelSpacing=None)
    (folder / "report.dcm").write_bytes(content)


@damage(Reason.READER_FAILED)
def slices_not_decodable(folder):
    for path in write_series(folder, syntax="1.2.840.10008.1.2.4.90"):  # JPEG 2000, which this is not
        head = path.read_bytes().split(b"\xe0\x7f\x10\x00OW")[0]
        items = [b"", b"not a JPEG 2000 stream" * 40]
        fragments = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
        end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        path.write_bytes(head + b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + fragments + end)


@damage(Reason.TRUNCATED)
def slice_truncated(folder):
    path = write_series(folder)[9]
    path.write_bytes(path.read_bytes()[:-700])


@damage(Reason.DAMAGED_SLICES)
def last_slice_truncated(folder):
    path = write_series(folder)[-1]
    path.write_bytes(path.read_bytes()[:-700])


@damage(Reason.TRUNCATED)
def slice_truncated_in_header(folder):
    path = write_series(folder)[9]
    path.write_bytes(path.read_bytes()[:340])


@damage(Reason.EMPTY_FILE)
def slice_empty(folder):
    write_series(folder)[9].write_bytes(b"")


@damage(Reason.NOT_AN_IMAGE)
def slice_of_text(folder):
    write_series(folder)[9].write_text("hello " * 100)


@damage(Reason.SPREAD_SERIES)
def series_in_two_folders(folder):
    write_series(folder / "one", lambda z: {} if z % 2 else None)
    write_series(folder / "two", lambda z: None if z % 2 else {})


@damage(Reason.DUPLICATE)
def series_twice(folder):
    write_series(folder / "one")
    write_series(folder / "two")
