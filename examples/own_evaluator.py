"""Measure what matters to you: an evaluator is one class, used beside the built-in ones.

Run it by `python examples/own_evaluator.py`. Put the class into a package with an entry point, and recipes can name it
too: see docs/writing-a-plugin.md.
"""

import argparse

import attrs

import tunekit as tk


@attrs.frozen(kw_only=True)
class FieldAccuracy(tk.AnswerEvaluator):
    """The share of `name: value` fields of the reference that the answer has as well.

    Args:
        separator: what stands between two fields.
    """

    name = "field-accuracy"
    better = {"field_accuracy": "max"}

    separator: str = " | "

    def compare(self, answers, context):
        """The mean over the rows; with a score a row, the run has its interval and a paired test too."""
        scores = [self._share(answer.given.split(self.separator), answer.expected) for answer in answers]
        return tk.Measured({"field_accuracy": sum(scores) / len(scores)}, scores={"field_accuracy": scores})

    def _share(self, given, expected):
        fields = expected.split(self.separator)
        return sum(field in given for field in fields) / len(fields)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=tk.TINY, help="a Hub id or a directory; default: the embedded model")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps")
    parser.add_argument("--run", default="runs/own-evaluator", help="the run directory")
    options = parser.parse_args()

    tk.register(FieldAccuracy)  # so that the run's recipe can name it in this process
    run = tk.Pipeline(
        model=options.model,
        data=tk.JsonLines(path=tk.ORDERS),
        trainer=tk.SFT(max_steps=options.steps, batch_size=8, learning_rate=3e-3),
        evaluators=(FieldAccuracy(max_new_tokens=24), tk.ExactMatch(max_new_tokens=24)),
    ).run(options.run)
    print(run)
