"""How texts begin: as the checkpoint's own tokenizer has it, whatever the lens made of its copy."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from helpers import architectures, small_models
from tl_posheads import PosheadsError, load_corpus
from tl_posheads.hooks.tokenizer import begin, tokenizer_of
from tl_posheads.io import models
from tl_posheads.tasks import Copying, Passkey, Perplexity
from tl_posheads.tasks.lm_eval import LensLM

pytestmark = pytest.mark.lens
CLASSES = ["hooked", "bridge"] if models.hooked_available() else ["bridge"]
NAMES = ["<pad>", "<s>", "<|end|>", *(f"w{i}" for i in range(3, architectures.N_VOCAB))]

# what the tokenizer's files say of BOS -> what texts begin with
KINDS = {"own": ("<|im_start|>", [1]), "none": (None, []), "also EOS": ("<|im_end|>", [2])}
# Its template begins with BOS where there is one.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, small_folder, tokenizer):
    """A folder, its own tokenizer and what its texts begin with."""
    bos, start = KINDS[request.param]
    folder = small_folder("Qwen2", max_position_embeddings=1024, bos_token_id=None)
    changed = copy.deepcopy(tokenizer)
    changed.bos_token, changed.chat_template = bos, TEMPLATE
    changed.save_pretrained(folder)
    fresh = AutoTokenizer.from_pretrained(folder)
    assert [x for x in [fresh.bos_token_id] if x is not None] == start
    return folder, fresh, start


@pytest.fixture(scope="module", params=CLASSES)
def model(request, checkpoint):
    return models.load_model(checkpoint[0], cls=request.param, device="cpu")


def test_corpora_and_tasks_begin_as_the_checkpoint_does(model, checkpoint):
    _, fresh, start = checkpoint
    assert begin(model.tokenizer) == start

    def starts(tokens):
        head = tokens[: len(start)].tolist()
        # Nothing else that is special follows.
        return head == start and not set(tokens[len(start) : 40].tolist()) & {0, 1, 2}

    assert all(map(starts, load_corpus("python-docs", model, n_docs=2, length=64)))
    bare = load_corpus("python-docs", model, n_docs=2, length=64, prepend_bos=False)
    assert not (bare < 3).any()
    for task in (
        Perplexity(length=64, n=1, short_length=16),
        Copying(length=64, segment=12, n=1),
        Passkey(length=128, n=1, short_length=64, instruct=False),
        Passkey(length=128, n=1, short_length=64),
    ):
        [prompt] = task.prompts(model)
        assert starts(prompt.tokens), task
        assert starts(prompt.short.tokens), task
    # The last of them is a chat, which the checkpoint's own template writes.
    text = fresh.decode(prompt.tokens)
    message = text.split("user: ")[1].split("\nassistant")[0]
    frame = fresh.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(frame)


def test_lm_eval_begins_as_the_checkpoint_does(model, checkpoint, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install 'tl-posheads[evals]'")
    _, fresh, start = checkpoint
    assert LensLM(model).prefix_token_id == (start or [fresh.eos_token_id])[0]
    assert LensLM(model).tok_encode("Ann has") == fresh("Ann has")["input_ids"]
    # The same where the checkpoint's files are gone, and the lens's copy is all there is.
    monkeypatch.setattr(model.tokenizer, "name_or_path", "nowhere/to-be-found")
    assert LensLM(model).prefix_token_id == (start or [fresh.eos_token_id])[0]


@pytest.mark.parametrize("eos", ["<|end|>", None])
@pytest.mark.parametrize("bos", ["<s>", "<|end|>", None])
@pytest.mark.parametrize(
    "kind", ["GPT2", "Qwen2", "GPTNeoX", "Llama", "Gemma", "Cohere", "PreTrained"]
)
def test_every_class_of_tokenizers(tmp_path, kind, bos, eos):
    """They differ in the tokens that they have by default."""
    vocabulary = {name: i for i, name in enumerate(NAMES)}
    special = dict(bos_token=bos, eos_token=eos, unk_token="<pad>", pad_token="<pad>")
    if kind == "PreTrained":
        inner = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    else:
        made = getattr(transformers, f"{kind}Tokenizer")(vocab=vocabulary, merges=[], **special)
    made.save_pretrained(tmp_path)
    fresh, given = (AutoTokenizer.from_pretrained(tmp_path) for _ in range(2))
    hf_model = small_models.build(*architectures.ROTARY["Llama"])
    lens = TransformerBridge.boot_transformers(
        "tiny", hf_model=hf_model, tokenizer=given, device="cpu"
    )
    own = fresh.bos_token_id
    assert begin(lens.tokenizer) == ([] if own is None else [own])
    assert begin(fresh) == begin(lens.tokenizer)


def test_none_at_all():
    with pytest.raises(PosheadsError, match=r"has no tokenizer.*set model\.tokenizer"):
        tokenizer_of(torch.nn.Linear(1, 1))
