"""The shared tests' own message: where a model parts from Hugging Face's."""

import pytest
import torch

import sloth
from tests.models.common import assert_bit_equal, random_tokens
from tests.oracles import save_tiny


@pytest.mark.parametrize(
    "layer, where", [(1, "from layer 1 on"), (3, "in the last layer or behind")]
)
def test_a_difference_is_told_by_the_layer_it_begins_in(tmp_path, layer, where):
    folder = save_tiny("llama", tmp_path / "m")
    model = sloth.load(folder, level="reference", device="cpu")
    assert_bit_equal(model, folder, random_tokens())
    with torch.no_grad():
        model.network.model.layers[layer].mlp.down_proj.weight.mul_(1.001)
    with pytest.raises(AssertionError, match=f"torch.float32.*hidden states {where}"):
        assert_bit_equal(model, folder, random_tokens())
