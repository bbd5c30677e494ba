"""A command that writes to a folder: its request, how it resumes, how it shows a finished run."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_posheads.cli import run_folder
from tl_posheads.cli.options import local_files
from tl_posheads.errors import PosheadsError
from tl_posheads.io.files import write_bytes, write_text

if TYPE_CHECKING:
    from tl_posheads.hooks.model import LensModel

_SHOWN = ".csv", ".txt", ".png", ".html"  # files that a person opens
# Options that change no number. Of --scores the folder's content counts, not its name.
_UNASKED = "action", "command", "out", "overwrite", "device", "top", "best", "scores"


def number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def aligned(cells: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Rows of cells as lines of text: so many columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row))
        for row in cells
    ]


@dataclass(frozen=True)
class Run:
    """The command's arguments, and the run in the folder ``args.out`` that they ask for."""

    args: argparse.Namespace
    request: dict[str, Any]
    state: run_folder.State

    def options(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in names}

    def model(self) -> Any:
        from tl_posheads.io.models import load_model

        return load_model(self.args.model, **self.options("cls", "device", "dtype"))

    def texts(self, model: LensModel, length: int | None = None) -> Any:
        """Token ids ``[doc, pos]``, by default ``--length`` of them."""
        from tl_posheads.io.corpora import corpus_provenance, load_corpus

        args, length = self.args, length or self.args.length
        tokens = load_corpus(args.corpus, model, n_docs=args.docs, length=length, seed=args.seed)
        if corpus_provenance(args.corpus)["sha256"] != self.request["corpus_sha256"]:
            raise PosheadsError(
                f"{args.corpus} was changed while the model was loaded; run the command again"
            )
        return tokens

    @property
    def folder(self) -> Path:
        """Where the run writes until it is finished."""
        return run_folder.folder_begun(self.args.out)

    @contextmanager
    def started(self) -> Iterator[Path]:
        """:func:`run_folder.running`; gives the checkpoint that the computation resumes from.

        Says when a run is resumed, and how to resume one that was stopped.
        """
        out, hint = self.args.out, " without --overwrite" if self.args.overwrite else ""
        if self.state == "resume":
            print(f"Resuming the run that was stopped in {out}.", file=sys.stderr)
        try:
            with run_folder.running(out, self.request, self.state) as folder:
                yield folder / run_folder.CHECKPOINT
        except KeyboardInterrupt:
            if not self.folder.exists():
                raise
            said = f"what was done is in {out}, and the same command{hint} resumes from there"
            raise KeyboardInterrupt(f"stopped; {said}") from None

    def save(self, found: Any, files: Mapping[str, Any]) -> None:
        """Write the result, and ``files``: ``.png`` from a figure, others from a table or text."""
        found.provenance["request"] = self.request
        found.save(self.folder)
        for name, what in files.items():
            if name.endswith(".png"):
                from tl_posheads.figures.style import png

                write_bytes(self.folder / name, png(what))
            else:
                text = what if isinstance(what, str) else what.to_csv(index=False)
                write_text(self.folder / name, text)


def new_command(
    commands: Any,
    name: str,
    run: Callable[[Run], Any],
    lines: Callable[..., list[str]],
    result: str,
    texts: Mapping[str, str],
    **more: Callable[[Any], Any],
) -> Callable[..., Any]:
    """Add a command with the parser's ``texts``; returns what adds its options.

    ``run`` computes, saves and returns a ``tl_posheads.<result>``; its ``lines`` are printed.
    ``more`` overrides or extends what the options put into the request.
    """

    def action(args: argparse.Namespace) -> None:
        request = _request(name, args) | {key: value(args) for key, value in more.items()}
        with ExitStack() as held:
            # A finished run is only read, by any number of processes. Another process may finish
            # the run before this one gets the lock.
            if run_folder.state_of(args.out, request, overwrite=args.overwrite) != "finished":
                held.enter_context(run_folder.locked(args.out))
            state = run_folder.state_of(args.out, request, overwrite=args.overwrite)
            if state == "finished":
                again = "--overwrite computes it again"
                print(f"{args.out} already holds this run, finished; {again}.\n")
                found = getattr(import_module("tl_posheads"), result).load(args.out)
            else:
                found = run(Run(args, request, state))
        top = {"top": args.top} if "top" in args else {}
        tell(lines(found, **top), args.out)

    parser = commands.add_parser(name, **texts)
    parser.set_defaults(action=action)
    add: Callable[..., Any] = parser.add_argument
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    add("--overwrite", action="store_true", help="replace another run's results in DIR")
    return add


def tell(lines: Sequence[str], out: Path) -> None:
    """Print the lines, and those of the run's files that a person opens."""
    files = [out / name for name in (run_folder.read_run(out) or {}).get("files", ())]
    shown = [str(file) for file in files if file.suffix in _SHOWN and file.exists()]
    print("\n".join(lines))
    print(f"\nfiles: {', '.join(shown) or out}")


def _request(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What decides the numbers, and nothing else: two runs with equal requests are one run."""
    from tl_posheads.io.corpora import corpus_provenance

    asked = {key: value for key, value in vars(args).items() if key not in _UNASKED}
    asked["command"] = name
    if hasattr(args, "scores"):
        label = args.scores and args.scores / "scores.json"
        if label and not label.is_file():
            wanted = "a folder that tl-posheads score wrote"
            raise PosheadsError(f"{args.scores} holds no scores; give {wanted}")
        asked["scores_sha256"] = label and hashlib.sha256(label.read_bytes()).hexdigest()
    corpus, files = corpus_provenance(args.corpus), local_files(args.model)
    asked.update(model_files=files, corpus=corpus["name"], corpus_sha256=corpus["sha256"])
    return dict(json.loads(json.dumps(asked)))  # as run.json gives it back, lists for tuples
