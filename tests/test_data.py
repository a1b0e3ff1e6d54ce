"""Documents, split, tokenizer, packing and the loader, on small local files."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from foejax.config import DataConfig
from foejax.data import DataError, Dataset, Tokenizer, load_tokenizer, open_dataset, read_documents, token_byte_lengths
from foejax.data.encoding import TokenStream
from foejax.data.packing import PackedRows
from foejax.data.split import choose_split

WORDS = "the sea and sky of an old town where naïve gulls cry “more” at noon while bells ring over wet roofs".split()
EOS = 7  # of the streams made here; a trained tokenizer has 0


def _text(seed: int, words: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(words)) + "\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOEJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": _text(seed, 20 + 11 * seed), "number": seed} for seed in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _config(corpus: Path, **fields: object) -> DataConfig:
    values = {"tokenizer_vocab_size": 280, "sequence_length": 32, "batch_size": 4, "validation_fraction": 0.15}
    return DataConfig(corpus=str(corpus), **{**values, **fields})


# Documents


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["first naïve text", "second"]
    lines = "".join(json.dumps({"body": text, "id": index}) + "\n" for index, text in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines + "\n")
    parquet.write_table(arrow.table({"body": texts, "id": [0, 1]}), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        documents = list(read_documents(tmp_path / name, "body"))
        assert [document.text for document in documents] == texts
        assert [document.metadata for document in documents] == [{"id": 0}, {"id": 1}]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.md").write_text("two")
    (folder / "a.txt").write_text("one")
    (folder / "deep" / "c.txt").write_text("three")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    assert [document.text for document in read_documents(folder)] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.txt", b"", "holds no text"),
        ("x.txt", b" \n\t\n", "holds no text"),
        ("x.jsonl", b"", "holds no text"),
        ("x.txt", b"abc\xff", "not UTF-8 at byte 3 (0xff)"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "not UTF-8 at byte 24 (0xe9)"),
        ("x.jsonl", b'{"body": "a", "id": 1}\n', "data.text_field='text': the fields there are body, id"),
        ("x.jsonl", b'{"text": 5}\n', "holds int, not text"),
        ("x.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("x.jsonl", b"[1]\n", "line 1 holds a list"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "not Unicode at character 0"),
        ("x.jsonl.gz", b"plain", "not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 50, mtime=0)[:-12], "not a whole gzip file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_documents(tmp_path / name))
    assert expected in str(caught.value) and name in str(caught.value)


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    parquet.write_table(arrow.table({"body": ["a"]}), tmp_path / "good.parquet")
    with pytest.raises(DataError, match="the fields there are body"):
        list(read_documents(tmp_path / "good.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match="bad.parquet is not a Parquet file"):
        list(read_documents(tmp_path / "bad.parquet"))


def test_a_missing_corpus_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.corpus='shakespear'.*debian-docs, shakespeare, sotu"):
        open_dataset(DataConfig(corpus="shakespear"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no .txt"):
        list(read_documents(tmp_path / "empty"))


# Split


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=40), st.floats(0.01, 0.95), st.integers(0, 5))
def test_split_holds_out_about_the_wanted_bytes(sizes: list[int], fraction: float, seed: int) -> None:
    split = choose_split(sizes, fraction, seed)
    wanted = fraction * sum(sizes)
    if split.tail_of is None:
        assert 0 < len(split.validation) < len(sizes)
        assert abs(sum(sizes[index] for index in split.validation) - wanted) < wanted
    else:
        assert not split.validation and sizes[split.tail_of] == max(sizes)
        assert 0 < split.tail_fraction < 1
    assert split == choose_split(sizes, fraction, seed)


def test_one_document_is_split_at_a_line_end_near_its_tail(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    lines = [_text(seed, 6) for seed in range(200)]
    path.write_text("".join(lines), encoding="utf-8")
    dataset = open_dataset(_config(path, validation_fraction=0.1))
    head, tail = (dataset.tokenizer.decode(stream.tokens) for stream in (dataset.train, dataset.validation))
    assert head + tail == "".join(lines) and head.endswith("\n")
    assert 0.05 < len(tail) / len(head + tail) <= 0.1
    reshuffled = open_dataset(_config(path, validation_fraction=0.1, seed=1))
    assert (reshuffled.train.tokens == dataset.train.tokens).all() and reshuffled.fingerprint != dataset.fingerprint


def test_a_text_too_short_to_hold_anything_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("a")
    with pytest.raises(DataError, match="leaves no validation document.*1 characters"):
        open_dataset(_config(tmp_path / "tiny.txt"))


# Tokenizer


def test_trained_tokenizer_is_deterministic_cached_and_exact(corpus: Path, cache: Path) -> None:
    config = _config(corpus)
    tokenizer = load_tokenizer(config)
    assert tokenizer.vocab_size == 280 and tokenizer.eos_id == 0
    (cached,) = (cache / "tokenizers").iterdir()
    first = (cached / "tokenizer.json").read_bytes()
    assert load_tokenizer(config).digest() == tokenizer.digest()
    (cached / "tokenizer.json").unlink()
    cached.rmdir()
    load_tokenizer(config)
    assert (cached / "tokenizer.json").read_bytes() == first
    text = "naïve “gulls”\n\n 🙂 <|endoftext|> \x00"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and 0 not in ids
    assert tokenizer.encode_batch([text, "sea"]) == [ids, tokenizer.encode("sea")]
    assert tokenizer.encode("sea", start_of_document=True) == [0, *tokenizer.encode("sea")]
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode("utf-8"))


def test_the_tokenizer_sees_training_documents_only(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    rows = [{"text": "sea and sky " * 100}, {"text": "zyxw " * 30}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = open_dataset(_config(path))
    assert len(dataset.validation) > 3 * 30  # `zyxw` was never merged
    assert len(dataset.train) < 4 * 100


def test_tokenizer_files_are_taken_and_bad_ones_refused(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = load_tokenizer(_config(corpus))
    tokenizer.to_file(path)
    dataset = open_dataset(_config(corpus, tokenizer=str(path)), vocab_size=280)
    assert dataset.tokenizer.digest() == tokenizer.digest()
    with pytest.raises(DataError, match="280 tokens, more than model.vocab_size=279"):
        open_dataset(_config(corpus, tokenizer=str(path)), vocab_size=279)
    with pytest.raises(DataError, match="is not a file"):
        Tokenizer.from_file(tmp_path / "nothing.json")
    path.write_text(path.read_text()[:-100])
    with pytest.raises(DataError, match="is not a tokenizer.json"):
        Tokenizer.from_file(path)
    with pytest.raises(DataError, match="tokenizer_vocab_size=200 .*at least 257"):
        load_tokenizer(_config(corpus, tokenizer_vocab_size=200))


def test_a_tokenizer_without_an_end_token_is_refused(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    load_tokenizer(_config(corpus)).to_file(path)
    path.write_text(path.read_text().replace("<|endoftext|>", "<|unknown|>"))
    with pytest.raises(DataError, match="no end-of-text token"):
        Tokenizer.from_file(path)


def test_added_tokens_count_their_bytes_unless_they_are_special(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    load_tokenizer(_config(corpus)).to_file(path)
    description = json.loads(path.read_text(encoding="utf-8"))
    (end,) = description["added_tokens"]
    end["special"] = False
    description["added_tokens"] += [
        {**end, "id": 280, "content": "<|pad|>", "special": True},
        {**end, "id": 281, "content": "naïve", "special": False},
    ]
    path.write_text(json.dumps(description), encoding="utf-8")
    lengths = token_byte_lengths(Tokenizer.from_file(path))
    assert lengths[[0, 280, 281]].tolist() == [0, 0, 6] and lengths.shape == (282,)


# Packing


def _stream(lengths: list[int]) -> TokenStream:
    """Documents whose tokens all differ, so that every token names its place."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(100, 100 + offsets[-1], dtype=np.uint16)
    tokens[offsets[:-1]] = EOS
    return TokenStream(tokens, offsets, EOS)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 17), st.sampled_from([None, 0, 3]))
def test_an_epoch_holds_every_target_once_and_none_crosses_a_border(
    lengths: list[int], length: int, seed: int | None
) -> None:
    stream = _stream(lengths)
    rows = PackedRows(stream, length, seed)
    successor = dict(zip(stream.tokens.tolist(), np.roll(stream.tokens, -1).tolist(), strict=True))
    first_tokens = sorted(stream.tokens[stream.offsets[:-1] + 1].tolist())
    for epoch in (0, 2):
        seen, targets_of_eos = [], []
        for index in range(rows.rows_per_epoch):
            row = rows[epoch * rows.rows_per_epoch + index]
            weighted = row["loss_weights"] > 0
            np.testing.assert_array_equal(weighted, row["segment_ids"] > 0)
            assert not any(row[name][~weighted].any() for name in ("tokens", "targets", "positions"))
            starts = np.diff(row["segment_ids"][weighted], prepend=0) == 1
            np.testing.assert_array_equal(row["positions"][weighted] == 0, starts)
            assert (row["tokens"][weighted][starts][1:] == EOS).all()
            for token, target in zip(row["tokens"][weighted], row["targets"][weighted], strict=True):
                seen.append(int(target))
                if token == EOS:
                    targets_of_eos.append(int(target))
                else:
                    assert successor[int(token)] == target
        assert sorted(seen) == sorted(stream.tokens.tolist())
        assert sorted(targets_of_eos) == first_tokens


def test_epochs_are_shuffled_differently_and_reproducibly() -> None:
    def epoch(seed: int, number: int) -> np.ndarray:
        rows = PackedRows(_stream([9, 4, 17, 6, 11, 5, 8]), 5, seed)
        first = number * rows.rows_per_epoch
        return np.stack([rows[first + index]["tokens"] for index in range(rows.rows_per_epoch)])

    assert (epoch(1, 0) == epoch(1, 0)).all()
    assert (epoch(1, 0) != epoch(1, 1)).any()
    assert (epoch(1, 0) != epoch(2, 0)).any()


def test_a_long_document_is_spread_over_the_epoch() -> None:
    rows = PackedRows(_stream([400, 2]), 4, 0)
    starts = [int(rows[index]["tokens"][1]) for index in range(rows.rows_per_epoch)]
    assert starts != sorted(starts)


# Loader


def _equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and (a[name] == b[name]).all() for name in a)


@pytest.fixture
def dataset(corpus: Path) -> Dataset:
    return open_dataset(_config(corpus))


def test_batches_have_the_shapes_and_dtypes_of_the_contract(dataset: Dataset) -> None:
    batch = next(dataset.train_iterator())
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "tokens": ((4, 32), "int32"),
        "targets": ((4, 32), "int32"),
        "positions": ((4, 32), "int32"),
        "segment_ids": ((4, 32), "int32"),
        "loss_weights": ((4, 32), "float32"),
    }


def test_resume_is_exact_in_an_epoch_and_across_its_border(dataset: Dataset) -> None:
    per_epoch = -(-dataset.num_train_tokens // 32) / 4
    total = int(3 * per_epoch) + 2
    iterator = dataset.train_iterator()
    states, batches = [], []
    for _ in range(total):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for start in (0, 1, int(per_epoch), int(per_epoch) + 1, total - 1):
        resumed = dataset.train_iterator()
        next(resumed)  # a resumed iterator need not be fresh
        resumed.set_state(states[start])
        assert all(_equal(next(resumed), batch) for batch in batches[start:])
    assert not _equal(batches[0], batches[1])


def test_reopening_gives_the_same_stream_and_another_stream_is_refused(dataset: Dataset, corpus: Path) -> None:
    state = dataset.train_iterator().get_state()
    again = open_dataset(_config(corpus))
    assert again.fingerprint == dataset.fingerprint and again.train_iterator().get_state() == state
    for change in ({"seed": 1}, {"batch_size": 2}, {"sequence_length": 16}, {"tokenizer_vocab_size": 270}):
        with pytest.raises(DataError, match="the data state belongs to stream"):
            open_dataset(_config(corpus, **change)).train_iterator().set_state(state)


def test_processes_share_one_stream(dataset: Dataset) -> None:
    whole = dataset.train_iterator()
    parts = [dataset.train_iterator(index, 2) for index in range(2)]
    for _ in range(5):
        batch, local = next(whole), [next(part) for part in parts]
        assert _equal(batch, {name: np.concatenate([piece[name] for piece in local]) for name in batch})
    assert whole.get_state() == parts[1].get_state()
    validation = list(dataset.validation_batches())
    shards = [list(dataset.validation_batches(process_index=index, process_count=2)) for index in range(2)]
    for batch, *local in zip(validation, *shards, strict=True):
        assert _equal(batch, {name: np.concatenate([piece[name] for piece in local]) for name in batch})
    with pytest.raises(DataError, match="batch_size=4 does not divide over 3 processes"):
        dataset.train_iterator(0, 3)


def test_validation_is_in_order_whole_and_padded(dataset: Dataset) -> None:
    batches = list(dataset.validation_batches(batch_size=5))
    assert all(batch["tokens"].shape == (5, 32) for batch in batches)
    weights = np.concatenate([batch["loss_weights"].ravel() for batch in batches])
    targets = np.concatenate([batch["targets"].ravel() for batch in batches])
    assert weights.sum() == dataset.num_validation_tokens < weights.size
    np.testing.assert_array_equal(targets[weights > 0], np.roll(dataset.validation.tokens, -1))
    assert all(_equal(a, b) for a, b in zip(batches, dataset.validation_batches(batch_size=5), strict=True))
    limited = list(dataset.validation_batches(batch_size=5, limit=1))
    assert len(limited) == 1 and _equal(limited[0], batches[0])


def test_bytes_are_counted_exactly(dataset: Dataset, corpus: Path) -> None:
    held_out = choose_split([len(d.text.encode()) for d in read_documents(corpus)], 0.15, 0).validation
    text = "".join(d.text for index, d in enumerate(read_documents(corpus)) if index in held_out)
    total = sum(dataset.num_bytes(batch) for batch in dataset.validation_batches())
    assert total == len(text.encode("utf-8")) > len(text)
    assert dataset.bytes_per_token * dataset.num_validation_tokens == pytest.approx(total)


def test_a_disk_without_room_is_told_and_leaves_nothing(
    corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match="No space left on device.*FOEJAX_CACHE"):
        open_dataset(_config(corpus))
    assert not list((cache / "encoded").iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("FOEJAX_CACHE", str(cache))
    assert open_dataset(_config(corpus)).num_train_tokens > 0
