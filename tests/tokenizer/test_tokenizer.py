"""Tokenizers are lossless for any text, fast paths equal the plain ones, and vocabularies survive their JSON."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlit.errors import UserError
from gptlit.tokenizer import BPETokenizer, CharTokenizer, from_json
from gptlit.tokenizer.bpe import SAFE_CUT, SLICE

VERSE = "Speak, speak.\nFirst, you know: résumé — naïve 日本語 😀\n\n  twice  spaced\r\nend"


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([VERSE * 20], vocab_size=300, source="verse")


@settings(deadline=None)
@given(text=st.text(min_size=1))
def test_characters_decode_to_the_same_text(text: str) -> None:
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "".join(tokenizer.decode_stream(tokenizer.encode(text))) == text


@settings(deadline=None)
@given(text=st.text())
def test_bpe_decodes_to_the_same_text_even_for_unseen_text(bpe: BPETokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert "".join(bpe.decode_stream(ids)) == text


@settings(deadline=None)
@given(text=st.text(min_size=1))
def test_a_tokenizer_survives_its_json(text: str) -> None:
    """JSON joins two halves of a surrogate pair, and loses the order of a set."""
    tokenizer = CharTokenizer.train(text, source="a play")
    again = from_json(tokenizer.to_json())
    assert again == tokenizer
    assert again.encode(text) == tokenizer.encode(text)
    assert again.source == "a play"


def test_a_bpe_survives_its_json(bpe: BPETokenizer) -> None:
    again = from_json(bpe.to_json())
    assert again == bpe
    assert again.encode(VERSE) == bpe.encode(VERSE)
    assert (again.kind, again.source, again.vocab_size) == ("bpe", "verse", bpe.vocab_size)


def test_characters_are_sorted_so_the_same_text_always_gives_the_same_ids() -> None:
    tokenizer = CharTokenizer.train("hello\nworld")
    assert "".join(tokenizer.symbols) == "\ndehlorw"
    assert tokenizer.encode("hold\n") == [3, 5, 4, 1, 0]


def test_a_vocabulary_can_be_learned_from_pieces() -> None:
    assert CharTokenizer.train(["hel", "lo\n", "world"]) == CharTokenizer.train("hello\nworld")


@settings(deadline=None)
@given(text=st.text(min_size=1, max_size=50))
def test_the_vectorised_path_gives_the_ids_of_the_plain_one(text: str) -> None:
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_the_vectorised_path_works_across_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptlit.tokenizer.characters.BLOCK", 7)
    tokenizer = CharTokenizer.train(VERSE)
    assert tokenizer.encode_array(VERSE).tolist() == tokenizer.encode(VERSE)
    with pytest.raises(UserError, match="line 5, column 4"):
        tokenizer.encode_array(VERSE + "%")


@pytest.mark.parametrize(("symbols", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_ids_are_as_narrow_as_the_vocabulary_allows(symbols: int, dtype: str) -> None:
    """One character too many for the type would wrap around to id 0, an unknown one too."""
    vocabulary = [chr(0x10000 + i) for i in range(symbols)]
    tokenizer = CharTokenizer(vocabulary)
    ids = tokenizer.encode_array(vocabulary[-1])
    assert ids.dtype == np.dtype(dtype)
    assert ids.tolist() == [symbols - 1]
    with pytest.raises(UserError):
        tokenizer.encode_array(vocabulary[-1] + chr(0x10000 + symbols))


def test_an_unknown_character_is_named_with_its_place_and_the_remedy() -> None:
    tokenizer = CharTokenizer.train("abc\n", source="tinyshakespeare")
    with pytest.raises(UserError) as caught:
        tokenizer.encode("abc\nabéc€é")
    message = str(caught.value)
    assert "'\\xe9' (U+00E9, LATIN SMALL LETTER E WITH ACUTE) at line 2, column 3" in message
    assert "1 other character " in message
    assert "tinyshakespeare (4 characters)" in message
    assert "--unknown skip" in message
    assert "--unknown replace:C" in message
    assert message.isascii(), "every terminal must be able to print it"
    assert "\n" not in message


def test_the_vectorised_path_refuses_every_unknown_character() -> None:
    """A character beyond the highest one must not wrap around to a known one."""
    tokenizer = CharTokenizer("ab")
    for code in (*range(ord("a")), *range(ord("c"), 700), 0xFFFF, 0x10FFFF):
        with pytest.raises(UserError):
            tokenizer.encode_array(chr(code))


def test_errors_of_training_texts_name_no_flag_of_prompts() -> None:
    with pytest.raises(UserError, match="U\\+0021") as caught:
        CharTokenizer("ab").encode_array("ab!")
    assert "--unknown" not in str(caught.value)


def test_unknown_characters_can_be_skipped_or_replaced() -> None:
    tokenizer = CharTokenizer.train("abc?")
    assert tokenizer.decode(tokenizer.encode("aébéc", unknown="skip")) == "abc"
    assert tokenizer.decode(tokenizer.encode("aébéc", unknown="replace:?")) == "a?b?c"


@pytest.mark.parametrize("unknown", ["ignore", "replace", "replace:", "replace:ab", "replace:z", ""])
def test_an_invalid_unknown_setting_is_refused_even_when_all_characters_are_known(unknown: str) -> None:
    with pytest.raises(UserError, match="--unknown"):
        CharTokenizer("abc").encode("abc", unknown=unknown)


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_id_out_of_range_is_refused(bad: int) -> None:
    """Python would read -1 as the last character."""
    tokenizer = CharTokenizer("abc")
    with pytest.raises(UserError, match=f"token id {bad} .* 0 to 2"):
        tokenizer.decode([0, bad, 1])
    with pytest.raises(UserError, match=f"token id {bad}"):
        list(tokenizer.decode_stream([0, bad]))


def test_a_bpe_id_out_of_range_is_refused(bpe: BPETokenizer) -> None:
    for bad in (-1, bpe.vocab_size):
        with pytest.raises(UserError, match=f"token id {bad}"):
            bpe.decode([bad])


@pytest.mark.parametrize(
    ("symbols", "words"), [("", "empty"), ("aba", "twice"), (["ab", "c"], "single"), ("a\ud800", "surrogate")]
)
def test_invalid_vocabularies_are_refused(symbols: str | list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CharTokenizer(symbols)


@settings(deadline=None)
@given(text=st.text(min_size=1))
def test_characters_and_bytes_of_the_tokens_add_up_to_those_of_the_text(bpe: BPETokenizer, text: str) -> None:
    """Bits per character are wrong if a character of several tokens is counted more than once."""
    for tokenizer in (bpe, CharTokenizer.train(text)):
        lengths = tokenizer.chars_per_token()
        assert len(lengths) == tokenizer.vocab_size
        assert sum(lengths[i] for i in tokenizer.encode(text)) == len(text)
        sizes = tokenizer.bytes_per_token()
        assert len(sizes) == tokenizer.vocab_size
        assert sum(sizes[i] for i in tokenizer.encode(text)) == len(text.encode())


def test_a_stream_waits_for_complete_characters(bpe: BPETokenizer) -> None:
    """Printed token by token, an emoji without merges would become four replacement characters."""
    ids = bpe.encode("a\U0001f9ed")
    assert len(ids) > 2, "the emoji is spread over several tokens"
    assert list(bpe.decode_stream(ids)) == ["a", "\U0001f9ed"]
    assert list(bpe.decode_stream(ids[:-1])) == ["a", "\ufffd"]


def test_a_stream_gives_text_before_the_ids_end(bpe: BPETokenizer) -> None:
    def endless():
        yield from bpe.encode("ab")
        raise AssertionError("asked for more ids than the text needs")

    assert next(iter(bpe.decode_stream(endless()))).startswith("a")


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 255)))
def test_decode_stream_equals_decode_even_for_bytes_that_are_not_utf8(bpe: BPETokenizer, ids: list[int]) -> None:
    assert "".join(bpe.decode_stream(ids)) == bpe.decode(ids)


def test_a_bpe_has_the_requested_size_and_shortens_the_text(bpe: BPETokenizer) -> None:
    assert bpe.vocab_size == 300
    assert len(bpe.encode(VERSE)) < len(VERSE.encode()) / 2


def test_learning_a_bpe_is_deterministic_across_processes() -> None:
    """Hash seeds differ between processes; merges of equal count must not depend on them."""
    program = (
        "from gptlit.tokenizer import BPETokenizer\n"
        "print(BPETokenizer.train(['the theatre there then ' * 3 + 'abcdefgh' * 3], 290).to_json())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1


def test_a_bpe_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="256"):
        BPETokenizer.train([VERSE], vocab_size=255)


words = st.lists(
    st.tuples(st.text("abé'日1.!", min_size=1, max_size=6), st.sampled_from([" ", "\n", "  ", "\n\n", " \n", "\r\n"]))
)


@pytest.fixture(scope="module")
def llama() -> BPETokenizer:
    """A BPE with the pattern of Llama 3, where line ends belong to the full stop before them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    library.train_from_iterator(["end.\nstop!\n\na b  a  b\n a\r\nb." * 20], trainer)
    return BPETokenizer(json.loads(library.to_str()))


@settings(max_examples=200, deadline=None)
@given(parts=words)
def test_a_text_cut_between_words_has_the_tokens_of_the_whole(
    bpe: BPETokenizer, llama: BPETokenizer, parts: list[tuple[str, str]]
) -> None:
    """Large texts are encoded in slices; a cut inside a run of blanks or a word would change the ids."""
    text = "".join(word + gap for word, gap in parts)
    for tokenizer in (bpe, llama):
        for cut in SAFE_CUT.finditer(text):
            parted = tokenizer.encode(text[: cut.start()]) + tokenizer.encode(text[cut.start() :])
            assert parted == tokenizer.encode(text)


@pytest.fixture(scope="module")
def superwords() -> BPETokenizer:
    """A BPE without a pattern, whose tokens span spaces and line ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator([VERSE * 5, "of the end. " * 9], trainer)
    return BPETokenizer(json.loads(library.to_str()))


def test_the_array_of_a_bpe_equals_encode(bpe: BPETokenizer, llama: BPETokenizer, superwords: BPETokenizer) -> None:
    """On texts of many slices; merges across spaces included, where no cut is safe."""
    text = (VERSE + " of the end.") * (3 * SLICE // len(VERSE))
    assert [tokenizer.splits_words for tokenizer in (bpe, llama, superwords)] == [True, True, False]
    for tokenizer in (bpe, llama, superwords):
        ids = tokenizer.encode_array(text)
        assert ids.dtype == np.uint16
        assert ids.tolist() == tokenizer.encode(text)
        assert tokenizer.encode_array("").tolist() == []
    assert superwords.encode("of the end.") == superwords.encode_array("of the end.").tolist()
    assert any(" " in superwords.decode([i])[1:-1] for i in superwords.encode(text)), "a token spans a space"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("नमस्ते दुनिया", ["नमस्ते", " दुनिया"]),  # Devanagari: vowel signs and a virama
        ("வணக்கம் உலகம்", ["வணக்கம்", " உலகம்"]),  # Tamil
        ("السَّلامُ عَلَيْكُم", ["السَّلامُ", " عَلَيْكُم"]),  # vocalised Arabic
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # Persian with a joiner
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("don't 12 \u2764\ufe0f!", ["don", "'t", " 12", " \u2764\ufe0f!"]),  # and all else as GPT-2 does
        ("a  b\n\n c", ["a", " ", " b", "\n\n", " c"]),
    ],
)
def test_combining_marks_stay_with_their_letters(bpe: BPETokenizer, text: str, words: list[str]) -> None:
    """Otherwise no token can span a vowel sign: two to three times as many tokens."""
    pre_tokenizer = bpe._bpe.pre_tokenizer  # the words are visible nowhere else
    assert [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)] == words


def test_learning_cuts_very_long_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library needs time quadratic in the longest word: minutes for a genome on one line."""
    from gptlit.tokenizer.bpe import LONGEST_WORD, without_long_words

    genome = "acgt" * LONGEST_WORD
    for text in (genome, f"a {genome} b\n{genome}", "no long word", ""):
        pieces = list(without_long_words(text))
        assert "".join(pieces) == text
        assert max((len(word) for piece in pieces for word in piece.split()), default=0) <= LONGEST_WORD
    assert list(without_long_words("no long word")) == ["no long word"]
    assert len(BPETokenizer.train([genome], 260).encode(genome)) <= len(genome) / 2


def test_a_tokenizer_of_an_older_version_still_loads_with_its_own_words() -> None:
    """Version 0.1.0 learned with GPT-2's pattern; its checkpoints must give the same tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator([VERSE * 20], trainer)
    stored = json.dumps({"version": 1, "kind": "bpe", "source": "old", "definition": json.loads(library.to_str())})
    tokenizer = from_json(stored)
    for text in (VERSE, "नमस्ते"):
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.splits_words


def test_everything_in_a_tokenizer_file_that_changes_text_is_switched_off(tmp_path: Path) -> None:
    """Normalizers, prefix spaces, templates and truncation would each break the round trip."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    foreign = Tokenizer(models.BPE(dropout=0.5))
    foreign.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    foreign.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, show_progress=False, initial_alphabet=alphabet, special_tokens=["<é|end>"]
    )
    foreign.train_from_iterator([VERSE], trainer)
    foreign.post_processor = processors.TemplateProcessing(single="<é|end> $A", special_tokens=[("<é|end>", 0)])
    foreign.enable_truncation(4)
    foreign.save(str(tmp_path / "tokenizer.json"))

    tokenizer = BPETokenizer.from_file(tmp_path / "tokenizer.json")
    text = "E\u0301 UPPER 42<é|end>" + VERSE
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == tokenizer.encode(text), "dropout would choose other merges"
    assert 0 in tokenizer.encode(text), "the special token is one token"
    lengths = tokenizer.chars_per_token()
    assert sum(lengths[i] for i in tokenizer.encode(text)) == len(text)


def test_a_tokenizer_file_can_be_exchanged_with_the_library(bpe: BPETokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe.definition), encoding="utf-8")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(VERSE).ids == bpe.encode(VERSE)
    assert theirs.decode(bpe.encode(VERSE)) == VERSE
    assert BPETokenizer.from_file(tmp_path / "tokenizer.json") == bpe


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(UserError, match=r"tokenizer\.json is not a byte-level BPE"):
        BPETokenizer.from_file(path)

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    removes_blanks = Tokenizer(models.BPE(alphabet, []))
    removes_blanks.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    removes_blanks.save(str(path))
    with pytest.raises(UserError, match="does not give back every text"):
        BPETokenizer.from_file(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 1}', '{"model": {"type": "BPE", "vocab": {}}}'])
def test_a_file_that_is_not_a_tokenizer_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        BPETokenizer.from_file(path)
    with pytest.raises(UserError, match=r"nothing\.json"):
        BPETokenizer.from_file(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    "foreign",
    [
        "",
        "no json",
        "[]",
        "null",
        "{}",
        '{"kind": "char", "version": 1}',
        '{"kind": "char", "version": 1, "source": "", "symbols": 7}',
        '{"kind": "char", "version": 99, "source": "", "symbols": "ab"}',
        '{"kind": "word", "version": 1, "source": ""}',
        '{"kind": "bpe", "version": 1, "source": "", "definition": {}}',
    ],
)
def test_a_foreign_json_is_refused(foreign: str) -> None:
    with pytest.raises(UserError):
        from_json(foreign)


def test_importing_the_tokenizers_loads_neither_torch_nor_numpy_nor_the_library() -> None:
    program = "import sys, gptlit.tokenizer; print(*{'torch', 'numpy', 'tokenizers'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.split() == []


def test_the_real_text_has_the_vocabulary_of_the_lecture(tinyshakespeare: Path) -> None:
    text = tinyshakespeare.read_text(encoding="utf-8")
    tokenizer = CharTokenizer.train(text, source="tinyshakespeare")
    assert tokenizer.vocab_size == 65
    assert tokenizer.decode([0]) == "\n"
    assert tokenizer.encode("hii there") == [46, 47, 47, 1, 58, 46, 43, 56, 43]  # the example of the lecture
    ids = tokenizer.encode_array(text)
    assert (len(ids), ids.dtype) == (1_115_394, np.uint8)
    assert tokenizer.decode(ids.tolist()) == text
