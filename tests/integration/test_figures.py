"""Figures in loggers: what TensorBoard's files hold, what other loggers are given, and that nothing ends a training."""

import csv
import re
import sys
from io import BytesIO

import matplotlib.image
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lr_callback import ALDS, LowRankCompression, plot_spectra
from lr_callback.observation.gallery import MOST_NUMBERED

FIGURES = ["compression/allocation", "compression/spectra", "compression/tradeoff"]


class Marked(LightningModule):
    """Layers with names that are markup."""

    def __init__(self, width: int = 24, layers: int = 1):
        super().__init__()
        self.net = nn.Sequential()
        self.net.add_module("<b>$x_1$</b>", nn.Linear(16, width))
        for index in range(layers):
            self.net.add_module(f"layer{index}", nn.Linear(width, width))

    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class WithHyperparameters(Marked):
    def __init__(self, width: int = 24):
        super().__init__(width)
        self.save_hyperparameters()


@pytest.fixture
def fit(tmp_path):
    """Return a maker of a run of two epochs, or more, with a compression in the second one."""

    def make(logger, module=None, compression=None, ckpt_path=None, **options) -> Trainer:
        own = {"keep_ratio": 0.5, "epochs": 1, "method": ALDS(slices=[1]), "refit": None, "show_table": False}
        trainer = Trainer(
            accelerator="cpu",
            logger=logger,
            default_root_dir=tmp_path,
            callbacks=[compression or LowRankCompression(**own)],
            enable_checkpointing=False,
            **{"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
            | options,
        )
        batches = DataLoader(TensorDataset(torch.randn(8, 16)), 4)
        trainer.fit(module or Marked(), batches, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
        return trainer

    return make


def events(logger: TensorBoardLogger) -> EventAccumulator:
    found = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    found.Reload()
    return found


def ours(said) -> list[str]:
    return [str(one.message) for one in said if "LowRankCompression" in str(one.message)]


def text(found: EventAccumulator, name: str) -> str:
    return found.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_tensorboard_holds_figures_text_and_a_layout(fit, tmp_path):
    trainer = fit(TensorBoardLogger(tmp_path))
    found = events(trainer.logger)
    assert found.Tags()["images"] == FIGURES
    for name in FIGURES:
        [image] = found.Images(name)
        pixels = matplotlib.image.imread(BytesIO(image.encoded_image_string))
        assert image.step == 2 and pixels.shape[:2] == (image.height, image.width) and pixels.std() > 0.05
    assert "    net.<b>$x_1$</b>" in text(found, "compression/table")  # indented: Markdown shows it as it is
    assert "    keep_ratio             0.5" in text(found, "compression/arguments")
    [layout] = found.Tensors("custom_scalars__config__")
    assert b"compression/kept_parameters" in layout.tensor_proto.string_val[0]
    assert b"compression/milliseconds" not in layout.tensor_proto.string_val[0]
    assert {"compression/worst_error", "compression/kept_parameters"} <= set(found.Tags()["scalars"])


def test_arguments_are_hyperparameters_where_a_run_has_no_others(fit, tmp_path):
    own = events(fit(TensorBoardLogger(tmp_path, "none")).logger)
    users = events(fit(TensorBoardLogger(tmp_path, "some"), WithHyperparameters()).logger)
    told = [one.SummaryMetadata("_hparams_/session_start_info").plugin_data.content for one in (own, users)]
    assert b"compression/keep_ratio" in told[0] and b"compression" not in told[1] and b"width" in told[1]
    assert "hp_metric" not in own.Tags()["scalars"] and [one.value for one in users.Scalars("hp_metric")] == [-1]


def test_each_cut_has_its_figures_and_the_layout_comes_once(fit, tmp_path):
    compression = LowRankCompression([0.6, 0.4], [1, 2], method=ALDS(slices=[1]), refit=None, show_table=False)
    found = events(fit(TensorBoardLogger(tmp_path, prefix="my"), compression=compression, max_epochs=3).logger)
    assert [image.step for image in found.Images("my-compression/spectra")] == [2, 4]
    assert len(found.Tensors("custom_scalars__config__")) == 1


@pytest.mark.parametrize("prefix", ["", "my", "rate(0.1)+[a"])
def test_the_layout_has_patterns_of_the_tags_that_are_logged(fit, tmp_path, prefix):
    """TensorBoard takes what stands in a chart for a regular expression."""
    found = events(fit(TensorBoardLogger(tmp_path, prefix=prefix)).logger)
    [layout] = found.Tensors("custom_scalars__config__")
    [category] = Layout.FromString(layout.tensor_proto.string_val[0]).category
    patterns = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    scalars = found.Tags()["scalars"]
    start = f"{prefix}-" if prefix else ""
    [shown] = [tag for tag in scalars if re.match(patterns["kept"][0], tag)]
    assert shown == f"{start}compression/kept_parameters"
    assert all(any(re.match(one, tag) for one in some for tag in scalars) for some in patterns.values())


@pytest.mark.parametrize("prefix", ["", "my"])
def test_everything_has_the_prefix_that_the_logger_gives_its_scalars(fit, tmp_path, prefix):
    tags = events(fit(TensorBoardLogger(tmp_path, prefix=prefix)).logger).Tags()
    start = f"{prefix}-" if prefix else ""
    assert tags["images"] == [f"{start}{name}" for name in FIGURES]
    texts = [tag for tag in tags["tensors"] if tag.endswith("/text_summary")]
    assert sorted(texts) == [f"{start}compression/{name}/text_summary" for name in ("arguments", "table")]
    scalars = [tag for tag in tags["scalars"] if "compression/" in tag]
    assert scalars and all(tag.startswith(f"{start}compression/") for tag in scalars)


class Validated(Marked):
    """Any size of it is as good."""

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 16)), 4)

    def validation_step(self, batch, index):
        self.log("accuracy", 0.5)


def test_layout_has_charts_of_what_only_some_runs_log(fit, tmp_path):
    options = {"method": ALDS(slices=[1]), "refit": None, "show_table": False}
    compression = LowRankCompression(max_accuracy_drop=0.1, epochs=1, **options)
    found = events(fit(TensorBoardLogger(tmp_path), Validated(), compression).logger)
    [layout] = found.Tensors("custom_scalars__config__")
    assert b"compression/accuracy_after" in layout.tensor_proto.string_val[0]
    assert b"compression/milliseconds" not in layout.tensor_proto.string_val[0]
    assert [one.value for one in found.Scalars("compression/accuracy_after")] == [0.5]


def test_resumed_run_has_the_curves_and_draws_the_next_cut(fit, tmp_path):
    options = {"method": ALDS(slices=[1]), "refit": None, "show_table": False}
    first, second = (LowRankCompression(*when, **options) for when in [(0.6, 1), ([0.6, 0.4], [1, 2])])
    trainer = fit(TensorBoardLogger(tmp_path, version=0), compression=first)
    trainer.save_checkpoint(tmp_path / "cut.ckpt", weights_only=False)
    second.load_state_dict(first.state_dict())
    assert second.curves == first.curves and plot_spectra(second.allocation)[1].size == 2
    assert first.allocation.curves() is first.curves
    path = tmp_path / "cut.ckpt"
    trainer = fit(TensorBoardLogger(tmp_path, version=1), compression=second, ckpt_path=path, max_epochs=3)
    assert [image.step for image in events(trainer.logger).Images("compression/spectra")] == [4]
    assert second.curves.chosen.cost < first.curves.chosen.cost


def test_csv_gets_numbers_of_the_largest_layers_beside_tensorboard(fit, tmp_path):
    trainer = fit([CSVLogger(tmp_path), TensorBoardLogger(tmp_path)], Marked(layers=21))
    with open(f"{trainer.loggers[0].log_dir}/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("compression/layers/")]
    assert len(names) == 2 * MOST_NUMBERED
    allocation = trainer.callbacks[0].allocation
    layer = allocation.layers["net.layer3"]
    [row] = [row for row in rows if row["compression/layers/net.layer3/kept"]]
    assert float(row["compression/layers/net.layer3/kept"]) == pytest.approx(layer.cost / layer.dense_cost)
    assert float(row["compression/layers/net.layer3/error"]) == pytest.approx(layer.relative_error)
    assert events(trainer.loggers[1]).Tags()["images"] == FIGURES


@pytest.mark.parametrize("options", [{"logger": False}, {"logger": True, "fast_dev_run": True}])
def test_without_a_logger_nothing_is_drawn_nor_said_of_loggers(fit, options, caplog):
    with caplog.at_level("INFO"):
        assert fit(**options).callbacks[0].curves is not None
    assert "takes no figures" not in caplog.text


def test_what_a_logger_without_figures_gets_is_said_once_in_80_columns(fit, tmp_path, caplog):
    compression = LowRankCompression([0.6, 0.4], [1, 2], method=ALDS(slices=[1]), refit=None, show_table=False)
    with caplog.at_level("INFO"):
        fit(CSVLogger(tmp_path), compression=compression, max_epochs=3)
    [said] = [one.getMessage() for one in caplog.records if "takes no figures" in one.getMessage()]
    assert "CSVLogger takes no figures; it is given numbers of the largest 20 layers" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80


class Twice(Marked):
    """Its optimizer steps twice in a batch, as those of two networks that learn from each other."""

    automatic_optimization = False

    def training_step(self, batch, index):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, index))
            self.optimizers().step()
        self.log("loss", 0.0)


def test_what_a_cut_logs_stands_where_the_metrics_of_its_epoch_begin(fit, tmp_path):
    found = events(fit(TensorBoardLogger(tmp_path), Twice()).logger)
    assert [one.step for one in found.Scalars("loss")] == [0, 1, 2, 3]
    assert {one.step for tag in FIGURES for one in found.Images(tag)} == {2}
    assert [one.step for one in found.Scalars("compression/kept_parameters")] == [2]


def test_figures_can_be_left_out(fit, tmp_path):
    compression = LowRankCompression(0.5, 1, method=ALDS(), refit=None, figures=False, show_table=False)
    found = events(fit(TensorBoardLogger(tmp_path), compression=compression).logger)
    assert found.Tags()["images"] == [] and "custom_scalars__config__" not in found.Tags()["tensors"]
    assert "compression/kept_parameters" in found.Tags()["scalars"]


class Noted(Logger):
    """A logger that notes what it is given, as those of other programs take it."""

    def __init__(self, run_id=None) -> None:
        super().__init__()
        self.given, self.told = [], {}
        if run_id is not None:
            self.run_id = run_id

    name, version = "noted", "0"

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        self.told.update(metrics)

    def log_hyperparams(self, params, *_):
        self.told.update(params)


class Experiment:
    """What MLflow's client and Comet's experiment have in common, but for the order of what they take."""

    def __init__(self, logger):
        self.logger = logger

    def log_figure(self, *given, **named):
        self.logger.given.append((*given, *named.values()))

    def log_text(self, *given, **named):
        self.logger.given.append((*given, *named.values()))


class LikeWandb(Noted):
    def log_image(self, key, images, step=None, **kwargs):
        self.given += [(key, image, step) for image in images]


class WithExperiment(Noted):
    @property
    def experiment(self):
        return Experiment(self)


def kinds(given) -> list[tuple]:
    return [tuple(one if isinstance(one, (str, int)) else type(one).__name__ for one in row) for row in given]


def test_a_logger_of_images_is_given_figures_and_arguments(fit):
    logger = LikeWandb()
    fit(logger)
    assert kinds(logger.given) == [(name, "Figure", 2) for name in FIGURES]
    assert logger.told["compression/keep_ratio"] == 0.5


def test_loggers_of_runs_with_artifacts_are_given_files(fit):
    logger = WithExperiment(run_id="run7")
    fit(logger)
    table, *figures = kinds(logger.given)
    assert table[0] == "run7" and table[2] == "compression/table/0000002.txt"
    assert figures == [("run7", "Figure", f"{name}/0000002.png") for name in FIGURES]


def test_loggers_of_named_figures_are_given_them(fit):
    logger = WithExperiment()
    fit(logger)
    assert kinds(logger.given)[1:] == [(name, "Figure", 2) for name in FIGURES]


class Full(TensorBoardLogger):
    """A logger on a disk that is full for figures; it has room for scalars."""

    @property
    def experiment(self):
        writer = super().experiment
        writer.add_image = self.refuse
        return writer

    def refuse(self, *_, **__):
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_said_once_and_the_training_goes_on(fit, tmp_path):
    compression = LowRankCompression([0.6, 0.4], [1, 2], method=ALDS(slices=[1]), refit=None, show_table=False)
    with pytest.warns(UserWarning, match=r"left out of Full, OSError: .*No space left on device") as said:
        trainer = fit(Full(tmp_path), compression=compression, max_epochs=3)
    assert trainer.state.finished and len(ours(said)) == 1
    assert "No space" not in text(events(trainer.logger), "compression/table")


def test_without_matplotlib_the_rest_is_logged_and_it_is_said_once(fit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"ModuleNotFoundError: .*pip install 'lr_callback\[figures\]'") as said:
        trainer = fit(TensorBoardLogger(tmp_path))
    assert len(ours(said)) == 1 and events(trainer.logger).Tags()["images"] == []
    assert "layers factorized" in text(events(trainer.logger), "compression/table")


def test_a_logger_that_loses_its_server_is_said_and_the_others_go_on(fit, tmp_path):
    class Broken(LikeWandb):
        def log_image(self, key, images, step=None, **kwargs):
            raise RuntimeError("no connection")

    with pytest.warns(UserWarning, match="left out of Broken, RuntimeError: no connection") as said:
        trainer = fit([Broken(), TensorBoardLogger(tmp_path)])
    assert len(ours(said)) == 1 and events(trainer.loggers[1]).Tags()["images"] == FIGURES
