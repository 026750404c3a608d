"""The rehearsal's recorder catches what it is there to catch: waits, uploads, wrong dtypes, and unknown kernel variants."""

import ast
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel is not launched through the JIT", allow_module_level=True)

from comtip_kernels import infonce, pair_scores, plan_sentences
from comtip_kernels.infonce import triton_kernels as kernels
from comtip_kernels.ledger.aot import LedgerRow, compile_entry
from comtip_kernels.ledger.entries import entries
from comtip_kernels.tl_common import launch
from triton.compiler.errors import CompilationError

from comtip_fast.data.batch import Batch
from comtip_fast.data.upload import upload
from comtip_fast.training.task import CoMTIPTask
from testkit.rehearsal import autocast
from testkit.rehearsal.__main__ import NOT_ABOVE, TABLE, better, steps_that_wait, worse
from testkit.rehearsal.costs import by_kind, count_saved
from testkit.rehearsal.cuda_runtime import stand_in_cuda
from testkit.rehearsal.grid import INFERENCE, MOST_SPOTS, walks
from testkit.rehearsal.inference import infer
from testkit.rehearsal.launches import recorded_launches
from testkit.rehearsal.record import ROOT, Record, RehearsalError
from testkit.rehearsal.stand_in import CUDA, StandInMode
from testkit.rehearsal.table import missing_rows, read_table, slow_products, summary, table
from testkit.rehearsal.walk import Walk, group_of, train


@pytest.fixture
def mode() -> Iterator[StandInMode]:
    with stand_in_cuda(Record()) as mode, recorded_launches(mode):
        yield mode


def test_forward_backward_and_optimizer_run_under_autocast(mode: StandInMode):
    with torch.device("cuda"):
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(net.parameters())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = net(torch.empty(3, 8, device="cuda"))
        assert (y.dtype, y.device) == (torch.bfloat16, CUDA)
        loss = F.normalize(y, dim=-1).sum()
    assert loss.dtype == torch.float32  # norms are in fp32 under autocast
    loss.backward()
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    optimizer.step()
    assert not mode.record.waits
    assert mode.record.operators["aten::addmm"] == 2
    assert mode.record.operators["aten::_foreach_addcdiv_"] == 1  # one for all parameters


def test_a_planted_item_is_a_wait_at_its_line(mode: StandInMode):
    x = torch.empty(4, device="cuda")
    assert not mode.record.waits
    x.sum().item()
    x.nonzero()
    x[x > 0]
    torch.cuda.synchronize()
    x.cpu()
    waits: Counter[str] = Counter()
    for (what, _), n in mode.record.waits.items():
        waits[what] += n
    assert waits == {
        "a number is read": 1,
        "shape of aten::nonzero": 2,
        "torch.cuda.synchronize": 1,
        "copy to the host": 1,
    }
    assert all("test_rehearsal.py" in where for _, where in mode.record.waits)


def test_a_planted_upload_is_counted_with_its_bytes(mode: StandInMode):
    torch.zeros(1000).to("cuda")
    torch.zeros(10).pin_memory().to("cuda", non_blocking=True)
    torch.tensor([1, 2], device="cuda")
    found = [(u.bytes, u.pinned, u.blocking) for u in mode.record.uploads]
    assert found == [(4000, False, True), (40, True, False), (16, False, True)]
    assert mode.record.waits.total() == 2


def test_integers_keep_their_values(mode: StandInMode):
    ids = torch.tensor([[1, 5, 2], [1, 5, 0]]).to("cuda")
    plan = plan_sentences(ids, torch.tensor([3, 2]).to("cuda"), torch.tensor([0, 1]).to("cuda"))
    assert (plan.row_S.shape[0], plan.genes, plan.names) == (5, 1, 1)


def test_mixed_devices_are_refused(mode: StandInMode):
    with pytest.raises(RehearsalError, match="on the CPU"):
        torch.empty(3, device="cuda") + torch.zeros(3)
    assert (torch.empty(3, device="cuda") * torch.tensor(2.0)).shape == (3,)  # a CPU scalar is an argument


def lse(mode: StandInMode, x: torch.Tensor, y: torch.Tensor) -> None:
    infonce(x, y, torch.tensor(1.0, device="cuda"), impl="triton")


def copy(*tensors: torch.Tensor, guard: bool = True) -> None:
    from comtip_kernels.gene_sentence_embedding import triton_kernels as embedding

    options = {"BD": 16} | embedding.COPY
    if guard:
        launch(embedding.copy_rows, (1,), *tensors, 4, 16, **options)
    else:
        embedding.copy_rows[(1,)](*tensors, 4, 16, **options)


def test_launches_on_other_devices_are_refused(mode: StandInMode):
    rows, ids = torch.empty(4, 16, device="cuda"), torch.empty(4, device="cuda", dtype=torch.int32)
    copy(rows, ids, rows)
    assert [(launch.grid, launch.tensors[0][1]) for launch in mode.record.launches] == [((1,), (4, 16))]
    with pytest.raises(RehearsalError, match="is on the cpu"):
        copy(rows, torch.zeros(4, dtype=torch.int32), rows)
    with pytest.raises(RehearsalError, match="without a device guard"):
        copy(rows, ids, rows, guard=False)
    mode.current.index = 1
    with pytest.raises(RehearsalError, match="cuda:0, but the current device is cuda:1"):
        copy(rows, ids, rows, guard=False)


def test_a_variant_that_the_ledger_lacks_is_reported(mode: StandInMode):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        lse(mode, torch.empty(64, 512, device="cuda"), torch.empty(96, 512, device="cuda"))
    walked = summary(Walk("test"), mode.record)
    names = {v["signature"]: (v["op"], v["name"]) for v in walked.variants}
    good = LedgerRow("infonce", "x", 90, 100, 0, 0, 1, "HGMMA", 8, 8, 8)
    rows = {(*name, arch): good for name in names.values() for arch in (80, 90, 100)}
    assert missing_rows([walked], rows, names) == []
    assert [p.split(": ")[1] for p in missing_rows([walked], rows, {})] == ["not in the ledger"] * len(names)
    assert "no row of sm_90" in missing_rows([walked], {k: v for k, v in rows.items() if k[2] != 90}, names)[0]
    spilled = {k: replace(v, spills=2) for k, v in rows.items()}
    assert all("spills on sm_90" in p for p in missing_rows([walked], spilled, names))
    assert table([walked], rows, names)[0]["hgmma_share"] == "1.000"
    on_hmma = {k: replace(v, mma="HMMA") for k, v in rows.items()}
    assert table([walked], on_hmma, names)[0]["hgmma_share"] == "0.000"
    assert slow_products([walked], rows, names) == []
    assert all("runs as HMMA on sm_90" in p for p in slow_products([walked], on_hmma, names))
    assert len(slow_products([walked], on_hmma, names)) == len(names)
    assert slow_products([replace(walked, walk=Walk("test", part="predict"))], on_hmma, names) == []
    assert slow_products([replace(walked, walk=Walk("test", part="validation"))], on_hmma, names)


def test_losses_in_fp32_are_reported(mode: StandInMode):
    lse(mode, torch.empty(64, 512, device="cuda"), torch.empty(96, 512, device="cuda"))
    walked = summary(Walk("test"), mode.record)
    told = slow_products([walked], {}, {})
    assert told
    assert all("multiplies *fp32, not bf16" in p for p in told)


def test_rows_at_odd_addresses_are_reported(mode: StandInMode):
    """As those of a table gathered together with a column of scores."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        context = torch.empty(64, 512, device="cuda", dtype=torch.bfloat16)
        rows = torch.empty(128, 32, 513, device="cuda", dtype=torch.bfloat16)
        levels = torch.zeros(64, 128, device="cuda", dtype=torch.int64)
        pair_scores(context, rows[..., :512], levels)
    told = slow_products([summary(Walk("test"), mode.record)], {}, {})
    assert len(told) == 1
    assert "table/sampled_dot: not a multiple of 16: t_stride_level; make the operand contiguous" in told[0]


def test_every_config_is_in_the_ledger_and_none_spills():
    rows = [r for r in read_table(TABLE) if float(r["gflop_own"])]
    assert "demo_cpu" in {r["config"] for r in rows}
    for row in rows:
        assert row["spills"] == "0", row
        assert 0 <= float(row["hgmma_share"]) <= 1, row


def test_two_dtypes_in_one_product_do_not_compile(mode: StandInMode):
    forward = next(e for e in entries() if e.name == "forward_bf16")
    mixed = replace(forward, types={**forward.types, "k_ptr": "*fp32"})
    assert mixed.signature not in {e.signature for e in entries()}
    with pytest.raises(CompilationError) as caught:
        compile_entry(mixed, 90)
    assert "same dtype" in f"{caught.value.__cause__} {caught.value.__cause__.__cause__}"


def test_a_variant_is_what_the_ledger_calls_it(mode: StandInMode):
    """The recorded launch of the whole loss is the ledger's entry, so that its machine code has been looked at."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        x = torch.empty(64, 512, device="cuda", requires_grad=True)
        ids = torch.zeros(64, dtype=torch.int64, device="cuda")
        scale = torch.tensor(1.0, device="cuda")
        options = {"negatives": "same_group", "group_rows": ids, "group_columns": ids}
        options |= {"class_rows": ids, "class_columns": ids, "weight_B": torch.ones(64, device="cuda")}
        infonce(x, torch.empty(64, 512, device="cuda"), scale, **options).backward()
    known = {e.signature: e.name for e in entries()}
    found = {known.get(launch.signature) for launch in mode.record.launches}
    assert found == {"forward_bf16", "exact_bf16", "gradient_bf16"}
    assert {launch.entry.constants["RULE"] for launch in mode.record.launches} == {kernels.SAME_GROUP}


def test_both_rounds_of_sums_over_equal_tokens_are_the_ledgers(mode: StandInMode):
    """With int64 targets the first round was another variant, which spilled on sm_90."""
    with torch.device("cuda"):
        grad, order = torch.empty(5000, 512), torch.zeros(5000, dtype=torch.int32)
    start = torch.tensor([0, 4000, 5000], dtype=torch.int32).to("cuda")
    torch.ops.comtip.sum_equal_tokens(grad, order, start, 4000)
    known = {e.signature for e in entries()}
    assert [launch.entry.constants["ORDERED"] for launch in mode.record.launches] == [True, False]
    assert {launch.entry.types["target_ptr"] for launch in mode.record.launches} == {"*i32"}
    assert {launch.signature for launch in mode.record.launches} <= known


def lists_of_pytorch() -> dict[str, set[str]]:
    """Return the operators of each list of PyTorch's own autocast tests, which cannot be imported without their packages."""
    path = Path(torch.__file__).parent / "testing/_internal/autocast_test_lists.py"
    out: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "AutocastTestLists":
            for found in (n for n in ast.walk(node) if isinstance(n, ast.Assign) and isinstance(n.value, ast.List)):
                tuples = [
                    t for t in found.value.elts if isinstance(t, ast.Tuple) and isinstance(t.elts[0], ast.Constant)
                ]
                out[ast.unparse(found.targets[0]).removeprefix("self.")] = {str(t.elts[0].value) for t in tuples}
    return out


def test_autocast_follows_pytorchs_lists():
    lists = lists_of_pytorch()
    lower = {n.partition(".")[0] for n in autocast.LOWER}
    fp32 = {n.partition(".")[0] for n in [*autocast.FP32, *autocast.FP32_RESULT]}
    unused = ("conv_transpose", "conv_tbc", "cudnn_", "rnn_", "lstm", "gru", "_thnn")
    assert len(lists["torch_fp16"]) > 15
    assert {n for n in lists["torch_fp16"] if not any(u in n for u in unused)} <= lower
    assert len(lists["torch_fp32"]) > 20
    assert lists["torch_fp32"] - {"renorm", "nuclear_norm", "frobenius_norm"} <= fp32
    assert lists["torch_need_autocast_promote"] <= set(autocast.WIDEST)


SMALL = ("data.batch_size=16", "panel.max_genes=16", "genes.per_cohort=16", "text.depth=1")


def test_a_step_of_a_gpu_config_runs_the_ledgers_bf16_kernels():
    record = train(Walk("1gpu", 1, (*SMALL, "text.depth=2")))  # attention for all tokens, and with one query
    known = {e.signature for e in entries()}
    assert not {launch.entry.name for launch in record.launches if launch.signature not in known}
    between = {launch.entry.kernel.__name__ for launch in record.launches if launch.entry.op == "pointwise"}
    assert between == {"residual_norm", "residual_norm_grads", "bias_gelu", "bias_gelu_grads"}
    products = [launch for launch in record.launches if launch.entry.op not in ("embedding", "pointwise")]
    assert {launch.entry.op for launch in products} == {"infonce", "table", "attention", "one_query"}
    assert {launch.tensors[0][0] for launch in products} == {"bfloat16"}  # the first tensor of each is an operand
    assert record.operators["aten::_foreach_addcdiv_"] or record.operators["aten::_fused_adamw_"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ("engine.micro_batches=2", "engine.activation_checkpointing=true")),
        (4, ("engine.loss_form=ring",)),
        (4, ("engine.kind=deepspeed", "engine.zero_stage=1")),
    ],
)
def test_steps_over_ranks_and_in_pieces_launch_what_the_ledger_has(ranks: int, options: tuple[str, ...]):
    record = train(Walk("1gpu", ranks, (*SMALL, *options)))
    known = {e.signature for e in entries()}
    assert not {launch.entry.name for launch in record.launches if launch.signature not in known}
    assert ranks == 1 or record.collectives["c10d::allreduce_"]
    assert bool(record.collectives["c10d::send"]) == ("engine.loss_form=ring" in options)


def test_a_planted_wait_in_a_step_is_found(monkeypatch: pytest.MonkeyPatch):
    before = train(Walk("1gpu", 1, SMALL))
    loss = CoMTIPTask.losses

    def waiting(self: CoMTIPTask, module: torch.nn.Module, batch: Batch) -> object:
        batch.levels.float().mean().item()
        torch.ones(5).to(self.device)
        return loss(self, module, batch)

    monkeypatch.setattr(CoMTIPTask, "losses", waiting)
    after = train(Walk("1gpu", 1, SMALL))
    assert after.waits.total() == before.waits.total() + 2
    assert [u.bytes for u in after.uploads if u not in before.uploads] == [20]


def test_a_count_that_grew_is_reported():
    row = {"config": "1gpu", "ranks": "1", "walk": "step", "hgmma_share": "0.900"} | dict.fromkeys(NOT_ABOVE, "5")
    assert worse([row], [row]) == []
    assert worse([row | {"waits": "4"}], [row]) == []
    assert worse([row | {"waits": "6"}], [row]) == ["1gpu, ranks 1, step: waits is 6, the table has 5"]
    assert "hgmma_share is 0.800" in worse([row | {"hgmma_share": "0.800"}], [row])[0]
    assert "hgmma_share is -, the table has 0.900" in worse([row | {"hgmma_share": "-"}], [row])[0]
    assert worse([row], [row | {"hgmma_share": "-"}]) == []  # a walk that had no products of this package
    assert "not in rehearsal.csv" in worse([row], [])[0]
    assert worse([], [row | {"walk": "step micro_batches=3"}]) == [
        "1gpu, ranks 1, step micro_batches=3: only in rehearsal.csv, CI does not walk it; run python -m testkit.rehearsal"
    ]


def test_a_count_that_fell_passes_and_is_reported():
    row = {"config": "1gpu", "ranks": "1", "walk": "step", "hgmma_share": "0.900"} | dict.fromkeys(NOT_ABOVE, "5")
    lower = row | {"saved_mb": "4.5"}
    assert worse([lower], [row]) == []
    assert better([lower], [row]) == ["1gpu, ranks 1, step: saved_mb is 4.5, the table has 5"]
    assert better([row], [row]) == better([row], []) == []


@pytest.mark.parametrize("column", ["gflop", "saved_mb", "moved_gb", "all_reduce", "all_gather_mb", "send_mb"])
def test_every_cost_is_gated(column: str):
    row = {"config": "1gpu", "ranks": "1", "walk": "step", "hgmma_share": "-"} | dict.fromkeys(NOT_ABOVE, "5")
    assert worse([row | {column: "5.1"}], [row]) == [f"1gpu, ranks 1, step: {column} is 5.1, the table has 5"]


def test_flops_bytes_and_saved_tensors_of_operators_are_counted(mode: StandInMode):
    record = mode.record
    x, w = torch.empty(8, 32, device="cuda"), torch.empty(32, 16, device="cuda", requires_grad=True)
    with count_saved(record):
        y = x @ w
        assert record.flops == 2 * 8 * 32 * 16
        assert record.moved_bytes == 4 * (8 * 32 + 32 * 16 + 8 * 16)
        assert record.saved_bytes == 4 * 8 * 32  # x; w is a parameter, whose memory exists anyway
        z = y.exp()
        assert record.saved_bytes == 4 * (8 * 32 + 8 * 16)  # and the result of exp
        again = y.exp()
        assert record.saved_bytes == 4 * (8 * 32 + 2 * 8 * 16)  # computed twice, kept twice
        (z + again).sum().backward()
        assert record.flops == 2 * 2 * 8 * 32 * 16
        (x @ w).exp()
        assert record.saved_bytes == 4 * (8 * 32 + 2 * 8 * 16)  # the backward pass has released the first ones
    one = x.new_empty(1, 32)
    moved = record.moved_bytes
    one.expand(1000, 32).clone()
    assert record.moved_bytes - moved == 4 * (32 + 32000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_over_ranks_in_bf16_is_refused(mode: StandInMode, dtype: torch.dtype):
    x = torch.empty(6, 4, dtype=dtype, device=CUDA)
    with group_of(2) as group:
        group.gather_rows(x, [6, 6])  # transfers only
        for reduce in (group.sum, lambda x: group.scatter_rows(x, [3, 3])):
            refused = pytest.raises(RehearsalError, match=r"sums torch\.bfloat16 over ranks; convert")
            with refused if dtype == torch.bfloat16 else nullcontext():
                reduce(x)


def test_collectives_are_counted_by_kind():
    n = Counter(
        {"c10d::allreduce_": 2, "ddp::all_reduce": 1, "c10d::_allgather_base_": 3, "c10d::send": 1, "c10d::recv_": 1}
    )
    sent = Counter({"c10d::allreduce_": 1_000_000, "ddp::all_reduce": 2_000_000, "c10d::send": 500_000})
    found = by_kind(n, sent)
    assert (found["all_reduce"], found["all_reduce_mb"]) == ("3", "3.00")
    assert (found["all_gather"], found["send"], found["send_mb"]) == ("3", "1", "0.50")
    assert found["other"] == found["reduce_scatter"] == "0"
    assert by_kind(Counter({"c10d::alltoall_": 1}), Counter())["other"] == "1"


def test_every_config_is_walked_and_has_its_rows():
    chosen = walks()
    assert {w.config for w in chosen} == {p.stem for p in (ROOT / "configs").glob("*.yaml")}
    committed = {(r["config"], int(r["ranks"]), r["walk"]) for r in read_table(TABLE)}
    assert committed == {(w.config, w.ranks, w.name) for w in chosen}
    assert set(chosen) <= set(walks(everything=True))


@pytest.mark.parametrize("config", sorted(p.stem for p in (ROOT / "configs").glob("*.yaml")))
def test_the_grid_has_every_combination_for_every_config(config: str):
    """One process, DDP over 2 ranks and ZeRO, both loss forms, micro-batches 1 and 4, checkpointing on and off; inference."""
    found, engines = set(), {(1, "single"), (2, "ddp"), ("any", "deepspeed 1"), ("any", "deepspeed 3")}
    for walk in (w for w in walks(everything=True) if w.config == config and w.part == "step"):
        loaded = walk.load()
        e = loaded.engine
        assert -(-loaded.data.batch_size // walk.ranks) <= MOST_SPOTS
        if e.panel_sizes:
            continue
        kind = f"deepspeed {e.zero_stage}" if e.kind == "deepspeed" else e.kind
        assert kind == "single" or walk.ranks > 1 or e.kind == "auto"
        ranks = walk.ranks if (walk.ranks, kind) in engines else "any"
        found.add((ranks, kind, e.loss_form, e.micro_batches, e.activation_checkpointing))
    for ranks, kind in engines:
        forms = ("gather",) if ranks == 1 else ("gather", "ring")
        combinations = {(ranks, kind, form, n, again) for form in forms for n in (1, 4) for again in (False, True)}
        assert combinations <= found, combinations - found
    parts = {w.part for w in walks(everything=True) if w.config == config}
    assert parts >= {"validation", "predict", "embed", "evaluate", "evaluate tasks"} == set(INFERENCE)


def test_no_walk_of_the_grid_is_listed_twice():
    every = walks(everything=True)
    assert len({(w.config, w.ranks, w.name) for w in every}) == len(every)


def test_a_step_of_the_grid_that_waits_is_reported():
    row = {"config": "1gpu", "ranks": "2", "walk": "step kind=ddp", "waits": "0", "data_shapes": "0", "uploads": "1"}
    row["pageable_mb"] = "0.0"
    assert steps_that_wait([row]) == []
    assert steps_that_wait([row | {"waits": "1"}]) == ["1gpu, ranks 2, step kind=ddp: waits is 1, a step must have 0"]
    assert len(steps_that_wait([row | {"uploads": "2", "pageable_mb": "1.0"}])) == 2
    assert steps_that_wait([row | {"walk": "predict", "waits": "6"}]) == []
    assert steps_that_wait([row | {"walk": "logged step", "waits": "24"}]) == []


def test_a_step_that_logs_nothing_waits_for_nothing_and_uploads_the_batch_once():
    """The committed table is compared with the walks by ``make rehearsal``; here, with what it must show."""
    steps = [r for r in read_table(TABLE) if r["walk"].split()[0] == "step"]
    assert {r["config"] for r in steps} == {p.stem for p in (ROOT / "configs").glob("*.yaml")}
    for row in steps:
        assert [row[k] for k in ("waits", "data_shapes", "uploads", "pageable_mb")] == ["0", "0", "1", "0.0"], row
    walked = train(Walk("1gpu", 1, SMALL))
    assert not walked.waits, walked.waits
    assert [(u.pinned, u.blocking) for u in walked.uploads] == [(True, False)]


def test_the_table_before_and_after_states_todays_counts():
    """docs/performance.md has the first and the present count of every step in one table."""
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    section = text.partition("## Before and after")[2].partition("\n## ")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    columns = [
        "operators",
        "launches",
        "variants",
        "waits",
        "uploads",
        "uploads_mb",
        "pageable_mb",
        "hgmma_share",
        "spills",
    ]
    found = {}
    for config, ranks, options, *cells in rows[1:]:
        walk = "step" if options == "-" else f"step {options}"
        now = [cell.split(", ")[1].replace(",", "") for cell in cells]
        found[config, ranks, walk] = dict(zip(columns, now, strict=True))
    steps = [r for r in read_table(TABLE) if r["walk"].split()[0] == "step" and "panel_sizes" not in r["walk"]]
    assert found == {(r["config"], r["ranks"], r["walk"]): {c: r[c] for c in columns} for r in steps}


def test_inference_copies_from_pinned_memory_and_reads_little():
    """The committed table is compared with the walks by ``make rehearsal``; here, with what it must show."""
    rows = {r["walk"]: r for r in read_table(TABLE) if r["walk"].split()[0] in ("predict", "embed", "evaluate")}
    assert rows.keys() == {"predict", "embed", "evaluate", "evaluate tasks"}
    for row in rows.values():
        assert (row["data_shapes"], row["pageable_mb"]) == ("0", "0.0"), row
    # One copy to the host per chunk of tiles (4), and one per chunk of genes (2).
    assert int(rows["embed"]["waits"]) == 4
    assert int(rows["predict"]["waits"]) == 6


def test_validation_with_a_frozen_stem_uploads_from_pinned_memory():
    record = infer(Walk("demo_cpu", part="validation"))
    assert max(u.bytes for u in record.uploads) > 10_000_000  # tiles, for the stem
    assert all(u.pinned and not u.blocking for u in record.uploads), record.uploads


def test_an_upload_comes_from_pinned_memory(mode: StandInMode):
    upload(torch.zeros(10), CUDA)
    upload(torch.empty(10, device="cuda"), CUDA)  # there already
    assert [(u.bytes, u.pinned, u.blocking) for u in mode.record.uploads] == [(40, True, False)]
    assert not mode.record.waits
