import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

# No test reaches the network, or finds weights that happen to be on the machine.
os.environ |= {"TORCH_HOME": tempfile.mkdtemp(), "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
