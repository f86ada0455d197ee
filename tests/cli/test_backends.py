"""`quantune backends` and the registry behind it, among plugins of every kind."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
import tomli
from commands import QUICKSTART, quantune_command, recipe, refused
from plugin_packages import DESCRIPTION, TENSOR_CODE, install, install_text, loading, named

from quantune.backends import inspection, registry
from quantune.backends.description import BackendDescription, Probe
from quantune.backends.discovery import plain
from quantune.backends.options import options_in_words, snippet
from quantune.errors import BackendError
from quantune.recipe.load import load_recipe

BUILT_IN = list(registry.BUILT_IN)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on the path to install packages into."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def rows() -> dict[str, registry.BackendStatus]:
    """What `backends list` shows, by name."""
    return {row.name: row for row in map(registry.status, registry.find())}


# Listing --------------------------------------------------------------------------------------------------------------


def test_the_built_in_backends_are_listed_with_what_they_store():
    listed = json.loads(quantune_command("backends", "list", "--json").stdout)
    assert [row["name"] for row in listed] == BUILT_IN
    assert {row["package"] for row in listed} == {"quantune"} and {row["status"] for row in listed} == {"available"}
    assert listed[0]["bits_per_weight"] == {"nf4": 4.127, "fp4": 4.127, "int8": 8.008}
    shown = quantune_command("backends", "list").stdout
    assert "nf4 4.13 · fp4 4.13 · int8 8.01" in shown and "mxfp4 4.25" in shown


def test_an_installed_plugin_is_listed_without_being_imported(tmp_path):
    code = "from pathlib import Path\nPath(__file__).with_suffix('.imported').touch()\n"
    folder = install(tmp_path, "plugin", {"mine": "plugin:description"}, code)
    (row,) = json.loads(quantune_command("backends", "list", "--json", PYTHONPATH=folder).stdout)[len(BUILT_IN) :]
    assert (row["name"], row["package"], row["version"], row["status"]) == ("mine", "plugin", "1.0", "installed")
    assert row["hint"] == "quantune backends check mine looks closer"
    assert not (tmp_path / "plugin.imported").exists()
    shown = quantune_command("backends", "list", PYTHONPATH=folder).stdout
    assert "mine is installed (quantune backends check mine looks closer)" in shown


def test_a_plugin_that_claims_a_built_in_name_is_a_row_that_says_so_and_shadows_nothing(tmp_path, packages):
    folder = install(packages, "impostor", {"bnb": "impostor:description"}, "raise RuntimeError")
    assert rows()["bnb"].package == "quantune" and rows()["bnb"].status == "available"
    assert rows()["bnb (impostor)"].status == "broken"
    assert "impostor claims the name of a built-in backend" in str(rows()["bnb (impostor)"].reason)
    assert quantune_command("check", QUICKSTART, PYTHONPATH=folder).returncode == 0


def test_a_name_that_two_packages_claim_is_one_row_that_names_both_and_can_not_be_used(tmp_path, packages):
    install(packages, "one", {"mine": "one:description"})
    folder = install(packages, "two", {"mine": "two:description"})
    assert rows()["mine"].status == "broken" and rows()["mine"].package == "one, two"
    assert rows()["mine"].reason == "claimed by one and two; uninstall all but one"
    assert "claimed by one and two" in refused("check", recipe(tmp_path, backend="mine"), PYTHONPATH=folder)


def test_the_first_of_two_copies_of_a_package_on_the_path_counts(packages, tmp_path, monkeypatch):
    install(packages, "plugin", {"mine": "plugin:description", "old": "plugin:description"})
    newer = tmp_path / "newer"
    install(newer, "plugin", {"mine": "plugin:description"})
    monkeypatch.syspath_prepend(str(newer))
    assert rows()["mine"].status == "installed" and "old" not in rows()


def test_a_package_without_metadata_goes_by_the_name_of_its_folder(packages):
    install(packages, "plugin", {"mine": "plugin:description", "third": "plugin:description"})
    (packages / "plugin-1.0.dist-info" / "METADATA").unlink()
    install(packages, "sound", {"mine": "sound:description", "other": "sound:description"})
    assert rows()["mine"].reason == "claimed by plugin and sound; uninstall all but one"
    assert rows()["other"].status == "installed"
    assert (rows()["third"].package, rows()["third"].version) == ("plugin", "1.0")


@pytest.mark.parametrize(
    ("entry_points", "name", "reason"),
    [
        ("[quantune.backends]\nmine\n", "mine", 'expected "mine = module:attribute" in its entry_points.txt'),
        ("[quantune.backends]\nmine =\n", "mine", 'found "mine = "'),
        ("[quantune.backends]\nmine = plugin\n", "mine", 'found "mine = plugin"'),
        ("[quantune.backends]\nmine = plugin description\n", "mine", "module:attribute"),
        ("[quantune.backends]\nmine = a:b\nmine = a:c\n", "mine", "names it more than once"),
        ("[console_scripts]\nx\n[quantune.backends]\nmine = a:b\n", "(broken)", "entry_points.txt of broken can't"),
        ("[a]\n[quantune.backends\nmine = a:b\n", "(broken)", "reinstall or uninstall broken"),
        (b"[quantune.backends]\n\xff\xfe = a:b\n", "(broken)", "can't be read: UnicodeDecodeError"),
    ],
)
def test_a_damaged_entry_points_file_is_a_row_with_its_package_and_hides_no_other(packages, entry_points, name, reason):
    install_text(packages, "broken", entry_points)
    install(packages, "sound", {"other": "sound:description"})
    row = rows()[name]
    assert row.status == "broken" and row.package == "broken" and reason in str(row.reason)
    assert rows()["other"].status == "installed"
    assert registry.describe("bnb").name == "bnb"


@pytest.mark.parametrize("text", ["", "[console_scripts]\nx\n", b"\xff\xfe", "quantune.backends = a:b\n", "[]\n=\n"])
def test_a_package_that_claims_no_backend_is_no_row_however_damaged(packages, text):
    install_text(packages, "stranger", text)
    assert list(rows()) == BUILT_IN


def test_torch_can_not_be_imported_beside_a_damaged_file_and_a_run_says_whose_it_is(tmp_path):
    folder = install_text(tmp_path, "stranger", "[console_scripts]\nx\n")
    assert quantune_command("check", QUICKSTART, PYTHONPATH=folder).returncode == 0
    dir_ = f"output.dir={tmp_path / 'run'}"
    said = refused("run", QUICKSTART, "--set", dir_, PYTHONPATH=folder)
    assert "the entry_points.txt of stranger is damaged" in said and "uninstall stranger" in said


HOSTILE_NAMES = {
    "[red]loud[/red]": "[red]loud[/red]",
    "\x1b[31mred": "\\x1b[31mred",
    "right\u202eleft": "right\\u202eleft",
    "../../etc/passwd": "../../etc/passwd",
    "Mine": "Mine",
    "two words": "two words",
    "9lives": "9lives",
    "": "",
    "a" * 5000: "a" * 40 + "...",
    "-rf": "-rf",
    "name:with:colons": "name:with:colons",
}


def test_hostile_names_are_rows_that_say_why_shown_escaped_and_short(tmp_path):
    # a name may hold no newline: a line of the file ends there
    folder = install(tmp_path, "plugin", {name: "plugin:description" for name in HOSTILE_NAMES}, "raise RuntimeError")
    listed = {
        row["name"]: row for row in json.loads(quantune_command("backends", "list", "--json", PYTHONPATH=folder).stdout)
    }
    assert set(HOSTILE_NAMES.values()) == listed.keys() - set(BUILT_IN)
    for shown in HOSTILE_NAMES.values():
        assert listed[shown]["status"] == "broken" and "is no name for a backend" in listed[shown]["reason"]
    table = quantune_command("backends", "list", PYTHONPATH=folder).stdout
    assert "[red]loud[/red]" in table and "\\x1b[31mred" in table and "\x1b" not in table and "\u202e" not in table
    assert "a" * 41 not in table and quantune_command("check", QUICKSTART, PYTHONPATH=folder).returncode == 0


def test_what_a_terminal_would_act_on_is_written_out():
    assert plain("a\nb\x1b[0m\u202e\udc80é") == "a\\nb\\x1b[0m\\u202e\\udc80é"
    assert plain("a" * 50, 40) == "a" * 40 + "..."


# In a recipe ----------------------------------------------------------------------------------------------------------


def test_a_plugin_brings_its_own_options(tmp_path):
    folder = install(tmp_path, "plugin", {"mine": "plugin:description"}, DESCRIPTION)
    done = quantune_command("check", recipe(tmp_path, backend="mine"), PYTHONPATH=folder)
    assert done.returncode == 0 and "group_size = 128" in done.stdout
    wrong = ("--set", "quantization.block_size=64")
    said = refused("check", recipe(tmp_path, backend="mine"), *wrong, PYTHONPATH=folder)
    assert 'block_size has no meaning for backend "mine"' in said and 'an option of "bnb" and "fp8"' in said


BROKEN_DESCRIPTIONS = {
    "import not_installed_anywhere": "can't be imported: ModuleNotFoundError",
    "raise RuntimeError('[/] broken')": "can't be imported: RuntimeError: [/] broken",
    "raise RuntimeError('\\x1b[31m\\nred')": "can't be imported: RuntimeError: \\x1b[31m red",
    "import sys; sys.exit(3)": "can't be imported: SystemExit: 3",
    "class Odd(BaseException):\n    def __str__(self):\n        1 / 0\nraise Odd": "Odd: (its message can't be read)",
    "def f(): f()\nf()": "can't be imported: RecursionError",
    "other = 1": "can't be imported: AttributeError",
    "description = 1": "expected its entry point to be a BackendDescription, found int",
    DESCRIPTION.replace('name="mine",', 'name="mine", api_version=99,'): "was written for version 99",
    DESCRIPTION.replace(
        'name="mine",', 'name="other",'
    ): "expected its description to have the same name, found 'other'",
    DESCRIPTION.replace("options=Options", "options=dict"): "expected its options to be an attrs class",
    DESCRIPTION.replace('weight_dtypes=("w4",)', 'weight_dtypes="w4"'): "expected its weight_dtypes to be a tuple",
    DESCRIPTION.replace("weight_dtype: str", "dtype: str"): "its options have no weight_dtype",
    DESCRIPTION.replace('summary=""', "summary=None"): "expected its summary to be a string",
    DESCRIPTION.replace('summary=""', 'summary="", bits_per_weight={"w4": "4"}'): "bits_per_weight to map names to",
    DESCRIPTION.replace("description =", "Options.activation_dtypes = ('int8',)\ndescription ="): (
        "expected activation_dtypes of its options to be a method"
    ),
}


@pytest.mark.parametrize(("code", "message"), BROKEN_DESCRIPTIONS.items(), ids=range(len(BROKEN_DESCRIPTIONS)))
def test_a_broken_plugin_that_is_asked_for_is_a_message_with_its_package(packages, code, message):
    install(packages, "plugin", {"mine": "plugin:description"}, code)
    with pytest.raises(BackendError) as caught:
        registry.describe("mine")
    assert message in str(caught.value) and 'backend "mine" of package plugin' in str(caught.value)
    assert list(rows()) == [*BUILT_IN, "mine"] and registry.describe("bnb").name == "bnb"


def test_a_recipe_that_names_a_broken_plugin_points_to_the_line(tmp_path):
    folder = install(tmp_path, "plugin", {"mine": "plugin:description"}, "print('noise')\nraise RuntimeError('[/] x')")
    said = refused("check", recipe(tmp_path, backend="mine"), PYTHONPATH=folder)
    assert 'backend "mine" of package plugin 1.0 can\'t be imported: RuntimeError: [/] x' in said
    assert "[quantization.backend]" in said and "recipe.toml:4:1" in said
    assert quantune_command("check", recipe(tmp_path), PYTHONPATH=folder).returncode == 0


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("lambda: 1 / 0", 'the probe of backend "mine" fails: ZeroDivisionError'),
        ("lambda: exit(3)", 'the probe of backend "mine" fails: SystemExit: 3'),
        ("lambda: True", "to return a Probe, found bool"),
        ("None", "fails: TypeError"),
        ('lambda: Probe(available=True, devices="cuda")', "values are of other types"),
        ("lambda: Probe(available=True, devices_of=None)", "values are of other types"),
        ('lambda: Probe(available=False, reason="no mine", install="pip install m")', "here: no mine; pip install m"),
    ],
)
def test_a_probe_that_fails_or_says_no_is_a_message(packages, probe, message):
    code = DESCRIPTION.replace('lambda: Probe(available=True, devices=("cpu",))', probe)
    install(packages, "plugin", {"mine": "plugin:description"}, code)
    with pytest.raises(BackendError, match=".*") as caught:
        registry.describe_available("mine")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bnbb", 'found "bnbb"; did you mean "bnb"?'),
        ("zzz", '"bnb", "fp8", "mxfp4", "torchao", found "zzz"'),
        ("nf4", '"nf4" is a weight_dtype of "bnb" and "torchao"'),
        ("\x1b[31m", 'found "\\x1b[31m"'),
    ],
)
def test_a_name_that_no_backend_has_is_answered_with_those_there_are(name, message):
    with pytest.raises(BackendError) as caught:
        registry.describe(name)
    assert message in str(caught.value)


def test_a_known_plugin_that_is_not_installed_is_answered_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(registry.KNOWN_PLUGINS, "known", "quantune-known")
    with pytest.raises(BackendError, match='found "known"; known is a package of its own: pip install quantune-known'):
        registry.named("known")


def test_options_lead_to_the_built_in_backends_that_have_them():
    assert registry.backends_with_option("group_size") == ("torchao",)
    assert registry.backends_with_option("block_size") == ("bnb", "fp8")
    assert registry.backends_with_option("nothing") == ()


@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [
        ("w4", "cuda", None),
        ("w8", "cpu", None),
        (None, "cuda", None),
        (
            "w4",
            "cpu",
            'backend "mine" with weight_dtype = "w4" runs on cuda, and this run is on cpu; use weight_dtype = ',
        ),
        ("w4", "cpu", '"w8", or train with [training] device = "cuda", or'),
        ("w8", "mps", 'runs on cuda and cpu, and this run is on mps; train with [training] device = "cuda" or "cpu"'),
        ("w2", "cpu", 'backend "mine" with weight_dtype = "w2" runs on no device'),
    ],
)
def test_a_format_that_does_not_run_on_the_device_says_where_it_does(dtype, device, message):
    probe = Probe(available=True, devices=("cuda", "cpu"), devices_of={"w4": ("cuda",), "w2": ()})
    described = described_with(probe)
    if message is None:
        registry.require_device(described, dtype, device)
        return
    with pytest.raises(BackendError) as caught:
        registry.require_device(described, dtype, device)
    assert message in str(caught.value)


def test_a_probe_that_names_no_device_restricts_nothing():
    registry.require_device(described_with(Probe(available=True)), None, "cpu")


def described_with(probe: Probe) -> BackendDescription:
    """A description that nothing can be loaded from."""
    dtypes = ("w2", "w4", "w8")
    return BackendDescription(
        name="mine", summary="", weight_dtypes=dtypes, options=object, probe=lambda: probe, load=lambda: None
    )


# Showing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("uncommented", [False, True])
def test_the_piece_of_recipe_that_is_shown_is_one_that_loads(tmp_path, name, uncommented):
    shown = snippet(registry.describe(name))
    fields = [option.key for option in options_in_words(registry.options_of(name))]
    assert all(key in shown for key in fields)
    lines = shown.splitlines()
    if uncommented:
        lines = [line.removeprefix("# ") for line in lines if "unset by default" not in line]
    path = tmp_path / "recipe.toml"
    data = '[model]\nbase = "builtin:mini"\n[adapter]\n[[data.train]]\npath = "x.jsonl"\nformat = "chat"\n'
    path.write_text("\n".join(lines) + "\n" + data)
    loaded = load_recipe(path, options_of=registry.options_of).recipe.quantization
    assert loaded is not None and loaded.backend == name


def test_show_tells_options_devices_and_bits(tmp_path):
    shown = quantune_command("backends", "show", "torchao").stdout
    assert "torchao's formats" in shown and "quantune" in shown and "available" in shown
    assert "group_size" in shown and "Weights of a row that share one scale" in shown and "required" in shown
    assert "4.25" in shown and "cpu, cuda" in shown
    assert tomli.loads(shown[shown.index("[quantization]") :])["quantization"]["weight_dtype"] == "int4"


def test_show_as_json():
    document = json.loads(quantune_command("backends", "show", "bnb", "--json").stdout)
    assert document["options"][0] == {
        "key": "weight_dtype",
        "type": '"nf4" or "fp4" or "int8"',
        "default": '"nf4"',
        "required": False,
        "doc": "4-bit NormalFloat, 4-bit float, or 8-bit integers with one scale per row.",
    }
    assert document["devices_of"]["int8"] == ["cpu", "cuda"]
    assert tomli.loads(document["recipe"]) == {"quantization": {"backend": "bnb", "weight_dtype": "nf4"}}


ODD_OPTIONS = {
    "no docstrings": DESCRIPTION,
    "no source": DESCRIPTION.replace("    weight_dtype: str", "    pass\nOptions = attrs.make_class('Options', "
                                     "{'weight_dtype': attrs.field(default='w4')}, frozen=True)\nclass Unused:\n"
                                     "    weight_dtype: str"),
    "unknown annotation": DESCRIPTION.replace("group_size: int", "group_size: 'Nowhere'"),
    "default that is no TOML": DESCRIPTION.replace("int = 128", "object = attrs.field(factory=object)"),
    "factory that fails": DESCRIPTION.replace("int = 128", "int = attrs.field(factory=lambda: 1 / 0)"),
    "required": DESCRIPTION.replace("int = 128", "int"),
    "problems that fail": DESCRIPTION.replace("int = 128", "int = 128\n    def problems(self): return 1 / 0"),
    "hostile docs": DESCRIPTION.replace("int = 128", "int = 128\n    '''[red]\\x1b[31m[/]'''"),
}  # fmt: skip


@pytest.mark.parametrize("code", ODD_OPTIONS.values(), ids=ODD_OPTIONS)
def test_options_classes_of_every_making_can_be_shown(packages, capsys, code):
    from quantune.cli.backends import show

    install(packages, "plugin", {"mine": "plugin:description"}, code)
    show("mine", as_json=False)
    shown = capsys.readouterr().out
    assert 'backend = "mine"\nweight_dtype = "w4"\n' in shown and "\x1b" not in shown
    tomli.loads(shown[shown.index("[quantization]") :])
    show("mine", as_json=True)
    assert json.loads(capsys.readouterr().out)["name"] == "mine"


# Checking -------------------------------------------------------------------------------------------------------------

FINE = "return HalfBackend()"
CHECKED = {
    # what a plugin is: its code, its status, and what of the reason matters
    "loud": (
        loading("loud", f"import os; os.write(1, b'x' * 100_000); print('x', flush=True); {FINE}"),
        "works",
        None,
    ),
    "segv": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "broken",
             "crashed importing its description: killed by SIGSEGV"),
    "leaves": ("import os; os.write(2, b'[red] bye\\n'); os._exit(0)", "broken",
               "left with exit code 0 ([red] bye)"),
    "exits": ("import sys; sys.exit(3)", "broken", "SystemExit: 3"),
    "missing": ("import not_installed_anywhere", "broken", "No module named 'not_installed_anywhere'"),
    "future": (named("future", DESCRIPTION).replace("summary=", "api_version=99, summary="), "broken", "version 99"),
    "probeless": (named("probeless", DESCRIPTION).replace("lambda: Probe", "lambda: nothing and Probe"), "broken",
                  'the probe of backend "probeless" fails: NameError'),
    "lacking": (
        named("lacking", DESCRIPTION).replace('available=True, devices=("cpu",)',
                                              'available=False, reason="no [lib]", install="pip install lib"'),
        "unavailable", "no [lib]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """One check of everything: the built-in backends and every plugin of `CHECKED`."""
    folder = tmp_path_factory.mktemp("packages")
    for name, (code, _, _) in CHECKED.items():
        install(folder, f"plugin_{name}", {name: f"plugin_{name}:description"}, code)
    install(folder, "plugin_again", {"future": "a:b", "[red]": "a:b"})
    return quantune_command("backends", "check", "--json", PYTHONPATH=str(folder))


@pytest.fixture(scope="module")
def results(checked):
    return {row["name"]: row for row in json.loads(checked.stdout)}


def test_a_check_of_anything_broken_ends_with_1_and_all_results(checked, results):
    assert checked.returncode == 1 and "Traceback" not in checked.stderr
    assert results.keys() == {*BUILT_IN, *CHECKED, "[red]"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_backends_work_and_take_the_bits_they_declare(results, name):
    row, description = results[name], registry.describe(name)
    assert row["status"] == "works" and row["seconds"] > 0
    trips = [trip for trip in row["round_trips"] if trip["device"] == "cpu"]
    assert [trip["weight_dtype"] for trip in trips] == list(description.weight_dtypes or [name])
    for trip in trips:
        assert trip["declared"] == description.bits_per_weight[trip["weight_dtype"]]
        assert trip["bits_per_weight"] == pytest.approx(trip["declared"], abs=1e-3)
        assert 0 < trip["relative_error"] < (0.15 if trip["bits_per_weight"] < 5 else 0.03)


@pytest.mark.parametrize("name", sorted(CHECKED.keys() - {"future"}))
def test_whatever_a_plugin_does_its_row_says_why(results, name):
    _, status, reason = CHECKED[name]
    assert results[name]["status"] == status, results[name]
    assert (reason or "") in str(results[name]["reason"])


def test_what_is_known_without_importing_is_a_row_too(results):
    assert results["future"]["reason"] == "claimed by plugin_again and plugin_future; uninstall all but one"
    assert "is no name for a backend" in results["[red]"]["reason"]
    assert results["lacking"]["install"] == "pip install lib"


def test_the_check_of_one_that_lacks_something_is_no_failure_and_says_what_to_install(tmp_path):
    folder = install(tmp_path, "plugin", {"lacking": "plugin:description"}, CHECKED["lacking"][0])
    done = quantune_command("backends", "check", "lacking", PYTHONPATH=folder)
    assert done.returncode == 0 and "lacking (plugin 1.0) unavailable: no [lib] (pip install lib)" in done.stdout


def dequantizing(what: str) -> str:
    """Tensor code that dequantizes to an expression of `halves`."""
    return TENSOR_CODE.replace(
        'return packed.views()["halves"].to(dtype)', f"halves = packed.views()['halves']; {what}"
    )


WRONG_TENSOR_CODE = {
    "is fine": (FINE, TENSOR_CODE, None),
    "lacks a hook": (FINE, TENSOR_CODE.replace("def pack", "def back"), "abstract method"),
    "is a class": ("return HalfBackend", TENSOR_CODE, "to return a Backend, found the class HalfBackend"),
    "is nothing": ("pass", TENSOR_CODE, "to return a Backend, found NoneType"),
    "has another name": (FINE, TENSOR_CODE.replace('"mine"', '"yours"'), "on its Backend, found 'yours'"),
    "exits": ("exit(3)", TENSOR_CODE, "can't be loaded: SystemExit: 3"),
    "packs too little": (FINE, TENSOR_CODE.replace("half()", "half()[1:]"), "expected inner tensor 'halves' as"),
    "fails to pack": (FINE, TENSOR_CODE.replace("weight.half()", "1 / 0"), "w4 on cpu fails: ZeroDivisionError"),
    "mixes up weights": (FINE, dequantizing("return halves.to(dtype).roll(1)"), "gives nothing like the weight"),
    "gives NaN": (FINE, dequantizing("return halves.to(dtype) * float('nan')"), "gives NaN or infinity"),
    "gives another dtype": (FINE, dequantizing("return halves"), "expected dequantize to return float32 (512, 1024)"),
    "gives another shape": (FINE, dequantizing("return halves.to(dtype).T"), "found float32 (1024, 512) on cpu"),
    "gives no tensor": (FINE, dequantizing("return 1"), "to return a tensor, found int"),
}


@pytest.mark.parametrize(("load", "code", "reason"), WRONG_TENSOR_CODE.values(), ids=WRONG_TENSOR_CODE)
def test_tensor_code_that_is_wrong_is_told_how(packages, load, code, reason):
    install(packages, "plugin", {"mine": "plugin:description"}, loading("mine", load, code))
    *_, report = inspection.try_out("mine")
    assert report.status == ("broken" if reason else "works"), report.reason
    assert (reason or "") in str(report.reason)
    if not reason:
        (trip,) = report.round_trips
        assert (trip.weight_dtype, trip.bits_per_weight, trip.declared) == ("w4", 16.0, None)


def test_options_that_need_more_than_a_weight_dtype_can_not_be_tried(packages):
    code = loading("mine", FINE).replace("group_size: int = 128", "group_size: int")
    install(packages, "plugin", {"mine": "plugin:description"}, code)
    *_, report = inspection.try_out("mine")
    assert 'default options are refused: [quantization.group_size] [quantization] lacks the key "group_size"' in str(
        report.reason
    )


def test_a_backend_for_a_device_that_is_not_here_is_unavailable(packages):
    code = loading("mine", FINE).replace('devices=("cpu",)', 'devices=("abacus",)')
    install(packages, "plugin", {"mine": "plugin:description"}, code)
    *_, report = inspection.try_out("mine")
    assert report.status == "unavailable" and "runs on abacus, and torch finds cpu" in str(report.reason)


def test_a_version_of_the_protocol_that_is_not_ours_is_named(packages):
    install(packages, "plugin", {"future": "plugin:description"}, CHECKED["future"][0])
    (found,) = registry.find()[len(BUILT_IN) :]
    assert "was written for version 99" in str(inspection.check(found).reason)


def test_a_plugin_that_never_ends_is_killed_with_all_it_started(packages):
    code = """\
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.path.join(os.path.dirname(__file__), "pid"), "w").write(str(child.pid))
while True: pass
"""
    install(packages, "plugin", {"endless": "plugin:description"}, code)
    (found,) = registry.find()[len(BUILT_IN) :]
    started = time.monotonic()
    row = inspection.check(found, timeout=4)
    assert time.monotonic() - started < 20
    assert row.status == "broken"
    assert row.reason == "did not end within 4 seconds, importing its description; --timeout gives it more"
    assert gone(int((packages / "pid").read_text()))


def gone(pid: int) -> bool:
    """Whether a process ends soon; one that nobody has waited for counts as ended."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": 3}', '{"stage": "x", "more": 1}', "null"])
def test_a_report_that_is_none_is_not_believed(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    assert inspection._read(tmp_path / "report.json") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "zzz"], 'found "zzz"'),
        (["check", "bnb", "bnbb"], 'did you mean "bnb"?'),
        (["check", "--timeout", "0"], "expected 1 to 86,400 seconds"),
        (["check", "--timeout", "nan"], "expected 1 to 86,400 seconds"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(arguments, message):
    assert message in refused("backends", *arguments)
