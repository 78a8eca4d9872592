"""``python -m custom.cli`` is ``alice``."""

from custom.cli.main import main

main()
