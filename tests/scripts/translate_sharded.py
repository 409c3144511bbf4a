"""run_translation.py with sharded weights on a CPU; launched with fsdp.yaml by test_distributed.py."""

import sys

from accelerate.utils import DistributedType
from torch import distributed

import run_translation
from training import arguments


def parse_arguments(argv: list[str]) -> arguments.Arguments:
    """Parse, and tell accelerate that it is on GPUs, which it wants for sharding: nothing in its code needs one."""
    parsed = ORIGINAL(argv)
    parsed[2].use_cpu = False
    parsed[2].distributed_state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return parsed


if __name__ == "__main__":
    ORIGINAL, arguments.parse_arguments = arguments.parse_arguments, parse_arguments
    code = run_translation.main(sys.argv[1:])
    assert not distributed.is_initialized()
    sys.exit(code)
