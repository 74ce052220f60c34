"""`gptlit ladder`."""
