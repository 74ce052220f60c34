"""LitGPT, the LightningModule, and what it needs of Lightning and torch.compile."""

from gptlit.training.module import LitGPT

__all__ = ["LitGPT"]
