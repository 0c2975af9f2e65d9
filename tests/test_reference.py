"""The reference keeps the full model's outputs on average.

test_equivalence.py compares the product with it, and tests/model/test_huggingface.py the product with transformers.
"""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from adapter import reference_tensors
from reference import attention, mlp
from tiny import GPT2, LLAMA, random_master, snapshot


@pytest.mark.parametrize(("branch", "units"), [(attention, "n_heads"), (mlp, "d_ff")], ids=["attention", "mlp"])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_rescaled_outputs_of_all_subsets_average_to_the_full_one(model, branch, units):
    model = replace(model, d_ff=6)
    total, parameters = getattr(model, units), reference_tensors(model, snapshot(random_master(model)))
    x = torch.randn(2, 5, model.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = branch(model, parameters, 0, list(range(total)), x)
    assert full.abs().max() > 0.1
    for kept in range(1, total + 1):
        outputs = [branch(model, parameters, 0, list(subset), x) for subset in combinations(range(total), kept)]
        torch.testing.assert_close(sum(outputs) / len(outputs), full, rtol=0, atol=1e-6)
