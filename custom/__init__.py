"""Alice for MONAI: what the bundles' configs reference.

``encoders`` are networks that compute visible tokens only; ``alice`` is the method (branches, losses, EMA,
trainer); ``data`` turns scans into a chunked store and draws aligned pairs; ``landmarks`` finds the same
anatomy in another patient; ``transfer`` hands weights to stock MONAI networks; ``evaluation`` measures.
Imports point one way: cli -> alice -> encoders, cli -> data -> landmarks, transfer -> encoders.
"""

__version__ = "0.1.0"
