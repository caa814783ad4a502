"""Containers on disk: what a checkpoint or an adapter is made of, and where its bytes lie.

Nothing here knows what an adapter does or how a weight is quantized. Every reader in this package
looks at headers only, trusts no byte of a file before it has checked it, and answers with
:class:`~regraft.tensors.TensorSpec`: a path, an absolute offset and a length.
"""
