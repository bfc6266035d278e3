"""Train in PyTorch, continue in JAX, and prove that nothing changed: the demo, on two cores.

Each stage is a command that can be run by hand; it is printed, run, and stamped when it succeeds.
A stage is skipped while its stamp matches the configuration and its files are complete.

python -m parity.demo --config configs/demo.yaml
python -m parity.demo --config configs/demo.yaml --out runs/short --train.steps 100
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, dump_config, parse_config
from mooshak.config.sections import Config
from mooshak.corpus.readers import input_state
from mooshak.errors import InputError, command
from parity.stages import Stage, run_demo

# Beginnings of tales, which the model continues.
PROMPTS = (
    "एक समय की बात है। एक जंगल में",
    "Once upon a time, a mouse",
    "बहुत दिन पहले एक गाँव में",
    "Long ago, a little girl",
)

# A run short enough for float64: 40 steps before the change of framework and 40 after it.
FLOAT64 = {
    "train.dtype": "float64",
    "train.steps": 80,
    "train.batch_size": 2,
    "train.sequence_length": 32,
    "schedule.warmup_steps": 10,
    "evaluate.every": 0,
}


def stages(config: Config, settings: Sequence[str], out: Path) -> list[Stage]:
    """Return the stages in order. `settings` are the options that `config` was parsed from."""
    # Longer than 60 lines: a table, one entry for each of the 16 commands.
    steps, half = config.train.steps, config.train.steps // 2
    precise = tuple(word for key, value in FLOAT64.items() for word in (f"--{key}", str(value)))
    prompts = tuple(word for prompt in PROMPTS for word in ("--prompt", prompt))
    n_tokens = config.model.max_seq_len * 3 // 4
    sampling = f"--tokens {n_tokens} --temperature 0.5 --top-p 0.95 --seed 1".split()
    tokenizer = config.tokenizer.path

    def train(framework: str, run: str, *options: object) -> tuple[str, ...]:
        here = ("--run.dir", str(out / run), *map(str, options))
        return (f"mooshak_{framework}.train", *settings, *here)

    def convert(source: Path, target: Path, kind: str) -> tuple[str, ...]:
        return ("parity.convert", str(source), str(target), "--to", kind)

    def generate(framework: str, checkpoint: Path) -> tuple[str, ...]:
        where = (str(checkpoint), "--tokenizer", tokenizer)
        return (f"mooshak_{framework}.generate", *where, *prompts, *sampling)

    def evaluate(framework: str, checkpoint: Path) -> tuple[str, ...]:
        everything = ("--evaluate.sequences", "0")
        return (f"mooshak_{framework}.evaluate", str(checkpoint), *settings, *everything, "--json")

    def printed(file: str, title: str, words: tuple[str, ...]) -> Stage:
        """Return a stage whose only file is the standard output of its command."""
        return Stage(Path(file).stem, title, words, (out / file,), prints=out / file)

    first, last = out / "torch/checkpoints" / str(half), out / "jax/checkpoints" / str(steps)
    to_jax, back = out / "to-jax", out / "back-in-torch"
    baseline = out / "baseline"
    short = out / "float64-torch/checkpoints/40"
    on_mesh = ("--mesh", "data=2")
    return [
        Stage(
            "tokenizer",
            "train the tokenizer",
            ("mooshak.tokenizer", "train", *settings),
            (Path(tokenizer),),
        ),
        Stage(
            "corpus",
            "write the corpus as tokens",
            ("mooshak.data", "prepare", *settings),
            tuple(Path(config.data.dir) / source.name for source in config.data.sources),
        ),
        Stage(
            "torch",
            "train the first half in PyTorch",
            train("torch", "torch", "--train.stop_after_step", half),
            (out / "torch", first),
        ),
        Stage("to-jax", "convert to JAX", convert(first, to_jax, "jax"), (to_jax,)),
        Stage(
            "jax",
            "train the second half in JAX, on two devices",
            train("jax", "jax", "--resume", to_jax, *on_mesh),
            (out / "jax", last),
        ),
        Stage("back", "convert back to PyTorch", convert(last, back, "torch"), (back,)),
        Stage(
            "baseline",
            "train the second half in PyTorch too, as the baseline",
            train("torch", "baseline", "--resume", first),
            (baseline, baseline / "checkpoints" / str(steps)),
        ),
        Stage(
            "float64-torch",
            "40 steps in PyTorch in float64",
            train("torch", "float64-torch", *precise, "--train.stop_after_step", 40),
            (out / "float64-torch", short),
        ),
        Stage(
            "float64-jax",
            "40 more in JAX",
            train("jax", "float64-jax", *precise, "--resume", short, *on_mesh),
            (out / "float64-jax", out / "float64-jax/checkpoints/80"),
        ),
        Stage(
            "float64-baseline",
            "40 more in PyTorch, as the baseline",
            train("torch", "float64-baseline", *precise, "--resume", short),
            (out / "float64-baseline", out / "float64-baseline/checkpoints/80"),
        ),
        printed(
            "evaluation-torch.json",
            "bits per byte of held-out text in PyTorch",
            evaluate("torch", back),
        ),
        printed(
            "evaluation-jax.json", "bits per byte of held-out text in JAX", evaluate("jax", last)
        ),
        printed("samples-torch.txt", "generate text in PyTorch", generate("torch", back)),
        printed("samples-jax.txt", "generate text in JAX", generate("jax", last)),
        Stage(
            "check",
            "check that both are the same function",
            ("parity.check", str(back), str(last), "--quick", "--out", str(out / "parity")),
            (out / "parity/report.json", out / "parity/report.html"),
        ),
        Stage("report", "write the report", ("parity.report", str(out)), (out / "report.html",)),
    ]


def _add_options(parser: argparse.ArgumentParser) -> None:
    text = "directory of the runs and the report"
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help=text)


@command
def main(argv: Sequence[str] | None = None) -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_options(own)
    # The other options are passed to the commands unchanged.
    options, settings = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    usage = "--config FILE [--out DIR] [--section.key VALUE ...]"
    parser = config_parser("parity.demo", __doc__, usage)
    _add_options(parser)
    config = resolve(parse_config(parser, settings)[0])
    if config.train.steps < 2 or config.train.steps % 2 or config.train.batch_size % 2:
        raise InputError(
            f"the demo halves train.steps {config.train.steps} and, on its mesh, train.batch_size "
            f"{config.train.batch_size}; choose even numbers"
        )
    inputs = [input_state(source) for source in config.data.sources]
    made_of = dump_config(config) + json.dumps(inputs)
    run_demo(stages(config, settings, options.out), options.out, made_of)


if __name__ == "__main__":
    main()
