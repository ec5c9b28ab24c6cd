"""What a client's bytes may be, and what becomes of them."""

import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anabranch.aggregate.sweep import lower_median
from anabranch.integrations.flower.arrays import Sent, read_array, read_tensor

app = pytest.importorskip("flwr.app", reason="needs the extra `flower`")


def saved(array, **changes):
    fields = {"dtype": str(array.dtype), "shape": array.shape, "stype": "numpy.ndarray", "data": app.Array(array).data}
    return app.Array(**{**fields, **changes})


@given(
    hnp.arrays(st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.bool_]), hnp.array_shapes(min_dims=0))
)
def test_what_numpy_writes_is_read(array):
    for layout in (array, array.copy(order="F")):
        got = read_array(app.Array(layout), array)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)
        np.testing.assert_array_equal(read_tensor(app.Array(layout)).numpy(), array, strict=True)


def test_floats_may_be_of_another_width():
    like = np.zeros((2, 3), np.float32)
    for dtype in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(read_array(app.Array(np.ones((2, 3), dtype)), like), np.ones((2, 3)))


LIKE = np.zeros((2, 3), np.float32)


def header_of(text):
    body = (text + "\n").encode()
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (saved(LIKE, stype="pickle"), "serialised as 'pickle'"),
        (saved(LIKE, data=pickle.dumps(LIKE)), "not in NumPy's format"),
        (saved(LIKE, data=b""), "not in NumPy's format"),
        (saved(LIKE, data=header_of("(" * 900)), "not in NumPy's format"),
        (saved(LIKE, data=header_of("{'descr': '<f4', 'fortran_order': False, 'shape': ('")), "not in NumPy's format"),
        (saved(LIKE, data=header_of("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3)}")), "object"),
        (saved(LIKE, data=header_of("{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 9, 3)}")), "not in NumPy"),
        (saved(LIKE, data=header_of(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 40}, 3)}}")), "wanted"),
        (saved(LIKE, data=app.Array(LIKE).data[:-1]), "23 bytes of float32"),
        (saved(LIKE, data=app.Array(LIKE).data + b"x" * 9), "33 bytes of float32"),
        (app.Array(LIKE.T.copy()), r"float32 \[3, 2\], wanted float32 \[2, 3\]"),
        (app.Array(LIKE[:, :1]), "wanted"),
        (app.Array(LIKE.astype(np.complex64)), "complex64"),
        (app.Array(LIKE.astype(np.longdouble)), "float128|longdouble"),
        (app.Array(LIKE.astype(np.int32)), "int32"),
    ],
)  # fmt: skip
def test_what_is_refused(array, words):
    with pytest.raises(ValueError, match=words):
        read_array(array, LIKE)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (saved(LIKE, stype="pickle"), "serialised as 'pickle'"),
        (saved(LIKE, data=header_of("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3)}")), "object, wanted one"),
        (saved(LIKE, data=header_of(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 70},)}}")), "0 bytes"),
        (saved(LIKE, data=header_of("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -6)}")), "bytes of"),
        (saved(LIKE, data=app.Array(LIKE).data[:-1]), "23 bytes of float32"),
        (app.Array(LIKE.astype(">f4")), "wanted one of"),
        (app.Array(LIKE.astype(np.uint32)), "uint32, wanted one of"),
        (app.Array(LIKE.astype(np.complex64)), "complex64"),
    ],
)
def test_what_is_no_tensor(array, words):
    with pytest.raises(ValueError, match=words):
        read_tensor(array)


def test_lying_about_the_shape_costs_no_memory():
    """The shape beside the bytes is the client's claim; only that inside them is used, and never allocated."""
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)})
    with pytest.raises(ValueError, match="wanted float32"):
        read_array(saved(LIKE, data=stream.getvalue()), LIKE)


def test_arrays_become_a_vector_and_an_update_arrays():
    arrays = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "steps": np.array(7),
        "b": np.array([0.5], np.float16),
    }
    sent = Sent(arrays)
    assert (sent.floats, sent.others, sent.dtype) == (["w", "b"], ["steps"], torch.float32)
    assert sent.vector(arrays).tolist() == [0, 1, 2, 3, 4, 5, 0.5]
    moved = sent.moved(torch.full((7,), 0.25), {"steps": np.array(8)})
    assert list(moved) == ["w", "steps", "b"]
    assert [array.dtype for array in moved.values()] == [array.dtype for array in arrays.values()]
    assert moved["w"].tolist() == [[0.25, 1.25, 2.25], [3.25, 4.25, 5.25]]
    assert (moved["steps"], moved["b"].tolist()) == (8, [0.75])
    with pytest.raises(ValueError, match="'b' and its update is not finite"):
        sent.moved(torch.full((7,), 1e5), {"steps": np.array(8)})
    assert Sent({"w": np.zeros(1), "b": np.zeros(1, np.float32)}).dtype == torch.float64


def test_the_middle_is_one_of_the_values():
    assert lower_median(np.stack([np.array([1, 9]), np.array([5, -9]), np.array([3, 0])])).tolist() == [3, 0]
    assert lower_median(np.stack([np.array([1]), np.array([2])])).tolist() == [1]
    assert lower_median(np.stack([np.array(True), np.array(True), np.array(False)])).tolist() is True
