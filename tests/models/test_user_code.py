import pickle
import sys
from pathlib import Path

import pytest
import torch

from cctool.base import user_code
from cctool.base.errors import ArchitectureError, CctoolError, SpecError, UserCodeError
from cctool.models.registry import build, defaults, input_shape

NET = """
from torch import nn
from layers import Head

class Net(nn.Module):
    def __init__(self, num_classes=4, in_channels=3, hidden=8):
        super().__init__()
        self.head = Head(in_channels, hidden, num_classes)

    def forward(self, x):
        return self.head(x.mean(dim=(2, 3)))

def make_net(num_classes=4, in_channels=3, hidden=8):
    return Net(num_classes, in_channels, hidden)

def only_classes(num_classes):
    return Net(num_classes)

def anything(**arguments):
    return Net(**arguments)

def broken(**arguments):
    raise ValueError("no such luck")

def leaves():
    import sys
    sys.exit(3)

def number():
    return 5

CONSTANT = 3
"""
LAYERS = """
from torch import nn

class Head(nn.Sequential):
    def __init__(self, a, b, c):
        super().__init__(nn.Linear(a, b), nn.Linear(b, c))
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "layers.py").write_text(LAYERS)
    return str(tmp_path / "net.py")


@pytest.fixture(autouse=True)
def _forget_modules() -> object:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(user_code.PRIVATE_PREFIX) or name == "layers":
            del sys.modules[name]


def test_a_named_file_is_built_with_its_siblings(net: str) -> None:
    path = list(sys.path)
    reference = f"{net}:make_net"
    model = build(reference, {"num_classes": 7}, user_code={reference})
    assert model(torch.rand(2, 3, 4, 4)).shape == (2, 7)
    assert sys.path == path


def test_a_reference_that_was_not_named_never_runs(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef make(): pass\n")
    reference = f"{tmp_path / 'net.py'}:make"
    for action in (
        lambda: build(reference, {}),
        lambda: defaults(reference),
        lambda: build(reference, {}, user_code={"other.py:make"}),
    ):
        with pytest.raises(ArchitectureError, match=f"is user code.*--arch {reference}"):
            action()
    assert not (tmp_path / "ran").exists()


def test_another_function_of_a_named_file_is_not_named(net: str) -> None:
    with pytest.raises(ArchitectureError, match="is user code"):
        build(f"{net}:anything", {}, user_code={f"{net}:make_net"})


def test_two_spellings_of_a_path_are_one(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(net).parent)
    assert build("net.py:make_net", {}, user_code={f"{net}:make_net"}) is not None
    assert not user_code.is_named("net.py:make_net", {"other/net.py:make_net"})


def test_module_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ournets").mkdir()
    (tmp_path / "ournets" / "__init__.py").write_text("")
    (tmp_path / "ournets" / "small.py").write_text("from torch import nn\ndef make(): return nn.Identity()\n")
    monkeypatch.chdir(tmp_path)
    assert type(build("ournets.small:make", {}, user_code={"ournets.small:make"})).__name__ == "Identity"
    with pytest.raises(UserCodeError, match=r"no module 'ournets\.large'"):
        build("ournets.large:make", {}, user_code={"ournets.large:make"})
    sys.modules.pop("ournets.small")
    sys.modules.pop("ournets")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("broken", r"net.py:broken raised ValueError: no such luck \(net.py, line \d+, in broken\)"),
        ("leaves", "net.py:leaves raised SystemExit: 3"),
        ("number", "returned a int, not a torch.nn.Module"),
        ("absent", "no function 'absent'.*make_net"),
        ("CONSTANT", "no function 'CONSTANT'"),
    ],
)
def test_failures_name_the_function(net: str, function: str, said: str) -> None:
    with pytest.raises(UserCodeError, match=said) as caught:
        build(f"{net}:{function}", {}, user_code={f"{net}:{function}"})
    assert "\n" not in str(caught.value)


def test_the_line_is_the_users(net: str) -> None:
    with pytest.raises(UserCodeError) as caught:
        build(f"{net}:broken", {}, user_code={f"{net}:broken"})
    line = next(number for number, text in enumerate(NET.splitlines(), start=1) if "no such luck" in text)
    assert f"line {line}" in str(caught.value)


def test_files_that_cannot_be_imported(tmp_path: Path) -> None:
    before = set(sys.modules)
    (tmp_path / "syntax.py").write_text("def make(:\n")
    (tmp_path / "raises.py").write_text("import nothing_of_this_name\n")
    for name, said in (
        ("syntax", "SyntaxError.*line 1"),
        ("raises", "nothing_of_this_name.*line 1"),
        ("absent", "no file"),
    ):
        reference = f"{tmp_path / name}.py:make"
        with pytest.raises(UserCodeError, match=said):
            build(reference, {}, user_code={reference})
    assert set(sys.modules) - before == set()


def test_our_own_errors_pass_through() -> None:
    def stop() -> None:
        raise SpecError("the file does not back this")

    with pytest.raises(SpecError):
        user_code.call("net.py:make", stop)


def test_a_loaders_error_passes_through_own_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, name: str, parameter: object) -> None:
        raise SpecError("too large")

    monkeypatch.setattr(torch.nn.Module, "register_parameter", refuse)
    with pytest.raises(CctoolError, match="too large"):
        build("resnet20", {})


def test_defaults_follow_the_factorys_signature(net: str) -> None:
    named = {f"{net}:{name}" for name in ("make_net", "only_classes", "anything")}
    assert defaults(f"{net}:make_net", channels=1, classes=9, user_code=named) == {
        "num_classes": 9,
        "in_channels": 1,
    }
    assert defaults(f"{net}:only_classes", channels=1, classes=9, user_code=named) == {"num_classes": 9}
    assert defaults(f"{net}:anything", channels=1, classes=9, user_code=named) == {}


def test_input_shape_is_the_datas(net: str) -> None:
    assert input_shape(f"{net}:make_net", {}, (1, 20, 30)) == (1, 20, 30)
    assert input_shape(f"{net}:make_net", {"in_channels": 3}, (1, 20, 30)) == (3, 20, 30)
    with pytest.raises(ArchitectureError, match="--input CxHxW"):
        input_shape(f"{net}:make_net", {})


def test_two_files_of_one_name_keep_their_own_siblings(tmp_path: Path) -> None:
    for folder, width in (("a", 5), ("b", 6)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "layers.py").write_text(f"WIDTH = {width}\n")
        (tmp_path / folder / "net.py").write_text(
            "from torch import nn\nimport layers\ndef make(): return nn.Linear(1, layers.WIDTH)\n"
        )
    references = [f"{tmp_path / folder / 'net.py'}:make" for folder in ("a", "b")]
    widths = [
        build(reference, {}, user_code=references).out_features for reference in (*references, references[0])
    ]
    assert widths == [5, 6, 5]


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    reference = f"{tmp_path / 'net.py'}:make"
    for width in (5, 6):
        (tmp_path / "net.py").write_text(f"from torch import nn\ndef make(): return nn.Linear(1, {width})\n")
        assert build(reference, {}, user_code={reference}).out_features == width


def test_a_module_of_the_users_can_be_pickled(net: str) -> None:
    model = build(f"{net}:make_net", {}, user_code={f"{net}:make_net"})
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy) is type(model)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("net.py:make", True),
        ("a/b.c/net.py:make", True),
        ("nets.small:Net", True),
        ("nets:make", True),
        ("resnet20", False),
        ("net.py", False),
        ("net.py:2", False),
        ("a b:make", False),
        ("folder:/data/x", False),
    ],
)
def test_what_looks_like_user_code(reference: str, expected: bool) -> None:
    assert user_code.looks_like_user_code(reference) is expected
