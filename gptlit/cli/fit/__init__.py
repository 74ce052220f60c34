"""`gptlit fit`, `validate` and `test`."""
