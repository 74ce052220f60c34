"""The forward pass for sampling, one token at a time. `choose` is the entry."""
