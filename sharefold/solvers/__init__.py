"""Pure-tensor solvers: a group of same-shape layers in, shared tensors and per-layer errors out.

Nothing here knows about modules, methods or networks. Every solver works on a
:class:`~sharefold.solvers.data_norm.Problem`, so all of them are judged by the same relative output error.
"""
