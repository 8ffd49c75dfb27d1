"""Pack trained toy models for shipping: half the bytes, the logs of their training, and hashes.

bfloat16, which no measured number notices; the matrices of the stage-1 student, which stage 2 only
starts from, in eight bits. `evaluate.py` on the packed files against the originals is the check
(numbers in toy/weights/README.md).

    python -m toy.pack --teacher out/toy --ode out/ode --student out/dmd --out toy/weights
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lib.common import UserError, atomic, check_out, run
from lib.tensors import read_tensors, write_safetensors


@dataclass
class Config:
    """Pack trained toy models for shipping."""

    vae: str = "out/toy"  # folders in which training left them
    teacher: str = "out/toy"
    ode: str = "out/ode"
    student: str = "out/dmd"
    out: str = "toy/weights"


def packed(tensors: dict[str, Tensor], eight_bits: bool) -> dict[str, Tensor]:
    """bfloat16; with eight_bits, linear layers in the blocks as float8 with 3 bits of mantissa."""

    def dtype(name: str, x: Tensor) -> torch.dtype:
        return (
            torch.float8_e4m3fn
            if eight_bits and x.ndim == 2 and name.startswith("blocks.")
            else torch.bfloat16
        )

    return {k: x.to(dtype(k, x)) for k, x in tensors.items()}


def main(config: Config) -> None:
    out, hashes = check_out(config.out, folder=True), {}
    for name, folder, file, log in (
        ("vae", config.vae, "vae", "vae.log"),
        ("teacher", config.teacher, "teacher", "teacher.log"),
        ("ode", config.ode, "student", "log"),
        ("student", config.student, "student", "log"),
    ):
        tensors, settings = read_tensors(Path(folder) / f"{file}.safetensors")
        write_safetensors(out / f"{name}.safetensors", packed(tensors, name == "ode"), settings)
        with atomic(out / f"{name}.log.jsonl") as tmp:
            tmp.write_bytes((Path(folder) / f"{log}.jsonl").read_bytes())
        hashes[name] = hashlib.sha256((out / f"{name}.safetensors").read_bytes()).hexdigest()
    size = sum((out / f"{name}.safetensors").stat().st_size for name in hashes) / 1e6
    if size > 24:
        raise UserError(
            f"{out} holds {size:.1f} MB of weights, over the 24 MB that this repository ships"
        )
    with atomic(out / "SHA256SUMS") as tmp:
        tmp.write_text(
            "".join(f"{digest}  {name}.safetensors\n" for name, digest in hashes.items())
        )
    print(f"{size:.1f} MB in {out}; check them with: cd {out} && sha256sum -c SHA256SUMS")


if __name__ == "__main__":
    run(main, Config)
