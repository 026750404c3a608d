"""Adapt a model to a section: compare on spatial blocks, fit, and write an export whose lineage names the section."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from comtip_shards.sections.facts import CountOptions, PoolingOptions
from comtip_shards.storage.atomic import write_atomic

from comtip_fast._version import __version__
from comtip_fast.adaptation.blocks import BlockSplit, split_blocks
from comtip_fast.adaptation.correction import Correction, base_head, corrected_head, fit_correction, with_head
from comtip_fast.adaptation.section import AdaptSection, read_section, seen_before
from comtip_fast.evaluation.baselines import fit_ridge
from comtip_fast.evaluation.folds import FOLDS, spatial_folds
from comtip_fast.evaluation.metrics import score
from comtip_fast.export import SECTION_FIELDS
from comtip_fast.inference import GeneQuery, ImageFeatures, Predictor
from comtip_fast.lineage import LineageRun
from comtip_fast.metrics import finite_or_none, pcc_per_gene
from comtip_fast.models.readout.heads import NORMS, CohortHead
from comtip_fast.models.readout.section_statistics import standardise
from comtip_fast.runtime.csv_text import csv_text
from comtip_fast.runtime.devices import pick_device
from comtip_fast.shards import Facts, stated_options

log = logging.getLogger("comtip_fast")
FORMAT, VERSION = "comtip-adaptation", 1
N_HVG, MIN_DETECTION, SPLITS = 50, 0.1, 5
COMPARED_FRACTION = 0.5
"""Share of the spots that the comparison fits on if the model is adapted to all spots."""
LABELS = {
    "adapted": "adapted",
    "unadapted": "unadapted",
    "ridge_features": "ridge, encoder features, same spots",
    "ridge_frozen": "ridge, frozen features, same spots",
    "ridge_colour": "ridge, mean colour, same spots",
}


@dataclass
class Adaptation:
    """Result of :func:`adapt`."""

    table: pd.DataFrame
    """One row per split, normalisation and method: ``split`` (from 0), ``normalisation`` (``cp10k`` or ``raw``), ``method`` (a key
    of :data:`LABELS`), ``fit_spots``, ``test_spots``, and the fields of :class:`comtip_fast.evaluation.metrics.Score` on the test
    spots."""
    facts: dict[str, Any]
    """The content of ``adaptation.json``."""
    predictor: Predictor
    """The adapted model."""

    def summary(self) -> pd.DataFrame:
        """Summarise the scores of log1p CP10K over the splits.

        Returns
        -------
        DataFrame
            One row per method, with the columns ``method`` (a value of :data:`LABELS`); ``above_unadapted``, the number of splits
            in which ``mean_pcc_50_hvg`` is above that of the unadapted model, as text (``3 of 5``; empty for the unadapted
            model); ``lowest`` and ``highest``, the range of ``mean_pcc_50_hvg`` over splits; and the means over splits of
            ``mean_pcc_50_hvg``, ``mean_pcc_all`` and ``partial_pcc_50_hvg``.
        """
        rows = self.table[self.table["normalisation"] == "cp10k"]
        base = rows[rows["method"] == "unadapted"].set_index("split")["mean_pcc_50_hvg"]
        out = []
        for method, part in rows.groupby("method", sort=False):
            own = part.set_index("split")["mean_pcc_50_hvg"]
            means = part[["mean_pcc_50_hvg", "mean_pcc_all", "partial_pcc_50_hvg"]].mean()
            ahead = f"{int((own > base).sum())} of {len(own)}" if method != "unadapted" else ""
            span = {"lowest": own.min(), "highest": own.max()}
            row: dict[str, Any] = {"method": LABELS[str(method)], "above_unadapted": ahead} | span
            out.append(row | {str(k): v for k, v in means.items()})
        return pd.DataFrame(out)


def adapt(
    run: Path | str,
    section: str | Path | ad.AnnData,
    out: Path | str | None = None,
    *,
    fraction: float = 1.0,
    splits: int = SPLITS,
    facts: Facts = None,
    pooling: PoolingOptions | None = None,
    counts: CountOptions | None = None,
    fmt: str = "auto",
    seed: int = 0,
    device: str = "auto",
) -> Adaptation:
    """Adapt a model to a section with counts, or to a share of its spots.

    The encoder stays frozen. A correction of the readout is fitted in closed form, and is used only where it
    predicts spatial folds of the fitted spots better. The adapted and the unadapted model, and ridge regression on the same
    spots, are compared on test spots whose tiles share no pixel with those of the fitted blocks. The adapted model's mean score
    over these splits becomes the validation score of each gene that the section measured.

    Parameters
    ----------
    run
        A run folder or an export, with a readout.
    section
        As for :meth:`Model.compare`.
    out
        Folder to write: ``export/`` (which :func:`load` reads), ``adaptation.json``, ``adaptation.csv`` (the comparison)
        and ``spots.csv`` (the use of each spot); ``None`` writes nothing.
    fraction
        Share of the spots to adapt to, in blocks; 1 uses all. The comparison fits to the same share, or to half of the
        spots if ``fraction`` is 1.
    splits
        Number of random choices of blocks for the comparison. With ``fraction`` below 1, the model is adapted to the blocks of
        the first choice.
    facts, pooling, counts, fmt
        As for :meth:`Model.predict`. Outside of a shard set, tissue and donor must be stated.
    seed
        Seed of the blocks.
    device
        ``auto``, ``cpu`` or ``cuda``.

    Returns
    -------
    Adaptation
        The comparison, the facts, and the adapted model.

    Raises
    ------
    ValueError, FileNotFoundError
        ``fraction`` or ``splits`` is out of range, the model or the section does not exist or cannot be used, the model has no
        readout, the section has too few spots for blocks and margin, or there is no such device.
    FileExistsError
        ``out`` exists and is not an empty folder.

    Examples
    --------
    >>> import comtip_fast
    >>> adapted = comtip_fast.adapt("run", "set:x1", "adapted", fraction=0.25, splits=2, device="cpu")
    >>> adapted.summary()["method"].tolist()[:2]
    ['adapted', 'unadapted']
    >>> comtip_fast.load("adapted").predictor.lineage.runs_that_trained_on("donor_c")
    ['run, adapted to x1']
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` {fraction}: give a share of the spots, above 0 and at most 1")
    if splits < 1:
        raise ValueError(f"`splits` {splits}: give a number of at least 1")
    if out is not None and Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise FileExistsError(f"`out` {out}: exists and is not an empty folder; give a new folder")
    predictor = Predictor.load(run, pick_device(device))
    if predictor.bundle.readout is None:
        raise ValueError(f"{run}: the model has no readout to adapt; train with readout.kind=auto")
    found = read_section(predictor, section, stated_options(facts, pooling, counts), fmt)
    seen = seen_before(predictor, found.facts)
    if seen["section_seen_by"]:
        log.warning(
            "section %s: the model has learnt from it (%s), so its test spots are no new data and the scores of the comparison, also those "
            "of the unadapted model, are too high; compare on a section that no run used",
            found.facts.section_id,
            ", ".join(seen["section_seen_by"]),
        )
    chosen = _splits(found, predictor.tile_um, fraction, splits, seed)
    compared = [_compare(predictor, found, s, i) for i, s in enumerate(chosen)]
    table = pd.concat([rows for rows, _ in compared], ignore_index=True)
    fit = chosen[0].fit if fraction < 1 else np.arange(len(found.xy_um))
    scores = dict(zip(found.keys, np.mean([pcc for _, pcc in compared], axis=0).tolist(), strict=True))
    adapted, corrections = _adapted(predictor, found, fit, scores, bool(seen["section_seen_by"]))
    record = _record(found, adapted, fraction, chosen[0], fit, corrections) | seen
    result = Adaptation(table, record, adapted)
    if out is not None:
        _write(result, found, chosen[0], fit, Path(out))
    return result


def _splits(section: AdaptSection, tile_um: float, fraction: float, splits: int, seed: int) -> list[BlockSplit]:
    """Return the blocks of every split, with the margin of one tile width."""
    share = fraction if fraction < 1 else COMPARED_FRACTION
    name = section.facts.section_id
    return [split_blocks(section.xy_um, share, tile_um, seed=seed, number=i, section=name) for i in range(splits)]


# -- one fit ------------------------------------------------------------------------------------------------


@dataclass
class _Fitted:
    """Predictions for all spots of a section, after a fit to some of them, by normalisation."""

    unadapted: dict[str, np.ndarray]
    adapted: dict[str, np.ndarray]
    head: CohortHead
    """The corrected head."""
    corrections: dict[str, Correction | None]
    """None where no correction is used."""


def _features(predictor: Predictor, section: AdaptSection, parts: list[np.ndarray]) -> ImageFeatures:
    """Return features whose means over neighbours use spots of the same part only; spots in no part form another part."""
    readout = predictor.bundle.readout
    assert readout is not None
    views, n = section.views_NF, len(section.xy_um)
    rest = np.setdiff1d(np.arange(n), np.concatenate(parts))
    joined = np.empty((n, views.shape[1] * (1 + len(readout.settings.radii))), np.float32)
    for part in (*parts, rest):
        if part.size:
            joined[part] = readout.head_features(views[part], section.xy_um[part])
    return ImageFeatures(section.features.vector_ND, section.features.pooled_Nd, joined, section.xy_um)


def _fit(predictor: Predictor, section: AdaptSection, fit: np.ndarray, parts: list[np.ndarray]) -> _Fitted:
    """Fit the corrections of the readout to the spots ``fit``; the neighbours of a spot are spots of the same part."""
    readout = predictor.bundle.readout
    assert readout is not None
    features = _features(predictor, section, parts)
    assert features.readout_NF is not None
    base = base_head(readout, section.cohort, section.facts.species)
    keys = [k for k in section.keys if k in set(base.keys)]
    own = np.array([section.keys.index(k) for k in keys], np.int64)
    columns = np.array([base.keys.index(k) for k in keys], np.int64)
    unadapted = _predict(predictor, features, section.keys, section.cohort)
    x = standardise(features.readout_NF, base.mean_F, base.std_F)
    width = x.shape[1]
    blocks = {b: x[:, readout.settings.columns(b, width)] for b in base.blocks}
    fold = spatial_folds(section.xy_um[fit], FOLDS)
    genes = _variable_genes(section.measured["cp10k"][np.ix_(fit, own)])
    adapted = {norm: values.astype(np.float64) for norm, values in unadapted.items()}
    corrections: dict[str, Correction | None] = {}
    for norm in NORMS:
        before = adapted[norm][np.ix_(fit, own)]
        measured = section.measured[norm][np.ix_(fit, own)]
        found = fit_correction({b: v[fit] for b, v in blocks.items()}, measured, before, fold, genes)
        corrections[norm] = found
        if found is not None:
            adapted[norm][:, own] += found.predict(blocks[found.block])
    return _Fitted(unadapted, adapted, corrected_head(base, columns, corrections), corrections)


def _predict(predictor: Predictor, features: ImageFeatures, keys: list[str], cohort: str) -> dict[str, np.ndarray]:
    """Predict the genes ``keys`` of a section: ``cp10k`` and ``raw``, float32 (N, G)."""
    known = {g.key: g for g in predictor.bundle.genes}
    queries = [GeneQuery(known[k].symbol, known[k].name, k) for k in keys]
    return predictor.predict(features, queries, cohort=cohort)


def _variable_genes(cp10k_NG: np.ndarray) -> np.ndarray:
    """Return the columns of the (up to 50) most variable genes that enough spots express; if none, of the first 50."""
    detected = (cp10k_NG > 0).mean(0) >= MIN_DETECTION
    variance = np.where(detected, cp10k_NG.var(0), -1.0)
    order = np.argsort(-variance, kind="stable")[:N_HVG]
    return order[variance[order] > 0] if detected.any() else order


# -- comparison ---------------------------------------------------------------------------------------------


def _compare(
    predictor: Predictor, section: AdaptSection, split: BlockSplit, number: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """Score the adapted and the unadapted model and ridge regression on the test spots of one split.

    Returns
    -------
    table, pcc
        Rows of :attr:`Adaptation.table`, and the PCC of the adapted model's log1p CP10K for each gene of the section, float64
        (G,); an undefined PCC counts as 0.
    """
    fitted = _fit(predictor, section, split.fit, [split.fit, split.test])
    genes = _variable_genes(section.measured["cp10k"][split.fit])
    fold = spatial_folds(section.xy_um[split.fit], FOLDS)
    rows = []
    for norm in NORMS:
        measured = section.measured[norm]
        predictions = {"adapted": fitted.adapted[norm], "unadapted": fitted.unadapted[norm]}
        for name, candidates in section.inputs.items():
            one = np.zeros(split.fit.size, np.int64)
            models = [(x, fit_ridge(x[split.fit], measured[split.fit], one, fold)) for x in candidates.values()]
            x, model = max(models, key=lambda m: m[1].cv_pcc)
            predictions[name] = model.predict(np.asarray(x, np.float64))
        for name in (n for n in LABELS if n in predictions):
            test = split.test
            found = score(measured[test], predictions[name][test], section.covariates[test], genes)
            sizes = {"fit_spots": split.fit.size, "test_spots": test.size}
            rows.append({"split": number, "normalisation": norm, "method": name, **sizes, **vars(found)})
    pcc = pcc_per_gene(section.measured["cp10k"][split.test], fitted.adapted["cp10k"][split.test])
    return pd.DataFrame(rows), np.nan_to_num(pcc)


# -- the adapted model --------------------------------------------------------------------------------------


def _adapted(
    predictor: Predictor, section: AdaptSection, fit: np.ndarray, scores: dict[str, float], seen: bool
) -> tuple[Predictor, dict[str, Correction | None]]:
    """Return the model adapted to the spots ``fit``, with a run on the section added to its lineage, and its corrections.

    ``scores`` are the scores of the section's genes in the comparison, on test spots that are new to the model unless ``seen``. Other genes
    keep the score that the parent has for them, with what it was scored on.
    """
    parts = [np.arange(len(section.xy_um))]  # at prediction, neighbours are those of the complete section
    fitted = _fit(predictor, section, fit, parts)
    bundle = predictor.bundle
    assert bundle.readout is not None
    if not any(fitted.corrections.values()):
        log.warning(
            "section %s: no correction predicts left-out blocks better, so the adapted model predicts as before; the section is "
            "recorded in its lineage",
            section.facts.section_id,
        )
    name = f"{bundle.config.name}, adapted to {section.facts.section_id}"
    chosen = {norm: None if c is None else c.facts for norm, c in fitted.corrections.items()}
    note = {
        "adapted_to": section.facts.section_id,
        "adapted_donor": section.facts.donor,
        "adapted_spots": int(fit.size),
    }
    head = replace(fitted.head, facts={**fitted.head.facts, **note, "correction": chosen})
    parent = bundle.lineage.own
    origin = f"test spots of {section.facts.section_id}" + (", which training used" if seen else "")
    scored = parent.scores_with_origin() | {key: (score, origin) for key, score in scores.items()}
    own = LineageRun(
        name=name,
        comtip_fast=__version__,
        sections=(section.facts,),
        trained_genes=parent.trained_genes,
        held_out_genes=parent.held_out_genes,
        vectors=parent.vectors,
        gene_scores={key: score for key, (score, _) in scored.items()},
        scored_on={key: where for key, (_, where) in scored.items()},
    )
    adapted = replace(
        bundle,
        config=replace(bundle.config, name=name),
        readout=with_head(bundle.readout, head),
        sections=[{k: getattr(section.facts, k) for k in SECTION_FIELDS}],
        lineage=bundle.lineage.followed_by(own),
    )
    return Predictor(adapted, predictor.device), fitted.corrections


def _record(
    section: AdaptSection,
    adapted: Predictor,
    fraction: float,
    split: BlockSplit,
    fit: np.ndarray,
    corrections: Mapping[str, Correction | None],
) -> dict[str, Any]:
    """Return the content of ``adaptation.json``."""
    facts = section.facts
    return {
        "format": FORMAT,
        "version": VERSION,
        "comtip_fast": __version__,
        "model": adapted.config.name,
        "lineage": adapted.lineage.labels(),
        "section": {k: getattr(facts, k) for k in SECTION_FIELDS},
        "cohort": section.cohort,
        "fraction": fraction,
        "adapted_spots": int(fit.size),
        "compared_fit_spots": int(split.fit.size),
        "margin_um": adapted.tile_um,
        "corrections": {norm: None if c is None else c.facts for norm, c in corrections.items()},
    }


def _write(result: Adaptation, section: AdaptSection, split: BlockSplit, fit: np.ndarray, out: Path) -> None:
    """Write the export, the comparison, the use of each spot in the first split and the record to the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    result.predictor.bundle.save(out / "export")
    write_atomic(out / "adaptation.csv", csv_text(result.table))
    use = np.full(len(section.xy_um), "margin", object)
    use[split.fit], use[split.test] = "fit", "test"
    spots = pd.DataFrame(
        {"spot": section.spot_ids, "first_split": use, "adapted_to": np.isin(np.arange(use.size), fit)}
    )
    write_atomic(out / "spots.csv", csv_text(spots))
    write_atomic(out / "adaptation.json", json.dumps(finite_or_none(result.facts), indent=1, allow_nan=False) + "\n")
