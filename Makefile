# make notebooks  re-execute, keep the outputs, write the README's figures
# make run   the whole walk, headless        make lab   open JupyterLab
# make test  the test suite                  make bench the benchmark, on the heads of the last run
# make axolotl  heads trained by axolotl, in an environment of its own, then measured in ours
# make test-browser  every notebook in a real browser, with screenshots in build/browser
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AXOLOTL := .venv-axolotl
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: run test test-browser lab bench notebooks site axolotl clean

run: $(VENV)/.walk
	$(BIN)/python -m medusa_nb run

test: $(VENV)/.test
	$(BIN)/ruff check medusa_nb tests data
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-browser: $(VENV)/.browser
	$(BIN)/python -m pytest tests/browser

bench: $(VENV)/.walk
	test -f build/walk/learner/heads/calibration.json || $(BIN)/python -m medusa_nb run
	$(BIN)/python -m medusa_nb run --only 05

notebooks: $(VENV)/.test
	$(BIN)/python -m medusa_nb run --keep-outputs
	$(BIN)/python -m medusa_nb run --only 05 06 07 --keep-outputs

site: $(VENV)/.walk
	$(BIN)/python -m medusa_nb site build/site

# writing the splits also fails if the plugin cannot be imported: axolotl would train the base model without it
axolotl: $(VENV)/.walk $(AXOLOTL)/.installed
	test -f build/walk/learner/answers.jsonl || $(BIN)/python -m medusa_nb run --only 02
	$(AXOLOTL)/bin/python -m medusa_nb.axolotl_plugin build/walk/learner/answers.jsonl build/axolotl
	AXOLOTL_DO_NOT_TRACK=1 $(AXOLOTL)/bin/axolotl train data/configs/axolotl_learner.yaml --launcher python
	$(BIN)/python -m medusa_nb measure build/axolotl/heads

lab: $(VENV)/.walk
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 --KernelManager.transport_encryption=auto notebooks/01_environment_setup.ipynb

$(VENV)/.walk: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/.test: $(VENV)/.walk requirements-serve.txt requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

# Playwright drives the system's Chromium; Debian's is installed where that is possible and there is none yet
$(VENV)/.browser: $(VENV)/.test requirements-browser.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-browser.txt
	test -n "$$MEDUSA_NB_CHROMIUM" || command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) || \
	  (echo "install Chromium, or set MEDUSA_NB_CHROMIUM to one" && false)
	touch $@

$(AXOLOTL)/.installed: requirements-axolotl.txt pyproject.toml
	test -x $(AXOLOTL)/bin/python || $(PYTHON) -m venv $(AXOLOTL)
	$(AXOLOTL)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-axolotl.txt
	$(AXOLOTL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf build/walk build/run
