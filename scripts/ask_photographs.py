"""Ask a multimodal LLM about a folder of photographs, with fewer visual tokens.

    python scripts/ask_photographs.py photos "How many chairs are there?" --ratio 0.3
    python scripts/ask_photographs.py photos "What is left of the sofa?" --geometry facebook/VGGT-1B --merging httm

Needs `pip install 'geoaccel[mllm]' torchvision` and a checkpoint of Qwen2.5-VL or Qwen3-VL, downloaded on first use.
Photographs are separate images, as in VG-LLM. Geometry features only determine which tokens are merged: these
checkpoints were not trained with any. `--compare` also answers with all tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from geoaccel import accelerate, load_model
from geoaccel.backbone import Preprocess
from geoaccel.errors import run_program
from geoaccel.images import load_images
from geoaccel.mllm import BASELINES, GeometryTokens, Merge3DConfig, geometry_features
from geoaccel.mllm.hosts import reduce_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", help="folder")
    parser.add_argument("question")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder (%(default)s)")
    parser.add_argument("--ratio", type=float, default=0.3, help="fraction of visual tokens to keep (%(default)s)")
    parser.add_argument("--method", default="merge3d", choices=("merge3d", *BASELINES))
    how = "how merge3d merges tokens; the paper's add_mean needs training (%(default)s)"
    parser.add_argument("--reduce", default="mean", choices=("add_mean", "mean", "weighted", "drop"), help=how)
    parser.add_argument("--geometry", default="vggt-mini", help="geometry encoder, or none (%(default)s)")
    parser.add_argument("--merging", help="token merging inside the geometry encoder, such as httm")
    parser.add_argument("--max-frames", type=int, default=16, help="more are subsampled evenly (%(default)s)")
    parser.add_argument("--pixels", type=int, default=255_000, help="maximum per photograph (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compare", action="store_true", help="answer with all tokens too")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32

    # Both encoders see the same pixels; `budget` crops nothing.
    seen = load_images(args.photographs, Preprocess("budget", 28, 28, args.pixels), max_frames=args.max_frames)
    processor = AutoProcessor.from_pretrained(args.model)
    host = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    pixels = (seen.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    content = [{"type": "image", "image": Image.fromarray(image)} for image in pixels]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": args.question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(args.device)

    def geometry(inputs: Mapping[str, Any]) -> GeometryTokens:
        encoder: Any = accelerate(load_model(args.geometry, device=args.device, dtype=dtype), merging=args.merging)
        images = seen.images.to(args.device, dtype)
        _, height, width = inputs["image_grid_thw"][0].tolist()
        merge = host.config.vision_config.spatial_merge_size
        return geometry_features(encoder, images, grid=(height // merge, width // merge), points=args.method == "voxel")

    if args.method != "merge3d":
        method: Any = BASELINES[args.method](ratio=args.ratio)
    else:
        tau_geo = float("inf") if args.geometry == "none" else 1.0
        method = Merge3DConfig(ratio=args.ratio, reduce=args.reduce, tau_geo=tau_geo, min_per_frame=1)
    with torch.no_grad():
        short = reduce_inputs(host, inputs, method, geometry=None if args.geometry == "none" else geometry)
    print(say(processor, host, short.arguments, args.max_new_tokens))
    print(f"with {short.plan.num_kept} of {short.plan.num_tokens} visual tokens", file=sys.stderr)
    if args.compare:
        print(say(processor, host, inputs, args.max_new_tokens))
        print("with all of them", file=sys.stderr)


def say(processor: Any, host: Any, arguments: Mapping[str, Any], length: int) -> str:
    """The answer, by greedy decoding."""
    out = host.generate(**arguments, max_new_tokens=length, do_sample=False)
    text: str = processor.batch_decode(out[:, arguments["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return text.strip()


if __name__ == "__main__":
    sys.exit(run_program("ask_photographs", main))
