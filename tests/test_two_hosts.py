"""Two hosts train together, one dies, and the other ends the run alone.

Each host is a network namespace of its own, joined to the other by a cable (a veth pair): they
reach each other by addresses alone, as two machines do, and share out_dir as by a common disk.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import ROOT, TINY, finish, log, saved, train_here, wait_for_lines, weights, words
from tests.test_distributed import errors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's"),
]
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass
class Host:
    """A network namespace, which lives as long as `holder`."""

    holder: subprocess.Popen
    address: str

    def enter(self, *command: object) -> list[str]:
        """A command as it runs on this host."""
        inside = ["nsenter", "--user", "--net", "--preserve-credentials"]
        return [*inside, f"--target={self.holder.pid}", *map(str, command)]

    def call(self, *command: object) -> None:
        subprocess.run(self.enter(*command), check=True, capture_output=True)

    def torchrun(self, *argv: str) -> subprocess.Popen:
        """What a person types on this host; the first one is where they meet."""
        where = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_id=1", "--rdzv_backend=c10d"]
        where += [f"--rdzv_endpoint={ADDRESSES[0]}:29500", f"--local_addr={self.address}"]
        # by names torchrun finds it out; these hosts have none
        where += [f"--rdzv_conf=is_host={self.address == ADDRESSES[0]}"]
        command = [sys.executable, "-m", "torch.distributed.run", *where, "train.py", *argv]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.enter(*command), cwd=ROOT, env=environment, **pipes)

    def kill(self) -> None:
        """All of its processes at once but the holder, without which the cable would go, too."""
        own = Path(f"/proc/{self.holder.pid}/ns/net").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may have ended
                pid = int(process.name)
                if (process / "ns/net").readlink() == own and pid != self.holder.pid:
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def namespace(address: str, outer: Host | None) -> Iterator[Host]:
    """A host; the second in the user namespace of the first, so that a cable can join them."""
    unshare = ["unshare", "--net", *([] if outer else ["--user", "--map-root-user"])]
    hold = [*unshare, sys.executable, "-c", "print(flush=True); input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        holder = subprocess.Popen(outer.enter(*hold) if outer else hold, **pipes)
    except OSError as error:
        pytest.skip(f"no network namespace can be made here: {error}")
    with holder:
        host = Host(holder, address)
        try:
            if not holder.stdout.readline():
                reason = holder.stderr.read().decode().strip()
                pytest.skip(f"no network namespace can be made here: {reason}")
            yield host
        finally:
            host.kill()
            holder.kill()


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with namespace(ADDRESSES[0], None) as first, namespace(ADDRESSES[1], first) as second:
        peer = ["peer", "name", "cable", "netns", second.holder.pid]
        first.call("ip", "link", "add", "cable", "type", "veth", *peer)
        for host in (first, second):
            host.call("ip", "address", "add", f"{host.address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                host.call("ip", "link", "set", link, "up")
        yield first, second


def test_one_of_two_hosts_is_killed_and_the_other_ends_the_run_alone(toys, hosts, tmp_path):
    common = TINY | {"dataset": toys / "text", "max_iters": 300, "eval_interval": 20}
    out = tmp_path / "out"
    running = [host.torchrun(*words(**common, out_dir=out)) for host in hosts]
    wait_for_lines(out, 50, running[0])
    hosts[1].kill()
    killed_at = len(log(out))
    started = time.monotonic()
    done = finish(running[0])
    assert done.returncode
    assert time.monotonic() - started < 120
    assert "on cpu in 2 processes" in done.stdout
    assert len(errors(done)) == 1, done.stderr
    assert finish(running[1]).returncode == -signal.SIGKILL
    step = saved(out)["progress"]["iter"]
    assert 40 <= step <= killed_at < 300  # what was saved last is whole

    alone = [sys.executable, "train.py", *words(out_dir=out, resume=True)]
    rest = subprocess.run(
        hosts[0].enter(*alone), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert rest.returncode == 0, rest.stderr
    assert "finished at step 300" in rest.stdout
    whole = train_here(**common, out_dir=tmp_path / "whole")
    assert [line["iter"] for line in log(out)] == [line["iter"] for line in log(whole)]
    assert log(out)[-1]["val_loss"] == pytest.approx(log(whole)[-1]["val_loss"], abs=1e-3)
    assert weights(out).keys() == weights(whole).keys()
