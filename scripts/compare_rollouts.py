"""Compare the samples of two GRPO runs: which differ, and at which token first.

Runs of one seed sample the same texts until rounding decides a token: in float64 never, in float32
now and then; from there on their curves differ.

python scripts/compare_rollouts.py runs/grpo-torch runs/grpo-jax
python scripts/compare_rollouts.py runs/grpo-torch runs/grpo-mixed
"""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from mooshak.command_line import command_parser
from mooshak.data.rollouts import Rollout, parse_rollouts
from mooshak.errors import InputError, command
from mooshak.tables import print_table


@command
def main() -> None:
    parser = command_parser("scripts/compare_rollouts.py", __doc__, "RUN OTHER")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("other", type=Path, metavar="OTHER", help="another one, of the same seed")
    args = parser.parse_args()
    table = Table("step", "samples", "differing", "tokens before the first difference")
    for step, ours, theirs in rollouts_of_both(args.run, args.other):
        found = [first_difference(*pair) for pair in zip(ours, theirs, strict=True)]
        places = [place for place in found if place is not None]
        shown = ", ".join(map(str, sorted(places)[:8])) + (", ..." if len(places) > 8 else "")
        table.add_row(str(step), str(len(ours)), str(len(places)), shown)
    print_table(table)


def rollouts_of_both(
    run: Path, other: Path
) -> list[tuple[int, Sequence[Rollout], Sequence[Rollout]]]:
    """Return step and samples of the rollouts that both runs have.

    Raises `InputError` if there is none, or the samples are not of the same prompts.
    """
    steps = {int(path.stem) for path in (run / "rollouts").glob("*.jsonl")}
    found = []
    for step in sorted(steps):
        paths = [directory / "rollouts" / f"{step}.jsonl" for directory in (run, other)]
        if not paths[1].is_file():
            continue
        ours, theirs = (parse_rollouts(path.read_text("utf-8"), path) for path in paths)
        if [one.prompt_ids for one in ours] != [one.prompt_ids for one in theirs]:
            raise InputError(f"{paths[1]} has other prompts than {paths[0]}: another seed or data")
        found.append((step, ours, theirs))
    if not found:
        raise InputError(f"{run} and {other} have no rollouts of the same step")
    return found


def first_difference(ours: Rollout, theirs: Rollout) -> int | None:
    """Return the number of equal tokens before the first difference; None if all are equal."""
    if ours.completion_ids == theirs.completion_ids:
        return None
    pairs = zip(ours.completion_ids, theirs.completion_ids, strict=False)
    # One that ends where the other goes on differs there: its end token is another token.
    return next(i for i, (a, b) in enumerate(pairs) if a != b)


if __name__ == "__main__":
    main()
