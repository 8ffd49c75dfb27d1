# make test   run the tests           make demo   the main job, end to end, on a CPU
# make lint   ruff                    make bench  speed, as ratios to independent implementations
# make toy    the shipped weights from nothing, resumable (hours)        make gpu    the first hour on a GPU
# make fullsize   Wan's sizes on this machine: time and memory of loading and decoding (6 GB on disk, an hour)
PYTHON ?= python3
RUN := .venv/bin/python

# glibc hands freed memory back to the system at once; keeping it halves the time of small-tensor training [ours]
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 20000000000
export MALLOC_TOP_PAD_ = 268435456
export MALLOC_ARENA_MAX = 2

.PHONY: test lint demo toy bench gpu fullsize fuzz clean

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

test: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadgroup tests

lint: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

DEMO := out/demo
TORCHRUN := .venv/bin/torchrun --standalone --nproc_per_node=1
CLIP := $(RUN) generate.py --prompt "a red square moves left over a green wave"

demo: export OMP_NUM_THREADS = 2
demo: .venv/run
	@rm -rf $(DEMO)
	@echo "1/5 The teacher turns noise into clips of many lengths, 32 prompts, 48 steps each; what it passes through is kept: ODE pairs."
	$(TORCHRUN) train_ode.py --generate --pairs 32 --shard 4 --data $(DEMO)/pairs
	@echo "2/5 Stage 1, a few steps of it: the student learns to jump to the end from four noise levels, in plans of many lengths,"
	@echo "    most of them a forward and a backward one. Good: both losses fall."
	$(TORCHRUN) train_ode.py --data $(DEMO)/pairs --out $(DEMO)/stage1 --batch 8 --steps 30
	@echo "3/5 Stage 2, a few steps of it, from the shipped stage-1 student: its own clips of many lengths, the teacher's and the"
	@echo "    critic's opinion."
	@echo "    Good: the losses are finite and level; $(DEMO)/stage2 has curves.png and a sheet of clips, two forward, two backward."
	$(TORCHRUN) train_dmd.py --out $(DEMO)/stage2 --steps 12 --sheet_every 12
	@echo "4/5 Clips of the shipped student in four orders. Good: a red square moves left in every one of them."
	$(CLIP) --order forward --out $(DEMO)/forward.mp4 --sheet $(DEMO)/forward.png
	$(CLIP) --order backward --out $(DEMO)/backward.mp4 --sheet $(DEMO)/backward.png
	$(CLIP) --order inbetween --out $(DEMO)/inbetween.mp4 --sheet $(DEMO)/inbetween.png
	$(CLIP) --order loop --out $(DEMO)/loop.mp4 --sheet $(DEMO)/loop.png
	@echo "5/5 Measure 16 clips an order, anchors dropped and kept. Good: captions right, FR and round trip near 1, the round"
	@echo "    trip higher where anchors are kept as output."
	$(RUN) -m tools.report --clips 16 --out $(DEMO)/report

# Everything from nothing, by the flags of what is shipped (toy/weights/README.md): a folder a stage. Stop it at will; run it
# again and it goes on. [ours]
TOY := out/toy
TWO := .venv/bin/torchrun --standalone --nproc_per_node=2
TEACHER := --teacher $(TOY)/teacher.safetensors
toy: export OMP_NUM_THREADS = 1
toy: $(TOY)/weights/SHA256SUMS
$(TOY)/vae.safetensors: export OMP_NUM_THREADS = 2
$(TOY)/vae.safetensors: .venv/run
	$(RUN) -m toy.train_vae --out $(TOY)
$(TOY)/teacher.safetensors: $(TOY)/vae.safetensors
	$(TWO) -m toy.train_teacher --out $(TOY)
$(TOY)/pairs/index.json: $(TOY)/teacher.safetensors
	$(TWO) train_ode.py --generate $(TEACHER) --pairs 6144 --shard 16 --micro 16 --data $(TOY)/pairs
$(TOY)/ode/student.safetensors: $(TOY)/pairs/index.json
	$(TWO) train_ode.py $(TEACHER) --weights $(TOY)/teacher.safetensors --data $(TOY)/pairs \
		--teacher_forcing true --batch 8 --steps 4000 --lr 5e-4 --lr_matrices .01 --out $(TOY)/ode
$(TOY)/dmd/student.safetensors: $(TOY)/ode/student.safetensors
	$(TWO) train_dmd.py --student $< $(TEACHER) --critic $(TOY)/teacher.safetensors --vae $(TOY)/vae.safetensors \
		--guidance 1.5 --clips $(TOY)/latents --steps 300 --lr 2e-5 --out $(TOY)/dmd
$(TOY)/weights/SHA256SUMS: $(TOY)/dmd/student.safetensors
	$(RUN) -m toy.pack --vae $(TOY) --teacher $(TOY) --ode $(TOY)/ode --student $(TOY)/dmd --out $(TOY)/weights

bench: .venv/dev
	$(RUN) -m tools.bench --train
	$(RUN) -m tests.speed

gpu: .venv/run
	$(RUN) -m tools.gpu

fullsize: .venv/run
	env -u MALLOC_MMAP_MAX_ -u MALLOC_TRIM_THRESHOLD_ -u MALLOC_TOP_PAD_ $(RUN) -m tests.full_size

fuzz: .venv/dev
	$(RUN) -m tests.fuzz --inputs 10000

clean:
	rm -rf .venv out .pytest_cache .ruff_cache .hypothesis
