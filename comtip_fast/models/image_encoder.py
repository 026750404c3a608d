"""Image encoder: one Vision Transformer for both the full branch and the masked branch.

The encoder is a timm Vision Transformer, selected by name, or a small one for CPUs. Shapes: B tiles of S x S pixels, P patches
of p x p pixels, V = P - floor(r P) visible patches, d the encoder's width, c the width of a stem's features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from comtip_kernels.packed_attention import image_attention_runs
from timm.layers import Mlp, PatchEmbed, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from comtip_fast.config.vision import VisionConfig, VitConfig
from comtip_fast.models.adapters import add_adapters
from comtip_fast.models.fused_blocks import Stream, arguments
from comtip_fast.models.pretrained import fill_normalisation, load_weights, normalisation
from comtip_fast.models.recompute import run_block
from comtip_fast.models.stems import EfficientNetLite0Stem
from comtip_fast.models.vit_blocks import PartsBlock, attention_name, take_parts


class ImageTokens(NamedTuple):
    """Output of the encoder for all or some of the patches of a tile."""

    patches_BVd: Tensor
    """Features of the given patches."""
    pooled_Bd: Tensor
    """Mean over the given patches, with the norm that the backbone applies after pooling, if it has one."""


class VisionEncoder(nn.Module):
    """timm's Vision Transformer with a forward pass over a subset of the patches.

    Parameters
    ----------
    config
        Settings of the encoder (``vision``).
    tile_px
        Width of a tile in px, S.

    Raises
    ------
    ValueError
        The backbone, its weights, the patches or the adapters cannot be used; the message names the setting.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    pos_embed: Tensor

    def __init__(self, config: VisionConfig, tile_px: int) -> None:
        super().__init__()
        vit = _build_vit(config, tile_px)
        self.patch_px = int(vit.patch_embed.patch_size[0])
        self.grid = patches_per_side(config, self.patch_px, tile_px)
        self.n_patches = self.grid**2
        self.width = int(vit.embed_dim)
        self.n_prefix = int(vit.num_prefix_tokens)
        self.stem: EfficientNetLite0Stem | None = None
        # Submodules keep timm's names, so that timm's weights load without renaming.
        if config.backbone == "small" and config.stem == "efficientnet_lite0":
            self.stem = EfficientNetLite0Stem(config.stem_stages)
            self.patch_embed: nn.Module = nn.Linear(self.stem.width, self.width)
        else:
            # Patches are embedded separately (see forward), so timm's check of the image size does not apply.
            vit.patch_embed.strict_img_size = False
            self.patch_embed = vit.patch_embed
            self.patch_embed.proj = _PatchProjection.of(vit.patch_embed.proj)
        if vit.pos_embed is None:
            raise ValueError(
                f"vision.backbone={config.backbone}: the model has no absolute position embedding, which masking needs; "
                "choose a Vision Transformer with one, e.g. vit_base_patch32_224"
            )
        self.pos_embed = vit.pos_embed
        self.cls_token = vit.cls_token
        self.dist_token = getattr(vit, "dist_token", None)
        self.reg_token = vit.reg_token
        self.no_embed_class = bool(vit.no_embed_class)
        self.norm_pre, self.blocks, self.norm, self.fc_norm = vit.norm_pre, vit.blocks, vit.norm, vit.fc_norm
        self.recompute = False
        self.takes_parts = take_parts(list(self.blocks))
        # Stored with the weights: a checkpoint or an export must not depend on the files of the initial weights.
        mean, std = normalisation(config, vit)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1))
        self.register_load_state_dict_pre_hook(_fill)
        if config.lora.rank:
            add_adapters(self, config.lora)

    def cut(self, tiles_B3SS: Tensor) -> Tensor:
        """Split uint8 tiles into normalised patches (B, P, 3, p, p), in row-major order.

        Raises
        ------
        ValueError
            The width of the tiles is not the width that the encoder was built for.
        """
        B, _, S, _ = tiles_B3SS.shape
        if self.grid * self.patch_px != S:
            raise ValueError(
                f"tiles are {S} px wide, but the encoder was built for {self.grid * self.patch_px} px; pass tiles of that width"
            )
        x = (tiles_B3SS.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std
        k, p = self.grid, self.patch_px
        return x.view(B, 3, k, p, k, p).permute(0, 2, 4, 1, 3, 5).reshape(B, k * k, 3, p, p)

    def stem_features(self, tiles_B3SS: Tensor) -> Tensor:
        """Return the input of :meth:`forward`: features (B, P, c) of the frozen stem or, without a stem, patches (B, P, 3, p, p).

        Raises the errors of :meth:`cut`.
        """
        patches = self.cut(tiles_B3SS)
        if self.stem is None:
            return patches
        B, P = patches.shape[:2]
        return self.stem(patches.flatten(0, 1)).view(B, P, -1)

    def stem_stages(self, tiles_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result of :meth:`stem_features`, and the features (B, P, c) of all stages of the frozen stem.

        Raises the errors of :meth:`cut`.
        """
        assert self.stem is not None
        patches = self.cut(tiles_B3SS)
        stages = self.stem.stages(patches.flatten(0, 1)).view(*patches.shape[:2], -1)
        return self.stem.of_stages(stages), stages

    def forward(
        self, features_BP: Tensor, visible_BV: Tensor | None = None, with_all: bool = False
    ) -> ImageTokens | tuple[ImageTokens, ImageTokens]:
        """Encode all patches, or only those of ``visible_BV``, or both in one pass over the blocks.

        Parameters
        ----------
        features_BP
            Result of :meth:`stem_features`.
        visible_BV
            int64 indices of the patches to encode; None encodes all.
        with_all
            Whether to return a pair: the tokens of all patches and those of ``visible_BV``. See :meth:`encode_both`.
        """
        if with_all:
            assert visible_BV is not None
            return self._both(features_BP, visible_BV)
        if visible_BV is not None:
            rows = torch.arange(features_BP.shape[0], device=features_BP.device)[:, None]
            features_BP = features_BP[rows, visible_BV]
        x = self.norm_pre(self._embedded(features_BP, visible_BV))
        if self.fused:
            (B, T, d) = x.shape
            return self._tokens(*self._rows(x.reshape(B * T, d), (T,)))
        for block in self.blocks:
            x = run_block(block, x, recompute=self.recompute)
        return self._tokens(self.norm(x))

    def fuse(self) -> None:
        """Let every block compute the work between its products by few kernels, if all blocks allow it (:mod:`.fused_blocks`)."""
        if self.can_fuse:
            for block in self.blocks:
                assert isinstance(block, PartsBlock)
                block.fuse()

    @property
    def can_fuse(self) -> bool:
        """Whether every block can be fused."""
        return all(isinstance(block, PartsBlock) and block.can_fuse for block in self.blocks)

    @property
    def fused(self) -> bool:
        """Whether every block is fused (:mod:`.fused_blocks`)."""
        return all(isinstance(block, PartsBlock) and block.fused for block in self.blocks)

    def _rows(self, x_Nd: Tensor, tokens: Sequence[int]) -> list[Tensor]:
        """Return the normed output of the blocks for the rows of each part, (B, T, d), where ``tokens`` has the T of each part."""
        out: Tensor | Stream = x_Nd
        for block in self.blocks:
            x, *branch = arguments(out, recompute=self.recompute)
            out = run_block(block, x, tokens, *branch, recompute=self.recompute)
        rows_Nd = out.whole() if isinstance(out, Stream) else out
        images = rows_Nd.shape[0] // sum(tokens)
        parts = rows_Nd.split([images * T for T in tokens])
        return [self.norm(part.view(images, T, part.shape[1])) for part, T in zip(parts, tokens, strict=True)]

    @property
    def in_one_pass(self) -> bool:
        """Whether :meth:`encode_both` takes one pass over the blocks.

        It takes two passes if a block is of an unknown kind (:func:`comtip_fast.models.vit_blocks.take_parts`), and with activation
        checkpointing, because recomputing both parts together would need more memory.
        """
        return self.takes_parts and not self.recompute

    def attention_name(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return the implementation of attention for all patches of a tile; see :func:`.vit_blocks.attention_name`.

        ``triton`` is :func:`comtip_kernels.image_attention` in fused blocks.
        """
        if self.fused and image_attention_runs(device, dtype, self.n_patches + self.n_prefix):
            return "triton"
        return attention_name(self.blocks, self.n_patches, device, dtype)

    def encode_both(self, features_BP: Tensor, visible_BV: Tensor) -> tuple[ImageTokens, ImageTokens]:
        """Encode all patches and, separately, only those of ``visible_BV``; return both outputs.

        In one pass over the blocks (:attr:`in_one_pass`), weights are read once and have one gradient, except those of the norms
        and the output projection inside attention.
        """
        if self.in_one_pass:
            both: tuple[ImageTokens, ImageTokens] = self(features_BP, visible_BV, True)
            return both
        return self(features_BP), self(features_BP, visible_BV)

    def _both(self, features_BP: Tensor, visible_BV: Tensor) -> tuple[ImageTokens, ImageTokens]:
        """Return the outputs for all patches and for the patches ``visible_BV``; tokens attend only to tokens of their own part."""
        x_BTd = self._embedded(features_BP, None)
        (B, T, d), n, V = x_BTd.shape, self.n_prefix, visible_BV.shape[1]
        rows_Bn = torch.arange(B * T, device=visible_BV.device).view(B, T)[:, : n + 1]
        own_BV = torch.cat([rows_Bn[:, :n], rows_Bn[:, n:] + visible_BV], dim=1) if n else rows_Bn + visible_BV
        x_Md = x_BTd.view(B * T, d)
        # A row is selected at most once, so that its gradient does not depend on the order of sums.
        x_Nd = self.norm_pre(torch.cat([x_Md, x_Md.index_select(0, own_BV.flatten())]))
        full_BTd, visible_BVd = self._rows(x_Nd, (T, n + V))
        return self._tokens(full_BTd), self._tokens(visible_BVd)

    def _embedded(self, features_BV: Tensor, visible_BV: Tensor | None) -> Tensor:
        """Return class, distillation and register tokens, then embedded patches, (B, n + V, d), all with positions added."""
        B, V = features_BV.shape[:2]
        if self.stem is not None:
            x_BVd = self.patch_embed(features_BV)
        else:
            x_BVd = self.patch_embed(features_BV.flatten(0, 1)).reshape(B, V, self.width)
        x_BVd = x_BVd + self.positions(visible_BV, B)
        prefix = self._prefix(B)
        return torch.cat([*prefix, x_BVd], dim=1) if prefix else x_BVd

    def _tokens(self, x_BTd: Tensor) -> ImageTokens:
        """Return the output for the normed result of the last block, (B, n + V, d)."""
        patches_BVd = x_BTd[:, self.n_prefix :] if self.n_prefix else x_BTd
        return ImageTokens(patches_BVd, self.fc_norm(patches_BVd.mean(dim=1)))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns of parameter names by which timm assigns parameters to layers for layer decay."""
        found: dict[str, Any] = VisionTransformer.group_matcher(self, coarse)
        # timm's patterns do not include the tokens of distilled models and the norms after the blocks.
        return found | {
            "stem": rf"{found['stem']}|dist_token",
            "blocks": [found["blocks"][0], (r"^(?:fc_)?norm\.", (99999,))],
        }

    def positions(self, visible_BV: Tensor | None, batch: int) -> Tensor:
        """Return the position embeddings (B, V, d) of all patches, or of the patches ``visible_BV`` only."""
        rows_Pd = self.pos_embed[0] if self.no_embed_class else self.pos_embed[0, self.n_prefix :]
        if visible_BV is None:
            return rows_Pd.expand(batch, -1, -1)
        return nn.functional.embedding(visible_BV, rows_Pd)

    def _prefix(self, batch: int) -> list[Tensor]:
        """Return the class, distillation and register tokens of the model, (B, t, d) each, with their positions if they have any."""
        tokens, at = [], 0
        for token in (self.cls_token, self.dist_token, self.reg_token):
            if token is not None:
                own = 0 if self.no_embed_class else self.pos_embed[:, at : at + token.shape[1]]
                tokens.append((token + own).expand(batch, -1, -1))
                at += token.shape[1]
        return tokens


def _fill(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Add the pixel normalisation to weights of earlier versions when they are loaded."""
    fill_normalisation(state, prefix)


def patches_per_side(config: VisionConfig, patch_px: int, tile_px: int) -> int:
    """Return the number of patches along one side of a tile.

    Raises
    ------
    ValueError
        The width of the tile is not a multiple of the width of a patch.
    """
    if tile_px % patch_px:
        key = "vision.patch_px" if config.backbone == "small" else "vision.vit.patch_px"
        stated = config.backbone == "small" or config.vit.patch_px is not None
        cause = f"{key}={patch_px}" if stated else f"vision.backbone {config.backbone!r} has patches of {patch_px} px"
        fits = [n for n in range(4, tile_px + 1) if tile_px % n == 0]
        fix = f"set {key} to one of {', '.join(map(str, fits))}"
        raise ValueError(
            f"{cause}: tiles of {tile_px} px, as in data.shards, cannot be cut into whole patches; {fix}, or build the set "
            f"with `tile_px={max(1, round(tile_px / patch_px)) * patch_px}`"
        )
    return tile_px // patch_px


def check_mask(config: VisionConfig, n_patches: int) -> None:
    """Check that ``vision.mask_ratio`` hides at least one patch of a tile.

    Raises
    ------
    ValueError
        The ratio hides no patch, so the masked loss would be undefined.
    """
    if int(config.mask_ratio * n_patches) < 1:
        least = math.ceil(1000 / n_patches) / 1000  # rounded up, because a ratio below 1 / n hides no patch
        several = n_patches > 1
        cause = f"{least:g} hides one" if several else "a single patch cannot be both hidden and visible"
        patch_px = "vision.patch_px" if config.backbone == "small" else "vision.vit.patch_px"
        raise ValueError(
            f"vision.mask_ratio={config.mask_ratio:g} hides none of the {n_patches} patches of a tile ({cause}); "
            f"{'increase the ratio, ' if several else ''}make patches smaller ({patch_px}), or disable masking with loss.mfm=0"
        )


class _PatchProjection(nn.Conv2d):
    """Projection of patches: the convolution of timm, computed as one matrix product where every input is one patch.

    On a CPU, the gradient of that convolution takes twenty times as long as the product.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> _PatchProjection:
        """Return a module with the parameters of ``conv``, whose stride is its kernel size."""
        height, width = conv.kernel_size
        size = (height, width)
        # On the meta device the initialisation draws no random numbers.
        new = cls(conv.in_channels, conv.out_channels, size, size, bias=conv.bias is not None, device="meta")
        new.weight, new.bias = conv.weight, conv.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Return the projections (N, d, 1, 1) of patches (N, 3, p, p), or (N, d, k, k) of images with k x k patches."""
        if x.shape[-2:] != self.kernel_size:
            return super().forward(x)
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]


def _build_vit(config: VisionConfig, tile_px: int) -> VisionTransformer:
    """Build the Vision Transformer of the config for a tile size, with its initial weights; raise ValueError if that fails."""
    if config.backbone == "small":
        # No class token: the mean over patches represents the tile.
        return VisionTransformer(
            img_size=tile_px,
            patch_size=config.patch_px,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            class_token=False,
            global_pool="avg",
            num_classes=0,
            init_values=None,
            fc_norm=False,
        )
    arguments = _timm_arguments(config.vit)
    try:
        vit = timm.create_model(
            config.backbone, pretrained=config.pretrained == "hub", img_size=tile_px, num_classes=0, **arguments
        )
    except (RuntimeError, TypeError, AssertionError, ValueError, OSError) as err:
        fixes = ["choose a name of timm.list_models('vit_*')"]
        if timm.is_model(config.backbone):
            fixes += ["correct vision.vit"] if arguments else []
            fixes += ["give a file of weights in vision.pretrained"] if config.pretrained == "hub" else []
        raise ValueError(
            f"vision.backbone={config.backbone}: timm cannot build it for {tile_px} px ({type(err).__name__}: {err}); "
            f"{', or '.join(reversed(fixes))}"
        ) from err
    if not isinstance(vit, VisionTransformer):
        raise ValueError(
            f"vision.backbone={config.backbone}: a {type(vit).__name__} is not a Vision Transformer; "
            "choose a name of timm.list_models('vit_*')"
        )
    if not isinstance(vit.patch_embed, PatchEmbed):
        raise ValueError(
            f"vision.backbone={config.backbone}: its patch embedding reads neighbouring patches, which would leak hidden "
            "patches; choose a Vision Transformer with a plain patch embedding"
        )
    if config.pretrained not in ("", "hub"):
        load_weights(vit, Path(config.pretrained))
    return vit


def _timm_arguments(config: VitConfig) -> Mapping[str, Any]:
    """Return timm's constructor arguments for the settings that are not None and, without a class token, for average pooling."""
    named: dict[str, Any] = {
        "patch_size": config.patch_px,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "reg_tokens": config.registers,
        "class_token": config.class_token,
        "no_embed_class": config.no_embed_class,
    }
    out = {name: value for name, value in named.items() if value is not None}
    if config.init_values is not None:
        out["init_values"] = config.init_values or None
    if config.mlp is not None:
        out |= {"mlp_layer": Mlp, "act_layer": nn.GELU}
        if config.mlp == "swiglu":
            out |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if config.class_token is False:
        out["global_pool"], out["fc_norm"] = "avg", False
    return out
