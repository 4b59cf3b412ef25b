"""The functions of `import steep`: what they are called, what they take, and what a wrong call is answered."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing

import pytest

import steep
from steep.core.errors import CallError, ConfigError
from steep.core.public import public, refuse_unknown
from steep.evaluation.generate import sampling_options
from steep.sources.config import SourceConfig
from steep.store.config import PrepareConfig

NAMES = sorted(set(steep.__all__) - {"__version__"})
UNRESOLVED = {"memory_plot": "its figure is matplotlib's, which is imported when it is drawn"}


def test_the_table_of_modules_is_what_is_exported() -> None:
    assert sorted(steep.MODULES) == NAMES == sorted(set(dir(steep)) - {"__version__"})
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        steep.trian  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_a_public_function_documents_and_types_every_keyword(name: str) -> None:
    function = getattr(steep, name)
    assert inspect.isfunction(function)
    assert function.__name__ == name
    assert function.__module__ == steep.MODULES[name]
    words = set(
        (function.__doc__ or "").replace(",", " ").replace(":", " ").replace("`", " ").replace(".", " ").split()
    )
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not parameter.empty, parameter
        assert parameter.name in words | {"config"}, f"steep.{name} does not document {parameter.name}"
    assert inspect.signature(function).return_annotation not in (inspect.Signature.empty, None)
    if name not in UNRESOLVED:
        assert typing.get_type_hints(function)["return"] is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_keyword_names_the_right_one(name: str) -> None:
    function = getattr(steep, name)
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return  # checked where the other keywords are known
    *_, last = (parameter.name for parameter in parameters)
    with pytest.raises(
        CallError, match=f"steep.{name} has no keyword {last}x .given 5.; did you mean {last}."
    ) as error:
        function(**{f"{last}x": 5})
    assert isinstance(error.value, ConfigError)
    assert isinstance(error.value, TypeError)


def test_the_example_of_a_misspelt_keyword() -> None:
    with pytest.raises(
        CallError, match="no keyword max_token .given 5.; did you mean max_tokens.\nIt takes inputs, tokenizer, out,"
    ):
        steep.prepare("corpus", tokenizer="gpt2", out="store", max_token=5)  # type: ignore[call-arg]


def test_a_sampling_option_that_nobody_knows_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(
        CallError, match="steep.generate has no keyword temprature .given 0.5.; did you mean temperature."
    ):
        steep.generate("nowhere", "a prompt", temprature=0.5)
    with pytest.raises(CallError, match="did you mean length_penalty"):
        steep.generate("nowhere", "a prompt", lenght_penalty=0.5)


def test_generating_samples_where_an_option_asks_for_it() -> None:
    assert sampling_options() == {"do_sample": False}
    assert sampling_options(repetition_penalty=1.1) == {"repetition_penalty": 1.1, "do_sample": False}
    assert sampling_options(temperature=0, top_k=3) == {"top_k": 3, "do_sample": False}
    assert sampling_options(top_p=0.9) == {"top_p": 0.9, "do_sample": True}
    assert sampling_options(False, temperature=0.5) == {"temperature": 0.5, "do_sample": False}


def test_a_process_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2"):
        steep.prepare("corpus", tokenizer="gpt2", out="store")


def test_a_call_with_too_few_or_too_many_arguments_says_what_is_taken() -> None:
    @public
    def add(left: int, right: int = 1) -> int:
        """Their sum."""
        return left + right

    assert (add(1), add(1, right=2), add.__doc__) == (2, 3, "Their sum.")
    with pytest.raises(CallError, match="steep.add: missing a required argument: 'left'. It takes left, right"):
        add()  # type: ignore[call-arg]
    with pytest.raises(CallError, match="too many positional arguments"):
        add(1, 2, 3)  # type: ignore[call-arg]
    with pytest.raises(CallError, match="no keyword sum .given 1.\\.\n"):
        refuse_unknown("add", {"sum": 1}, ["left", "right"])


def test_prepare_names_every_setting_of_its_sections_with_their_defaults() -> None:
    parameters = inspect.signature(steep.prepare).parameters
    fields = dict(PrepareConfig.model_fields)
    fields |= {name: field for name, field in SourceConfig.model_fields.items() if name.startswith("max_")}
    for name, field in fields.items():
        assert parameters[name].default == field.default, name
    assert {"text_key", "document_separator"} <= set(parameters) & set(SourceConfig.model_fields)


def test_every_public_name_is_a_function_whatever_has_been_imported() -> None:
    for module in pkgutil.walk_packages(steep.__path__, "steep."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert [name for name in NAMES if not inspect.isfunction(getattr(steep, name))] == []


def test_importing_steep_loads_nothing_else() -> None:
    code = "import steep, sys; print(*sorted(name for name in sys.modules if name.startswith(('steep', 'torch', 'pydantic'))))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["steep"]
