"""A TransformerLens model as an lm-eval model."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, StoppingCriteria

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.fused import fused_attention
from tl_posheads.hooks.lengths import ANY_LENGTH, context_length, own_frequencies
from tl_posheads.hooks.logprobs import generate, unembed_only
from tl_posheads.hooks.model import LensModel, input_device, model_name, require_lens
from tl_posheads.hooks.tokenizer import begin, end_tokens, generation_config, tokenizer_of

if TYPE_CHECKING:
    TemplateLM: Any = object
    _MISSING: ImportError | None = None
else:
    try:
        from lm_eval.api.model import TemplateLM

        _MISSING = None
    except ImportError as problem:  # optional; this module raises when it is used
        TemplateLM, _MISSING = object, problem

_SAMPLING = ("top_k", "top_p", "temperature", "freq_penalty", "repetition_penalty")
# Options of a checkpoint's generation_config that change greedy text, with their neutral values.
_GREEDY: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    **dict.fromkeys(
        (
            "suppress_tokens",
            "begin_suppress_tokens",
            "bad_words_ids",
            "sequence_bias",
            "forced_eos_token_id",
            "exponential_decay_length_penalty",
            "stop_strings",
        )
    ),
}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
MAX_GEN_TOKS = 256


def require_lm_eval() -> None:
    if _MISSING is not None:
        raise PosheadsError(f"{_MISSING}; for lm-eval, pip install 'tl-posheads[evals]'")


class LensLM(TemplateLM):  # type: ignore[misc]
    """A TransformerLens model as lm-eval's ``lm``, for ``lm_eval.simple_evaluate(model=...)``.

    It calls the live model: inside ``with tl_posheads.ablate(model, heads)``, or with any other
    hooks, the same object gives the ablated model's answers. Texts aren't padded; a batch holds
    texts of equal length, so the batch size affects only the speed.

    Args:
        model: HookedTransformer or TransformerBridge with a tokenizer.
        batch_size: most texts at once.
        max_length: context length in tokens, by default the model's. Longer texts lose their
            middle, see :func:`cut_middle`; room for new tokens is reserved.
        max_gen_toks: most new tokens, where a task doesn't set it.
        tokenizer: None loads the checkpoint's own from ``model.tokenizer.name_or_path``:
            TransformerLens changes its copy to begin every text with BOS, but in the
            benchmarks' published numbers only checkpoints that do so have it. The model's copy
            is used if there is no other.

    Raises:
        PosheadsError: no lm-eval, not a TransformerLens model, no tokenizer, or an invalid batch
            size or length. From its methods: a request that doesn't fit into the context, or an
            option that the model's ``generate`` doesn't have.

    Example:
        >>> lm = LensLM(model)                                  # doctest: +SKIP
        >>> with tl_posheads.ablate(model, heads):              # doctest: +SKIP
        ...     lm_eval.simple_evaluate(lm, tasks=["longbench_qasper"])
    """

    def __init__(
        self,
        model: LensModel,
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        tokenizer: Any = None,
    ) -> None:
        require_lm_eval()
        super().__init__()
        require_lens(model)
        self.model = model
        self.tokenizer = _own_tokenizer(model) if tokenizer is None else tokenizer
        n_ctx = context_length(model) or ANY_LENGTH
        self.max_length = n_ctx if max_length is None else max_length
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        for name in ("batch_size", "max_length", "max_gen_toks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PosheadsError(f"{name}={value!r} was given; expected at least 1")
        if self.max_length > n_ctx:
            raise PosheadsError(
                f"max_length={max_length} was given, but {model_name(model)} is set up for {n_ctx}"
            )

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context: BOS, else EOS."""
        return int((begin(self.tokenizer) or [self.eot_token_id])[0])

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; a text that already begins with BOS (from a chat template) gets no second."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        bos = self.tokenizer.bos_token if begin(self.tokenizer) else None
        if add_special_tokens is None and bos and string.startswith(bos):
            options = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text, by the tokenizer's template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def get_model_info(self) -> dict[str, Any]:
        return {"model": model_name(self.model), "model_class": type(self.model).__name__}

    def _batches(self, keys: Sequence[tuple[int, str]], desc: str, disable: bool) -> Any:
        """Indices of requests with equal keys (length first), longest first."""
        groups = defaultdict(list)
        for i, key in enumerate(keys):
            groups[key].append(i)
        batches = [
            groups[key][first : first + self.batch_size]
            for key in sorted(groups, key=lambda key: -key[0])
            for first in range(0, len(groups[key]), self.batch_size)
        ]
        return tqdm(batches, desc=desc, disable=disable, dynamic_ncols=True)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether greedy decoding gives it."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        longest = max((len(wanted) for _, _, wanted in requests), default=0)
        if longest > self.max_length:
            raise PosheadsError(
                f"a continuation of {longest} tokens was given, but the context "
                f"holds {self.max_length}"
            )
        # The last token is predicted, not part of the input.
        rows = [
            cut_middle(context, self.max_length + 1 - len(wanted)) + wanted
            for _, context, wanted in requests
        ]
        own = own_frequencies(self.model)
        with torch.no_grad(), own, fused_attention(self.model):
            keys = [(len(row), "") for row in rows]
            for batch in self._batches(keys, "log-likelihoods", disable_tqdm):
                tokens = torch.tensor([rows[i] for i in batch], device=self.device)
                n_wanted = [len(requests[i][2]) for i in batch]
                n_in = tokens.shape[1] - 1
                with unembed_only(self.model, torch.arange(n_in - max(n_wanted), n_in)):
                    logits = self.model(tokens[:, :-1], return_type="logits")
                for i, row, scores, n in zip(batch, tokens, logits, n_wanted, strict=True):
                    if n:
                        scores, wanted = scores[-n:].float(), row[-n:]
                        each = scores.log_softmax(-1).gather(-1, wanted[:, None])
                        out[i] = (float(each.sum()), bool((scores.argmax(-1) == wanted).all()))
        return out

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts in nats, in non-overlapping windows of the context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        owners, windows = [], []
        for i, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                owners.append(i)
                windows.append((None, *make_disjoint_window(window)))
        out = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (logprob, _) in zip(owners, scored, strict=True):
            out[i] += logprob
        return out

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generated texts, up to an end token, a stop string or the maximum length.

        As in transformers, the checkpoint's ``generation_config`` applies to greedy text (end
        tokens, ``repetition_penalty``); a task's own options take precedence.
        """
        contexts, plans = [], []
        for request in requests:
            text, given = request.args[:2]
            plan = _plan(self.model, given, self.max_gen_toks)
            room = self.room_before(plan["max_new_tokens"])
            contexts.append(cut_middle(self.tok_encode(text) or [self.prefix_token_id], room))
            plans.append(plan)
        out = [""] * len(plans)
        keys = [(len(row), repr(plan)) for row, plan in zip(contexts, plans, strict=True)]
        for batch in self._batches(keys, "generating", disable_tqdm):
            written = self._write([contexts[i] for i in batch], **plans[batch[0]])
            for i, text in zip(batch, written, strict=True):
                out[i] = text
        return out

    def room_before(self, n_new: int) -> int:
        """Longest prompt, in tokens, that leaves room for ``n_new`` new tokens.

        Raises:
            PosheadsError: there is no room for a prompt.
        """
        if n_new >= self.max_length:
            raise PosheadsError(
                f"{n_new} new tokens were requested, but the context holds "
                f"{self.max_length}; give a larger max_length or a smaller max_gen_toks"
            )
        return self.max_length - n_new

    def _write(
        self, rows: list[list[int]], stop: list[str], max_new_tokens: int, **options: Any
    ) -> list[str]:
        start = len(rows[0])
        # Decoding drops special tokens, so stop strings with a special token's name wouldn't match.
        added = self.tokenizer.get_added_vocab()
        silent = [self.tokenizer.eos_token_id, *(added[s] for s in stop if s in added)]
        ends = [*end_tokens(self.model, self.tokenizer), *silent[1:]]

        def text(row: Tensor) -> str:
            ids = row[start:].tolist()
            n = next((i for i, token in enumerate(ids) if token in ends), len(ids))
            # lm-eval keeps other end tokens; a chat's are special, so they aren't shown.
            n += n < len(ids) and ids[n] not in silent
            return str(self.tokenizer.decode(ids[:n], skip_special_tokens=True))

        # HookedTransformer can't stop at strings.
        if stop and "stopping_criteria" in inspect.signature(self.model.generate).parameters:
            options["stopping_criteria"] = _Stop(stop, text)
        written = generate(self.model, torch.tensor(rows), max_new_tokens, ends, **options)
        return [_cut(text(row), stop) for row in written]


class _Stop(StoppingCriteria):
    """Stops each row once its generated text contains one of the strings."""

    def __init__(self, stop: list[str], text: Callable[[Tensor], str]) -> None:
        self.stop, self.text = stop, text

    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Any, **kwargs: Any
    ) -> Bool[Tensor, " batch"]:
        texts = [self.text(row) for row in input_ids]
        found = [_cut(text, self.stop) != text for text in texts]
        return torch.tensor(found, device=input_ids.device)


def cut_middle(tokens: list[int], room: int) -> list[int]:
    """The first and the last ``room / 2`` tokens, if there are more than ``room``.

    LongBench truncates this way (Bai et al. 2024, arXiv 2308.14508) because its prompts begin and
    end with the instruction. If ``room`` is odd, the second half gets one more, as in lm-eval. The
    remaining tokens aren't tokenised again.

    Example:
        >>> cut_middle([1, 2, 3, 4, 5, 6], 3)
        [1, 5, 6]
    """
    if len(tokens) <= room:
        return tokens
    return tokens[: room // 2] + tokens[len(tokens) - (room - room // 2) :]


def new_tokens(given: Mapping[str, Any], default: int = MAX_GEN_TOKS) -> int:
    """The largest number of new tokens in a task's generation_kwargs."""
    return int(next((n for name in _LENGTHS if (n := given.get(name)) is not None), default))


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string.

    Example:
        >>> _cut("Paris.\\nQuestion: no", ["\\n", "Question"])
        'Paris.'
    """
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _plan(model: LensModel, given: Mapping[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """A task's generation_kwargs as arguments of the model's ``generate``, and stop strings."""
    left = {name: value for name, value in given.items() if name not in _LENGTHS}
    until = left.pop("until", None) or []
    temperature = float(left.pop("temperature", None) or 0.0)
    do_sample = left.pop("do_sample", None)
    sample = temperature > 0 if do_sample is None else bool(do_sample)
    config = generation_config(model)
    left = {**{name: getattr(config, name, None) for name in _GREEDY}, **left}
    left = {
        name: value
        for name, value in left.items()
        if name not in _GREEDY or value not in (None, _GREEDY[name])
    }
    known = inspect.signature(model.generate).parameters
    unknown = [name for name in left if name not in _SAMPLING or name not in known]
    if unknown:
        ours = [name for name in unknown if name not in given]
        neutral = ", ".join(f"{name}={_GREEDY[name]}" for name in ours)
        raise PosheadsError(
            f"{'the checkpoint' if ours else 'the task'} generates with {', '.join(unknown)}, "
            f"which {type(model).__name__}.generate doesn't have; set gen_kwargs "
            + (f"to turn it off ({neutral})" if ours else "without it")
        )
    if sample:
        left["temperature"] = temperature
    stop = [until] if isinstance(until, str) else list(until)
    return {
        **left,
        "do_sample": sample,
        "max_new_tokens": new_tokens(given, max_gen_toks),
        "stop": [s for s in stop if s],
    }


def _own_tokenizer(model: LensModel) -> Any:
    theirs = tokenizer_of(model)
    try:
        own = AutoTokenizer.from_pretrained(theirs.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return theirs
    # A modified tokenizer may still carry the name of the one that it was made from.
    return own if own.get_vocab().items() <= theirs.get_vocab().items() else theirs
