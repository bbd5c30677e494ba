from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

from tl_posheads.errors import PosheadsError
from tl_posheads.io import corpora
from tl_posheads.io.corpora import corpus_provenance, load_corpus


@pytest.fixture(scope="session")
def model(tokenizer):
    return types.SimpleNamespace(tokenizer=tokenizer, cfg=types.SimpleNamespace(n_ctx=8192))


@pytest.fixture
def numbered(tmp_path):
    """A text whose tokens tell where they are from."""
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(f"w{i:05}" for i in range(4000)))
    return path


def places(row: torch.Tensor, tokenizer) -> set[int]:
    words = tokenizer.decode(row, skip_special_tokens=True).split()
    return {int(word[1:]) for word in words[1:-1]}  # the outer ones may be cut


def test_shape_bos_and_determinism(model):
    tokens = load_corpus("python-docs", model, n_docs=3, length=128)
    assert tokens.shape == (3, 128)
    assert tokens.dtype == torch.long
    assert (tokens[:, 0] == model.tokenizer.bos_token_id).all()
    assert torch.equal(tokens, load_corpus("python-docs", model, n_docs=3, length=128))
    other = load_corpus("python-docs", model, n_docs=3, length=128, seed=1)
    assert not torch.equal(tokens, other)
    assert load_corpus("python-docs", model, length=128).shape == (16, 128)
    bare = load_corpus("python-docs", model, n_docs=3, length=128, prepend_bos=False)
    assert not (bare == model.tokenizer.bos_token_id).any()


@pytest.mark.lens
def test_with_real_models(smollm2):
    tokens = load_corpus("python-docs", smollm2, n_docs=4, length=1024)
    assert tokens.shape == (4, 1024)
    assert (tokens[:, 0] == 1).all()
    assert smollm2.tokenizer.decode(tokens[0, 1:]).isprintable() is False  # prose with newlines


@pytest.mark.parametrize("enough", [64, 2], ids=["whole", "sampled"])
@pytest.mark.parametrize("seed", range(5))
def test_no_overlap_and_spread(numbered, model, monkeypatch, seed, enough):
    monkeypatch.setattr(corpora, "_ENOUGH_CHARACTERS", enough * 4)
    tokens = load_corpus(numbered, model, n_docs=4, length=120, seed=seed)
    found = [places(row, model.tokenizer) for row in tokens]
    for i, one in enumerate(found):
        assert len(one) > 10
        assert all(one.isdisjoint(other) for other in found[i + 1 :])
        # each from its own quarter, but for the words at the borders
        assert min(one) >= 1000 * i - 2
        assert max(one) <= 1000 * (i + 1) + 2


def test_long_texts_are_sampled_nottoken_idsd_whole(model, tmp_path, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text("word " * 200_000)
    seen = []
    real = corpora.token_ids
    monkeypatch.setattr(
        corpora, "token_ids", lambda text, tok: seen.append(text) or real(text, tok)
    )
    assert load_corpus(path, model, n_docs=2, length=64).shape == (2, 64)
    assert sum(map(len, seen)) < 10_000


def test_long_text_with_few_tokens_falls_back_to_the_whole(model, tmp_path):
    path = tmp_path / "blank.txt"
    path.write_text(" " * 100_000 + "word " * 3000)
    assert load_corpus(path, model, n_docs=2, length=64).shape == (2, 64)


def test_all_of_it_can_be_used(numbered, model):
    n = len(model.tokenizer(numbered.read_text(), add_special_tokens=False)["input_ids"])
    tokens = load_corpus(numbered, model, n_docs=3, length=n // 3, prepend_bos=False)
    assert tokens.shape == (3, n // 3)


def test_too_short(tmp_path, model):
    path = tmp_path / "short.txt"
    path.write_text("one two three four five six seven eight")
    n = len(model.tokenizer(path.read_text(), add_special_tokens=False)["input_ids"])
    with pytest.raises(PosheadsError, match=f"has {n} tokens, .* need 198; lower length to"):
        load_corpus(path, model, n_docs=2, length=100)
    longest = n // 2 + 1
    assert load_corpus(path, model, n_docs=2, length=longest).shape == (2, longest)
    with pytest.raises(PosheadsError, match=f"lower length to {longest} "):
        load_corpus(path, model, n_docs=2, length=longest + 1)


def test_special_tokens_in_the_text_stay_text(tmp_path, model):
    path = tmp_path / "chat.txt"
    path.write_text("<|im_start|>user says <|im_end|> and <|endoftext|> " * 20)
    tokens = load_corpus(path, model, n_docs=1, length=64)
    special = set(model.tokenizer.all_special_ids)
    assert not special & set(tokens[0, 1:].tolist())


def test_no_bos(model, numbered):
    bare = types.SimpleNamespace(
        tokenizer=lambda *args, **kwargs: model.tokenizer(*args, **kwargs), cfg=model.cfg
    )
    bare.tokenizer.bos_token_id = None
    tokens = load_corpus(numbered, bare, n_docs=2, length=50)
    assert tokens.shape == (2, 50)
    assert model.tokenizer.bos_token_id not in tokens


def test_silent(model, capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_corpus("python-docs", model, n_docs=1, length=64)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize("read", [corpus_provenance, lambda name: load_corpus(name, MODEL)])
class TestRefusals:
    def test_empty(self, read, tmp_path):
        path = tmp_path / "empty.txt"
        for text in ("", " \n\n"):
            path.write_text(text)
            with pytest.raises(PosheadsError, match=r"empty\.txt is empty"):
                read(str(path))

    def test_not_utf8(self, read, tmp_path):
        path = tmp_path / "latin.txt"
        path.write_bytes("déjà vu".encode("latin-1"))
        with pytest.raises(PosheadsError, match=r"isn't UTF-8 \(byte 0xe9 at position 1\)"):
            read(str(path))
        with pytest.raises(PosheadsError, match=r"latin\.txt isn't UTF-8"):
            read(str(tmp_path))

    def test_folder_without_text(self, read, tmp_path):
        (tmp_path / "code.py").write_text("print()")
        (tmp_path / "empty.txt").write_text("")
        with pytest.raises(PosheadsError, match="has no text; expected files ending in .txt"):
            read(str(tmp_path))

    @pytest.mark.parametrize("name", ["", "./x", "/no/where", "a/b/c", "missing.txt", "~nobody/x"])
    def test_no_such_path(self, read, name):
        with pytest.raises(PosheadsError, match="there is no file"):
            read(name)

    def test_datasets_not_installed(self, read, monkeypatch):
        monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(PosheadsError, match=r"pip install 'tl-posheads\[datasets\]'"):
            read("wikitext")


MODEL = types.SimpleNamespace(tokenizer=types.SimpleNamespace(bos_token_id=1))


def test_folder_in_order(tmp_path, model):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    files = {
        "b.md": "second",
        "a.txt": "\ufefffirst\r\n",
        "sub/c.rst": "third",
        "code.py": "no",
        ".hidden/d.txt": "no",
        "e.txt": " ",
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    text = "first\n\n\nsecond\n\nthird"
    assert corpora._text(str(tmp_path)) == text
    assert corpus_provenance(tmp_path) == {
        "name": str(tmp_path),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


@pytest.mark.parametrize(
    ("options", "why"),
    [(dict(n_docs=0), "n_docs=0"), (dict(length=1), "length=1")],
)
def test_bad_numbers(options, why, model):
    with pytest.raises(PosheadsError, match=why):
        load_corpus("python-docs", model, **options)


def test_no_tokenizer():
    with pytest.raises(PosheadsError, match="has no tokenizer"):
        load_corpus("python-docs", types.SimpleNamespace(tokenizer=None))


def test_longer_than_the_model_reads(model):
    class HookedTransformer:
        tokenizer, cfg = model.tokenizer, model.cfg

    with pytest.raises(PosheadsError, match="reads at most 8192 tokens"):
        load_corpus("python-docs", HookedTransformer(), length=9000)
    with pytest.warns(UserWarning, match="beyond the 8192 tokens"):
        load_corpus("python-docs", model, n_docs=2, length=9000)


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        module = types.ModuleType("datasets")
        module.__spec__ = types.SimpleNamespace()  # find_spec asks for it
        monkeypatch.setitem(sys.modules, "datasets", module)
        return module

    def test_streams_no_more_than_needed(self, hub, model):
        read = []

        def rows():
            for i in range(10**6):
                read.append(i)
                yield {"text": f"document {i} says a few words, then it ends. " * 50}

        def load_dataset(name, configuration, *, split, streaming):
            assert (name, configuration, split, streaming) == ("some/set", "en", "train", True)
            return rows()

        hub.load_dataset = load_dataset
        assert load_corpus("some/set:en", model, n_docs=2, length=64).shape == (2, 64)
        assert len(read) < 10
        assert corpus_provenance("some/set:en") == {"name": "some/set:en", "sha256": None}

    def test_no_text_column(self, hub, model):
        hub.load_dataset = lambda *args, **kwargs: iter([{"body": "x", "title": "y"}])
        with pytest.raises(PosheadsError, match=r"no column 'text' \(it has body, title\)"):
            load_corpus("some/set", model)

    def test_failure(self, hub, model):
        def load_dataset(*args, **kwargs):
            raise ConnectionError("offline\nand a traceback")

        hub.load_dataset = load_dataset
        with pytest.raises(PosheadsError, match=r"data set \(offline\); check") as refusal:
            load_corpus("some/set", model)
        assert "\n" not in str(refusal.value)


def test_provenance_imports_nothing_heavy():
    code = (
        "import sys; from tl_posheads.io.corpora import corpus_provenance; "
        "corpus_provenance('python-docs'); "
        "sys.exit(' '.join({'torch', 'transformers', 'transformer_lens'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestWhatCantBeRead:
    """A corpus is the whole of its folder, or what is left out is said, or it is refused."""

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "sub").mkdir()
        (tmp_path / "a.txt").write_text("first")
        (tmp_path / "sub" / "b.txt").write_text("second")
        return tmp_path

    @pytest.mark.parametrize("name", ["sub", "sub/b.txt"])
    def test_no_permission(self, folder, name, monkeypatch):
        def denies(real):
            def call(path, *args, **options):
                if str(path) == str(folder / name):
                    raise PermissionError(13, "Permission denied", str(path))
                return real(path, *args, **options)

            return call

        # Permissions that are taken away don't stop an administrator, whom tests may run as.
        monkeypatch.setattr("os.scandir", denies(os.scandir))
        monkeypatch.setattr("io.open", denies(io.open))
        with pytest.raises(PosheadsError, match=f"{name} can't be read .Permission denied"):
            corpus_provenance(folder)

    def test_broken_link(self, folder):
        (folder / "sub" / "c.md").symlink_to(folder / "nowhere.md")
        with pytest.raises(PosheadsError, match=r"sub/c\.md can't be read .No such file"):
            corpus_provenance(folder)

    def test_file_that_vanishes(self, folder, monkeypatch):
        real = corpora._file
        monkeypatch.setattr(
            corpora, "_file", lambda path: (folder / "sub/b.txt").unlink(True) or real(path)
        )
        with pytest.raises(PosheadsError, match=r"sub/b\.txt can't be read"):
            corpus_provenance(folder)

    def test_pipe(self, folder):
        os.mkfifo(folder / "sub" / "c.txt")  # reading it would wait for ever
        with pytest.raises(PosheadsError, match=r"sub/c\.txt is no ordinary file"):
            corpus_provenance(folder)

    def test_links_to_files_are_read_and_those_to_folders_said(self, folder):
        (folder / "sub" / "c.txt").symlink_to(folder / "a.txt")
        (folder / "sub" / "up").symlink_to(folder)  # followed, it would never end
        with pytest.warns(UserWarning, match="sub/up is a link to a folder, .* left out"):
            assert corpora._text(str(folder)) == "first\n\nsecond\n\nfirst"

    @pytest.mark.parametrize(
        ("data", "why"),
        [
            (b"\0" * 999, "0x00 at character 0"),
            (b"text, then\0", "0x00 at character 10"),
            ("text".encode("utf-16-le"), "0x00 at character 1"),
            ("text".encode("utf-16"), "isn't UTF-8"),
            ("text".encode("utf-32"), "isn't UTF-8"),
            ("日本語".encode("iso2022_jp"), "0x1b at character 0"),
            ("日本語".encode("shift_jis"), "isn't UTF-8"),
            (b"\x7fELF\x01\x01", "0x7f at character 0"),
            (b"\x89PNG\r\n\x1a\n", "isn't UTF-8"),
            (b"PK\x03\x04", "0x03 at character 2"),
        ],
    )
    def test_no_text(self, folder, data, why):
        (folder / "sub" / "c.txt").write_bytes(data)
        for name in (folder, folder / "sub" / "c.txt"):
            with pytest.raises(PosheadsError, match=f"c.txt .*{why}"):
                corpus_provenance(name)

    def test_ends_of_lines_and_pages_are_text(self, folder):
        (folder / "a.txt").write_bytes("a\tb\r\nc\x0cd\x0be\rf ü".encode())
        assert corpora._text(str(folder)).startswith("a\tb\nc\x0cd\x0be\rf ü")


def test_texts_in_a_list_and_a_text_as_a_name(model):
    texts = ["one two three four five " * 10, "six seven eight nine ten " * 10]
    found = load_corpus(texts, model, n_docs=2, length=8)
    assert found.shape == (2, 8)
    with pytest.raises(PosheadsError, match=r"give texts in a list, \[text\]"):
        load_corpus(texts[0] * 100, model, n_docs=2, length=8)
    with pytest.raises(PosheadsError, match="given as the name of a corpus"):
        load_corpus("two\nlines", model, n_docs=2, length=8)
