"""The configuration of a run: files without repeated keys, and a copy in the run's folder."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from lightning_sparse_cl.callbacks.run_folder import run_folder
from lightning_sparse_cl.cli.last import CONFIG, plain
from lightning_sparse_cl.whole_file import whole_file


def refuse_repeated_keys(path: Path) -> None:
    """YAML readers take the last of two equal keys without a word.

    Raises:
        ValueError: with the key and the lines.
    """

    def walk(node: yaml.Node | None) -> None:
        seen: dict[str, int] = {}
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if (name := str(key.value)) in seen:
                raise ValueError(f"{path}: {name!r} is given twice, in lines {seen[name]} and {line}")
            seen[name] = line
            walk(value)
        for value in node.value if isinstance(node, yaml.SequenceNode) else ():
            walk(value)

    try:
        walk(yaml.compose(path.read_text(), Loader=yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this file is no YAML: {error}") from error


class RunConfig(SaveConfigCallback):
    """Writes the configuration to ``config.yaml`` in the run's folder, to loggers and into checkpoints."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)  # now, when nothing refuses the run any more

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        if (folder := self._folder) is not None:
            written = self.parser.dump(self.config, skip_none=False)
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / self.config_filename) as part:
                part.write_text(written)
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # that would be a second copy in the same folder
                logger.log_hyperparams(plain(self.config))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint[CONFIG] = plain(self.config)
