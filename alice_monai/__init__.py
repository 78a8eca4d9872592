"""The ``alice`` command of an installed copy, and the bundles that come with it, in ``alice_monai/bundles``.

The code is in the package ``custom``, the name that MONAI's bundles use for their own code. Another package of that name would
hide it; then this says so, before anything else fails.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Run ``alice``, or say which other package called ``custom`` is in its way."""
    if told := clash():
        sys.exit(f"alice: {told}")
    from custom.cli.main import main as run

    run()


def clash() -> str:
    """Say which other package called ``custom`` Python finds instead of ours; "" if it finds ours."""
    spec = find_spec("custom")
    if spec is None:
        return "the package 'custom' of alice-monai is missing; install alice-monai again."
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if any((place / "transfer" / "encoder_weights.py").is_file() and _is_ours(place) for place in places):
        return ""
    where = spec.origin or ", ".join(map(str, places))
    return (
        f"another package called 'custom' ({where}) is found instead of ours, which has the same name. Take its folder off "
        "PYTHONPATH, uninstall it, or install alice-monai into an environment of its own."
    )


def _is_ours(place: Path) -> bool:
    first = place / "__init__.py"  # two distributions may have written into one folder
    return first.is_file() and "Alice for MONAI" in first.read_text(encoding="utf-8", errors="replace")
