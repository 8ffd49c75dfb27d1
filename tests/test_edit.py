"""The user's own clips: given frames come out to the bit, tails are video latents, and mistakes cost one sentence and no file."""

import json

import imageio.v3 as iio
import pytest
import torch
from test_media import clock, ffmpeg
from tiny import ROOT, at_call, command_line, distance, terminate

import anchors
import generate as edit
import sampler
from film import load_models
from kvcache import KVCache
from lib import common
from lib.media import VideoWriter, load_clip, read_frames, to_uint8
from toy import world

A, B = "a red disc moves up over a blue wave", "a cyan ring moves down over a red wave"
WEIGHTS, SIZE = str(ROOT / "toy" / "weights"), (32, 32)
QUICK = {
    "weights": WEIGHTS,
    "steps": (1000.0,),
    "use": 1.0,
    "seconds": 1.0,
}  # one denoising step: the plumbing is the same


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
    return load_models(WEIGHTS, torch.float32, torch.device("cpu"))


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
    "loop": ({"loop": "a.mkv"}, 45, [(0, "a", HEAD, False, 0)]),
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
    """In a lossless file the user's frames are where they belong, untouched, and all others are not theirs; seams are measured."""
    monkeypatch.chdir(folder)
    edit.main(
        edit.Config(
            **{"prompt": (A,)} | QUICK | flags,
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
    cuts = {f for f in range(1, frames) if (f in theirs) != (f - 1 in theirs)} | (
        {0} if "loop" in flags else set()
    )
    assert {
        int(line.split()[3])
        for line in printed.splitlines()
        if line.startswith("seam before frame")
    } == cuts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.mkv", "o.png"]


def test_pictures_start_and_punctuate(folder, tmp_path, capsys, monkeypatch):
    """--image is frame 0; --keyframes are exactly at their frames, the plan holds their latents within blocks."""
    monkeypatch.chdir(folder)
    picture = {name: load_clip(f"{name}.png", SIZE)[0] for name in "ab"}
    edit.main(edit.Config((A,), image="a.png", out=str(tmp_path / "i.mkv"), **QUICK))
    video = read_frames(tmp_path / "i.mkv")
    assert video.shape[2] == 21 and torch.equal(video[:, :, :1], picture["a"])
    edit.main(
        edit.Config((A,), keyframes="0:a.png, 30:b.png", out=str(tmp_path / "k.mkv"), **QUICK)
    )
    video, printed = read_frames(tmp_path / "k.mkv"), capsys.readouterr().out
    assert (
        video.shape[2] == 33
        and torch.equal(video[:, :, :1], picture["a"])
        and torch.equal(video[:, :, 30:31], picture["b"])
    )
    assert "step 0     G  T  T" in printed and "a  a  a  T  T  G" in printed


def test_tails_are_video_latents(folder, models):
    """A clip at the beginning is encoded as it is; elsewhere its first frame is only the past, and latent i stands for 4i-3 .. 4i."""
    vae, video = models[1], clip(folder, "a", 25)
    z = vae.encode(video)
    head, tail = edit.Given(vae, torch.device("cpu")), edit.Given(vae, torch.device("cpu"))
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
    assert (
        distance(
            vae.decode(tail.latents[15][:, None].expand(-1, 4, -1, -1, -1))[:, :, -1],
            video[:, :, 0],
        )
        < 0.5
    )  # a standstill


def test_the_plan_is_what_was_asked(folder, models):
    """Which latents are given, which prompt each step follows, and what is committed but never denoised."""

    def plan(**flags):
        mine = edit.Given(models[1], torch.device("cpu"))
        config = edit.Config(**{"prompt": (A,)} | QUICK | flags)
        made, prompts = edit.plan_of(config, SIZE, mine)
        return anchors.with_given(made, list(mine.latents)), prompts, sorted(mine.latents)

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
        and prompts == [A, A, A, B]
        and [(s.targets, s.prompt, s.commits) for s in made.steps]
        == [
            ((12, 13, 14), 3, False),
            ((15, 16, 17), 3, False),
            ((4, 5, 6), 1, True),
            ((7, 8, 9, 10, 11), 2, False),
            ((18, 19), 3, False),
            ((1, 2, 3), 0, False),
            ((0,), 0, False),
        ]
    )


def test_exact_false_decodes_everything(folder, tmp_path):
    """--exact false: the user's clip too is decoded from its latents."""
    edit.main(
        edit.Config(
            (A,),
            extend_after=str(folder / "a.mkv"),
            out=str(tmp_path / "o.mkv"),
            exact=False,
            **QUICK,
        )
    )
    video, original = read_frames(tmp_path / "o.mkv")[:, :, :HEAD], clip(folder, "a", HEAD, True)
    assert 0 < (video - original).abs().mean() < 0.05


def test_odd_media_are_used(folder, tmp_path, capsys):
    """Variable frame rate, odd sides, other sizes for A and B, and padding: what was done is printed."""
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
    edit.main(edit.Config((A,), between=pair, fit="pad", out=str(tmp_path / "o.mkv"), **QUICK))
    printed = capsys.readouterr().out
    assert (
        "vfr.mkv: 37x51 to 32x32 (pad), " in printed
        and "b.mkv: 64x64 to 32x32 (pad), 24 to 16 fps" in printed
    )
    original = load_clip(tmp_path / "vfr.mkv", SIZE, fit="pad", frames=HEAD, last=True)[0]
    assert torch.equal(read_frames(tmp_path / "o.mkv")[:, :, :HEAD], original)


def test_help_says_which_way_it_goes(capsys):
    """--help has the commands first, with their sense of time, and what all videos share after them."""
    with pytest.raises(SystemExit):
        common.from_cli(edit.Config, ["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert all(len(line.split("  [")[0].split(maxsplit=1)) == 2 for line in lines)
    where = {line.split()[0]: n for n, line in enumerate(lines)}
    assert "AFTER" in lines[where["--extend_after"]] and "BEFORE" in lines[where["--extend_before"]]
    assert where["--exact"] < where["--out"] and "one for each part" in lines[where["--prompt"]]


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
        "dumb": {"scenes": [scene | {"prompt": ""}]},
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
        "dumb": 'scene 0 has prompt = ""',
    }
    return {
        "nothing": ({}, "nothing was asked for; use one of --extend-after"),
        "two": ({"loop": "a.mkv", "image": "a.png"}, "--loop and --image was asked for"),
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
            "3 prompts; give one, or 2: one for each part, in time",
        ),
        "no prompt": ({"extend_after": "a.mkv", "prompt": ()}, "0 prompts; give one"),
        "word": (
            {"extend_after": "a.mkv", "prompt": ("a purple disc",)},
            "does not know the word 'purple'",
        ),
        "keys": ({"keyframes": "0=a.png"}, "--keyframes '0=a.png' must be frame:picture"),
        "one latent": ({"keyframes": "5:a.png,8:b.png"}, "within the 4 frames of one latent"),
        "far": (
            {"keyframes": "0:a.png,9:b.png", "prompt": (A, B)},
            "2 prompts; give one, or say with --switch",
        ),
        "out": ({"loop": "a.mkv", "out": "o.avi"}, "--out o.avi must end in .mp4, .gif or .mkv"),
        "sink": ({"loop": "a.mkv", "sink": "left"}, "unknown sink 'left'"),
        "size": ({"loop": "a.mkv", "size": (40, 40)}, "--size 40 40 must be"),
        "story and prompt": ({"story": "story.json"}, "are in the file; leave out --prompt"),
    } | {
        f"story {name}": ({"story": f"{name}.json", "prompt": ()}, says)
        for name, says in story.items()
    }


def test_mistakes_are_one_sentence_and_no_file(folder, monkeypatch, capsys):
    """Whatever is wrong with the flags, the clips or the story: exit code 2, one line that names it, and nothing is written."""
    cases = bad(folder)
    monkeypatch.chdir(folder)
    before = sorted(p.name for p in folder.iterdir())
    for name, (flags, says) in cases.items():
        flags = {
            k: v
            for k, v in ({"prompt": (A,), "weights": "random", "out": "o.mkv"} | flags).items()
            if v != ()
        }
        code, line = command_line(monkeypatch, capsys, edit, **flags)
        assert code == 2 and says in line, (name, line)
        assert sorted(p.name for p in folder.iterdir()) == before, name


# ---------------------------------------------------------------- stopped, previewed, long
def test_what_is_done_survives_a_stop(tmp_path, monkeypatch, capsys):
    """SIGTERM in the fifth block: forward keeps what is decoded, backward the end of the video; the name itself is not taken."""
    for order in ("forward", "backward"):
        flags = {
            "prompt": (A,),
            "weights": WEIGHTS,
            "steps": (1000.0,),
            "seconds": 3.0,
            "order": order,
        }
        sampler.main(sampler.Config(**flags, out=str(tmp_path / "whole.mkv")))
        whole = read_frames(tmp_path / "whole.mkv")
        with monkeypatch.context() as patch:
            at_call(patch, KVCache, "read", 5, terminate)
            patch.setattr(
                common,
                "from_cli",
                lambda _, flags=flags: sampler.Config(**flags, out=str(tmp_path / "clip.mkv")),
            )
            with pytest.raises(SystemExit) as stop:
                common.run(sampler.main, sampler.Config)
        part = read_frames(tmp_path / "clip.part.mkv")
        assert (
            stop.value.code == 130
            and "clip.part.mkv has" in capsys.readouterr().out
            and not (tmp_path / "clip.mkv").exists()
        )
        if order == "forward":  # four blocks of three latents
            assert torch.equal(part, whole[:, :, :45])
        else:  # four blocks, of which the newest is the past of the others
            assert part.shape[2] == 36 and (part - whole[:, :, -36:]).abs().mean() < 0.02
        assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.part.mkv", "whole.mkv"]


def test_backward_blocks_can_be_previewed(tmp_path):
    """--preview shows each block when the block before it is made; it is what the final video has there, nearly."""
    sampler.main(
        sampler.Config(
            (A,),
            weights=WEIGHTS,
            steps=(1000.0,),
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
        assert shown.shape[2] == 12 and (shown - whole[:, :, at : at + 12]).abs().mean() < 0.05
