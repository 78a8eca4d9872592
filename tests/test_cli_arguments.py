import inspect
import re

import pytest

from custom.bundles.setting_kinds import kind_of_parameter
from custom.cli import data
from custom.cli.main import COMMANDS, command, main


@pytest.fixture
def given(monkeypatch):
    """What the function of ``alice scan`` is called with."""
    calls = {}

    def scan(
        folder: str,
        o: str = "manifest.json",
        against: list[str] = (),
        sizes: tuple[float, ...] = (1.0,),
        hash_ids: bool = True,
        workers: int | None = None,
        share: float = 0.5,
        check: bool | str = False,
    ) -> None:
        calls.update(locals())

    monkeypatch.setattr(data, "scan", scan)
    return calls


def test_words_are_read_as_the_function_declares_them(given):
    main(
        [
            "scan",
            "f",
            "--hash_ids",
            "false",
            "--workers",
            "3",
            "--share",
            "1e-2",
            "--sizes",
            "1,2.5",
            "--against",
            "a,b",
            "--check",
            "off",
        ]
    )
    assert {k: given[k] for k in ("hash_ids", "workers", "share", "sizes", "against", "check")} == {
        "hash_ids": False, "workers": 3, "share": 0.01, "sizes": [1, 2.5], "against": ["a", "b"], "check": False,
    }  # fmt: skip
    main(
        ["scan", "2024_01", "--workers=null", "--against", "['x, y','1']", "--check", "store", "--nohash_ids"]
    )
    assert (given["folder"], given["workers"], given["against"]) == ("2024_01", None, ["x, y", "1"])
    assert (given["check"], given["hash_ids"]) == ("store", False)
    main(["scan", "f", "--against", "one", "--check", "--share", "-2"])
    assert (given["against"], given["check"], given["share"]) == (["one"], True, -2)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--hash_ids maybe", "scan --hash_ids maybe: --hash_ids takes true or false."),
        ("--hash_ids 0", "takes true or false"),
        ("--workers many", "--workers takes a whole number or null."),
        ("--workers 2.5", "takes a whole number or null"),
        ("--workers false", "takes a whole number or null"),
        ("--share half", "--share takes a number."),
        ("--sizes large", "--sizes takes a list of numbers."),
        ("--sizes 3", "--sizes takes a list of numbers."),
        ("-o", "scan -o: takes text, and nothing follows it."),
        ("--o --workers 3", "scan -o: takes text, and nothing follows it."),
        ("--hash_idz false", "scan: there is no option --hash_idz. Did you mean --hash_ids?"),
        ("--colour red", "scan: there is no option --colour. alice scan --help lists all options."),
    ],
)
def test_what_an_option_does_not_take_is_refused_before_the_command_runs(given, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["scan", "folder", *words.split()])
    assert ended.value.code == 1 and not given
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_of_every_command_is_of_a_known_kind(name):
    for parameter in inspect.signature(command(name)).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert kind_of_parameter(parameter).names, f"alice {name} --{parameter.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_goes_to_the_screen_and_describes_every_argument(name, capsys):
    main([name, "--help"])
    shown = capsys.readouterr()
    assert not shown.err and shown.out.startswith("NAME") and f"alice {name} " in shown.out
    described = re.findall(
        r"^    (\w+): ", inspect.getdoc(command(name)).replace("Args:\n", "\n"), re.MULTILINE
    )
    taken = inspect.signature(command(name)).parameters.values()
    assert described == [p.name for p in taken]
