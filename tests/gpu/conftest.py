import sys
from pathlib import Path

# What starts ranks and what they do is shared with the tests on the CPU.
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
