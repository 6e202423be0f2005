"""Small backbones for series: (B, C, T), or padded ones with their lengths."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_sparse_cl.nests import Nest, within


class SeriesCNN(nn.Module):
    """Three convolutions over time with batch-norm, averaged over the steps of each series.

    What follows a series' end has no effect, except that batch-norm's statistics include it in training.

    Args:
        width: channels of the first convolution; the others have twice as many.
        kernel: steps that a convolution sees at once; odd.

    Raises:
        ValueError: if a number is not positive, or ``kernel`` is even.
    """

    def __init__(self, width: int = 32, kernel: int = 5) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"SeriesCNN(width={width}): a convolution has at least one channel")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"SeriesCNN(kernel={kernel}): a kernel sees an odd number of steps, such as 5")

        self.width, self.kernel = width, kernel

        def block(conv: nn.Module, outputs: int) -> nn.Sequential:
            return nn.Sequential(conv, nn.BatchNorm1d(outputs), nn.ReLU())

        self.blocks = nn.Sequential(
            block(nn.LazyConv1d(width, kernel, padding=kernel // 2, bias=False), width),
            block(nn.Conv1d(width, 2 * width, kernel, padding=kernel // 2, bias=False), 2 * width),
            block(nn.Conv1d(2 * width, 2 * width, kernel, padding=kernel // 2, bias=False), 2 * width),
        )

    def forward(self, x: Nest) -> Tensor:
        """Series (B, C, T), or ``{"series": (B, C, T), "length": (B,)}``, to features (B, 2 * width)."""
        found, length = series_and_length(x)
        if length is None:
            return self.blocks(found).mean(2)
        steps = within(length, found)
        found = found * steps
        for block in self.blocks:
            found = block(found) * steps  # padded with zeros anew after every layer
        return found.sum(2) / length.view(-1, 1).clamp_min(1)


class SeriesGRU(nn.Module):
    """A linear map of each step, then gated recurrent units; the features are the state at each series' last step.

    Args:
        width: size of the state.
        layers: number of recurrent layers, one on top of the other.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, width: int = 64, layers: int = 1) -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise ValueError(f"SeriesGRU(width={width}, layers={layers}): at least one layer of at least one unit")
        self.width, self.layers = width, layers
        self.embed = nn.LazyConv1d(width, 1)  # the recurrent layer has to know its input's size
        self.recurrent = nn.GRU(width, width, layers, batch_first=True)

    def forward(self, x: Nest) -> Tensor:
        """Series (B, C, T), or ``{"series": (B, C, T), "length": (B,)}``, to features (B, width)."""
        series, length = series_and_length(x)
        states, _ = self.recurrent(self.embed(series).transpose(1, 2))
        if length is None:
            return states[:, -1]
        last = (length - 1).clamp_min(0).view(-1, 1, 1).expand(-1, 1, states.shape[2])
        return states.gather(1, last).squeeze(1)


def series_and_length(x: Nest) -> tuple[Tensor, Tensor | None]:
    """The series (B, C, T) of a batch, and their lengths (B,) if it has them.

    Raises:
        ValueError: if they are something else.
    """
    series = x["series"] if isinstance(x, dict) and "series" in x else x
    if not isinstance(series, Tensor) or series.ndim != 3:
        kind = tuple(series.shape) if isinstance(series, Tensor) else type(series).__name__
        raise ValueError(f"series are (B, C, T), alone or as 'series' beside their 'length', got {kind}")
    return series, x.get("length") if isinstance(x, dict) else None
