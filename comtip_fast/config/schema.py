"""What a run can be told: one frozen dataclass per component, one docstring per field.

The resolved config is written beside every run and inside every export, so a number can always be traced
back to the settings that made it. Symbols (B, G, Q, r ...) are those of docs/method.md; where the paper is
silent the default is this project's own choice and is a setting for that reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CONFIG_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the spots come from and how they become batches."""

    shards: str = "runs/demo/shards"
    """Folder of a shard set (``manifest.json`` and its tars)."""
    batch_size: int = 128
    """B, spots in the global batch."""
    sections_per_batch: int | None = 2
    """Fill a batch from this many sections; ``None`` mixes all of them."""
    run: int = 1
    """Spots that are read side by side: 1 shuffles every spot alike; with more (8 to 64) an epoch's reads become runs of
    so many records, for storage where seeks are slow. Shards hold a section's spots shuffled, so a run is a random draw."""
    stain: Literal["none", "section"] = "section"
    """``section`` moves each section's optical-density mean and spread to a fixed reference."""
    views: int = 8
    """Fixed augmented views per spot (1 = the tile as it is); a frozen stem is run once per view."""
    flips: bool = True
    """Views are turned by right angles and mirrored."""
    jitter: float = 0.1
    """Spread of the stain jitter in optical-density space; 0 turns it off."""
    zoom: float = 0.0
    """Views are enlarged by up to this share (0.2: 1 to 1.2 times) round their middle; 0 turns it off."""
    balance: Literal["none", "organ", "platform"] = "none"
    """``none``: every spot once per epoch. Else every organ (of a species) or platform gives an epoch the same number of
    spots: those of small groups come several times, of large ones only a keyed part."""
    loader: Literal["auto", "torch", "wds", "dali"] = "auto"
    """Who reads and decodes (docs/data_loading.md); all give the same batches, tiles within JPEG tolerance. ``auto`` takes DALI
    where training runs on a GPU and DALI is installed, else ``torch``."""
    workers: int = 2
    """Threads (``torch``, ``dali``) or processes (``wds``) that decode; 0 decodes within the step."""
    prefetch: int = 2
    """Batches made ahead, the bound of the loader's memory."""
    expression: Literal["auto", "table", "records"] = "auto"
    """``table`` keeps the levels of all training spots in memory; ``records`` makes them per batch from the records;
    ``auto`` takes the table up to 1 GiB."""
    faults: Literal["stop", "skip"] = "stop"
    """A damaged record stops the run, or another spot of its section takes its place; each is logged and counted."""
    max_faults: int = 100
    """Damaged records after which ``skip`` stops all the same."""


@dataclass(frozen=True, kw_only=True)
class GenesConfig:
    """Which genes training learns by name."""

    per_cohort: int = 300
    """The most variable genes taken for each task (species and organ); 0 takes every detected gene."""
    min_detection: float = 0.1
    """A gene must be seen in this share of the spots of every training section of its task."""
    held_out_every: int = 6
    """Past ``held_out_from``, every n-th gene is kept out of training, to test unseen genes; 0 keeps none."""
    held_out_from: int = 50
    """Rank of variability from which genes may be held out."""
    held_out: tuple[str, ...] = ()
    """Further symbols kept out of training, in any species."""


@dataclass(frozen=True, kw_only=True)
class PanelConfig:
    """The step panel: G genes, log-uniform between the two bounds."""

    min_genes: int = 1
    """Smallest G."""
    max_genes: int = 256
    """Largest G."""
    variable_share: float = 0.5
    """Share of the panel drawn in proportion to a gene's variance; the rest is uniform."""


@dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """How an expression value becomes one of Q levels."""

    kind: Literal["per_gene", "global"] = "per_gene"
    """``per_gene``: low or high for this gene; ``global``: a level means a value."""
    n_levels: int = 10
    """Q, level 0 (count 0) among them."""
    min_positive: int = 20
    """Positive spots below which a gene takes the global edges and values."""
    fit_spots: int = 50_000
    """Genes are ranked and levels learnt from at most this many training spots, an equal share of every section."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image encoder E and the masked branch."""

    backbone: str = "small"
    """``small``, or the name of any timm Vision Transformer (``vit_base_patch32_224``)."""
    pretrained: str = ""
    """A timm ``.safetensors`` file, or ``hub`` to let timm fetch its weights; empty starts at random."""
    stem: Literal["pixels", "efficientnet_lite0"] = "pixels"
    """What turns one patch's pixels into its token (``small`` only). ``efficientnet_lite0`` is frozen."""
    patch_px: int = 32
    """Side of a patch in pixels (``small`` only)."""
    width: int = 192
    """d of the image encoder (``small`` only)."""
    depth: int = 3
    """Transformer blocks (``small`` only)."""
    heads: int = 4
    """Attention heads (``small`` only) and of the mask feature generator."""
    mask_ratio: float = 0.5
    """r, share of the patches hidden from the masked branch."""
    target: Literal["self", "ema"] = "self"
    """Who makes the features to be predicted: the encoder itself (detached) or its moving average."""
    ema_decay: float = 0.996
    """Decay of the moving average."""
    distance: Literal["smooth_l1", "mse", "cosine"] = "smooth_l1"
    """Distance between predicted and target features."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The gene-sentence encoder."""

    width: int = 128
    """d of the sentence encoder."""
    depth: int = 2
    """Pre-norm transformer blocks."""
    heads: int = 4
    """Attention heads."""
    max_tokens: int = 16
    """T, name tokens beyond which the full name is cut (the symbol is not)."""
    full_name: bool = True
    """Read the full name after the symbol."""
    identity: bool = True
    """Add a learnt row per training gene."""
    identity_drop: float = 0.3
    """Chance, per gene and step, that its identity row is left out, as it is for an unseen gene."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """The shared space."""

    dim: int = 128
    """D."""
    temperature: float = 0.07
    """Start of InfoNCE's temperature; its inverse is learnt and capped."""
    max_scale: float = 100.0
    """Cap of the inverse temperature."""
    negatives: Literal["all", "same_group", "other_group"] = "same_group"
    """Which spots are negatives of one another; the group is the section."""


@dataclass(frozen=True, kw_only=True)
class PaatConfig:
    """Pair-aware adversarial training: right names, right values, wrong pairs."""

    adversary: Literal["hard", "random"] = "hard"
    """``hard`` takes the permutation that the pair head now finds most genuine."""
    candidates: int = 3
    """Whole permutations the adversary chooses from."""
    mode: Literal["strata", "spots", "mixed"] = "mixed"
    """Permute among like genes of the spot, take a gene's level from another spot, or half of each."""
    strata: int = 4
    """Strata of detection rate and mean level, per section's panel."""
    min_level_shift: int = 2
    """A swap counts only where the level moves at least this much."""
    context: Literal["image", "text"] = "image"
    """What the pair head judges a sentence by: the tile's vector, or the spot's text without that sentence."""
    hard_columns: bool = True
    """Mispaired text vectors are further columns of the InfoNCE."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """L = L_nce + w_mfm L_mfm + w_pair L_pair + w_level L_level; a weight of 0 turns its part off."""

    nce: float = 1.0
    """Weight of InfoNCE."""
    mfm: float = 1.0
    """Weight of masked feature modelling."""
    pair: float = 0.5
    """Weight of the pair head's loss."""
    level: float = 1.0
    """Weight of the image-to-level cross-entropy."""
    paat: PaatConfig = field(default_factory=PaatConfig)
    """How mispaired spots are made."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and cosine."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decoupled decay; not applied to vectors (biases, norms, single rows)."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's moments."""
    warmup_steps: int = 50
    """Linear warm-up."""
    final_lr: float = 0.02
    """Share of the peak at the last step."""
    clip: float = 1.0
    """Global gradient-norm clip; 0 turns it off."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Budget in optimizer steps, never in time: a clock would break exact resume."""
    start_from: str = ""
    """Export (or finished run) whose weights the run begins with, where names and shapes agree; see ``--from``."""
    seed: int = 0
    """Every random draw is hash(seed, purpose, step or epoch, spot)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 autocast on a GPU, fp32 on a CPU."""
    log_every: int = 10
    """Steps between lines of ``metrics.jsonl``."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    async_checkpoint: bool = True
    """Write checkpoints in a thread beside the steps; takes a copy of weights and moments in host memory meanwhile."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, besides the best one."""
    validate_every: int = 50
    """Steps between validations; 0 never validates."""
    patience: int = 6
    """Validations without a better score before training stops; 0 never stops early."""
    nan_policy: Literal["stop", "skip"] = "stop"
    """What to do when the loss or a gradient is not finite; ``skip`` is counted and logged."""
    max_skips: int = 10
    """Skipped steps after which ``skip`` stops all the same."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra ``log``)."""
    wandb: str = ""
    """W&B project to log to (extra ``log``); empty for none."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the step is spread over processes and memory; none of it changes what a step computes (docs/training.md)."""

    kind: Literal["auto", "single", "ddp", "deepspeed"] = "auto"
    """``auto``: one process alone, DDP where several were launched; ``deepspeed`` needs the extra of that name."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO (``deepspeed`` only): 0 shards nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO keeps optimizer state: on the device, in host memory, on ``nvme_path`` (ZeRO 3)."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO 3 keeps parameters that are not in use."""
    nvme_path: str = ""
    """Folder on a local NVMe drive."""
    bucket_mb: float = 25.0
    """Size of the pieces in which gradients are reduced (DDP and ZeRO 0 to 3) and ZeRO 1 and 2 gather parameters."""
    prefetch_mb: float = 50.0
    """Parameters that ZeRO 3 gathers ahead of their use."""
    persist_elements: int = 100_000
    """Parameters of fewer elements stay whole on every rank under ZeRO 3."""
    micro_batches: int = 1
    """Pieces in which each rank works through its share of the batch; the negatives stay those of the global batch."""
    loss_form: Literal["gather", "ring"] = "gather"
    """InfoNCE over ranks: gather all images, or let them travel round a ring in O(B/W) memory."""
    shard_table: bool = True
    """Each rank encodes its share of the panel's genes; the sentence table is gathered."""
    activation_checkpointing: bool = False
    """Keep only the input of each transformer block and compute the block again in the backward pass."""
    compile: bool = False
    """Compile the image encoder's and the sentence encoder's blocks with ``torch.compile``."""
    timeout_s: float = 600.0
    """A collective that a rank does not reach within this time ends the run on every rank."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is said of a run besides its losses; none of it changes a step."""

    stall_s: float = 300.0
    """A step, validation or checkpoint that takes longer is flagged, with the stack of every thread; 0 never."""
    stall_stop_s: float = 1800.0
    """After so long the process ends with code 75, so that the launcher starts it again; 0 never."""
    loss_jump: float = 3.0
    """A loss above so many times the median of the last 50 steps is flagged; 0 never."""
    norm_jump: float = 30.0
    """The same for the norm of the gradients."""
    trace: tuple[int, int] | None = None
    """First and last step to trace with ``torch.profiler``, e.g. ``[20, 25]``; one file per rank in RUN/trace."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole pretraining run."""

    name: str = "run"
    """Shown in reports and logs."""
    version: int = CONFIG_VERSION
    """Format of this config; another version is refused by name."""
    data: DataConfig = field(default_factory=DataConfig)
    genes: GenesConfig = field(default_factory=GenesConfig)
    panel: PanelConfig = field(default_factory=PanelConfig)
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
