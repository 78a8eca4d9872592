"""The ``alice`` command: chores that are no bundle workflow."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import fire

from custom.errors import plain_message

if TYPE_CHECKING:
    pass
from custom.cli.data import build, phantom, scan
from custom.cli.landmarks import calibrate, check_alignment, embed
from custom.cli.runs import estimate, picture, probe, profile
from custom.cli.scores import compare, datalist, score
from custom.cli.weights import export

COMMANDS: dict[str, Any] = {
    "phantom": phantom,
    "scan": scan,
    "build": build,
    "embed": embed,
    "calibrate": calibrate,
    "check-alignment": check_alignment,
    "export": export,
    "probe": probe,
    "datalist": datalist,
    "score": score,
    "compare": compare,
    "picture": picture,
    "profile": profile,
    "estimate": estimate,
}


def main() -> None:
    """Run a command; what a user can mend is said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        fire.Fire(COMMANDS, name="alice")
    except Exception as error:
        message = plain_message(error)
        if message is None:
            raise
        print(f"alice: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
