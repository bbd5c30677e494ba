"""GGUF files, converted once to folders that transformers loads and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.errors import PosheadsError
from tl_posheads.io.gguf_rope import FileRope, file_rope
from tl_posheads.io.gguf_tokenizer import as_trained, require_known_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFReader

# Raise it whenever a conversion writes something different.
_CONVERSION = 2


def first_line(error: BaseException, limit: int = 200) -> str:
    """One short line of an error message, which may be pages long (transformers')."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, other libraries print no progress bars and banners."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def cache_folder() -> Path:
    """Folder of converted models; ``TL_POSHEADS_CACHE`` overrides the user's cache."""
    own = os.environ.get("TL_POSHEADS_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tl_posheads"


def converted(gguf: Path) -> Path:
    """The GGUF file as a ``save_pretrained`` folder in the cache, created if missing.

    Raises:
        PosheadsError: the file is damaged, lacks weights, or has unsupported metadata about
            positions or tokenizer; the cache can't be written.
    """
    try:
        with gguf.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 24):
                digest.update(block)
    except OSError as error:
        raise PosheadsError(f"{gguf} can't be read ({error.strerror}); check the path") from None
    made_by = f"{_CONVERSION}-transformers-{version('transformers')}"
    folder = cache_folder() / f"gguf-{digest.hexdigest()}-{made_by}"
    if (folder / "config.json").is_file():
        return folder
    reader = _read(gguf)
    require_known_tokenizer(reader, gguf.name)
    rope = file_rope(reader, gguf.name)
    print(f"Converting {gguf.name} (only once) into {folder.parent}", file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written elsewhere and renamed: an interrupted or a second run sees all or nothing.
        aside = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder.parent, error) from None
    try:
        _convert(gguf, reader, rope, aside)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    except OSError as error:
        raise _unwritable(folder.parent, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def name_in(folder: Path) -> str | None:
    """``general.name`` of the GGUF file that :func:`converted` made the folder from."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("_model_name_or_path")  # transformers' key


def _unwritable(folder: Path, error: OSError) -> PosheadsError:
    return PosheadsError(
        f"the converted model can't be written to {folder} ({first_line(error, 80)}); set "
        "TL_POSHEADS_CACHE to a folder with room for it"
    )


def require_complete(loaded: dict[str, Any], what: str) -> None:
    """Refuse a model whose missing weights transformers has initialised at random.

    Unused weights give a warning: they may be those of a second head, or of layers that the config
    doesn't list.

    Args:
        loaded: loading info from ``from_pretrained(..., output_loading_info=True)``.
        what: the model's name in messages.
    """
    if missing := sorted(loaded["missing_keys"]):
        raise PosheadsError(
            f"{what} lacks {named(missing)}: transformers would initialise them at random; get the "
            "model again, or correct its config"
        )
    if unused := sorted(loaded["unexpected_keys"]):
        warnings.warn(
            f"{what} holds {named(unused)}, for which its config has no place", stacklevel=3
        )


def named(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read(path: Path) -> GGUFReader:
    """Read all headers and tensor extents, so that a truncated file fails here."""
    from gguf import GGUFReader

    try:
        return GGUFReader(str(path))
    # the reader has no error class of its own: it raises numpy's, mmap's and struct's
    except Exception as error:
        raise PosheadsError(
            f"{path} isn't a whole GGUF file ({first_line(error, 80)}); get it again"
        ) from None


def _convert(gguf: Path, reader: GGUFReader, rope: FileRope, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = dict(gguf_file=gguf.name, local_files_only=True)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(gguf.parent), **where)
            rope.write(config)
            options = dict(config=config, dtype=torch.float32, output_loading_info=True)
            both: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), **options, **where)
            read, loaded = both
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
    except Exception as error:
        raise PosheadsError(
            f"transformers can't read the GGUF file {gguf} ({first_line(error)}); give a "
            "folder or hub id of the same model"
        ) from None
    require_complete(loaded, gguf.name)
    _require_all_read(read, reader, gguf.name)
    rope.check(read)
    tokenizer = as_trained(tokenizer, reader, gguf.name)
    # transformers marks the model as quantised and refuses to save it, although its weights
    # are plain numbers by now; a copy without the mark can be saved.
    config = read.config
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(mark, None)
    with torch.device("meta"):
        twin = type(read)(config)
    state = read.state_dict()
    twin.load_state_dict(state, assign=True)
    # Dequantised weights need float32; files with 16-bit weights stay at half the size.
    lossless = next(
        (
            dtype
            for dtype in (torch.bfloat16, torch.float16)
            if all(torch.equal(x.to(dtype).float(), x.float()) for x in state.values())
        ),
        torch.float32,
    )
    with quiet():
        torch.nn.Module.to(twin, dtype=lossless).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _require_all_read(model: Any, reader: GGUFReader, name: str) -> None:
    """Refuse a file with tensors that transformers has no place for, such as biases."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    if getattr(getattr(model, "hf_quantizer", None), "supported", False):
        return  # its newer reader rightly leaves out layers of other predictors
    tensors = {x.name: int(x.n_elements) for x in reader.tensors if "rope" not in x.name}
    if model.config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    if sum(tensors.values()) == sum(x.numel() for x in model.parameters()):
        return
    places = get_gguf_hf_weights_map(model, TensorProcessor())
    if left := sorted(set(tensors) - set(places)):
        raise PosheadsError(
            f"{name} holds {named(left)}, for which transformers' {type(model).__name__} has no "
            "place; give a folder or hub id of the same model"
        )
