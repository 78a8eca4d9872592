"""Encoders inside published checkpoints: found in whatever wraps them, under the names that the network has.

A file is read whole or refused. This needs torch alone, since each segmentation bundle carries a copy of this file. Where
each layout comes from is in ``docs/checkpoints.md``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .state_dicts import Shapes, states, told_keys

CONV, LINEAR = "patch_embedding.patch_embeddings.weight", "patch_embedding.patch_embeddings.1.weight"
POSITIONS = "patch_embedding.position_embeddings"
# an encoder that has another layout of the first layer, or no table, is still found, and then told what it lacks
_MAY_DIFFER = {
    *(n.replace(".weight", end) for n in (CONV, LINEAR) for end in (".weight", ".bias")),
    POSITIONS,
    "position_table",
}
# anywhere in a name: DataParallel, torch.compile and activation checkpointing add these
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_checkpoint_wrapped_module)\.")
# from the names of other code to MONAI's, or to our nnFormer's; what a rule is told as
_RENAMED: dict[str, tuple[tuple[str, str, str], ...]] = {
    "vit": (
        (r"(^|\.)patch_embed\.proj\.", r"\1patch_embedding.patch_embeddings.", "timm's patch_embed.proj"),
        (r"(^|\.)encoder_pos_embed$", r"\1encoder." + POSITIONS, "SelfMedMAE's encoder_pos_embed"),
        (r"(^|\.)pos_embed$", r"\1" + POSITIONS, "timm's pos_embed"),
        (r"(^|\.)(blocks\.\d+)\.attn\.proj\.", r"\1\2.attn.out_proj.", "timm's attn.proj"),
        (r"(^|\.)(blocks\.\d+\.mlp)\.fc([12])\.", r"\1\2.linear\3.", "fc1 and fc2, here linear1 and linear2"),
        (r"(^|\.)blocks\.\d+\.(weight|bias)$", r"\1norm.\2", "the last norm, kept among the blocks"),
    ),
    "swin": (
        (r"(^|\.)(layers\d\.0)\.[^.]\.(blocks|downsample)\.", r"\1\2.\3.", "layers inside layers"),
        (r"(\.blocks\.\d+\.mlp)\.fc([12])\.", r"\1.linear\2.", "fc1 and fc2, here linear1 and linear2"),
    ),
    "nnformer": ((r"(^|\.)model_down\.norm(\d)\.", r"\1model_down.norms.\2.", "norm0, here norms.0"),),
}
# beside an encoder, at the same depth; no part of it, and its features do not depend on it
_HEADS = {
    "vit": r"(mask_tokens?|patch_embedding\.cls_token)$|decoder|classification_head\.|conv3d_transpose|head\.",
    # norm: after the last stage, in the 50,000-volume file; SwinUNETR normalises without weights instead
    "swin": r"mask_token$|norm\.(weight|bias)$|rotation_head\.|contrastive_head\.|conv\.",
    "nnformer": r".*relative_position_index$|mask_token$",
}


class NotRead(ValueError):
    """A checkpoint in which one encoder cannot be told; the message follows the file's name and a colon."""


@dataclass
class Found:
    """An encoder's tensors in a checkpoint.

    Attributes:
        state: tensors under the network's names; whether they are complete is for the caller to compare.
        place: where they lie, in words; "" if the file holds nothing else and its names are the network's.
        changed: what was renamed or written in another layout, and how.
        left_out: tensors of the file that are no part of the encoder.
        unused: tensors of cross attention, which only some versions of MONAI have, and no encoder uses.
        class_token: (1, 1, C) of a transformer that was trained with one, else None.
    """

    state: dict[str, Tensor]
    place: str = ""
    changed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, Tensor] = field(default_factory=dict)
    unused: dict[str, Tensor] = field(default_factory=dict)
    class_token: Tensor | None = None

    def told(self) -> str:
        """Where the tensors came from and what was done to them, in one line; "" for a plain file."""
        parts = [self.place] if self.place else []
        if self.changed:
            parts.append("renamed " + "; ".join(self.changed.values()))
        if self.left_out:
            parts.append(f"left out {len(self.left_out)} tensors of {_groups(self.left_out)}")
        return ", ".join(parts)


def find_encoder(content: Any, wanted: Shapes, which: str = "") -> Found:
    """Find the tensors of an encoder in what a file holds.

    Dictionaries in dictionaries (``state_dict``, ``model``, ``net``, ``network_weights``, ``student``, ...) are searched, and
    whatever stands before the encoder's names (``module.``, ``backbone.``, ``swinViT.``, ...) is taken off.

    Args:
        content: what the file holds.
        wanted: shape of each tensor of the encoder, by name.
        which: a key or a prefix, such as ``teacher``, if the file holds several encoders.

    Raises:
        NotRead: if the file holds no such encoder, or several.
    """
    if isinstance(content, Mapping) and str(content.get("format", "")).startswith("alice-run"):
        raise NotRead(
            "it holds a training checkpoint of alice: write its encoder with alice export RUN --to encoder.safetensors"
        )
    family = family_of(wanted)
    need = {name for name in wanted if "cross_attn" not in name and name not in _MAY_DIFFER}
    places: list[_Place] = []
    for keys, state in states(content):
        named, renamed = in_network_names(state, family)
        counts = Counter(
            name[: len(name) - len(rest)] for name in named for rest in _ends(name) if rest in need
        )
        places += [_Place(keys, prefix, count, named, renamed, state) for prefix, count in counts.items()]
    chosen = [place for place in places if not which or which in (*place.keys, *place.parts())]
    whole = [place for place in chosen if place.count == len(need)]
    if len(whole) > 1:
        name = _name_of_one(whole)
        way = f"which={name!r}; alice convert FILE --which {name} --to encoder.safetensors"
        raise NotRead(
            f"it holds {len(whole)} encoders: {', '.join(place.told() for place in whole)}; "
            + (f"say which ({way})" if name else "save one of them alone")
        )
    if not chosen:
        if which and places:
            raise NotRead(f"it holds no {which!r}, but {', '.join(sorted({p.told() for p in places})[:6])}")
        raise NotRead(_nothing(content))
    best = whole[0] if whole else max(chosen, key=lambda place: place.count)
    return _taken(best, family, wanted)


def family_of(wanted: Shapes) -> str:
    """Which names an encoder has: ``vit``, ``swin``, ``nnformer``, or "" for another."""
    if any(name.startswith("patch_embedding.") for name in wanted):
        return "vit"
    if any(name.startswith("layers1.0.") for name in wanted):
        return "swin"
    return "nnformer" if any(name.startswith("patch_embed.proj1.") for name in wanted) else ""


def in_network_names(
    state: Mapping[str, Tensor], family: str
) -> tuple[dict[str, Tensor], dict[str, tuple[str, str]]]:
    """Tensors under the names of a family of networks, and for each renamed one its own name and the rule's words.

    Raises:
        NotRead: if two tensors get one name.
    """
    named: dict[str, Tensor] = {}
    renamed: dict[str, tuple[str, str]] = {}
    for own, tensor in state.items():
        name, told = _WRAPPERS.sub("", own), ""
        for pattern, replacement, words in _RENAMED.get(family, ()):
            new = re.sub(pattern, replacement, name)
            name, told = (new, words) if new != name else (name, told)
        if name in named:
            raise NotRead(f"it holds {name} twice, as {renamed.get(name, (name,))[0]} and as {own}")
        named[name] = tensor
        if name != own:
            renamed[name] = (own, told)
    return named, renamed


def misfit_hint(found: Found, wanted: Shapes) -> str:
    """For misfits that have one cause: the cause and the way out; "" for others."""
    here, there = {name for name in wanted if "cross_attn" not in name}, set(found.state)
    if any(re.match(r"layers\dc\.", name) for name in there - here):
        return "the file is of Swin UNETR V2: build the network with use_v2=True"
    if any(re.match(r"layers\dc\.", name) for name in here - there):
        return "the network is Swin UNETR V2 and the file is not: build it with use_v2=False"
    biases = {name for name in here ^ there if name.endswith(".attn.qkv.bias")}
    if biases and biases == here ^ there:
        return f"build the network with qkv_bias={biases <= there}"
    blocks = [
        len({m[0] for name in names if (m := re.match(r"blocks\.\d+\.", name))}) for names in (here, there)
    ]
    if blocks[0] != blocks[1] and all(blocks):
        return f"the file has {blocks[1]} transformer blocks, the network {blocks[0]}"
    if here - there == {"position_table"}:
        return (
            "the authors' files hold no position table: build NNFormer with position_embedding='none' and "
            "relative_index='official'"
        )
    return ""


def class_token_refusal(network: str) -> str:
    """Why weights that were trained with a class token are not taken silently."""
    return (
        f"it was trained with a class token, which every feature attends to and {network} lacks, so that features "
        "would differ. To leave it out: drop_class_token=True, or alice convert FILE --drop_class_token --to "
        "encoder.safetensors"
    )


def other_index(encoder: nn.Module, found: Found) -> str:
    """Windows that order their offsets in another way than the network's: a name of such an index, or ""."""
    for name, buffer in encoder.named_buffers():
        if name.endswith("relative_position_index") and name in found.left_out:
            index = found.left_out[name]
            if index.shape != buffer.shape or not torch.equal(index.to(buffer.dtype), buffer):
                way = "build it with relative_index='official'"
                return f"{name} orders the window in another way than the network does; {way}"
    return ""


# -- parts -------------------------------------------------------------------------------------------------------------


@dataclass
class _Place:
    """A place in a file where names of the encoder end other names."""

    keys: tuple[str, ...]
    prefix: str  # without wrappers
    count: int
    named: dict[str, Tensor]
    renamed: dict[str, tuple[str, str]]
    state: Mapping[str, Tensor]

    def parts(self) -> list[str]:
        return self.prefix.split(".")[:-1]

    def told(self) -> str:
        inside = f"under {' / '.join(map(repr, self.keys))}" if self.keys else ""
        own = self._own_prefix()
        return ", ".join(filter(None, [inside, own and f"below {own}"])) or "the plain names"

    def _own_prefix(self) -> str:
        """The prefix as the file spells it, with its wrappers."""
        for name in self.named:
            own, words = self.renamed.get(name, (name, ""))
            rest = name.removeprefix(self.prefix)
            if name.startswith(self.prefix) and not words and own.endswith(rest):
                return own.removesuffix(rest)
        return self.prefix


def _name_of_one(places: Sequence[_Place]) -> str:
    """A key or part of a prefix that only one of several places has, of the last place that has one; "" if none has."""
    for place in reversed(places):
        others = {part for other in places if other is not place for part in (*other.keys, *other.parts())}
        if own := [part for part in (*place.keys, *place.parts()) if part not in others]:
            return own[0]
    return ""


def _ends(name: str) -> Iterator[str]:
    """A name, and what follows each of its dots."""
    yield name
    start = name.find(".")
    while start >= 0:
        yield name[start + 1 :]
        start = name.find(".", start + 1)


def _taken(place: _Place, family: str, wanted: Shapes) -> Found:
    heads = re.compile(_HEADS.get(family, r"(?!)"))
    found = Found({}, "" if place.told() == "the plain names" else place.told())
    for name, tensor in place.named.items():
        inside = name.startswith(place.prefix)
        rest = name.removeprefix(place.prefix)
        if not inside or (rest not in wanted and heads.match(rest)):
            found.left_out[rest if inside else name] = tensor
        elif rest == "cls_token" and "cls_token" not in wanted:
            found.class_token = tensor
        elif "cross_attn" in rest:
            found.unused[rest] = tensor
        else:
            found.state[rest] = tensor
            if words := place.renamed.get(name, ("", ""))[1]:
                found.changed[words] = words
    _fold_class_position(found, wanted)
    _swap_embedding(found, wanted)
    return found


def _fold_class_position(found: Found, wanted: Shapes) -> None:
    """timm's table has a first row for the class token, which is the same as a class token that has it added."""
    table, token = found.state.get(POSITIONS), found.class_token
    if table is None or token is None or POSITIONS not in wanted:
        return
    if table.ndim == 3 and table.shape[1] == wanted[POSITIONS][1] + 1:
        found.state[POSITIONS], found.class_token = table[:, 1:], token + table[:, :1]


def _swap_embedding(found: Found, wanted: Shapes) -> None:
    """A convolution with stride = kernel and MONAI's ``perceptron`` hold the same numbers in another order."""
    state, bias = found.state, ".bias"
    if CONV in state and LINEAR in wanted:
        state[LINEAR] = state.pop(CONV).permute(0, 2, 3, 4, 1).flatten(1)
        state[LINEAR.replace(".weight", bias)] = state.pop(CONV.replace(".weight", bias))
        found.changed[LINEAR] = "convolution written as MONAI's perceptron (exact)"
    elif LINEAR in state and CONV in wanted:
        channels, *patch = wanted[CONV][1:]
        matrix = state.pop(LINEAR)
        if matrix.shape[1] == channels * patch[0] * patch[1] * patch[2]:
            matrix = matrix.view(-1, *patch, channels).permute(0, 4, 1, 2, 3)
        state[CONV] = matrix
        state[CONV.replace(".weight", bias)] = state.pop(LINEAR.replace(".weight", bias))
        found.changed[CONV] = "perceptron written as a convolution (exact)"


def _nothing(content: Any) -> str:
    found = [name for _, state in states(content) for name in state]
    if not found:
        return told_keys(content)
    return (
        f"none of its {len(found)} tensors has a name of this encoder; the first are {', '.join(found[:3])}"
    )


def _groups(names: Sequence[str] | Mapping[str, Any]) -> str:
    heads = list(dict.fromkeys(name.split(".")[0] for name in names))
    return ", ".join(heads[:6]) + (", ..." if len(heads) > 6 else "")
