"""A small Transformer encoder for token ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_sparse_cl.nests import Nest


class TextTransformer(nn.Module):
    """Embeddings of tokens and positions, Transformer encoder layers (Vaswani et al., 2017), averaged over the tokens.

    Args:
        vocabulary: number of token ids.
        width: size of the embeddings.
        layers: number of encoder layers, which normalise before attention and MLP.
        heads: number of attention heads; it divides ``width``.
        length: largest number of tokens in a text.

    Raises:
        ValueError: if a number is not positive, or ``heads`` do not divide ``width``.
    """

    def __init__(
        self, vocabulary: int = 4096, width: int = 64, layers: int = 2, heads: int = 4, length: int = 512
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads, "length": length}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"TextTransformer({name}={size}): {name} is at least 1")
        if width % heads:
            raise ValueError(f"TextTransformer(width={width}, heads={heads}): heads divide the width")
        self.vocabulary, self.width, self.layers, self.heads, self.length = sizes.values()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Nest) -> Tensor:
        """Token ids (B, T), or ``{"ids": (B, T), "mask": (B, T)}``, to features (B, width).

        Raises:
            ValueError: if there are more tokens than positions, or, on the CPU, an id is not in the vocabulary. (A GPU
                raises an error of its own.)
        """
        ids, mask = (x["ids"], x["mask"].bool()) if isinstance(x, dict) else (x, torch.ones_like(x, dtype=torch.bool))
        length, vocabulary = self.positions.num_embeddings, self.tokens.num_embeddings
        if ids.shape[1] > length:
            raise ValueError(
                f"TextTransformer(length={length}): texts have {ids.shape[1]} tokens; length is at least that"
            )
        mask = mask | (torch.arange(ids.shape[1], device=ids.device) == 0)  # a text without tokens has no mean
        try:
            embedded = self.tokens(ids)
        except IndexError:  # on the CPU
            wrong = [i for i in (int(ids.min()), int(ids.max())) if not 0 <= i < vocabulary]
            raise ValueError(f"TextTransformer(vocabulary={vocabulary}): there is the token id {wrong[0]}") from None
        found = embedded + self.positions.weight[: ids.shape[1]]
        found = self.encoder(found, src_key_padding_mask=~mask)
        return mean_of_tokens(found, mask)


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """The mean (B, D) of the states (B, T, D) of the tokens in the mask (B, T); zero if there are none."""
    weights = mask.unsqueeze(2).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)
