"""Settings of a run: one frozen dataclass per component; each field has its bounds and a docstring.

The resolved config is written into every run folder and every export, so that a result can be traced to the settings
that produced it. Symbols (B, G, Q, r ...) are those of docs/method.md. Where the paper gives no value, the default is
this project's choice. ``python -m comtip_fast.config.settings_page`` generates docs/settings.md from this file
and from the modules of larger components (``vision``, ``optim``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from comtip_fast.config.bounds import Count, CountOrZero, Positive, PositiveOrZero, Share
from comtip_fast.config.optim import OptimConfig
from comtip_fast.config.vision import VisionConfig

CONFIG_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data and batches."""

    shards: str = "runs/demo/shards"
    """Folder or URL of a shard set (``manifest.json`` and its tar files)."""
    tile_px: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Expected width of the set's tiles in px (S); training on another set is refused. ``null`` accepts any width."""
    tile_um: Positive | None = None
    """Expected width of the set's tiles in um; training on another set is refused. ``null`` accepts any width."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """B, spots in the global batch; InfoNCE compares at least two."""
    sections_per_batch: Count | None = 2
    """Number of sections a batch is drawn from; ``null`` draws from all sections."""
    run: Count = 1
    """Number of consecutive records read together. 1 shuffles single spots; 8 to 64 turns the reads of an epoch into
    sequential runs for storage with slow seeks. Records of a section are stored shuffled, so a run is a random sample."""
    slots: Count | None = None
    """Number of virtual slots that the tars are divided into, for many nodes. Each batch has equally many spots of every slot,
    so a node that reads whole slots fetches its own share of the tars only; batches do not depend on the number of nodes.
    ``batch_size`` and ``sections_per_batch`` must be multiples of it. ``null`` orders all spots together."""
    stain: Literal["none", "section"] = "section"
    """Stain normalisation. ``section`` shifts and scales the optical density of each section to a fixed mean and
    spread; ``none`` leaves pixels unchanged."""
    views: Count = 8
    """Number of fixed augmented views per spot; view 0 is the original tile."""
    stem_features: Literal["auto", "memory", "batch"] = "auto"
    """Features of a frozen stem. ``memory`` computes those of all views of the training spots before the first step and keeps
    them in the memory of every rank, ``batch`` runs the stem on every batch, ``auto`` uses memory up to 1 GiB."""
    flips: bool = True
    """Rotate views by multiples of 90 degrees and mirror them."""
    jitter: PositiveOrZero = 0.1
    """Stain jitter j: the optical density of each channel is scaled by a uniform factor in 1 +- j and shifted by a
    uniform offset in +- 0.2 j; 0 disables it."""
    zoom: Share = 0.0
    """Largest random zoom about the tile's centre (0.2: a factor of 1 to 1.2); 0 disables it."""
    balance: Literal["none", "organ", "platform"] = "none"
    """``none``: every spot once per epoch. Otherwise every organ (of a species) or platform contributes the same number
    of spots to an epoch: small groups are repeated, large groups are subsampled."""
    loader: Literal["auto", "torch", "wds", "dali"] = "auto"
    """Reader and decoder (docs/data_loading.md). All return the same batches, tiles within JPEG tolerance. ``auto`` selects
    DALI if training runs on a GPU and DALI is installed, and ``torch`` otherwise."""
    workers: CountOrZero = 2
    """Decoding threads (``torch``, ``dali``) or processes (``wds``); 0 decodes in the training process."""
    prefetch: Count = 2
    """Batches prepared in advance; bounds the loader's memory."""
    fetch: Literal["files", "ranges"] = "files"
    """Reading of a remote set. ``files`` keeps whole tars in a cache that the ranks of a node share; ``ranges`` requests the
    records of a batch and keeps nothing, for a cache that cannot hold what a node reads in an epoch."""
    fetch_ahead: CountOrZero = 8
    """With ``files``: number of batches whose tars are fetched in the background before they are read."""
    expression: Literal["auto", "table", "records"] = "auto"
    """``table`` keeps the levels of all training spots in memory, ``records`` computes them per batch, ``auto`` uses the
    table up to 1 GiB and 200,000 spots."""
    faults: Literal["stop", "skip"] = "stop"
    """Damaged records: ``stop`` ends the run, ``skip`` uses another spot of the batch instead, from the same section if
    there is one. Damaged records are counted, and the first 20 are logged."""
    max_faults: CountOrZero = 100
    """Largest number of damaged records that ``skip`` accepts; one more ends the run."""


@dataclass(frozen=True, kw_only=True)
class GenesConfig:
    """Selection of the genes that are trained, and of those held out to test unseen genes."""

    per_cohort: CountOrZero = 300
    """Number of most variable genes selected per cohort (species and organ); 0 selects every detected gene."""
    min_detection: Share = 0.1
    """Smallest share of spots in which a gene is detected, in the training sections of ``detected_in``."""
    detected_in: Literal["any", "pooled", "every"] = "any"
    """Training sections of the cohort in which ``min_detection`` must be reached, among those that measured the gene:
    ``any`` of them, all spots ``pooled``, or ``every`` one. With ``any``, a shallow or additional section removes no gene.
    Scores always use genes that pass in every section."""
    held_out_every: CountOrZero = 6
    """Every n-th gene from rank ``held_out_from`` on is excluded from training, to test unseen genes; 0 excludes none."""
    held_out_from: CountOrZero = 50
    """Variance rank (from 0) from which on genes may be held out; more variable genes are always trained."""
    held_out: tuple[str, ...] = ()
    """Symbols of further genes to exclude from training, in every species and at any rank."""


@dataclass(frozen=True, kw_only=True)
class PanelConfig:
    """The step panel: G genes, log-uniform between the two bounds."""

    min_genes: Count = 1
    """Minimum number of genes per step."""
    max_genes: Count = 256
    """Maximum number of genes per step."""
    variable_share: Share = 0.5
    """Share of the panel drawn with probability proportional to gene variance; the rest is drawn uniformly."""
    balance: Literal["none", "assay"] = "assay"
    """``assay`` draws a gene less often where other genes can be drawn, if sections with small gene lists already train it
    often, and gives every section of the batch at least one gene that it measured. ``none`` ignores gene lists."""


@dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """Quantisation of expression values into Q levels."""

    kind: Literal["per_gene", "global"] = "per_gene"
    """``per_gene``: level edges are quantiles of each gene's own values; ``global``: all genes share the same edges."""
    n_levels: Annotated[int, Field(ge=3, le=256)] = 10
    """Q, including level 0 (count 0). Levels are stored as one byte."""
    min_positive: Count = 20
    """A gene with fewer spots with a positive count uses the global edges."""
    fit_spots: Annotated[int, Field(ge=100)] = 50_000
    """Largest number of training spots used to fit levels; the same fraction of every section is used."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The gene-sentence encoder."""

    width: Count = 128
    """d, embedding width of the sentence encoder."""
    depth: Count = 2
    """Pre-norm transformer blocks."""
    heads: Count = 4
    """Attention heads."""
    max_tokens: Count = 16
    """T, largest number of tokens of symbol and full name; longer names are truncated at the end."""
    full_name: bool = True
    """Append the full name to the symbol."""
    identity: bool = True
    """Add a learnt embedding per training gene."""
    identity_drop: Share = 0.3
    """Probability, per gene and step, of dropping the identity embedding, to train the case of an unseen gene."""
    gene_vectors: str = ""
    """File of gene vectors (``comtip genes vectors``). A learnt projection of the gene's vector is added to its
    sentence; empty for none. The export contains the vectors and can predict every gene of the file."""
    vector_drop: Share = 0.2
    """Probability, per gene and step, of dropping vector and identity, to train the case of an unseen gene with a name
    only."""
    name_drop: Share = 0.2
    """Probability of dropping name and identity, to train the case of an unseen gene with a vector only. The sum of
    ``vector_drop`` and ``name_drop`` must not exceed 1."""
    attention: Literal["auto", "triton", "flash", "varlen", "sdpa"] = "auto"
    """Implementation of attention in training; results differ by rounding. ``auto``: on a GPU this project's Triton kernel
    for sentences up to 48 tokens, on a CPU PyTorch's by length. ``flash`` is flash-attn, ``varlen`` PyTorch's
    variable-length attention (both bf16 on a GPU), ``sdpa`` PyTorch's on padded sentences. ``comtip doctor`` lists what
    works here."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """The shared space."""

    dim: Annotated[int, Field(ge=2)] = 128
    """D, width of the shared space."""
    temperature: Positive = 0.07
    """Initial InfoNCE temperature; its inverse is learnt and clamped."""
    max_scale: Positive = 100.0
    """Upper bound of the inverse temperature."""
    negatives: Literal["all", "same_group", "other_group"] = "same_group"
    """Which other spots are negatives of a spot: ``all``, those of the same section (``same_group``), or those of other
    sections (``other_group``)."""


@dataclass(frozen=True, kw_only=True)
class PaatConfig:
    """Pair-aware adversarial training (PAAT): negatives that pair the spot's genes with levels of other genes or other spots."""

    adversary: Literal["hard", "random"] = "hard"
    """``hard`` uses the candidate that the pair head scores as most likely to be true; ``random`` uses a random one."""
    candidates: Count = 3
    """Number of mispaired candidates per spot that the adversary selects from."""
    mode: Literal["strata", "spots", "mixed"] = "mixed"
    """Source of wrong levels: ``strata`` permutes the levels of similar genes of the spot, ``spots`` takes the gene's
    level in another spot of the section, ``mixed`` chooses one of both per spot with equal probability."""
    strata: Count = 4
    """Number of strata of genes with similar detection rate and mean level, per section."""
    min_level_shift: Count = 2
    """Smallest change of level for which a gene counts as mispaired."""
    context: Literal["image", "text"] = "image"
    """Context of the pair head: the tile's vector, or the spot's text without that sentence."""
    hard_columns: bool = True
    """Use mispaired text vectors as additional InfoNCE columns."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """L = w_nce L_nce + w_mfm L_mfm + w_pair L_pair + w_level L_level; a weight of 0 disables a part."""

    nce: PositiveOrZero = 1.0
    """Weight of InfoNCE."""
    mfm: PositiveOrZero = 1.0
    """Weight of masked feature modelling."""
    pair: PositiveOrZero = 0.5
    """Weight of the pair head's loss."""
    level: PositiveOrZero = 1.0
    """Weight of the image-to-level cross-entropy."""
    paat: PaatConfig = field(default_factory=PaatConfig)
    """Construction of mispaired spots."""


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """Prediction of expression from image features; fitted in closed form at export, without effect on training."""

    kind: Literal["linear", "levels"] = "linear"
    """``linear``: closed-form heads on the training split, mixed with the prediction from level sentences. ``levels``: level
    sentences alone, which also predict the genes that no head covers."""
    views: Annotated[int, Field(ge=1, le=8)] = 2
    """Number of flips and rotations over which features are averaged; prediction encodes each tile this many times."""
    context: bool = True
    """Concatenate features with their mean over neighbouring spots."""
    max_spots: Annotated[int, Field(ge=10)] = 20_000
    """Largest number of training spots to fit on, an equal number per section."""
    min_donors: Count = 1
    """Smallest number of training donors of a cohort with which the head on the shared-space vector is used; 2 omits
    this head for cohorts with a single training donor (docs/ablations.md)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    steps: Count = 1000
    """Number of optimizer steps. There is no time limit, because it would break exact resume."""
    start_from: str = ""
    """Export or finished run that provides initial weights where names and shapes agree; set by ``--from``."""
    seed: CountOrZero = 0
    """Seed of the initial weights and of all random draws, each a hash of (seed, purpose, step or epoch, spot or
    gene)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` uses a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 autocast on a GPU, fp32 on a CPU."""
    log_every: Count = 10
    """Steps between rows of ``metrics.jsonl``."""
    checkpoint_every: Count = 100
    """Steps between checkpoints; one is also written before every validation."""
    async_checkpoint: bool = True
    """Write checkpoints in a background thread; needs a copy of weights and moments in host memory meanwhile."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
    validate_every: CountOrZero = 50
    """Steps between validations; 0 disables validation."""
    validate_spots: Count = 10_000
    """Largest number of spots per section that a validation scores, evenly spaced over the section's records."""
    patience: CountOrZero = 6
    """Validations without improvement before training stops; 0 disables early stopping."""
    nan_policy: Literal["stop", "skip"] = "stop"
    """What to do after a step with a non-finite loss or gradient, which never changes the weights: ``stop`` ends the
    run, ``skip`` logs and counts the step. On a GPU, this happens at the next logged row."""
    max_skips: CountOrZero = 10
    """Largest number of skipped steps; one more ends the run."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra ``log``)."""
    wandb: str = ""
    """W&B project to log to (extra ``log``); empty for none."""
    threads: CountOrZero = 0
    """CPU threads; 0 keeps PyTorch's default."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Distribution of a step over processes and memory. Keys change the result by rounding only (docs/training.md)."""

    kind: Literal["auto", "single", "ddp", "deepspeed"] = "auto"
    """``auto``: a single process, or DDP if several were launched; ``deepspeed`` needs the extra of that name."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage (``deepspeed`` only): 0 shards nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO keeps optimizer state: ``none`` on the device, ``cpu`` in host memory, ``nvme`` in ``nvme_path`` (ZeRO
    3 only)."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO 3 keeps parameters that are not in use; values as in ``offload_optimizer``."""
    nvme_path: str = ""
    """Folder on a local NVMe drive."""
    bucket_mb: Positive = 25.0
    """Bucket size in MiB for reducing gradients (DDP and ZeRO 0 to 3) and for gathering parameters (ZeRO 1 and 2)."""
    prefetch_mb: PositiveOrZero = 50.0
    """Size in MiB of the parameters that ZeRO 3 gathers ahead of use."""
    persist_elements: CountOrZero = 100_000
    """ZeRO 3 keeps parameters with fewer elements on every rank."""
    micro_batches: Count = 1
    """Number of pieces into which each rank splits its share of the batch (gradient caching); negatives remain those of
    the global batch."""
    loss_form: Literal["gather", "ring"] = "gather"
    """InfoNCE over W ranks: ``gather`` all-gathers the image vectors, ``ring`` passes them round a ring in O(B/W)
    memory."""
    shard_table: bool = True
    """Each rank encodes a share of the panel's sentences, and the table is all-gathered; otherwise every rank encodes
    all."""
    activation_checkpointing: bool = False
    """Store only the input of each transformer block and recompute the block in the backward pass."""
    compile: bool = False
    """Compile the blocks of both encoders with ``torch.compile``."""
    timeout_s: Positive = 600.0
    """Timeout of a collective in seconds; if a rank does not reach it in time, the run ends on every rank."""
    wait_timeout_s: Positive = 7200.0
    """Timeout in seconds of waits for work outside of a step: training tables, validation, checkpoint and export."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Monitoring of a run; no key changes weights or losses."""

    stall_s: PositiveOrZero = 300.0
    """Seconds after which a step, validation or checkpoint is reported as stalled, with a stack trace of every thread;
    0 disables the report."""
    stall_stop_s: PositiveOrZero = 1800.0
    """Seconds after which a stalled process exits with code 75, so that the launcher restarts it; 0 disables the
    exit."""
    loss_jump: PositiveOrZero = 3.0
    """Report a loss above this multiple of the median of the last 50 steps (at least 20); 0 disables the report."""
    norm_jump: PositiveOrZero = 30.0
    """Report a gradient norm above this multiple of its median over the last 50 steps (at least 20); 0 disables the report."""
    trace: tuple[int, int] | None = None
    """First and last step to record with ``torch.profiler``, e.g. ``[20, 25]``; one file per rank in RUN/trace."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pretraining run."""

    name: str = "run"
    """Name of the run in reports, lineage and model card."""
    version: int = CONFIG_VERSION
    """Format version of this config; other versions are refused."""
    data: DataConfig = field(default_factory=DataConfig)
    genes: GenesConfig = field(default_factory=GenesConfig)
    panel: PanelConfig = field(default_factory=PanelConfig)
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    readout: ReadoutConfig = field(default_factory=ReadoutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
