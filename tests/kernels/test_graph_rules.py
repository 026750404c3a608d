"""The rules of CUDA graphs find what they are there to find: each of them is broken once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel is not launched through the JIT", allow_module_level=True)

from comtip_kernels.gene_sentence_embedding import triton_kernels as embedding
from comtip_kernels.tl_common import launch

from comtip_fast.config.io import load_config
from comtip_fast.config.optim import SpikeConfig
from comtip_fast.training.update.spikes import NormHistory
from testkit.rehearsal.__main__ import GRAPH_RULES
from testkit.rehearsal.cuda_runtime import stand_in_cuda
from testkit.rehearsal.graphs import RULES, GraphRules, changed_rules, read_rules, write_rules
from testkit.rehearsal.grid import walks
from testkit.rehearsal.launches import recorded_launches
from testkit.rehearsal.record import ROOT, Record
from testkit.rehearsal.stand_in import CUDA
from testkit.synthetic_panels import same_sizes, shapes_of, tokens_of

Step = Callable[[int, torch.Tensor], object]


class Toy:
    """A step that keeps the rules: a batch, a weight that changes in place, and its gradient, which is created anew."""

    def __init__(self) -> None:
        self.weight = torch.empty(4, 4, device="cuda", requires_grad=True)
        self.buffer = torch.empty(4, device="cuda")
        self.rows: list[torch.Tensor] = []

    def __call__(self, step: int, batch: torch.Tensor) -> None:
        self.weight.grad = None
        (batch @ self.weight + self.buffer).sum().backward()
        with torch.no_grad():
            self.weight.sub_(self.weight.grad)
        self.buffer.mul_(0.5)


@pytest.fixture
def rules() -> Iterator[GraphRules]:
    record = Record()
    with stand_in_cuda(record) as mode, recorded_launches(mode):
        yield GraphRules(record)


def judge(rules: GraphRules, toy: Toy, extra: Step) -> list[tuple[str, str]]:
    """Return rule and operator of what two steps of the toy with an addition violate."""
    for step in (1, 2):
        with rules.step():
            with rules.tape.batch():
                batch = torch.ones(3, 4).pin_memory().to("cuda", non_blocking=True)
            toy(step, batch)
            extra(step, batch)
        del batch
    found = rules.findings()
    assert all(one.where.startswith(("test_graph_rules.py ", "kernels/comtip_kernels/")) for one in found), found
    return [(one.rule, one.what) for one in found]


def test_a_step_that_keeps_the_rules_passes(rules: GraphRules):
    assert judge(rules, Toy(), lambda _step, _batch: None) == []


def test_a_read_on_the_host_is_found(rules: GraphRules):
    toy = Toy()
    assert judge(rules, toy, lambda _step, batch: batch.sum().item()) == [("wait", "a number is read")]
    assert rules.findings()[0].count == 2


def test_a_shape_from_data_is_found(rules: GraphRules):
    found = judge(rules, Toy(), lambda _step, batch: batch.nonzero())
    assert ("data shape", "aten::nonzero") in found


def test_a_step_number_as_an_argument_is_found(rules: GraphRules):
    assert judge(rules, Toy(), lambda step, batch: batch * step) == [("number", "aten::mul")]


def test_a_number_on_the_cpu_is_a_number(rules: GraphRules):
    assert judge(rules, Toy(), lambda step, batch: batch * torch.tensor(float(step))) == [("number", "aten::mul")]


def test_a_step_number_as_an_argument_of_a_kernel_is_found(rules: GraphRules):
    ids = torch.empty(4, device="cuda", dtype=torch.int32)
    rows = torch.empty(4, 16, device="cuda")

    def copy(step: int, _batch: torch.Tensor) -> None:
        launch(embedding.copy_rows, (1,), rows, ids, rows, 3 + step, 16, BD=16, **embedding.COPY)

    assert judge(rules, Toy(), copy) == [("number", "copy_rows")]


def test_a_buffer_that_is_made_anew_is_found(rules: GraphRules):
    toy = Toy()

    def replace(_step: int, _batch: torch.Tensor) -> None:
        toy.buffer = toy.buffer * 0.5

    found = judge(rules, toy, replace)
    assert {rule for rule, _ in found} == {"storage"}
    assert ("storage", "aten::add") in found


def test_an_operator_of_every_second_step_is_found(rules: GraphRules):
    assert judge(rules, Toy(), lambda step, batch: batch.exp() if step % 2 else None) == [("operators", "aten::exp")]


def test_another_order_is_found(rules: GraphRules):
    def swapped(step: int, batch: torch.Tensor) -> None:
        for name in ("exp", "log")[:: 1 if step % 2 else -1]:
            getattr(batch, name)()

    assert judge(rules, Toy(), swapped) == [("operators", "order of aten::exp")]


def test_another_shape_is_found(rules: GraphRules):
    assert judge(rules, Toy(), lambda step, batch: batch[:step].exp()) == [("shape", "aten::exp")]
    # Views are not launched, but a view at another address is an operand at another address.


def test_another_offset_is_found(rules: GraphRules):
    assert judge(rules, Toy(), lambda step, batch: batch[step].exp()) == [("shape", "aten::exp")]


def test_an_upload_inside_the_step_is_found(rules: GraphRules):
    def upload(_step: int, _batch: torch.Tensor) -> None:
        torch.zeros(5).pin_memory().to("cuda", non_blocking=True)

    assert judge(rules, Toy(), upload) == [("upload", "inside the step")]


def test_what_is_read_later_is_counted(rules: GraphRules):
    toy = Toy()
    assert judge(rules, toy, lambda _step, batch: toy.rows.append(batch.sum())) == [
        ("output", "kept after the next step")
    ]


def test_the_limit_on_the_gradient_norm_keeps_the_rules(rules: GraphRules):
    """No shipped config sets ``optim.spike``, so no walk covers it."""
    with rules.record.pause():
        norms = NormHistory(SpikeConfig(policy="skip"), CUDA)

    def step(_step: int, batch: torch.Tensor) -> None:
        limit = norms.limit()
        assert limit is not None
        norms.add(batch.sum().minimum(limit.norm))

    assert judge(rules, Toy(), step) == []


def test_panels_of_the_same_sizes_differ():
    config = load_config(ROOT / "configs/demo_cpu.yaml", [])
    host = tokens_of(60, config.text)
    shapes = shapes_of(host, config, 1)
    panel = torch.arange(0, 60, 2).numpy()
    other = same_sizes(host, panel, shapes)
    assert shapes(other) == shapes(panel)
    assert len(set(other.tolist())) == len(panel)
    assert (other != panel).any()
    assert shapes(panel[:-1]) != shapes(panel)


def test_rows_of_the_table_are_gated(tmp_path: Path):
    key = ("1gpu", "1", "step", "number", "comtip_fast/a.py f", "aten::add")
    write_rules(tmp_path / "rules.csv", {key: 2})
    committed = read_rules(tmp_path / "rules.csv")
    assert committed == {key: 2}
    assert changed_rules(committed, committed) == ([], [])
    worse, better = changed_rules({key: 3}, committed)
    assert worse == [
        "1gpu, ranks 1, step: CUDA graphs, number, comtip_fast/a.py f: aten::add, 3 times, the table has 2"
    ]
    assert not better
    assert changed_rules({}, committed) == ([], [worse[0].replace("3 times", "0 times")])


def test_every_config_has_its_rows():
    """The committed table is compared with the walks by ``make rehearsal``; here, with what it must show."""
    rows = read_rules(GRAPH_RULES)
    assert {key[:3] for key in rows} == {(w.config, str(w.ranks), w.name) for w in walks() if w.judged}
    assert {key[3] for key in rows} <= set(RULES)
    forbidden = {key for key in rows if key[3] in ("wait", "data shape", "upload", "operators", "shape")}
    assert forbidden == set()
