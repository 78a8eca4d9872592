"""Layouts of data sets: what is an image, what a label, which label belongs to which image, what a ``dataset.json`` says.

The one rule of all commands and bundles. It needs Python alone, since each segmentation bundle carries a copy of this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
_LABEL_WORD = r"(labels?|seg|segmentation|mask)"
_LABEL_NAME = re.compile(rf"(^|[_\-. ]){_LABEL_WORD}$|^{_LABEL_WORD}[_\-]?\d+$", re.IGNORECASE)
_LABEL_TAIL = re.compile(rf"[_\-. ]?{_LABEL_WORD}$", re.IGNORECASE)
# img0001 and label0001 (BTCV), volume-1 and segmentation-1 (LiTS)
_HEAD = re.compile(r"^(labels?|seg|segmentation|mask|img|image|volume)[_\-]?(?=\d)", re.IGNORECASE)
_IMAGE_TAIL = re.compile(r"([_\-](ct|image|img|\d{4}))$", re.IGNORECASE)
# an image that its folder names, beside labels or segmentation (KiTS)
_PLAIN_IMAGE = re.compile(r"^(ct|image|imaging|img|scan|volume)$", re.IGNORECASE)
# images, imagesTr (MSD, nnU-Net), img (BTCV), averaged-training-images (BTCV, registered); which of the last two words
# follows a split decides the kind
_FOLDER = re.compile(
    r"^(averaged-(?P<averaged>training|testing)-)?"
    r"((?P<image>images?|imgs?)|(?P<label>labels?|masks?|seg(mentation)?s?))(?P<split>tr|ts|va)?$",
    re.IGNORECASE,
)
_PARTS = ("training", "validation", "testing", "test")
_NAMES_OF_NOTHING = ("background", "bg", "none", "other", "unlabelled", "unlabeled", "clear label")


@dataclass
class Pairs:
    """The images and labels of a folder.

    Attributes:
        pairs: (image, label).
        unlabelled: images without a label, among others that have one.
        left_out: images of folders in which none has a label, such as ``imagesTs``: they are meant to have none.
        alone: labels without an image.
        doubles: (label, another label of the same image).
    """

    pairs: list[tuple[Path, Path]] = field(default_factory=list)
    unlabelled: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    alone: list[Path] = field(default_factory=list)
    doubles: list[tuple[Path, Path]] = field(default_factory=list)


def is_passed_over(name: str) -> bool:
    """Whether a file or folder is none of the user's: hidden (``.DS_Store``, AppleDouble's ``._x``), or ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"


def stem(path: Path) -> str:
    """The name of a scan's file without its suffix; ``.nii.gz`` counts as one suffix."""
    for suffix in IMAGE_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def is_label(path: Path, folders: Iterable[str] = ()) -> bool:
    """Whether a file is a label, by its name or that of its folder. ``folders`` are more names of folders of labels."""
    found = _FOLDER.match(path.parent.name)
    return bool(_LABEL_NAME.search(stem(path)) or (found and found["label"]) or path.parent.name in folders)


def is_image_folder(name: str) -> bool:
    """Whether a folder of this name holds images only."""
    found = _FOLDER.match(name)
    return bool(found and found["image"])


def case_name(path: str | Path) -> str:
    """The case of an image or label in the published layouts.

    ``FLARE22_Tr_0001_0000.nii.gz`` is FLARE22_Tr_0001, ``img0001.nii.gz`` and ``label0001.nii.gz`` are 0001,
    ``DET01_avg_seg.nii.gz`` is DET01.
    """
    return re.sub(r"^(img|label)(?=[0-9])|(_avg)?(_seg)?(_0000)?$", "", stem(Path(path)))


def pair_key(path: Path, cut_tail: bool = False, folders: Iterable[str] = ()) -> tuple[str, str, str]:
    """What an image and its label have in common: the folder above ``images``/``labels``, the split, the case's name.

    Args:
        path: of an image or a label.
        cut_tail: leave out an image's last word: ``_ct``, or nnU-Net's channel ``_0000``.
        folders: more names of folders of images or labels.
    """
    name = _HEAD.sub("", _LABEL_TAIL.sub("", stem(path)))
    name = _IMAGE_TAIL.sub("", name) if cut_tail else name
    name = "" if _PLAIN_IMAGE.match(name) else name
    found = _FOLDER.match(path.parent.name)
    split = (found["averaged"] or found["split"] or "") if found else ""
    folder = path.parent.parent if found or path.parent.name in folders else path.parent
    return str(folder), split.lower(), name.lower()


def pair(
    files: Sequence[Path], image_folders: Sequence[str] = (), label_folders: Sequence[str] = ()
) -> Pairs:
    """Give every image its label.

    Folders of labels come first: ``CASE_seg`` beside an image that has a label in ``labels/`` is a prediction of it. The
    whole name is tried before the one without its last word, since a case number may look like nnU-Net's channel number. In
    the end an image and a label pair that lie far from each other, but are the only two of one case and split that are left.

    Args:
        files: images and labels, in a fixed order.
        image_folders: more names of folders of images.
        label_folders: more names of folders of labels.
    """
    found, more = Pairs(), [*image_folders, *label_folders]
    in_folders: dict[tuple[str, str, str], Path] = {}
    by_name: dict[tuple[str, str, str], Path] = {}
    for path in files:
        if is_label(path, label_folders):
            labels = in_folders if is_label(path.parent / "x", label_folders) else by_name
            key = pair_key(path, folders=more)
            if key in labels:
                found.doubles.append((labels[key], path))
            labels.setdefault(key, path)
    images = [path for path in files if not is_label(path, label_folders)]
    for labels in (in_folders, by_name):
        for cut_tail in (False, True):
            alone = []
            for image in images:
                if label := labels.pop(pair_key(image, cut_tail, more), None):
                    found.pairs.append((image, label))
                else:
                    alone.append(image)
            images = alone
    images, found.alone = _pair_far(images, list(in_folders.values()), found.pairs, image_folders)
    found.alone += by_name.values()
    labelled = {image.parent for image, _ in found.pairs}
    for image in images:
        named = is_image_folder(image.parent.name) or image.parent.name in image_folders
        (found.left_out if named and image.parent not in labelled else found.unlabelled).append(image)
    found.pairs.sort()
    return found


def _pair_far(
    images: Sequence[Path],
    labels: Sequence[Path],
    pairs: list[tuple[Path, Path]],
    image_folders: Sequence[str],
) -> tuple[list[Path], list[Path]]:
    """Add pairs of folders that lie apart, ``a/images/x`` and ``b/labels/x``; return what stays alone."""
    by_case: dict[tuple[str, str], tuple[list[Path], list[Path]]] = {}
    for image in images:
        if is_image_folder(image.parent.name) or image.parent.name in image_folders:
            by_case.setdefault((case_name(image), pair_key(image)[1]), ([], []))[0].append(image)
    for label in labels:
        by_case.setdefault((case_name(label), pair_key(label)[1]), ([], []))[1].append(label)
    new = [(one[0], other[0]) for one, other in by_case.values() if len(one) == len(other) == 1]
    pairs += new
    done = {path for both in new for path in both}
    return [p for p in images if p not in done], [p for p in labels if p not in done]


# -- what a JSON says ---------------------------------------------------------------------------


def entries_of(content: Any) -> list[dict[str, Any]]:
    """The records of a datalist, ``image`` and perhaps ``label`` and more; empty if it lists none.

    It may be a list of records or of paths, an object with such lists (MONAI, MSD, nnU-Net v1), or nnU-Net v2's
    ``dataset``: ``{case: {"images": [...], "label": ...}}``. A path is text as the file gives it.
    """
    if isinstance(content, Mapping) and isinstance(content.get("dataset"), Mapping):
        groups: list[Any] = [[_case_of_nnunet(one) for one in content["dataset"].values()]]
    elif isinstance(content, Mapping):
        groups = [
            [one for one in value if not isinstance(one, str) or _names_image(one) or name in _PARTS]
            for name, value in content.items()
            if isinstance(value, list) and name != "labels"
        ]
    else:
        groups = [content] if isinstance(content, list) else []
    records = []
    for entry in (one for group in groups for one in group):
        entry = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping):
            continue
        image = entry.get("image")
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        if isinstance(image, str):
            records.append({**entry, "image": image})
    return records


def _names_image(text: str) -> bool:
    return text.lower().endswith(IMAGE_SUFFIXES)


def _case_of_nnunet(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    kept = {key: value for key, value in entry.items() if key != "images"}
    return {"image": entry.get("images"), **kept}


def path_beside(folder: Path, text: str) -> Path:
    """A path that a JSON gives relative to its folder.

    Windows' back-slashes count as slashes. nnU-Net v1 lists an image without its channel: where there is no such file, the
    one with ``_0000`` is meant.
    """
    path = folder / text
    if "\\" in text and not path.exists():
        path = folder / text.replace("\\", "/")
    if not path.exists() and _names_image(path.name):
        channel = path.with_name(f"{stem(path)}_0000{path.name[len(stem(path)) :]}")
        return channel if channel.exists() else path
    return path


def names_of_values(content: Any) -> list[tuple[int, str]]:
    """(value, name) of the labels of a datalist or ``dataset.json``, sorted; empty if it names none.

    MSD and nnU-Net v1 write ``{"1": "spleen"}``, nnU-Net v2 ``{"spleen": 1}``, or several values for a region.
    """
    told = content.get("labels") if isinstance(content, Mapping) else None
    if isinstance(told, list) and all(isinstance(name, str) for name in told):
        first = 0 if told and told[0].lower() in _NAMES_OF_NOTHING else 1
        told = {str(value): name for value, name in enumerate(told, first)}
    if not isinstance(told, Mapping):
        return []
    found: set[tuple[int, str]] = set()
    for key, value in told.items():
        if str(key).strip().isdigit() and not isinstance(value, (list, int)):
            found.add((int(key), str(value)))
            continue
        values = value if isinstance(value, list) else [value]
        found |= {(int(one), str(key)) for one in values if str(one).strip().isdigit()}
    return sorted(found)


def dataset_jsons(source: Path, files: Iterable[Path] = ()) -> list[Path]:
    """Where a folder's labels may be named: each ``dataset.json`` in it, or beside the folders of its images and labels."""
    if source.is_file():
        return [source] if source.suffix.lower() == ".json" else []
    folders = {source} | ({source.parent} if _FOLDER.match(source.name) else set())
    folders |= {path.parent.parent if _FOLDER.match(path.parent.name) else path.parent for path in files}
    return sorted(path for folder in folders if (path := folder / "dataset.json").is_file())


# names that published data sets give to organs: BTCV's list in MONAI's tutorials, AMOS, FLARE, TotalSegmentator
_OTHER_NAMES = {
    "rkid": "right kidney", "kidney right": "right kidney", "lkid": "left kidney", "kidney left": "left kidney",
    "gall": "gallbladder", "gall bladder": "gallbladder", "eso": "esophagus", "oesophagus": "esophagus", "sto": "stomach",
    "arota": "aorta", "ivc": "inferior vena cava", "postcava": "inferior vena cava", "veins": "portal and splenic veins",
    "portal vein and splenic vein": "portal and splenic veins", "portal vein & splenic vein": "portal and splenic veins",
    "rad": "right adrenal gland", "rag": "right adrenal gland", "adrenal gland right": "right adrenal gland",
    "lad": "left adrenal gland", "lag": "left adrenal gland", "adrenal gland left": "left adrenal gland",
}  # fmt: skip


def organ_of(name: str) -> str:
    """A label's name in one spelling: lower case, spaces, ``rkid`` and ``kidney_right`` as right kidney."""
    plain = " ".join(re.sub(r"[_\-]", " ", name.lower()).split())
    return _OTHER_NAMES.get(plain, plain)


def misnamed(
    names: Sequence[tuple[int, str]], labels: Sequence[str], label_map: Mapping[int, int] | None = None
) -> list[tuple[int, str]]:
    """The (value, name) of a data set that are not those of a list of labels.

    Args:
        names: of the data set.
        labels: names of the values 1, 2, ...
        label_map: value of the data -> value among ``labels``; 0 counts as background, whatever its name.
    """
    known = ["background", *map(organ_of, labels)]
    wrong = []
    for value, name in names:
        organ = "background" if organ_of(name) in _NAMES_OF_NOTHING else organ_of(name)
        if label_map:
            to = 0 if value == 0 else label_map.get(value, -1)
            if to == 0 and value != 0:
                continue  # left out on purpose
        else:
            to = value
        if not (0 <= to < len(known) and known[to] == organ):
            wrong.append((value, name))
    return wrong


def suggested_map(names: Sequence[tuple[int, str]], labels: Sequence[str]) -> dict[int, int]:
    """The label_map that names suggest: an organ that ``labels`` lacks becomes 0, background."""
    value_of = {organ_of(name): value for value, name in enumerate(labels, 1)}
    return {value: value_of.get(organ_of(name), 0) for value, name in names if value != 0}
