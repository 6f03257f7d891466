"""One scene over the processes of a torch.distributed group: each has some frames, with the results of one process.

Encoder, attention within frames and heads process the frames of one process. In attention over the whole scene, the
queries of one process attend to the keys and values of all (:mod:`geoaccel.sharding.attention`). `ranks` is the
communication between processes, `watch` detects one that died, `model` applies it all to a network, `launch` is the
command line under ``torchrun``, and `predict` estimates the time on machines that you do not have.
"""

from geoaccel.sharding.model import parallel, share

__all__ = ["parallel", "share"]
