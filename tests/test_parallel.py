"""Laws of a product in parts; those of whole runs in several processes: runs/test_layouts.py."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close
from strategies import seeds

from nanolm.parallel import split_product


@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_a_product_in_parts_is_the_product(seed, n, per_process):
    random = np.random.default_rng(seed)
    x, first = random.normal(size=(5, 3)), random.normal(size=(3, n * per_process))
    second = random.normal(size=(n * per_process, 3))
    parts = split_product(x, first, second, np.tanh, n)
    assert_close(parts, np.tanh(x @ first) @ second, 1e-12)
