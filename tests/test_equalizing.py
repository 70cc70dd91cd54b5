"""Cross-layer equalisation: what it leaves as it is, what it balances, and what it tells apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Load, Save, all_bits
from models import MODELS, Array, feed_for, parsed, run, values

from calib import Run, calibrate_model, equalize, load_model
from calib.errors import ObservationsError, OptionError
from calib.graph import Model
from calib.rules import Rules

KERNELS = "float[8,3,3,3] k1, float[8] b1, float[8,1,3,3] k2, float[8] b2, float[6,4,1,1] k3"
SHAPES = f"(float[N,3,6,6] x) => (float[N,6,6,6] y) <{KERNELS}>"


def conv_chain(between: str) -> str:
    """Three convolutions, the second depthwise, the third in two groups."""
    return f"""{SHAPES} {{
      a = Conv<pads=[1,1,1,1]>(x, k1, b1)
      r = {between.format("a")}
      d = Conv<group=8, pads=[1,1,1,1]>(r, k2, b2)
      s = {between.format("d")}
      y = Conv<group=2>(s, k3)
    }}"""


GEMMS = """(float[N,6] x) => (float[N,3] y)
<float[6,8] v, float[8] b, float[5,8] w, float[1,5] c, float[5,3] u> {
  a = Gemm(x, v, b)
  r = Relu(a)
  d = Gemm<transB=1, alpha=0.5, beta=2.0>(r, w, c)
  s = LeakyRelu<alpha=0.1>(d)
  y = Gemm(s, u)
}"""
SIX: dict[str, Array] = {
    "low": np.array(0, np.float32),
    "high": np.array(0.7, np.float32),
    "slope": values(8, 1, 1),
}
BETWEEN = ["Relu({})", "Clip({}, low, high)", "PRelu({}, slope)", "Identity({})"]


def unbalanced(model: Model) -> Model:
    """The model with weights of channels that differ by up to 100."""
    graph = model.ir.clone()
    for number, value in enumerate(graph.graph.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
        if len(tensor.shape) > 1:
            array = tensor.numpy()
            uneven = np.exp(np.random.default_rng(number).uniform(-2.3, 2.3, array.shape[:2]))
            changed = (array.T * uneven.T).T.astype(array.dtype)
            value.const_value = ir.tensor(changed, name=tensor.name)
    return replace(model, ir=graph)


def outputs(model: Model) -> dict[str, Array]:
    proto = ir.to_proto(model.ir)
    return run(proto, feed_for(proto, n=8))


def assert_same(one: Model, other: Model) -> None:
    """To more than 100 dB."""
    changed = outputs(other)
    for name, array in outputs(one).items():
        noise = np.square(array.astype(np.float64) - changed[name]).sum()
        assert noise <= 1e-10 * np.square(array.astype(np.float64)).sum()


def loaded(text: str, save: Save, opset: int = 17) -> Model:
    return unbalanced(load_model(save(parsed(text, SIX, opset))))


@pytest.mark.parametrize("between", BETWEEN)
def test_an_equalized_model_computes_the_same(between: str, save: Save) -> None:
    model = loaded(conv_chain(between), save)
    assert_same(model, equalize(model))


def test_clips_of_older_opsets_are_divided_too(save: Save) -> None:
    model = loaded(conv_chain("Clip<min=0.0, max=0.7>({})"), save, 9)
    changed = equalize(model)
    assert "Clip" not in [node.op_type for node in changed.ir.graph]
    assert "2 Clips (ReLU6" in changed.notes[-1]
    assert_same(model, changed)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "float16_conv"])
def test_whatever_the_model_it_computes_the_same(name: str, load: Load) -> None:
    assert_same(load(name), equalize(load(name)))


def test_after_it_both_sides_of_a_channel_are_equally_large(save: Save) -> None:
    changed = equalize(loaded(conv_chain("Relu({})"), save))
    k1, k2, k3 = (np.abs(changed.weight(name)) for name in ("k1", "k2", "k3"))
    np.testing.assert_allclose(k1.max(axis=(1, 2, 3)), k2.max(axis=(1, 2, 3)), rtol=5e-3)
    inputs = k3.reshape(2, 3, 4).max(axis=1).reshape(-1)
    np.testing.assert_allclose(k2.max(axis=(1, 2, 3)), inputs, rtol=5e-3)


def test_gemms_are_equalized_and_their_products_stay(save: Save) -> None:
    model = loaded(GEMMS, save)
    changed = equalize(model)
    v, w, u = (np.abs(changed.weight(name)) for name in "vwu")
    np.testing.assert_allclose(v.max(axis=0), w.max(axis=0), rtol=5e-3)
    np.testing.assert_allclose(w.max(axis=1), u.max(axis=1), rtol=5e-3)
    assert_same(model, changed)


def test_a_channel_without_weights_stays_as_it_is(save: Save) -> None:
    kernel = values(8, 3, 3, 3)
    kernel[2] = 0
    model = load_model(save(parsed(conv_chain("Relu({})"), {"k1": kernel})))
    changed = equalize(model)
    assert np.isfinite(changed.weight("k1")).all()
    np.testing.assert_array_equal(changed.weight("k1")[2], 0)
    assert_same(model, changed)


@pytest.mark.parametrize(
    "body",
    [
        "a = Conv(x, v) y = Conv(a, w) z = Relu(a)",  # another reader
        "a = Conv(x, v) b = Sigmoid(a) y = Conv(b, w) z = Relu(b)",
        "a = Conv(x, v) b = Sigmoid(a) y = Conv(b, w) z = Relu(x)",  # not homogeneous
        "a = Conv(x, v) b = Conv(a, v) y = Relu(b) z = Conv(x, w)",  # a weight of two layers
        "y = Conv(x, v) z = Conv(y, w)",  # an output of the model
    ],
)
def test_layers_that_cannot_be_equalized_are_left_alone(body: str, save: Save) -> None:
    shapes = "(float[N,3,4,4] x) => (float[N,3,4,4] y, float[N,3,4,4] z)"
    text = f"{shapes} <float[3,3,1,1] v, float[3,3,1,1] w> {{ {body} }}"
    model = load_model(save(parsed(text)))
    changed = equalize(model)
    assert changed.notes[-1] == "0 pairs of layers equalized"
    for name in "vw":
        np.testing.assert_array_equal(changed.weight(name), model.weight(name))


def test_the_model_it_was_made_from_stays_as_it_is(save: Save) -> None:
    model = loaded(conv_chain("Clip({}, low, high)"), save)
    before = ir.to_proto(model.ir).SerializeToString()
    equalize(model)
    assert ir.to_proto(model.ir).SerializeToString() == before


# --- the whole flow -----------------------------------------------------------------------------


@pytest.fixture
def chain(save: Save) -> Path:
    return save(parsed(conv_chain("Relu({})")))


DATA = [{"x": values(16, 3, 6, 6, seed=n, scale=1)} for n in range(2)]
RULES = Rules(widths=all_bits(4).widths, equalize=True)


@pytest.mark.parametrize("correction", [False, True])
def test_an_equalized_model_is_written_and_verified(
    correction: bool, chain: Path, tmp_path: Path
) -> None:
    rules = replace(RULES, bias_correction=correction)
    made = calibrate_model(chain, DATA, rules, tmp_path / "q.onnx", Run(samples=16))
    assert "2 pairs of layers equalized" in made.notes
    summary = made.summary()
    assert summary["options"]["equalize"] is True
    assert summary["digests"]["model_sha256"] == load_model(chain).sha256


def test_observations_of_the_one_are_not_the_others(chain: Path, tmp_path: Path) -> None:
    seen, plain = tmp_path / "seen.npz", replace(RULES, equalize=False)
    calibrate_model(chain, DATA, RULES, tmp_path / "a.onnx", Run(save_observations=seen))
    calibrate_model(chain, DATA, RULES, tmp_path / "b.onnx", Run(observations=seen))
    with pytest.raises(ObservationsError, match=r"observed on another model \(sha256 equalized-"):
        calibrate_model(chain, DATA, plain, tmp_path / "c.onnx", Run(observations=seen))


def test_workers_do_not_observe_an_equalized_model(chain: Path) -> None:
    with pytest.raises(OptionError, match=r"^equalize works in one process"):
        calibrate_model(chain, DATA, RULES, run=Run(workers=2))
