"""The example configurations that ship with the package, by name."""

import pytest
import yaml

from vpeft.cli import main
from vpeft.engine import shipped
from vpeft.engine.config import load_config
from vpeft.errors import ConfigError
from vpeft.files import shipped as folder


def test_all_have_a_name_that_finds_them(capsys):
    files = [f for f in folder("configs").rglob("*.*") if f.suffix in shipped.KINDS and "/_" not in f.as_posix()]
    names = shipped.names()
    assert len(files) == len(names) > 100
    assert {shipped.find(n) for n in names} == set(files)
    assert {"digits/lora", "mmseg/fcn_vit-micro_scenes.py"} <= set(names)
    main(["configs", "list", "seg/"])
    assert capsys.readouterr().out.split() == [n for n in names if n.startswith("seg/")]


def test_spaces_are_listed_apart_and_shown_and_copied_like_others(tmp_path, capsys):
    spaces = sorted(
        f.relative_to(folder("configs")).with_suffix("").as_posix() for f in folder("configs/spaces").rglob("*.yaml")
    )
    for start, wanted in (([], []), (["sp"], []), (["spaces/"], spaces)):
        main(["configs", "list", *start])
        assert [n for n in capsys.readouterr().out.split() if n.startswith("spaces/")] == wanted
    main(["configs", "show", "spaces/rates"])
    assert yaml.safe_load(capsys.readouterr().out)["trials"] == 20
    main(["configs", "copy", "spaces/rates", "spaces/matched/vpt_deep", "--out", str(tmp_path)])
    assert capsys.readouterr().out.split() == [f"{tmp_path}/spaces/rates.yaml", f"{tmp_path}/spaces/matched/vpt_deep.yaml"]
    with pytest.raises(SystemExit):
        main(["configs", "show", "spaces/rates", "trials=3"])
    assert "trials=3: a space has no settings to change" in capsys.readouterr().err


def test_what_is_shown_with_overrides_could_be_run(capsys):
    """An option of another method was printed as if it were one, and refused only by the training."""
    with pytest.raises(SystemExit):
        main(["configs", "show", "digits/lora", "method.options.nonsense=3"])
    assert "nonsense" in capsys.readouterr().err


def test_a_name_trains_from_any_folder(tmp_path, monkeypatch, capsys):
    """What is not here is looked for among those that ship, which a line says; a file of this name comes first."""
    monkeypatch.chdir(tmp_path)
    for name in ("digits/lora", "digits/lora.yaml", "configs/digits/lora.yaml", "configs/digits/lora"):
        assert load_config(name).method.options == {"rank": 8}
        assert "digits/lora" in (said := capsys.readouterr().err)
        assert "which ships with vpeft" in said
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "lora.yaml").write_text("method: {name: bitfit}")
    assert load_config("digits/lora.yaml").method.name == "bitfit"
    assert capsys.readouterr().err == ""
    (tmp_path / "digits" / "lora").write_text("method: {name: linear}")
    assert load_config("digits/lora").method.name == "linear"


@pytest.mark.parametrize("name", ["digits/lorra", "../configs/digits/lora", "_base_/digits", "digits", "/digits/lora", ""])
def test_other_names_are_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'digits/lora'" if name == "digits/lorra" else None):
        load_config(name)
    with pytest.raises(SystemExit) as stopped:
        main(["configs", "copy", "digits/adapter", name])
    assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"ConfigError: no configuration '{name or '.'}' ships with vpeft")
    assert name != "digits/lorra" or "did you mean 'digits/lora'" in error


@pytest.mark.slow
def test_every_copy_is_the_same_configuration(tmp_path, monkeypatch, capsys):
    main(["configs", "copy", *shipped.names(), "--out", str(tmp_path / "mine")])
    copies = capsys.readouterr().out.split()
    assert len(copies) == len(shipped.names())
    for file in (tmp_path / "mine").rglob("*.*"):
        assert file.read_bytes() == (folder("configs") / file.relative_to(tmp_path / "mine")).read_bytes()
        assert all(base.is_file() for base in shipped.with_bases(file))
    monkeypatch.chdir(tmp_path)
    for name in ("digits/lora", "seg/lora", "examples/images"):
        assert load_config(f"mine/{name}.yaml") == load_config(name)


def test_a_copy_brings_its_bases_and_replaces_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["configs", "copy", "digits/lora"])
    assert capsys.readouterr().out.split() == ["configs/digits/lora.yaml"]
    bases = {f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*.yaml")} - {"configs/digits/lora.yaml"}
    assert bases == {"configs/_base_/digits.yaml", "configs/_base_/vit_micro.yaml"} & bases
    assert "configs/_base_/digits.yaml" in bases
    main(["configs", "copy", "digits/lora", "digits/bitfit"])  # what is the same stays
    changed = tmp_path / "configs/_base_/digits.yaml"
    changed.write_text("# mine")
    with pytest.raises(SystemExit) as stopped:
        main(["configs", "copy", "digits/ssf"])
    assert stopped.value.code == 2
    assert "configs/_base_/digits.yaml exists and is another one: nothing was copied" in capsys.readouterr().err
    assert changed.read_text() == "# mine"
    assert not (tmp_path / "configs/digits/ssf.yaml").exists()


def test_show_lays_bases_under(capsys):
    main(["configs", "show", "digits/lora"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["method"] == {"name": "lora", "options": {"rank": 8}}
    assert shown["data"]["source"] == "digits"
    assert "base" not in shown
    main(["configs", "show", "mmseg/fcn_vit-micro_scenes.py"])
    assert "model" in capsys.readouterr().out
    for name in shipped.names()[::10]:
        assert shipped.text(name)
