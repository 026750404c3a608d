"""A run with further shard sets after training: the readout of an organ that only they have, and the methods it is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from comtip_shards import open_sets

from comtip_fast.evaluation.train_reference import TrainReference
from comtip_fast.evaluation.trained.data import TrainingData
from comtip_fast.inference import Predictor
from comtip_fast.models.readout.heads import NORMS
from testkit.tiny import TinySection
from tests.comtip_fast.test_further_sets import A, B, train, write_set

LUNG = (TinySection("l1", "donor_l", "train"), TinySection("l2", "donor_m", "train"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("extended")
    first, further = write_set(folder / "a", A, seed=1), write_set(folder / "b", B, seed=2)
    return [first, further, write_set(folder / "lung", LUNG, seed=3, tissue="lung")]


@pytest.fixture(scope="module")
def predictor(sets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """Return the model of a run on the first set, with the others from step 4 on."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(folder, sets[:1], "readout.kind=linear", end=4)
    train(folder, sets, "readout.kind=linear")
    return Predictor.load(folder)


def test_the_readout_of_a_further_organ_is_chosen_by_scores(predictor: Predictor) -> None:
    """Without genes to compare on, all candidates had the score 0, and the first one, with the weakest penalty, was used."""
    assert predictor.bundle.readout is not None
    heads = {head.cohort: head for head in predictor.bundle.readout.heads}
    assert set(heads) == {"human_breast", "human_lung"}
    for head in heads.values():
        assert all(head.facts[block][norm]["score"] != 0 for block in head.blocks for norm in NORMS)


def test_trained_methods_are_not_stopped_on_sections_that_the_run_did_not_use(
    predictor: Predictor, sets: list[Path]
) -> None:
    shards = open_sets(sets)
    assert [s.section_id for s in shards.manifest.sections if s.split == "val"] == ["v1", "v2"]
    data = TrainingData(predictor, TrainReference(predictor, shards), predictor.trained_genes, predictor.config)
    assert [section.section_id for section in data.validation] == ["v1"]
