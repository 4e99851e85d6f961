"""Every model type is held to every promise: the proof table has no empty cell but those named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tools.proof_table import COLUMNS, MODEL_TYPES, OF_THE_NETWORK, SAME_NETWORK, markdown, proofs

# No source of Gemma 1's chat template is at hand.
GAPS = {("gemma", "template")}


def test_every_model_type_is_proved_in_every_column(request: pytest.FixtureRequest) -> None:
    """Of what this run has collected, so it takes a run of the whole suite."""
    items = request.session.items
    names = {getattr(item, "originalname", None) for item in items}
    if not {SAME_NETWORK, *(name for tests in COLUMNS.values() for name in tests)} <= names:
        pytest.skip("only a part of the suite is collected")
    cells = {(model_type, column) for model_type in MODEL_TYPES for column in COLUMNS}
    empty = cells - proofs(items).keys()
    assert empty == GAPS, (
        f"{sorted(empty - GAPS)} have no test: write it, or name the cell in GAPS with the reason; "
        f"{sorted(GAPS - empty)} have one by now. Which tests fill a cell: tools/proof_table.py"
    )


def test_a_cell_is_told_by_the_tests_name_and_the_type_by_its_parameters() -> None:
    def item(test: str, module: object = None, cls: object = None, **params: object) -> object:
        spec = SimpleNamespace(params=params)
        return SimpleNamespace(
            nodeid=f"x.py::{test}", originalname=test, callspec=spec, module=module, cls=cls
        )

    columns = ("twin", "decode", "GGUF in", "template")
    (twin,), (decode,), (gguf,), (template,) = (COLUMNS[column] for column in columns)
    family = SimpleNamespace(model_type="mistral", variants={"a": {}, "b": {"model_type": "llama"}})
    module = SimpleNamespace(TWINNED={"q-w": {"model_type": "qwen2"}})
    found = proofs(
        [
            item(gguf, module, folder="gemma2"),
            item(twin, module, name="q-w", targets=["q_proj"]),
            item(decode, module, family, variant="a"),
            item(decode, module, family, variant="b"),
            item("test_something_else", module, model_type="qwen3"),
            item(gguf, module, folder="no_type"),
            item(template, module, name="gemma-3"),
            item(SAME_NETWORK, module, name="mistral3"),
        ]
    )
    cells = {("gemma2", "GGUF in"), ("qwen2", "twin"), ("mistral", "decode"), ("llama", "decode")}
    cells |= {("gemma3", "template"), ("gemma3_text", "template")}
    cells |= {("mistral3", column) for column in OF_THE_NETWORK}
    assert found.keys() == cells
    assert f"qwen2, twin: x.py::{twin}" in markdown(found)
