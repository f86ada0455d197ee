"""Values that contradict each other."""

import itertools

import pytest
from recipe_support import VALID, load, problems, write


@pytest.mark.parametrize(
    ("addition", "where", "message"),
    [
        ("[evaluation]\nexact_match = true", "evaluation.exact_match", "there is nothing to evaluate on"),
        ('[[data.train]]\npath = "x"\nformat = "chat"', "data.train[1].path", "expected a file ending in .jsonl"),
        (
            '[[data.train]]\npath = "x.csv"\nname = "n"\nformat = "chat"',
            "data.train[1].name",
            "name belongs to a dataset of the hub",
        ),
        (
            '[[data.train]]\npath = "x.csv"\nrevision = "main"\nformat = "chat"',
            "data.train[1].revision",
            "revision belongs to a dataset of the hub",
        ),
        (
            '[[data.train]]\npath = "x.csv"\nformat = "instruct"\nmessages_column = "m"',
            "data.train[1].messages_column",
            'messages_column has no meaning for format = "instruct"',
        ),
        (
            '[[data.train]]\npath = "x.csv"\nformat = "chat"\nprompt_column = "p"',
            "data.train[1].prompt_column",
            'prompt_column has no meaning for format = "chat"',
        ),
        (
            '[[data.train]]\npath = "x.csv"\nformat = "completion"\nresponse_column = "r"',
            "data.train[1].response_column",
            'response_column has no meaning for format = "completion"',
        ),
        (
            '[[data.train]]\npath = "x.csv"\nformat = "chat"\ntext_column = "t"',
            "data.train[1].text_column",
            'text_column has no meaning for format = "chat"',
        ),
        (
            '[[data.train]]\npath = "x.csv"\nformat = "instruct"\ntemplate = "{a.b}"',
            "data.train[1].template",
            "nothing else in braces",
        ),
        (
            '[[data.train]]\npath = "x.csv"\nformat = "instruct"\ntemplate = "{}"',
            "data.train[1].template",
            "nothing else in braces",
        ),
        (
            '[[data.eval]]\npath = "x.txt"\nformat = "chat"',
            "data.eval[0].path",
            "expected a file ending in .jsonl",
        ),
        ("epochs = 2", "training.epochs", "epochs and max_steps both set the length"),
        ("warmup_steps = 2\nwarmup_ratio = 0.1", "training.warmup_ratio", "both set the warm-up"),
        ("warmup_steps = 10", "training.warmup_steps", "does not end within max_steps = 10"),
        ("batch_size = 6\nmicro_batch_size = 4", "training.micro_batch_size", "does not divide batch_size = 6"),
        ('schedule = "constant"\nmin_lr_ratio = 0.1', "training.min_lr_ratio", 'no meaning for schedule = "constant"'),
        (
            '[evaluation]\nat_end = false\n[[data.eval]]\npath = "x.csv"\nformat = "chat"',
            "evaluation.at_end",
            "nothing evaluates it",
        ),
        ("[evaluation]\nmax_samples = 5", "evaluation.max_samples", "there is nothing to evaluate on"),
        ("[evaluation]\nbatch_size = 4", "evaluation.batch_size", "there is nothing to evaluate on"),
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
            "a file has one split, which is called train",
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


SOURCE = 'path = "x.csv"\nformat = "chat"\n'


@pytest.mark.parametrize(
    ("addition", "shown"),
    [
        ("epochs = 2", "max_steps = 10"),
        ("warmup_steps = 10", "max_steps = 10"),
        ("warmup_steps = 2\nwarmup_ratio = 0.1", "warmup_steps = 2"),
        ("batch_size = 6\nmicro_batch_size = 4", "batch_size = 6"),
        ("micro_batch_size = 3", None),  # batch_size is not written
        (f'[[data.train]]\ndataset = "y"\n{SOURCE}', 'path = "x.csv"'),
        (f"[data]\neval_size = 1\n[[data.eval]]\n{SOURCE}", "[[data.eval]]"),
        (f"[checkpoint]\nper_epoch = 2\nevery_steps = 5\n[[data.eval]]\n{SOURCE}", "every_steps = 5"),
        ('tf32 = true\ndevice = "cpu"', 'device = "cpu"'),
    ],
)
def test_a_contradiction_of_two_keys_shows_both(tmp_path, addition, shown):
    text = VALID + addition + "\n"
    if "[data]" in addition:  # its header comes before its tables
        text = VALID.replace("[[data.train]]", "[data]\neval_size = 1\n[[data.train]]")
        text += addition.replace("[data]\neval_size = 1\n", "")
    (problem,) = problems(write(tmp_path, text))
    assert [place.source_line for place in problem.related] == ([] if shown is None else [shown])


@pytest.mark.parametrize("line", ['revision = "main"', "trust_remote_code = true"])
def test_a_built_in_model_has_no_revision_and_no_remote_code(tmp_path, line):
    text = VALID.replace('base = "builtin:mini"', f'base = "builtin:mini"\n{line}')
    (problem,) = problems(write(tmp_path, text))
    assert problem.code == "QT021" and problem.line == 3
    assert "no meaning for a built-in model" in problem.message


@pytest.mark.parametrize("template", ["{a!z}", "{a:{b}}"])
def test_a_template_that_could_not_be_filled_in_is_refused(tmp_path, template):
    text = VALID + f'[[data.train]]\npath = "x.csv"\nformat = "instruct"\ntemplate = "{template}"\n'
    (problem,) = problems(write(tmp_path, text))
    assert (problem.code, problem.where) == ("QT014", "data.train[1].template")


def test_any_order_of_the_keys_gives_the_same_contradictions(tmp_path):
    keys = ("epochs = 2", "warmup_steps = 20", "warmup_ratio = 0.1", "micro_batch_size = 3")
    found = {
        frozenset((p.code, p.where, p.message) for p in problems(write(tmp_path, VALID + "\n".join(order) + "\n")))
        for order in itertools.permutations(keys)
    }
    assert [len(one) for one in found] == [4]


def test_a_huge_batch_is_answered_with_a_few_divisors(tmp_path):
    (problem,) = problems(write(tmp_path, VALID + "batch_size = 1000000000000000000\nmicro_batch_size = 3\n"))
    assert problem.hint == "one of 1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50 or a larger divisor does"


def test_a_micro_batch_that_does_not_divide_the_batch_gets_those_that_do(tmp_path):
    (problem,) = problems(write(tmp_path, VALID + "batch_size = 6\nmicro_batch_size = 4\n"))
    assert problem.hint == "one of 1, 2, 3, 6 does"


def test_all_contradictions_are_reported_at_once(tmp_path):
    text = VALID + 'epochs = 2\nwarmup_steps = 20\n[[data.eval]]\nformat = "chat"\n'
    assert [(p.code, p.where) for p in problems(write(tmp_path, text))] == [
        ("QT020", "training.epochs"),
        ("QT020", "training.warmup_steps"),
        ("QT022", "data.eval[0].path"),
    ]


@pytest.mark.parametrize(
    "addition",
    [
        "warmup_steps = 9",
        "batch_size = 6\nmicro_batch_size = 3",
        '[[data.train]]\ndataset = "org/data"\nname = "n"\nsplit = "test"\nrevision = "main"\nformat = "chat"',
        '[[data.train]]\npath = "x.CSV"\nformat = "instruct"\ntemplate = "{{Q}}: {question}"',
        '[[data.train]]\npath = "x.parquet"\nformat = "completion"\ntext_column = "t"',
        '[evaluation]\nexact_match = true\n[[data.eval]]\npath = "x.csv"\nformat = "instruct"',
        "[evaluation]\nmax_new_tokens = 4",  # of an exact_match that --set switched off
    ],
)
def test_what_goes_together_is_no_contradiction(tmp_path, addition):
    load(write(tmp_path, VALID + addition + "\n"))


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ('added_tokens = ["<a>", "<b>", "<a>"]', "model.added_tokens"),
        ('special_tokens = {additional_special_tokens = ["<a>", "<a>"]}', "model.special_tokens"),
        ('added_tokens = ["<a>"]\nspecial_tokens = {additional_special_tokens = ["<a>"]}', "model.special_tokens"),
    ],
)
def test_a_token_is_added_once(tmp_path, keys, where):
    (problem,) = problems(write(tmp_path, VALID.replace('"builtin:mini"', f'"builtin:mini"\n{keys}')))
    assert problem.code == "QT020" and problem.where.startswith(where)
    assert problem.message == '"<a>" is added to the vocabulary twice'


def test_loftq_needs_packed_weights(tmp_path):
    text = VALID.replace("r = 8", 'r = 8\ninit = "loftq"')
    assert load(write(tmp_path, text)).adapter.init == "loftq"
    dense = text.replace('[quantization]\nbackend = "toy"\nweight_dtype = "nf4"\n', "")
    (problem,) = problems(write(tmp_path, dense))
    assert problem.where == "adapter.init" and "nothing is packed" in problem.message


def test_loftq_iterations_belong_to_loftq(tmp_path):
    (problem,) = problems(write(tmp_path, VALID.replace("r = 8", "r = 8\nloftq_iterations = 3")))
    assert problem.where == "adapter.loftq_iterations" and 'no meaning for init = "default"' in problem.message


@pytest.mark.parametrize(
    ("line", "where", "found"),
    [
        ('optimizer = "paged_adamw"', "training.optimizer", 'optimizer = "paged_adamw" is for a GPU'),
        ("tf32 = true", "training.tf32", "tf32 = true is for a GPU"),
        ('activation_checkpointing = "offload"', "training.activation_checkpointing", "is for a GPU"),
    ],
)
def test_what_only_a_gpu_can_do_excludes_training_on_a_cpu(tmp_path, line, where, found):
    (problem,) = problems(write(tmp_path, VALID + f'device = "cpu"\n{line}\n'))
    assert (problem.code, problem.where) == ("QT021", where) and found in problem.message
    load(write(tmp_path, VALID + f"{line}\n"))  # on a machine with a GPU it may be right


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_for_a_gpu_excludes_training_on_a_cpu(tmp_path, name):
    text = VALID.replace("builtin:mini", f'builtin:mini"\nattn_implementation = "{name}') + 'device = "cpu"\n'
    (problem,) = problems(write(tmp_path, text))
    assert (problem.code, problem.where) == ("QT021", "model.attn_implementation")


@pytest.mark.parametrize("section", ["evaluation", "checkpoint"])
def test_two_ways_to_say_how_often_are_one_too_many(tmp_path, section):
    text = VALID + f'[[data.eval]]\npath = "e.jsonl"\nformat = "chat"\n[{section}]\nper_epoch = 2\nevery_steps = 5\n'
    (problem,) = problems(write(tmp_path, text))
    assert (problem.code, problem.where) == ("QT020", f"{section}.per_epoch")


def test_evaluations_per_epoch_need_something_to_evaluate_on(tmp_path):
    (problem,) = problems(write(tmp_path, VALID + "[evaluation]\nper_epoch = 2\n"))
    assert (problem.code, problem.where) == ("QT022", "evaluation.per_epoch")


def test_what_quantune_decides_can_not_be_replaced_in_the_bases_configuration(tmp_path):
    table = "[model.config]\nvocab_size = 5\nrope_theta = 5e5\n[model.config.text_config]\nquantization_config = {}\n"
    found = problems(write(tmp_path, VALID + table))
    assert [(problem.code, problem.where, problem.line) for problem in found] == [
        ("QT180", "model.config.vocab_size", VALID.count("\n") + 2),
        ("QT180", "model.config.text_config.quantization_config", VALID.count("\n") + 5),
    ]
    assert all(problem.hint for problem in found)


@pytest.mark.parametrize(
    ("keys", "where", "message"),
    [
        ('target_parameters = ["down_proj"]\nuse_dora = true', "adapter.use_dora", "target_parameters don't have"),
        ('target_parameters = ["down_proj"]\ninit = "pissa"', "adapter.init", "target_parameters can't"),
        ('start_from = "a"\ninit = "gaussian"', "adapter.init", "both say how the adapter begins"),
        ('modules_to_save = ["norm", "q_proj"]', "adapter.modules_to_save", '"q_proj" is trained in full'),
    ],
)
def test_an_adapter_that_can_not_be_both_is_refused(tmp_path, keys, where, message):
    (problem,) = problems(write(tmp_path, VALID.replace("r = 8", f"r = 8\n{keys}")))
    assert (problem.code, problem.where) == ("QT020", where) and message in problem.message and problem.hint


def test_an_empty_list_of_targets_needs_weights_of_experts(tmp_path):
    text = VALID.replace('["q_proj", "v_proj"]', "[]")
    (problem,) = problems(write(tmp_path, text))
    assert (problem.code, problem.where) == ("QT022", "adapter.targets")
    load(write(tmp_path, text.replace("r = 8", 'r = 8\ntarget_parameters = ["down_proj"]')))


def test_a_gaussian_adapter_on_experts_is_no_contradiction(tmp_path):
    keys = 'target_parameters = ["down_proj"]\ninit = "gaussian"'
    load(write(tmp_path, VALID.replace("r = 8", f"r = 8\n{keys}")))


def test_an_adapter_on_weights_of_experts_has_no_inputs_to_drop(tmp_path):
    text = VALID.replace("r = 8", 'dropout = 0.1\ntarget_parameters = ["down_proj"]\nr = 8')
    (problem,) = problems(write(tmp_path, text))
    assert (problem.code, problem.where, problem.line) == ("QT121", "adapter.dropout", 9)
    assert [place.line for place in problem.related] == [10]
    load(write(tmp_path, text.replace("dropout = 0.1", "dropout = 0.0")))


def test_a_constant_schedule_ends_at_its_peak(tmp_path):
    (problem,) = problems(write(tmp_path, VALID + 'schedule = "constant"\nmin_lr_ratio = 0.1\n'))
    assert (problem.code, problem.where) == ("QT021", "training.min_lr_ratio")
    load(write(tmp_path, VALID + 'schedule = "linear"\nmin_lr_ratio = 0.1\n'))


EVAL = '[[data.eval]]\npath = "x.csv"\nformat = "chat"\n[evaluation]\nat_end = false\n'


@pytest.mark.parametrize("keys", ["", "every_steps = 11"])
def test_evaluation_data_that_nothing_evaluates_is_refused(tmp_path, keys):
    (problem,) = problems(write(tmp_path, f"{VALID}{EVAL}{keys}\n"))
    assert (problem.code, problem.where) == ("QT022", "evaluation.at_end")
    assert "nothing evaluates it" in problem.message and problem.hint


@pytest.mark.parametrize("keys", ["every_steps = 10", "per_epoch = 1", "at_start = true"])
def test_evaluation_data_that_is_evaluated_once_is_fine(tmp_path, keys):
    load(write(tmp_path, f"{VALID}{EVAL}{keys}\n"))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_does_not_compute_in_fp32(tmp_path, attention):
    text = VALID.replace('"builtin:mini"', f'"builtin:mini"\nattn_implementation = "{attention}"')
    (problem,) = problems(write(tmp_path, text.replace("max_steps = 10", 'precision = "fp32"')))
    assert problem.where == "model.attn_implementation" and 'precision is "fp32"' in problem.message
    assert [place.source_line for place in problem.related] == ['precision = "fp32"']
    load(write(tmp_path, text.replace("max_steps = 10", 'precision = "bf16"')))
