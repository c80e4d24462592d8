"""An encoder of images with a linear classifier on top."""

from __future__ import annotations

from torch import Tensor, nn


class Classifier(nn.Module):
    """Images to logits, by way of the encoder's embedding.

    Args:
        encoder: maps images [B, 3, H, W] to [B, dim].
        dim: width of the embedding.
        n_classes: outputs.
    """

    def __init__(self, encoder: nn.Module, dim: int, n_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(dim, n_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Classify images, float [B, 3, H, W], normalised.

        Returns:
            logits: [B, n_classes].
            features: [B, dim] without gradient.
        """
        features_BD = self.encoder(images)
        return {"logits": self.classifier(features_BD), "features": features_BD.detach()}
