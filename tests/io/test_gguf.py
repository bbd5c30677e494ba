"""What a GGUF file says is what is scored: weights, rotation, windows and tokenizer, or nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer

from helpers import gguf_files
from tl_posheads import PosheadsError, RotaryGeometry
from tl_posheads.io import gguf as gguf_cache
from tl_posheads.io import models
from tl_posheads.io.gguf_tokenizer import as_trained
from tl_posheads.io.models import load_model

pytestmark = pytest.mark.lens
OWN = 10000.0 ** (-np.arange(4) / 4)  # frequencies of the small Llama
FACTORS = [1.0, 1.5, 4.0, 8.0]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TL_POSHEADS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.gguf"


def geometry(path: Path, **options):
    return RotaryGeometry.from_model(load_model(path, cls="bridge", device="cpu"), **options)


def tensors_of(**factors):
    return {f"rope_{name}.weight": values for name, values in factors.items()}


class TestFamilies:
    @pytest.mark.parametrize("architecture", gguf_files.FAMILIES)
    def test_logits_are_those_of_the_model_in_the_file(self, architecture, path):
        theirs = gguf_files.write(path, architecture)
        tokens = torch.randint(3, 200, (1, 100), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours = load_model(path, cls="bridge", device="cpu")(tokens)
            expected = theirs(tokens).logits
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)

    @pytest.mark.parametrize("architecture", gguf_files.FAMILIES)
    def test_scaling_and_base(self, architecture, path):
        keys = {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 4.0,
            "rope.freq_base": 5e5,
        }
        if architecture == "phi3":  # whose code in transformers knows LongRoPE alone
            keys = {"rope.freq_base": 5e5}
        gguf_files.write(path, architecture, keys=keys)
        layer = geometry(path)[-1 if architecture == "gemma3" else 0]
        dim = layer.rotary_dim
        assert dim == (4 if architecture in ("stablelm", "nemotron") else 8)
        right = 5e5 ** (-np.arange(0, dim, 2) / dim) / keys.get("rope.scaling.factor", 1.0)
        np.testing.assert_allclose(layer.inv_freq, right, rtol=1e-4)

    @pytest.mark.parametrize(
        ("architecture", "windows"),
        [("gemma2", [16, None]), ("gemma3", [16] * 5 + [None]), ("phi3", [16, 16])],
    )
    def test_windows(self, architecture, windows, path):
        gguf_files.write(path, architecture, keys={"attention.sliding_window": 16})
        assert [layer.window for layer in geometry(path).layers] == windows

    @pytest.mark.parametrize("pattern", [2, [True, False, True, False, True, False]])
    def test_window_pattern(self, pattern, path):
        gguf_files.write(path, "gemma3", keys={"attention.sliding_window_pattern": pattern})
        layers = geometry(path).layers
        assert [layer.window for layer in layers] == [16, None] * 3
        for layer, base in zip(layers, [1e4, 1e6] * 3):
            np.testing.assert_allclose(layer.inv_freq, base ** (-np.arange(4) / 4), rtol=1e-4)

    def test_local_base(self, path):
        gguf_files.write(path, "gemma3", keys={"rope.freq_base_swa": 500.0})
        np.testing.assert_allclose(
            geometry(path)[0].inv_freq, 500.0 ** (-np.arange(4) / 4), rtol=1e-4
        )

    @pytest.mark.parametrize(("keys", "scale"), [({}, 8**-0.5), ({"attention.scale": 0.25}, 0.25)])
    def test_attention_of_gemma(self, keys, scale, path):
        gguf_files.write(path, "gemma2", keys={"attn_logit_softcapping": 20.0, **keys})
        layer = geometry(path)[0]
        assert layer.attention_scale == pytest.approx(scale, rel=1e-5)
        assert layer.softcap == pytest.approx(20.0, rel=1e-4)


def yarn(factor, original, fast=32, slow=1):
    """YaRN's equations in a loop; the small Llama's head of 8 and base of 10,000."""

    def bound(turns):
        return 8 * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = max(math.floor(bound(fast)), 0), math.ceil(bound(slow))
    out = []
    for m, f in enumerate(OWN):
        ramp = min(max((m - low) / (high - low), 0), 1)
        out.append(f / factor * ramp + f * (1 - ramp))
    return out


YARN = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}


class TestRope:
    @pytest.mark.parametrize(
        ("keys", "tensors", "right", "scale"),
        [
            ({}, {}, OWN, 1.0),
            ({"dimension_count": None, "freq_base": None}, {}, OWN, 1.0),
            ({"scaling.type": "linear", "scaling.factor": 4.0}, {}, OWN / 4, 1.0),
            ({"scaling.factor": 4.0}, {}, OWN / 4, 1.0),
            ({"scale_linear": 4.0}, {}, OWN / 4, 1.0),
            ({"scaling.type": "none", "scaling.factor": 4.0}, {}, OWN, 1.0),
            ({"scaling.type": "linear", "scaling.factor": 0.0}, {}, OWN, 1.0),
            ({}, tensors_of(freqs=FACTORS), OWN / FACTORS, 1.0),
            ({"scaling.factor": 2.0}, tensors_of(freqs=FACTORS), OWN / FACTORS / 2, 1.0),
            ({"scaling.attn_factor": 1.5}, {}, OWN, 1.5),
            (YARN, {}, yarn(4.0, 64), 0.1 * math.log(4) + 1),
            (
                {**YARN, "scaling.original_context_length": None},
                {},
                yarn(4.0, 256),
                0.1 * math.log(4) + 1,
            ),
            (
                {**YARN, "scaling.yarn_beta_fast": 8.0, "scaling.yarn_beta_slow": 2.0},
                {},
                yarn(4.0, 64, 8, 2),
                0.1 * math.log(4) + 1,
            ),
            (
                {
                    **YARN,
                    "scaling.yarn_attn_factor": 2.0,
                    "scaling.attn_factor": 3.0,
                    "scaling.yarn_ext_factor": 1.0,
                    "scaling.finetuned": True,
                },
                {},
                yarn(4.0, 64),
                6 * (0.1 * math.log(4) + 1),
            ),
        ],
        ids=[
            "plain",
            "silent",
            "linear",
            "no type",
            "old key",
            "none",
            "factor 0",
            "factors",
            "factors and linear",
            "length",
            "yarn",
            "yarn, no length",
            "betas",
            "yarn, lengths",
        ],
    )
    def test_scaling_is_what_the_file_says(self, keys, tensors, right, scale, path):
        gguf_files.write(path, keys={f"rope.{k}": v for k, v in keys.items()}, tensors=tensors)
        for layer in geometry(path).layers:
            np.testing.assert_allclose(layer.inv_freq, right, rtol=1e-4)
            assert layer.rotation_scale == pytest.approx(scale, rel=1e-5)

    @pytest.mark.parametrize("architecture", ["llama", "phi3"])
    def test_longrope(self, architecture, path):
        gguf_files.write(
            path,
            architecture,
            keys={"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.19},
            tensors=tensors_of(factors_short=[1, 1.1, 1.2, 1.3], factors_long=FACTORS),
        )
        model = load_model(path, cls="bridge", device="cpu")
        for length, factors in ((64, [1, 1.1, 1.2, 1.3]), (200, FACTORS)):
            layer = RotaryGeometry.from_model(model, length=length)[0]
            np.testing.assert_allclose(layer.inv_freq, OWN / factors, rtol=1e-4)
            assert layer.rotation_scale == pytest.approx(1.19, rel=1e-5)

    @pytest.mark.parametrize(
        ("keys", "tensors", "why"),
        [
            ({"rope.scaling.type": "dynamic"}, {}, "rope.scaling.type='dynamic'"),
            ({"rope.scaling.alpha": 3.0}, {}, "llama.rope.scaling.alpha=3.0"),
            ({"rope.scaling.type": "longrope"}, {}, "'longrope'"),
            (
                {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
                tensors_of(freqs=FACTORS),
                "rope_freqs.weight",
            ),
            ({}, tensors_of(factors_long=FACTORS), "rope_factors_long.weight"),
            ({}, tensors_of(freqs=FACTORS[:3]), "3 factors in rope_freqs.weight for 4 pairs"),
            ({}, tensors_of(phases=FACTORS), "rope_phases.weight"),
            (
                {f"rope.{k}": v for k, v in {**YARN, "scaling.yarn_ext_factor": 0.5}.items()},
                {},
                "llama.rope.scaling.yarn_ext_factor=0.5",
            ),
            ({"rope.freq_base_swa": 500.0}, {}, "llama.rope.freq_base_swa=500.0"),
            ({"attention.sliding_window": 16}, {}, "llama.attention.sliding_window=16"),
            ({"attention.key_length_swa": 4}, {}, "llama.attention.key_length_swa=4"),
            ({"attention.temperature_length": 64}, {}, "llama.attention.temperature_length=64"),
            ({"attention.scale": 1.0}, {}, "llama.attention.scale=1.0"),
            ({"attention.causal": False}, {}, "llama.attention.causal=False"),
        ],
    )
    def test_what_is_not_understood_is_refused_by_name(self, keys, tensors, why, path, cache):
        gguf_files.write(path, keys=keys, tensors=tensors)
        with pytest.raises(PosheadsError, match=why) as refusal:
            load_model(path)
        assert "\n" not in str(refusal.value)
        assert not cache.exists()

    def test_code_that_turns_otherwise_than_its_file_says(self, path, cache, monkeypatch):
        """A stand-in for a family whose code in transformers passes its configuration over."""
        monkeypatch.setattr(gguf_cache.FileRope, "write", lambda self, config: None)
        gguf_files.write(path, keys={"rope.scaling.factor": 4.0})
        with pytest.raises(PosheadsError, match="LlamaForCausalLM turns by 4 pairs"):
            load_model(path)
        assert not list(cache.iterdir())


class TestWeights:
    @pytest.mark.parametrize(
        ("options", "why"),
        [
            (
                {"renamed": {"blk.1.attn_q.weight": "blk.1.attn_x.weight"}},
                r"lacks model\.layers\.1\.self_attn\.q_proj\.weight",
            ),
            ({"keys": {"block_count": 3}}, r"model\.layers\.2\..* and 6 more"),
            ({"tensors": {"blk.0.attn_q.bias": np.ones(32)}}, r"holds blk\.0\.attn_q\.bias"),
        ],
        ids=["renamed", "a layer too many", "a bias"],
    )
    def test_file(self, options, why, path, cache):
        gguf_files.write(path, **options)
        with pytest.raises(PosheadsError, match=why):
            load_model(path, device="cpu")
        assert not list(cache.iterdir())

    @pytest.mark.parametrize("options", [{"cls": "bridge"}, {}, {"device_map": {"": "cpu"}}])
    def test_folder(self, options, small_folder):
        from safetensors.torch import load_file, save_file

        folder = small_folder("Llama", tie_word_embeddings=True)
        load_model(folder, **options)  # tied weights and frequencies don't lack
        state = load_file(folder / "model.safetensors")
        gone = state.pop("model.layers.1.mlp.up_proj.weight")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(PosheadsError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
            load_model(folder, **options)
        assert gone.numel()

    @pytest.mark.parametrize("layers", [3, 1])
    def test_folder_whose_config_counts_other_layers(self, layers, small_folder):
        folder = small_folder("Llama")
        text = (folder / "config.json").read_text()
        config = text.replace('"num_hidden_layers": 2', f'"num_hidden_layers": {layers}')
        assert config != text
        (folder / "config.json").write_text(config)
        if layers == 3:
            with pytest.raises(PosheadsError, match=r"model\.layers\.2\..* and 6 more"):
                load_model(folder, device="cpu")
        else:
            with pytest.warns(UserWarning, match=r"holds model\.layers\.1\..* and 6 more"):
                load_model(folder, device="cpu")

    def test_transformers_is_left_as_it_was(self, small_folder):
        from transformers import PreTrainedModel

        before = PreTrainedModel.__dict__["from_pretrained"]
        load_model(small_folder("Llama"), cls="bridge", device="cpu")
        assert PreTrainedModel.__dict__["from_pretrained"] is before


def test_another_converter_converts_again(path, cache, monkeypatch):
    gguf_files.write(path)
    folders = {gguf_cache.converted(path)}
    monkeypatch.setattr(gguf_cache, "_CONVERSION", 0)
    folders.add(gguf_cache.converted(path))
    monkeypatch.setattr(gguf_cache, "version", lambda name: "0.0")
    folders.add(gguf_cache.converted(path))
    assert len(folders) == 3 == len(list(cache.iterdir()))


@pytest.mark.parametrize(
    ("own", "expected"),
    [("Tiny Llama 1B", "Tiny Llama 1B"), ("/data/runs/tiny", "tiny"), (None, "model")],
    ids=["a name", "a path", "no name"],
)
def test_a_model_has_the_files_own_name(own, expected, path, tmp_path):
    gguf_files.write(path, name=own)
    for source in (path, tmp_path):
        model = load_model(source, cls="bridge", device="cpu")
        assert model.cfg.model_name == expected
        assert RotaryGeometry.from_model(model).model_name == expected


TEXT = "x  5 12345 don't\n\n y"
WORDS = [" don", "'t", "\n\n", " y"]
LLAMA3 = ["x", " ", " ", "5", " ", "123", "45", *WORDS]
QWEN2 = ["x", " ", " ", "5", " ", "1", "2", "3", "4", "5", *WORDS]
GPT4O = [*LLAMA3[:7], " don't", "\n\n", " y"]
DIGITS = ["x", "  ", "5", " ", "1", "2", "3", "4", "5", *WORDS]
# By hand, from the regular expressions in llama.cpp and in the authors' tokenizer.json.
PIECES = {
    "gpt-2": ["x", " ", " 5", " 12345", *WORDS],
    **dict.fromkeys(("smollm", "starcoder", "refact"), DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "lfm2", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "qwen35", "deepseek-r1-qwen", "stablelm2", "tekken"), QWEN2),
    **dict.fromkeys(("gpt-4o", "minimax-m2"), GPT4O),
    "deepseek-coder": [*DIGITS[:9], " don", "'", "t", "\n", "\n", " y"],
    "deepseek-v3": ["x", "  ", "5", " ", "123", "45", *WORDS],
}


class TestTokenizer:
    @pytest.mark.parametrize("pre", PIECES)
    def test_text_is_cut_as_the_file_says(self, pre, path):
        gguf_files.write(path, tokenizer={"pre": pre})
        read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = as_trained(read, GGUFReader(str(path)), path.name)
        inner = tokenizer.backend_tokenizer
        pieces = [piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str(TEXT)]
        decode = decoders.ByteLevel().decode
        assert [decode([piece]) for piece in pieces] == PIECES[pre]
        whole = pre in ("llama3", "llama-v3", "llama-bpe", "lfm2", "tekken")
        assert tokenizer.tokenize("qqq") == (["qqq"] if whole else ["q", "q", "q"])
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == TEXT
        assert max(ids) < len(gguf_files.TOKENS)

    def test_qwen_composes_letters(self, path):
        gguf_files.write(path, tokenizer={"pre": "qwen2"})
        tokenizer = load_model(path, device="cpu").tokenizer
        assert tokenizer.tokenize("e\u0301") == tokenizer.tokenize("\u00e9")
        assert isinstance(tokenizer.backend_tokenizer.normalizer, normalizers.NFC)

    @pytest.mark.parametrize(
        ("tokenizer", "why"),
        [
            ({"pre": "falcon"}, r"cut by 'falcon' \(tokenizer.ggml.pre\)"),
            ({"pre": "default"}, "cut by 'default'"),
            ({"pre": None}, "cut by None"),
            ({"model": "rwkv"}, "of the kind 'rwkv'"),
        ],
    )
    def test_unknown_kinds_are_refused_by_name(self, tokenizer, why, path, cache):
        gguf_files.write(path, tokenizer=tokenizer)
        with pytest.raises(PosheadsError, match=why):
            load_model(path)
        assert not cache.exists()

    def test_special_tokens_of_other_letters(self, path):
        """transformers spells such a name anew, and makes a new token of BOS."""
        tokens = ["<｜begin▁of▁sentence｜>", *gguf_files.TOKENS[1:]]
        gguf_files.write(
            path, tokenizer={"pre": "deepseek-v3", "tokens": tokens, "add_bos_token": True}
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf_cache.converted(path))
        assert (tokenizer.bos_token, tokenizer.bos_token_id) == (tokens[0], 0)
        assert tokenizer("d")["input_ids"] == [0, tokens.index("d")]
        assert tokenizer(tokens[0], add_special_tokens=False)["input_ids"] == [0]
        assert len(tokenizer) == len(tokens)

    def test_smollm2_reads_as_its_authors(self, smollm2_folder, tokenizer):
        """Digits one by one, then bytes: https://huggingface.co/HuggingFaceTB/SmolLM2-135M."""
        reader = GGUFReader(str(models._registered("smollm2-135m")))
        tokens, merges = (
            reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "merges")
        )
        theirs = Tokenizer(
            BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
        )
        theirs.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        for text in ("x  5", "a\n 5", "  return 10", "1 2  3", "don't 12", "x\n\n  5", "½ ²"):
            assert tokenizer.tokenize(text) == theirs.encode(text).tokens
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        ours = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert ours == theirs.encode(text).ids
