"""The options of `gptlit fit`, `validate` and `test`."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import set_dumper
from lightning.pytorch.cli import LightningArgumentParser

from gptlit.callbacks.averaging import AverageWeights
from gptlit.callbacks.pictures import Pictures
from gptlit.callbacks.samples import SampleText
from gptlit.cli.fit.precision import PRECISION
from gptlit.cli.fit.trainer_settings import options_left_out
from gptlit.cli.fit.unused import DATA_OF_FIT, MODEL_OF_FIT
from gptlit.cli.help import TRAINER, help_text
from gptlit.cli.parser import TextsAsTyped
from gptlit.cli.settings import as_yaml
from gptlit.data import TextDataModule
from gptlit.errors import settings_under
from gptlit.model.config import GPTConfig
from gptlit.optim import OptimizerConfig, ScheduleConfig
from gptlit.training.module import LitGPT


class FitParser(TextsAsTyped, LightningArgumentParser):
    """Lightning's parser, with texts taken as typed, and gptlit's settings first in the help."""

    def format_help(self, formatter: Any = None) -> str:
        """Return the text of `--help`."""
        return help_text(self)


@cache
def make_parser(verb: str) -> FitParser:
    """The parser of `fit`, `validate` or `test`: Trainer, model, data, and the options of a run.

    It is built once per process, which takes a second.
    """
    set_dumper("yaml", as_yaml)  # PyYAML writes the text 1e5 as a number, in nested classes too
    parser = FitParser(prog=f"gptlit {verb}", description=DESCRIPTIONS[verb], exit_on_error=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file, or the name of a packaged configuration.")
    parser.add_argument("--seed_everything", type=int, default=1337, help="Fixes weights, batches and dropout.")
    parser.add_class_arguments(
        pl.Trainer,
        "trainer",
        instantiate=False,
        fail_untyped=False,
        sub_configs=True,
        skip={*options_left_out(verb), "precision"},
    )
    parser.add_argument("--trainer.precision", type=PRECISION, default=None, help=TRAINER["precision"])
    of_fit = (set(), set()) if verb == "fit" else (MODEL_OF_FIT, DATA_OF_FIT[verb])
    for kind, group, skip in zip((LitGPT, TextDataModule), ("model", "data"), of_fit, strict=True):
        parser.add_class_arguments(kind, group, fail_untyped=False, sub_configs=True, skip=skip)
    parser.link_arguments("model.gpt.block_size", "data.block_size")
    parser.link_arguments("seed_everything", "data.seed")
    parser.link_arguments("seed_everything", "model.seed")
    if verb == "fit":
        parser.add_argument("--run_dir", type=str | None, default=None, help="Folder of the run.")
        parser.add_argument(
            "--save_every_n_steps", type=int, default=100, help="Optimizer steps between writes of last.ckpt."
        )
        parser.add_argument("--threads", type=int | None, default=None, help=THREADS)
        parser.add_argument("--fallback_epochs", type=float, default=5.0, help=FALLBACK_EPOCHS)
        parser.add_class_arguments(SampleText, "sample_text", skip={"run_dir"}, instantiate=False)
        parser.add_class_arguments(AverageWeights, "average", instantiate=False)
        parser.add_class_arguments(Pictures, "pictures", instantiate=False)
    if verb == "validate":
        parser.add_argument("--report", type=Literal["none", "full"], default="none", help=REPORT)
        parser.add_argument("--report_stride", type=int, default=0, help=STRIDE)
    for kind, group in GROUPS.items():
        parser.add_instantiator(partial(instantiate_in, group), kind)
    parser.add_argument("--ckpt_path", type=str | None, default=None, help=CKPT_PATH[verb])
    return parser


def instantiate_in(group: str, kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make an object of settings; its errors name the settings in full, as in `model.gpt.n_head`."""
    with settings_under(group):
        return kind(*args, **kwargs)


GROUPS: dict[type, str] = {
    LitGPT: "model",
    GPTConfig: "model.gpt",
    OptimizerConfig: "model.optimizer",
    ScheduleConfig: "model.schedule",
    TextDataModule: "data",
}
DESCRIPTIONS = {
    "fit": "Train a model, or resume a run.",
    "validate": "Exact loss over the validation part of the text.",
    "test": "Exact loss over the validation part of the text, printed as test/….",
}
REPORT = (
    "full prints a table of measures that published losses use: the whole validation part, each half of it, a sliding "
    "window and nanoGPT's estimate over random batches, in nats per token and in bits per character and byte."
)
STRIDE = "Predictions that each sliding window of the report counts; 0 takes half of block_size."
THREADS = (
    "CPU threads. null, in a new run on a CPU, measures at the start whether one or all are faster; OMP_NUM_THREADS is "
    "obeyed. A resumed run uses the number of its start, since another one may round differently."
)
FALLBACK_EPOCHS = (
    "Passes over the text if data.fallback replaces the corpus: shortens trainer.max_steps, unless that is given as a "
    "flag. 0 does not shorten."
)
CKPT_PATH = {
    "fit": "Run folder (its newest checkpoint) or checkpoint file to resume from.",
    "validate": "Run folder (its best.ckpt) or checkpoint file.",
    "test": "Run folder (its best.ckpt) or checkpoint file.",
}
