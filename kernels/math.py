"""Pointwise functions of float32 tiles, stable over the whole range, each with its gradient beside it.

Gradients take the value that the function returned, which is what a kernel has at hand.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    # exp overflows to infinity below -88, whose reciprocal is the 0 that is wanted
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid_bwd(y, dy):
    return dy * y * (1.0 - y)


@triton.jit
def tanh(x):
    # 1 - 2 / (exp(2|x|) + 1) cancels near 0; there an odd polynomial, of relative error 1.4e-9 up to 0.5, serves.
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    u = x * x
    p = -0.00694689478 * u + 0.0214726651
    p = p * u - 0.0539337797
    p = p * u + 0.133332273
    p = p * u - 0.333333328
    return tl.where(size < 0.5, x + x * u * p, tl.where(x < 0, -far, far))


@triton.jit
def tanh_bwd(y, dy):
    return dy * (1.0 - y * y)


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # NaN compares false and passes


@triton.jit
def relu_bwd(y, dy):
    return tl.where(y <= 0, 0.0, dy)
