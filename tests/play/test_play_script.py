"""The page's JavaScript against PyTorch, in Node: forward pass, reading, sampling, tokenizers."""

import random

import pytest
import torch
from hypothesis import given as any_of
from hypothesis import settings
from hypothesis import strategies as st
from node import (
    DESCRIBE,
    POSITIONS,
    SWITCHES,
    assert_equals_pytorch,
    needs_node,
    packed,
    random_ids,
    random_model,
    run_script,
)

from gptlit.generation import Sampling, generate
from gptlit.generation.generate import distribution
from gptlit.model import GPT, GPTConfig
from gptlit.play.pack import pack_tokenizer
from gptlit.tokenizer import BPETokenizer, CharTokenizer

pytestmark = needs_node
READ = f"""
{DESCRIBE}
const reading = new Reading(new Model(given.spec, given.base64));
given.ids.forEach((id) => reading.push(id));
result = describe(reading);
"""
TEXTS = [
    "",
    " ",
    "\n\n",
    "To be, or not to be: that's it!",
    "naïve  café\t12 345\u00a0x",
    "你好，世界",
    "سلام دنیا",
    "👩‍👩‍👧 ok",
]


@pytest.fixture(params=list(SWITCHES.values()), ids=list(SWITCHES))
def model(request: pytest.FixtureRequest) -> GPT:
    """A model of every dialect and with every switch."""
    return random_model(GPTConfig(**request.param))


def test_logits_surprise_rank_and_attention_equal_pytorch_at_200_positions(model: GPT) -> None:
    """Over several windows, so that the cache and its beginning again are covered."""
    ids = random_ids(model, POSITIONS)
    assert_equals_pytorch(model, ids, run_script(READ, {**packed(model), "ids": ids}))


def test_a_text_that_is_shortened_and_changed_reads_as_if_it_were_new(model: GPT) -> None:
    """Guards the cache that edits of the text reuse."""
    ids = random_ids(model, 60)
    result = run_script(
        """
        const model = new Model(given.spec, given.base64);
        const read = (reading, ids) => ids.forEach((id) => reading.push(id));
        result = [59, 40, 17, 16, 15, 3, 1, 0].map((kept) => {
          const edited = new Reading(model), fresh = new Reading(model), rest = given.ids.slice(0, 30);
          read(edited, given.ids);
          edited.truncate(kept);
          read(edited, rest);
          read(fresh, [...given.ids.slice(0, kept), ...rest]);
          const pairs = fresh.states.map((state, i) => state.map((x, c) => Math.abs(x - edited.states[i][c])));
          const attention = fresh.attention.every(({ start }, i) => start === edited.attention[i].start);
          const furthest = Math.max(...pairs.map((pair) => Math.max(...pair)));
          return [furthest, attention, edited.length, fresh.numbers === edited.numbers];
        });
        """,
        {**packed(model), "ids": ids},
    )
    assert [difference < 1e-9 for difference, *_ in result] == [True] * 8
    assert [rest for _, *rest in result] == [[True, kept + 30, True] for kept in (59, 40, 17, 16, 15, 3, 1, 0)]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.8, top_k=20, top_p=0.9)], ids=str)
@pytest.mark.parametrize("length", [5, 16, 17, 60])
def test_sampled_text_equals_that_of_generate(model: GPT, sampling: Sampling, length: int) -> None:
    """Token for token, with the same seed, over three windows; also after a prompt longer than the context."""
    prompt, count = random_ids(model, length), 3 * model.config.block_size
    expected = [int(ids) for ids in generate(model, [prompt], count, sampling, seed=42, context="rolling")]
    sampled = run_script(
        """
        const reading = new Reading(new Model(given.spec, given.base64)), random = new PythonRandom('42/0');
        given.prompt.forEach((id) => reading.push(id));
        reading.beginWindow();
        result = [];
        while (result.length < given.count) {
          const probabilities = distribution(reading.logits(reading.length - 1), given.sampling);
          result.push(draw(probabilities, random.random()));
          reading.push(result.at(-1));
        }
        """,
        {**packed(model), "prompt": prompt, "count": count, "sampling": as_script(sampling)},
    )
    assert sampled == expected


def test_samples_that_become_part_of_the_text_are_read_as_if_it_were_new(model: GPT) -> None:
    """The numbers of a text do not depend on where samples of it began, even twice."""
    ids = random_ids(model, 70)
    result = run_script(
        """
        const model = new Model(given.spec, given.base64);
        const read = (reading, ids) => ids.forEach((id) => reading.push(id));
        const sampled = new Reading(model), fresh = new Reading(model);
        read(sampled, given.ids.slice(0, 37));
        sampled.beginWindow();
        read(sampled, given.ids.slice(37, 51));
        sampled.beginWindow();
        read(sampled, given.ids.slice(51));
        sampled.truncate(60);
        sampled.forgetSamples();
        const known = sampled.length;
        read(sampled, given.ids.slice(known));
        read(fresh, given.ids);
        const pairs = fresh.states.map((state, i) => state.map((x, c) => Math.abs(x - sampled.states[i][c])));
        const alike = (name) => JSON.stringify(fresh[name]) === JSON.stringify(sampled[name]);
        const furthest = Math.max(...pairs.map((pair) => Math.max(...pair)));
        result = [furthest, alike('starts'), fresh.numbers === sampled.numbers, known];
        """,
        {**packed(model), "ids": ids},
    )
    difference, *rest = result
    assert difference < 1e-9
    assert rest[:2] == [True, True]
    assert rest[2] == (60 if model.config.block_size == 1 else 36)


def as_script(sampling: Sampling) -> dict[str, float | None]:
    """The settings under the names of the script."""
    names = {"temperature": "temperature", "topK": "top_k", "topP": "top_p", "minP": "min_p"}
    return {name: getattr(sampling, field) for name, field in names.items()}


def test_the_distribution_equals_that_of_generate_with_every_filter() -> None:
    """Alone and together, with ties among the logits."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64).mul(3)
    logits[5] = logits[9] = logits.max()
    temperatures, ks, ps, ms = (0.0, 0.3, 1.0, 2.0), (None, 1, 2, 7), (None, 0.5, 1.0), (None, 0.0, 0.1)
    cases = [Sampling(t, k, p, m) for t in temperatures for k in ks for p in ps for m in ms]
    result = run_script(
        "result = given.cases.map((c) => Array.from(distribution(Float64Array.from(given.logits), c)));",
        {"logits": logits.tolist(), "cases": [as_script(case) for case in cases]},
    )
    for case, found in zip(cases, result, strict=True):
        expected = distribution(logits[None], case)[0]
        assert torch.allclose(torch.tensor(found, dtype=torch.float64), expected, atol=1e-12), case


def test_random_numbers_equal_those_of_python() -> None:
    """For seeds of any length, past the first 624 words of the generator."""
    seeds = ["0/0", "1337/0", "42/7", "x" * 300, "é你"]
    result = run_script(
        """
        const numbers = (stream) => Array.from({ length: 700 }, () => stream.random());
        result = given.map((seed) => numbers(new PythonRandom(seed)));
        """,
        seeds,
    )
    for seed, numbers in zip(seeds, result, strict=True):
        stream = random.Random(seed)
        assert numbers == [stream.random() for _ in range(700)]


def test_float16_weights_are_those_of_torch() -> None:
    """Normal, subnormal and negative numbers."""
    model = random_model(GPTConfig(vocab_size=5, n_layer=0, n_embd=4, position="none"))
    table = model.lm_head.weight.data.flatten()
    table[:6] = torch.tensor([65504.0, -1e-7, 6e-5, 0.0, -0.1, 3.14159])
    half = packed(model, "float16")
    result = run_script("result = Array.from(new Model(given.spec, given.base64).head);", half)
    assert result == table.half().double().tolist()


@pytest.fixture(scope="module", params=["gptlit", "GPT-2"])
def bpe(request: pytest.FixtureRequest) -> BPETokenizer:
    """A byte-level BPE that merges some words and some parts of characters; with either pattern for words."""
    trained = BPETokenizer.train("to be or not to be, that's the question 你好你好 سلام नमस्ते naïve 12 12 " * 3, 320)
    if request.param == "gptlit":
        return trained
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return BPETokenizer({**trained.definition, "pre_tokenizer": by_bytes})


@settings(max_examples=30, deadline=None)
@any_of(texts=st.lists(st.text(), min_size=20, max_size=20))
def test_bpe_finds_the_tokens_of_the_tokenizers_library(bpe: BPETokenizer, texts: list[str]) -> None:
    """On any text, and back to the text."""
    texts = [*TEXTS, *(text.encode("utf-8", "ignore").decode() for text in texts)]
    result = run_script(
        """
        const tokenizer = makeTokenizer(given.tokenizer);
        result = given.texts.map((text) => {
          const tokens = tokenizer.encode(text), decode = tokenizer.decoder();
          return [tokens.map(({ id }) => id), tokens.map(({ id }) => decode(id)).join(''), tokens.at(-1)?.end ?? 0,
            tokens.reduce((n, { id }) => n + tokenizer.characters[id], 0), Array.from(text).length, text.length];
        });
        """,
        {"tokenizer": pack_tokenizer(bpe), "texts": texts},
    )
    for text, (ids, decoded, end, counted, characters, units) in zip(texts, result, strict=True):
        assert ids == bpe.encode(text), text
        assert (decoded, end, counted) == (text, units, characters)


def test_added_tokens_of_a_bpe_are_found_in_the_text(bpe: BPETokenizer) -> None:
    """As in a vocabulary that was imported with GPT-2."""
    definition = bpe.definition
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition["added_tokens"] = [{"id": bpe.vocab_size, "content": "<|end|>", **fields}]
    tokenizer = BPETokenizer(definition)
    text = "to be<|end|> or <|end|"
    given = {"tokenizer": pack_tokenizer(tokenizer), "text": text}
    ids = run_script("result = makeTokenizer(given.tokenizer).encode(given.text).map(({ id }) => id);", given)
    assert bpe.vocab_size in ids
    assert ids == tokenizer.encode(text)


def test_characters_outside_the_vocabulary_are_marked_with_their_place() -> None:
    """Also those of two UTF-16 units."""
    given = pack_tokenizer(CharTokenizer("ab👩"))
    tokens = run_script("result = makeTokenizer(given).encode('a👩é😀b');", given)
    assert [(token["id"], token["start"], token["end"]) for token in tokens] == [
        (0, 0, 1), (2, 1, 3), (-1, 3, 4), (-1, 4, 6), (1, 6, 7),
    ]  # fmt: skip
