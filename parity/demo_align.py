"""Fine-tune and align a small model on questions about the tales: SFT, DPO, GRPO, on two cores.

SFT begins in PyTorch and continues in JAX; DPO runs in PyTorch and GRPO in JAX. Each stage is a
command that can be run by hand; a stage that is complete is not run again. `parity.align_report`
writes the page.

python -m parity.demo_align
python -m parity.demo_align --out runs/seed-1 --seed 1
python -m parity.demo_align --base runs/demo/jax/checkpoints/1200
"""

import argparse
from pathlib import Path

from mooshak.checkpoints.formats import detect_format
from mooshak.command_line import command_parser
from mooshak.config.parse import load_config
from mooshak.errors import command, require
from parity.stages import Stage, run_demo

STEPS = ("sft", "dpo", "grpo")
"""Kinds of training after that of the base model, each with its configuration."""
PAIRS = "right_answer,asked_language"
"""Tasks of the preference pairs, of DPO and held out."""


def stages(options: argparse.Namespace) -> list[Stage]:
    """Return the stages in order."""
    # Longer than 60 lines: a table, one entry for each command.
    out, configs = options.out, options.configs
    sft, dpo, grpo = (load_config(configs / f"demo-align-{name}.yaml") for name in STEPS)
    half = sft.train.steps // 2
    seed = ("--run.seed", str(options.seed), "--run.progress", "false")

    def train(run: str, title: str, module: str, name: str, step: int, *words: object) -> Stage:
        file, made = configs / f"{name}.yaml", (out / run, out / run / "checkpoints" / str(step))
        here = ("--config", str(file), "--run.dir", str(out / run), *seed, *map(str, words))
        return Stage(run, title, (module, *here), made, inputs=(file.read_text("utf-8"),))

    def answer(name: str, title: str, checkpoint: Path) -> Stage:
        rows, scores = out / f"answers-{name}.jsonl", out / f"answers-{name}.json"
        words = ("mooshak_torch.exact_match", str(checkpoint), "--count", str(options.count))
        more = ("--preferences", PAIRS, "--out", str(rows), "--json")
        return Stage(f"answers-{name}", title, words + more, (scores, rows), prints=scores)

    found, base = [], options.base
    if base is None:
        steps = options.base_steps
        base = out / "base/checkpoints" / str(steps)
        title = "train the base model on the tales, in PyTorch"
        found = [train("base", title, "mooshak_torch.train", "demo", steps, "--train.steps", steps)]
    middle = out / "sft-torch/checkpoints" / str(half)
    tuned = out / "sft-jax/checkpoints" / str(sft.train.steps)
    aligned = out / "dpo/checkpoints" / str(dpo.train.steps)
    rewarded = out / "grpo/checkpoints" / str(grpo.train.steps)
    return [
        *found,
        answer("base", "answers of the base model", base),
        train(
            "sft-torch",
            "SFT, the first half in PyTorch",
            "mooshak_torch.sft",
            "demo-align-sft",
            half,
            *("--init.from", base, "--train.stop_after_step", half),
        ),
        train(
            "sft-jax",
            "SFT, the second half in JAX",
            "mooshak_jax.sft",
            "demo-align-sft",
            sft.train.steps,
            *("--init.from", base, "--resume", middle),
        ),
        answer("sft", "answers after SFT", tuned),
        train(
            "dpo",
            "DPO in PyTorch",
            "mooshak_torch.dpo",
            "demo-align-dpo",
            dpo.train.steps,
            *("--init.from", tuned),
        ),
        answer("dpo", "answers after DPO", aligned),
        train(
            "grpo",
            "GRPO in JAX, of the model after SFT",
            "mooshak_jax.grpo",
            "demo-align-grpo",
            grpo.train.steps,
            *("--init.from", tuned),
        ),
        answer("grpo", "answers after GRPO", rewarded),
        Stage(
            "report",
            "write the report",
            ("parity.align_report", str(out)),
            (out / "report.html", out / "report.json"),
        ),
    ]


def _options() -> argparse.Namespace:
    usage = "[--out DIR] [--seed N] [--base CHECKPOINT]"
    parser = command_parser("parity.demo_align", __doc__, usage)
    add = parser.add_argument
    text = "directory of the runs and the report"
    add("--out", type=Path, default=Path("runs/demo-align"), metavar="DIR", help=text)
    add("--seed", type=int, default=0, metavar="N", help="seed of the data order of all stages")
    text = "base model, such as a checkpoint of the demo (default: one is trained)"
    add("--base", type=Path, metavar="CHECKPOINT", help=text)
    text = "steps of the base model, if it is trained"
    add("--base_steps", "--base-steps", type=int, default=1200, metavar="N", help=text)
    text = "held-out questions, and pairs, of each language"
    add("--count", type=int, default=300, metavar="N", help=text)
    text = "directory of demo.yaml and demo-align-*.yaml"
    add("--configs", type=Path, default=Path("configs"), metavar="DIR", help=text)
    return parser.parse_args()


@command
def main() -> None:
    options = _options()
    require(options.base_steps > 0, f"--base_steps {options.base_steps} must be at least 1")
    require(options.count > 0, f"--count {options.count} must be at least 1")
    if options.base is not None:
        detect_format(options.base)  # Raises an error for what is no checkpoint.
    run_demo(stages(options), options.out)


if __name__ == "__main__":
    main()
