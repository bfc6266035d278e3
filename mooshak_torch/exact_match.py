"""Measure exact match: the share of questions that the PyTorch model answers word for word.

python -m mooshak_torch.exact_match runs/sft-demo/checkpoints/300
python -m mooshak_torch.exact_match RUN/checkpoints/300 --jsonl questions.jsonl --out answers.jsonl
"""

from mooshak.device import restrict_to
from mooshak.errors import command
from mooshak.evaluation.exact_match import (
    exact_match_parser,
    pairs_of,
    questions_of,
    run_exact_match,
)


@command
def main() -> None:
    parser = exact_match_parser("mooshak_torch.exact_match", __doc__)
    args = parser.parse_args()
    questions, pairs = questions_of(args), pairs_of(args)
    restrict_to(args.device)
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_torch.lm import load

    run_exact_match(args, questions, pairs, load)


if __name__ == "__main__":
    main()
