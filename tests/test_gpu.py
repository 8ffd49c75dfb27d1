"""The first hour on a GPU runs whole on a CPU, at toy size: every line of it, or the line says why
it cannot."""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ROOT

from dit import PRESETS
from lib.common import UserError, from_cli
from tests import gpu_checks
from tools import gpu, gpu_speed
from tools.gpu import Config, main, result_of, room_of
from tools.gpu_speed import Found, Skipped, Wrong

FILES = [Path(module.__file__) for module in (gpu, gpu_checks, gpu_speed)]
REPORT = {
    "size": "full",
    "device": "cuda",
    "machine": "NVIDIA H200",
    "values": {"forward FPS": 34.21},
}


class Traced:
    """The lines of these files that run inside the block, {(file, line)}."""

    def __init__(self) -> None:
        self.files, self.lines = {str(f) for f in FILES}, set()

    def line(self, frame, event, arg):
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self.line

    def call(self, frame, event, arg):
        return self.line(frame, event, arg) if frame.f_code.co_filename in self.files else None

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)


@pytest.fixture(scope="module")
def traced():
    return Traced()


@pytest.fixture(scope="module")
def hour(tmp_path_factory, traced):
    """The whole command, in this process; its folder, and what it printed."""
    out = tmp_path_factory.mktemp("gpu")
    torch.set_num_threads(1)
    with traced:
        main(Config(size="toy", device="cpu", out=str(out), here=True, minutes=1000))
    return out


@pytest.fixture
def room(tmp_path):
    return room_of(Config(size="toy", device="cpu", out=str(tmp_path)))


def test_every_part_has_a_clear_result(hour):
    """OK with numbers, or skipped with what a CPU lacks; none failed. Report, numbers and trace are
    there."""
    rows = json.loads((hour / "report.json").read_text())["parts"]
    assert list(rows) == list(gpu.PARTS)
    assert {name: row["line"] for name, row in rows.items() if row["status"] == "FAILED"} == {}
    skipped = {name for name, row in rows.items() if row["status"] == "skipped"}
    assert skipped <= {"tests", "diffusers"}
    for name, row in rows.items():
        assert row["line"] and row["seconds"] > 0 and (row["values"] or name in skipped), name
        assert all(isinstance(x, int | float) for x in row["values"].values()), name
    report = (hour / "report.md").read_text()
    assert all(f"| {name} | " in report for name in gpu.PARTS) and "## orders" in report
    assert (hour / "trace.json.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_the_cells_of_the_page_have_names_that_a_report_has(hour):
    """Whatever docs/speed.md wants from a GPU, a run gives (here: at toy size)."""
    found = json.loads((hour / "report.json").read_text())
    wanted = set(name for _, name in gpu.CELL.findall((ROOT / "docs" / "speed.md").read_text()))
    skipped = {"compiled gain", "train_dmd.py, GiB"}  # which a CPU cannot tell
    assert len(wanted) > 15
    assert wanted - skipped - {"machine"} <= found["values"].keys()


def test_what_is_done_stays_done(hour, capsys, monkeypatch):
    """A second call runs nothing that was OK, and tries again what was skipped; other code, and
    nothing counts."""
    ran = []
    for name, (_, limit) in gpu.PARTS.items():
        part = (lambda room, name=name: ran.append(name) or Found("again", {"x": 1.0}), limit)
        monkeypatch.setitem(gpu.PARTS, name, part)
    rows = json.loads((hour / "parts.json").read_text())
    again = Config(size="toy", device="cpu", out=str(hour), here=True)
    before = (hour / "parts.json").read_text()
    main(again)
    assert ran == [name for name, row in rows.items() if row["status"] != "OK"]
    assert capsys.readouterr().out.count("(from an earlier call)") == len(rows) - len(ran)
    monkeypatch.setattr(gpu, "code", lambda: "another")
    assert gpu.read(room_of(again)) == {}
    (hour / "parts.json").write_text(before)


def statements(path: Path) -> list[tuple[int, int, str]]:
    """Smallest statements inside functions: first and last line, and their text; of compound ones
    the header alone, and nothing of the body of one that is marked."""
    lines, found = path.read_text().splitlines(), []

    def visit(node: ast.stmt) -> None:
        inner = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
        last = inner[0].lineno - 1 if inner else node.end_lineno
        last = max(last, node.lineno)
        text = "\n".join(lines[node.lineno - 1 : last])
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_docstring and not isinstance(node, ast.FunctionDef | ast.Try):
            found.append((node.lineno, last, text))
        spared = getattr(node, "body", []) if "# GPU: " in text else []
        for n in inner:
            if n not in spared:
                visit(n)
        for handler in getattr(node, "handlers", []):
            for n in handler.body:
                visit(n)

    for node in ast.parse(path.read_text()).body:
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(function, ast.FunctionDef):
                visit(function)
    return found


def test_every_line_runs_or_says_why_it_cannot(hour, traced, tmp_path, monkeypatch):
    """Statement by statement: those that no call of this file has run are marked `# GPU:
    reason`."""
    with traced:
        exercise(tmp_path, monkeypatch)
    silent = []
    for path in FILES:
        ran = {line for file, line in traced.lines if file == str(path)}
        for first, last, text in statements(path):
            if not ran & set(range(first, last + 1)) and "# GPU: " not in text:
                silent.append(f"{path.name}:{first} {text.strip().splitlines()[0]}")
    assert silent == []


def exercise(tmp_path: Path, monkeypatch) -> None:
    """What goes right in `hour` goes wrong here: mistakes, failures, limits, pages."""
    config = Config(size="toy", device="cpu", out=str(tmp_path / "out"))
    with pytest.raises(UserError):
        main(replace(config, fill="no page"))
    with pytest.raises(Wrong):
        gpu_checks.demand(False, "no")
    room = room_of(config)
    for error in (Skipped("no"), Wrong("no"), RuntimeError("first\nsecond")):
        monkeypatch.setitem(gpu.PARTS, "machine", (raising(error), 60))
        result_of("machine", room)
    main(replace(config, here=True, only=("machine",), minutes=0.0))
    main(replace(config, only=("machine",)))
    main(replace(config, here=True, only=("vae",)))
    main(replace(config, here=True, minutes=0.0))
    room.out.joinpath("parts.json").write_text("[1]")
    with pytest.raises(UserError):
        gpu.read(room)
    room.out.joinpath("parts.json").unlink()
    gpu.in_its_own_process("vae", config, room, 0.5)
    gpu.in_its_own_process("nothing", config, room, 60)
    page, report = tmp_path / "page.md", tmp_path / "report.json"
    for text, found in (
        ("no cells", REPORT),
        ("| x <!-- gpu: forward FPS --> |", REPORT),
        ("", REPORT | {"size": "toy"}),
        ("", []),
    ):
        page.write_text(text)
        report.write_text(json.dumps(found))
        try:
            main(Config(fill=str(page), report=str(report)))
        except UserError:
            pass
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for part in (gpu_checks.cuda_tests, gpu_speed.peers):
        with pytest.raises(Skipped):
            part(room)


def raising(error: Exception):
    def part(room):
        raise error

    return part


def test_results_say_what_happened(room, monkeypatch):
    """A reason, a sentence, or the error's first line; never an exception."""
    for error, status, line in (
        (Skipped("no GPU"), "skipped", "no GPU"),
        (Wrong("a is not b"), "FAILED", "a is not b"),
        (RuntimeError("out of memory\nlong story"), "FAILED", "RuntimeError: out of memory"),
        (KeyError(), "FAILED", "KeyError: "),
    ):
        monkeypatch.setitem(gpu.PARTS, "machine", (raising(error), 60))
        row = result_of("machine", room)
        assert (row["status"], row["line"]) == (status, line)


def test_a_part_may_crash_or_hang(tmp_path):
    """In a process of its own it costs its time, and the result says so; what it started is gone
    with it."""
    config = Config(size="toy", device="cpu", out=str(tmp_path))
    room = room_of(config)
    late = gpu.in_its_own_process("vae", config, room, 0.3)
    assert late["status"] == "FAILED" and late["line"].startswith("took more than 0 s; see ")
    crashed = gpu.in_its_own_process("nothing", config, room, 60)
    assert "its process ended with 2" in crashed["line"]
    assert "--only 'nothing' must be machine or" in (tmp_path / "nothing.log").read_text()
    found = gpu.in_its_own_process("vae", config, room, 120)
    assert found["status"] == "OK" and "VAE float32 FPS" in found["values"]


def test_unequal_is_found(room, monkeypatch):
    """A realisation of attention that is off by a thousandth fails its part."""
    attend = gpu_checks.attend
    monkeypatch.setattr(gpu_checks, "attend", lambda q, k, v, how: 1.001 * attend(q, k, v, how))
    row = result_of("attention", room)
    assert row["status"] == "FAILED" and "more than 1e-4" in row["line"]


def test_a_second_clip_that_compiles_is_found(room, monkeypatch):
    """More graphs at the second clip fail the part."""
    counters = torch._dynamo.utils.counters  # emptied by the part

    def clip(*_):
        counters["stats"].update(unique_graphs=1)
        return torch.ones(1)

    monkeypatch.setattr(gpu_checks, "clip", clip)
    row = result_of("compile", room)
    assert row["status"] == "FAILED" and "compiled 4 graphs more" in row["line"]


@pytest.mark.parametrize(
    "kernel, family",
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16_cudnn_conv", "convolutions"),
        ("void at::native::vectorized_layer_norm_kernel<float, float>", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDA>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("aten::addmm", "matrix products"),
        ("ncclDevKernel_AllReduce", "other"),
    ],
)
def test_kernels_have_families(kernel, family):
    assert gpu_speed.family(kernel) == family


def test_every_cuda_test_has_its_name():
    """A test that needs CUDA says so in its name, or the part that runs them would miss it."""
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            marks = getattr(node, "decorator_list", [])
            if any("not torch.cuda.is_available" in ast.unparse(mark) for mark in marks):
                assert "_on_cuda" in node.name or "_on_a_gpu" in node.name, (path.name, node.name)


# ---------------------------------------------------------------- filling the page
PAGE = (
    "| forward | 14.8 | not measured <!-- gpu: forward FPS --> |\n| not measured <!-- gpu: x --> |"
)


def filled(tmp_path: Path, page: str, report: object) -> str:
    path, source = tmp_path / "page.md", tmp_path / "report.json"
    path.write_text(page)
    source.write_text(json.dumps(report))
    main(Config(fill=str(path), report=str(source)))
    return path.read_text()


def test_a_report_fills_the_page(tmp_path, capsys):
    """Marked cells get the report's numbers, to three digits; the rest stays, and what has no
    number is said. It may be done again."""
    once = filled(tmp_path, PAGE, REPORT)
    assert once == PAGE.replace("not measured <!-- gpu: forward", "34.2 <!-- gpu: forward")
    assert "filled 1 cells" in (said := capsys.readouterr().out) and "without a number: x" in said
    again = filled(tmp_path, once, REPORT | {"values": {"forward FPS": 20.0, "x": 1}})
    assert "| 20 <!-- gpu: forward FPS -->" in again and "| 1 <!-- gpu: x -->" in again


def test_a_report_fills_all_of_docs_speed(tmp_path, capsys):
    """A made-up report with every number leaves no cell of docs/speed.md's table as it was."""
    page = (ROOT / "docs" / "speed.md").read_text()
    names = [name for _, name in gpu.CELL.findall(page)]
    numbers = {name: float(n) for n, name in enumerate(names)}
    text = filled(tmp_path, page, REPORT | {"values": numbers})
    assert "without a number: none" in capsys.readouterr().out
    cells = {name: value for value, name in gpu.CELL.findall(text)}
    assert cells == {name: f"{x:.3g}" for name, x in numbers.items()} | {"machine": "NVIDIA H200"}


@pytest.mark.parametrize(
    "page, report, message",
    [
        (PAGE, REPORT | {"size": "toy", "device": "cpu"}, "is of size toy on cpu"),
        (PAGE, {"values": {}}, "is not a report"),
        (PAGE, [1], "is not a report"),
        ("nothing here", REPORT, "has no cells"),
    ],
)
def test_no_other_report_fills_it(tmp_path, page, report, message):
    """Toy numbers do not belong in the table."""
    with pytest.raises(UserError, match=message):
        filled(tmp_path, page, report)
    assert (tmp_path / "page.md").read_text() == page


def test_full_size_is_wan():
    """What a GPU gets: the 1.3B and the 14B, 480 x 832, 1560 tokens a latent."""
    room = gpu.SIZES["full"](torch.device("cpu"), Path("out"))
    assert room.c == PRESETS["wan1.3b"] and room.teacher == PRESETS["wan14b"]
    assert room.size == (480, 832) and room.cells == (60, 104)
    assert room.c.tokens(*room.cells) == 1560


def test_mistakes_are_named():
    """A size or a part that is none."""
    for words in (["--size", "huge"], ["--only", "machine", "nothing"]):
        with pytest.raises(UserError, match=f"{words[0]} .* must be"):
            from_cli(Config, words)
