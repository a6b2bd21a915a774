"""The README's code is run as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_a_modality_of_your_own(capsys):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Profile" in block]
    assert len(code.splitlines()) < 40
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in printed) == [f"cast-{n}" for n in range(8)]
    reached = [float(line.split()[1]) for line in printed]
    assert min(reached) >= 40, printed
