"""Runtimes that a model can be written for: a table for each, of where it wants which pairs.

`calib.placement` follows them, `calib.targetrules` holds the rules that a written model must keep.
"""

from __future__ import annotations

from calib.placement import Target
from calib.prepare import QUANTIZABLE_OPS

__all__ = ["TARGETS", "Target"]

# Values pass these unchanged; of Pad and Resize see `calib.placement`.
_MOVEMENTS = (
    *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice", "Split"),
    *("MaxPool", "Resize", "Pad", "Gather", "DepthToSpace", "SpaceToDepth", "Expand"),
)
_JOINED = ("Add", "Mul", "Sum", "AveragePool", "GlobalAveragePool", "Concat")
_TABLES = (
    Target("generic", "any runtime"),
    # Its selectors make QLinear operators where DequantizeLinear -> operator -> QuantizeLinear
    # stands; U8S8 is what its kernels are fastest on. QGemm and MatMulIntegerToFloat give floats.
    Target(
        "onnxruntime",
        "onnxruntime's CPU",
        weight_bits=(5, 6, 7, 8),
        activation_bits=(8,),
        grid="asymmetric",
        bias="int32",
        no_kernel=("ConvTranspose",),
        joined=(*_JOINED, "Sigmoid", "LeakyRelu"),
        moved=_MOVEMENTS,
        one_grid=("Concat",),
        fused=("Relu", "Clip"),
        outputs=(*QUANTIZABLE_OPS, *_JOINED, "Sigmoid", "LeakyRelu"),
        float_outputs=("Gemm", "MatMul", "ConvTranspose"),
        half=False,
    ),
    # It wants pairs at the inputs of operators; those behind them keep what is between in 8 bits
    # (ResNet-20: 1 FakeQuantize in float is left instead of 6).
    Target(
        "openvino",
        "OpenVINO",
        weight_bits=(5, 6, 7, 8),
        activation_bits=(8,),
        alone_bits=(5, 6, 7, 8),
        grid="asymmetric",
        bias="float",
        joined=_JOINED,
        moved=_MOVEMENTS,
        one_grid=("Concat",),
        fused=("Relu", "Clip"),
        outputs=(*QUANTIZABLE_OPS, *_JOINED),
        float_outputs=(*QUANTIZABLE_OPS, *_JOINED),
        half=False,
        tied=False,
    ),
    # "Best practices for placement": inputs of weighted layers, and the residual input of an Add.
    Target(
        "tensorrt",
        "TensorRT",
        weight_bits=(8,),
        activation_bits=(8,),
        alone_bits=(4,),
        grid="signed",
        bias="float",
        one_branch=True,
    ),
)
TARGETS = {target.name: target for target in _TABLES}
