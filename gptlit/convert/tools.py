"""Texts of the model card: how to load each format, its limits, and the tools that exports were tried with."""

USAGE = {
    "transformers": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0]))
print(pipeline("text-generation", model=folder)({prompt!r})[0]["generated_text"])
```""",
    "transformers, one token": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer({prompt!r}, return_tensors="pt")
print(model(**prompt).logits.softmax(-1))  # of the token after the prompt
```""",
    "onnx": """```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession("model.onnx")
ids = np.array([tokenizer.encode({prompt!r}).ids])  # (batch, length), int64
logits = session.run(None, {{"input_ids": ids}})[0]  # (batch, length, vocabulary), float32
```""",
    "gguf": """```
llama-cli -m model.gguf -no-cnv --no-context-shift -c {block_size} -n {new} -p "..."
```""",
    "nanogpt": """In a checkout of nanoGPT, with this folder as EXPORT:

```
{copy}python sample.py --out_dir=EXPORT --device=cpu --max_new_tokens={new}
```""",
}
PADDED = (  # GGUF of a vocabulary with characters outside ASCII
    "The last {padding:,} tokens are beginnings of characters in UTF-8, with which llama.cpp refuses characters "
    "outside the vocabulary. It never samples them, but their logit is 0 and they take a share of the probabilities "
    "that it reports: at each position, log-probabilities of all other tokens are lower than in gptlit by one amount."
)
TIED = (
    "The head is the token embedding: merging a LoRA adapter of `wte` (peft's `merge_and_unload`) changes both, which "
    "gives another model than the one that was trained. Leave `wte` out of the adapters."
)
LIMITS = {
    "all": ["Prompt and continuation together: at most {block_size:,} tokens."],
    "GPT2LMHeadModel": [
        "No token ends a text: `max_new_tokens` or `max_length` does.",
        "By default `generate` samples from the model's own distribution; `do_sample=False` is greedy.",
    ],
    "NanoChatForCausalLM": [
        "No token ends a text: `max_new_tokens` or `max_length` does.",
        "By default `generate` samples from the model's own distribution; `do_sample=False` is greedy.",
        "transformers does not enforce the context: beyond {block_size:,} tokens the text degrades without an error.",
    ],
    "onnx": [
        "A longer input fails with an index error: the bound is part of the graph. There is no key-value cache.",
        "For int8 use `onnxruntime.quantization.matmul_nbits_quantizer.MatMulNBitsQuantizer(model, bits=8, "
        "block_size=32)`, which rounds the weights only. `quantize_dynamic` also rounds activations, with one scale "
        "for all of them: the logits of a token then depend on later tokens and on the other texts of the batch.",
        "MNN 3.6.1 gives models with QK-norm other logits, without an error: use another runtime.",
    ],
    "gguf": [
        "llama.cpp rounds the context up to a multiple of 256; if {block_size:,} is not one, limit the number of new "
        "tokens yourself. Switch context shift off: positions are learned.",
        "llama.cpp computes the tanh approximation of GELU through a float16 table.",
    ],
    "nanogpt": [
        "nanoGPT crops a longer text to the last {block_size:,} tokens.",
        "There is no optimizer state: train.py cannot resume from it.",
    ],
}
# Of trained models: tests/benchmarks/README.md, section Exchange (2026-11-29 and 30).
TRIED: dict[str, list[tuple[str, str, str]]] = {
    "GPT2LMHeadModel": [
        ("transformers 5.24.0", "logits to 1e-5, greedy text, pipeline", ""),
        ("transformers 4.57.6", "logits to 1e-5, greedy text, pipeline", ""),
    ],
    "NanoChatForCausalLM": [
        ("transformers 5.24.0", "logits to 1e-4, greedy text, pipeline", "transformers 5: 4.57 has no NanoChat"),
    ],
    "onnx": [
        ("onnxruntime 1.32.0", "logits to 1e-5, greedy text", ""),
        (
            "openvino 2026.4.1",
            "logits to 1e-5, greedy text",
            "INFERENCE_PRECISION_HINT f32: by default it rounds to bfloat16 on a CPU that has it",
        ),
        ("tract 0.23.9", "logits to 1e-5", ""),
    ],
    "gguf": [
        (
            "xllamacpp 2026.10.11549 (llama.cpp)",
            "ids, greedy text, log-probabilities to 5e-4 (tanh GELU) or 2e-3 (exact GELU)",
            "a float32 cache and no flash attention for these figures; a prompt of at most the context minus one",
        ),
    ],
    "nanogpt": [("nanoGPT 3adf61e, sample.py, torch 2.13", "greedy text", "meta.pkl in its data folder")],
}
