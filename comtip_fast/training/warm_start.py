"""Begin from another model's weights: other data, other genes, another run; what fits is taken, the rest is said.

A tensor is taken where its name and shape agree. Rows of the identity table belong to genes, so they are taken gene by gene, by
key. Levels, their frequencies and values are never taken: they are fitted on the new data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from comtip_fast.export import Bundle
from comtip_fast.models import CoMTIP

log = logging.getLogger("comtip_fast")
IDENTITY = "genes.identity_Id"


@torch.no_grad()
def start_from(model: CoMTIP, source: str | Path, keys: Sequence[str], tokenizer_sha256: str) -> list[str]:
    """Copy weights of an export into ``model`` and return the names of tensors that were not taken, each with its reason.

    Parameters
    ----------
    model
        To be trained; changed in place.
    source
        An export folder, or a finished run.
    keys
        Of the trained genes, in the order of identity rows from 1 on.
    tokenizer_sha256
        Of the tokenizer that reads gene names now.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no export at ``source``, it has another format, or nothing in it fits.
    """
    folder = Path(source)
    bundle = Bundle.load(folder / "export" if (folder / "export").is_dir() else folder)
    old, new = bundle.model.state_dict(), model.state_dict()
    left = [f"{name}: not in this model" for name in old.keys() - new.keys()]
    taken = 0
    for name, target in new.items():
        if name == IDENTITY:
            continue
        # A run whose teacher follows the encoder begins with a teacher that equals it.
        value = old.get(name, old.get(name.replace("teacher.", "vision.", 1)))
        if value is None:
            left.append(f"{name}: not in {folder}")
        elif value.shape != target.shape:
            left.append(f"{name}: {tuple(value.shape)} there, {tuple(target.shape)} here")
        elif name == "genes.token_Vd" and bundle.tokenizer_sha256 != tokenizer_sha256:
            left.append(f"{name}: another tokenizer")
        else:
            target.copy_(value)
            taken += 1
    if not taken:
        raise ValueError(
            f"{folder}: no tensor has a name and shape of this model; take the same vision, text and align"
        )
    genes = _take_identities(old.get(IDENTITY), new.get(IDENTITY), [g.key for g in bundle.genes if g.trained], keys)
    log.info(
        "from %s: %d of %d tensors, and the identities of %d of %d genes", folder, taken, len(new), genes, len(keys)
    )
    for reason in sorted(left):
        log.warning("not taken: %s", reason)
    return sorted(left)


def _take_identities(
    old: torch.Tensor | None, new: torch.Tensor | None, old_keys: Sequence[str], keys: Sequence[str]
) -> int:
    """Copy the rows of genes that both models know; return how many."""
    if old is None or new is None or old.shape[1:] != new.shape[1:]:
        return 0
    place = {key: row for row, key in enumerate(old_keys, start=1)}
    pairs = [(row, place[key]) for row, key in enumerate(keys, start=1) if key in place]
    new[0].copy_(old[0])
    for row, other in pairs:
        new[row].copy_(old[other])
    return len(pairs)
