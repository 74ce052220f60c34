"""Subcommands of `gptlit`, in the order of the help."""

VERBS = {
    "fit": "train a model, or resume a run: gptlit fit --config configs/base.yaml",
    "predict": "sample text from a trained model: gptlit predict --ckpt_path checkpoints/base --prompt ROMEO:",
    "validate": "exact loss over the validation part: gptlit validate --ckpt_path checkpoints/base",
    "test": "the same, printed as test/…",
    "ladder": "the lecture, rung by rung, as a table: gptlit ladder --seeds 3",
    "compare": "several runs in one table and one picture: gptlit compare checkpoints/base checkpoints/base-2",
    "export": "transformers, ONNX, llama.cpp or nanoGPT: gptlit export --ckpt_path checkpoints/base --output gpt",
    "play": "models as an interactive page in the browser: gptlit play --ckpt_path checkpoints/base",
    "completion": "a script for bash or zsh that completes all this: gptlit completion bash",
}
