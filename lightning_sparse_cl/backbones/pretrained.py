"""Networks of timm and transformers as backbones: pre-trained or not, frozen, partly trained, or with adapters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_sparse_cl.backbones.text import mean_of_tokens
from lightning_sparse_cl.data.augment import ImageTransform
from lightning_sparse_cl.nests import Nest


class Pretrained(nn.Module):
    """Base of the backbones that hold a model of another package, which is made at the first batch.

    Args:
        trained: patterns of parameters' names, such as ``blocks.11.*``, ``*`` for any characters: others are frozen,
            and a batch-norm without a trained parameter keeps its statistics. If None, all are trained, or, if there
            are ``adapters``, only those; with both, the adapters and the matching parameters.
        adapters: the configuration of an adapter of peft (``pip install lightning_sparse_cl[peft]``), such as
            ``{"peft_type": "LORA", "r": 8, "target_modules": ["qkv"]}``: it is trained, and masks apply to its weights.

    Raises:
        ValueError: at the first batch, if a pattern matches no parameter, or the model cannot be made or does not take
            such samples.
    """

    model: nn.Module

    def __init__(self, trained: Sequence[str] | None = None, adapters: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if isinstance(trained, str):
            raise ValueError(f"{type(self).__name__}(trained={trained!r}): a list of patterns, such as ['{trained}']")
        if adapters is not None and (not isinstance(adapters, Mapping) or "peft_type" not in adapters):
            raise ValueError(f"{type(self).__name__}(adapters={adapters!r}): a dict with a peft_type, such as 'LORA'")
        self.trained, self.adapters = trained, adapters
        self.weights_follow = False
        """Whether all weights come from a checkpoint, so that none need to be fetched."""

    def make(self, x: Nest) -> nn.Module:
        """The model for such a batch, with its weights unless a checkpoint will bring them."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its model is: override make()")

    def features(self, x: Nest) -> Tensor:
        """The model's features (B, D) for a batch."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its features are: override features()")

    def forward(self, x: Nest) -> Tensor:
        """A batch to features (B, D)."""
        if "model" not in self._modules:
            try:
                self.model = self.make(x)
                self._freeze()
                self.train(self.training)
                return self.features(x)
            except Exception as error:  # the other package may raise anything
                self._modules.pop("model", None)
                line = next(iter(str(error).strip().splitlines()), "")
                if not isinstance(error, ValueError | RuntimeError | OSError):  # the text of a KeyError is only the key
                    line = f"{type(error).__name__}: {line}"
                raise ValueError(f"{self}: {line if len(line) <= 200 else f'{line[:196]} ...'}") from error
        return self.features(x)

    def _freeze(self) -> None:
        model, wanted = self.model, self.trained
        if self.adapters is not None:
            peft = imported("peft", type(self).__name__)
            kind = self.adapters.get("peft_type")
            if kind not in (known := [str(k.value) for k in peft.PeftType]):
                raise ValueError(f"adapters: got the peft_type {kind!r}; it is one of {', '.join(sorted(known))}")
            peft.inject_adapter_in_model(peft.get_peft_config(dict(self.adapters)), model)
            wanted = [*(name for name, p in model.named_parameters() if p.requires_grad), *(wanted or ())]
        if wanted is None:
            return
        names = [name for name, _ in model.named_parameters()]
        if unknown := [p for p in wanted if not any(fnmatchcase(name, p) for name in names)]:
            raise ValueError(f"trained: {unknown[0]!r} fits no parameter; they are {', '.join(names[:3])}, ...")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in wanted))

    def train(self, mode: bool = True) -> Pretrained:
        """Like ``nn.Module.train``, but a batch-norm that is not trained stays in eval mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                own = [p.requires_grad for p in module.parameters()]
                module.train(mode and (not own or any(own)))
        return self


class Timm(Pretrained):
    """A network of timm (``pip install lightning_sparse_cl[timm]``) that gives features (B, D).

    It takes the shape of the data: as many input channels as the images have, and, if it has positions, their size.

    Pre-trained weights expect their own normalisation: give the data
    ``transform=Timm.transform("vit_tiny_patch16_224")``, or in YAML :class:`ImageTransform` with its ``mean`` and
    ``std``.

    Args:
        name: name of the model, as in ``timm.list_models()``.
        pretrained: fetch its weights from the hub.
        checkpoint_path: a local file of weights, loaded afterwards.
        options: further arguments of ``timm.create_model``, such as ``{"patch_size": 4}``.
        trained, adapters: see :class:`Pretrained`.

    Raises:
        ValueError: if timm is missing or has no such model; and see :class:`Pretrained`.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        options: Mapping[str, Any] | None = None,
        trained: Sequence[str] | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(trained, adapters)
        timm = imported("timm", "Timm")
        if not timm.is_model(name.split(".")[0]):
            near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
            raise ValueError(f"Timm(name={name!r}): timm has no such model{f'; it has {near}, ...' if near else ''}")
        self.name, self.pretrained, self.checkpoint_path, self.options = name, pretrained, checkpoint_path, options

    @staticmethod
    def transform(name: str, crop: int = 0, flip: bool = False) -> ImageTransform:
        """The normalisation that the weights of a model expect, for uint8 images; see :class:`ImageTransform`."""
        config = imported("timm", "Timm").get_pretrained_cfg(name)
        if config is None:
            raise ValueError(f"Timm.transform({name!r}): timm has no such model")
        return ImageTransform(config.mean, config.std, crop, flip)

    def __str__(self) -> str:
        return f"Timm(name={self.name!r})"

    def make(self, x: Nest) -> nn.Module:
        timm = imported("timm", "Timm")
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ValueError("it takes images (B, C, H, W)")
        given: dict[str, Any] = {"in_chans": x.shape[1], "num_classes": 0} | dict(self.options or {})
        pretrained = self.pretrained and not self.weights_follow
        try:
            model = timm.create_model(self.name, pretrained, img_size=tuple(x.shape[2:]), **given)
        except TypeError as error:
            if "img_size" not in str(error):  # a network without positions takes any size
                raise
            model = timm.create_model(self.name, pretrained, **given)
        if self.checkpoint_path is not None and not self.weights_follow:
            if not Path(self.checkpoint_path).is_file():
                raise ValueError(f"checkpoint_path: there is no file {self.checkpoint_path!r}")
            found = timm.models.load_checkpoint(model, self.checkpoint_path, strict=False)
            if missing := list(getattr(found, "missing_keys", ())):
                raise ValueError(
                    f"checkpoint_path: {self.checkpoint_path!r} lacks {len(missing)} weights, such as {missing[0]}"
                )
        return model

    def features(self, x: Nest) -> Tensor:
        return self.model(x)


class Transformers(Pretrained):
    """A model of transformers (``pip install lightning_sparse_cl[transformers]``) that gives features (B, D).

    Token ids (B, T), or ``{"ids": (B, T), "mask": (B, T)}``, come as ``input_ids`` and ``attention_mask``, images
    (B, C, H, W) as ``pixel_values``; other dicts by their own keys.

    Args:
        path: a model of the hub, or a local folder that ``save_pretrained`` wrote. If None, weights are random.
        config: the configuration, such as ``{"model_type": "bert", "hidden_size": 128, ...}``. With ``path``, only the
            entries that differ from the model's own.
        pool: features are the mean of the last hidden states over the tokens (``"mean"``), or the first token's
            (``"first"``).
        trained, adapters: see :class:`Pretrained`.

    Raises:
        ValueError: if transformers is missing, or neither is given; and see :class:`Pretrained`.
    """

    def __init__(
        self,
        path: str | None = None,
        config: Mapping[str, Any] | None = None,
        pool: str = "mean",
        trained: Sequence[str] | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(trained, adapters)
        if pool not in ("mean", "first"):
            raise ValueError(f"Transformers(pool={pool!r}): pool is 'mean' or 'first'")
        imported("transformers", "Transformers")
        if path is None and "model_type" not in (config or {}):
            raise ValueError("Transformers: give path, or a config with a model_type such as 'bert'")
        self.path, self.config, self.pool = path, config, pool

    def __str__(self) -> str:
        given = f"model_type={(self.config or {}).get('model_type')!r}" if self.path is None else f"path={self.path!r}"
        return f"Transformers({given})"

    def make(self, x: Nest) -> nn.Module:
        transformers, given = imported("transformers", "Transformers"), dict(self.config or {})
        if self.path is None:
            return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**given))
        if self.weights_follow:
            return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(self.path, **given))
        return transformers.AutoModel.from_pretrained(self.path, **given)

    def features(self, x: Nest) -> Tensor:
        mask: Tensor | None = None
        if isinstance(x, Tensor):
            given: dict[str, Any] = {"input_ids" if x.ndim == 2 else "pixel_values": x}
        elif isinstance(x, Mapping):
            names = {"ids": "input_ids", "mask": "attention_mask"}
            given = {names.get(str(key), str(key)): tensor for key, tensor in x.items()}
        else:
            raise ValueError(f"it takes a tensor or a dict of tensors, got a {type(x).__name__}")
        if "attention_mask" in given:
            mask = given["attention_mask"].bool()
            given["attention_mask"] = mask.long()
            if "attention_mask" not in inspect.signature(type(self.model).forward).parameters:
                del given["attention_mask"]
        ids, config = given.get("input_ids"), getattr(self.model, "config", None)
        most = getattr(config, "max_position_embeddings", None)
        if isinstance(ids, Tensor) and isinstance(most, int) and ids.shape[1] > most > 0:
            raise ValueError(f"texts have {ids.shape[1]} tokens; max_position_embeddings of its config is {most}")
        try:
            found = self.model(**given).last_hidden_state
        except (IndexError, RuntimeError) as error:  # on the CPU; a GPU raises an error of its own
            if "out of" not in str(error):  # bounds, or range
                raise
            known = getattr(config, "vocab_size", None)
            if not isinstance(ids, Tensor) or known is None:
                raise
            if int(ids.max()) < known:  # some models keep places for their own use
                raise ValueError(
                    f"texts of {ids.shape[1]} tokens are too long for max_position_embeddings={most} of its config"
                ) from None
            wrong = int(ids.max())
            raise ValueError(f"there is the token id {wrong}; vocab_size of its config is {known}") from None
        if found.ndim == 4:  # of a convolutional network (B, D, H, W)
            return found.mean((2, 3))
        if self.pool == "first":
            return found[:, 0]
        return found.mean(1) if mask is None else mean_of_tokens(found, mask)


def imported(package: str, owner: str, extra: str | None = None) -> Any:
    """Import a package of an extra. Raises ValueError, naming ``owner``, if it is not installed.

    Args:
        package: its name.
        owner: what needs it.
        extra: the extra that installs it. If None, it has the package's name.
    """
    try:
        return __import__(package)
    except ImportError:
        extra = extra or package
        raise ValueError(f"{owner}: {package} is not installed; pip install lightning_sparse_cl[{extra}]") from None
