"""Values that contradict each other."""

import pytest
from test_load import VALID, problems, write


@pytest.mark.parametrize(
    ("addition", "where", "message"),
    [
        ("epochs = 2", "training.epochs", "epochs and max_steps both set the length"),
        ("warmup_steps = 2\nwarmup_ratio = 0.1", "training.warmup_ratio", "both set the warm-up"),
        ("warmup_steps = 10", "training.warmup_steps", "does not end within max_steps = 10"),
        ("batch_size = 6\nmicro_batch_size = 4", "training.micro_batch_size", "does not divide batch_size = 6"),
        ("[evaluation]\nat_start = true", "evaluation.at_start", "there is nothing to evaluate on"),
        ("[evaluation]\nevery_steps = 5", "evaluation.every_steps", "there is nothing to evaluate on"),
        (
            '[evaluation]\nexact_match = true\n[[data.eval]]\npath = "x.csv"\nformat = "completion"',
            "evaluation.exact_match",
            "completion data has neither",
        ),
        ('[[data.train]]\nformat = "chat"', "data.train[1].path", "a source needs a path"),
        (
            '[[data.train]]\npath = "x.csv"\ndataset = "y"\nformat = "chat"',
            "data.train[1].dataset",
            "both say where the rows come from",
        ),
        (
            '[[data.train]]\npath = "x.csv"\nsplit = "test"\nformat = "chat"',
            "data.train[1].split",
            "has no meaning beside path",
        ),
        ('[[data.train]]\npath = "x.txt"\nformat = "chat"', "data.train[1].path", "expected a file ending in .jsonl"),
        (
            '[[data.train]]\npath = "x.csv"\nformat = "chat"\ntemplate = "{a}"',
            "data.train[1].template",
            'no meaning for format = "chat"',
        ),
        (
            '[[data.train]]\npath = "x.csv"\nformat = "instruct"\ntemplate = "{a"',
            "data.train[1].template",
            "is no template",
        ),
        (
            '[[data.train]]\npath = "x.csv"\nformat = "instruct"\ntemplate = "Question"',
            "data.train[1].template",
            "expected at least one column in braces",
        ),
    ],
)
def test_every_contradiction_is_an_error_with_its_place(tmp_path, addition, where, message):
    text = VALID + addition + "\n"
    (problem,) = problems(write(tmp_path, text))
    assert problem.where == where and message in problem.message
    assert problem.line is not None and problem.line > len(VALID.splitlines())


def test_a_built_in_model_has_no_revision(tmp_path):
    text = VALID.replace('base = "builtin:mini"', 'base = "builtin:mini"\nrevision = "main"')
    (problem,) = problems(write(tmp_path, text))
    assert "no meaning for a built-in model" in problem.message and problem.line == 3
