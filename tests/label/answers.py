"""What the server tells and answers: description, masks, and the same masks from ``monai.bundle run``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
from facts import Facts, inference_config
from requests_toolbelt.multipart.decoder import MultipartDecoder
from server import LabelServer


def check_description(facts: Facts, server: LabelServer, labels: dict[str, int], metadata: dict) -> None:
    """What the server tells a viewer about the bundle, and about the studies."""
    info = server.get("/info/").json()
    facts(
        next(iter(metadata["network_data_format"]["inputs"])) == "image",
        "the network's first input is 'image'",
    )
    model = info["models"].get(server.name, {})
    facts(model.get("type") == "segmentation", "it is offered for segmentation", sorted(info["models"]))
    facts(model.get("labels") == labels, "its labels are those of metadata.json", model.get("labels"))
    facts(
        model.get("version") == metadata["version"],
        "its version is that of metadata.json",
        model.get("version"),
    )
    facts(server.name in info["trainers"], "it is offered for training", sorted(info["trainers"]))
    names = {path.name.split(".nii")[0] for path in server.studies.glob("*.nii*")}
    stored = server.get("/datastore/", output="all").json()["objects"]
    facts(names == set(stored), "the datastore lists the studies", sorted(stored))
    sample = server.session.post(f"{server.url}/activelearning/random", json={}, timeout=600)
    facts(sample.ok and sample.json().get("id") in names, "it draws a study to label next", sample.text[:200])


def check_masks(
    facts: Facts, server: LabelServer, image: Path, labels: dict[str, int], scratch: Path
) -> Path | None:
    """Both answers for one image, as a file and as viewers ask; returns the file."""
    name = image.name.split(".nii")[0]
    answer = server.infer(name, output="image")
    if not facts(
        answer.status_code == 200, f"{name}: a mask is served", f"{answer.status_code} {answer.text[:300]}"
    ):
        return None
    mask = scratch / f"{name}_served.nii.gz"
    mask.write_bytes(answer.content)
    scan, served = nib.load(image), nib.load(mask)
    facts(served.shape == scan.shape, f"{name}: on the image's grid", (served.shape, scan.shape))
    facts(np.allclose(served.affine, scan.affine, atol=1e-3), f"{name}: at the image's place", served.affine)
    values = set(np.unique(served.dataobj).tolist())
    facts(values <= {0, *labels.values()}, f"{name}: holds label numbers only", values)

    # 3D Slicer sends back every option that it was offered, the first of a list
    offered = server.get("/info/").json()["models"][server.name]["config"]
    options = {k: v[0] if isinstance(v, list) and v else v for k, v in offered.items()}
    options |= {"device": "cpu", "result_extension": ".nrrd", "result_dtype": "uint8"}
    answer = server.infer(name, options)
    if not facts(
        answer.status_code == 200,
        f"{name}: viewers are answered",
        f"{answer.status_code} {answer.text[:300]}",
    ):
        return mask
    parts = {}
    for part in MultipartDecoder.from_response(answer).parts:
        parts[part.headers[b"Content-Disposition"].decode().split('name="')[1].split('"')[0]] = part.content
    told = json.loads(parts["params"]).get("label_names")
    facts(told == labels, f"{name}: with the labels' names", told)
    nrrd = scratch / f"{name}_served.nrrd"
    nrrd.write_bytes(parts["image"])
    facts(_placed_alike(nrrd, image), f"{name}: nrrd has size, spacing, origin and direction of the image")
    facts(itk.array_from_image(itk.imread(nrrd)).dtype == np.uint8, f"{name}: nrrd is uint8")
    return mask


def _placed_alike(a: Path, b: Path) -> bool:
    def place(path: Path) -> list[np.ndarray]:
        image = itk.imread(path)
        parts = (
            itk.size(image),
            itk.spacing(image),
            itk.origin(image),
            itk.array_from_matrix(image.GetDirection()),
        )
        return [np.asarray(part, dtype=float) for part in parts]

    return all(np.allclose(x, y, atol=1e-3) for x, y in zip(place(a), place(b), strict=True))


def check_refusals(facts: Facts, server: LabelServer, scratch: Path) -> None:
    """A scan that cannot be used is answered with a sentence that names what is wrong, not with "Internal Server Error"."""
    shape = (40, 40, 40)
    inside = np.random.default_rng(0).integers(-47, 833, shape).astype(np.int16)
    body = np.where(np.indices(shape)[0] < 20, np.int16(-1000), np.int16(40))
    made = {"mr": inside, "slab": body[..., :4], "cut": body}
    why = {"mr": "shows neither air nor fat", "slab": "is too thin", "cut": "is cut short or damaged"}
    for name, voxels in made.items():
        path = scratch / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(voxels, np.diag([3.0, 3.0, 3.0, 1.0])), path)
        if name == "cut":
            path.write_bytes(path.read_bytes()[:-9])
        with open(path, "rb") as file:
            answer = server.session.post(
                f"{server.url}/infer/{server.name}", files={"file": (path.name, file)}, timeout=600
            )
        told = f"{answer.status_code} {answer.text[:300]}"
        facts(
            answer.status_code == 422 and why[name] in answer.text, f"{name}: refused with a sentence", told
        )


def check_beside(
    facts: Facts,
    server: LabelServer,
    beside: str,
    masks: dict[Path, Path],
    labels: dict[str, int],
    scratch: Path,
) -> None:
    """Another bundle of the same server answers in its own way, and changes nothing about this one's answers."""
    told = server.get("/info/").json()["models"].get(beside, {}).get("labels")
    if not facts(bool(told) and told != labels, f"{beside} is served, too, with its own labels", told):
        return
    image, mask = next(iter(masks.items()))
    name = image.name.split(".nii")[0]
    voxels = {}
    for bundle in (beside, server.name):
        answer = server.infer(name, output="image", bundle=bundle)
        if not facts(
            answer.status_code == 200, f"{name}: {bundle} answers beside the other", answer.text[:300]
        ):
            return
        path = scratch / f"{name}_{bundle}.nii.gz"
        path.write_bytes(answer.content)
        voxels[bundle] = np.asarray(nib.load(path).dataobj)
    first = np.asarray(nib.load(mask).dataobj)
    facts(np.array_equal(voxels[server.name], first), f"{name}: {server.name} answers as before")
    facts(not np.array_equal(voxels[beside], first), f"{name}: {beside} answers otherwise")


def check_same_as_bundle_run(
    facts: Facts, server: LabelServer, masks: dict[Path, Path], scratch: Path
) -> None:
    """`python -m monai.bundle run` on the same scans, from a folder that has nothing to do with the bundle."""
    images = scratch / "images"
    images.mkdir()
    for image in masks:
        shutil.copy(image, images)
    config = inference_config(server.bundle)
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        config,
        "--bundle_root",
        server.bundle,
    ]
    command += ["--dataset_dir", images, "--output_dir", scratch / "run"]
    done = subprocess.run(
        list(map(str, command)), cwd=scratch, env=server.environment, capture_output=True, text=True
    )
    if not facts(done.returncode == 0, "monai.bundle run works from elsewhere", done.stderr[-1500:]):
        return
    for image, mask in masks.items():
        name = image.name.split(".nii")[0]
        written = [p for p in (scratch / "run").rglob(f"{name}*") if p.is_file()]
        if facts(len(written) == 1, f"{name}: monai.bundle run writes one mask", written):
            a, b = (np.asarray(nib.load(p).dataobj).squeeze() for p in (written[0], mask))
            unlike = "other shape" if a.shape != b.shape else f"{(a != b).mean():.2%} differ"
            facts(np.array_equal(a, b), f"{name}: monai.bundle run writes the mask that is served", unlike)
