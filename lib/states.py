"""States of a training: all that a run needs to go on exactly, and networks taken out of one.

    save_state(path, step, config, {"student": (dit, optimiser)}, ema=average)
    step = load_state(path, config, {"student": (dit, optimiser)}, ema=average)

A state is written whole or not at all, in float32, and by any number of processes. It is refused
by a run of other settings, or whose files hold something else now (`contents`), but for those that
the script's Config names in FREE: these are said.
`--keep 200` of a training keeps a state every 200 steps. A student can be taken from any of them:

    python -m lib.states --student out/dmd/state-000200.pt --out student.safetensors
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor

from lib.common import (
    UserError,
    atomic,
    check_out,
    fingerprint,
    is_first,
    read_pickle,
    run,
    say,
)
from lib.tensors import listed, read_tensors, write_safetensors
from lib.text import lines_of
from lib.weights import read_dit

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
Optimiser = torch.optim.Optimizer | tuple[torch.optim.Optimizer, ...]
Trained = dict[str, tuple[nn.Module, Optimiser]]  # name -> network and its optimiser, or several
FREE = (  # flags that may change when a run goes on, for they do not change what is computed
    "steps",  # where the learning rate does not hang on it (`schedule`)
    "schedule_steps",
    "out",
    "preset",
    "save_every",
    "keep",
    "sheet_every",
    "micro",
    "device",
    "parallel",
    "checkpointing",
    "compile",
)


# ---------------------------------------------------------------- weights
class EMA:
    """Exponential moving average of a model's trainable parameters, kept in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: p.detach().clone().float() for k, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """shadow = decay * shadow + (1 - decay) * weights"""
        for k, p in model.named_parameters():
            self.shadow[k].lerp_(p.detach().float(), 1 - self.decay)

    def whole(self) -> dict[str, Tensor]:
        """The average on the CPU, gathered if it is sharded."""
        return {
            k: (x.full_tensor() if hasattr(x, "full_tensor") else x).cpu()
            for k, x in self.shadow.items()
        }

    def load(self, whole: dict[str, Tensor]) -> None:
        """Take over another average's values (sharded ones take their part)."""
        for k, x in self.shadow.items():
            value = whole[k].to(x.device)
            if hasattr(x, "device_mesh"):
                value = distribute_tensor(value, x.device_mesh, x.placements)
            x.copy_(value)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Make the average the model's weights."""
        # FSDP2 leaves parts gathered after a forward pass without a backward one
        for m in model.modules():
            if isinstance(m, FSDPModule):
                m.reshard()
        for k, p in model.named_parameters():
            p.copy_(self.shadow[k])


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The full state dict on the CPU, gathered if sharded: call it on all processes, use on one."""
    return get_model_state_dict(model, options=WHOLE)


def write_network(path: str | os.PathLike, model: nn.Module) -> None:
    """Write a network's weights, sizes and recipe. Call it on every process."""
    weights = whole_state(model)
    if is_first():
        write_safetensors(path, weights, _described(model))
        print(f"wrote {path}")


def _described(model: nn.Module) -> dict:
    """What a checkpoint says of a network: its sizes and, of a student, how it is trained."""
    recipe = vars(model).get("recipe")
    return dataclasses.asdict(model.config) | ({"recipe": recipe} if recipe else {})


# ---------------------------------------------------------------- states


def save_state(
    path: str | os.PathLike, step: int, config: dict, trained: Trained, **averages: EMA
) -> None:
    """Write all a run needs to go on exactly: step, config, networks, optimisers, averages.

    Call it on every process. raises: OSError if it cannot be written; what was there stays"""
    tree = {"step": step, "config": json.dumps(config)}
    tree["networks"] = json.dumps({name: _described(model) for name, (model, _) in trained.items()})
    for name, (model, optimiser) in trained.items():
        tree[name] = whole_state(model)
        tree[name + ".optimiser"] = get_optimizer_state_dict(model, optimiser, options=WHOLE)
    for name, average in averages.items():
        tree[name] = average.whole()
    if is_first():
        with atomic(path) as tmp:
            try:
                torch.save(tree, tmp)
            except RuntimeError as error:  # how torch reports a full disk
                why = str(error).splitlines()[0]
                raise OSError(
                    f"cannot write {path}, is the disk full? The last state is intact ({why})"
                ) from None
    if dist.is_initialized():
        dist.barrier()


def load_state(
    path: str | os.PathLike,
    config: dict,
    trained: Trained,
    free: tuple[str, ...] = (),
    **averages: EMA,
) -> int:
    """Load what `save_state` wrote; return the number of finished steps.

    The number of processes may differ. free: settings that may, too, and hold from now on
    raises: UserError naming the settings that differ, or a damaged file"""
    tree = read_pickle(path)
    try:
        step = int(tree["step"])
        _compare(path, json.loads(tree["config"]), json.loads(json.dumps(config)), free)
        for name, (model, optimiser) in trained.items():
            set_model_state_dict(model, tree[name], options=WHOLE)
            _load_optimiser(model, optimiser, tree[name + ".optimiser"])
        for name, average in averages.items():
            average.load(tree[name])
    except UserError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"{path} is not a whole state of this run ({type(error).__name__}); "
            "move it away to start again"
        ) from None
    return step


def _load_optimiser(model: nn.Module, optimiser: Optimiser, state: dict) -> None:
    """Load an optimiser's moments; its rates and the like stay those of the run that goes on."""
    several = optimiser if isinstance(optimiser, tuple) else (optimiser,)

    def groups() -> list[dict]:
        return [group for one in several for group in one.param_groups]

    now = [{k: v for k, v in group.items() if k != "params"} for group in groups()]
    set_optimizer_state_dict(model, optimiser, state, options=WHOLE)
    for group, settings in zip(groups(), now):
        group.update(settings)


def schedule(config: dict) -> int:
    """Over how many steps a run's learning rate is planned; 0 if it hangs on no such number."""
    if not config.get("decay", "schedule_steps" in config):
        return 0
    return config.get("schedule_steps") or config["steps"]


def contents(config: dict, unread: tuple[str, ...] = ()) -> dict[str, str]:
    """What the files that a run reads hold, by flag: a path may stay and what lies there change."""
    config, found = {k: v for k, v in config.items() if k not in unread}, {}
    for flag in ("teacher", "critic", "student", "weights"):
        if config.get(flag) and Path(config[flag]).expanduser().exists():
            found[flag] = fingerprint(read_dit(config[flag])[1])
    prompts, data = str(config.get("prompts")), Path(config.get("data") or "") / "index.json"
    if Path(prompts).is_file():
        made = read_tensors(prompts)[1] if prompts.endswith(".safetensors") else {}
        words = [*lines_of(prompts), str((made or {}).get("encoder"))]
        found["prompts"] = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    if data.is_file():
        found["data"] = hashlib.sha256(data.read_bytes()).hexdigest()[:16]
    if isinstance(config.get("clips"), str) and config["clips"]:  # the toy's trainings say how many
        shards = listed(Path(config["clips"]), "latents-*.safetensors")
        found["clips"] = fingerprint({p.name: read_tensors(p)[0]["latents"] for p in shards})
    return {f"content of --{flag}": value for flag, value in found.items()}


def _compare(path: str | os.PathLike, then: dict, now: dict, free: tuple[str, ...]) -> None:
    """Say which settings change from here on. raises: UserError naming those that must not"""
    now = {k: v for k, v in now.items() if k in then or not k.startswith("content of")}
    differ = {k: v for k, v in now.items() if k not in FREE and then.get(k) != v}
    wrong = [f"{k}={then.get(k)!r}, now {v!r}" for k, v in differ.items() if k not in free]
    if wrong:
        raise UserError(
            f"{path} was written by a run with other settings ({'; '.join(wrong)}); "
            "use them again, or another --out"
        )
    if schedule(then) != schedule(now):
        raise UserError(
            f"{path}: the learning rate of its {then['steps']} steps is planned over "
            f"{schedule(then)}, now over {schedule(now)}: steps that are done would have had "
            f"another; use --schedule_steps {schedule(then)}, or another --out"
        )
    for k, v in differ.items():
        say(f"{path}: going on with --{k} {v} instead of {then.get(k)}")


# ---------------------------------------------------------------- a student from any state
@dataclasses.dataclass
class Config:
    """Take a network out of a state: the average of its weights, if there is one."""

    FIRST = "student"
    student: str  # a state: out/dmd/state.pt, or one that --keep kept, out/dmd/state-000200.pt
    out: str  # a .safetensors file
    network: str = (
        ""  # which, if there are several: student0 is forward, student1 backward, critic0
    )


def main(config: Config) -> None:
    out = check_out(config.out, inputs=[config.student])
    tree = read_pickle(config.student)
    try:
        networks, step = json.loads(tree["networks"]), int(tree["step"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{config.student} is not a state of a training") from None
    name = config.network
    if not name:
        students = [n for n in networks if not n.startswith("critic")]
        name = students[0] if len(students) == 1 else "none"
    if name not in networks:
        raise UserError(f"--network {name} must be {' or '.join(networks)} of {config.student}")
    # the average of student0 is ema0, that of dit is ema
    average = "ema" + re.sub(r"\D", "", name)
    has_average = average in tree and not name.startswith("critic")
    tensors = tree[name] | (tree[average] if has_average else {})
    write_safetensors(out, tensors, networks[name])
    what = "the average of the weights" if has_average else "the weights"
    print(f"wrote {out}: {what} of {name} after {step} steps")


if __name__ == "__main__":
    run(main, Config)
