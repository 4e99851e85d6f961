"""Every family's test class and the tiny models it names, for tests that go over all of them."""

from __future__ import annotations

from typing import Any

from sloth.kernels.dispatch import has_twin
from tests.models.common import ArchitectureTests
from tests.models.test_gemma import TestGemma
from tests.models.test_gemma2 import TestGemma2
from tests.models.test_gemma3 import TestGemma3
from tests.models.test_llama import TestLlama
from tests.models.test_mistral import TestMistral
from tests.models.test_qwen2 import TestQwen2
from tests.models.test_qwen3 import TestQwen3
from tests.models.test_smollm3 import TestSmolLM3

FAMILIES: tuple[type[ArchitectureTests], ...] = (
    *(TestLlama, TestMistral, TestQwen2, TestQwen3, TestGemma, TestGemma2, TestGemma3),
    TestSmolLM3,
)
# Types whose blocks have no fused twin yet.
WITHOUT_TWIN: frozenset[str] = frozenset()
# "<family>-<variant>" -> its settings, model_type among them.
VARIANTS: dict[str, dict[str, Any]] = {
    f"{family.model_type}-{name}": {"model_type": family.model_type} | settings
    for family in FAMILIES
    for name, settings in family.variants.items()
}
# model_type -> its first variant, which switches on what is particular to it.
FIRST: dict[str, str] = {}
for _name, _settings in VARIANTS.items():
    FIRST.setdefault(_settings["model_type"], _name)
# The same of the types that have a fused twin.
TWINNED = {name: each for name, each in VARIANTS.items() if has_twin(each["model_type"])}
FIRST_TWINNED = {kind: name for kind, name in FIRST.items() if has_twin(kind)}
