"""Snippet: Python that gives a run's network, from what a configuration says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def loading_code(described: Mapping[str, Any] | None, checkpoint: Path) -> str:
    """Return Python that makes a model and gives it the structure and the weights of a checkpoint.

    Args:
        described: the model by ``class_path`` and ``init_args``, as in a configuration; None: it is not known.
        checkpoint: the file.

    Example::

        >>> print(loading_code({"class_path": "torch.nn.Linear", "init_args": {"in_features": 2}}, Path("a.ckpt")))
        import lr_callback as lrc
        from torch.nn import Linear
        <BLANKLINE>
        model = Linear(
            in_features=2,
        )
        lrc.restore_(model, 'a.ckpt')  # structure and weights
        model.eval()
    """
    imports: dict[str, None] = {"import lr_callback as lrc": None}
    made = "...  # your network, as the code makes it: dense"
    if described is not None:
        made = _code(described, imports, "")
    head = "\n".join(imports)
    return f"{head}\n\nmodel = {made}\nlrc.restore_(model, {str(checkpoint)!r})  # structure and weights\nmodel.eval()"


def _code(value: object, imports: dict[str, None], indent: str) -> str:
    """Return a value of a configuration as Python, and note what has to be imported for it."""
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        module, _, name = value["class_path"].rpartition(".")
        imports[f"from {module} import {name}"] = None
        inner = indent + "    "
        given = {key: one for key, one in (value.get("init_args") or {}).items() if one is not None}
        lines = [f"{inner}{key}={_code(one, imports, inner)},\n" for key, one in given.items()]
        return f"{name}(\n{''.join(lines)}{indent})" if lines else f"{name}()"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_code(one, imports, indent)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_code(one, imports, indent) for one in value) + "]"
    return repr(value)
