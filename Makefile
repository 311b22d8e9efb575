# Every target sets up what it needs on a fresh machine; Python 3.11 and, for the classic stack, 3.10 must be installed.
.PHONY: setup setup-classic demo demo-cascade demo-seg demo-mask2former demo-panoptic test test-classic \
	lint package check-install bench bench-classic bench-gpu fuzz clean

# A file at a time on each core, with one thread: most tests compute little, and teams of threads get in each other's way.
PYTEST = -m pytest -q -n auto --maxprocesses 8 --dist loadfile
test test-classic: export OMP_NUM_THREADS = 1
# Tests start many processes: one that imports mmdet takes 6 s, and 15 s where Python may not keep bytecode.
unexport PYTHONDONTWRITEBYTECODE

setup:
	tools/setup_env.sh modern

setup-classic:
	tools/setup_env.sh classic

demo: setup
	.venv/bin/python tools/demo.py

demo-cascade: setup
	.venv/bin/python tools/demo.py cascade-mask-rcnn

demo-seg: setup
	.venv/bin/python tools/demo.py upernet

demo-mask2former: setup
	.venv/bin/python tools/demo.py mask2former

demo-panoptic: setup-classic
	.venv-classic/bin/python tools/demo.py panoptic

test: setup
	.venv/bin/dinat info
	.venv/bin/python $(PYTEST)

# What depends on versions of torch, NATTEN, OpenMMLab or Detectron2; backbones are swapped in the modern stack alone.
test-classic: setup-classic
	.venv-classic/bin/dinat info
	.venv-classic/bin/python $(PYTEST) tests/ops tests/checkpoint tests/adapters tests/configs tests/test_attention.py \
		tests/test_backbone.py tests/test_classifier.py tests/test_optim.py --ignore tests/adapters/test_swap.py \
		--ignore tests/adapters/test_swap_catalogue.py \
		tests/cli/test_commands.py tests/cli/test_prepare.py tests/cli/test_validate.py \
		"tests/docs/test_snippets.py::test_snippets_run[docs/frameworks/detectron2.md]"

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The wheel and the sdist, and what the wheel can do outside of this checkout without a compiler.
package: setup
	.venv/bin/python tools/check_install.py 3.11-torch-2.11.0
	.venv/bin/twine check --strict work_dirs/check_install/dist/*

# The same with Python 3.10 to 3.13, torch 2.3 to the newest, numpy 1 and 2: downloads 20 GB.
check-install: setup
	.venv/bin/python tools/check_install.py

bench: setup
	.venv/bin/python tools/benchmark.py all --out work_dirs/benchmark.json

bench-classic: setup-classic
	.venv-classic/bin/python tools/benchmark.py all --out work_dirs/benchmark-classic.json

bench-gpu: setup
	.venv/bin/python tools/benchmark.py gpu --out work_dirs/benchmark-gpu.json

# Random calls, damaged checkpoints, sanitizers, memory, wrong and killed commands; the counts are printed at the end.
SECONDS = 1800
SEED = 0
fuzz: setup
	.venv/bin/python tools/fuzz.py all --seconds $(SECONDS) --seed $(SEED)

clean:
	rm -rf .venv .venv-classic build work_dirs *.egg-info dinat_backbones/ops/backends/cpu/_na2d.so
