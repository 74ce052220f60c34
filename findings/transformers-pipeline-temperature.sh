#!/usr/bin/env bash
# transformers 4.57.6: pipeline("text-generation") ignores the temperature of generation_config.json.
# expected: the model's generation config wins over the pipeline's defaults (a comment in pipelines/base.py says so),
#           so a model saved with temperature 1.3 is sampled at 1.3.
# seen:     it is sampled at the pipeline's 0.7, while max_length, do_sample and top_k of the same file are obeyed.
#           5.24.0 samples at 1.3. `task_specific_params` in config.json are obeyed by both.
# usage:    findings/transformers-pipeline-temperature.sh      (PYTHON=python3.11 to choose another interpreter)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==4.57.6 torch==2.13.0 numpy
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import transformers
from tokenizers import Tokenizer, decoders, models

config = transformers.GPT2Config(vocab_size=3, n_positions=64, n_embd=8, n_layer=1, n_head=1, eos_token_id=None)
model = transformers.GPT2LMHeadModel(config)
model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=1.3, top_k=0, max_length=16)
model.save_pretrained("model")
letters = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
letters.decoder = decoders.Fuse()
transformers.PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained("model")

pipe = transformers.pipeline("text-generation", model="model")
length = len(pipe("abc")[0]["generated_text"])
found = pipe.generation_config
print(f"transformers {transformers.__version__}: in the file 1.3, used {found.temperature}; text of {length} tokens")
raise SystemExit(0 if (found.temperature, found.top_k, length) == (0.7, 0, 16) else "the behaviour has changed")
PYTHON
