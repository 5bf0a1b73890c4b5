"""Texts for second moments: what may be passed, and what is said when it cannot be read."""

import json
import sys
from types import SimpleNamespace

import pytest

from kedit.errors import ConfigError
from kedit.keys.corpus import Corpus, as_corpus
from tiny_models import tiny_model


def test_text_file_has_a_document_per_paragraph(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffone\nline two\n\n\n  zwei \r\n\r\ndrei".encode())
    corpus = as_corpus(path, None)
    assert list(corpus) == ["one line two", "zwei", "drei"]
    assert list(corpus) == list(as_corpus(str(path), None)), "it can be read more than once"


def test_jsonl_file_has_a_document_per_line(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\nlines", "id": 3}\n', encoding="utf-8")
    assert list(as_corpus(path, None)) == ["one", "two\nlines"]


def test_key_is_the_content(tmp_path):
    first, second, other = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"
    first.write_text("same")
    second.write_text("same")
    other.write_text("other")
    records = tmp_path / "a.jsonl"
    records.write_text("same")
    keys = [as_corpus(path, None).key for path in (first, second, other, records)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3, "the same bytes read in another way are another corpus"
    assert as_corpus(["a", "b"], None).key == as_corpus(("a", "b"), None).key != as_corpus(["ab"], None).key


def test_a_corpus_stays_what_it_is():
    corpus = Corpus("mine", "key", lambda: iter(["x"]))
    assert as_corpus(corpus, None) is corpus


def test_an_iterator_has_no_key_and_so_no_cache():
    assert as_corpus((text for text in ["x"]), None).key == ""


@pytest.mark.parametrize("line", ["no json", '{"txet": "x"}', '["text"]', "3"])
def test_bad_record_names_file_and_line(tmp_path, line):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match="text.jsonl, line 2"):
        list(as_corpus(path, None))


def test_unreadable_files(tmp_path):
    binary = tmp_path / "text.txt"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="cannot be read"):
        list(as_corpus(binary, None))
    with pytest.raises(ConfigError, match="is a folder, not a regular file"):
        list(as_corpus(tmp_path, None))


@pytest.mark.parametrize("wrong", [5, [1, 2], ["text", None]])
def test_what_is_no_corpus(wrong):
    with pytest.raises(ConfigError, match="corpus is"):
        as_corpus(wrong, None)


def test_no_such_file_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"'no/such' is no file.*kedit\[data\]"):
        as_corpus("no/such", None)


def test_no_default_corpus_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"Wikipedia.*moments=\{layer: C\}.*second_moments.*--moments-corpus"):
        as_corpus(None, tiny_model("gpt2"))


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"title": "a", "body": "b"}], ["no text in a column 'text'", "columns title, body", "JSONL"]),
        ([{"text": "a"}, {"text": None}], ["no text in a column 'text'", "columns text"]),
        (["a"], ["no text in a column 'text'", "found str"]),
        (OSError("the connection broke"), ["cannot be read on", "the connection broke"]),
    ],
)
def test_a_data_set_without_texts_says_so(monkeypatch, records, words):
    def load_dataset(name, config, *, split, streaming):
        def stream():
            yield from [{"text": "first"}]
            if isinstance(records, OSError):
                raise records
            yield from records

        return stream()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("kedit.keys.corpus.hub_is_reachable", lambda: True)
    texts = iter(as_corpus("somebody/something", None))
    assert next(texts) == "first"
    with pytest.raises(ConfigError, match="'somebody/something'") as caught:
        list(texts)
    assert all(word in str(caught.value) for word in words)
