"""`gptlit predict`."""
