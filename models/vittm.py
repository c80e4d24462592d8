"""ViTTM: a vision transformer token Turing machine with two token streams, both made from the image.

Process tokens compute in transformer blocks; memory tokens are read before and written after each block, and are not
processed themselves. Supervised, with a classifier on each stream.

Source: ViTTM (arXiv 2409.07613) and its released code (MIT), commit 87898a3, under its state-dict keys. In each layer
the read norm, then the write norm, is applied to both streams with the same weights, and replaces them: the residual
goes on from the normalised tokens. LayerNorms have eps 1e-6 (timm's), those within heads and memory MLPs 1e-5.

Released weights hold parameters that no output depends on: the class token, position table and patch embedding of the
ViT the code grew from, and an output projection in each `lin` head. They are here, and frozen, so that plain DDP
works. Where memory patches are as large as that ViT's, its embedding is the memory's, under both keys.

Shapes: B images, M memory tokens, N process tokens, D dim, K classes. Grids are row-major.
"""

from __future__ import annotations

import torch
from timm.layers import LayerNorm, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.vittm_config import ViTTMConfig, ViTTMTrunkConfig
from models.vittm_heads import Fusion, read_write_head

_VIT_PATCH = 16
_PARTS = (  # in the order of released checkpoints
    *("patch_embed", "blocks", "fc_norm", "head", "memory_embedder", "process_embedder", "read_norm", "write_norm"),
    *("process_norm", "process_head", "fc_norm_process", "mem_blocks", "write_head", "read_head"),
)


class MemoryMLP(nn.Module):
    """A residual MLP on memory tokens, [B, M, D] to [B, M, D]."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, memory_BMD: Tensor) -> Tensor:
        """Renewed memory."""
        return memory_BMD + self.mlp(self.norm(memory_BMD))


class ViTTMTrunk(nn.Module):
    """Images to two streams of tokens, and the layers that run on them.

    Args:
        config: sizes and kinds of the parts.
        vit_rest: have the unused rest of a ViT that released weights hold.
    """

    def __init__(self, config: ViTTMTrunkConfig, *, vit_rest: bool) -> None:
        super().__init__()
        self.config = config
        dim, num_memory, num_process = config.dim, config.num_memory, config.num_process
        for name in _PARTS:
            self.register_module(name, None)
        if vit_rest:
            num_vit = (config.img_size // _VIT_PATCH) ** 2
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim), requires_grad=False)
            self.pos_embed = nn.Parameter(torch.zeros(1, num_vit + 1, dim), requires_grad=False)
            shared = config.memory_patch == _VIT_PATCH
            self.patch_embed = _patch_embed(_VIT_PATCH, dim).requires_grad_(shared)
        self.memory_embedder = self.patch_embed if vit_rest and shared else _patch_embed(config.memory_patch, dim)
        self.process_embedder = _patch_embed(config.process_patch, dim)
        self.process_pos_embed = nn.Parameter(torch.empty(1, num_process, dim))
        self.memory_pos_embed = nn.Parameter(torch.empty(1, num_memory, dim))
        self.read_norm = nn.ModuleList(LayerNorm(dim) for _ in range(config.depth))
        self.read_head = self._heads(num_process)
        self.read_fusion = nn.ModuleList(Fusion(config.fusion, dim, num_process) for _ in range(config.depth))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.heads,
                config.mlp_ratio,
                qkv_bias=True,
                drop_path=config.drop_path * layer / max(1, config.depth - 1),
                norm_layer=LayerNorm,
            )
            for layer in range(config.depth)
        )
        self.write_norm = nn.ModuleList(LayerNorm(dim) for _ in range(config.depth))
        self.write_head = self._heads(num_memory)
        self.write_fusion = nn.ModuleList(Fusion(config.fusion, dim, num_memory) for _ in range(config.depth))
        self.mem_blocks = nn.ModuleList(
            MemoryMLP(dim, config.memory_mlp_ratio) if config.memory_mlp_ratio else nn.Identity()
            for _ in range(config.depth)
        )
        self.process_norm = LayerNorm(dim)
        nn.init.trunc_normal_(self.memory_pos_embed, std=0.02)
        nn.init.trunc_normal_(self.process_pos_embed, std=0.02)
        self.apply(init_linear)

    def _heads(self, num_query: int) -> nn.ModuleList:
        config = self.config
        sizes = {"dim": config.dim, "heads": config.heads, "latent_dim": config.latent_dim, "num_query": num_query}
        return nn.ModuleList(read_write_head(config.read_write, **sizes) for _ in range(config.depth))

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] to memory tokens [B, M, D] and process tokens [B, N, D], with their positions.

        Position tables are resampled (bicubic) for images of another size than img_size.

        Raises:
            ValueError: the sides are no multiples of both patches, or not img_size where a part needs that.
        """
        config = self.config
        sides = tuple(images.shape[2:])
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape [B, 3, H, W]: found {list(images.shape)}")
        if config.fixed_counts and sides != (config.img_size, config.img_size):
            raise ValueError(
                f"read_write={config.read_write!r} with fusion={config.fusion!r} is made for images of "
                f"{config.img_size} x {config.img_size} px (img_size): found {list(images.shape)}"
            )
        if any(side % patch or not side for side in sides for patch in (config.memory_patch, config.process_patch)):
            raise ValueError(
                f"height and width must be multiples of memory_patch and process_patch, {config.memory_patch} and "
                f"{config.process_patch} px: found {list(images.shape)}"
            )
        memory_BMD = self.memory_embedder(images) + _positions(self.memory_pos_embed, sides, config.memory_patch)
        process_BND = self.process_embedder(images) + _positions(self.process_pos_embed, sides, config.process_patch)
        return memory_BMD, process_BND

    def run(self, memory_BMD: Tensor, process_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Memory [B, M, D] and process tokens [B, N, D] through all layers; only the latter have a final norm."""
        for layer, block in enumerate(self.blocks):
            read_norm, write_norm = self.read_norm[layer], self.write_norm[layer]
            memory_BMD, process_BND = read_norm(memory_BMD), read_norm(process_BND)
            read_BND = self.read_head[layer](process_BND, memory_BMD)
            process_BND = block(self.read_fusion[layer](read_BND, process_BND))
            memory_BMD, process_BND = write_norm(memory_BMD), write_norm(process_BND)
            written_BMD = self.write_head[layer](memory_BMD, process_BND)
            memory_BMD = self.mem_blocks[layer](self.write_fusion[layer](written_BMD, memory_BMD))
        return memory_BMD, self.process_norm(process_BND)

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] to final memory [B, M, D] and process tokens [B, N, D], row-major; see `embed`."""
        return self.run(*self.embed(images))


class ViTTM(ViTTMTrunk):
    """The paper's classifier. `models.objectives.two_heads.two_head_loss` is its loss."""

    def __init__(self, config: ViTTMConfig) -> None:
        super().__init__(config, vit_rest=True)
        self.fc_norm = LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.n_classes)
        self.fc_norm_process = LayerNorm(config.dim)
        self.process_head = nn.Linear(config.dim, config.n_classes)
        for head in (self.head, self.process_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Classify images with either stream.

        Args:
            images: float [B, 3, H, W], normalised; H and W are multiples of both patches.

        Returns:
            memory_logits, process_logits: [B, K] each.

        Raises:
            ValueError: images of another shape.
        """
        memory_BMD, process_BND = self.tokens(images)
        return {
            "memory_logits": self.head(self.fc_norm(memory_BMD.mean(dim=1))),
            "process_logits": self.process_head(self.fc_norm_process(process_BND.mean(dim=1))),
        }

    def features(self, images: Tensor) -> Tensor:
        """What the process classifier sees: the normalised mean of the process tokens, float [B, D]."""
        return self.fc_norm_process(self.tokens(images)[1].mean(dim=1))


def _patch_embed(patch_px: int, dim: int) -> PatchEmbed:
    return PatchEmbed(img_size=None, patch_size=patch_px, embed_dim=dim)


def _positions(table_1TD: Tensor, sides: tuple[int, ...], patch_px: int) -> Tensor:
    grid = [side // patch_px for side in sides]
    return resample_abs_pos_embed(table_1TD, grid, num_prefix_tokens=0)


def init_linear(module: nn.Module) -> None:
    """Small normal weights and no bias for a linear layer; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
