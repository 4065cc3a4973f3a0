"""The config of a run: TOML in, frozen models out, checked.

Paths in a file are relative to the folder of that file. ``--set section.key=value`` overrides are TOML too. Training
length is counted in tokens. A wrong file is a :class:`ConfigError` that names the key, what was found and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic

from megapoly.config_checks import check, check_batch
from megapoly.config_file import apply_override, explain, read_toml, refuse_unknown
from megapoly.config_schema import Data, Kernels, Layout, Model, Optimizer, RopeScaling, Schema, Stability, Train
from megapoly.errors import ConfigError

__all__ = [
    "Config",
    "Data",
    "Kernels",
    "Layout",
    "Model",
    "Optimizer",
    "RopeScaling",
    "Stability",
    "Train",
    "load",
    "parse",
]

_CURRICULUM = ("sources", "stages", "max_epochs", "over_epochs")


class Config(Schema):
    """A run, from its TOML file."""

    def on(self, world_size: int) -> Config:
        """This config for a number of ranks: settles ``layout.dp`` and checks the layout against the batch."""
        layout = self.layout
        inner = layout.pp * layout.tp
        if layout.dp is None and world_size % inner:
            raise ConfigError(
                f"layout: {world_size} ranks were started, which pp {layout.pp} x tp {layout.tp} = {inner} does not"
                f" divide; start a multiple of {inner} or change layout.pp or layout.tp"
            )
        dp = layout.dp or world_size // inner
        if dp * inner != world_size:
            raise ConfigError(
                f"layout: {world_size} ranks were started, but dp {dp} x pp {layout.pp} x tp {layout.tp} needs"
                f" {dp * inner}; start {dp * inner}, or leave layout.dp out to use what there is"
            )
        settled = self.model_copy(update={"layout": layout.model_copy(update={"dp": dp})})
        check_batch(settled)
        return settled

    def document(self) -> dict[str, Any]:
        """Plain values, as kept in a run folder and in checkpoints."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """The part of :meth:`document` that defines the logical run and may not change inside it.

        Layout, saving and logging are free to change; so is the curriculum (:meth:`curriculum`), by an edit of the
        plan; so are paths: datasets and tokenizer are known by content.
        """
        document = self.document()
        kept = {key: document[key] for key in ("model", "data", "train", "optimizer")}
        kept["train"].pop("directory")
        for key in ("tokenizer", *_CURRICULUM):
            kept["data"].pop(key)
        return kept

    def curriculum(self) -> dict[str, Any]:
        """The part of :meth:`document` that may change inside a run, from where it is resumed: what is mixed, when."""
        data = self.document()["data"]
        for source in data["sources"].values():
            source.pop("path")
        return {"data": {key: data[key] for key in _CURRICULUM}}


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, apply ``section.key=value`` overrides, check everything.

    Raises:
        ConfigError: a missing file, a syntax error, an unknown key, a wrong value, or values that do not fit together.
    """
    path = Path(path)
    tree = read_toml(path)
    for override in overrides:
        apply_override(tree, override)
    return parse(tree, where=str(path), folder=path.parent)


def parse(tree: Mapping[str, Any], *, where: str = "config", folder: Path = Path(".")) -> Config:
    """A checked :class:`Config` from plain values. Relative paths are taken from ``folder``."""
    refuse_unknown(Config, tree, (), where)
    try:
        config = Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {explain(problem)}" for problem in error.errors())) from error
    config = _resolve(config, folder)
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def _resolve(config: Config, folder: Path) -> Config:
    def at(path: Path) -> Path:
        return Path(os.path.abspath(folder / path))  # a saved config is read from anywhere

    data = config.data
    sources = {name: source.model_copy(update={"path": at(source.path)}) for name, source in data.sources.items()}
    return config.model_copy(
        update={
            "data": data.model_copy(update={"tokenizer": at(data.tokenizer), "sources": sources}),
            "train": config.train.model_copy(update={"directory": at(config.train.directory)}),
        }
    )
