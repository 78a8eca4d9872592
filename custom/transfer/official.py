"""Load the authors' checkpoints of SAM and Alice's nnFormer: completely or not at all, running no code."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from custom.encoders.nnformer import NNFormer, PositionEmbedding
from custom.errors import AliceError
from custom.files import sha256_of_file
from custom.landmarks.sam.network import SAM
from custom.transfer.pickled import plain_values, told_pickled

logger = logging.getLogger(__name__)

Role: TypeAlias = Literal["student", "teacher"]
ROLES = ("student", "teacher")
Rules: TypeAlias = "tuple[tuple[str, str], ...]"

# From our names to the authors'; all rules are applied in turn. Names that no rule matches are the same.
SAM_NAMES: Rules = (
    (r"^stem\.", r"backbone.conv1."),
    (r"^layer(\d)\.", r"backbone.layer\1."),
    (r"\.shortcut\.", r".downsample."),
    (r"\.norm\.", r".bn."),
    (r"^fine_head\.", r"neck."),
    (r"^coarse_head\.", r"read_out_head."),
    (r"\.laterals\.(\d)\.", r".lateral_convs.\1.conv."),
    (r"\.smooth\.", r".fpn_convs.0.conv."),
)
ALICE_NAMES: Rules = (
    (r"^encoder\.norms\.(\d)\.", r"model_down.norm\1."),
    (r"^encoder\.", r"model_down."),
    (r"\.upsample\.", r".Upsample."),
    (r"^final\.(\d)\.", r"final.\1.up."),
)
OFFICIAL_POSITIONS = "model_down.absolute_pos_embed"  # in no published file, see load_alice_nnformer


@dataclass(frozen=True)
class OfficialWeights:
    """What was read from one of the authors' files.

    Attributes:
        state: float32 tensors under our names; complete, except for what ``notes`` says.
        ignored: keys of the file that are not part of the network, without wrappers and their prefixes.
        notes: sentences for the user.
    """

    state: dict[str, Tensor]
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_sam(path: str | PathLike[str]) -> SAM:
    """Load SAM with the weights of an official ``SAM.pth``, in evaluation mode.

    Args:
        path: file written by mmcv, or a state dict; UAE-S files load without their semantic head.

    Returns:
        The network, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        AliceError: if the file is not such a checkpoint, or if a key does not fit; all such keys are named.
    """
    model = SAM()
    weights = _read_sam(path, model)
    model.load_state_dict(weights.state, strict=False)  # only counters may be missing: see _read_sam
    _log(path, weights)
    model.eval().weights_sha256 = sha256_of_file(path)
    return model


def _read_sam(path: str | PathLike[str], model: SAM) -> OfficialWeights:
    """The weights for ``model``, which gives the names and shapes to find."""
    found = _strip(_unwrap(read_checkpoint(path), ("state_dict", "model", *ROLES)), ("module.",), path)
    kind = _kind(found)
    if kind != "sam":
        raise AliceError(_not_that(path, "SAM checkpoint", kind, found))
    # name a different architecture at once, instead of listing a hundred keys
    for key, shape in {
        "backbone.conv1.conv.weight": (64, 1, 3, 7, 7),
        "read_out_head.lateral_convs.0.conv.weight": (128, 512, 1, 1, 1),
    }.items():
        if key in found and tuple(found[key].shape) != shape:
            raise AliceError(
                f"{path}: {key} has shape {tuple(found[key].shape)}, the published SAM has {shape}. "
                "Only a width of 64 loads here; load a compact network from the file that its bundle wrote."
            )

    notes = []
    ignored = [key for key in found if key.startswith(("criterion.", "supcriterion.", "semantic_head."))]
    if any(key.startswith("semantic_head.") for key in ignored):
        notes.append("UAE-S present: its semantic head is ignored, fine and coarse embeddings are loaded.")
    wanted = model.state_dict()
    table = {name: _rename(name, SAM_NAMES) for name in wanted}
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    return OfficialWeights(_match(found, wanted, table, ignored, optional, path), ignored, notes)


def load_alice_nnformer(
    path: str | PathLike[str],
    *,
    network: Role = "student",
    position_embedding: PositionEmbedding = "learnable",
) -> NNFormer:
    """Load Alice's nnFormer with the authors' weights: encoder, decoder, and the heads if the file has them.

    The authors' network adds a random position table to its tokens, and none of their files holds it. So
    nobody can restore their network exactly. Here the table starts at zero (``"learnable"``: until it is
    trained, the network equals one without a table), at sines and cosines (``"sincos"``), or is left out
    (``"none"``).

    Args:
        path: training file ``checkpoint*.pth``, a file of ``extract_backbone_weights.py``, or a state dict.
        network: which network of a training file.
        position_embedding: what replaces the lost table.

    Returns:
        The network, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such file.
        AliceError: if the file is not such a checkpoint, or if a key does not fit; all such keys are named.

    Warns:
        UserWarning: if the position table had to be replaced.
    """
    weights = read_alice_nnformer(path, network=network)
    model = NNFormer(position_embedding=position_embedding, relative_index="official")
    table = model.encoder.position_table
    state = dict(weights.state)
    if "encoder.position_table" not in state:
        if position_embedding == "learnable":
            assert table is not None
            nn.init.zeros_(table)
        start = {"learnable": "zeros", "sincos": "sines and cosines", "none": "none at all"}[
            position_embedding
        ]
        warnings.warn(
            f"{path}: the authors' files do not hold the position table their network was trained with; "
            f"it is replaced by {start}. Features differ from the authors' until the network is fine-tuned.",
            UserWarning,
            stacklevel=2,
        )
    elif position_embedding != "learnable":
        state.pop("encoder.position_table")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("final.") or name == "encoder.position_table" for name in missing)
    _log(path, weights)
    return model.eval()


def read_alice_nnformer(path: str | PathLike[str], *, network: Role = "student") -> OfficialWeights:
    """Read the weights for the default ``NNFormer`` with the official index, and what else the file holds.

    Arguments and errors as :func:`load_alice_nnformer`.
    """
    if network not in ROLES:
        raise AliceError(f"network must be 'student' or 'teacher', got {network!r}.")
    content = read_checkpoint(path)
    notes = []
    roles = [role for role in ROLES if role in content]
    if roles and network not in roles:
        raise AliceError(f"{path} holds the {roles[0]} only: load it with network={roles[0]!r}.")
    if not roles:
        notes.append("The file does not say whether it holds the student or the teacher.")
    content = _unwrap(content, (network, "state_dict", "model"))
    found = _strip(content, ("module.", "backbone."), path)
    kind = _kind(found)
    if kind != "alice":
        raise AliceError(_not_that(path, "checkpoint of Alice's nnFormer", kind, found))

    ignored = [key for key in found if key.startswith("head.")]
    if ignored:
        notes.append(
            f"The projection head ({len(ignored)} tensors) is not part of the network and is ignored."
        )
    reference = NNFormer(position_embedding="none", relative_index="official")
    wanted = reference.state_dict()
    if OFFICIAL_POSITIONS in found:
        wanted["encoder.position_table"] = torch.empty(1, 32**3, 48)
    table = {name: _rename(name, ALICE_NAMES) for name in wanted}
    table |= {"encoder.position_table": OFFICIAL_POSITIONS} if OFFICIAL_POSITIONS in found else {}
    optional: set[str] = set()
    if not any(key.startswith("final.") for key in found):
        optional = {name for name in wanted if name.startswith("final.")}
        notes.append("The file has no final.* heads: they keep their random first values.")

    # the index follows from a formula, so it is compared instead of loaded
    for name, index in reference.named_buffers():
        if name.endswith(".relative_position_index"):
            key = _rename(name, ALICE_NAMES)
            ignored.append(key)
            if key in found and not torch.equal(found[key].long(), index):
                raise AliceError(
                    f"{path}: {key} is not the authors' index; these weights are of another network."
                )
    state = _match(found, wanted, table, ignored, optional, path)
    return OfficialWeights(state, [key for key in ignored if key in found], notes)


# -- reading a file ------------------------------------------------------------------------------------------


def read_checkpoint(path: str | PathLike[str]) -> dict[str, object]:
    """Read the dictionary of a checkpoint, tensors on the CPU; and run no object of the file.

    ``argparse.Namespace`` and numpy's numbers carry values only, and are read; the authors' training files hold their
    command line in a Namespace.

    Raises:
        FileNotFoundError: if there is no such file.
        AliceError: if it cannot be read, holds other classes, or is not a dictionary.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    try:
        with plain_values():
            content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can cause nearly any exception in torch
        if told := told_pickled(path, error):
            raise AliceError(f"{path} {told}") from error
        raise AliceError(
            f"{path} is not a checkpoint that torch can read; it may be truncated, or of another kind "
            f"({file.stat().st_size} bytes). Fetch it again."
        ) from error
    if not isinstance(content, Mapping):
        raise AliceError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary.")
    return {str(key): value for key, value in content.items()}


def _unwrap(content: dict[str, object], wrappers: Iterable[str]) -> dict[str, object]:
    """Descend into wrapping dictionaries; skip empty ones, since the authors' script writes one."""
    wrappers = tuple(wrappers)
    for _ in range(len(wrappers)):
        for wrapper in wrappers:
            inner = content.get(wrapper)
            if isinstance(inner, Mapping) and inner:
                content = {str(key): value for key, value in inner.items()}
                break
    return content


def _strip(content: dict[str, object], prefixes: tuple[str, ...], path: object) -> dict[str, Tensor]:
    """The tensors of a dictionary, floats in float32, without the given prefixes of their names."""
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            continue
        for prefix in prefixes:
            key = key.removeprefix(prefix)
        if key in found:
            raise AliceError(f"{path} holds {key} twice, with and without {' and '.join(prefixes)}.")
        found[key] = value.float() if value.is_floating_point() else value
    if not found:
        raise AliceError(f"{path} holds no tensors; its keys are {_first(content)}.")
    return found


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _kind(keys: Iterable[str]) -> str:
    keys = list(keys)
    if any("model_down." in key for key in keys):
        return "alice"
    for kind, prefixes in {
        "segment anything": ("image_encoder.", "prompt_encoder.", "mask_decoder."),
        "sam": ("backbone.conv1.", "backbone.layer", "read_out_head.", "conv1.conv.", "layer1.0.conv1.conv."),
    }.items():
        if any(key.startswith(prefixes) for key in keys):
            return kind
    return "unknown"


def _not_that(path: object, wanted: str, kind: str, found: Mapping[str, Tensor]) -> str:
    """The message for a file of another kind."""
    answers = {
        "alice": "It is of Alice's nnFormer: use load_alice_nnformer.",
        "sam": "It is of SAM, the landmark network: use load_sam.",
        "segment anything": (
            "It is of Meta's Segment Anything, which shares only the name: the landmark network is the "
            "Self-supervised Anatomical eMbedding (Yan et al., TMI 2022)."
        ),
    }
    return f"{path} is not a {wanted}. {answers.get(kind, '')} Its first keys are {_first(found)}.".replace(
        "  ", " "
    )


def _first(keys: Iterable[str], count: int = 6) -> str:
    names = list(keys)
    return (
        ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")
        if names
        else "none"
    )


def _match(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    table: Mapping[str, str],
    ignored: Iterable[str],
    optional: set[str],
    path: object,
) -> dict[str, Tensor]:
    """The file's tensors under our names, all of them; or an error that names every key that does not fit."""
    missing = [table[name] for name in wanted if table[name] not in found and name not in optional]
    unexpected = sorted(set(found) - set(table.values()) - set(ignored))
    state = {name: found[table[name]] for name in wanted if table[name] in found}
    misshaped = [
        f"{table[name]} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in state.items()
        if tensor.shape != wanted[name].shape
    ]
    broken = [table[name] for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    problems = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped, "not finite": broken}
    if any(problems.values()):
        lines = [f"  {what} ({len(keys)}): {', '.join(keys)}" for what, keys in problems.items() if keys]
        raise AliceError(f"{path} does not fit the network, nothing was loaded:\n" + "\n".join(lines))
    return state


def _log(path: object, weights: OfficialWeights) -> None:
    logger.info("%s: %d tensors loaded, %d ignored.", path, len(weights.state), len(weights.ignored))
    for note in weights.notes:
        logger.info("%s: %s", path, note)
