"""Settings are data, and every name in them is a key of the table it chooses from."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from protoseg import config
from protoseg.config import Data, DatasetName, DecoderName, Head, HeadName, Model, NetworkName, PresetName, Recipe


def test_names_of_networks_are_the_table():
    from protoseg.models.networks import NETWORKS

    assert set(get_args(NetworkName)) == set(NETWORKS)


def test_names_of_decoders_are_the_table():
    from protoseg.models.decoders import NEEDS

    assert set(get_args(DecoderName)) == set(NEEDS)


def test_names_of_heads_and_presets_are_the_tables():
    from protoseg.method.presets import PRESETS
    from protoseg.models import HEADS

    assert set(get_args(HeadName)) == set(HEADS)
    assert set(get_args(PresetName)) == set(PRESETS)


def test_names_of_data_sets_are_the_table():
    from protoseg.data.catalog import LAYOUTS

    assert set(get_args(DatasetName)) == {*LAYOUTS, "folder", "synthetic"}


def test_the_heads_fields_are_arguments_of_the_head():
    import inspect

    from protoseg.method.head import PrototypeHead
    from protoseg.method.presets import DEFAULT

    known = {*inspect.signature(PrototypeHead.__init__).parameters, *DEFAULT}
    assert {field.name for field in dataclasses.fields(Head)} - {"kind"} <= known


SETTINGS = [kind for kind in vars(config).values() if dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_settings_are_frozen_and_have_defaults(kind):
    given = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(given, dataclasses.fields(kind)[0].name, None)
    assert get_type_hints(kind)  # every annotation resolves without torch


def test_sections_of_a_recipe_are_the_other_settings():
    assert {type(value) for value in vars(Recipe()).values() if dataclasses.is_dataclass(value)} == {
        kind for kind in SETTINGS if kind not in (Recipe, config.Study)
    }


def test_config_imports_nothing_of_the_house_or_outside():
    assert Data.__module__ == Model.__module__ == "protoseg.config"
    source = Path(config.__file__).read_text()
    assert {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))} <= {
        "__future__", "dataclasses", "typing",
    }  # fmt: skip


def test_a_data_error_is_a_user_error_is_a_value_error():
    assert issubclass(config.DataError, config.UserError)
    assert issubclass(config.UserError, ValueError)
