"""Methods by name, and how the student of a checkpoint is built again. A new method adds its line here."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import nn

from custom.engine.method import Student
from custom.errors import AliceError

# name in a run's summary -> module that holds ``build_student(network, settings)``
METHODS = {
    "alice": "custom.methods.alice.method",
    "mae": "custom.methods.mae",
    "simmim": "custom.methods.rivals.simmim",
    "moco": "custom.methods.rivals.moco",
    "dino": "custom.methods.rivals.dino",
    "ibot": "custom.methods.rivals.ibot",
    "sim": "custom.methods.rivals.sim",
    "cmae": "custom.methods.rivals.cmae",
    "swin_unetr": "custom.methods.rivals.swin_unetr",
    "ace": "custom.methods.ace.method",
    "sal": "custom.methods.sal.method",
}


def method_module(name: str) -> ModuleType:
    """The module of a method whose runs hold an encoder.

    Raises:
        AliceError: naming the methods there are.
    """
    if name not in METHODS:
        why = "a SAM run's network is its model.safetensors" if name == "sam" else "it is unknown here"
        raise AliceError(
            f"Method {name!r} has no encoder for this command ({why}). Methods that have one: {', '.join(METHODS)}."
        )
    return importlib.import_module(METHODS[name])


def build_student(name: str, network: nn.Module, settings: dict[str, Any]) -> Student:
    """The student of a method around an encoder's network.

    Args:
        name: of the method.
        network: the encoder, as ``build_encoder`` makes it.
        settings: the student's own, as its ``settings`` attribute gave them.

    Raises:
        AliceError: naming the methods there are.
    """
    student: Student = method_module(name).build_student(network, dict(settings))
    return student
