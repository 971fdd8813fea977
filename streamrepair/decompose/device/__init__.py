"""Arithmetic on a GPU: torch, cuBLAS and cuSOLVER. The only part of the package that is made of torch."""

from streamrepair.decompose.device.arithmetic import DeviceArithmetic

__all__ = ["DeviceArithmetic"]
