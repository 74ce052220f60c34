"""Token files: the same ids as in memory, resumed after interruptions, and damage is detected."""

import gzip
import json
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlit import BPETokenizer, CharTokenizer, GPTConfig, LitGPT, OptimizerConfig, TextDataModule, UserError
from gptlit.data import EncodedText, RandomChunks, TextSpec, TokenFile, ValidationWindows, encode_text
from gptlit.data.cache import read_record, write_record
from gptlit.data.tokens import DamagedFileError, TokenWriter

VERSE = "To learn a tongue, one letter at a time,\nIs all the craft — naïve — behind this rhyme. 日本\n"
TEXT = "".join(f"{number}. {VERSE}" for number in range(300))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gptlit" / "tokens"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is too long for memory, and read in many pieces."""
    monkeypatch.setattr("gptlit.data.encode.IN_MEMORY_CHARACTERS", {"char": 0, "bpe": 0})
    monkeypatch.setattr("gptlit.data.corpus.streams.READ_BYTES", 4000)
    monkeypatch.setattr("gptlit.data.corpus.load.PIECE", 2000)
    monkeypatch.setattr("gptlit.data.tokens.SAVE_SECONDS", 0.0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text in a file."""
    path = tmp_path / "rhyme.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def encoded(corpus: Path | str, kind: str = "char", **more: object) -> EncodedText:
    """Encode a text with a tokenizer made from it."""
    return encode_text(TextSpec(str(corpus), **more), None, kind, 300)  # type: ignore[arg-type]


def ids(tokens: object) -> np.ndarray:
    """Return all ids of a part, however it is stored."""
    return np.asarray(tokens[np.arange(len(tokens))])  # type: ignore[arg-type, index]


def the_file(cache: Path) -> Path:
    """Return the only token file in the cache."""
    (path,) = cache.glob("*.tokens")
    return path


def write(path: Path, parts: list[list[int]], dtype: str = "uint16") -> Path:
    """Write a token file of two parts, each in pieces of seven ids."""
    with TokenWriter(path, dtype) as writer:
        for part, content in enumerate(parts):
            for start in range(0, len(content), 7):
                writer.append(part, np.array(content[start : start + 7], dtype))
        writer.finish()
    return path


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_ids_can_be_read_at_any_position(tmp_path: Path, dtype: str) -> None:
    """Of both parts and every width: guards against an offset that is off by a part or by a byte."""
    top = np.iinfo(dtype).max
    train, val = [int(top) - i % 200 for i in range(1000)], [i % 200 for i in range(100)]
    file = TokenFile(write(tmp_path / "a.tokens", [train, val], dtype))
    assert [len(part) for part in file.parts] == [1000, 100]
    positions = np.random.default_rng(1).integers(0, 100, (20, 30))
    for part, content in zip(file.parts, (train, val), strict=True):
        assert np.array_equal(ids(part), content)
        assert np.array_equal(part[positions], np.array(content)[positions])
        for outside in (-1, len(content)):
            with pytest.raises(IndexError):
                part[np.array([outside])]


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_is_detected(tmp_path_factory: pytest.TempPathFactory, place: float, bit: int) -> None:
    """In the ids, the table of checksums, the description or its frame."""
    path = write(tmp_path_factory.mktemp("flip") / "a.tokens", [list(range(300)), list(range(40))])
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(DamagedFileError):
        TokenFile(path)


@given(kept=st.floats(0, 1, exclude_max=True))
@settings(max_examples=30, deadline=None)
def test_a_file_cut_short_anywhere_is_detected(tmp_path_factory: pytest.TempPathFactory, kept: float) -> None:
    """And so is one with bytes missing at the beginning, or added at the end."""
    path = write(tmp_path_factory.mktemp("cut") / "a.tokens", [list(range(300)), list(range(40))])
    content = path.read_bytes()
    cut = int(kept * len(content))
    for damaged in (content[:cut], content[len(content) - cut :], content + content[: cut + 1]):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            TokenFile(path)


def test_damage_outside_the_spot_checks_is_detected_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening checks a few blocks only; no id of the others is returned unchecked."""
    monkeypatch.setattr("gptlit.data.tokens.BLOCK", 64)
    monkeypatch.setattr("gptlit.data.tokens.SPOT_CHECKS", 4)
    path = write(tmp_path / "a.tokens", [list(range(3200)), [1]])  # 100 blocks of 32 ids
    whole = path.read_bytes()
    for place in (3, 6402 + 4 * 50):  # in the first block, and in the middle of the table of checksums
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(DamagedFileError):
            TokenFile(path)
    content = bytearray(whole)
    content[64 * 50 + 10] ^= 1
    path.write_bytes(content)
    train = TokenFile(path).parts[0]
    assert np.array_equal(train[np.arange(1600)], np.arange(1600))  # up to the damage
    with pytest.raises(UserError, match=r"a\.tokens was damaged .* 3,200 .* start again"):
        train[np.array([1631])]
    assert not path.exists()  # the next start writes it again


def test_an_interrupted_writer_continues_where_it_stopped(tmp_path: Path) -> None:
    """The file is, byte for byte, the one that was never interrupted."""
    whole = write(tmp_path / "whole.tokens", [list(range(70)), list(range(30))]).read_bytes()
    pieces = [(0, start) for start in range(0, 70, 7)] + [(1, start) for start in range(0, 30, 7)]
    path, starts = tmp_path / "a.tokens", []
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt) if len(starts) < 3 else nothing(), TokenWriter(path, "uint16") as writer:
            starts.append(writer.pieces)
            for number, (part, start) in enumerate(pieces[writer.pieces :]):
                if number == 4 and len(starts) < 4:
                    raise KeyboardInterrupt
                writer.append(part, np.arange(start, min(start + 7, (70, 30)[part]), dtype=np.uint16))
            writer.finish()
    assert starts == [0, 4, 8, 12]
    assert path.read_bytes() == whole
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "whole.tokens"]  # no temporary file is left


class nothing:  # noqa: N801
    """A context that changes nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("what", ["part", "notes"])
def test_an_interrupted_file_that_was_damaged_is_started_again(tmp_path: Path, what: str) -> None:
    """Guards against a file with a beginning that was never written, e.g. after a power failure."""
    path = tmp_path / "a.tokens"
    with TokenWriter(path, "uint16") as writer:
        writer.append(0, np.arange(50, dtype=np.uint16))
    damaged = path.with_name(f"a.tokens.{what}")
    content = bytearray(damaged.read_bytes())
    content[70] ^= 1
    damaged.write_bytes(content)
    with TokenWriter(path, "uint16") as writer:
        assert (writer.pieces, writer.lengths) == (0, [0, 0])
        writer.append(0, np.arange(9, dtype=np.uint16))
        writer.finish()
    assert np.array_equal(ids(TokenFile(path).parts[0]), np.arange(9))


def test_parts_can_be_pickled_for_other_processes(tmp_path: Path) -> None:
    """The copy opens the file again."""
    file = TokenFile(write(tmp_path / "a.tokens", [list(range(300)), list(range(40))]))
    assert np.array_equal(ids(pickle.loads(pickle.dumps(file.parts[1]))), np.arange(40))


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux")
def test_reading_all_of_a_file_does_not_make_it_memory_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against mapped pages that count as memory of the process until the machine has none left."""
    monkeypatch.setattr("gptlit.data.tokens.MAPPED_BYTES", 2**22)
    with TokenWriter(tmp_path / "a.tokens", "uint32") as writer:
        for start in range(0, 2**23, 2**20):  # 32 MB
            writer.append(0, np.arange(start, start + 2**20, dtype=np.uint32))
        writer.append(1, np.zeros(1, np.uint32))
        writer.finish()

    train = TokenFile(tmp_path / "a.tokens").parts[0]
    most = 0
    for start in range(0, 2**23, 2**14):
        assert np.array_equal(train[np.arange(start, start + 2**14)[None]][0], np.arange(start, start + 2**14))
        if start % 2**18 == 0:
            found = re.findall(r"a\.tokens\n(?:Size|KernelPageSize|MMUPageSize): .*\n(?:.*\n)*?Rss: +(\d+) kB", smaps())
            most = max(most, sum(map(int, found)) * 1024)
    assert 0 < most < 2**23


def smaps() -> str:
    """Return the resident pages of each mapping of this process."""
    return Path("/proc/self/smaps").read_text()


# ---------------------------------------------------------------- from text to file


def as_text(folder: Path) -> dict:
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    return {"corpus": str(folder / "a.txt")}


def as_folder(folder: Path) -> dict:
    for name in ("b", "a", "c"):
        (folder / f"{name}.txt").write_bytes((name + TEXT).replace("\n", "\r\n").encode())
    return {"corpus": str(folder)}


def as_two_texts(folder: Path) -> dict:
    (folder / "mine.txt").write_text(TEXT, encoding="utf-8")
    (folder / "held_out.md").write_text(TEXT[::-1], encoding="utf-8")
    return {"corpus": str(folder / "mine.txt"), "val_corpus": str(folder / "held_out.md")}


def as_gzip(folder: Path) -> dict:
    (folder / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    return {"corpus": str(folder / "a.txt.gz")}


def as_zstandard(folder: Path) -> dict:
    with pyarrow.output_stream(str(folder / "a.txt.zst"), compression="zstd") as stream:
        stream.write(TEXT.encode())
    return {"corpus": str(folder / "a.txt.zst")}


def as_json_lines(folder: Path) -> dict:
    lines = (json.dumps({"id": i, "story": verse}) for i, verse in enumerate(TEXT.split("\n")))
    (folder / "a.jsonl").write_text("\n".join(lines))
    return {"corpus": str(folder / "a.jsonl"), "text_column": "story"}


def as_parquet(folder: Path) -> dict:
    table = pyarrow.table({"story": TEXT.split("\n"), "number": list(range(TEXT.count("\n") + 1))})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return {"corpus": [str(folder / "a.parquet")], "val_corpus": "sample", "text_column": "story"}


SOURCES = [as_text, as_folder, as_two_texts, as_gzip, as_zstandard, as_json_lines, as_parquet]


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("source", SOURCES, ids=[source.__name__ for source in SOURCES])
def test_a_token_file_holds_the_same_ids_as_memory(
    tmp_path: Path, request: pytest.FixtureRequest, source: Callable[[Path], dict], kind: str
) -> None:
    """Same ids, split, tokenizer and fingerprint for every format: size decides only where they are stored."""
    named = source(tmp_path)

    def data() -> TextDataModule:
        module = TextDataModule(**named, tokenizer=kind, vocab_size=300, block_size=8)
        module.setup()
        return module

    memory = data()
    request.getfixturevalue("large")
    disk = data()
    assert isinstance(memory.train_tokens, torch.Tensor)
    assert not isinstance(disk.train_tokens, torch.Tensor)
    assert np.array_equal(ids(disk.train_tokens), memory.train_tokens)
    assert np.array_equal(ids(disk.val_tokens), memory.val_tokens)
    assert disk.tokenizer == memory.tokenizer
    assert disk.fingerprint() == memory.fingerprint()
    assert disk.corpus.source == memory.corpus.source
    assert disk.chars_per_train_token == memory.chars_per_train_token
    for step in (0, 7):
        ours, theirs = (RandomChunks(module.train_tokens, 8, 5, seed=1)[step][0] for module in (disk, memory))
        assert torch.equal(ours, theirs)
    ours, theirs = (torch.cat([t for _, t in ValidationWindows(d.val_tokens, 8, 9)]) for d in (disk, memory))
    assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_second_start_reads_no_text(text: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Guards against a start that takes minutes each time."""
    first = encoded(text, kind)
    monkeypatch.setattr("gptlit.data.corpus.load.Corpus.parts", lambda *_: pytest.fail("the text was read again"))
    monkeypatch.setattr("gptlit.data.encode_file.write_tokens", lambda *_: pytest.fail("the text was encoded again"))
    monkeypatch.setattr(BPETokenizer, "train", lambda *_, **__: pytest.fail("the vocabulary was learned again"))
    second = encoded(text, kind)
    assert np.array_equal(ids(first.train), ids(second.train))
    assert first.tokenizer == second.tokenizer


@pytest.mark.usefixtures("large")
def test_a_moved_text_is_read_but_not_encoded_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the file is a hash of the content."""
    first = encoded(text)
    text.rename(tmp_path / "moved.txt")
    monkeypatch.setattr("gptlit.data.encode_file.write_tokens", lambda *_: pytest.fail("the text was encoded again"))
    assert encoded(tmp_path / "moved.txt").sha256 == first.sha256


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("told_by", ["its time", "its samples"])
def test_a_changed_text_is_read_again(text: Path, monkeypatch: pytest.MonkeyPatch, told_by: str) -> None:
    """Even at the same size: detected by its time, or with the old time by a sample of its bytes."""
    if told_by == "its time":  # nothing is sampled but the first and the last byte
        monkeypatch.setattr("gptlit.data.reading.SAMPLES", 2)
        monkeypatch.setattr("gptlit.data.reading.SAMPLE", 1)
    before, stat = encoded(text), text.stat()
    text.write_text(TEXT.replace("letter", "LETTER"), encoding="utf-8")
    time = stat.st_mtime_ns + (told_by == "its time")
    os.utime(text, ns=(time, time))
    after = encoded(text)
    assert after.tokenizer.decode(ids(after.train)) == TEXT.replace("letter", "LETTER")[: after.train_characters]
    assert after.sha256 != before.sha256


@pytest.mark.usefixtures("large")
def test_another_split_or_tokenizer_is_another_file(text: Path, cache: Path) -> None:
    """Guards against ids of one vocabulary that are read as those of another."""
    for more in ({}, {"val_fraction": 0.2}, {"kind": "bpe"}):
        encoded(text, **more)
    assert len(list(cache.glob("*.tokens"))) == 3


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty])
def test_a_damaged_token_file_is_written_again(
    text: Path, cache: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """With a line that says so, and the same bytes as before."""
    encoded(text)
    whole = the_file(cache).read_bytes()
    damage(the_file(cache))
    capsys.readouterr()
    encoded(text)
    assert the_file(cache).read_bytes() == whole
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("suffix", ["facts", "bpe"])
def test_a_damaged_record_is_written_again(text: Path, cache: Path, suffix: str) -> None:
    """Guards against a wrong checksum, a wrong split or another vocabulary from a file half written."""
    before = encoded(text, "bpe")
    (note,) = cache.glob(f"*.{suffix}")
    whole = note.read_bytes()
    for damaged in (b"", whole[:-7], whole.replace(b"1", b"2", 3)):
        note.write_bytes(damaged)
        after = encoded(text, "bpe")
        assert (after.sha256, after.train_characters) == (before.sha256, before.train_characters)
        assert after.tokenizer == before.tokenizer
        assert note.read_bytes() == whole


@pytest.mark.usefixtures("large")
def test_encoding_continues_after_sigkill(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start encodes only what is missing, and the result is complete."""
    pieces: list[int] = []
    encode = CharTokenizer.encode_array

    def counted(self: CharTokenizer, piece: str) -> np.ndarray:
        pieces.append(len(piece))
        if len(pieces) == 9 and os.getpid() != ours:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, piece)

    monkeypatch.setattr(CharTokenizer, "encode_array", counted)
    ours = os.getpid()
    child = os.fork()
    if child == 0:
        encoded(text)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    result = encoded(text)
    assert 0 < sum(pieces) < 0.8 * len(TEXT)
    assert result.tokenizer.decode(ids(result.train)) + result.tokenizer.decode(ids(result.val)) == TEXT


@pytest.mark.usefixtures("large")
def test_ctrl_c_while_encoding_says_that_it_continues(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And keeps what has been encoded."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            encoded(text)
    assert "the next start continues from there" in capsys.readouterr().err
    monkeypatch.setattr(CharTokenizer, "encode_array", lambda *_: pytest.fail("a piece was encoded again"))
    assert len(encoded(text).train) == int(0.9 * len(TEXT))


@pytest.mark.usefixtures("large")
def test_one_of_several_processes_encodes(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against processes of one machine that write the same file at the same time."""
    import gptlit.data.encode_file

    calls: list[Path] = []
    write_tokens = gptlit.data.encode_file.write_tokens
    monkeypatch.setattr(
        "gptlit.data.encode_file.write_tokens", lambda path, *more: (calls.append(path), write_tokens(path, *more))
    )
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: ids(encoded(text).train), range(3)))
    assert len(calls) == 1
    assert all(np.array_equal(results[0], result) for result in results)


def test_threads_can_write_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against one temporary file for both, which the first thread moves away."""
    replace, both_wrote = os.replace, threading.Barrier(2, timeout=30)
    monkeypatch.setattr(os, "replace", lambda *paths: (both_wrote.wait(), replace(*paths)))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: write_record(tmp_path / "record", {"number": number}), range(2)))
    assert read_record(tmp_path / "record") in ({"number": 0}, {"number": 1})


@pytest.mark.usefixtures("large")
def test_an_unknown_character_is_named_before_anything_is_encoded(text: Path, cache: Path) -> None:
    """Guards against an hour of encoding that ends at the last character."""
    with pytest.raises(
        UserError,
        match=r"corpus .*rhyme.txt holds .*U\+65E5.* \(and 1 other character\), .* vocabulary of old",
    ):
        encode_text(TextSpec(str(text)), CharTokenizer(sorted(set(TEXT) - set("日本")), "old"), "char", 300)
    assert not list(cache.glob("*.tokens*"))


@pytest.mark.usefixtures("large")
def test_a_full_disk_is_named(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, with the remedy."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TokenWriter, "append", full)
    with pytest.raises(UserError, match=r"No space left on device\): make room, or set XDG_CACHE_HOME"):
        encoded(text)


@pytest.mark.usefixtures("large")
def test_a_text_that_grows_while_it_is_read_is_refused(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against ids that belong to another text than the checksum."""
    import gptlit.data.encode

    read = gptlit.data.encode.read

    def then_grow(*arguments: object) -> object:
        facts, pieces = read(*arguments)  # type: ignore[arg-type]
        text.write_text(TEXT + "more", encoding="utf-8")
        return facts, pieces

    monkeypatch.setattr("gptlit.data.encode.read", then_grow)
    with pytest.raises(UserError, match="has changed while it was read"):
        encoded(text)


def test_a_streamed_hub_data_set_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its texts are kept; a second reading, for the vocabulary or another run, needs no network."""
    import datasets

    path = Path(as_json_lines(tmp_path)["corpus"])
    opened: list[bool] = []

    def open_hub(name: str, config: str | None, split: str, cache_dir: Path | None, streaming: bool) -> object:
        rows = datasets.load_dataset("json", data_files=str(path), split=split, streaming=streaming)

        def counted() -> Iterator[dict]:
            opened.append(streaming)
            yield from rows

        return datasets.IterableDataset.from_generator(counted) if streaming else rows

    monkeypatch.setattr("gptlit.data.corpus.sources.open_hub", open_hub)
    whole = encode_text(TextSpec("someone/tales", text_column="story"), None, "bpe", 300)
    for _ in range(2):
        streamed = encode_text(TextSpec("someone/tales", text_column="story", streaming=True), None, "bpe", 300)
        assert streamed.sha256 == whole.sha256
        assert np.array_equal(ids(streamed.val), ids(whole.val))
    assert opened == [True]


@pytest.mark.usefixtures("large")
def test_training_from_a_token_file_takes_the_same_steps(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the Trainer, validation included: the same weights and the same loss, bit-exactly."""

    def run() -> tuple[list[torch.Tensor], float]:
        module = LitGPT(GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=16), OptimizerConfig(name="adamw", lr=1e-2))
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        every = {"max_steps": 3, "val_check_interval": 3, "check_val_every_n_epoch": None}
        trainer = pl.Trainer(
            accelerator="cpu", use_distributed_sampler=False, default_root_dir=tmp_path, **every, **off
        )
        data = TextDataModule(str(text), block_size=8, batch_size=6)
        trainer.fit(module, datamodule=data)
        assert isinstance(data.train_tokens, torch.Tensor) == (not on_disk)
        return list(module.network.parameters()), float(trainer.callback_metrics["val/loss"])

    on_disk = True
    disk = run()
    monkeypatch.setattr("gptlit.data.encode.IN_MEMORY_CHARACTERS", {"char": 2**26, "bpe": 2**26})
    on_disk = False
    memory = run()
    assert disk[1] == memory[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(disk[0], memory[0], strict=True))
