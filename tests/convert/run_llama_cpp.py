"""Run a GGUF file in llama.cpp (the `xllamacpp` wheel). A script, since llama.cpp may end the process.

    python tests/convert/run_llama_cpp.py model.gguf < request.json > answer.json

The request has `text` (to tokenise), `windows` (lists of ids; the answer has log-probabilities at every position) and
`prompts` with `new` (ids to continue greedily). The cache is float32 and flash attention is off.
"""

import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def serve(path: str, context: int) -> Any:
    """Start llama.cpp's server in this process."""
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = context, 1, 1
    settings.warmup = settings.ctx_shift = False
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(settings)


def post(server: Any, path: str, body: dict[str, Any]) -> Any:
    """Return the answer of the server to a request."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request))


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    server = serve(sys.argv[1], request["context"])
    answer: dict[str, Any] = {"ids": post(server, "/tokenize", {"content": request["text"]})["tokens"]}
    plain = {"samplers": [], "temperature": 1.0, "n_predict": 1, "n_probs": request["vocab_size"]}
    answer["log_probabilities"] = []
    for window in request["windows"]:
        for length in range(1, len(window) + 1):
            found = post(server, "/completion", {"prompt": window[:length], **plain})
            top = found["completion_probabilities"][0]["top_logprobs"]
            answer["log_probabilities"].append([token["logprob"] for token in sorted(top, key=lambda t: t["id"])])
    greedy = {"temperature": 0.0, "n_predict": request["new"]}
    texts = (post(server, "/completion", {"prompt": prompt, **greedy}) for prompt in request["prompts"])
    answer["texts"] = [found["content"] for found in texts]
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
