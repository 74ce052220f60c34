"""Weights and tokenizers of other projects, in and out."""
