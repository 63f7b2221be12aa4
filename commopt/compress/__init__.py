"""Codecs: values to what travels, and back."""

from commopt.compress.base import Compressor
from commopt.compress.cast import Cast
from commopt.compress.sign import BlockSign, TensorSign, scaled_sign

__all__ = ["BlockSign", "Cast", "Compressor", "TensorSign", "scaled_sign"]
