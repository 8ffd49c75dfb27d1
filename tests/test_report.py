"""The report in a browser: videos decode and play, nothing is logged, the A/B test counts and
exports. Needs Chromium."""

import json
import shutil
import time

import pytest
import torch
from tiny import WORDED, command_line, tiny_dit

from dit import save_dit
from lib import report
from lib.media import VideoWriter
from tools import report as page
from toy import world
from vae import VAE, VAEConfig, save_vae

selenium = pytest.importorskip("selenium.webdriver")
needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs chromium and chromedriver",
)
PLAYS = (
    "const v = document.querySelector(arguments[0]); v.scrollIntoView(); "
    "return [v.readyState, v.videoWidth, v.currentTime]"
)


@pytest.fixture
def clips(tmp_path):
    """Four short clips in a folder."""
    for n, video in enumerate(
        world.render(world.random_captions(4, torch.Generator().manual_seed(0)), range(4), 32, 17)
    ):
        with VideoWriter(tmp_path / f"{n}.mp4") as writer:
            writer.write(video)
    return tmp_path


@pytest.fixture
def browser(tmp_path):
    options = selenium.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(
        options=options, service=selenium.ChromeService(shutil.which("chromedriver"))
    )
    yield driver
    driver.quit()


def wait(condition, seconds=20):
    """The condition's value once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)
    return value


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_clips_play_and_nothing_overflows(width, clips, browser):
    """On a phone and a laptop: each video decodes at its size and moves on; only wide tables
    scroll; the console is silent."""
    rows = {"forward": {f"column {n}": 1.0 for n in range(12)}}
    report.write_page(
        clips / "index.html",
        "A <title>",
        [
            (
                "Clips",
                report.clips([(f"clip {n}", f"{n}.mp4", "", "“words” & more") for n in range(4)]),
            ),
            (
                "Numbers",
                report.table(rows)
                + report.timeline({"forward": [1.0, 1.2, float("nan"), 0.9]}, [2]),
            ),
        ],
    )
    browser.set_window_size(width, 900)
    browser.get(f"file://{clips / 'index.html'}")
    wait(lambda: browser.execute_script(PLAYS, "figure:nth-child(4) video")[2] > 0)
    assert browser.execute_script(PLAYS, "figure:nth-child(4) video")[1] == 32
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= window.innerWidth"
    )
    assert (
        browser.title == "A <title>"
        and "“words” & more" in browser.find_element("css selector", "figcaption").text
    )
    assert browser.get_log("browser") == []


@needs_chromium
def test_choices_are_counted_and_exported(clips, browser):
    """A viewer who always picks the clip named a: preference 1; the FR agrees with one of the two
    picks. The file says so too."""
    pairs = [
        {"a": "0.mp4", "b": "1.mp4", "fr_a": 1.0, "fr_b": 1.4},
        {"a": "2.mp4", "b": "3.mp4", "fr_a": 1.3, "fr_b": 1.1},
    ]
    report.write_ab(clips / "ab.html", ("with", "without"), pairs)
    browser.get(f"file://{clips / 'ab.html'}")
    for n in range(2):
        wait(lambda n=n: f"pair {n + 1} of 2" in browser.find_element("id", "say").text)
        side = next(
            s
            for s in ("left", "right")
            if browser.find_element("id", s).get_attribute("src")[-5] in "02"
        )
        wait(lambda side=side: browser.execute_script(PLAYS, f"#{side}")[0] >= 2)
        browser.find_element("id", side).click()
    assert (
        "with: preferred in 100 %; agreement with FR 50 % of 2 pairs"
        in browser.find_element("id", "say").text
    )
    browser.find_element("id", "save").click()
    wait((clips / "choices.json").exists)
    found = json.loads((clips / "choices.json").read_text())
    assert (
        found["preference_a"] == 1
        and found["agreement_with_fr"] == 0.5
        and found["names"] == ["with", "without"]
    )
    assert sorted(c["pair"] for c in found["choices"]) == [0, 1] and {
        c["chosen"] for c in found["choices"]
    } == {"a"}
    assert browser.get_log("browser") == []


def test_words_are_escaped(tmp_path):
    """Captions and names are text, never markup; data never closes the script that holds it."""
    report.write_ab(
        tmp_path / "ab.html",
        ("</script><b>", "x"),
        [{"a": "</script>", "b": "b", "fr_a": 1.0, "fr_b": 1.0}],
    )
    report.write_page(
        tmp_path / "index.html",
        "<i>",
        [("<u>", report.paragraph("`<s>` <q>") + report.table({"<p>": {"<a>": "<em>"}}))],
    )
    assert (tmp_path / "ab.html").read_text().count("</script>") == 1
    page = (tmp_path / "index.html").read_text()
    assert (
        not any(tag in page for tag in ("<i>", "<u>", "<s>", "<q>", "<a>", "<em>"))
        and "<code>&lt;s&gt;</code>" in page
    )


def test_markdown_and_table_hold_every_cell():
    rows = {"one": {"x": 1, "y": 2}, "two": {"y": 3, "z": 4}}
    assert report.markdown(rows).splitlines() == [
        "| | x | y | z |",
        "|---|---|---|---|",
        "| one | 1 | 2 |  |",
        "| two |  | 3 | 4 |",
    ]
    assert report.table(rows).count("<td>") == 6


# ---------------------------------------------------------------- a student's page
@pytest.mark.parametrize("without", [True, False])
def test_student_is_shown(without, tmp_path, monkeypatch, capsys):
    """Every clip, plan and pair that the pages name is there; the A/B test is with against without
    anchors if it can be, and says what it compares."""
    folder, out = tmp_path / "weights", tmp_path / "r"
    save_dit(tiny_dit(1, **WORDED), folder / "student.safetensors")
    torch.manual_seed(0)
    save_vae(VAE(VAEConfig(dim=4, z_dim=2, num_res_blocks=1)), folder / "vae.safetensors")
    if without:
        save_dit(tiny_dit(5, **WORDED), tmp_path / "exp1-0" / "student.safetensors")
    flags = {"weights": folder, "clips": 2, "out": out, "runs": tmp_path}
    assert command_line(monkeypatch, capsys, page, **flags) == (0, "")
    index, ab = ((out / name).read_text() for name in ("index.html", "ab.html"))
    data = ab.split("const pairs=")[1]
    pairs, names = json.loads(data.split(", names=")[0]), data.split(", names=")[1].split(";")[0]
    named = {part.split("'")[0] for part in index.split("src='")[1:]}
    named |= {pair[side] for pair in pairs for side in "ab"}
    assert len(pairs) == 2 and len(named) >= 14 and all((out / x).stat().st_size for x in named)
    other = "backward, P = 0" if without else "backward, anchors as output"
    assert json.loads(names) == ["backward", other]
    assert ("as in the paper&#x27;s Table 9" in index) == without
    assert ("toy.students --students exp1" in index) != without
    assert ("backward-P-0.mp4" in named) == without


def test_json_holds_the_numbers(tmp_path):
    from lib.statistics import Stat

    rows = {"one": {"paper": "1.1", "x": Stat(1.0, 0.5, 3)}}
    report.write_json(rows, str(tmp_path / "t.json"))
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["one"]["paper"] == "1.1" and found["one"]["x"]["se"] == 0.5
