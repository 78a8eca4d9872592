"""Errors about scans, manifests and stores."""

from __future__ import annotations

from custom.errors import AliceError


class ScanError(AliceError):
    """A scan that cannot be used; the message names the file, the value and the way out."""


class StoreError(AliceError):
    """A store that cannot be used; the message names the file and the way out."""


class DamagedScan(StoreError):
    """A stored scan whose file is missing or damaged; ``scan`` is its name."""

    def __init__(self, message: str, scan: str = "") -> None:
        super().__init__(message)
        self.scan = scan


class ManifestError(AliceError):
    """A manifest or folder that cannot be used; the message names the file and the way out."""
