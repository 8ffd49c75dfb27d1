"""Every order and the user's own clips from one command line: what is given comes out, what is made
is said, mistakes cost one sentence and no file."""

import inspect
import json
import os
import re
from dataclasses import asdict, replace

import imageio.v3 as iio
import pytest
import torch
from test_media import clock, ffmpeg
from tiny import PLANS, ROOT, at_call, command_line, distance, randn, randomise, script, terminate

import anchors
import clips
import generate
import plans
import sampler
from anchors import Plan
from generate import decode_in_order, load_models, make_blocks
from kvcache import KVCache
from lib import common, outputs, streams
from lib.common import UserError
from lib.media import VideoWriter, load_clip, read_frames, to_uint8
from lib.recipe import Recipe
from lib.story import read_keyframes
from toy import world
from vae import VAE, VAEConfig

PROMPT = "a red square moves left over a green wave"
A, B = "a red disc moves up over a blue wave", "a cyan ring moves down over a red wave"
WEIGHTS, SIZE, H, W = str(ROOT / "toy" / "weights"), (32, 32), 4, 2
# one denoising level: the plumbing is the same
ONE = {"weights": "random", "denoising": (1000.0,)}
QUICK = ONE | {"use": 1.0, "seconds": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of the toy world, larger than the model and at another rate; pictures; a story."""
    folder = tmp_path_factory.mktemp("clips")
    for name, caption, seed in (("a", A, 7), ("b", B, 9)):
        video = world.render([caption], [seed], 64, 64)[0]
        with VideoWriter(folder / f"{name}.mkv", fps=24 if name == "b" else 16) as writer:
            writer.write(video)
        iio.imwrite(folder / f"{name}.png", to_uint8(video[:, 5:6])[0])
    tale = {
        "scenes": [
            {"start": 1, "clip": "a.mkv", "seconds": 0.75, "prompt": A},
            {"start": 3, "seconds": 1, "prompt": B, "bridge": A},
        ],
        "seconds": 5,
        "order": [1, 0],
    }
    (folder / "story.json").write_text(json.dumps(tale))
    return folder


@pytest.fixture(scope="module")
def models():
    return load_models(WEIGHTS)


def clip(folder, name, frames, last=False):
    return load_clip(folder / f"{name}.mkv", SIZE, frames=frames, last=last)[0]


HEAD, TAIL = 21, 25  # frames of 6 latents: with the image latent; with one frame as the past
COMMANDS = {  # flags -> frames of the result, and where whose frames are
    "after": ({"extend_after": "a.mkv"}, 45, [(0, "a", HEAD, True, 0)]),
    "before": ({"extend_before": "a.mkv"}, 45, [(21, "a", TAIL, False, 1)]),
    "both": ({"extend_before": "a.mkv", "extend_after": "a.mkv"}, 69, [(21, "a", TAIL, False, 1)]),
    "between": (
        {"between": ("a.mkv", "b.mkv")},
        69,
        [(0, "a", HEAD, True, 0), (45, "b", TAIL, False, 1)],
    ),
    "transition": (
        {"transition": ("a.mkv", "b.mkv"), "prompt": (A, B)},
        69,
        [(0, "a", HEAD, True, 0), (45, "b", TAIL, False, 1)],
    ),
    "loop": ({"loop": "a.mkv"}, 44, [(0, "a", HEAD, False, 13), (32, "a", 13, False, 1)]),
    "switched": (
        {"extend_after": "a.mkv", "prompt": (A, B), "switch": (2.0,)},
        45,
        [(0, "a", HEAD, True, 0)],
    ),
    "long": (
        {"extend_after": "a.mkv", "extend_before": "a.mkv", "seconds": 3.0},
        117,
        [(45, "a", TAIL, False, 1)],
    ),
    "story": ({"story": "story.json", "prompt": ()}, 77, [(13, "a", 13, False, 1)]),
}


@pytest.mark.parametrize("flags, frames, mine", COMMANDS.values(), ids=COMMANDS)
def test_given_frames_come_out_to_the_bit(
    flags, frames, mine, folder, tmp_path, capsys, monkeypatch
):
    """In a lossless file the user's frames are where they belong, untouched, and all others are not
    theirs; seams are measured."""
    monkeypatch.chdir(folder)
    generate.main(
        generate.Config(
            **{"prompt": (A,), "exact": True} | QUICK | flags,
            out=str(tmp_path / "o.mkv"),
            sheet=str(tmp_path / "o.png"),
        )
    )
    video, printed = read_frames(tmp_path / "o.mkv"), capsys.readouterr().out
    assert video.shape == (1, 3, frames, *SIZE) and f"= {frames} frames = " in printed
    theirs = set()
    for at, name, n, last, skip in mine:
        original = clip(folder, name, n, last)[:, :, skip:]
        assert torch.equal(video[:, :, at : at + original.shape[2]], original)
        theirs |= set(range(at, at + original.shape[2]))
    assert not any(
        torch.equal(video[0, :, f], x)
        for f in set(range(frames)) - theirs
        for x in original[0].unbind(1)
    )
    cuts = {f for f in range(1, frames) if (f in theirs) != (f - 1 in theirs)}
    assert {
        int(line.split()[3])
        for line in printed.splitlines()
        if line.startswith("seam before frame")
    } == cuts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.mkv", "o.mkv.json", "o.png"]


def test_pictures_start_and_punctuate(folder, tmp_path, capsys, monkeypatch):
    """--image is frame 0; --keyframes are exactly at their frames, the plan holds their latents
    within blocks."""
    monkeypatch.chdir(folder)
    picture = {name: load_clip(f"{name}.png", SIZE)[0] for name in "ab"}
    generate.main(generate.Config(prompt=(A,), image="a.png", out=str(tmp_path / "i.mkv"), **QUICK))
    video = read_frames(tmp_path / "i.mkv")
    assert video.shape[2] == 21 and torch.equal(video[:, :, :1], picture["a"])
    generate.main(
        generate.Config(
            prompt=(A,), keyframes="0:a.png, 30:b.png", out=str(tmp_path / "k.mkv"), **QUICK
        )
    )
    video, printed = read_frames(tmp_path / "k.mkv"), capsys.readouterr().out
    assert (
        video.shape[2] == 33
        and torch.equal(video[:, :, :1], picture["a"])
        and torch.equal(video[:, :, 30:31], picture["b"])
    )
    assert "step 0     G  T  T" in printed and "a  a  a  T  T  G" in printed


def test_tails_are_video_latents(folder, models):
    """A clip at the beginning is encoded as it is; elsewhere its first frame is only the past, and
    latent i stands for 4i-3 .. 4i."""
    vae, video = models[1], clip(folder, "a", 25)
    z = vae.encode(video)
    head, tail = clips.Given(vae, torch.device("cpu")), clips.Given(vae, torch.device("cpu"))
    assert (
        head.clip(video, 0) == 7
        and list(head.latents) == list(range(7))
        and list(head.frames) == list(range(25))
    )
    assert (
        tail.clip(video, 9) == 15
        and list(tail.latents) == list(range(9, 15))
        and list(tail.frames) == list(range(33, 57))
    )
    assert all(torch.equal(head.latents[i], z[:, i]) for i in range(7))
    assert torch.equal(torch.stack(list(head.frames.values()), 1), video[0])
    assert all(torch.equal(tail.latents[9 + i], z[:, 1 + i]) for i in range(6))
    assert torch.equal(torch.stack(list(tail.frames.values()), 1), video[0, :, 1:])
    assert tail.picture(video[:, :, :1], 60) == 15 and torch.equal(tail.frames[60], video[0, :, 0])
    still = vae.decode(tail.latents[15][:, None].expand(-1, 7, -1, -1, -1))[:, :, -1]
    near, far = ((still - video[:, :, f]).abs().mean() for f in (0, 12))
    assert near < 0.025 and near < far / 4  # a standstill


def test_the_plan_is_what_was_asked(folder, models):
    """Which latents are given, which prompt each step follows, and what is committed but never
    denoised."""

    def plan(**flags):
        given = clips.Given(models[1], torch.device("cpu"))
        config = generate.Config(**{"prompt": (A,)} | QUICK | flags)
        made, prompts = clips.Around(config, Recipe(), SIZE, given).plan()
        return made, prompts, sorted(given.latents)

    a, b = str(folder / "a.mkv"), str(folder / "b.mkv")
    made, _, mine = plan(extend_before=a, prompt=(A, B))
    assert (
        mine == list(range(6, 12))
        and [(s.targets[0], s.prompt, s.commits) for s in made.steps]
        == [(6, 1, True), (9, 1, True), (3, 0, False), (0, 0, False)]
        and made.steps[2].anchors == (0, 1, 2)
    )
    made, _, mine = plan(between=(a, b), prompt=(A, B, A))
    assert mine == [*range(6), *range(12, 18)]
    assert [(s.targets[0], s.prompt) for s in made.steps] == [
        (0, 0),
        (3, 0),
        (12, 2),
        (15, 2),
        (6, 1),
    ]
    assert made.steps[2].reads == ((3, 0), (4, 1), (5, 2))
    assert (
        not plan(transition=(a, b), prompt=(A, B))[0].steps[2].reads
    )  # two scenes do not see each other
    made, prompts, mine = plan(story=str(folder / "story.json"), prompt=())
    assert (
        mine == [4, 5, 6]
        and prompts == [A, B, A]
        and [(s.targets, s.prompt, s.commits) for s in made.steps]
        == [
            ((12, 13, 14), 1, False),
            ((15, 16, 17), 1, False),
            ((4, 5, 6), 0, True),
            ((7, 8, 9, 10, 11), 2, False),  # the bridge
            ((18, 19), 1, False),
            ((1, 2, 3), 0, False),
            ((0,), 0, False),
        ]
    )


def test_exact_false_decodes_everything(folder, tmp_path):
    """--exact false: the user's clip too is decoded from its latents."""
    generate.main(
        generate.Config(
            prompt=(A,),
            extend_after=str(folder / "a.mkv"),
            out=str(tmp_path / "o.mkv"),
            exact=False,
            **QUICK | {"weights": WEIGHTS},
        )
    )
    video, original = read_frames(tmp_path / "o.mkv")[:, :, :HEAD], clip(folder, "a", HEAD, True)
    assert 0 < (video - original).abs().mean() < 0.05


def test_odd_media_are_used(folder, tmp_path, capsys):
    """Variable frame rate, odd sides, other sizes for A and B, and padding: what was done is
    printed."""
    clock(
        tmp_path / "vfr.mkv",
        "-vf",
        "select='lt(n,30)+not(mod(n,5))'",
        "-fps_mode",
        "vfr",
        height=37,
        width=51,
    )
    pair = str(tmp_path / "vfr.mkv"), str(folder / "b.mkv")
    generate.main(
        generate.Config(
            prompt=(A,), between=pair, fit="pad", exact=True, out=str(tmp_path / "o.mkv"), **QUICK
        )
    )
    printed = capsys.readouterr().out
    assert (
        "vfr.mkv: 37x51 to 32x32 (pad), " in printed
        and "b.mkv: 64x64 to 32x32 (pad), 24 to 16 fps" in printed
    )
    original = load_clip(tmp_path / "vfr.mkv", SIZE, fit="pad", frames=HEAD, last=True)[0]
    assert torch.equal(read_frames(tmp_path / "o.mkv")[:, :, :HEAD], original)


def test_help_says_which_way_it_goes(capsys):
    """--help has the commands first, with their sense of time, and what all videos share after
    them."""
    with pytest.raises(SystemExit):
        common.from_cli(generate.Config, ["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert all(len(line.split("  [")[0].split(maxsplit=1)) == 2 for line in lines)
    where = {line.split()[0]: n for n, line in enumerate(lines)}
    assert "AFTER" in lines[where["--extend_after"]] and "BEFORE" in lines[where["--extend_before"]]
    assert "one per scene" in lines[where["--prompt"]] and "to the bit" in lines[where["--exact"]]


# ---------------------------------------------------------------- decoding
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(
    "name", ["forward", "backward P=3", "backward, dummy", "inbetween", "transition"]
)
def test_decoding_in_order_equals_decoding_whole(name, chunk):
    """Whatever the order of generation, the stream of pieces is the decoded video: dummies are not
    shown, nothing is lost."""
    vae, plan = randomise(VAE(VAEConfig(dim=4, z_dim=4, num_res_blocks=1))), PLANS[name]
    z = 0.5 * randn(0, 1, plan.length + 3, 4, H, W)  # dummies stand at -1, -2, -3
    whole = vae.decode(z[:, : plan.length])
    finished = [(n, z[:, list(step.targets)]) for n, step in enumerate(plan.steps)]
    pieces = list(decode_in_order(vae, plan, finished, chunk))
    assert (whole.abs() < 1).float().mean() > 0.3 and whole.shape[2] == vae.config.frames(
        plan.length
    )
    assert distance(torch.cat(pieces, 2), whole) <= 1e-5


def test_forward_decodes_early():
    """Forward order shows each block as soon as it is made; backward order must wait for the last
    one."""
    vae = VAE(VAEConfig(dim=4, z_dim=4, num_res_blocks=1)).eval().requires_grad_(False)
    for name, expected in (("forward", [9, 12, 12]), ("backward P=3", [0, 0, 33])):
        plan, frames = PLANS[name], [0]

        def finished(plan=plan, frames=frames):
            for n, step in enumerate(plan.steps):
                yield n, torch.zeros(1, len(step.targets), 4, H, W)
                frames.append(0)

        for piece in decode_in_order(vae, plan, finished()):
            frames[-1] += piece.shape[2]
        assert frames[:3] == expected


# ---------------------------------------------------------------- command line
def from_shell(tmp_path, name: str, *flags: str):
    """Run generate.py with random weights; returns what it printed and the path."""
    out = tmp_path / name
    done = script(
        "generate.py", "--weights", "random", "--prompt", PROMPT, "--out", str(out), *flags
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, out


@pytest.mark.parametrize(
    "order, frames",
    [
        ("forward", 33),
        ("backward", 33),
        ("inbetween", 33),
        ("loop", 32),
        ("transition", 45),
        ("story", 81),
        ("forward", 93),
        ("backward", 93),
    ],
)
def test_every_order_writes_its_clip(order, frames, tmp_path):
    """Each order, beyond the horizon too, writes a clip with exactly the asked and printed number
    of frames, 32 x 32."""
    asked = frames + (order == "loop")  # whose first frame is its last
    printed, out = from_shell(tmp_path, "clip.mp4", "--order", order, "--frames", str(asked))
    assert (
        f"= {frames} frames = " in printed
        and printed.startswith("latent ")
        and f"wrote {out}" in printed
    )
    assert iio.imread(out).shape == (frames, 32, 32, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "clip.mp4.json"]


def test_same_seed_same_clip(tmp_path):
    """The same seed gives the same file, byte for byte; another seed another one. A sheet and a
    .gif can be had."""
    a, b = (
        from_shell(tmp_path, n, "--frames", "9", "--seed", "5", "--size", "16", "48")[
            1
        ].read_bytes()
        for n in ("a.mp4", "b.mp4")
    )
    assert (
        a
        == b
        != from_shell(tmp_path, "c.mp4", "--frames", "9", "--seed", "6", "--size", "16", "48")[
            1
        ].read_bytes()
    )
    from_shell(
        tmp_path,
        "d.gif",
        "--frames",
        "9",
        "--sheet",
        str(tmp_path / "sheet.png"),
        "--size",
        "16",
        "48",
    )
    assert (
        iio.imread(tmp_path / "d.gif").shape[:3] == (9, 16, 48)
        and iio.imread(tmp_path / "sheet.png").ndim == 3
    )


BAD = {
    "no prompt": ([], "--prompt is empty; say what to show"),
    "empty prompt": (["--prompt", " "], "--prompt is empty"),
    "unknown order": (["--order", "sideways"], "unknown order 'sideways'; use forward"),
    "unknown flag": (["--anchor", "3"], "did you mean --anchors?"),
    "not a number": (["--seed", "x"], "--seed x must be a whole number"),
    "frames 80": (["--frames", "80"], "--frames 80 is not 1 + 4k"),
    "frames 77": (["--frames", "77"], "use 69 or 81"),
    "too short": (
        ["--order", "transition", "--frames", "33"],
        "9 latents have no room for 2 scenes of 3 and gaps of 6; use 12 or more",
    ),
    "anchors 4": (["--order", "backward", "--anchors", "4"], "4 anchors do not fit the block 3"),
    "window": (["--window", "30", "--frames", "177"], "over the horizon of 21"),
    "negative window": (["--window", "-3", "--frames", "177"], "window -3"),
    "size": (
        ["--size", "40", "36"],
        "--size 40 36 must be a height and a width divisible by 8 and 8",
    ),
    "avi": (["--out", "clip.avi"], "clip.avi must end in .mp4 or .mkv or .gif or .png"),
    "no folder": (["--weights", "nowhere"], "--weights 'nowhere' is not a folder"),
    "empty folder": (["--weights", "empty"], "empty holds no transformer"),
    "vae_dtype": (["--vae_dtype", "half"], "--vae_dtype 'half' must be float32"),
    "seed": (["--seed", "-1"], "--seed -1 must be a whole number below 2^32, or random"),
    "large seed": (["--seed", "4294967296"], "below 2^32"),
    "picture": (["--out", "clip.png"], "is one picture, not 81 frames; add --frames 1"),
    "teacher and student": (
        ["--guidance", "3", "--denoising", "1000"],
        "--guidance and --denoising were asked for; leave out one of them",
    ),
    "long teacher": (
        ["--guidance", "3", "--seconds", "6"],
        "a bidirectional teacher makes at most 21 latents at once, not 25",
    ),
    "two ways": (
        ["--order", "loop", "--loop", "a.mkv"],
        "--loop and --order were asked for; leave out one",
    ),
    "shared": (["--share_noise", "some"], "--share_noise 'some' must be none or start or all"),
    "two prompts": (["--prompt", PROMPT, PROMPT], "2 prompts for a plan with 1"),
    "no weights": (["--weights", ""], "--weights is empty"),
    "no clip to use": (["--use", "2"], "--use is about your own clips, and none is given"),
    "no teacher": (["--negative", "blur"], "--negative is a teacher's; add --guidance"),
    "two lengths": (
        ["--frames", "81", "--seconds", "2"],
        "--frames and --seconds were asked for; leave out one of them",
    ),
    "three lengths": (
        ["--order", "inbetween", "--gap", "6", "--seconds", "2"],
        "--gap 6 says how long; leave out --frames, --seconds",
    ),
    "a gap in nothing": (["--gap", "6"], "--order forward has no --gap"),
    "a dummy before nothing": (["--order", "loop", "--dummy"], "--order loop has no --dummy"),
    "a dummy and anchors": (
        ["--order", "backward", "--dummy", "--anchors", "2"],
        "--dummy is backward without anchors; leave out --anchors 2",
    ),
    "a window on all": (["--order", "story", "--window", "3"], "--order story has no --window"),
    "frames": (["--frames", "0"], "--frames 0 must be from 1 to 576000"),
}


@pytest.mark.parametrize("flags, says", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(flags, says, tmp_path):
    """A user's mistake ends with exit code 2, one line that names it, no traceback and no file, not
    even a half one."""
    (tmp_path / "empty").mkdir()
    defaults = {"--weights": ["random"], "--out": ["clip.mp4"]} | (
        {"--prompt": [PROMPT]} if flags else {}
    )
    words = flags + [
        w for name, values in defaults.items() if name not in flags for w in (name, *values)
    ]
    done = script("generate.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr, (
        done.stderr
    )
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["empty"] and not list(
        (tmp_path / "empty").iterdir()
    )


def test_prompts_switch_with_the_blocks():
    """--switch: the next prompt from the first block that begins at that time on; one that no block
    follows is refused."""
    plan = clips.prompted(anchors.forward(21), ["a", "b", "c"], [1.0, 3.1])
    assert [step.prompt for step in plan.steps] == [
        0,
        0,
        1,
        1,
        1,
        2,
        2,
    ]  # latents 0, 3, 6 ...; frames 16 and 49.6 lie in 4 and 13
    assert [
        step.prompt for step in clips.prompted(anchors.backward(9), ["a", "b"], [1.0]).steps
    ] == [1, 0, 0]
    assert {step.prompt for step in clips.prompted(plans.transition(9, gap=3), ["a"]).steps} == {0}
    for prompts, seconds, says in (
        (["a"], [1.0], "2 prompts, got 1"),
        (["a", "b", "c"], [2.0, 1.0], "rising times"),
        (["a", "b"], [0.0], "rising"),
        (["a", "b"], [9.0], "prompt 2 is never followed"),
        (["a", "b", "c"], [1.0, 1.1], "prompt 2 is never followed"),
    ):
        with pytest.raises(UserError, match=says):
            clips.prompted(anchors.forward(21), prompts, seconds)


def test_plans_of_the_command_line():
    """--order, --seconds and --frames make the paper's plans: 5 seconds is 21 latents, more is a
    long plan of window 6."""

    def plan(**changes) -> Plan:
        run_as = {name: changes.pop(name) for name in ("anchors", "block") if name in changes}
        config = generate.Config(**{"prompt": (PROMPT,)} | changes)
        return generate.make_plan(config, replace(Recipe(), **run_as))

    assert (
        plan().steps == anchors.forward(21).steps
        and plan(order="backward").steps == anchors.backward(21).steps
    )
    assert plan(order="backward", anchors=1).steps == anchors.backward(21, anchors=1).steps
    assert plan(seconds=10).steps == anchors.long(42).steps
    assert (
        plan(frames=93, order="backward").steps
        == anchors.long(24, "backward", as_trained=True).steps
    )
    assert plan(seconds=10, order="backward", anchors=0).steps[0].targets == (-1, -2, -3)
    assert plan(order="story", frames=153, gap=5).length == 39
    assert (
        plan(frames=81, window=3, sink="past").steps
        == anchors.long(21, window=3, sink="past").steps
    )
    assert (
        plan(order="inbetween").steps == anchors.inbetween().steps
        and plan(order="loop").steps == anchors.loop(21).steps
    )
    assert plan(order="loop", frames=69).steps == anchors.loop(18).steps
    two = plan(order="transition", frames=93, prompt=("a", "b"))
    assert two.steps == plans.transition(24).steps
    assert plan(order="story", frames=153, prompt=("a", "b", "c")).steps == plans.story().steps
    whole = plans.story(split_gaps=False)  # one prompt for all: nothing can mix
    assert plan(order="story", frames=153).steps == whole.steps
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--seconds"):
            plan(seconds=seconds)


# ---------------------------------------------------------------- in Python
def test_six_lines_of_python_are_the_command_line(tmp_path):
    """What the docstring shows makes the command line's clip, bit for bit; so it does from blocks
    kept and decoded later."""
    flags = {"order": "backward", "prompt": (PROMPT,), "weights": "random"}
    generate.main(generate.Config(**flags, out=str(tmp_path / "cli.mkv")))
    shown = inspect.getdoc(generate).split("line:\n\n")[1].split("\n\nA stream")[0]
    lines = inspect.cleandoc(shown).replace("toy/weights", "random").splitlines()
    assert len(lines) == 6
    exec("\n".join(lines).replace("out/clip.mp4", str(tmp_path / "python.mkv")), {})
    assert (tmp_path / "python.mkv").stat().st_size > 1000
    cli, python = read_frames(tmp_path / "cli.mkv"), read_frames(tmp_path / "python.mkv")
    assert torch.equal(cli, python) and cli.std() > 0.05


def test_an_order_registered_once_is_known_here(monkeypatch):
    """A new entry of anchors.ORDERS is an --order: it gets what its signature asks for, and no
    more."""
    asked = {}

    def outside_in(length: int, block: int) -> Plan:
        asked.update(length=length, block=block)
        return anchors.forward(length, block)

    monkeypatch.setitem(anchors.ORDERS, "outside_in", outside_in)
    config = generate.Config(prompt=(PROMPT,), order="outside_in", frames=33)
    generate.check(config)
    plan = generate.make_plan(config, Recipe())
    assert asked == {"length": 9, "block": 3} and plan.name == "outside_in"


# ---------------------------------------------------------------- a student remembers what it is
def test_a_student_is_run_as_it_was_trained(capsys):
    """Levels, shift, block, anchors, head and noise rule come from its file; a flag wins, and what
    contradicts is said."""
    dit = load_models("random")[0]
    trained = Recipe((1000.0, 500.0), (1000.0, 750.0), 3.0, 2, 1, 1, "start")
    dit.recipe = json.loads(json.dumps(asdict(trained)))  # as a file has it
    config = generate.Config(prompt=(PROMPT,), frames=33)
    assert generate.chosen_recipe(config, dit) == trained and not capsys.readouterr().out
    changed = generate.chosen_recipe(replace(config, block=4, shift=3.0), dit)
    assert changed == replace(trained, block=4)
    assert capsys.readouterr().out == "note: --block 4, but this student was trained with 2\n"
    assert generate.chosen_recipe(replace(config, dummy=True), dit).anchors == 0
    plan = generate.make_plan(replace(config, order="backward", frames=17), trained)
    assert [step.targets for step in plan.steps] == [(3, 4), (1, 2), (0,)]
    assert [step.anchors for step in plan.steps] == [(2,), (0,), ()]


def test_levels_are_the_recipes(monkeypatch):
    """make_blocks denoises with the recipe's levels, the first block with its own, and shares noise
    as it says."""
    dit, seen = load_models("random")[0], {}
    dit.recipe = asdict(Recipe((1000.0, 500.0), (1000.0, 750.0, 250.0), 1.0, share_noise="start"))

    def few_steps(dit, texts, noise, sigmas, exit_at, share_noise):
        seen.update(first=sigmas(0), others=sigmas(1), share=share_noise, exit=exit_at(1))
        return lambda n, step, *_: torch.zeros(1, len(step.own), 16, 4, 4)

    monkeypatch.setattr(sampler, "few_steps", few_steps)
    list(make_blocks(dit, anchors.forward(3), [PROMPT], (4, 4)))
    assert seen == {"first": [1, 0.75, 0.25], "others": [1, 0.5], "share": "start", "exit": None}


def test_unknown_weights_are_not_sampled_by_guess(tmp_path, monkeypatch, capsys):
    """A file that does not say how it was trained: refused, unless --denoising or --guidance says
    what it is."""
    dit, vae = load_models("random")
    dit.recipe = None
    monkeypatch.setattr(generate, "load_models", lambda *_: (dit, vae))
    flags = {"prompt": PROMPT, "frames": 9, "out": tmp_path / "o.mkv", "weights": "random"}
    code, line = command_line(monkeypatch, capsys, generate, **flags)
    assert code == 2 and "--denoising 1000 750 500 250" in line and "--guidance" in line
    assert not list(tmp_path.iterdir())
    assert command_line(monkeypatch, capsys, generate, **flags, denoising=1000)[0] == 0
    assert read_frames(tmp_path / "o.mkv").shape[2] == 9


def test_a_teacher_makes_all_latents_at_once(monkeypatch, tmp_path):
    """--guidance without --order: one step over all latents; with one, block by block; the same
    numbers as the ODE's own."""
    dit, vae = load_models("random")
    plan = generate.make_plan(generate.Config(prompt=(PROMPT,), guidance=2.0, frames=17), Recipe())
    assert [step.targets for step in plan.steps] == [(0, 1, 2, 3, 4)]
    calls = []
    dit.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[:2]))
    ((n, z),) = make_blocks(dit, plan, [PROMPT], (4, 4), guidance=2.0)
    assert n == 0 and z.shape == (1, 5, 16, 4, 4) and calls == [(2, 5)] * 48
    by_blocks = generate.Config(prompt=(PROMPT,), guidance=2.0, order="backward", frames=33)
    assert len(generate.make_plan(by_blocks, Recipe()).steps) == 3


# ---------------------------------------------------------------- seams
def test_your_frames_fade_into_decoded_ones_at_seams():
    """Exact frames that are brighter than decoded ones jump at the seam; with the fade they do not,
    before and after a clip; at the seam itself the frames are decoded ones, farther than eight
    frames from it they are exact."""
    frames, made = 40, 0.03 * randn(0, 1, 3, 40, 8, 8).cumsum(dim=2)
    for mine in (range(0, 20), range(20, 40), range(12, 30)):
        given = {f: made[0, :, f] + 0.15 for f in mine}
        for exact in (True, None, False):
            seams = streams.Seams(given, frames, exact)
            pieces = [part.clone() for part in made.split(7, dim=2)]
            video = torch.cat(list(seams.through(pieces)), dim=2)
            assert set(seams.views) == {mine.start, mine.stop} - {0, frames}
            for cut, view in seams.views.items():
                jump = streams.jump([seams.written[f] for f in view])
                assert jump > 3 if exact is True else jump < 1.3, (mine, exact, jump)
                inside = cut if cut == mine.start else cut - 1
                assert torch.equal(video[:, :, inside], made[:, :, inside]) == (exact is not True)
            far = [f for f in mine if all(abs(f + 0.5 - cut) > 8 for cut in seams.views)]
            exactly = [torch.equal(video[0, :, f], given[f]) for f in far]
            assert exactly == [exact is not False] * len(far) and far


def test_shares_by_hand():
    """As in the docstring; short clips fade over half of them, lone pictures not at all."""
    assert list(streams.shares(range(8), 12, 2).values()) == [1, 1, 1, 1, 1, 1, 0.5, 0]
    assert streams.shares([4, 5, 6], 12, 8) == {4: 0, 5: 1, 6: 0}
    assert streams.shares([0, 7], 12, 8) == {0: 1, 7: 1}
    assert streams.seams(range(4), 9) == [4]


def test_seams_are_faded_and_said(folder, tmp_path, capsys):
    """By default the frames beside the seam fade, the others are exact; what was done and the jump
    of both ways are printed."""
    flags = QUICK | {"prompt": (A,), "extend_after": str(folder / "a.mkv")}
    generate.main(generate.Config(**flags, out=str(tmp_path / "o.mkv")))
    printed, original = capsys.readouterr().out, clip(folder, "a", HEAD, last=True)
    video = read_frames(tmp_path / "o.mkv")
    assert torch.equal(video[:, :, : HEAD - 8], original[:, :, : HEAD - 8])
    assert (video[:, :, HEAD - 8 : HEAD] != original[:, :, HEAD - 8 :]).any()
    assert "8 of your frames beside seams fade into decoded ones; --exact true" in printed
    assert re.search(r"seam before frame 21 \(1.31 s\): jump [\d.]+ \([\d.]+ with your", printed)


@torch.no_grad()
def test_a_loop_is_shown_from_after_what_it_comes_back_to():
    """Streamed block by block or decoded at once: frames 9 to 32, then the four frames of latents 1
    and 2 each, decoded with the gap as their past."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(dim=8, z_dim=2, num_res_blocks=1)).eval()
    plan, z = anchors.loop(9, gap=6), randn(1, 1, 9, 2, 2, 2)
    blocks = ((n, z[:, list(step.targets)]) for n, step in enumerate(plan.steps))
    again = streams.come_back(blocks, plan)
    pieces = decode_in_order(vae, plans.as_shown(plan), again)
    video = torch.cat(list(streams.without_first(pieces, 9)), dim=2)
    whole = vae.decode(torch.cat([z, z[:, 1:3]], dim=1))
    assert video.shape[2] == 32 and distance(video, whole[:, :, 9:]) <= 1e-5
    assert torch.equal(generate.looped(vae, plan, z), whole[:, :, 9:])
    straight = anchors.forward(9)
    assert plans.as_shown(straight) is straight
    assert torch.equal(generate.looped(vae, straight, z), vae.decode(z))


# ---------------------------------------------------------------- what comes out
def test_one_frame_is_a_picture(tmp_path):
    """--frames 1 needs no other flag, and may be a .png; more frames in a .png are refused before
    any is made."""
    out = tmp_path / "o.png"
    for order in ("forward", "backward"):
        flags = ONE | {"prompt": (PROMPT,), "frames": 1, "order": order}
        generate.main(generate.Config(**flags, out=str(out)))
        assert iio.imread(out).shape == (32, 32, 3)
    generate.main(generate.Config(**flags, out=str(tmp_path / "o.mp4")))
    assert read_frames(tmp_path / "o.mp4").shape[2] == 1


def test_a_clip_says_how_it_was_made(tmp_path, capsys):
    """Prompt, seed, plan and the weights' hashes are in the file's metadata and beside it; --seed
    random is printed and repeats."""
    flags = {"prompt": (A,), "weights": WEIGHTS, "denoising": (1000.0,), "frames": 9}
    generate.main(generate.Config(**flags, seed="random", out=str(tmp_path / "a.mp4")))
    seed = re.search(r"--seed (\d+)", capsys.readouterr().out)[1]
    about = json.loads((tmp_path / "a.mp4.json").read_text())
    assert about["prompt"] == [A] and about["seed"] == int(seed)
    assert about["plan"]["made"] == [[0, 1, 2]] and about["recipe"]["levels"] == [1000]
    digest = outputs.digest(ROOT / "toy" / "weights" / "student.safetensors")
    assert about["sources"]["student.safetensors"] == digest and len(digest) == 16
    assert json.dumps(A).encode() in (tmp_path / "a.mp4").read_bytes()  # the container's comment
    generate.main(generate.Config(**flags, seed=seed, out=str(tmp_path / "b.mp4")))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_many_prompts_resume(tmp_path, capsys):
    """--prompts: a clip a line, safely named; what is there with the same settings is skipped,
    other settings are made again."""
    (tmp_path / "p.txt").write_text(f"{A}\n{B}\n")
    flags = ONE | {"prompts": str(tmp_path / "p.txt"), "frames": 9}
    generate.main(generate.Config(**flags, out=str(tmp_path / "many.mkv")))
    names = [
        "0001-a-red-disc-moves-up-over-a-blue-wave",
        "0002-a-cyan-ring-moves-down-over-a-red-wave",
    ]
    made = sorted((tmp_path / "many").glob("*.mkv"))
    assert [path.stem for path in made] == [name[:45].rstrip("-") for name in names]
    generate.main(generate.Config(**ONE, prompt=(B,), frames=9, out=str(tmp_path / "one.mkv")))
    assert torch.equal(read_frames(tmp_path / "one.mkv"), read_frames(made[1]))
    before = made[0].stat().st_mtime_ns
    made[1].unlink()
    capsys.readouterr()
    generate.main(generate.Config(**flags, out=str(tmp_path / "many.mkv")))
    printed = capsys.readouterr().out
    assert (
        printed.count("skipped") == 1 and made[0].stat().st_mtime_ns == before and made[1].exists()
    )
    generate.main(generate.Config(**flags | {"seed": "1"}, out=str(tmp_path / "many.mkv")))
    assert "skipped" not in capsys.readouterr().out and made[0].stat().st_mtime_ns > before
    assert (
        outputs.safe_name(3, "../../etc: «Ж»") == "0003-etc"
        and outputs.safe_name(4, "猫") == "0004"
    )


PLACES = {  # flags -> what the sentence says; "in" is the folder
    "empty": ({"out": ""}, "--out is empty"),
    "folder": ({"out": "f.mp4"}, "--out f.mp4 is a folder"),
    "no suffix": ({"out": "clip"}, "--out clip must end in .mp4 or .mkv or .gif or .png"),
    "under a file": ({"out": "a.mkv/x.mp4"}, "a.mkv is a file, not a folder"),
    "the input": ({"extend_after": "a.mkv", "out": "./a.mkv"}, "--out a.mkv is also what is read"),
    "the story's clip": (
        {"story": "story.json", "out": "a.mkv", "prompt": ()},
        "is also what is read",
    ),
    "sheet": ({"sheet": "s.jpg"}, "--sheet s.jpg must end in .png"),
    "sheet is the picture": (
        {"image": "a.png", "sheet": "a.png", "out": "o.mkv"},
        "--sheet a.png is also what is read",
    ),
    "sheet is out": (
        {"out": "o.png", "frames": 1, "sheet": "o.png"},
        "--sheet o.png is also --out",
    ),
    "preview": ({"preview": "a.mkv"}, "--preview a.mkv is a file; name a folder"),
    "no picture": ({"keyframes": "0:lost.png"}, "lost.png does not exist"),
    "what a stop leaves": (
        {"extend_after": "a.part.mkv", "out": "a.mkv"},
        "a.part.mkv is also what is read",
    ),
    "preview over the clip": (
        {"extend_after": "a.mkv", "preview": "."},
        "--preview . holds a.mkv; name another folder",
    ),
    "one of many": (
        {"prompts": "p.txt", "prompt": (), "extend_after": "m/0001-a.mkv", "out": "m.mkv"},
        "m/0001-a.mkv is also what is read",
    ),
    "empty variable": ({"image": ""}, "--image has an empty name; name a file"),
    "one empty variable": ({"between": ("", "a.mkv")}, "--between has an empty name"),
    "frames of a clip": (
        {"extend_after": "a.mkv", "frames": 81},
        "--extend-after and --frames were asked for; leave out one of them",
    ),
}


@pytest.mark.parametrize("flags, says", PLACES.values(), ids=PLACES)
def test_places_are_looked_at_before_any_work(flags, says, folder, monkeypatch, capsys):
    """Every output is checked before weights are loaded, and nothing of the user's is written
    over."""
    monkeypatch.chdir(folder)
    (folder / "f.mp4").mkdir(exist_ok=True)
    (folder / "m").mkdir(exist_ok=True)
    (folder / "p.txt").write_text("a\n")
    for copy in ("a.part.mkv", "m/0001-a.mkv"):
        (folder / copy).write_bytes((folder / "a.mkv").read_bytes())
    monkeypatch.setattr(generate, "load_models", None)  # a call would be a TypeError
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    flags = {k: v for k, v in ({"prompt": (A,)} | flags).items() if v != ()}
    code, line = command_line(monkeypatch, capsys, generate, **flags)
    assert code == 2 and says in line, line
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_read_only_places_and_home(tmp_path, monkeypatch):
    """A place that cannot be written is refused at once; `~` is the home folder, for what is read
    and written."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot be written"):
        outputs.check_file(str(tmp_path / "new" / "x.mp4"), "out", (".mp4",))
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert outputs.check_file("~/x.mp4", "out", (".mp4",)) == tmp_path / "x.mp4"
    generate.main(generate.Config(**ONE, prompt=(A,), frames=1, out="~/x.png", sheet="~/s.png"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.png", "x.png", "x.png.json"]
    generate.main(generate.Config(**ONE, prompt=(A,), image="~/x.png", seconds=0.5, out="~/y.mkv"))
    assert torch.equal(read_frames("~/y.mkv")[:, :, :1], read_frames(tmp_path / "x.png"))


@pytest.mark.parametrize("where", ["network", "decoder"])
def test_nan_is_no_picture(where, tmp_path, monkeypatch, capsys):
    """Weights that are not numbers: exit code 1, one sentence with the block and its step or the
    frames, and no file."""
    dit, vae = load_models("random")
    module = dit.head.head if where == "network" else vae.conv2
    module.weight.data.flatten()[0] = float("nan")
    monkeypatch.setattr(generate, "load_models", lambda *_: (dit, vae))
    flags = {"prompt": A, "frames": 21, "out": tmp_path / "o.mkv", "weights": "random"}
    code, line = command_line(monkeypatch, capsys, generate, **flags)
    says = "block 1 of 2 (step 0, latents 0 to 2)" if where == "network" else "frames 0 to 8"
    assert code == 1 and says in line and not list(tmp_path.iterdir())


def test_names_of_pictures_may_have_commas():
    """A comma ends a keyframe only where the next frame number follows."""
    assert read_keyframes("0:a, b.png,40: c.png") == [(0, "a, b.png"), (40, "c.png")]
    with pytest.raises(UserError, match="must be frame:picture"):
        read_keyframes("a.png,0:b.png")


# ---------------------------------------------------------------- mistakes
def bad(folder):
    """name -> (flags, what the sentence says). Files are made here."""
    clock(folder / "short.mkv", seconds=0.4)
    clock(folder / "one.mkv", seconds=1 / 30)
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", folder / "sound.mp4")
    (folder / "broken.mp4").write_bytes(bytes(range(256)) * 8)
    (folder / "latin.json").write_bytes(
        '{"scenes": [{"start": 0, "seconds": 1, "prompt": "café"}]}'.encode("latin-1")
    )
    scene = {"start": 0, "seconds": 1, "prompt": A}
    tales = {
        "overlap": {"scenes": [scene, scene | {"start": 1}]},
        "none": {"scenes": []},
        "lacks": {"scenes": [{"start": 0, "prompt": A}]},
        "key": {"scenes": [scene | {"promt": A}]},
        "order": {"scenes": [scene, scene | {"start": 3}], "order": [1]},
        "list": [1],
        "words": {"scenes": [scene], "order": ["0"]},
        "type": {"scenes": [scene | {"start": "0"}]},
        "scene": {"scenes": ["a.mkv"]},
        "far": {"scenes": [scene | {"start": -1}]},
        "lost": {"scenes": [scene, {"start": 3, "clip": "lost.mkv", "prompt": A}]},
        "dumb": {"scenes": [scene | {"prompt": " "}]},
        "cut short": {"scenes": [scene], "seconds": 0.5},
    }
    for name, tale in tales.items():
        (folder / f"{name}.json").write_text(json.dumps(tale))
    (folder / "cut.json").write_text('{"scenes": [')
    story = {
        "overlap": "scene 1 starts at 1 s but the one before it ends at 1.5 s",
        "none": "no scenes",
        "lacks": "scene 0 lacks seconds",
        "key": "scene 0 has the unknown key 'promt'",
        "order": "the order [1] must name each scene from 0 to 1 once",
        "words": "the order ['0'] must",
        "list": "the story is [1], not an object",
        "type": 'scene 0 has start = "0"',
        "scene": 'scene 0 is "a.mkv", not an object',
        "far": "scene 0 has start = -1",
        "lost": "lost.mkv does not exist",
        "cut": "not a story in JSON",
        "latin": "UTF-8",
        "dumb": 'scene 0 has prompt = " "',
        "cut short": "seconds = 0.5, but the last scene needs 1",
    }
    return {
        "two": ({"loop": "a.mkv", "image": "a.png"}, "--loop and --image were asked for"),
        "two clips": (
            {"extend_before": "a.mkv", "extend_after": "b.mkv"},
            "are two clips: name the same one",
        ),
        "one to join": ({"between": ("a.mkv",)}, "--between takes two clips, got 1"),
        "short": (
            {"extend_after": "short.mkv"},
            "short.mkv has 6 frames (0.38 s) at 16 fps, but 9 (0.56 s) are needed",
        ),
        "short tail": ({"extend_before": "short.mkv"}, "but 13 (0.81 s) are needed"),
        "one frame": ({"loop": "one.mkv"}, "one.mkv has 1 frame (0.06 s)"),
        "picture": ({"extend_after": "a.png"}, "a.png has 1 frame"),
        "sound": ({"extend_after": "sound.mp4"}, "sound.mp4 has sound but no picture"),
        "broken": ({"extend_after": "broken.mp4"}, "broken.mp4 cannot be read"),
        "absent": ({"transition": ("a.mkv", "no.mkv")}, "no.mkv does not exist"),
        "fit": ({"loop": "a.mkv", "fit": "squash"}, "--fit 'squash' must be crop or pad"),
        "use": ({"loop": "a.mkv", "use": 0}, "--use 0.0 must be above 0"),
        "seconds": ({"loop": "a.mkv", "seconds": -1}, "--seconds -1.0 must be above 0"),
        "prompts": (
            {"extend_after": "a.mkv", "prompt": (A, B, A)},
            "3 prompts for a plan with 2; give one, in quotes, or one for each scene or part",
        ),
        "no prompt": ({"extend_after": "a.mkv", "prompt": ()}, "--prompt is empty"),
        "keys": ({"keyframes": "0=a.png"}, "--keyframes '0=a.png' must be frame:picture"),
        "far key": ({"keyframes": "1000000:a.png"}, "below frame 1000000"),
        "one latent": ({"keyframes": "5:a.png,8:b.png"}, "within the 4 frames of one latent"),
        "far": (
            {"keyframes": "0:a.png,9:b.png", "prompt": (A, B)},
            "2 prompts for a plan with 1; give one, in quotes",
        ),
        "out": (
            {"loop": "a.mkv", "out": "o.avi"},
            "--out o.avi must end in .mp4 or .mkv or .gif or .png",
        ),
        "sink": ({"loop": "a.mkv", "sink": "left"}, "--sink 'left' must be past or future"),
        "size": ({"loop": "a.mkv", "size": (40, 36)}, "--size 40 36 must be"),
        "story and prompt": ({"story": "story.json"}, "--story and --prompt were asked for"),
    } | {
        f"story {name}": ({"story": f"{name}.json", "prompt": ()}, says)
        for name, says in story.items()
    }


def test_mistakes_are_one_sentence_and_no_file(folder, monkeypatch, capsys):
    """Whatever is wrong with the flags, the clips or the story: exit code 2, one line that names
    it, and nothing is written."""
    cases = bad(folder)
    monkeypatch.chdir(folder)
    before = sorted(p.name for p in folder.iterdir())
    for name, (flags, says) in cases.items():
        flags = {
            k: v
            for k, v in ({"prompt": (A,), "weights": "random", "out": "o.mkv"} | flags).items()
            if v != ()
        }
        code, line = command_line(monkeypatch, capsys, generate, **flags)
        assert code == 2 and says in line, (name, line)
        assert sorted(p.name for p in folder.iterdir()) == before, name


# ---------------------------------------------------------------- stopped, previewed, long
def test_what_is_done_survives_a_stop(tmp_path, monkeypatch, capsys):
    """SIGTERM in the fifth block: forward keeps what is decoded, backward the end of the video; the
    name itself is not taken."""
    for order in ("forward", "backward"):
        flags = {
            "prompt": (A,),
            "weights": WEIGHTS,
            "denoising": (1000.0,),
            "seconds": 3.0,
            "order": order,
        }
        generate.main(generate.Config(**flags, out=str(tmp_path / "whole.mkv")))
        whole = read_frames(tmp_path / "whole.mkv")
        with monkeypatch.context() as patch:
            at_call(patch, KVCache, "read", 5, terminate)
            patch.setattr(
                common,
                "from_cli",
                lambda _, flags=flags: generate.Config(**flags, out=str(tmp_path / "clip.mkv")),
            )
            with pytest.raises(SystemExit) as stop:
                common.run(generate.main, generate.Config)
        part = read_frames(tmp_path / "clip.part.mkv")
        assert (
            stop.value.code == 143
            and "clip.part.mkv has" in capsys.readouterr().out
            and not (tmp_path / "clip.mkv").exists()
        )
        if order == "forward":  # four blocks of three latents
            assert torch.equal(part, whole[:, :, :45])
        else:  # four blocks, of which the newest is the past of the others
            assert part.shape[2] == 36 and (part - whole[:, :, -36:]).abs().mean() < 0.02
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "clip.part.mkv",
            "whole.mkv",
            "whole.mkv.json",
        ]


def test_backward_blocks_can_be_previewed(tmp_path):
    """--preview shows each block when the block before it is made; it is what the final video has
    there, nearly."""
    generate.main(
        generate.Config(
            (A,),
            weights=WEIGHTS,
            denoising=(1000.0,),
            order="backward",
            seconds=2.0,
            out=str(tmp_path / "o.mkv"),
            preview=str(tmp_path / "p"),
        )
    )
    whole, names = (
        read_frames(tmp_path / "o.mkv"),
        sorted(p.name for p in (tmp_path / "p").iterdir()),
    )
    assert names == ["000009.mp4", "000021.mp4"]
    for name in names:
        shown, at = read_frames(tmp_path / "p" / name), int(name[:6])
        assert shown.shape[2] == 12 and (shown - whole[:, :, at : at + 12]).abs().mean() < 0.04


@torch.no_grad()
def test_a_past_without_a_beginning_is_shown_to_the_decoder_twice(models):
    """After latents that begin a video, the frames are the video's own; after others nearly so,
    and several times as near as with their past once."""
    vae = models[1]
    z = vae.encode(world.render([A], [7], 32, 81))
    whole = vae.decode(z)
    own = streams._decode_after(z[:, :3], z[:, 3:6], True, vae)
    assert distance(own, whole[:, :, 9:21]) < 1e-5
    true = whole[:, :, 33:45]
    once, twice = (streams._decode_after(z[:, 6:9], z[:, 9:12], b, vae) for b in (True, False))
    far, near = ((x - true).abs().mean() for x in (once, twice))
    assert near < 0.02 and near < far / 4
