"""The published hyperparameters, as data: what --preset of each training script sets.

UniTemp's are from its App. A.1, Causal Forcing's from its code and its ++ paper. `wan` is always
the paper's two plans of 21 latents; `wan-any` the same with plans of every length [ours]. Beside
them the statistics of Wan's latents.
"""

from lib.text import NEGATIVE

# fmt: off
WAN_MEAN = (  # of Wan's 16 latent channels, and their standard deviation [Wan]
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on

TOY64 = {"latent": (21, 8, 8)}
WAN = {"latent": (21, 60, 104), "plans": "paper", "parallel": "fsdp", "checkpointing": True}
PROMPTS = {"prompts": "prompts.safetensors", "negative": NEGATIVE}
CONSTANT = {"micro": 1, "lr": 2e-6, "warmup": 0, "decay": 0.0}
LATENTS = {"prompts": "out/latents/prompts.safetensors"}  # beside what tools/encode.py made
FRAMEWISE = {"block": 1, "anchors": 1}
ANY = {"plans": "any"}

WAN_ODE = {  # [paper App. A.1]
    **WAN,
    **PROMPTS,
    **CONSTANT,
    "teacher": "Wan2.1-T2V-14B",
    "weights": "Wan2.1-T2V-1.3B",
    "pairs": 16000,
    "guidance": 3.0,
    "shard": 16,
    "steps": 6000,
    "batch": 128,
}
ODE = {"toy": {}, "toy64": TOY64, "wan": WAN_ODE, "wan-any": WAN_ODE | ANY}

WAN_DMD = {  # [paper App. A.1]
    **WAN,
    **PROMPTS,
    "student": "out/ode/student.safetensors",
    "teacher": "Wan2.1-T2V-14B",
    "critic": "Wan2.1-T2V-1.3B",
    "vae": "Wan2.1-T2V-1.3B",
    "guidance": 4.0,
    "steps": 600,
    "batch": 64,
    "micro": 1,
    "shift": 5.0,
    "lr": 2e-6,
    "lr_critic": 4e-7,
    "ratio": 5,
    "ema": 0.99,
    "ema_start": 200,
}
TWO_STEPS = {  # [Causal Forcing++]
    **WAN_DMD,
    **FRAMEWISE,
    "denoising": (1000.0, 500.0),
    "first_denoising": (1000.0, 750.0, 500.0, 250.0),
}
DMD = {
    "toy": {},
    "toy64": TOY64,
    "wan": WAN_DMD,
    "wan-any": WAN_DMD | ANY,
    "wan-small-teacher": WAN_DMD | {"teacher": "Wan2.1-T2V-1.3B"},  # fewer or smaller GPUs
    "wan-framewise": WAN_DMD | FRAMEWISE,  # [Causal Forcing]
    "wan-2step": TWO_STEPS,
    "wan-1step": TWO_STEPS | {"denoising": (1000.0,)},
}

WAN_AR = {  # [Causal Forcing]
    **WAN,
    **LATENTS,
    **CONSTANT,
    "weights": "Wan2.1-T2V-1.3B",
    "vae": "",
    "steps": 2000,
    "batch": 64,
    "betas": (0.0, 0.999),
    "dropout": 0.0,
    "shift": 5.0,
}
AR_TEACHER = {"toy": {}, "toy64": TOY64, "wan": WAN_AR, "wan-framewise": WAN_AR | FRAMEWISE}

WAN_CAUSAL = {  # [Causal Forcing]
    **WAN_ODE,
    **LATENTS,
    "teacher": "out/ar/teacher.safetensors",
    "weights": "out/ar/teacher.safetensors",
    "guidance": 6.0,
    "steps": 1000,
    "batch": 64,
}
CAUSAL_ODE = {
    "toy": {},
    "toy64": TOY64,
    "wan": WAN_CAUSAL,
    "wan-framewise": WAN_CAUSAL | FRAMEWISE,
}
WAN_CD = WAN_CAUSAL | {"guidance": 3.0, "steps": 3000, "betas": (0.0, 0.999)}  # [Causal Forcing++]
CONSISTENCY = {"toy": {}, "toy64": TOY64, "wan": WAN_CD}
