"""``llava-lab serve``: a model behind an OpenAI-compatible address on this machine, until Ctrl-C.

    llava-lab serve --model tiny --port 8000 --token-file token.txt

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=open("token.txt").read())

Any client or harness that takes a base URL and a key can ask it, ours too (``llava-lab explain --model openai:tiny``).
What is taken and given is said in `llava_lab.serving.protocol`, what is kept out in `llava_lab.serving.server`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import secrets
import stat
from pathlib import Path

from llava_lab.cli import common
from llava_lab.cli.common import Add, Reply, positive, say
from llava_lab.errors import LabError, OptionError

VARIABLE = "LLAVA_LAB_TOKEN"
LARGEST_TOKEN = 4096  # characters of its file

EXAMPLE = f"""example:
  llava-lab serve --model tiny --port 8000 --token-file token.txt

  OPENAI_API_KEY=$(cat token.txt) llava-lab explain car.png "What color is the car?" \\
      --model openai:tiny --base-url http://127.0.0.1:8000/v1 --method occlusion --option block=3 --out map.png

  curl http://127.0.0.1:8000/v1/chat/completions -H "Authorization: Bearer $(cat token.txt)" \\
      -H "Content-Type: application/json" -d '{{"model": "tiny", "messages": [{{"role": "user", "content": [
        {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}},
        {{"type": "text", "text": "What color is the car?"}}]}}], "llava_lab": {{"method": "rollout", "segments": true}}}}'

The token is that of {VARIABLE}, of --token-file, or a new one that is shown once."""


def add_commands(add: Add) -> None:
    command = add("serve", serve, "answer OpenAI's chat completions on 127.0.0.1 with a model of this machine (Ctrl-C ends it)")
    command.add_argument("--port", type=int, default=0, help="default: any free one")
    command.add_argument(
        "--token-file", metavar="FILE", help="the token clients send; made, for your eyes only, where it is missing"
    )
    command.add_argument(
        "--waiting", type=positive, default=64, metavar="N", help="requests in the line, beyond which it says 429"
    )
    command.add_argument("--deadline", type=float, default=300.0, metavar="SECONDS", help="for one request (default: 300)")
    command.below = lambda: EXAMPLE  # type: ignore[attr-defined]


def serve(args: argparse.Namespace) -> Reply:
    """Serve until Ctrl-C or SIGTERM. Raises LabError where the packages are missing, OptionError for a token of no use."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise LabError(f"a server needs {package}, which is not installed; `pip install 'llava-lab[serve]'` brings it")
    if args.json:
        raise OptionError("a server has nothing to print as JSON; leave --json out")
    if common.is_closed(args):
        raise OptionError(f"{args.model} is behind a server already; give its address to your clients")
    token = read_token(args.token_file)
    from llava_lab.serving import Server

    lab = common.load(args)
    options = {"port": args.port, "waiting": args.waiting, "deadline": args.deadline, "seed": args.seed}
    server = Server(lab, token=token, **options)
    say(f"{server.model} answers at {server.base_url}")
    say(f"token: {server.token}" if token is None else f"token: that of {args.token_file or VARIABLE}")
    say("Ctrl-C ends it")
    server.run()
    return Reply(None)


def read_token(path: str | None) -> str | None:
    """The token of the file, made where there is none, or of the environment; None where neither is given.

    Raises OptionError for a file that others may read, or that holds no token.
    """
    if path is None:
        return os.environ.get(VARIABLE, "").strip() or None
    file_ = Path(path)
    if not os.path.lexists(file_):
        from llava_lab.results import whole_file

        token = secrets.token_urlsafe(32)
        with whole_file(file_) as temporary:
            temporary.chmod(0o600)  # before there is anything to read
            temporary.write_text(token, encoding="ascii")
        return token
    try:
        mode = file_.stat().st_mode
        if not stat.S_ISREG(mode) or (os.name == "posix" and mode & 0o077):
            raise OptionError(f"{path} must be a file that only you can read (chmod 600 {path})")
        with file_.open(encoding="ascii", errors="replace") as file:
            token = file.read(LARGEST_TOKEN + 1).strip()
    except OSError as error:
        raise OptionError(f"cannot read {path} ({error.strerror or error})") from None
    if not token or len(token) > LARGEST_TOKEN:
        raise OptionError(f"{path} holds no token; remove it to have one made")
    return token
