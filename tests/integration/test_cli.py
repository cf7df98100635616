"""The command line on the configurations of the repository: what is printed, written and refused."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.flop_counter import FlopCounterMode

import lr_callback as lrc
from lr_callback.cli import LIGHTNING, OWN, main
from lr_callback.commands.compression_cli import CompressionCLI
from lr_callback.recipes import CifarResNet, DigitsData

pytest.importorskip("sklearn")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning calls methods of its parser that jsonargparse has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DIGITS = ["--config", str(CONFIGS / "digits.yaml")]
SHORT = ["--trainer.max_epochs", "3", "--compress.epochs", "1", "--model.init_args.warmup_epochs", "0"]
FLAT = ["--trainer.max_epochs", "2", "--model.init_args.schedule", "constant", "--trainer.limit_train_batches", "2"]
FLAT += ["--trainer.log_every_n_steps", "1"]
OF_A_BATCH = "multiply-adds and milliseconds are of a batch of "
STAGES = ["dense", "cut", "final"]


def program(folder, *arguments):
    """Run ``lr-callback`` as a process of its own; return what it wrote."""
    script = Path(sysconfig.get_path("scripts")) / "lr-callback"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, script, *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True, check=False, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command line in this process and returns what it printed."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["lr-callback", *map(str, arguments)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


def refusal(capsys, here, *arguments):
    """Return the text that a refused command line ends with."""
    with pytest.raises(SystemExit) as stopped:
        here(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def comparison_in(text):
    """Return the columns of the side-by-side table: for each stage, row -> number."""
    lines = text[text.index("dense, before") :].splitlines()
    assert re.split(r" {2,}", lines[0].strip()) == ["dense, before", "right after", "at the end"]
    columns = [{}, {}, {}]
    rows = lines[1 : lines.index("")] if "" in lines else lines[1:]
    for line in [line for line in rows if not line.startswith(("ms a batch: too unsteady", OF_A_BATCH))]:
        name, *cells = re.split(r" {2,}", line.strip())
        for column, cell in zip(columns, cells, strict=True):
            column[name] = float(cell.split(" ")[0].replace(",", ""))
    return columns


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Return a short run of configs/digits.yaml in a process of its own: its output and its folder of logs."""
    folder = tmp_path_factory.mktemp("digits")
    done = program(folder, "fit", *DIGITS, *SHORT)
    [logs] = (folder / "lightning_logs").iterdir()
    return SimpleNamespace(out=done.out, err=done.err, logs=logs, columns=comparison_in(done.out))


def test_fit_prints_the_table_of_layers_once(digits_run):
    assert digits_run.out.count("Low-rank compression at the start of epoch 1\n") == 1
    assert re.search(r"^network\.layer3\.0\.conv2 +64x64x3x3 ", digits_run.out, re.MULTILINE)
    assert re.search(r"of 8 layers factorized: 75,002 -> [\d,]+ parameters \(\S+ kept, 30\.0% asked\)", digits_run.out)


def test_comparison_is_the_last_thing_and_quiet(digits_run):
    *_, last_row, blank, hint = digits_run.out.splitlines()
    assert last_row.startswith((OF_A_BATCH, "ms a batch: too unsteady")) and not blank
    [checkpoint] = (digits_run.logs / "checkpoints").iterdir()
    shown = checkpoint.relative_to(digits_run.logs.parents[1])
    assert hint == f"a page of this: lr-callback report --checkpoint {shown}"
    for note in ("GPU available", "Restoring states", "Loaded model weights"):
        assert digits_run.err.count(note) == (note == "GPU available")
    assert "Traceback" not in digits_run.err


def test_a_terminal_without_unicode_ends_no_run(tmp_path, monkeypatch):
    """Lightning's Rich bar has characters that such a terminal has not."""
    pytest.importorskip("rich")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    out = program(tmp_path, "fit", *DIGITS, *SHORT, "--trainer.limit_train_batches", "2").out
    assert out.isascii() and "\\u2022" in out
    assert out.splitlines()[-1].startswith("a page of this: lr-callback report --checkpoint ")


def measured(file):
    """Return what the comparison should show of a snapshot, from the file alone."""
    network = CifarResNet(depth=8, in_channels=1)
    lrc.restore_(network, file)
    network.eval()
    data = DigitsData(batch_size=64)
    data.setup()
    images, labels = zip(*data.test_dataloader(), strict=True)
    with torch.no_grad():
        scores = torch.cat([network(batch) for batch in images])
        with FlopCounterMode(display=False) as counter:
            network(images[0])
    return {
        "test_loss": pytest.approx(float(F.cross_entropy(scores, torch.cat(labels))), abs=1e-4),
        "test_accuracy": pytest.approx(float((scores.argmax(1) == torch.cat(labels)).float().mean()), abs=6e-5),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "multiply-adds": counter.get_total_flops() // 2,
        "bytes on disk": file.stat().st_size,
    }


@pytest.mark.parametrize("name", STAGES)
def test_comparison_agrees_with_the_snapshot_files(digits_run, name):
    shown = dict(digits_run.columns[STAGES.index(name)])
    assert shown.pop("ms a batch") > 0
    assert shown == measured(digits_run.logs / "compression" / f"{name}.ckpt")


def test_page_of_a_run_says_what_the_comparison_does(digits_run, here, tmp_path):
    """With the command that the run has told."""
    command = shlex.split(digits_run.out.splitlines()[-1].partition(": lr-callback ")[2])
    checkpoint = digits_run.logs.parents[1] / command.pop()
    assert here(*command, checkpoint, "--output", "page.html").splitlines()[0] == "report: page.html"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    [before, after] = (digits_run.columns[0], digits_run.columns[2])
    for column in (before, after):
        for name, form in (("parameters", ",.0f"), ("multiply-adds", ",.0f"), ("test_accuracy", ".2%")):
            assert f">{column[name]:{form}}" in page, name
    assert f">{before['bytes on disk']:,.0f}<" in page and "milliseconds of a batch" in page
    told = f"{OF_A_BATCH}64x1x8x8 float32"
    assert f"\n{told}\n" in digits_run.out and told[1:] in page
    assert "network=CifarResNet(" in page and "keep_ratio: 0.3" in page


def test_cut_is_within_the_budget_and_the_rest_of_the_run_recovers(digits_run):
    dense, cut, final = digits_run.columns
    assert dense["parameters"] == 75_002
    assert final["parameters"] == cut["parameters"] <= 0.3 * 75_002
    assert cut["bytes on disk"] < 0.5 * dense["bytes on disk"]
    assert cut["multiply-adds"] < dense["multiply-adds"]
    assert final["test_loss"] < cut["test_loss"]


def test_compressed_checkpoint_is_tested_in_a_process_of_its_own(digits_run, tmp_path):
    [checkpoint] = (digits_run.logs / "checkpoints").iterdir()
    done = program(tmp_path, "test", *DIGITS, "--ckpt_path", str(checkpoint))
    [found] = re.findall(r"test_accuracy\W+([\d.]+)", done.out)
    assert float(found) == pytest.approx(digits_run.columns[2]["test_accuracy"], abs=6e-5)


@pytest.mark.parametrize("name", STAGES)
def test_snapshots_are_validated_whatever_their_structure(digits_run, here, name):
    shown = here("validate", *DIGITS, "--ckpt_path", digits_run.logs / "compression" / f"{name}.ckpt")
    network = CifarResNet(depth=8, in_channels=1)
    lrc.restore_(network, digits_run.logs / "compression" / f"{name}.ckpt")
    data = DigitsData()
    data.setup()
    with torch.no_grad():
        right = torch.cat([network.eval()(images).argmax(1) == labels for images, labels in data.val_dataloader()])
    [found] = re.findall(r"val_accuracy\W+([\d.]+)", shown)
    assert float(found) == pytest.approx(float(right.float().mean()), abs=1e-6)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_interrupted_fit_is_resumed_from_the_command_line(digits_run, here):
    [checkpoint] = (digits_run.logs / "checkpoints").iterdir()
    shown = here("fit", *DIGITS, *SHORT, "--trainer.max_epochs", 4, "--ckpt_path", checkpoint)
    assert "Low-rank compression at the start" not in shown  # it is behind us
    assert comparison_in(shown)[0]["parameters"] == 75_002  # the dense snapshot of the first part of the run
    assert comparison_in(shown)[2]["parameters"] == digits_run.columns[2]["parameters"]


def test_fast_dev_run_goes_through_all_of_it(here):
    shown = here("fit", *DIGITS, "--trainer.fast_dev_run", "true", "--model.init_args.schedule", "constant")
    assert shown.count("Low-rank compression at the start of epoch 0\n") == 1
    assert comparison_in(shown)[1]["parameters"] <= 0.3 * 75_002


def test_keep_ratio_of_the_command_line_overrides_the_file(here):
    shown = here("fit", *DIGITS, *FLAT, "--compress.epochs", "[0,1]", "--compress.keep_ratio", "[0.7,0.5]")
    assert "kept, 70.0% asked" in shown
    assert "kept, 50.0% asked" in shown
    dense, cut, _ = comparison_in(shown)
    assert cut["parameters"] <= 0.5 * dense["parameters"]


def without_compress(folder, **callback):
    config = yaml.safe_load((CONFIGS / "digits.yaml").read_text(encoding="utf-8"))
    del config["compress"]
    config["trainer"]["callbacks"] = [{"class_path": "lr_callback.LowRankCompression", "init_args": callback}]
    (folder / "listed.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["--config", str(folder / "listed.yaml")]


def test_callback_in_the_trainers_list_is_used_instead(here, tmp_path):
    config = without_compress(tmp_path, keep_ratio=0.6, epochs=[1], exclude=["*.linear"])
    shown = here("fit", *config, *FLAT)
    assert shown.count("Low-rank compression at the start of epoch 1\n") == 1
    assert "kept, 60.0% asked" in shown
    assert "named by `exclude`" in shown
    assert comparison_in(shown)[1]["parameters"] <= 0.6 * 75_002


def test_both_ways_at_once_are_refused(capsys, here, tmp_path):
    config = without_compress(tmp_path, keep_ratio=0.6)
    text = refusal(capsys, here, "fit", *config, *FLAT, "--compress.keep_ratio", "0.4")
    assert "must be configured once, found arguments under --compress and an entry in `trainer.callbacks`" in text


def test_run_without_a_compression_prints_no_comparison(here):
    with pytest.warns(UserWarning, match=r"epochs \[7\] are never reached, max_epochs is 2"):
        shown = here("fit", *DIGITS, *FLAT, "--compress.epochs", 7)
    assert "dense, before" not in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--compress.keep_ratio", "1.5"], r"error: --compress.keep_ratio must be a number in \(0, 1\].*got 1\.5\.\n$"),
        (["--compress.keep_ratio", "0.01"], r"error: --compress.keep_ratio=0.01: the budget .* Reachable: .*\n$"),
        (["--compress.epochs", "-2"], r"error: --compress.epochs must be whole numbers from 0, got -2\.\n$"),
        (["--compress.overrides", '{"no*": dense}'], "error: --compress.overrides: each pattern must match .* 'no\\*'"),
        (["--compress.cost", "latncy"], "error: --compress.cost must be one of .*, got 'latncy'"),
        (["--compress.max_accuracy_drop", "0.1"], "got --compress.keep_ratio and --compress.max_accuracy_drop"),
        (
            ["--compress.include", "*.conv1"],
            r"""error: --compress.include must be a list, as '\["\*.conv1"\]'""",
        ),
        (
            ["--compress.keep-ratio", "0.5"],
            r": there is no .*; did you mean --compress.keep_ratio\?",
        ),
        (["--compress.epoch", "1"], r"error: --compress.epoch: there is no .*; did you mean --compress.epochs\?"),
        (["--ckpt_path", "no.ckpt"], "error: --ckpt_path no.ckpt: no such file; name one that ModelCheckpoint wrote"),
        (["--ckpt_path", DIGITS[1]], "error: --ckpt_path .*digits.yaml: must be a checkpoint, .*, found a text; give"),
        (
            ["--trainer.default_root_dir", f"{DIGITS[1]}/inside", "--trainer.logger", "true"],
            r"error: --trainer.default_root_dir: the files of a run must have a folder .*yaml/inside.* Name another",
        ),
        (
            ["--model.warmup_epochs", "9"],
            "error: ImageClassifier: the cosine schedule needs the trainer's --t",
        ),
    ],
)
def test_bad_arguments_are_refused_on_one_line_by_their_names(capsys, here, arguments, text):
    schedule = ["--model.schedule", "cosine"] if "--model.warmup_epochs" in arguments else []
    written = refusal(capsys, here, "fit", *DIGITS, *FLAT, "--compress.epochs", "1", *schedule, *arguments)
    assert re.search(text, written) and "Traceback" not in written


def test_a_budget_that_waits_for_the_first_batch_is_refused_on_one_line(capsys, here, tmp_path, monkeypatch):
    (tmp_path / "own_blind.py").write_text(
        "from lr_callback.recipes import ImageClassifier\n\n\nclass Blind(ImageClassifier):\n"
        "    def __init__(self, network):\n        super().__init__(network)\n"
        "        self.example_input_array = None\n"
    )
    config = yaml.safe_load((CONFIGS / "digits.yaml").read_text(encoding="utf-8"))
    network = config["model"]["init_args"]["network"]
    config["model"] = {"class_path": "own_blind.Blind", "init_args": {"network": network}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--compress.cost", "multiply_adds", "--compress.keep_ratio", "0.01", "--compress.epochs", "1"]
    written = refusal(capsys, here, "fit", "--config", tmp_path / "own.yaml", *FLAT[:2], *arguments)
    assert re.search(r"error: --compress.keep_ratio=0.01: the budget must be at least .* Reachable: .*\n$", written)
    assert "Traceback" not in written


def test_a_clock_that_is_too_noisy_is_told_on_one_line(capsys, here, monkeypatch, own_cache):
    trust = sys.modules["lr_callback.units.latency.trust"]
    monkeypatch.setattr(trust, "waiting", lambda device: 50_000_000)  # as where other programs take the processors
    monkeypatch.setattr(trust, "PATIENCE", 0.1)
    arguments = ["--compress.epochs", "0", "--compress.cost", "latency", "--compress.method", "lr_callback.ALDS"]
    written = refusal(capsys, here, "fit", *DIGITS, *FLAT, *arguments)
    assert re.search(
        r"error: Latency: the clock is too noisy to choose by: .* threads waited 50 ms .*instead\.\n$", written
    )


def test_a_wrong_value_of_a_listed_callback_is_not_named_as_one_of_the_command_line(capsys, here, tmp_path):
    config = without_compress(tmp_path, keep_ratio=1.5)
    assert "error: `keep_ratio` must be a number in (0, 1]" in refusal(capsys, here, "fit", *config, *FLAT)


@pytest.mark.parametrize("where", ["__init__", "configure_optimizers", "training_step"])
def test_an_error_of_a_users_code_keeps_its_traceback(here, tmp_path, monkeypatch, where):
    """Although it is of a type that this package refuses with."""
    (tmp_path / f"own_{where}.py").write_text(
        "from lr_callback.recipes import ImageClassifier\n\n\nclass Own(ImageClassifier):\n"
        f"    def {where}(self, *args, **kwargs):\n        super().{where}(*args, **kwargs)\n"
        "        raise ValueError('of my own')\n"
    )
    config = yaml.safe_load((CONFIGS / "digits.yaml").read_text(encoding="utf-8"))
    config["model"] = {
        "class_path": f"own_{where}.Own",
        "init_args": {"network": config["model"]["init_args"]["network"]},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="of my own"):
        here("fit", "--config", tmp_path / "own.yaml", *SHORT)


def test_unknown_argument_is_a_usage_error(capsys, here):
    assert "ratio" in refusal(capsys, here, "fit", *DIGITS, "--compress.ratio", "0.5")


@pytest.mark.parametrize(
    ("word", "nearest"), [("reprot", "report"), ("fti", "fit"), ("Analyse", "analyze"), ("tset", "test"), ("xyz", None)]
)
def test_a_command_that_there_is_not_is_a_usage_error_that_names_the_nearest(capsys, here, word, nearest):
    text = refusal(capsys, here, word, "--checkpoint", "last.ckpt")
    commands = "fit, validate, test, predict, analyze, export, report, study, tune"
    end = f"; did you mean `{nearest}`?\n" if nearest else ".\n"
    assert text.splitlines(keepends=True)[-1] == f"error: a command must be one of {commands}, got {word!r}{end}"


def test_the_commands_that_are_listed_are_those_that_there_are(here, capsys):
    assert tuple(CompressionCLI.subcommands()) == LIGHTNING
    for name in OWN:
        with pytest.raises(SystemExit) as stopped:
            here(name, "--help")
        assert stopped.value.code == 0 and f"usage: lr-callback {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["usage: lr-callback", "fit", "validate", "test", "lr-callback analyze --help"]),
        (["--help"], ["fit", "validate", "test", "lr-callback analyze --help", "--version"]),
        (["--version"], [f"lr_callback {lrc.__version__}"]),
        (["fit", "--help"], ["--compress.keep_ratio", "fraction of all parameters", "--compress.snapshots"]),
        (["analyze", "--help"], ["--model", "--keep_ratio", "--json"]),
    ],
)
def test_help_and_version_name_what_there_is(here, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        here(*arguments)
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert [word for word in words if word not in shown] == []


@pytest.mark.parametrize("name", ["digits", "cifar10_resnet20"])
def test_print_config_gives_the_whole_configuration(here, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        here("fit", "--config", CONFIGS / f"{name}.yaml", "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert stopped.value.code == 0
    assert {key: shown["compress"][key] for key in ("keep_ratio", "epochs")} == {
        key: written["compress"][key] for key in ("keep_ratio", "epochs")
    }
    assert shown["compress"]["snapshots"] is False
    assert shown["model"]["class_path"] == written["model"]["class_path"]


def test_analyze_shows_what_would_become_and_changes_nothing(here, tmp_path):
    network, weights = CifarResNet(depth=8), tmp_path / "weights.pt"
    torch.save(network.state_dict(), weights)
    before = weights.read_bytes()
    model = ["--model", "lr_callback.recipes.CifarResNet", "--model.depth", 8, "--model.weights", weights]
    shown = here("analyze", *model, "--keep_ratio", 0.4, "--exclude", '["conv1"]', "--json", tmp_path / "plan.json")
    expected = lrc.allocate(network, 0.4, exclude=["conv1"])
    low = lrc.analyze(network, exclude=["conv1"]).reachable[0]
    assert shown == f"{expected}\nreachable: keep_ratio from {low:.4f} to 1, of 75,290 parameters\n"
    assert lrc.Allocation.from_json(tmp_path / "plan.json") == expected
    assert weights.read_bytes() == before
    lrc.factorize_(network, lrc.Allocation.from_json(tmp_path / "plan.json"))
    assert sum(parameter.numel() for parameter in network.parameters()) == expected.cost


def test_analyze_takes_a_method_and_a_file_of_arguments(here, tmp_path):
    method = {"class_path": "lr_callback.UniformRank"}
    model = {"class_path": "lr_callback.recipes.CifarResNet", "init_args": {"depth": 8}}
    config = tmp_path / "look.yaml"
    config.write_text(yaml.safe_dump({"model": model, "method": method, "keep_ratio": 0.5}), encoding="utf-8")
    here("analyze", "--config", config, "--json", tmp_path / "plan.json")
    plan = lrc.Allocation.from_json(tmp_path / "plan.json")
    assert plan.method["name"] == "UniformRank"
    assert plan.keep_ratio == 0.5


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LRank", {}),
        ("ALDSSimple", {"num_slices": 5}),
        ("ALDSError", {"num_slices": 2}),
        ("ALDSK", {}),
        ("ALDS", {"error": "frobenius", "objective": "sum"}),
    ],
)
def test_every_method_can_be_named_in_a_file(name, arguments, here, tmp_path):
    model = {"class_path": "lr_callback.recipes.CifarResNet", "init_args": {"depth": 8}}
    method = {"class_path": f"lr_callback.{name}", "init_args": arguments}
    config = tmp_path / "look.yaml"
    config.write_text(yaml.safe_dump({"model": model, "method": method, "keep_ratio": 0.5}), encoding="utf-8")
    here("analyze", "--config", config, "--json", tmp_path / "plan.json")
    plan = lrc.Allocation.from_json(tmp_path / "plan.json")
    assert {"name": name, **arguments}.items() <= plan.method.items()
    assert plan.factorized and plan.gap == 0 and plan.cost <= plan.budget


def test_analyze_finds_a_model_in_the_folder_where_it_is_called(tmp_path):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n"
        "    def __init__(self, width: int = 64):\n        super().__init__(nn.Linear(width, width))\n"
    )
    assert "1 of 1 layers factorized" in program(tmp_path, "analyze", "--model", "mynet.Net").out


@pytest.mark.usefixtures("own_cache", "any_clock")
@pytest.mark.parametrize(
    ("arguments", "options", "reachable"),
    [
        (["--max_error", 0.4], {"max_error": 0.4}, r": keep_ratio from 0\.0\d+ to 1, of 75,290 parameters"),
        (
            ["--cost", "multiply_adds"],
            {"cost": "multiply_adds"},
            r": keep_ratio from 0\.\d+ to 1, of [\d,]+ multiply-adds",
        ),
        (
            ["--budget", "{parameters: 0.5, multiply_adds: 0.6, activation_memory: 1.5}"],
            {"budget": {"parameters": 0.5, "multiply_adds": 0.6, "activation_memory": 1.5}},
            r", each alone with these layers: 0\.\d+ of 75,290 parameters, 0\.\d+ of [\d,]+ multiply-adds, 1\.0000 of "
            r"[\d,]+ bytes of activation memory",
        ),
        (
            ["--cost", "lr_callback.metrics.functional.costs.held_parameters"],
            {"cost": "lr_callback.metrics.functional.costs.held_parameters"},
            r": keep_ratio from 0\.0\d+ to 1, of 75,290 held_parameters",
        ),
        (["--cost", "latency", "--keep_ratio", 1], None, r": keep_ratio from 0\.\d+ to 1, of [\d,]+ microseconds"),
    ],
    ids=["max_error", "cost", "budget", "own cost", "latency"],
)
def test_analyze_takes_any_goal(here, tmp_path, arguments, options, reachable):
    asked = ["--model", "lr_callback.recipes.CifarResNet", "--model.depth", 8, "--method", "lr_callback.ALDS"]
    asked += ["--method.slices", "[1]", "--input_shape", "2,3,32,32", *arguments]
    shown = here("analyze", *asked, "--json", tmp_path / "plan.json")
    assert re.search(rf"\nreachable{reachable}\n$", shown)
    if options is not None:
        of = {"method": lrc.ALDS(slices=[1]), "example_input": torch.zeros(2, 3, 32, 32), **options}
        plan, expected = lrc.Allocation.from_json(tmp_path / "plan.json"), lrc.allocate(CifarResNet(depth=8), **of)
        assert (plan.unit, plan.dense_cost, plan.max_error) == (expected.unit, expected.dense_cost, expected.max_error)
        assert plan.others.keys() == expected.others.keys() and plan.cost <= plan.budget


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--model must name a model"),
        (
            ["--model=torch.nn.Flatten", "--method=lr_callback.ALDS", "--method.power=0.5"],
            "error: `power` must be a number of at least 1, got 0.5.",
        ),
        (
            ["--model=torch.nn.Flatten", "--method=lr_callback.ALDS", "--method.slices=[4]", "--method.max_slices=2"],
            "error: `slices` must have a number up to `max_slices`, got [4] and 2. Raise `max_slices` to 4",
        ),
        (["--model=lr_callback.recipes.CifarResNet", "--cost=latncy"], "--cost must be one of ['parameters', "),
        (
            ["--model=lr_callback.recipes.CifarResNet", "--cost=multiply_adds"],
            "--input_shape: multiply-adds, latency and activation memory are of a run on an example input, got none",
        ),
        (
            ["--model=lr_callback.recipes.CifarResNet", "--keep_ratio=0.3", "--max_error=0.2"],
            "can be asked for, got --keep_ratio and --max_error.",
        ),
        (["--model=lr_callback.recipes.CifarResNet", "--budget={watts: 0.3}"], "--budget must map units to fractions"),
        (["--model=lr_callback.recipes.CifarResNet", "--input_shape=1,x"], "--input_shape must be whole numbers"),
        (["--model=lr_callback.recipes.CifarResNet", "--keep_ratio=7"], "must be a number in (0, 1]"),
        (["--model=lr_callback.recipes.CifarResNet", "--keep_ratio=0.001"], "Reachable: keep_ratio from"),
        (["--model=lr_callback.recipes.CifarResNet", "--exclude=[nothing*]"], "'nothing*' matches none of"),
        (["--model=torch.nn.Flatten", "--json=/nowhere/plan.json"], "--json /nowhere/plan.json: its folder must exist"),
        (
            ["--model=torch.nn.Flatten", "--json=train.py"],
            "--json train.py: must end in .json, so that no file of another",
        ),
        (
            ["--model=torch.nn.Flatten", "--keep-ratio=0.5"],
            "--keep-ratio: there is no such argument",
        ),
        (["--model=torch.nn.Flatten", "--keep=0.5"], "--keep: there is no such argument; did you mean --keep_ratio?"),
        (
            ["--model=torch.nn.Flatten", "--include=layer1.*"],
            "must be a list, as '[\"layer1.*\"]', got layer1.*.",
        ),
        (
            ["--model=lr_callback.recipes.CifarResNet", "--keep_ratio=7"],
            "error: --keep_ratio must be a number",
        ),
        (
            ["--model=lr_callback.recipes.CifarResNte"],
            "found no CifarResNte in lr_callback.recipes; did you",
        ),
    ],
)
def test_analyze_refuses_with_one_message(capsys, here, arguments, text):
    written = refusal(capsys, here, "analyze", *arguments)
    assert text in " ".join(written.split()) and "Traceback" not in written


def test_cifar10_configuration_runs_on_real_images_from_a_trained_network(here, shared):
    data = ["--data.init_args.data_dir", shared / "data", "--data.init_args.num_workers", 0]
    small = ["--data.init_args.batch_size", 32, "--trainer.max_epochs", 1, "--trainer.log_every_n_steps", 1]
    few = [f"--trainer.limit_{stage}_batches={count}" for stage, count in (("train", 2), ("val", 1), ("test", 2))]
    trained = ["--model.network.init_args.weights", shared / "data" / "cifar10_resnet20.pt"]
    config = ["--config", CONFIGS / "cifar10_resnet20.yaml", "--compress.epochs", 0]
    shown = here("fit", *config, *data, *small, *few, *trained)
    dense, cut, final = comparison_in(shown)
    assert dense["parameters"] == 269_722
    assert dense["test_accuracy"] > 0.8
    assert final["parameters"] == cut["parameters"] <= 0.3 * 269_722
