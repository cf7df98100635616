"""What several tests share."""

import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from math import inf
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from lr_callback import Allocation, Factorization, factorize_
from lr_callback.common.parallel import Workers, workers
from lr_callback.model.find import find_layers

# Tests run side by side: one thread each, in the processes that they start too, is faster than all threads each.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Derandomized: a run shows the same examples everywhere; without a database it leaves no folder behind.
settings.register_profile("lr_callback", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("lr_callback")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference figures and trained networks beside the repository, or skip."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "reference" / "torchprune.json").is_file():
        pytest.skip("needs ../shared with reference/torchprune.json and data/cifar10_resnet20.pt")
    return folder


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let measured times be those of this run of the tests: none are read from before, none are left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LR_CALLBACK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a test have a folder of measured times of its own, empty at first, and return it."""
    monkeypatch.setenv("LR_CALLBACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def any_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let times differ as they will while other tests run; what follows from a noisy clock has tests of its own."""
    room = "lr_callback.units.latency"
    trust = ["SPREAD_SAID", "SPREAD_REFUSED", "EXCESS_SAID", "DRIFT_SAID"]
    for file, name in [*(("trust", name) for name in trust), ("measure", "SPREAD_SAID"), ("files", "STEADY")]:
        monkeypatch.setattr(import_module(f"{room}.{file}"), name, inf)


@pytest.fixture
def crew() -> Iterator[Workers]:
    """Open workers for the length of a test."""
    with workers() as opened:
        yield opened


class Named(nn.Module):
    """Two layers one after the other, as attributes."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = layer or nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.second(self.first(inputs))
        return outputs


@pytest.fixture
def named() -> type[Named]:
    """Return the class of a model of two named layers, of which the first may be given."""
    return Named


@pytest.fixture
def by_hand() -> Callable[..., Allocation]:
    """Return a maker of an allocation that factorizes one layer of an ``nn.Sequential`` at rank 2."""

    def make(model: nn.Sequential, name: str = "1") -> Allocation:
        choice, shape = Factorization("kernel_in_encoder", 1, 2, 0.0, 0, 1), tuple(model[int(name)].weight.shape)
        return Allocation({name: choice}, {}, {name: shape}, 0, 1, 0, 1.0)

    return make


@pytest.fixture
def reasons(by_hand: Callable[..., Allocation]) -> Callable[..., dict[str, str]]:
    """Return what tells why a layer is skipped beside one that is not, which is factorized without touching it."""

    def tell(layer: nn.Module, other: int = 32) -> dict[str, str]:
        model = nn.Sequential(layer, nn.Linear(other, other))
        before = {name: id(one) for name, one in layer.named_modules()}
        found = find_layers(model)
        assert list(found.layers) == ["1"]
        factorize_(model, by_hand(model))
        assert model[0] is layer
        assert before == {name: id(one) for name, one in layer.named_modules()}
        return found.skipped

    return tell


SITUATIONS = Path(__file__).resolve().parents[1] / "docs" / "SITUATIONS.md"
_HEADER = """# Situations

What the callback was tried in, as the tests found it: `works` or `refused` with a clear text before the first training
step. `pytest --write-situations` writes this page from the results of the tests; a run of all tests fails if it is
another.
"""
_NOT_TRIED = {
    "Strategies": ("NCCL on several GPUs", "FSDP and DeepSpeed on GPUs", "XLA", "machines of a real network"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-situations", action="store_true", help="write docs/SITUATIONS.md from the results")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Properties of a test travel from the processes that run it to the one that writes.
        item.user_properties += [("situation", list(mark.args)) for mark in item.iter_markers("situation")]
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.filterwarnings("ignore:Latency. :UserWarning"))  # see `any_clock`


class Situations:
    """Gather what became of the tests of each situation; compare it with the page, or write it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.rows: dict[tuple[str, str], set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, value in report.user_properties:
            if key == "situation" and (report.when == "call" or report.outcome != "passed"):
                group, name, result = value
                found = {"passed": result, "skipped": "not tested"}.get(report.outcome, "fails")
                self.rows.setdefault((group, name), set()).add(found)

    def page(self) -> str:
        rows = {key: " / ".join(sorted(found)) for key, found in self.rows.items()}
        rows |= {(group, name): "not tested" for group, names in _NOT_TRIED.items() for name in names}
        lines = [_HEADER]
        for group in sorted({group for group, _ in rows}):
            lines += [f"## {group}\n", "| situation | result |", "| --- | --- |"]
            lines += [f"| {name} | {result} |" for (own, name), result in sorted(rows.items()) if own == group]
            lines.append("")
        return "\n".join(lines)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.config.getoption("--write-situations"):
            SITUATIONS.write_text(self.page())
        elif _runs_everything(self.config) and session.exitstatus == 0 and _differ(SITUATIONS.read_text(), self.page()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            reporter = self.config.pluginmanager.get_plugin("terminalreporter")
            reporter.write_line("docs/SITUATIONS.md differs from the results: pytest --write-situations", red=True)


def _differ(one: str, other: str) -> bool:
    """Compare pages but for what either has not tested: it may lack a package that the other has."""
    rows = [dict(re.findall(r"^\| (.*) \| (.*) \|$", page, flags=re.MULTILINE)) for page in (one, other)]
    names = {name for found in rows for name in found if "not tested" not in (rows[0].get(name), rows[1].get(name))}
    return any(rows[0].get(name) != rows[1].get(name) for name in names)


def _runs_everything(config: pytest.Config) -> bool:
    chosen = any(config.getoption(name, None) for name in ("keyword", "markexpr", "deselect", "collectonly", "lf"))
    return config.args_source == pytest.Config.ArgsSource.TESTPATHS and not chosen


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Situations(config))
