# make setup | demo | test | lint | campaign | fuzz: each works from a fresh clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test campaign evaluation fuzz lint format clean

# The native kernels know by themselves whether they fit this CPU and are up to date.
setup: $(STAMP)
	@$(BIN)/python -m tarragon.native.build

$(STAMP): requirements.lock requirements-engine.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-engine.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/tarragon demo

# Starting processes and waiting for deaths leaves cores idle: test files run side by side, in the order of
# their folders, so that the short ones come last and no core ends long before the other.
test: setup
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# What `make test` runs a small part of, at full size; the results stay in build/campaign.
KINDS := mixtral qwen2_moe qwen3_moe olmoe gpt_oss deepseek_v2 deepseek_v3
campaign: setup
	mkdir -p build/campaign
	$(BIN)/tarragon bench sametext --json build/campaign/sametext.json
	for kind in $(KINDS); do \
	    $(BIN)/tarragon bench sametext --kind $$kind --json build/campaign/sametext-$$kind.json || exit 1; \
	done
	$(BIN)/tarragon bench fidelity --texts 12 --compiled --answers build/campaign/fidelity --json build/campaign/fidelity.json --plot build/campaign/fidelity.png
	TARRAGON_CAMPAIGN_ROUNDS=100 $(BIN)/python -m pytest tests/cluster/test_campaign.py
	$(BIN)/tarragon bench soak --json build/campaign/soak.json
	$(BIN)/tarragon simulate --seeds 1000 --json build/campaign/simulate.json

# The paper's figures, measured here: docs/evaluation.md, within 90 minutes; QUICK=--quick takes 10.
evaluation: setup
	$(BIN)/tarragon bench evaluation $(QUICK)

# Coverage-guided, FUZZ_SECONDS for each decoder of foreign bytes; the corpora stay in build/fuzz.
FUZZ_SECONDS ?= 60
fuzz: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-fuzz.lock
	$(BIN)/python tests/fuzz/run.py all $(FUZZ_SECONDS)

# Without a cache: where an import comes from can change while its file does not.
lint: setup
	$(BIN)/ruff check --no-cache src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix src tests
	$(BIN)/ruff format src tests

clean:
	rm -rf $(VENV) build src/*.egg-info src/tarragon/native/_tarragon_*.so
