"""Intercepts a training loader where Lightning sets it up, so that another one takes its place."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils._pytree import tree_flatten_with_path

from evertune._lightning import combined_loader, combined_mode, pl, replace_method, return_method, train_data_source


def intercept(trainer: pl.Trainer, choice: str | int | None, wrap: Callable[[object], object]) -> None:
    """Put another loader in the place of a training loader, each time Lightning sets it up.

    Args:
        trainer: Trainer in the setup of a fit.
        choice: Key or position of the loader among several; None for a single one.
        wrap: Returns the loader to use, given the one that Lightning has processed.
    """
    source, process = train_data_source(trainer), trainer.strategy.process_dataloader
    request, names = source.dataloader, list[str]()

    # Lightning processes the loaders one at a time and without their names. Remember the names when it requests the
    # loaders, then take the next name each time it processes one.
    def request_and_choose() -> object:
        loaders = request()
        names[:] = _checked_names(loaders, choice)
        return loaders

    def process_and_wrap(dataloader: object) -> object:
        processed = process(dataloader)
        if not trainer.training:
            return processed
        return wrap(processed) if names.pop(0) == _name(choice) else processed

    replace_method(source, "dataloader", request_and_choose)
    replace_method(trainer.strategy, "process_dataloader", process_and_wrap)


def release(trainer: pl.Trainer, choice: str | int | None, wrapped: object, original: object) -> None:
    """Undo :func:`intercept`."""
    return_method(trainer.strategy, "process_dataloader")
    return_method(train_data_source(trainer), "dataloader")
    combined = combined_loader(trainer)
    if combined is not None and choice is not None:  # it may be the user's own object
        combined.flattened = [original if one is wrapped else one for one in combined.flattened]


def _name(choice: str | int | None) -> str:
    return "" if choice is None else str(choice)


def _checked_names(loaders: object, choice: str | int | None) -> list[str]:
    """The names of the training loaders in the order of their setup; a single loader has the name ``""``."""
    mode = combined_mode(loaders)
    paths, _ = tree_flatten_with_path(getattr(loaders, "iterables", loaders))
    names = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in paths]
    if choice is None and len(names) == 1:
        return [""]
    known = f"one of {', '.join(names)}" if any(names) else "which takes one of several; there is one DataLoader"
    if choice is None:
        raise ValueError(f"Replay cannot choose among several training loaders: pass loader=, {known}")
    if _name(choice) not in names:
        raise ValueError(f"loader={choice!r} is not a training loader: pass loader=, {known}")
    if mode == "sequential":
        raise ValueError("Replay does not support CombinedLoader(mode='sequential'): concatenate the datasets")
    return names
