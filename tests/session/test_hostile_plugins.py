"""Plugins that misbehave: none takes others down, each is named, and no traceback reaches the user."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import make_view, make_visibility
from torch.nn.modules import module as torch_module
from typer.testing import CliRunner

import kvprune
from kvprune.cli import app, doctor
from kvprune.errors import (
    KVPruneError,
    NameClashError,
    PluginError,
    PolicyOptionError,
    ScoreError,
    UnknownPolicyError,
    UnsupportedModelError,
)
from kvprune.session import registry

POLICY = """
from dataclasses import dataclass, field
import kvprune

@dataclass(frozen=True, kw_only=True)
class Policy(kvprune.ScoringPolicy):
    \"\"\"{doc}\"\"\"
    name = "{name}"
    {body}

    def score(self, view):
        return view.random()

@kvprune.hookimpl
def kvprune_policies():
    return [Policy]
"""
HOOK = """
import kvprune

@kvprune.hookimpl
def {hook}():
    {body}
"""
ADAPTER = """
import kvprune
from kvprune.adapters import ModelAdapter

class Odd(ModelAdapter):
    family = "odd"
    model_classes = ("OddModel",)
    layer_indices = (0,)

    @classmethod
    def probe(cls):
        return []

    def attach(self, manager):
        pass

    {body}

@kvprune.hookimpl
def kvprune_adapters():
    return [Odd]
"""


class OddModel:
    """What the adapter above claims."""


def policy(name="odd", body="pass", doc="Keep odd tokens."):
    return POLICY.format(name=name, doc=doc, body=textwrap.indent(textwrap.dedent(body), "    ").lstrip())


def hook(body, name="kvprune_policies"):
    return HOOK.format(hook=name, body=body)


def adapter(body="pass"):
    return ADAPTER.format(body=textwrap.indent(textwrap.dedent(body), "    ").lstrip())


@pytest.fixture(autouse=True)
def all_plugins(monkeypatch):
    monkeypatch.delenv("KVPRUNE_PLUGINS", raising=False)


@pytest.fixture(autouse=True)
def no_hook_survives():
    yield
    torch_module._global_forward_hooks.clear()


@pytest.fixture
def raw(tmp_path_factory, monkeypatch):
    """Install a distribution from the text of its metadata files, whatever they say."""

    def raw(folder="odd-1.0.dist-info", **files):
        path = tmp_path_factory.mktemp("raw")
        info = path / folder
        info.mkdir()
        for name, content in files.items():
            target = {"metadata": "METADATA", "entry_points": "entry_points.txt"}[name]
            (info / target).write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.syspath_prepend(str(path))
        return path

    return raw


def command(*arguments):
    """Run a command; whatever the plugins do, it ends by itself and never with a traceback."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1, 2), result.exit_code
    for char in result.stdout + result.stderr:
        assert char.isprintable() or char == "\n", f"{char!r} reached the terminal"
    return result


def broken(name="bad"):
    return {plugin.name: plugin for plugin in registry.load().broken}[name]


BAD = {
    "exits at import": ("import sys; sys.exit('needs a licence')", "SystemExit: needs a licence"),
    "exits with a number": ("raise SystemExit(0)", "SystemExit: 0"),
    "raises what is no Exception": (
        "class Stop(BaseException): pass\nraise Stop('halt')",
        "Stop: halt",
    ),
    "cancels": ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
    "recurses": ("def f(): f()\nf()", "RecursionError"),
    "raises an error that cannot be printed": (
        "class Mute(Exception):\n    def __str__(self): raise ValueError\n    __repr__ = __str__\nraise Mute",
        "Mute: its message cannot be shown: ValueError",
    ),
    "raises an error of a megabyte": ("raise RuntimeError('a' * 10**6)", "characters left out"),
    "raises an error that moves the cursor": (
        "raise RuntimeError('\\x1b[2J\\r\\nok')",
        r"RuntimeError: \x1b[2J ok",
    ),
    "exits in the hook": (hook("raise SystemExit(3)"), "SystemExit: 3"),
    "yields and raises": (hook("yield from []; raise OSError('disk')"), "OSError: disk"),
    "yields a policy and raises": (
        policy() + "@kvprune.hookimpl\ndef kvprune_policies():\n    yield Policy\n    raise OSError('disk')",
        "OSError: disk",
    ),
    "returns a number": (hook("return 7"), "returned 7, expected a list of classes"),
    "returns text": (hook("return 'trim'"), "returned 'trim', expected a list of classes"),
    "returns a class without a list": (
        policy() + "\n@kvprune.hookimpl\ndef kvprune_policies():\n    return Policy",
        "expected a list of classes",
    ),
    "never ends": (
        policy() + "\n@kvprune.hookimpl\ndef kvprune_policies():\n    while True: yield Policy",
        "more than 1000 classes; does it ever end?",
    ),
    "returns what cannot be printed": (
        "class Mute:\n    def __repr__(self): raise ValueError\n" + hook("return [Mute()]"),
        "<Mute that cannot be shown: ValueError>, expected classes derived from CrossKVPolicy",
    ),
    "lies about its class": (
        "class Liar:\n    @property\n    def __class__(self): raise ValueError('no')\n"
        + hook("return [Liar()]"),
        "ValueError: no",
    ),
    "two policies of one name": (
        policy() + "\n@dataclass(frozen=True, kw_only=True)\nclass Other(Policy):\n    pass\n"
        "@kvprune.hookimpl\ndef kvprune_policies():\n    return [Policy, Other]",
        "provides two policies of the name 'odd': Policy and Other; rename one",
    ),
    "name is a property": (policy(body="name = property(lambda self: 'odd')"), "Policy has no name"),
    "name is a number": (policy(body="name = 7"), "Policy has no name"),
    "name is empty": (policy(""), "'' is not a policy name"),
    "name of a kilobyte": (policy("a" * 1000), "is not a policy name"),
    "name in upper case": (policy("Trim"), "'Trim' is not a policy name"),
    "name with a blank": (policy("trim "), "'trim ' is not a policy name"),
    "name in Cyrillic": (policy("tr\u0456m"), "is not a policy name"),
    "name with an escape": (policy("\\x1b[31mtrim"), r"'\x1b[31mtrim' is not a policy name"),
    "version is huge": (policy(body="version = 10**5000"), "between 0 and 10**9, got <int of 16610 bits"),
    "version is negative": (policy(body="version = -1"), "between 0 and 10**9, got -1"),
    "cost is no text": (policy(body="cost = 3"), "Policy has the cost 3; it is text, or empty"),
    "check_class raises": (
        policy(body="@classmethod\ndef check_class(cls): raise SystemExit('mine')"),
        "SystemExit: mine",
    ),
    "check_class is silenced": (
        policy(body="@classmethod\ndef check_class(cls): pass\nname = 'No Name'"),
        "'No Name' is not a policy name",
    ),
    "metaclass raises": (
        "import kvprune\nclass Meta(type(kvprune.ScoringPolicy)):\n"
        "    def __getattribute__(cls, name): raise OSError(name)\n"
        "class Policy(kvprune.ScoringPolicy, metaclass=Meta):\n    name = 'odd'\n" + hook("return [Policy]"),
        "OSError",
    ),
    "annotation that names nothing": (policy(body="of: 'Nowhere' = 3"), "NameError: name 'Nowhere'"),
    "option of an odd type": (policy(body="of: list = field(default_factory=list)"), "'of' of type <class"),
    "adapter is abstract": (
        "from kvprune.adapters import ModelAdapter\nclass Odd(ModelAdapter): pass\n"
        + hook("return [Odd]", "kvprune_adapters"),
        "Odd is abstract: it does not define attach, probe",
    ),
    "adapter names its models in one text": (
        adapter("model_classes = 'OddModel'"),
        "has the model_classes 'OddModel'; write a tuple of class names",
    ),
    "adapter has no models": (adapter("model_classes = ()"), "has the model_classes (); write a tuple"),
    "adapter provides a string": (
        adapter("provides = 'queries'"),
        "provides 'queries'; write a frozenset of some of 'queries', 'raw_keys'",
    ),
    "adapter provides what nobody needs": (
        adapter("provides = frozenset({'query'})"),
        "did you mean 'queries'?",
    ),
    "adapter provides nothing at all": (adapter("provides = None"), "provides None; write a frozenset"),
    "adapter lists numbers": (adapter("model_classes = (1,)"), "has the model_classes (1,)"),
    "adapter has no family": (adapter("family = None"), "has the family None"),
    "object that cannot be looked at": (
        "import sys\nclass Plugin:\n    def __dir__(self): raise OSError('closed')\n"
        "sys.modules[__name__] = Plugin()",
        "OSError: closed",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("source", "words"), BAD.values(), ids=BAD)
def test_a_bad_plugin_is_named_and_takes_nobody_down(install, source, words):
    install("bad-prune", bad=source)
    install("good-prune", before=policy("before-it"), zeta=policy("after-it"))
    found = registry.load()
    assert {"before-it", "after-it", "trim"} <= set(found.policies)
    assert [plugin.name for plugin in found.broken] == ["bad"]
    assert words in found.broken[0].problem
    assert len(found.broken[0].problem) < 1000
    for asked in ("bad", "bad-prune"):
        with pytest.raises(PluginError, match="plugin 'bad' of bad-prune is broken"):
            kvprune.get_policy(asked)
    with pytest.raises(UnknownPolicyError, match=r"'odd'.*broken plugins.*bad"):
        kvprune.get_policy("odd")
    with pytest.raises(UnsupportedModelError, match=r"OddModel.*broken plugins.*bad"):
        kvprune.session.registry.find_adapter(OddModel())
    listed = command("list")
    assert listed.exit_code == 0
    assert "after-it" in listed.stdout
    assert "kvprune: broken plugin bad (bad-prune): " in listed.stderr
    assert listed.stderr.count("\n") == 1
    assert command("show", "bad").exit_code == 2
    assert command("show", "odd").exit_code == 2
    assert command("show", "after-it").exit_code == 0


@pytest.mark.parametrize("name", ["exits at import", "raises an error that moves the cursor", "never ends"])
def test_the_doctor_reports_a_bad_plugin_and_finishes(install, name):
    install("bad-prune", bad=BAD[name][0])
    result = command("doctor")
    assert result.exit_code == 1
    assert f"FAIL  bad (bad-prune): {broken().problem}" in result.stdout
    assert "to do: repair, update or uninstall bad-prune" in result.stdout
    assert "loads;" in result.stdout, "the demo is examined, too"


def test_ctrl_c_at_import_is_the_users(install):
    install("slow-prune", slow="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        registry.load()


def test_one_module_under_two_names_is_reported_and_works_once(install, raw):
    folder = install("twin-prune", one=policy())
    (module,) = folder.glob("*.py")
    raw(entry_points=f"[kvprune]\ntwo = {module.stem}\n", metadata="Name: other-prune\nVersion: 1\n")
    assert "odd" in kvprune.list_policies()
    assert "provides the class Policy, which plugin 'one' already provides" in broken("two").problem


# names and texts that reach a terminal


def test_escape_sequences_in_texts_of_a_plugin_are_shown_escaped(install):
    escape = "\\x1b]0;owned\\x07"
    install("esc-prune", esc=policy(doc=f"Keep {escape} tokens :boom: [red].", body=f"cost = 'much{escape}'"))
    listed = command("list")
    assert r"Keep \x1b]0;owned\x07 tokens :boom: [red]." in listed.stdout
    shown = command("show", "odd")
    assert r"Keep \x1b]0;owned\x07 tokens :boom: [red]." in shown.stdout
    assert r"cost:     much\x1b]0;owned\x07" in shown.stdout


def test_a_docstring_of_a_megabyte_does_not_flood_the_terminal(install):
    install("long-prune", long=policy(body="__doc__ = 'a' * 10**6"))
    assert len(command("list").stdout) < 10_000
    assert len(command("show", "odd").stdout) < 40_000


@pytest.mark.parametrize("doc", ["None", "3", "property(lambda self: 1 / 0)"])
def test_a_policy_without_a_docstring_is_listed_and_shown(install, doc):
    install("mute-prune", mute=policy(body="pass") + f"\nPolicy.__doc__ = {doc}\n")
    (line,) = (line for line in command("list").stdout.splitlines() if line.startswith("odd "))
    assert line.split() == ["odd", "1", "mute", "(mute-prune)"]
    assert command("show", "odd").exit_code == 0


def test_the_signature_that_a_dataclass_makes_up_is_no_claim(install):
    install("mute-prune", mute=policy().replace('"""Keep odd tokens."""', ""))
    assert registry.load().policies["odd"].cls.__doc__.startswith("Policy(*, keep_ratio")
    (line,) = (line for line in command("list").stdout.splitlines() if line.startswith("odd "))
    assert line.split() == ["odd", "1", "mute", "(mute-prune)"]


def test_defaults_that_cannot_be_printed_are_a_typed_error(install):
    install(
        "mute-prune",
        mute="class Mute:\n    def __str__(self): raise OSError('no')\n" + policy(body="of: int = Mute()"),
    )
    assert command("list").exit_code == 0
    result = command("show", "odd")
    assert result.exit_code == 2
    assert "policy 'odd' of plugin 'mute' cannot be described: OSError: no" in result.stderr


def test_a_default_factory_is_shown_as_a_default(install):
    install("mute-prune", mute=policy(body="of: int = field(default_factory=lambda: 3)"))
    (line,) = (line for line in command("show", "odd").stdout.splitlines() if line.startswith("of "))
    assert line.split() == ["of", "whole", "number", "3", "-"]


@pytest.mark.parametrize("name", ["\x1b[2Jtrim", "trim\n", "\udcff", "a" * 100_000, "", "--", "{}", "%s"])
def test_any_name_may_be_asked_for(name):
    result = command("show", "--", name)
    assert result.exit_code == 2
    assert result.stderr.startswith("kvprune: error: unknown policy ")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 1000


def test_what_plugins_print_is_no_part_of_an_answer(install):
    install("loud-prune", loud="print('buy me')\n" + policy())
    for arguments in (["list"], ["show", "odd"], ["doctor"]):
        sys.modules.pop(registry.load().policies["odd"].cls.__module__)
        result = command(*arguments)
        assert "buy me" not in result.stdout
        assert "buy me" in result.stderr


def test_the_command_ends_by_itself_whatever_plugins_raise(install):
    folders = [
        install("bad-prune", bad="raise SystemExit(0)"),
        install("worse-prune", worse=BAD["cancels"][0]),
    ]
    code = f"import sys; sys.path[:0] = {[str(one) for one in folders]!r}; sys.argv = ['kvprune', 'list']\n"
    code += "from kvprune.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "trim" in done.stdout
    assert "Traceback" not in done.stderr
    assert [line.split()[3] for line in done.stderr.splitlines() if "broken plugin" in line] == [
        "bad",
        "worse",
    ]


def test_a_docstring_that_the_terminal_cannot_encode_is_printed_escaped(install):
    folder = install("acc-prune", acc=policy(doc="Garde les jetons \u00e9loign\u00e9s \u2192 10 %."))
    code = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(folder)!r})
        from kvprune.cli import main

        for arguments in (["list"], ["show", "odd"]):
            sys.argv = ["kvprune", *arguments]
            print("-" * 80)
            try:
                main()
            except SystemExit as end:
                assert end.code in (None, 0), end.code
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, listed, shown = done.stdout.split("-" * 80 + "\n")
    for output in (listed, shown):
        assert r"\xe9loign\xe9s \u2192 10 %." in output


# building a policy


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("def __post_init__(self): raise ValueError('odd only')", PolicyOptionError, "ValueError: odd only"),
        ("def __post_init__(self): raise OSError('disk')", PluginError, "OSError: disk"),
        ("def __post_init__(self): raise SystemExit(1)", PluginError, "SystemExit: 1"),
        ("@classmethod\ndef from_options(cls, options): return 7", PluginError, "built 7 from 'odd'"),
    ],
)
def test_a_policy_that_cannot_be_built_is_a_typed_error(install, body, error, message):
    install("odd-prune", odd=policy(body=body))
    with pytest.raises(error, match=message) as caught:
        kvprune.get_policy("odd")
    assert "policy 'odd' of plugin 'odd'" in str(caught.value)


def test_a_broken_metaclass_fails_nobody_else():
    """Python keeps a class whose making failed half-way, and asks it whenever it meets a new type."""
    code = (
        "import gc, kvprune\ngc.disable()\n"
        "class Meta(type(kvprune.ScoringPolicy)):\n"
        "    def __getattribute__(cls, name): raise OSError(name)\n"
        "try:\n    class Policy(kvprune.ScoringPolicy, metaclass=Meta):\n        name = 'odd'\n"
        "except OSError as error:\n    kept = error\n"
        "print(kvprune.get_policy('trim').name, isinstance(object(), kvprune.CrossKVPolicy))\n"
        "try:\n    kvprune.get_policy(7)\nexcept kvprune.errors.SpecError:\n    print('typed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["trim", "False", "typed"]


def test_ctrl_c_while_a_policy_is_built_is_the_users(install):
    install("odd-prune", odd=policy(body="def __post_init__(self): raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        kvprune.get_policy("odd")


# adapters


def test_an_adapter_that_fails_at_a_model_is_named(install):
    install("odd-prune", odd=adapter("@classmethod\ndef matches(cls, model): return model.no_such_thing"))
    message = (
        "no adapter supports OddModel; supported: .*"
        "Odd of plugin 'odd' failed at OddModel: AttributeError: .*no_such_thing"
    )
    with pytest.raises(PluginError, match=message) as caught:
        registry.find_adapter(OddModel())
    assert isinstance(caught.value.__cause__, AttributeError)


def test_an_adapter_that_fails_does_not_keep_another_from_its_model(install):
    install("odd-prune", odd=adapter("@classmethod\ndef matches(cls, model): raise SystemExit(1)"))
    install("good-prune", good=adapter())
    assert registry.find_adapter(OddModel()).__name__ == "Odd"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("raise OSError('disk')", "OSError: disk"),
        ("raise SystemExit(1)", "SystemExit: 1"),
        ("return 7", "TypeError: 'int' object is not iterable"),
        ("return [7]", "AttributeError: 'int' object has no attribute 'name'"),
    ],
)
def test_a_probe_that_fails_is_a_finding_and_other_adapters_are_probed(install, answer, message):
    install("odd-prune", aaa=adapter(f"@classmethod\ndef probe(cls): {answer}"))
    checks = doctor.examine()
    (found,) = (check for check in checks if check.ok is False)
    assert (found.section, found.name) == ("adapter odd", "Odd of aaa could not be examined")
    assert message in found.detail
    assert any("Whisper" in check.section for check in checks)


# hooks on all modules of torch

LEAVES = """
from torch.nn.modules.module import register_module_forward_hook

def spy(module, args, output):
    return None
"""


@pytest.mark.parametrize(
    "source",
    [
        LEAVES + "register_module_forward_hook(spy)\n" + policy(),
        policy() + LEAVES + "@kvprune.hookimpl\ndef kvprune_policies():\n"
        "    register_module_forward_hook(spy)\n    return [Policy]",
        LEAVES + "import functools\nregister_module_forward_hook(functools.partial(spy))\n" + policy(),
    ],
    ids=["at import", "in its hook", "partial"],
)
def test_hooks_left_on_all_modules_are_found_and_the_plugin_refused(install, source):
    install("spy-prune", spy=source)
    install("good-prune", zeta=policy("after-it"))
    for _ in range(2):  # the second time, importing adds nothing
        message = "plugin 'spy' leaves hooks on all modules of torch behind: forward hook "
        assert message in broken("spy").problem
        assert "after-it" in kvprune.list_policies()
    (hooks,) = (check for check in doctor.examine() if check.name == "hooks on all modules")
    assert hooks.ok is False
    assert "spy" in hooks.detail


def test_hooks_of_another_module_are_found_when_the_plugin_leaves_them(install):
    install("spy-prune", spy=LEAVES + "register_module_forward_hook(print)\n" + policy())
    assert "leaves hooks on all modules of torch behind: forward hook <built-in" in broken("spy").problem


def test_hooks_of_others_are_no_plugins_fault(install):
    install("odd-prune", odd=policy())
    handle = torch_module.register_module_forward_hook(lambda *_: None)
    try:
        assert "odd" in kvprune.list_policies()
        (hooks,) = (check for check in doctor.examine() if check.name == "hooks on all modules")
        assert hooks.ok is False
    finally:
        handle.remove()


# damaged installations


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a b:c", "is 'a b:c'; expected module or module:attribute"),
        (":c", "is ':c'; expected module or module:attribute"),
        ("no_such_module_here", "No module named 'no_such_module_here'"),
        ("math:no_such_attribute", "no_such_attribute"),
        ("math", "implements neither kvprune_policies nor kvprune_adapters"),
        ("\x1b[2J", r"'\x1b[2J'"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_reported(raw, value, words):
    raw(entry_points=f"[kvprune]\nbad = {value}\n", metadata="Name: bad-prune\nVersion: 1\n")
    assert words in broken().problem
    assert "trim" in kvprune.list_policies()
    assert command("list").exit_code == 0


@pytest.mark.parametrize("name", ["\x1b[2J", "two words", "\u202eevil", "comma,name"])
def test_an_entry_point_of_an_odd_name_is_printed_escaped(raw, name):
    raw(entry_points=f"[kvprune]\n{name} = nowhere\n", metadata="Name: odd\x1b[2J\nVersion: 1\n")
    assert "broken plugin" in command("list").stderr
    assert command("show", "nothing").exit_code == 2


@pytest.mark.parametrize(
    "files",
    [
        {"entry_points": b"[kvprune]\nbad = \xff\xfe\n", "metadata": "Name: odd\nVersion: 1\n"},
        {"entry_points": "[kvprune]\nno equals sign\n", "metadata": "Name: odd\nVersion: 1\n"},
        {"entry_points": "[kvprune\nbad", "metadata": b"\xff\xfe\x00"},
        {"entry_points": "[kvprune]\nbad = nowhere\n"},
        {"entry_points": "[kvprune]\nbad = nowhere\n", "metadata": b"\xff\xfe\x00"},
        {"entry_points": "[kvprune]\nbad = nowhere\n", "metadata": ""},
    ],
    ids=["no UTF-8", "no equals sign", "rubbish", "no metadata", "metadata is no UTF-8", "empty metadata"],
)
@pytest.mark.parametrize("folder", ["odd-1.0.dist-info", ".dist-info"])
def test_damaged_metadata_of_one_package_hides_no_other(raw, install, files, folder):
    raw(folder, **files)
    install("good-prune", good=policy("fine"))
    assert {"fine", "trim"} <= set(kvprune.list_policies())
    assert command("list").exit_code == 0
    assert command("show", "fine").exit_code == 0


def test_a_package_whose_entry_points_cannot_be_read_is_named(raw):
    raw(entry_points=b"[kvprune]\nbad = \xff\n", metadata="Name: odd-prune\nVersion: 1\n")
    assert "the entry points under" in broken("odd-prune").problem
    assert "UnicodeDecodeError" in broken("odd-prune").problem


# KVPRUNE_PLUGINS


@pytest.mark.parametrize(
    "value",
    ["builtin;builtin-adapters", "Builtin", "\x1b[2J", "*", "a" * 100_000, "builtin,\udcff", "None", "../x"],
)
def test_a_variable_that_names_no_plugin_is_refused_in_short(monkeypatch, value):
    monkeypatch.setenv("KVPRUNE_PLUGINS", value)
    with pytest.raises(PluginError, match="which is not installed") as caught:
        kvprune.list_policies()
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
    for arguments in (["list"], ["show", "trim"]):
        result = command(*arguments)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
    assert command("doctor").exit_code == 1


@pytest.mark.parametrize("value", ["", " ", ",", " , ,,"])
def test_a_variable_that_names_nothing_means_nothing(monkeypatch, value):
    monkeypatch.setenv("KVPRUNE_PLUGINS", value)
    assert kvprune.list_policies() == []
    assert command("list").exit_code == 0


def test_a_clash_is_one_line(install):
    install("one-prune", one=policy("trim"))
    result = command("list")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    with pytest.raises(NameClashError):
        kvprune.list_policies()


# scores


def scoring(returned):
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Odd(kvprune.ScoringPolicy):
        name = "odd"

        def score(self, view):
            if isinstance(returned, BaseException):
                raise returned
            return returned(view) if callable(returned) else returned

    return Odd(keep_ratio=0.5)


def view():
    return make_view(make_visibility([[[1, 1]], [[1, 0]]], 4))


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(1).expand(10**9),
        torch.zeros(1, 1, 1).expand(1, 1, 10**9),
        torch.zeros(1, 1, 1, 1).expand(2, 2, 8, 10**9),
        torch.zeros(()),
        torch.zeros(2, 2, 0),
    ],
    ids=lambda scores: str(list(scores.shape)),
)
def test_scores_of_a_wrong_shape_are_refused_before_anything_reads_them(scores):
    with pytest.raises(
        ScoreError, match=r"policy 'odd' at layer 3: score returned shape \[.*expected \[2, 2 or"
    ):
        scoring(scores).select(view())


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(2, 1, 8, device="meta"),
        torch.zeros(2, 1, 8).to_sparse(),
    ],
    ids=["meta", "sparse"],
)
def test_scores_that_hold_no_plain_numbers_are_refused(scores):
    with pytest.raises(
        ScoreError, match=r"score returned a torch\.\w+ tensor on \w+, expected a plain one on cpu"
    ):
        scoring(scores).select(view())


def test_scores_may_be_a_view_of_one_number():
    decision = scoring(torch.zeros(1, 1, 1).expand(2, 2, 8)).select(view())
    assert decision.cache.counts.tolist() == [[4, 4], [2, 2]]


@pytest.mark.parametrize("error", [OSError("disk"), KVPruneError("mine"), KeyboardInterrupt()], ids=repr)
def test_what_score_raises_passes_as_it_is(error):
    with pytest.raises(type(error)) as caught:
        scoring(error).select(view())
    assert caught.value is error
