"""Settings of a run: one frozen dataclass per component; each setting has its bounds and a docstring.

The resolved config is written into every run folder and every export, so that a result can be traced to the settings
that produced it. Symbols (B, G, Q, r ...) are those of docs/method.md. Where the paper gives no value, this project chose the
default. ``python -m comtip_fast.config.settings_page docs/settings.md`` generates docs/settings.md from this file
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
    """Training data, its augmentation, and the loading of batches."""

    shards: str | Annotated[tuple[str, ...], Field(min_length=1)] = "runs/demo/shards"
    """Folder or URL of a shard set (``manifest.json`` and its tar files), or a list of several, e.g. ``[hest, own]``, which are read
    as one set: sections in this order, and the union of the genes. Their tiles must have been cut with the same settings. Further sets
    may be appended when a run resumes; genes and levels remain those of the first ones."""
    tile_px: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Expected width of the set's tiles in px (S); training on another set is refused. ``null`` accepts any width."""
    tile_um: Positive | None = None
    """Expected width of the set's tiles in um; training on another set is refused. ``null`` accepts any width."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """B, number of spots in the global batch, over all ranks."""
    sections_per_batch: Count | None = 2
    """Number of sections that a batch is drawn from; ``null`` draws from all sections."""
    run: Count = 1
    """Number of consecutive records read together. 1 shuffles single spots; 8 to 64 turns the reads of an epoch into
    sequential runs for storage with slow seeks. Records of a section are stored shuffled, so a run is a random sample."""
    slots: Count | None = None
    """Number of virtual slots that the tars are divided into, for many nodes. Each batch, except the last of an epoch, has the same
    number of spots from every slot, so a node that reads whole slots fetches only its own share of the tars; batches do not depend
    on the number of nodes. ``batch_size`` and ``sections_per_batch`` must be multiples of ``slots``. ``null`` orders all spots
    together."""
    stain: Literal["none", "section"] = "section"
    """Stain normalisation. ``section`` shifts and scales the optical density of each section to a fixed mean and standard
    deviation; ``none`` leaves pixels unchanged."""
    views: Count = 8
    """Number of fixed augmented views per spot; view 0 is the original tile."""
    stem_features: Literal["auto", "memory", "batch"] = "auto"
    """Features of a frozen stem. ``memory`` computes the features of all views of the training spots before the first step and
    keeps them in the memory of every rank, ``batch`` runs the stem on every batch, ``auto`` uses memory up to 1 GiB."""
    flips: bool = True
    """Whether views are rotated and mirrored: view v has the v-th (modulo 8) of the 8 orientations of a square."""
    jitter: PositiveOrZero = 0.1
    """Stain jitter j: the optical density of each channel is scaled by a uniform factor in 1 +- j and shifted by a
    uniform offset in +- 0.2 j; 0 disables it."""
    zoom: Share = 0.0
    """Largest random zoom about the tile's centre (0.2: a factor of 1 to 1.2); 0 disables it."""
    balance: Literal["none", "set", "organ", "platform"] = "none"
    """``none``: every spot once per epoch. Otherwise, each group (each set of ``data.shards``, organ of a species, or platform)
    contributes the same number of spots to an epoch, unless ``balance_temperature`` sets other shares. Small groups are repeated,
    large groups are subsampled."""
    balance_temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """T: with ``balance``, a group of n spots contributes a share of the epoch proportional to n to the power of 1/T. 1 keeps the
    shares of the groups; ``null`` makes them equal."""
    loader: Literal["auto", "torch", "wds", "dali"] = "auto"
    """Reader and decoder (docs/data_loading.md). All return the same batches; tiles are equal within JPEG tolerance. ``auto``
    selects DALI if training runs on a GPU, DALI is installed and no features of a frozen stem are in memory (``stem_features``), and
    ``torch`` otherwise."""
    workers: CountOrZero = 2
    """Number of decoding threads (``torch``, ``dali``) or processes (``wds``); 0 decodes in the training process."""
    loader_process: Literal["auto", "own", "training"] = "auto"
    """Where ``torch`` and ``dali`` prepare batches: ``own`` in one further process per rank, ``training`` on threads of the training
    process, which slow a step that is limited by its host. The ``workers`` threads are in the same process, except those of ``dali``
    for a GPU: they decode in the training process, and one thread of the further process reads. ``auto`` selects ``own`` for ``dali``
    if training runs on a GPU, and ``training`` otherwise: with ``torch`` and ``own``, the step's thread copies decoded tiles into
    pinned memory. Without workers, and with features of a frozen stem in memory, there is no further process."""
    prefetch: Count = 2
    """Number of batches that are prepared in advance, which bounds the memory of the loader."""
    fetch: Literal["files", "ranges"] = "files"
    """Reading of a remote set. ``files`` keeps whole tars in a cache that the ranks of a node share; ``ranges`` requests the
    records of a batch and keeps nothing, for a cache that cannot hold what a node reads in an epoch."""
    fetch_ahead: CountOrZero = 8
    """With ``fetch=files``: number of batches whose tars are fetched in the background before they are read."""
    expression: Literal["auto", "table", "records"] = "auto"
    """``table`` keeps the levels of all training spots in memory, ``records`` computes them per batch, ``auto`` uses the
    table up to 1 GiB and 200,000 spots."""
    faults: Literal["stop", "skip"] = "stop"
    """Damaged records: ``stop`` ends the run, ``skip`` uses another spot of the batch instead, from the same section if
    there is one. Damaged records are counted, and the first 20 are logged."""
    max_faults: CountOrZero = 100
    """Largest number of damaged records that ``faults=skip`` accepts; one more ends the run."""


@dataclass(frozen=True, kw_only=True)
class GenesConfig:
    """Selection of the genes that are trained, and of those held out to test unseen genes."""

    per_cohort: CountOrZero = 300
    """Number of most variable genes that are selected per cohort (species and organ); 0 selects all genes that pass
    ``min_detection``."""
    min_detection: Share = 0.1
    """Smallest share of training spots in which a selected gene is detected; ``detected_in`` defines in which sections."""
    detected_in: Literal["any", "pooled", "every"] = "any"
    """Where a gene must reach ``min_detection``, among the cohort's training sections that measured it: in ``any`` section, in the
    ``pooled`` spots of all sections, or in ``every`` section. With ``any``, a shallow or additional section removes no gene.
    Scores always use genes that pass in every section."""
    held_out_every: CountOrZero = 6
    """n: one in n genes from variance rank ``held_out_from`` is excluded from training, to test unseen genes; 0 excludes none."""
    held_out_draw: Literal["rank", "random", "families"] = "rank"
    """Which genes are held out: ``rank``, every n-th by variance; ``random``, drawn with ``train.seed``; ``families``, whole families of
    symbols (KRT5, KRT14, ...) drawn with ``train.seed``, until no further one fits the share. A family with a gene before rank
    ``held_out_from`` is not drawn."""
    held_out_from: CountOrZero = 50
    """First variance rank (from 0) at which a gene may be held out; more variable genes are trained unless ``held_out`` names
    them."""
    held_out: tuple[str, ...] = ()
    """Symbols of further genes that are excluded from training, in every species and at any rank."""


@dataclass(frozen=True, kw_only=True)
class PanelConfig:
    """The panel of a step: G genes, where G is drawn log-uniformly from ``min_genes`` to ``max_genes``."""

    min_genes: Count = 1
    """Smallest number of genes per step."""
    max_genes: Count = 256
    """Largest number of genes per step."""
    variable_share: Share = 0.5
    """Share of the panel drawn with probability proportional to gene variance; the rest is drawn uniformly."""
    balance: Literal["none", "assay"] = "assay"
    """``assay`` corrects for sections with small gene lists, whose genes would be trained more often than others, and draws at
    least one gene of each section of the batch, if the panel is large enough. ``none`` ignores gene lists."""


@dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """Quantisation of expression values into Q levels."""

    kind: Literal["per_gene", "global"] = "per_gene"
    """``per_gene``: level edges are quantiles of each gene's own values; ``global``: all genes share the same edges."""
    n_levels: Annotated[int, Field(ge=3, le=256)] = 10
    """Q, number of levels, including level 0 (count 0). A level is stored as one byte."""
    min_positive: Count = 20
    """Smallest number of spots with a positive count for which a gene has its own edges; other genes use the global edges."""
    fit_spots: Annotated[int, Field(ge=100)] = 50_000
    """Largest number of training spots used to fit levels; the same fraction of every section is used."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The gene-sentence encoder."""

    width: Count = 128
    """d, embedding width of the sentence encoder."""
    depth: Count = 2
    """Number of pre-norm transformer blocks."""
    heads: Count = 4
    """Number of attention heads."""
    max_tokens: Count = 16
    """Largest number of tokens of symbol and full name, T - 2; longer names are truncated at the end."""
    full_name: bool = True
    """Whether the full name of a gene follows its symbol in the sentence."""
    identity: bool = True
    """Whether a learnt embedding per trained gene is added to its sentence."""
    identity_drop: Share = 0.3
    """Probability, per gene and step, of dropping the identity embedding, so that the model learns to use unseen genes."""
    gene_vectors: str = ""
    """File of gene vectors (``comtip genes vectors``); empty for none. A learnt projection of a gene's vector is added to its
    sentence. The export contains the vectors and can predict every gene of the file."""
    vector_drop: Share = 0.2
    """Probability, per gene and step, of dropping vector and identity, so that the model learns to use unseen genes that have a
    name only."""
    name_drop: Share = 0.2
    """Probability, per gene and step, of dropping name and identity, so that the model learns to use unseen genes that have a
    vector only. With ``gene_vectors``, the sum of ``vector_drop`` and ``name_drop`` must not exceed 1."""
    attention: Literal["auto", "triton", "flash", "varlen", "sdpa"] = "auto"
    """Implementation of attention in training; results differ by rounding. ``triton`` is this project's kernel for packed
    sentences, ``flash`` is flash-attn, ``varlen`` PyTorch's variable-length attention (both bf16 on a GPU), ``sdpa``
    PyTorch's attention on padded sentences. ``auto`` selects ``triton`` on a GPU for sentences of up to 48 tokens (24 in full
    fp32), and PyTorch's attention on groups of sentences of equal length on a CPU. With ``auto`` and ``triton``, the last block
    computes attention for the first token of each sentence alone (sentences of up to 64 tokens, up to 16 heads); the others compute
    it for all tokens. ``comtip doctor`` lists the values that work on a machine."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """The shared space."""

    dim: Annotated[int, Field(ge=2)] = 128
    """D, width of the shared space."""
    temperature: Positive = 0.07
    """Initial temperature of InfoNCE; its inverse is learnt, up to ``max_scale``."""
    max_scale: Positive = 100.0
    """Upper bound of the inverse temperatures of InfoNCE and of the level logits."""
    negatives: Literal["all", "same_group", "other_group"] = "same_group"
    """Which other spots are negatives of a spot: ``all``, those of the same section (``same_group``), or those of other
    sections (``other_group``)."""


@dataclass(frozen=True, kw_only=True)
class PaatConfig:
    """Pair-aware adversarial training (PAAT): negatives that pair the spot's genes with levels of other genes or other spots."""

    adversary: Literal["hard", "random"] = "hard"
    """``hard`` uses the candidate to which the pair head assigns the highest probability of being true; ``random`` uses a random
    candidate."""
    candidates: Count = 3
    """Number of mispaired candidates per spot that the adversary selects from."""
    mode: Literal["strata", "spots", "mixed"] = "mixed"
    """Source of wrong levels: ``strata`` permutes the levels of similar genes of the spot, ``spots`` takes the gene's
    level in another spot of the section, ``mixed`` chooses one of the two per spot with equal probability."""
    strata: Count = 4
    """Number of strata of genes with similar detection rate and mean level, per section."""
    min_level_shift: Count = 2
    """Smallest change of level for which a gene counts as mispaired."""
    context: Literal["image", "text"] = "image"
    """What the pair head compares a sentence with: ``image`` is the vector of the tile, ``text`` the text vector of the spot
    without this sentence."""
    hard_columns: bool = True
    """Whether mispaired text vectors are additional negatives (columns) of InfoNCE."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss L = w_nce L_nce + w_mfm L_mfm + w_pair L_pair + w_level L_level; a weight of 0 disables a part."""

    nce: PositiveOrZero = 1.0
    """Weight of InfoNCE."""
    mfm: PositiveOrZero = 1.0
    """Weight of masked feature modelling."""
    pair: PositiveOrZero = 0.5
    """Weight of the loss of the pair head (PAAT)."""
    level: PositiveOrZero = 1.0
    """Weight of the cross-entropy of the levels predicted from the image."""
    paat: PaatConfig = field(default_factory=PaatConfig)
    """Mispaired negatives for the pair head."""


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """Prediction of expression from image features; fitted in closed form at export, without effect on training."""

    kind: Literal["auto", "kernel", "linear", "levels"] = "auto"
    """``kernel``: heads by kernel ridge regression on the training split, mixed with the prediction from level sentences. ``linear``:
    the same with ridge regression, whose export is smaller. ``auto``: of each cohort, normalisation and block of features, whichever
    scores higher on split ``val``. ``levels``: level sentences alone, which also predict the genes that no head covers."""
    views: Annotated[int, Field(ge=1, le=8)] = 2
    """Number of flips and rotations over which features are averaged; prediction encodes each tile this many times."""
    context: bool = True
    """Whether features are concatenated with their means over the neighbouring spots, within 1.3 and 3.4 spacings of the spots."""
    max_spots: Annotated[int, Field(ge=10)] = 20_000
    """Largest number of training spots that the fit uses, divided equally over the training sections; each section provides at
    least 10 spots, or all its spots if it has fewer."""
    min_donors: Count = 1
    """Smallest number of training donors of a cohort for a head on the shared-space vector; 2 omits this head for cohorts with
    a single training donor (docs/ablations.md)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    steps: Count = 1000
    """Number of optimizer steps. There is no time limit, because it would break exact resume."""
    start_from: str = ""
    """Export or finished run that provides the initial weights of all tensors with equal names and shapes; empty for none. Set
    by ``--from``."""
    seed: CountOrZero = 0
    """Seed of the initial weights and of all random draws; each draw is a hash of (seed, purpose, step or epoch, spot or
    gene)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` uses a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 autocast on a GPU, fp32 on a CPU."""
    log_every: Count = 10
    """Number of steps between rows of ``metrics.jsonl``."""
    checkpoint_every: Count = 100
    """Number of steps between checkpoints; one is also written before every validation."""
    checkpoint: Literal["auto", "whole", "sharded"] = "auto"
    """Files of a checkpoint. ``whole``: rank 0 gathers and writes whole tensors. ``sharded``: every rank writes its part (ZeRO 3
    without NVMe), on a file system that all ranks share. ``auto``: ``sharded`` under ZeRO 3 on several ranks, where the whole
    model may not fit on one rank; otherwise ``whole``. Either can be resumed with any engine and number of ranks."""
    async_checkpoint: bool = True
    """Whether a background thread writes checkpoints. This needs a copy of the weights and optimizer state in host memory, or of
    the rank's part of them if checkpoints are sharded."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
    validate_every: CountOrZero = 50
    """Number of steps between validations; 0 disables validation."""
    validate_spots: Count = 10_000
    """Largest number of spots per section that a validation scores, evenly spaced over the section's records."""
    patience: CountOrZero = 6
    """Number of validations in a row without improvement after which training stops; 0 disables early stopping."""
    nan_policy: Literal["stop", "skip"] = "stop"
    """What to do after a step with a non-finite loss or gradient, which never changes the weights: ``stop`` ends the
    run, ``skip`` logs and counts the step. On a GPU, the run reacts at the next logged row."""
    max_skips: CountOrZero = 10
    """Largest number of skipped steps; one more ends the run."""
    tensorboard: bool = False
    """Whether TensorBoard events are also written (extra ``log``)."""
    wandb: str = ""
    """Weights & Biases project to which rows are also logged (extra ``log``); empty for none."""
    threads: CountOrZero = 0
    """Number of CPU threads of PyTorch; 0 keeps its default."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Distribution of a step over processes and memory. These keys change the result by rounding only (docs/training.md)."""

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
    """Folder on a local NVMe drive, needed by the value ``nvme`` of the two keys above."""
    bucket_mb: Positive = 25.0
    """Bucket size in MiB for reducing gradients (DDP and ZeRO 0 to 3) and for gathering parameters (ZeRO 1 and 2)."""
    prefetch_mb: PositiveOrZero = 50.0
    """Size in MiB of the parameters that ZeRO 3 gathers ahead of use."""
    persist_elements: CountOrZero = 100_000
    """ZeRO 3 keeps parameters with fewer elements on every rank."""
    micro_batches: Count = 1
    """Number of pieces into which each rank splits its share of the batch (gradient caching). InfoNCE still uses the negatives of
    the global batch."""
    loss_form: Literal["gather", "ring"] = "gather"
    """InfoNCE over W ranks: ``gather`` all-gathers the image vectors, ``ring`` passes them from rank to rank and needs O(B/W)
    memory."""
    shard_table: bool = True
    """``true``: each rank encodes a share of the panel's sentences, and the table is all-gathered. ``false``: every rank encodes
    all sentences."""
    activation_checkpointing: bool = False
    """Whether only the input of each transformer block is stored, and the block is recomputed in the backward pass."""
    compile: bool = False
    """Whether ``torch.compile`` compiles the blocks of both encoders."""
    fused_blocks: bool = True
    """Whether a GPU computes residual sums, norms, biases and GELU of transformer blocks by few kernels of this package, and
    attention of images of up to 64 tokens by another; ``false`` leaves them to PyTorch and ``compile``. Not with ZeRO 3."""
    panel_sizes: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of sizes per doubling to which a GPU pads the panel's genes and tokens, so that few distinct shapes occur; 0
    turns padding off. kernels/README.md has the cost. A CPU never pads."""
    timeout_s: Positive = 600.0
    """Timeout of a collective in seconds; if a rank does not reach the collective in time, the run ends on every rank."""
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
