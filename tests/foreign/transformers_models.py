"""transformers and peft: batches are dicts, outputs are objects with a loss; LoRA freezes the base."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign.case import BATCH, BATCHES, Case
from torch import Tensor, nn
from torch.utils.data import DataLoader


class FromOutput(pl.LightningModule):
    """A model that computes its own loss from a dict batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self(**batch)
        assert output.logits.ndim > 1
        self.log("train_loss", output.loss)
        return output.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def _tokens(labels: str) -> DataLoader:
    """Sentences of 8 of 50 words; their labels are a class of 3, or the words themselves."""
    words = torch.randint(50, (BATCH * BATCHES, 8))
    rows = [
        {"input_ids": w, "attention_mask": torch.ones_like(w), "labels": w if labels == "words" else w.sum() % 3}
        for w in words
    ]
    return DataLoader(rows, batch_size=BATCH, shuffle=True)


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def build_bert():
    return FromOutput(_bert()), _tokens("class")


def build_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return FromOutput(transformers.GPT2LMHeadModel(config)), _tokens("words")


def _build_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    return FromOutput(peft.get_peft_model(_bert(), config)), _tokens("class")


CASES = [
    Case("transformers BERT", "transformers", build_bert),
    Case("transformers GPT-2", "transformers", build_gpt2),
    Case(
        "peft LoRA on BERT",
        "peft",
        _build_lora,
    ),
]
