"""Make torchvision importable where pip paired a CUDA build of it with a CPU torch; elsewhere, do nothing.

Such a torchvision cannot load its compiled operators, and registering shapes for two that do not exist stops its
import. MONAI Label needs torchvision only for pictures. So the two are declared, without a body, in the module that
failed to load them; using them says so.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

DECLARATION = """

# added by tests/label/torchvision_ops.py: names for operators whose compiled part does not fit this torch
if not _has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _declared.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def imports() -> str:
    """What stops ``import torchvision``, in its last line; empty where nothing does."""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


if __name__ == "__main__":
    module = Path(sysconfig.get_paths()["purelib"]) / "torchvision" / "extension.py"
    if "operator torchvision::nms does not exist" in imports():
        module.write_text(module.read_text(encoding="utf-8") + DECLARATION, encoding="utf-8")
    if problem := imports():
        sys.exit(f"torchvision does not import: {problem}")
