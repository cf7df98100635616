"""What ``docs/METRICS.md`` shows runs, and what it lists is so."""

from __future__ import annotations

import re

from lr_callback import metrics
from lr_callback.metrics import functional
from tests.pages import ROOT, run_python

PAGE = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")


def test_python_blocks_run_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_python("docs/METRICS.md")
    shown = capsys.readouterr().out.splitlines()
    *_, logged, cost, error, agreement, ranks, moments = shown
    allocation = names["allocation"]
    kept = allocation.cost / allocation.dense_cost
    assert any(
        line.startswith(f"{kept:.1%} kept, worst error {allocation.worst_error:.3f}, agreement ") for line in shown
    )
    assert re.fullmatch(r"\{'kept': 0\.[23]\d*, 'stable_rank': [1-9].*, 'agreement': [01]\..*\}", logged)
    assert cost == f"tensor({kept:.4f}) tensor(0.2500)"
    assert error.startswith("tensor(0.") and agreement.startswith("tensor(") and ranks.endswith("tensor(5.)")
    assert moments == "torch.Size([64, 64])"


def test_table_is_that_of_the_public_names():
    rows = re.findall(r"^\| `(\w+)`, `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == metrics.__all__
    assert sorted(name for _, name in rows) == functional.__all__
