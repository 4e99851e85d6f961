"""Architectures: one file each. `ARCHITECTURES` maps config.json's model_type to (config, decoder).

How to add one (`pytest tests/test_families.py tests/models` names steps that are left out):

1. Copy the nearest `<arch>.py` whole. Files here repeat each other on purpose: a reader learns an
   architecture from one file, and none is changed by another. No shared code asks which family it
   serves (`tests/test_families.py`); what differs is said by the family's config, specs and wiring.
2. Config: the fields the mathematics depends on, under config.json's names. `from_hf` reads each
   key through `KeyReader`, which refuses every key nobody asked for: `take` where null means the
   default, `take_nullable` where null means off, `expect` where only one value is computed.
   `to_hf` writes what Transformers reads. `layers` gives one `LayerSpec` a layer: rotary table,
   window, query scale. Topology is no field: it is written out in `Block.forward`.
3. Parameters keep Hugging Face's names and layouts, so that loading, saving and adapters need no
   further line. Arithmetic goes through `self.ops`, which is how the kernel levels plug in. The
   shell also offers `Embedding(scale=...)`, `RMSNorm(offset=1.0)` for weights stored less one
   (which then multiply in fp32, before the row is rounded, as Gemma's do; without an offset the
   rounded row is multiplied, as Llama's), `Decoder.final_softcap` and `ops.attention(...,
   softcap)`.
4. A line in `ARCHITECTURES`; a file that serves several model types sets `model_type` from the
   config. A multimodal model whose text tower this is: a line in `sloth.formats.wrapper.WRAPPERS`.
5. `tests/models/test_<arch>.py`: a subclass of `tests.models.common.ArchitectureTests` with tiny
   configs that switch every feature on, and its name in `tests/models/families.py`, which brings
   it to the tests of twins, 4-bit folders and PEFT adapters. The comparison with Hugging Face is
   bit for bit, because a wrong order of casts hides below any tolerance: equal in fp32 and not in
   bf16 means that something is rounded elsewhere, most often a norm's product or the rotation.
6. Its fused twin under `sloth/kernels/`: a `WIRING` that says which norms stand where and a
   `block`, both another family's in a line where the wiring is the same; and a line in
   `dispatch.TWINS`. Where the order of norms and halves is new, begin with `gemma2.py`, which has
   them on both sides; `tests/kernels/test_twins.py` and `test_dora_families.py` check it in fp64.
   Sizes of a real model in `tools/shapes.py` put what it keeps to `tests/train/
   test_step_memory.py`. Until there is one the model runs at the `ops` level, and says so;
   `tests.models.families.WITHOUT_TWIN` then names it.
7. GGUF files: a row in `sloth.formats.gguf_archs`, and tiny sizes in
   `tests.tiny_configs.GGUF_TYPES`; where Hugging Face's loader cannot read them, the type's name
   in `tests/formats/test_gguf_archs.py`. Without a row such files are refused by name.
8. A chat template of it that is at hand: its name in `tools.proof_table.TEMPLATES`; else a gap in
   `tests/test_proof_table.py`.
9. Names people know it by in `tools/models_table.py`; `python -m tools.models_table --write` puts
   its row into the README, and `python -m tools.proof_table` shows what is proved of it.
"""

from collections.abc import Callable
from typing import Any

from sloth.models.decoder import Decoder
from sloth.models.gemma import GemmaConfig, GemmaDecoder
from sloth.models.gemma2 import Gemma2Config, Gemma2Decoder
from sloth.models.gemma3 import Gemma3Config, Gemma3Decoder
from sloth.models.llama import LlamaConfig, LlamaDecoder
from sloth.models.mistral import MistralConfig, MistralDecoder
from sloth.models.qwen2 import Qwen2Config, Qwen2Decoder
from sloth.models.qwen3 import Qwen3Config, Qwen3Decoder
from sloth.models.smollm3 import SmolLM3Config, SmolLM3Decoder

ARCHITECTURES: dict[str, tuple[Any, Callable[..., Decoder]]] = {
    "llama": (LlamaConfig, LlamaDecoder),
    "mistral": (MistralConfig, MistralDecoder),
    "ministral": (MistralConfig, MistralDecoder),
    "ministral3": (MistralConfig, MistralDecoder),
    "qwen2": (Qwen2Config, Qwen2Decoder),
    "qwen3": (Qwen3Config, Qwen3Decoder),
    "gemma": (GemmaConfig, GemmaDecoder),
    "gemma2": (Gemma2Config, Gemma2Decoder),
    "gemma3_text": (Gemma3Config, Gemma3Decoder),
    "smollm3": (SmolLM3Config, SmolLM3Decoder),
}

# (model_type, key) -> what Transformers' AutoConfig takes a config.json with that key for, whatever
# the key holds. A text_config inside another file is what it says: there AutoConfig has no part.
_TAKEN_FOR = {("mistral", "layer_types"): "ministral"}


def as_auto_config(config: dict[str, Any]) -> dict[str, Any]:
    """A whole config.json with the model_type that Transformers builds the model from."""
    for (model_type, key), taken_for in _TAKEN_FOR.items():
        if config.get("model_type") == model_type and key in config:
            return config | {"model_type": taken_for}
    return config
