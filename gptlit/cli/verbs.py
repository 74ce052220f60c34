"""Subcommands of `gptlit`, in the order of the help."""

VERBS = {
    "fit": "train a model, or resume a run: gptlit fit --config configs/base.yaml",
    "predict": "sample text from a trained model: gptlit predict --ckpt_path checkpoints/base --prompt ROMEO:",
    "validate": "compute the exact loss over the validation part: gptlit validate --ckpt_path checkpoints/base",
    "test": "the same as validate, printed as test/…",
    "ladder": "train the configurations of the lecture and compare them in a table: gptlit ladder --seeds 3",
    "compare": "compare runs in one table and one picture: gptlit compare checkpoints/base checkpoints/base-2",
    "export": "export to transformers, ONNX, llama.cpp or nanoGPT: gptlit export --ckpt_path RUN --output gpt",
    "play": "write models as an interactive page for the browser: gptlit play --ckpt_path checkpoints/base",
    "completion": "print a script for TAB completion in bash or zsh: gptlit completion bash",
}
