"""How processes part, keep out of each other's folders, and end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import write_scan
from test_aligners import CentredWaves

from custom import processes
from custom.data.store.build import build_part, build_store
from custom.errors import AliceError
from custom.landmarks.embeddings.embed import embed_store
from custom.processes import locked


def test_the_last_to_go_waits_for_gloo(tmp_path, monkeypatch):
    """Its threads need Python a moment longer than the exchange takes; without the wait some runs on busy CPUs abort."""
    slept = []
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append((seconds, dist.is_initialized())))
    processes.leave()
    assert not slept, "nobody to leave"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    dist.all_reduce(torch.ones(2))
    processes.leave()
    assert not dist.is_initialized() and slept == [(processes.LEAVE_PAUSE_S, False)]


def at_work(path, **other):
    """A lock as another living process of this machine leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = {"doing": "a build", "since": "2026-01-01 00:00:00", **processes._process(os.getppid()), **other}
    path.write_text(json.dumps(lock), encoding="utf-8")
    return path


def embed(store, folder):
    embed_store(CentredWaves(), "0" * 64, store, folder, names=store.names[:1], progress=False)


def train(store, folder):
    from test_trainer import make_trainer

    make_trainer(store, folder, steps=1).run()


def build(store, folder):
    build_store(store.path.parent / "nowhere", folder)  # the lock is asked before the source


DOORS = [(build, "build.lock"), (embed, "embed.lock"), (train, "training.lock")]


@pytest.mark.parametrize("work, name", DOORS)
def test_two_at_work_in_one_folder_are_refused_in_one_line(store, tmp_path, work, name):
    lock = at_work(tmp_path / "out" / name)
    with pytest.raises(AliceError) as refusal:
        work(store, tmp_path / "out")
    message = str(refusal.value)
    assert (
        message.startswith(f"{tmp_path / 'out'}: a build (process {os.getppid()} on ") and "\n" not in message
    )
    assert f"delete {lock} if it has, or choose another " in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize("work, name", DOORS[1:])
def test_work_leaves_no_lock(store, tmp_path, work, name):
    at_work(tmp_path / "out" / name, start="0")  # the number belongs to a younger process now
    work(store, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.lock*"))


def ended():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


GONE = {
    "it has ended": lambda path: at_work(path, **processes._process(ended())),
    "its number belongs to another process": lambda path: at_work(path, start="17"),
    "it was cut short long ago": lambda path: path.write_text('{"doing": "a b') and os.utime(path, (0, 0)),
    "its machine has been silent": lambda path: os.utime(at_work(path, host="elsewhere"), (0, 0)),
}


@pytest.mark.parametrize("leave", GONE.values(), ids=GONE)
def test_a_lock_whose_holder_is_gone_is_taken_over(tmp_path, leave):
    leave(tmp_path / "build.lock")
    with locked(tmp_path / "build.lock", "a build"):
        assert json.loads((tmp_path / "build.lock").read_text())["pid"] == os.getpid()
        with pytest.raises(AliceError, match="is at work here"), locked(tmp_path / "build.lock", "a build"):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"container": 1}, {"host": "elsewhere", "pid": 1}])
def test_the_lock_of_another_machine_is_respected(tmp_path, where):
    path = at_work(tmp_path / "build.lock", **where, start="0")
    with pytest.raises(AliceError, match="a build .* is at work here"), locked(path, "a build"):
        pass
    assert path.is_file()


def test_a_lock_that_waits_gets_its_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: path.unlink())
    path = at_work(tmp_path / "new" / "build.lock")
    with locked(path, "a build", wait=True):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_only_one_of_many_takes_over_a_stale_lock(tmp_path):
    GONE["it has ended"](tmp_path / "a.lock")
    inside, most, out = [], [], threading.Event()

    def work():
        try:
            with locked(tmp_path / "a.lock", "a build"):
                inside.append(1)
                out.wait(10)
        except AliceError:
            most.append(1)
            if len(most) == 7:
                out.set()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1


def test_parts_of_a_build_exclude_the_whole_and_themselves_only(scans, tmp_path):
    at_work(tmp_path / "build-1-of-2.lock")
    options = {"spacing": (3.0, 3.0, 4.0), "workers": 1, "progress": False}
    with pytest.raises(AliceError, match="at work here"):
        build_part(scans, tmp_path, "1/2", **options)
    with pytest.raises(AliceError, match="at work here"):
        build_store(scans, tmp_path, **options)
    assert build_part(scans, tmp_path, "2/2", **options) is None  # the other part's share is left
    at_work(tmp_path / "build.lock")
    with pytest.raises(AliceError, match="at work here"):
        build_part(scans, tmp_path, "2/2", **options)


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(store, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(AliceError, match=r"file.*: cannot be written .*Choose another output_dir\."):
            train(store, folder)


@pytest.mark.slow
def test_of_two_builds_one_is_refused_and_a_killed_one_is_followed_at_once(tmp_path):
    for i in range(20):
        write_scan(tmp_path / "scans" / f"p{i}.nii.gz", i)
    words = [
        sys.executable,
        "-m",
        "custom.cli",
        "build",
        str(tmp_path / "scans"),
        str(tmp_path / "store"),
        "--workers",
        "1",
    ]
    first = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "store").glob("volumes/*.json")):
        assert first.poll() is None
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot end in the meantime
    second = subprocess.run(words, capture_output=True, text=True)
    assert second.returncode == 1
    assert second.stderr.startswith(f"alice: {tmp_path / 'store'}: a build (process {first.pid} on ")
    assert second.stderr.count("\n") == 1
    first.kill()
    first.wait()
    third = subprocess.run(words, capture_output=True, text=True)
    assert third.returncode == 0 and "taken over from a build" in third.stderr
    assert "20 volumes" in third.stdout and not list((tmp_path / "store").glob("*.lock*"))


# -- workers -------------------------------------------------------------------------------------------------

POOLS = {  # what starts the workers, and what shows that they are at work
    "alice build": ("main(['build', scans, out, '--workers', '2'])", "volumes/*.json"),
    "alice scan": ("main(['scan', scans, '-o', out + '/m.json', '--workers', '2'])", "m.json.partial"),
    "training": (
        "train(VolumeStore(out + '/store'), out, steps=10**6, workers=2).run()",
        "log.jsonl",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("pool", POOLS)
def test_workers_end_when_their_parent_is_killed(tmp_path, pool):
    doing, sign = POOLS[pool]
    scans, out = tmp_path / "scans", tmp_path / "out"
    out.mkdir()
    for i in range(2 if pool == "training" else 40):
        write_scan(scans / f"p{i}.nii.gz", i)
    if pool == "training":
        build_store(scans, out / "store", (3.0, 3.0, 4.0), progress=False)
    script = tmp_path / "start.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from custom.cli.main import main\n"
        "from custom.data.store.volume_store import VolumeStore\n"
        "if __name__ == '__main__':\n"
        "    from test_trainer import make_trainer as train\n"
        f"    scans, out = {str(scans)!r}, {str(out)!r}\n    {doing}\n",
        encoding="utf-8",
    )
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in out.glob(sign)):
        assert parent.poll() is None, "it ended before its workers began"
        time.sleep(0.02)
    workers = children(parent.pid)
    parent.kill()
    parent.wait()
    assert len(workers) >= 2
    end = time.monotonic() + 300  # on a busy machine; without the watch they stay for ever
    while left := [pid for pid in workers if processes._process(pid)["start"] == workers[pid]]:
        assert time.monotonic() < end, f"{left} of {workers} outlived their parent"
        time.sleep(0.1)


def children(parent):
    """A process's children: number -> when it started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found[int(path.parent.name)] = fields[19]
    return found
