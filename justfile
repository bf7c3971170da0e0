# Recipes for people; `.ci/run` runs the same tools on a clean checkout.
default: lint types test

install:
    python3 -m venv .venv && .venv/bin/pip install -e '.[dev]'

format:
    .venv/bin/ruff format . && .venv/bin/ruff check --fix .

lint:
    .venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/codespell actstore dictlearn models docs README.md && .venv/bin/lint-imports

types:
    .venv/bin/mypy

test *args:
    .venv/bin/pytest {{args}}

ci:
    .ci/run
