"""Sampling: ids from a prompt, and text streamed from ids."""

from gptlit.generation.generate import Sampling, generate, generate_naive, next_token_probabilities
from gptlit.generation.text import BatchGeneration, GenerationConfig, TextStream

__all__ = [
    "BatchGeneration",
    "GenerationConfig",
    "Sampling",
    "TextStream",
    "generate",
    "generate_naive",
    "next_token_probabilities",
]
