"""State dicts as people save them: below keys of a checkpoint, and with prefixes before their names.

A network is filled from a plain state dict only. This says where one lies in a file, and the command that takes it out. It
needs torch alone, since each segmentation bundle carries a copy of this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

_SAVED_BY = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}
_DEPTH = 3  # of dictionaries in dictionaries

Shapes = Mapping[str, Sequence[int]]


def is_state(content: Any) -> bool:
    """Whether it is a dictionary of tensors, and not an empty one."""
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(v, Tensor) for v in content.values())
    )


def way_out(path: str, content: Any, wanted: Shapes) -> str:
    """Say where in a file the tensors lie that fill a network, and how to take them out.

    Args:
        path: of the file.
        content: what it holds.
        wanted: shape of each tensor of the network, by name.

    Returns:
        What follows "it does not fit:"; "" if the tensors are nowhere.
    """
    for keys, state in states(content):
        prefix = _prefix_in(state, wanted)
        if prefix is None:
            continue
        told = [f"its tensors lie under {' / '.join(map(repr, keys))}"] if keys else []
        if prefix and len(state) == len(wanted):
            saved = "".join(f", as {who} saves them" for start, who in _SAVED_BY.items() if prefix == start)
            told.append(f"every name starts with {prefix}{saved}")
        elif prefix:
            told.append(f"they are {len(wanted)} of {len(state)}, with {prefix} before their names")
        elif len(state) > len(wanted):
            told.append(f"{len(state) - len(wanted)} of {len(state)} are not the network's")
        if told:
            return f"{', and '.join(told)}. Then it fits: {_command(path, keys, prefix, wanted, state)}"
    return _smaller(content, wanted)


def told_keys(content: Any) -> str:
    """What a file holds that is no state dict, in words."""
    if isinstance(content, Mapping):
        return (
            f"it holds no state dict, but {', '.join(map(str, list(content)[:6]))}"
            if content
            else "it is empty"
        )
    return f"it holds no state dict, but a {type(content).__name__}"


def states(
    content: Any, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Tensor]]]:
    """Every dictionary that holds tensors, with the keys that lead to it. What it holds beside them is left out."""
    if not isinstance(content, Mapping) or len(keys) > _DEPTH:
        return
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if state:
        yield keys, state
    for key, value in content.items():
        yield from states(value, (*keys, str(key)))


def _prefix_in(state: Mapping[str, Tensor], wanted: Shapes) -> str | None:
    """What stands before the names of all wanted tensors; None if they are not all there, or of other shapes."""
    first = next(iter(wanted), None)
    if first is None:
        return None
    starts = [name[: -len(first)] for name in state if name.endswith(first)]
    for start in sorted(starts, key=len):
        if all(
            start + name in state and list(state[start + name].shape) == list(shape)
            for name, shape in wanted.items()
        ):
            return start
    return None


def _smaller(content: Any, wanted: Shapes) -> str:
    """If a file holds a part of the network only, such as its encoder: which."""
    for keys, state in states(content):
        first = next(iter(state))
        for start in (name[: -len(first)] for name in wanted if name.endswith(first) and name != first):
            part = {start + name: list(tensor.shape) for name, tensor in state.items()}
            if all(name in wanted and list(wanted[name]) == shape for name, shape in part.items()):
                where = f" under {' / '.join(map(repr, keys))}" if keys else ""
                return f"it holds{where} {start[:-1]} alone, {len(part)} of {len(wanted)} tensors"
    return ""


def _command(path: str, keys: Sequence[str], prefix: str, wanted: Shapes, state: Mapping[str, Tensor]) -> str:
    plain = path.rsplit(".", 1)[0] + "_plain.pt"
    if path.endswith(".safetensors"):
        load, read = "safetensors.torch", f"safetensors.torch.load_file('{path}')"
    else:
        load, read = "torch", f"torch.load('{path}', map_location='cpu', weights_only=True)"
    steps = "".join(f"[{key!r}]" for key in keys)
    kept = (
        f"n[{len(prefix)}:]: t for n, t in c.items() if n.startswith('{prefix}')"
        if prefix
        else "n: t for n, t in c.items()"
    )
    if not prefix and len(state) > len(wanted):
        return "leave the others out"
    return f"python -c \"import torch, {load}; c = {read}{steps}; torch.save({{{kept}}}, '{plain}')\""
