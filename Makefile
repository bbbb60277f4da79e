# nanolm: `make train` and `make test` are all one needs; each sets up .venv by itself.
PYTHON = .venv/bin/python
ALL_CORES = -n auto --dist worksteal

.PHONY: train test test-book test-long exercise lint clean

# Train the default model on Python's own documentation (continuing where it stopped), then sample.
train: .venv/ready
	$(PYTHON) train.py config/pydocs.py --init_from=auto
	$(PYTHON) sample.py --out_dir=out/pydocs --num_samples=1 --max_new_tokens=200

# Prove every formula and every promise, on all cores.
test: .venv/ready
	$(PYTHON) -m pytest $(ALL_CORES)

# Those of the book alone: what a learner runs after a change.
test-book: .venv/ready
	$(PYTHON) -m pytest $(wildcard $(patsubst nanolm/%,tests/test_%,$(wildcard nanolm/*.py)))

# The same with the large counts, too.
test-long: .venv/ready
	$(PYTHON) -m pytest $(ALL_CORES) -m "long or not long"

# Learn by writing: list the exercises, or begin or grade those of CHAPTER=attention.
exercise: .venv/ready
	@$(PYTHON) -m nanolm.lab.exercises $(CHAPTER) $(HINT:%=--hint=%) $(SOLUTION:%=--solution=%)

# Check style and format.
lint: .venv/ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# Remove what the other targets made, but neither data nor runs.
clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, made anew where it is missing or older than the pins.
.venv/ready: requirements.txt
	@echo "setting up .venv: a few minutes, and a few gigabytes where torch comes with CUDA"
	python3 -m venv --clear .venv
	.venv/bin/pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@
