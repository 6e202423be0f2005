"""pytorch-forecasting: LightningModules of another package as they are, with their own training steps and loaders."""

import pytest
from foreign.case import BATCH, BATCHES, Case


def _dataset():
    forecasting = pytest.importorskip("pytorch_forecasting")
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    series, steps = 4, 8 + BATCH * BATCHES // 4
    frame = pandas.DataFrame(
        {
            "time": numpy.tile(numpy.arange(steps), series),
            "value": numpy.random.default_rng(0).normal(size=series * steps).astype("float32"),
            "series": numpy.repeat([f"s{i}" for i in range(series)], steps),
        }
    )
    return forecasting.TimeSeriesDataSet(
        frame, time_idx="time", target="value", group_ids=["series"], max_encoder_length=6, min_encoder_length=6,
        max_prediction_length=3, static_categoricals=["series"], time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
    )  # fmt: skip


def _tft():
    data = _dataset()
    from pytorch_forecasting import TemporalFusionTransformer

    module = TemporalFusionTransformer.from_dataset(
        data, hidden_size=16, attention_head_size=2, hidden_continuous_size=8, learning_rate=1e-2
    )
    return module, data.to_dataloader(train=True, batch_size=BATCH, num_workers=0)


def _nhits():
    data = _dataset()
    from pytorch_forecasting import NHiTS

    module = NHiTS.from_dataset(data, hidden_size=32, learning_rate=1e-2)
    return module, data.to_dataloader(train=True, batch_size=BATCH, num_workers=0)


CASES = [
    Case("pytorch-forecasting TFT", "pytorch-forecasting", _tft, is_copied=False),
    Case("pytorch-forecasting NHiTS", "pytorch-forecasting", _nhits, is_copied=False),
]
