# make test   run the tests           make demo   the main job, end to end, on a CPU
# make lint   ruff                    make bench  speed, as ratios to independent implementations
PYTHON ?= python3
RUN := .venv/bin/python

# glibc hands freed memory back to the system at once; keeping it halves the time of small-tensor training [ours]
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 20000000000
export MALLOC_TOP_PAD_ = 268435456
export MALLOC_ARENA_MAX = 2

.PHONY: test lint demo bench clean

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

test: .venv/dev
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadgroup tests

lint: .venv/dev
	$(RUN) -m ruff check .

ORDERS := forward backward inbetween loop transition story
demo: .venv/run
	@echo "Every order, with random weights: the pictures are noise, the plans are real (rows: steps, columns: latents)."
	for order in $(ORDERS); do \
		$(RUN) anchors.py --order $$order --out out/demo/plan_$$order.png > /dev/null && \
		$(RUN) sampler.py --weights random --order $$order --prompt "a red square moves left over a green wave" \
			--out out/demo/$$order.mp4 --sheet out/demo/$$order.png || exit 2; done
	@echo "Look into out/demo: a clip, a sheet of frames and the plan's picture for each order."

bench: .venv/dev
	PYTHONPATH=. $(RUN) tests/speed.py

clean:
	rm -rf .venv out .pytest_cache .ruff_cache .hypothesis
