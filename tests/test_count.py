"""The counts of full size are what torch counts, and the page says what the command prints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ROOT
from torch.utils.flop_counter import FlopCounterMode

import anchors
from dit import PRESETS, DiT, DiTConfig
from lib.common import UserError
from lib.noise import noise_from
from sampler import generate
from tools import count
from train_ode import ode_loss


def test_flops_by_hand():
    """One layer of width 24 and ffn 4, 3 tokens that see 5 keys and 7 words."""
    c = DiTConfig(dim=24, num_heads=2, ffn_dim=4, num_layers=1, text_len=7)
    by_hand = 2 * 3 * 24 * (6 * 24 + 2 * 4) + 4 * 3 * (5 + 7) * 24
    assert count.pass_flops(c, 3, 5) == by_hand
    keys_and_values = 2 * 3 * 24 * 2 * 24
    assert count.clean_flops(c, 3, 5) == keys_and_values  # the only layer is the last


def counted_by_torch(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("plan", [anchors.forward(9), anchors.backward(9)], ids=lambda p: p.name)
def test_a_rollout_costs_what_torch_counts(plan):
    """All passes of a plan at Wan's widths, to what the formula leaves out (patches, times, the
    head): 2 %."""
    c = replace(PRESETS["wan1.3b"], num_layers=12)
    with torch.device("meta"), torch.no_grad():
        model = DiT(c).to(torch.bfloat16)
        text = model.text_kv(torch.empty(1, c.text_len, c.text_dim))
        noise = noise_from(torch.empty(1, 9, 16, 60, 104), torch.empty(3, 1, 9, 16, 60, 104))
        found = counted_by_torch(lambda: generate(model, plan, [text], noise))
    assert found == pytest.approx(count.plan_flops(c, plan, 1560), rel=0.02)


def test_a_masked_pass_costs_what_torch_counts():
    """Stage 1's pass over the backward plan with its anchors: every slot sees what its spans
    say."""
    c, plan = replace(PRESETS["wan1.3b"], num_layers=2), anchors.backward(9)
    lay = anchors.layout(plan)
    with torch.device("meta"), torch.no_grad():
        model = DiT(c).to(torch.bfloat16)
        states = torch.empty(1, 5, len(lay.latent), 16, 60, 104)
        levels = torch.zeros(1, len(plan.steps), dtype=torch.long)
        text = torch.empty(1, c.text_len, c.text_dim)
        found = counted_by_torch(lambda: ode_loss(model, lay, states, levels, torch.zeros(5), text))
    embedding = count.text_kv_flops(c)  # which this pass makes for itself
    assert found - embedding == pytest.approx(count.masked_flops(c, plan, 1560), rel=0.02)


def test_the_text_costs_what_torch_counts():
    """Keys and values of a prompt."""
    c = replace(PRESETS["wan1.3b"], num_layers=3)
    with torch.device("meta"), torch.no_grad():
        model, text = DiT(c), torch.empty(1, c.text_len, c.text_dim)
        assert counted_by_torch(lambda: model.text_kv(text)) == count.text_kv_flops(c)


def test_a_clip_is_decoded_latent_by_latent():
    """Three latents cost three times one; the image latent, a single frame, a third of one."""
    assert count.vae_flops(3) == 3 * count.vae_flops(1)
    assert 0.2 < count.vae_flops(1, first=True) / count.vae_flops(1) < 0.4


def between(page: str, name: str) -> str:
    """What a page has between its marks."""
    return page.split(f"<!-- {name} -->\n")[1].split("\n<!-- end -->")[0]


def test_the_page_says_what_is_counted():
    """docs/counting.md has the tables of the command, to the letter."""
    page = (ROOT / "docs" / "counting.md").read_text()
    assert between(page, "python -m tools.count") == count.counted()


def test_put(tmp_path: Path):
    """Only what stands between the marks is replaced; a page without them is refused."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\n<!-- end -->\nafter\n<!-- end -->\n")
    count.put(str(page), "a", "old")
    count.put(str(page), "a", "new\nlines")
    expected = "before\n<!-- a -->\nnew\nlines\n<!-- end -->\nafter\n<!-- end -->\n"
    assert page.read_text() == expected
    with pytest.raises(UserError, match="has no lines <!-- b -->"):
        count.put(str(page), "b", "new")
