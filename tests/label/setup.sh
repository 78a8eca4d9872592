#!/bin/sh
# The environment of `make test-label`: sh tests/label/setup.sh FOLDER [PYTHON]
#
# A virtual environment of its own, some 4 GB, as MONAI Label needs older versions of numpy and pydicom than this project.
# Python 3.10 to 3.12. Run again, it does nothing until the requirements change.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?where shall the environment be?}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=${2:-python3}

stamp=$(cd "$here" && cat requirements.txt constraints.txt setup.sh torchvision_ops.py | cksum)
if [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi

"$python" - <<'PYTHON'
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"MONAI Label needs Python 3.10 to 3.12, this is {sys.version.split()[0]}; say make test-label PYTHON=python3.11")
PYTHON
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

cd "$here"
pins="-r requirements.txt"
case $("$venv/bin/python" -c 'import sys; print(sys.version_info[1])') in
  11) pins="$pins -c constraints.txt" ;;
  *) echo "tests/label/constraints.txt is for Python 3.11; pip chooses within requirements.txt" ;;
esac
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
own() { grep "^$1" requirements.txt | sed 's/ *#.*//'; }

# sam2 asks for torch when it is built: in an isolated build pip would fetch another one, so torch comes first
pip install --quiet "$(own torch==)" "$(own setuptools)" wheel ninja
SAM2_BUILD_CUDA=0 pip install --quiet --no-build-isolation --no-deps "$(own sam2==)"
# shellcheck disable=SC2086
pip install --quiet $pins
"$venv/bin/python" torchvision_ops.py
pip check
echo "$stamp" > "$venv/.stamp"
