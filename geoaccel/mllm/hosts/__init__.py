"""Fewer visual tokens in the prompts of transformers' models; every token that stays keeps its position.

    short = reduce_for_generate(model, inputs, Merge3DConfig(ratio=0.1), geometry=tokens)    # Qwen2.5-VL, Qwen3-VL
    output = model.generate(**short)

    with patch(model, Merge3DConfig(ratio=0.1)):                                             # VG-LLM and its kind
        output = model.generate(**inputs)

    short = rewrite_sequence(input_ids, plan, placeholder_ids=[..], position_ids=..)         # any other host

transformers is the ``mllm`` extra. Nothing here imports it: the user brings the model.
"""

from geoaccel.mllm.hosts.drop_in import Patch, patch
from geoaccel.mllm.hosts.qwen import GenerateArguments, ReducedInputs, reduce_for_generate, reduce_inputs
from geoaccel.mllm.hosts.sequence import ShortSequence, rewrite_sequence

__all__ = [
    "GenerateArguments",
    "Patch",
    "ReducedInputs",
    "ShortSequence",
    "patch",
    "reduce_for_generate",
    "reduce_inputs",
    "rewrite_sequence",
]
