"""A run as a Hugging Face folder: weights, configuration and tokenizer as transformers loads them, and a model card."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlit.checkpoint.atomic import atomic_folder
from gptlit.convert.huggingface import architecture_of, import_transformers, quiet_transformers, to_huggingface
from gptlit.convert.model_card import model_card
from gptlit.convert.pretrained import network_weights
from gptlit.errors import UserError
from gptlit.model.config import GPTConfig
from gptlit.model.gpt import GPT
from gptlit.tokenizer import CharTokenizer, Tokenizer, from_json

CHECKED_POSITIONS = 1000
LARGEST_DIFFERENCE = 1e-4  # of logits up to 1 in size; grows with them


@dataclass(frozen=True)
class Exported:
    """What `export_run` wrote, and how closely transformers computes the same."""

    folder: Path
    architecture: str
    positions: int
    """How many positions the two models were compared at."""
    largest_difference: float
    """Between the logits of the exported model, loaded from the folder, and ours."""


def export_run(checkpoint: Mapping[str, Any], output: Path, command: str = "") -> Exported:
    """Writes the model of a checkpoint to the new folder `output`, as `transformers` reads it. All of it or nothing.

    What was written is loaded again by transformers and compared with our model before the folder gets its name.

    Args:
        checkpoint: what `torch.load` gives of a run's file: plain types and tensors.
        output: folder to make; an empty one is taken as well.
        command: how the export was asked for; stands in the model card.

    Raises:
        UserError: when no architecture of transformers computes this function (names the switch), the weights are not
            finite, the folder holds something already or cannot be written, or transformers is missing.
    """
    hyper = checkpoint["hyper_parameters"]
    gpt, tokenizer = GPTConfig(**hyper["gpt"]), from_json(hyper["tokenizer"])
    architecture = architecture_of(gpt)
    transformers = import_transformers()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output} is there already and not empty: choose another name, or remove it")
    model = restore(gpt, checkpoint["state_dict"])
    config, weights = to_huggingface(model)
    try:
        with quiet_transformers(), atomic_folder(output) as folder:
            with torch.device("meta"):  # the weights that a new model draws would only be thrown away
                theirs = getattr(transformers, architecture)(config)
            theirs.load_state_dict(weights, assign=True)
            theirs.tie_weights()
            # Left alone, generate() takes the most probable symbol, and when told to draw, draws from the 50 best.
            theirs.generation_config = transformers.GenerationConfig(do_sample=True, top_k=0)
            theirs.save_pretrained(folder)
            fast_tokenizer(tokenizer, gpt.block_size).save_pretrained(folder)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
            positions, difference = compare(model, loaded)
            exported = Exported(output, architecture, positions, difference)
            training = checkpoint.get("gptlit", {}).get("config")
            if training:
                (folder / "gptlit.yaml").write_text(training, encoding="utf-8")
            card = model_card(checkpoint, model, tokenizer, output.name, architecture, (positions, difference), command)
            (folder / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: the folder cannot be written ({error.strerror or error})") from error
    return exported


def restore(gpt: GPTConfig, state_dict: Mapping[str, Tensor]) -> GPT:
    """The network of a checkpoint, in float32, for evaluation."""
    model = GPT(gpt)
    weights = network_weights(state_dict)
    model.load_state_dict(weights)
    broken = next((name for name, tensor in weights.items() if not bool(tensor.isfinite().all())), None)
    if broken:
        raise UserError(f"the weights of this checkpoint are not finite ({broken}): export an earlier one")
    return model.float().eval()


def fast_tokenizer(tokenizer: Tokenizer, block_size: int) -> Any:
    """Our tokenizer as a `PreTrainedTokenizerFast`: the same ids, and no special tokens.

    A character outside the vocabulary is an error there too.
    """
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    if isinstance(tokenizer, CharTokenizer):
        vocabulary = {symbol: i for i, symbol in enumerate(tokenizer.symbols)}
        # The library wants a token for the unknown; one that is no symbol makes an unknown character an error.
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=""))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    else:
        backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_max_length=block_size
    )


@torch.no_grad()
def compare(ours: GPT, theirs: Any) -> tuple[int, float]:
    """Positions compared, and the largest difference of the two models' logits over random ids.

    Raises:
        RuntimeError: when the difference is more than rounding.
    """
    gpt = ours.config
    rows = math.ceil(CHECKED_POSITIONS / gpt.block_size)
    ids = torch.randint(gpt.vocab_size, (rows, gpt.block_size), generator=torch.Generator().manual_seed(0))  # (B, T)
    expected = ours(ids)  # (B, T, V)
    difference = float((theirs.eval()(ids).logits - expected).abs().max())
    if not difference <= LARGEST_DIFFERENCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"the exported model computes something else: logits differ by {difference}")
    return ids.numel(), difference
