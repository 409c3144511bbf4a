"""Runs sessions of run_translation.py that end at an exact moment by SIGKILL or a full disk; used by test_resume.py.

Standard input has one session per line, `{"moment": {...}, "flags": [...]}`; its exit code and errors are printed, as
`[0, ""]`. Each is a process of its own, forked after the imports, which are what takes long. Under torchrun, the first
argument is the one session. A moment is the session's n-th update, or an audit event of Python with the end of a path:

    {"update": 3}
    {"update": 3, "signal": 15}
    {"event": "open", "path": "checkpoint-4/trainer_state.json"}
    {"event": "os.mkdir", "path": "checkpoint-4", "rank": 1}
    {"event": "open", "path": "checkpoint-4/config.json", "largest_file": 4096}
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook


sys.path.insert(0, str(Path(__file__).parents[2]))
import run_translation


def arm(moment: dict) -> None:
    """Kill this process at the moment, or let no file grow beyond `largest_file` from then on."""
    if "rank" in moment and moment["rank"] != int(os.environ["RANK"]):
        return
    updates = 0

    def count(*args: object) -> None:
        nonlocal updates
        updates += 1
        if updates == moment["update"]:
            os.kill(os.getpid(), moment.get("signal", signal.SIGKILL))

    def watch(event: str, arguments: tuple) -> None:
        if event == moment["event"] and str(arguments[0]).endswith(moment["path"]):
            if "largest_file" not in moment:
                os.kill(os.getpid(), signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (moment["largest_file"], resource.RLIM_INFINITY))

    if "update" in moment:
        register_optimizer_step_post_hook(count)
    elif moment:
        sys.addaudithook(watch)


def main() -> None:
    if len(sys.argv) > 1:
        session = json.loads(sys.argv[1])
        arm(session["moment"])
        sys.exit(run_translation.main(session["flags"]))
    for line in sys.stdin:
        session = json.loads(line)
        errors, child_errors = os.pipe()
        if child := os.fork():
            os.close(child_errors)
            with open(errors, encoding="utf-8", errors="replace") as file:
                text = file.read()
            print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
            continue
        for output in (1, 2):
            os.dup2(child_errors, output)
        os.close(child_errors)
        arm(session["moment"])
        sys.exit(run_translation.main(session["flags"]))


if __name__ == "__main__":
    main()
