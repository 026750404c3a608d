"""The plan's FLOP formulas equal torch's FlopCounterMode over the real modules, at real size, on the meta device.

Nothing is allocated or computed. On the meta device, attention decomposes into four matrix products in the backward pass;
the fused kernels of a run recompute the weights, so the plan counts five. Packed attention and the embedding of gene
sentences are custom operators with data-dependent shapes; they are replaced by stubs here and tested in test_plan_step.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from comtip_fast.config.io import load_config
from comtip_fast.genes.tokens import GeneTokens
from comtip_fast.models import CoMTIP
from comtip_fast.models import gene_encoder as gene_encoder_module
from comtip_fast.plan.cost import AUTOCAST, Cost, total
from comtip_fast.plan.parts import distinct_tokens, generator, image_head, sentence_table, vision
from comtip_fast.plan.rank_share import RankShare
from comtip_fast.plan.sizes import Inputs, Sizes, build_on_meta, sizes_of

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = ["demo_cpu.yaml", "8xh100.yaml"]
TILES, GENES, TOKENS = 3, 5, 7
META = torch.device("meta")


def count(outputs: Callable[[], list[Tensor]], *, attends: bool = True) -> tuple[int, int]:
    """Return the FLOPs of a forward and of a backward pass; if it ``attends``, with the recomputation of attention weights."""
    with FlopCounterMode(display=False) as forward:
        out = outputs()
    with FlopCounterMode(display=False) as backward:
        torch.stack([o.float().sum() for o in out]).sum().backward()
    attention = forward.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0) if attends else 0
    return forward.get_total_flops(), backward.get_total_flops() + attention // 2


def predicted(costs: list[Cost]) -> tuple[float, float]:
    return total(costs, "flops"), total(costs, "back_flops")


@pytest.fixture(scope="module", params=RECIPES)
def planned(request: pytest.FixtureRequest) -> tuple[CoMTIP, Sizes, RankShare]:
    config = load_config(CONFIGS / request.param, [])
    model = build_on_meta(config, 224, 100)
    sizes = sizes_of(config, Inputs(trained_genes=100, panel=GENES, sentence_tokens=TOKENS), model)
    share = RankShare(
        spots=TILES, images=TILES, columns=TILES, table_rows=GENES * sizes.Q, precision=AUTOCAST, gpu=True
    )
    return model, sizes, share


def test_image_side(planned: tuple[CoMTIP, Sizes, RankShare]):
    model, s, share = planned
    shape = (s.patch_inputs,) if s.has_stem else (3, model.vision.patch_px, model.vision.patch_px)
    features = torch.empty(TILES, s.P, *shape, device=META)
    visible, hidden = (torch.empty(TILES, n, dtype=torch.long, device=META) for n in (s.V, s.hidden_patches))
    full = count(lambda: [model.encode_image(features).vector_BD])
    assert full == predicted([*vision(s, share, s.P, masked=False), *image_head(s, share)])
    masked = count(lambda: [model.vision(features, visible).patches_BVd])
    assert masked == predicted(vision(replace(s, one_pass=False), share, s.V, masked=True))
    both = count(lambda: [tokens.patches_BVd for tokens in model.vision.encode_both(features, visible)])
    assert both == predicted([*vision(s, share, s.P, masked=False), *vision(s, share, s.V, masked=True)])
    seen = torch.empty(TILES, s.V, s.d, device=META, requires_grad=True)
    assert count(lambda: [model.generator(seen, hidden)]) == predicted(generator(s, share))


def test_sentence_table_without_attention(planned: tuple[CoMTIP, Sizes, RankShare], monkeypatch: pytest.MonkeyPatch):
    model, s, share = planned
    distinct, tokens = round(distinct_tokens(s, share)), GENES * s.Q * TOKENS
    rows = torch.empty(distinct, s.width, device=META, requires_grad=True)
    plan = SimpleNamespace(row_S=torch.empty(tokens, device=META))
    monkeypatch.setattr(gene_encoder_module, "plan_sentences", lambda *_a, **_k: plan)
    monkeypatch.setattr(gene_encoder_module, "gene_sentence_embedding", lambda *_a, **_k: rows * 1)
    monkeypatch.setattr(gene_encoder_module, "copy_sentence_rows", lambda x, _: x.mean(0).expand(tokens, -1))
    monkeypatch.setattr(gene_encoder_module, "packed_attention_qkv", lambda qkv, *_a, **_k: qkv.sum(1))
    monkeypatch.setattr(gene_encoder_module, "one_query_attention", lambda query, x, **_k: query + x.sum(0))
    ids = torch.empty(GENES, TOKENS, dtype=torch.long, device=META)
    length, identity = (torch.empty(GENES, dtype=torch.long, device=META) for _ in range(2))
    table = sentence_table(s, share)
    without_attention = [c for c in table if c.name not in ("attention", "one query")]
    assert len(table) - len(without_attention) == s.text_depth
    counted = count(lambda: list(model.sentence_table(GeneTokens(ids, length, identity))), attends=False)
    assert counted == pytest.approx(predicted(without_attention), rel=1e-12)
