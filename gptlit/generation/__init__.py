"""Sampling: ids from a prompt, and text streamed from ids."""

from gptlit.generation.generate import Sampling, generate, generate_naive, next_token_probabilities
from gptlit.generation.text import GeneratedText, GenerationConfig, TextSink, TextStream, generate_texts

__all__ = [
    "GeneratedText",
    "GenerationConfig",
    "Sampling",
    "TextSink",
    "TextStream",
    "generate",
    "generate_naive",
    "generate_texts",
    "next_token_probabilities",
]
