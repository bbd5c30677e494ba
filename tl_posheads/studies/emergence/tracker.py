"""Measures a model while it is trained, or its checkpoints one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_posheads.errors import PosheadsError
from tl_posheads.hooks.inputs import digest_of
from tl_posheads.hooks.model import LensModel, model_name
from tl_posheads.io.checkpoint import Checkpoint
from tl_posheads.rotary.contributions import Scale, check_scale
from tl_posheads.studies.emergence.measuring import Moment, measure_step, texts_of
from tl_posheads.studies.emergence.results import Emergence

Log = Any  # a SummaryWriter, a wandb run, or a function of step and numbers


class EmergenceTracker:
    """Measures a model in training at some of its steps.

    Args:
        model: HookedTransformer or TransformerBridge with RoPE that is being trained. A Bridge
            takes its transformers model apart; if another program trains that, like a
            ``Trainer``, track its checkpoints (:func:`track_emergence`).
        tokens: texts that training doesn't read; as ``score_heads`` takes them. Give eight or
            more: intervals and p-values are over texts.
        every: measure every so many steps, or at these steps (:func:`log_steps` spreads them).
        folder: keeps every measured step; the same run resumes from it. A folder belongs to one
            training run.
        log: where numbers also go: a TensorBoard ``SummaryWriter``, a wandb run, or a function
            of the step and a dict of numbers.
        scale: of the contributions, as ``score_heads`` has it; for scores and curves.
        seed: of everything drawn.
        progress: show a line that is kept up to date.

    It changes neither weights, gradients, modes nor the random state of training. Each measured
    step costs one forward pass over ``tokens``, what ``score_heads`` measures in it, and the
    dominant dimension of every query-key pair for the curves; memory is that of ``score_heads``.

    Raises:
        PosheadsError: what ``score_heads`` refuses; ``every`` below 1; a folder of another run; a
            ``log`` that can't take numbers.

    Example:
        >>> tracker = EmergenceTracker(model, held_out, every=100)              # doctest: +SKIP
        >>> with tracker.watching():         # counts the model's training passes
        ...     transformer_lens.tools.training.train(model, config, dataset)   # doctest: +SKIP
        >>> for step in range(n_steps):      # or by hand, in a loop of your own
        ...     tracker.see(step)
        ...     update(model)                                                   # doctest: +SKIP
        >>> tracker.result().plot()                                             # doctest: +SKIP
    """

    def __init__(
        self,
        model: LensModel,
        tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]],
        *,
        every: int | Sequence[int] = 100,
        folder: str | os.PathLike[str] | None = None,
        log: Log = None,
        scale: Scale = "none",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        check_scale(scale)
        self._model = model
        self._texts = texts_of(model, tokens)
        self._every = _schedule(every)
        self._send = _sender(log)
        self._options: dict[str, Any] = {"scale": scale, "seed": seed}
        named = {"model": model_name(model), **self._options}
        self._kept = Checkpoint(folder, {**named, "texts": [unit for unit, _ in self._texts]})
        self._moments: dict[int, Moment] = {}
        self._provenance = {**named, "tokens_sha256": digest_of(self._texts)}
        self._bar = tqdm(desc="training", unit="look", disable=not progress, dynamic_ncols=True)
        self._looking = False

    def see(self, step: int, model: LensModel | None = None) -> Moment | None:
        """Measure the model now, if this step is one of those wanted.

        Args:
            step: updates done so far.
            model: another model of the same shape, or what loads one; the one given at the start
                by default.
        """
        return self.look(step, model) if self._every(step) else None

    def look(self, step: int, model: LensModel | None = None) -> Moment:
        """Measure the model now, or read this step from the folder."""
        unit = f"step-{step:09d}"
        found = self._kept.read(unit)
        if found is not None:
            moment = Moment(**found)
        else:
            self._looking = True
            try:
                watched = self._model if model is None else loaded(model)
                moment, facts = measure_step(watched, self._texts, **self._options)
            finally:
                self._looking = False
            self._provenance |= facts
            self._kept.write(unit, vars(moment))
        self._moments[step] = moment
        self._tell(step, moment)
        return moment

    @contextmanager
    def watching(self, start: int = 0) -> Iterator[EmergenceTracker]:
        """Inside, the model's training passes are counted, and it is measured before some.

        A pass is a call of the model in training mode; with accumulated gradients a step is one
        of several. When the block ends, the model is measured once more.

        Args:
            start: steps done before.
        """
        done = start

        def count(module: Any, args: Any, kwargs: Any) -> None:
            nonlocal done
            if module.training and not self._looking:
                self.see(done)
                done += 1

        handle = self._model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()
        self.look(done)

    def result(self) -> Emergence:
        """All steps measured so far.

        Raises:
            PosheadsError: there are none.
        """
        return Emergence.of(self._moments, dict(self._provenance))

    def close(self) -> None:
        """End the line of progress."""
        self._bar.close()

    def _tell(self, step: int, moment: Moment) -> None:
        mean = moment.loss.nanmean(0)
        best = moment.rho.nan_to_num(-2.0)
        place = divmod(int(best.argmax()), best.shape[1])
        self._bar.update(1)
        self._bar.set_postfix_str(
            f"step {step}, loss near {float(mean[min(3, len(mean) - 1)]):.2f} far "
            f"{float(mean[-1]):.2f}, best L{place[0]}H{place[1]} {float(best[place]):+.2f}"
        )
        numbers = {f"loss/from_{2**o}": float(loss) for o, loss in enumerate(mean)}
        for layer in range(best.shape[0]):
            for head in range(best.shape[1]):
                numbers[f"rho/L{layer}H{head}"] = float(moment.rho[layer, head])
        self._send(step, {name: x for name, x in numbers.items() if x == x})


def track_emergence(
    models: Mapping[int, Any] | Iterable[tuple[int, Any]],
    tokens: Int[Tensor, "doc pos"] | Sequence[Int[Tensor, " pos"]],
    *,
    every: int | Sequence[int] = 1,
    folder: str | os.PathLike[str] | None = None,
    log: Log = None,
    scale: Scale = "none",
    seed: int = 0,
    progress: bool = True,
) -> Emergence:
    """Scores, curves and loss over training, from checkpoints or while training goes on.

    Args:
        models: either checkpoints by step - a model, what ``load_model`` takes, or a function that
            loads one (:func:`hub_checkpoints`, :func:`folder_checkpoints`) - or training itself: an
            iterable, a generator for one, of ``(updates done, model)``.
        tokens, folder, log, scale, seed, progress: as :class:`EmergenceTracker` has them. With
            ``folder``, measured checkpoints aren't loaded again.
        every: measure every so many steps, or at these steps.

    Raises:
        PosheadsError: no step among those wanted; what :class:`EmergenceTracker` refuses.

    Example:
        >>> found = track_emergence(                                            # doctest: +SKIP
        ...     hub_checkpoints("EleutherAI/pythia-160m", [0, 512, 4000, 143000]), tokens)
        >>> found.lead_lag()                                                    # doctest: +SKIP
        >>> def training():
        ...     for step in range(1000):
        ...         yield step, model
        ...         update(model)
        >>> found = track_emergence(training(), tokens, every=50)               # doctest: +SKIP
    """
    wanted = _schedule(every)
    check_scale(scale)
    by_step = sorted(models.items()) if isinstance(models, Mapping) else models
    tracker: EmergenceTracker | None = None
    try:
        for step, source in by_step:
            if not wanted(step):
                continue
            if tracker is None:
                source = loaded(source)
                tracker = EmergenceTracker(
                    source,
                    tokens,
                    every=1,
                    folder=folder,
                    log=log,
                    scale=scale,
                    seed=seed,
                    progress=progress,
                )
            tracker.look(step, source)
    finally:
        if tracker is not None:
            tracker.close()
    if tracker is None:
        raise PosheadsError(
            f"none of the steps is among every={every!r}; give others, or more checkpoints"
        )
    return tracker.result()


def loaded(source: Any) -> Any:
    """A model, from itself, from what loads it, or from its name."""
    if isinstance(source, nn.Module):
        return source
    if callable(source):
        return source()
    from tl_posheads.io.models import load_model

    return load_model(source)


def _schedule(every: int | Sequence[int]) -> Callable[[int], bool]:
    """Whether a step is one to measure."""
    if isinstance(every, int):
        if every < 1:
            raise PosheadsError(f"every={every} was given; expected at least 1, or a list of steps")
        period = every
        return lambda step: step % period == 0
    steps = frozenset(int(step) for step in every)
    return lambda step: step in steps


def _sender(log: Log) -> Callable[[int, dict[str, float]], None]:
    """What takes a step's numbers.

    Raises:
        PosheadsError: it can't.
    """
    if log is None:
        return lambda step, numbers: None
    if hasattr(log, "add_scalar"):  # TensorBoard's SummaryWriter

        def add(step: int, numbers: dict[str, float]) -> None:
            for name, number in numbers.items():
                log.add_scalar(name, number, step)

        return add
    if hasattr(log, "log"):  # a wandb run
        return lambda step, numbers: log.log(numbers, step=step)
    if callable(log):
        return lambda step, numbers: log(step, numbers)
    raise PosheadsError(
        f"log={log!r} was given; expected a TensorBoard SummaryWriter, a wandb run or a function "
        "of the step and a dict of numbers"
    )
