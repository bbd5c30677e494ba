"""Greedy texts against plain transformers: where they end, and that the whole prompt is read."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from helpers import architectures, small_models
from tl_posheads import PosheadsError
from tl_posheads.hooks import logprobs as passes
from tl_posheads.hooks.logprobs import greedy
from tl_posheads.hooks.tokenizer import end_tokens
from tl_posheads.io import models
from tl_posheads.tasks.lm_eval import LensLM

pytestmark = pytest.mark.lens
CLASSES = ["hooked", "bridge"] if models.hooked_available() else ["bridge"]
PROMPT = "The sky is"


def slow(hf_model, tokens, n):
    """Greedy decoding with nothing but whole passes."""
    row = tokens.tolist()
    with torch.no_grad():
        for _ in range(n):
            logits = hf_model(torch.tensor([row]), use_cache=False).logits
            row.append(int(logits[0, -1].argmax()))
    return row[len(tokens) :]


@pytest.fixture(scope="module")
def chat(small_folder, tokenizer):
    """A folder whose generation_config ends texts at what the model says third."""
    folder = small_folder("Llama", tie_word_embeddings=False)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(tokenizer(PROMPT)["input_ids"])
    said = slow(plain, ids, 8)
    assert said[2] not in said[:2]
    assert 2 not in said
    GenerationConfig(eos_token_id=[2, said[2]], bos_token_id=1).save_pretrained(folder)
    return folder, ids, said


@pytest.fixture(scope="module", params=CLASSES)
def talker(request, chat):
    return models.load_model(chat[0], cls=request.param, device="cpu")


def write(model, **options):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install lm-eval")
    from lm_eval.api.instance import Instance

    assert lm_eval
    options = {"max_gen_toks": 8, "do_sample": False, "until": [], **options}
    [text] = LensLM(model).generate_until(
        [Instance("generate_until", {}, (PROMPT, options), 0)], disable_tqdm=True
    )
    return text


def test_every_end_token_ends_a_text(talker, chat, tokenizer):
    folder, ids, said = chat
    plain = AutoModelForCausalLM.from_pretrained(folder)
    theirs = plain.generate(ids[None], max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert theirs.tolist() == said[:3]
    assert greedy(talker, ids, 8).tolist() == said[:2]
    # Special tokens are left out of the text, as lm-eval has it; this one isn't special.
    assert write(talker) == tokenizer.decode(said[:3])
    assert end_tokens(talker, talker.tokenizer) == [2, said[2]]


@pytest.mark.skipif("hooked" not in CLASSES, reason="this line has no HookedTransformer")
def test_end_tokens_of_a_model_that_was_loaded_otherwise(chat):
    folder, ids, said = chat
    model = models.load_model(folder, cls="hooked", device="cpu")
    del model.generation_config
    assert end_tokens(model, model.tokenizer) == [2, said[2]]
    assert greedy(model, ids, 8).tolist() == said[:2]
    model.tokenizer.name_or_path = "nowhere/to-be-found"
    assert end_tokens(model, model.tokenizer) == [2]


def test_a_stop_string_that_names_a_special_token(talker, chat, tokenizer, monkeypatch):
    _, _, said = chat
    # Special tokens are left out when ids become text: the name is never seen there.
    name = tokenizer.convert_ids_to_tokens(said[1])
    monkeypatch.setattr(
        LensLM,
        "__init__",
        lambda self, model, init=LensLM.__init__: _special(self, model, init, name),
    )
    assert write(talker, until=[name, "never written"]) == tokenizer.decode(said[:1])


def _special(self, model, init, name):
    init(self, model)
    self.tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    assert name in self.tokenizer.get_added_vocab()


def test_repetition_penalty_of_the_checkpoint(chat, tokenizer, tmp_path):
    folder, ids, said = chat
    plain = AutoModelForCausalLM.from_pretrained(folder)
    config = GenerationConfig(eos_token_id=[2], repetition_penalty=0.8)
    plain.generation_config = config
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = plain.generate(ids[None], max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert theirs != said
    for cls in CLASSES:
        model = models.load_model(tmp_path, cls=cls, device="cpu")
        if cls == "hooked":
            with pytest.raises(
                PosheadsError, match=r"checkpoint generates with repetition_pen.*=1"
            ):
                write(model)
        else:
            assert write(model) == tokenizer.decode(theirs)
        assert write(model, repetition_penalty=1.0) == tokenizer.decode(said)


@pytest.mark.skipif("hooked" not in CLASSES, reason="only HookedTransformer takes them for padding")
def test_pad_tokens_of_a_prompt_are_read(chat):
    folder, ids, _ = chat
    model = models.load_model(folder, cls="hooked", device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    pad = torch.tensor([model.tokenizer.pad_token_id])
    del model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    for prompt in ([ids, pad], [pad, ids], [pad, ids, pad]):
        prompt = torch.cat(prompt)
        said = slow(plain, prompt, 5)
        assert model.tokenizer.eos_token_id not in said
        assert greedy(model, prompt, 5).tolist() == said
    assert model.tokenizer is not None


TOKENS = torch.randint(3, 90, (30,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", architectures.ROTARY)
def test_the_whole_prompt_is_read(name):
    """Cached or, where transformers and the lens disagree about the cache, without one."""
    model, row = small_models.rotary_model(name), TOKENS.tolist()
    with torch.no_grad():
        while len(row) < 36 and 2 not in row:
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    assert greedy(model, TOKENS, 6).tolist() == [token for token in row[30:] if token != 2]


def test_where_no_cache_is_read_there_is_none(monkeypatch):
    model = small_models.rotary_model("Llama")
    model.adapter.supports_kv_cache = True  # as it is booted
    passes._CACHES.clear()
    said = slow(small_models.build(*architectures.ROTARY["Llama"]), TOKENS, 6)
    for layer in range(2):
        monkeypatch.setattr(
            model.blocks[layer].attn, "_update_kv_cache", lambda k, v, **kwargs: (k, v)
        )
    options = dict(max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False)
    assert model.generate(TOKENS[None], **options)[0, 30:].tolist() != said
    with pytest.warns(UserWarning, match=r"reads no cache .* transformers \d+\.\d+.*without it"):
        assert greedy(model, TOKENS, 6).tolist() == said
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert greedy(model, TOKENS, 6).tolist() == said


def test_hooks_are_not_called_to_find_out_about_the_cache():
    model, seen = small_models.rotary_model("Llama"), []
    look = ("blocks.0.attn.hook_z", lambda z, hook: seen.append(z.shape[1]))
    with model.hooks(fwd_hooks=[look]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*reads no cache")
        greedy(model, TOKENS, 2)
    assert seen in ([30, 1], [30, 31])
