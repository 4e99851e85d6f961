"""Architectures: one file each. `ARCHITECTURES` maps config.json's model_type to (config, decoder).

To add one: copy the nearest `<arch>.py`, edit its Config and Block, add a line here and a
`tests/models/test_<arch>.py`. When it should be fast, add a fused twin under `sloth/kernels/`.
"""

from sloth.models.llama import LlamaConfig, LlamaDecoder

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaDecoder),
}
