"""One scene over the processes of a torch.distributed group: each has its own frames, all together the same numbers.

Encoder, attention within frames and heads see the frames of one process. Attention over the whole scene asks with the
queries of one process and answers with everybody's keys and values (:mod:`geoaccel.sharding.attention`). `ranks` is
what the processes tell each other, `watch` notices one that died, `model` puts it all into a network, `launch` is the
command line under ``torchrun``, and `predict` says how long it takes on machines that one does not have.
"""

from geoaccel.sharding.model import parallel, share

__all__ = ["parallel", "share"]
