# make quickstart and make test need nothing but Python 3.10+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN = quickstart
TRAIN = bundles/alice_pretrain/configs/train.yaml
SMOKE = bundles/alice_pretrain/configs/smoke.yaml

.PHONY: setup quickstart test fast check format docs smoke show bundles package test-label test-oldest clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	touch $@

# phantoms -> store -> pre-training -> encoder -> stock UNETR -> picture, on a CPU, minutes
quickstart: setup
	@echo "== 1/5 a cohort of synthetic torsos"
	$(BIN)/alice phantom $(RUN)/phantoms --n 12 --size small --canonical False
	@echo "== 2/5 pre-training through monai.bundle run (the store is built first)"
	$(BIN)/python -W ignore -m monai.bundle run --config_file "['$(TRAIN)','$(SMOKE)','$(dir $(TRAIN))quickstart.yaml']" \
	  --dataset_dir $(RUN)/phantoms --output_dir $(RUN)/run --store_dir $(RUN)/store --logging_file False
	@echo "== 3/5 the encoder, as one file"
	$(BIN)/alice export $(RUN)/run --to $(RUN)/encoder.safetensors
	@echo "== 4/5 into stock MONAI UNETR"
	$(BIN)/python -W ignore docs/examples/load_into_unetr.py $(RUN)/encoder.safetensors
	@echo "== 5/5 what was learnt"
	$(BIN)/alice probe $(RUN)/run
	$(BIN)/alice picture $(RUN)/run --to $(RUN)/picture.png
	@echo "Done. Look at $(RUN)/picture.png; TensorBoard: $(BIN)/tensorboard --logdir $(RUN)/run"

# everything but GPU tests, on all cores, one thread each
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu"

# on all cores, one thread each; a file's tests stay together and share what they set up
fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the site, in build/site; a broken link, or a page that is missing from its navigation, is an error
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# every bundle, tiny, from its own YAML
smoke: setup
	$(BIN)/alice phantom build/smoke/phantoms --n 6 --size small --canonical False
	$(BIN)/python -W ignore -m monai.bundle run --config_file "['$(TRAIN)','$(SMOKE)']" \
	  --dataset_dir build/smoke/phantoms --output_dir build/smoke/run --iterations 20

BUNDLE ?= alice_pretrain
show: setup
	@$(BIN)/python -m custom.bundles.release show bundles/$(BUNDLE)/configs/train.yaml

# what MONAI Label and monai.bundle.load need of a checkout: configs in JSON and models/model.pt; not in git
bundles: setup
	$(BIN)/python -W ignore -m custom.bundles.copies

# zips, checksums, and models/model_info.json; RELEASE_URL=https://... where the zips will lie
package: setup
	$(BIN)/python -W ignore -m custom.bundles.release package dist $(RELEASE_URL)

# both segmentation bundles, as their zips hold them, in the real MONAI Label over HTTP. Its environment takes 4 GB.
# STUDIES=FOLDER for your own scans
LABEL_VENV ?= .label-venv
ACCEPT = $(LABEL_VENV)/bin/python -W ignore tests/label/accept.py
test-label: setup
	sh tests/label/setup.sh $(LABEL_VENV) $(PYTHON)
	rm -rf build/label
	$(BIN)/python -W ignore -m custom.bundles.release unpacked build/label
	$(ACCEPT) build/label/alice_seg_flare --beside build/label/alice_seg_btcv $(if $(STUDIES),--studies $(STUDIES))
	$(ACCEPT) build/label/alice_seg_btcv --beside build/label/alice_seg_flare $(if $(STUDIES),--studies $(STUDIES))

# the fast tests, and both segmentation bundles' inference, with the lowest versions that pyproject.toml allows.
# PYTHON is 3.10 or 3.11 here (the oldest PyYAML has no wheel for later ones). The environment takes 8 GB.
VENV_OLDEST ?= ../.venv-oldest
OLDEST = OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest -n auto --dist loadfile
test-oldest:
	test ! -e $(VENV_OLDEST) || test -e $(VENV_OLDEST)/pyvenv.cfg
	$(PYTHON) -m venv --clear $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e . pytest pytest-xdist hypothesis jsonschema
	$(OLDEST) -m "not slow and not gpu"
	$(OLDEST) -m slow -k segmentation_zip_segments tests/test_release.py

clean:
	rm -rf build dist quickstart
