"""Attention kernels for compiled code on a CPU."""
