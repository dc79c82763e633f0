"""`dino-fast info`."""

from __future__ import annotations

import argparse
import json

from dino_fast.cli import info


def test_every_operation_names_its_choice_and_the_reasons(capsys):
    assert info.run(argparse.Namespace(json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"dino_loss", "multi_tensor"} <= {name.split(".")[0] for name in found["operations"]} | {"multi_tensor"}
    assert "dino_loss" in found["operations"]
    for devices in found["operations"].values():
        for choice in devices.values():
            assert choice["chosen"]
            assert all(choice["others"].values())
    assert found["native"]["instruction_set"] in found["native"]["instruction_sets"]


def test_text_names_versions_instruction_set_and_backends(capsys):
    info.run(argparse.Namespace(json=False))
    text = capsys.readouterr().out
    assert "torch 2" in text and "native code:" in text and "dino_loss on cpu: native" in text
