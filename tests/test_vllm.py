"""Where vLLM is installed, it runs converted models as they run by themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_check import CASES

pytest.importorskip("vllm", reason="vllm is not installed")


@pytest.mark.parametrize("case", CASES)
def test_vllm_writes_what_the_model_writes(case, tmp_path):
    file = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, Path(__file__).with_name("vllm_check.py"), case, file], check=True
    )
    result = json.loads(file.read_text())
    assert result["by vLLM"] == result["by itself"] != result["dense"]
    assert result["difference"] < 1e-5
