import numpy as np
import pytest
from scipy import sparse

from sct.data.normalization import log_expression, per_count

COUNTS = np.array([[1, 3], [0, 0], [0, 5]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, np.int64])
def test_counts_per_ten_thousand_by_hand(dtype):
    counts = sparse.csr_matrix(COUNTS.astype(dtype))
    kind = dtype if np.issubdtype(dtype, np.floating) else np.float64
    found, log = per_count(counts), log_expression(counts)
    assert found.dtype == log.dtype == kind
    assert found.tolist() == [2500, 0, 2000]
    expected = np.log1p([[2500, 7500], [0, 0], [0, 10_000]])
    np.testing.assert_allclose(log.toarray(), expected, rtol=1e-6)
    assert counts.toarray().tolist() == COUNTS.tolist()


def test_another_target_and_type():
    counts = sparse.csr_matrix(COUNTS.astype(np.float32))
    assert per_count(counts, 40.0).tolist() == [10, 0, 8]
    assert per_count(counts, dtype=np.float64).dtype == log_expression(counts, np.float64).dtype == np.float64
