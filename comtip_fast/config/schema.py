"""The settings of a run: one frozen dataclass per component, one docstring and one bound per field.

The resolved config is written into every run folder and every export, so that a result can be traced to the settings
that produced it. Symbols (B, G, Q, r ...) are those of docs/method.md. Where the paper gives no value, the default is
this project's choice. ``python -m comtip_fast.config.settings_page`` generates docs/settings.md from this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

CONFIG_VERSION = 1

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
OpenShare = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data and batches."""

    shards: str = "runs/demo/shards"
    """Folder or URL of a shard set (``manifest.json`` and its tar files)."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """B, spots in the global batch; InfoNCE compares at least two."""
    sections_per_batch: Count | None = 2
    """Number of sections a batch is drawn from; ``null`` draws from all sections."""
    run: Count = 1
    """Number of consecutive records read together. 1 shuffles single spots; 8 to 64 turns the reads of an epoch into
    sequential runs for storage with slow seeks. Records of a section are stored shuffled, so a run is a random sample."""
    stain: Literal["none", "section"] = "section"
    """``section`` moves the optical-density mean and spread of each section to a fixed reference."""
    views: Count = 8
    """Fixed augmented views per spot (1 = the original tile). A frozen stem runs once per view."""
    flips: bool = True
    """Rotate views by right angles and mirror them."""
    jitter: PositiveOrZero = 0.1
    """Standard deviation of the stain jitter in optical-density space; 0 disables it."""
    zoom: Share = 0.0
    """Largest random enlargement about the tile's centre (0.2: a factor of 1 to 1.2); 0 disables it."""
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
    expression: Literal["auto", "table", "records"] = "auto"
    """``table`` keeps the levels of all training spots in memory, ``records`` computes them per batch, ``auto`` uses the
    table up to 1 GiB."""
    faults: Literal["stop", "skip"] = "stop"
    """Damaged records: ``stop`` ends the run, ``skip`` substitutes another spot of the section. Each is logged and
    counted."""
    max_faults: CountOrZero = 100
    """Number of damaged records after which ``skip`` ends the run too."""


@dataclass(frozen=True, kw_only=True)
class GenesConfig:
    """Genes that are trained by name."""

    per_cohort: CountOrZero = 300
    """Number of most variable genes selected per cohort (species and organ); 0 selects every detected gene."""
    min_detection: Share = 0.1
    """Share of spots in which a gene must be detected, in every training section of its cohort."""
    held_out_every: CountOrZero = 6
    """Every n-th gene from rank ``held_out_from`` on is excluded from training, to test unseen genes; 0 excludes none."""
    held_out_from: CountOrZero = 50
    """Variability rank from which genes may be held out."""
    held_out: tuple[str, ...] = ()
    """Further symbols to exclude from training, in every species."""


@dataclass(frozen=True, kw_only=True)
class PanelConfig:
    """The step panel: G genes, log-uniform between the two bounds."""

    min_genes: Count = 1
    """Smallest G."""
    max_genes: Count = 256
    """Largest G."""
    variable_share: Share = 0.5
    """Share of the panel drawn in proportion to gene variance; the rest is drawn uniformly."""


@dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """Quantisation of expression values into Q levels."""

    kind: Literal["per_gene", "global"] = "per_gene"
    """``per_gene``: a level is low or high for its gene; ``global``: a level is the same value for every gene."""
    n_levels: Annotated[int, Field(ge=3, le=256)] = 10
    """Q, including level 0 (count 0). Levels are stored as one byte."""
    min_positive: Count = 20
    """Number of positive spots below which a gene uses the global edges and values."""
    fit_spots: Annotated[int, Field(ge=100)] = 50_000
    """Largest number of training spots used to rank genes and fit levels, an equal share per section."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image encoder E and the masked branch."""

    backbone: Annotated[str, Field(min_length=1)] = "small"
    """``small``, or the name of a timm Vision Transformer (``vit_base_patch32_224``)."""
    pretrained: str = ""
    """A timm ``.safetensors`` file, or ``hub`` to download weights through timm; empty for random weights."""
    stem: Literal["pixels", "efficientnet_lite0"] = "pixels"
    """Patch embedding of ``small``: a linear map of the pixels, or frozen EfficientNet features."""
    patch_px: Count = 32
    """Side of a patch in pixels (``small`` only)."""
    width: Count = 192
    """d of the image encoder (``small`` only)."""
    depth: Count = 3
    """Transformer blocks (``small`` only)."""
    heads: Count = 4
    """Attention heads of ``small`` and of the mask feature generator."""
    mask_ratio: OpenShare = 0.5
    """r, share of patches hidden from the masked branch; ``loss.mfm=0`` disables masking."""
    target: Literal["self", "ema"] = "self"
    """Source of the target features: the encoder itself (detached) or its exponential moving average."""
    ema_decay: Share = 0.996
    """Decay of the moving average."""
    distance: Literal["smooth_l1", "mse", "cosine"] = "smooth_l1"
    """Distance between predicted and target features."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The gene-sentence encoder."""

    width: Count = 128
    """d of the sentence encoder."""
    depth: Count = 2
    """Pre-norm transformer blocks."""
    heads: Count = 4
    """Attention heads."""
    max_tokens: Count = 16
    """T, number of name tokens at which the full name is truncated (the symbol is kept)."""
    full_name: bool = True
    """Append the full name to the symbol."""
    identity: bool = True
    """Add a learnt embedding per training gene."""
    identity_drop: Share = 0.3
    """Probability, per gene and step, of dropping the identity embedding, as for an unseen gene."""
    gene_vectors: str = ""
    """File of gene vectors (``comtip genes vectors``) that a learnt projection adds to the gene's sentence; empty for none.
    The export holds the vectors, and predicts every gene of the file."""
    vector_drop: Share = 0.2
    """Probability, per gene and step, of dropping vector and identity, as for an unseen gene that has only a name."""
    name_drop: Share = 0.2
    """The same for name and identity, as for an unseen gene that has only a vector; the sum of both is at most 1."""
    attention: Literal["auto", "triton", "flash", "varlen", "sdpa"] = "auto"
    """Implementation of attention in training; results differ by rounding. ``auto``: on a GPU this project's Triton kernel
    for sentences up to 48 tokens, on a CPU PyTorch's by length. ``flash`` is flash-attn, ``varlen`` PyTorch's
    variable-length attention (both bf16 on a GPU), ``sdpa`` PyTorch's on padded sentences. ``comtip doctor`` lists what
    works here."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """The shared space."""

    dim: Annotated[int, Field(ge=2)] = 128
    """D."""
    temperature: Positive = 0.07
    """Initial InfoNCE temperature; its inverse is learnt and clamped."""
    max_scale: Positive = 100.0
    """Upper bound of the inverse temperature."""
    negatives: Literal["all", "same_group", "other_group"] = "same_group"
    """Spots that are used as negatives of a spot; the group is the section."""


@dataclass(frozen=True, kw_only=True)
class PaatConfig:
    """Pair-aware adversarial training: right names, right values, wrong pairs."""

    adversary: Literal["hard", "random"] = "hard"
    """``hard`` selects the permutation that the pair head currently scores as most genuine."""
    candidates: Count = 3
    """Permutations that the adversary selects from."""
    mode: Literal["strata", "spots", "mixed"] = "mixed"
    """Permute among similar genes of the spot, take the level of another spot, or half of each."""
    strata: Count = 4
    """Strata of detection rate and mean level in the panel of a section."""
    min_level_shift: Count = 2
    """Smallest change of level that counts as a mispairing."""
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
    """Flips and rotations that features are averaged over; prediction encodes each tile this many times."""
    context: bool = True
    """Concatenate features with their mean over neighbouring spots."""
    max_spots: Annotated[int, Field(ge=10)] = 20_000
    """Largest number of training spots to fit on, an equal number per section."""
    min_donors: Count = 1
    """Number of training donors of a cohort from which the head on the shared-space vector is used; 2 omits it for cohorts
    with a single training donor (docs/ablations.md)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: PositiveOrZero = 0.05
    """Decoupled weight decay; not applied to vectors (biases, norms, single embeddings)."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """Coefficients of Adam's running averages."""
    warmup_steps: CountOrZero = 50
    """Steps of linear warm-up."""
    final_lr: Share = 0.02
    """Learning rate at the last step, as a share of the peak."""
    clip: PositiveOrZero = 1.0
    """Maximum global gradient norm; 0 disables clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    steps: Count = 1000
    """Budget in optimizer steps. A time budget would break exact resume."""
    start_from: str = ""
    """Export or finished run that provides initial weights where names and shapes agree; set by ``--from``."""
    seed: CountOrZero = 0
    """Every random draw is hash(seed, purpose, step or epoch, spot)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` uses a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 autocast on a GPU, fp32 on a CPU."""
    log_every: Count = 10
    """Steps between rows of ``metrics.jsonl``."""
    checkpoint_every: Count = 100
    """Steps between checkpoints."""
    async_checkpoint: bool = True
    """Write checkpoints in a background thread; needs a copy of weights and moments in host memory meanwhile."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
    validate_every: CountOrZero = 50
    """Steps between validations; 0 disables validation."""
    validate_spots: Count = 10_000
    """Maximum number of spots of a section that a validation scores, evenly spaced over the section."""
    patience: CountOrZero = 6
    """Validations without improvement before training stops; 0 disables early stopping."""
    nan_policy: Literal["stop", "skip"] = "stop"
    """Policy for a non-finite loss or gradient, which never changes the weights: ``stop`` ends the run, ``skip`` counts and logs
    it. On a GPU it is read with the next logged row."""
    max_skips: CountOrZero = 10
    """Number of skipped steps after which ``skip`` ends the run too."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra ``log``)."""
    wandb: str = ""
    """W&B project to log to (extra ``log``); empty for none."""
    threads: CountOrZero = 0
    """CPU threads; 0 keeps PyTorch's default."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Distribution of a step over processes and memory. No key changes what a step computes (docs/training.md)."""

    kind: Literal["auto", "single", "ddp", "deepspeed"] = "auto"
    """``auto``: a single process, or DDP if several were launched; ``deepspeed`` needs the extra of that name."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage (``deepspeed`` only): 0 shards nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Placement of ZeRO optimizer state: device, host memory, or ``nvme_path`` (ZeRO 3)."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Placement of unused ZeRO 3 parameters."""
    nvme_path: str = ""
    """Folder on a local NVMe drive."""
    bucket_mb: Positive = 25.0
    """Bucket size for reducing gradients (DDP and ZeRO 0 to 3) and for gathering parameters (ZeRO 1 and 2)."""
    prefetch_mb: PositiveOrZero = 50.0
    """Parameters that ZeRO 3 gathers ahead of use."""
    persist_elements: CountOrZero = 100_000
    """ZeRO 3 keeps parameters with fewer elements on every rank."""
    micro_batches: Count = 1
    """Pieces into which a rank splits its share of the batch; negatives remain those of the global batch."""
    loss_form: Literal["gather", "ring"] = "gather"
    """InfoNCE over ranks: all-gather the images, or pass them round a ring in O(B/W) memory."""
    shard_table: bool = True
    """Each rank encodes a share of the panel's genes; the sentence table is gathered."""
    activation_checkpointing: bool = False
    """Store only the input of each transformer block and recompute the block in the backward pass."""
    compile: bool = False
    """Compile the blocks of both encoders with ``torch.compile``."""
    timeout_s: Positive = 600.0
    """Timeout of a collective; after it the run ends on every rank."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Monitoring of a run; no key changes a step."""

    stall_s: PositiveOrZero = 300.0
    """A longer step, validation or checkpoint is flagged, with a stack trace of every thread; 0 disables it."""
    stall_stop_s: PositiveOrZero = 1800.0
    """After this long the process exits with code 75, so that the launcher restarts it; 0 disables it."""
    loss_jump: PositiveOrZero = 3.0
    """Flag a loss above this multiple of the median of the last 50 steps; 0 disables it."""
    norm_jump: PositiveOrZero = 30.0
    """The same for the gradient norm."""
    trace: tuple[int, int] | None = None
    """First and last step to record with ``torch.profiler``, e.g. ``[20, 25]``; one file per rank in RUN/trace."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pretraining run."""

    name: str = "run"
    """Shown in reports and logs."""
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
