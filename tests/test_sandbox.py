"""Ways out of the sandbox: each ends in a failure with a name, nothing of it survives, and the next program runs."""
import json, os, subprocess, sys
from pathlib import Path

import pytest

from kyara import cage, confine
from kyara.confine import STATUSES, Outcome, confinement, run_program, run_programs

from kyara.ledger import Ledger

LAYERS, REASON = confinement()
confined = pytest.mark.skipif(bool(REASON), reason=REASON)

WAYS_OUT = [ # name, program, statuses that may come of it
    ('fork bomb', 'import os\nwhile True: os.fork()', 'forbidden'),
    ('patient fork bomb', 'import os\nwhile True:\n try: os.fork()\n except OSError: pass', 'forbidden'),
    ('threads without end', 'import _thread, time\nwhile True: _thread.start_new_thread(time.sleep, (9,))', 'forbidden exception'),
    ('memory bomb', 'a = []\nwhile True: a.append("a" * 10**7)', 'memory'),
    ('memory at once', 'a = bytearray(10**11)', 'memory'),
    ('patient memory bomb', 'a = []\nwhile True:\n try: a.append("a" * 10**7)\n except MemoryError: pass', 'time'),
    ('endless output', 'while True: print("喵" * 1000)', 'output'),
    ('endless error output', 'import sys\nwhile True: sys.stderr.write("喵" * 1000)', 'output'),
    ('output against all limits', 'import sys\nfor _ in range(10**9):\n try: sys.stdout.write("x" * 10**6); sys.stdout.flush()\n except OSError: pass', 'output'),
    ('endless loop', 'while True: pass', 'time'),
    ('sleep', 'import time\ntime.sleep(1000)', 'time'),
    ('huge power', 'print(9 ** 9 ** 9)', 'time memory'),
    ('huge power of large numbers', 'x = 10 ** (10 ** 7)\nwhile True: x = x * x', 'time memory'),
    ('huge number printed', 'print(10 ** 5000)', 'exception'),
    ('bad pattern', 'import re\nre.match("(a+)+$", "a" * 60 + "b")', 'time'),
    ('deep recursion', 'import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()', 'crashed memory exception time'),
    ('nested source', '(' * 50_000, 'exception crashed memory'),
    ("the parent's environment", 'import os\nprint(open(f"/proc/{os.getppid()}/environ").read())', 'forbidden'),
    ('its own memory map', 'print(open("/proc/self/maps").read())', 'forbidden'),
    ('the list of processes', 'import os\nprint(os.listdir("/proc"))', 'forbidden'),
    ('the home folder', 'import os\nprint(os.listdir(os.path.expanduser("~")))', 'forbidden'),
    ('passwords', 'print(open("/etc/passwd").read())', 'forbidden'),
    ('the project', f'print(open({str(Path(__file__))!r}).read())', 'forbidden'),
    ('a file', 'open("here", "w").write("x")', 'forbidden'),
    ('a file elsewhere', 'open("/tmp/kyara_was_here", "w").write("x")', 'forbidden'),
    ('a symbolic link', 'import os\nos.symlink("/etc/passwd", "link")', 'forbidden'),
    ('a hard link', 'import os\nos.link("/etc/passwd", "link")', 'forbidden'),
    ('another folder', 'import os\nos.chdir("/")', 'forbidden'),
    ('deleting', 'import os\nos.remove("/etc/hostname")', 'forbidden'),
    ('a socket', 'import socket\nsocket.create_connection(("127.0.0.1", 80))', 'forbidden exception'),
    ('a socket by its number', 'import os\n[os.write(n, b"x") for n in range(3, 64)]', 'exception forbidden'),
    ('ctypes', 'import ctypes\nctypes.CDLL(None).system(b"id")', 'forbidden'),
    ('ctypes: a socket', 'import sys\nprint(sys.modules["ctypes"].CDLL(None).socket(2, 1, 0))', 'forbidden'),
    ('ctypes: a call of another machine', 'import sys\nprint(sys.modules["ctypes"].CDLL(None).syscall(0x40000000 + 41, 2, 1, 0))', 'forbidden'),
    ('machine code', 'import sys\nc = sys.modules["ctypes"].CDLL(None)\nassert c.mmap(0, 4096, 7, 34, -1, 0) != -1', 'exception'),
    ('a shell', 'import os\nos.system("id")', 'forbidden'),
    ('another program', 'import os\nos.execv("/bin/sh", ["sh", "-c", "id"])', 'forbidden'),
    ('subprocess', 'import subprocess\nsubprocess.run(["id"])', 'forbidden exception'),
    ('killing the parent', 'import os\nos.kill(os.getppid(), 9)', 'forbidden'),
    ('killing everybody', 'import os\nos.kill(-1, 9)', 'forbidden'),
    ('ignoring SIGTERM', 'import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(1000)', 'time'),
    ('ignoring the time limit', 'import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass', 'time crashed'),
    ('more limits', 'import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint(7)', 'forbidden exception'),
    ('leaving the group', 'import os\nos.setsid()\nprint(7)', 'forbidden'),
    ('becoming root', 'import os\nos.setuid(0)\nprint(7)', 'forbidden'),
    ('a library', 'import sys\nsys.path.append("/usr/lib/python3/dist-packages")\nimport numpy', 'exception'),
    ('input', 'print(input())', 'exception'),
    ('broken text', 'print(3 *', 'exception'),
    ('broken interpreter', 'import sys\nsys.modules["ctypes"].string_at(0)', 'crashed'),
    ('quiet end', 'import os\nos._exit(0)', 'silent'),
    ('signals', 'import signal\nsignal.raise_signal(signal.SIGKILL)', 'forbidden crashed'),
]


@confined
@pytest.mark.parametrize('name, program, statuses', WAYS_OUT, ids=[name for name, *_ in WAYS_OUT])
def test_no_way_out(name, program, statuses, tmp_path, monkeypatch):
    monkeypatch.setenv('KYARA_TEST_SECRET', 'a key')
    outcome = run_program(program, cpu=1 if 'time' in statuses else 10, wall=3 if 'sleep(1000)' in program else 60)
    assert outcome.status in statuses.split(), outcome
    assert outcome.answer == '' and 'a key' not in outcome.output + outcome.error and 'root:' not in outcome.output, outcome
    assert outcome.error or outcome.status == 'silent', 'a failure says what happened'
    assert run_program('print(3 * 8)').answer == '24', 'the next program runs'


@confined
def test_nothing_survives():
    before = children()
    program = 'import os, time\nfor _ in range(20):\n try: os.fork()\n except OSError: pass\ntime.sleep(60)'
    run_program(program, cpu=1, wall=1)
    assert children() <= before and not Path('/tmp/kyara_was_here').exists()


def children():
    import psutil
    return {child.pid for child in psutil.Process().children(recursive=True)}


@confined
def test_environment_and_folder_are_empty(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'a key')
    outcome = run_program('import os\nprint(sorted(os.environ))')
    assert set(json.loads(outcome.answer.replace("'", '"'))) <= {'PYTHONHASHSEED', 'PYTHONUTF8', 'LC_CTYPE'}, outcome
    assert run_program('import sys\nprint(sys.argv[1:], sys.path)').answer.endswith('[]')


@confined
@pytest.mark.parametrize('program, answer', [
    ('from math import comb\nprint(comb(10, 3))', '120'), ('from fractions import Fraction as F\nprint(F(1, 3) + F(1, 6))', '1/2'),
    ('from datetime import date, timedelta\nprint((date(2024, 2, 28) + timedelta(days=2)).isoformat())', '2024-03-01'),
    ('from datetime import datetime\nprint(datetime.strptime("2024-05-03", "%Y-%m-%d").strftime("%A"))', 'Friday'),
    ('from decimal import Decimal\nprint(Decimal("1.10") + Decimal("2.20"))', '3.30'), ('print("星期三")', '星期三'),
    ('import itertools, collections\nprint(len(list(itertools.permutations(range(5), 2))))', '20'),
    ('from dataclasses import dataclass\n@dataclass\nclass A:\n    n: int\nprint(A(3).n)', '3'), ('import statistics\nprint(statistics.mean([1, 2, 6]))', '3'),
    ('def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nif __name__ == "__main__":\n    print("計算中")\n    print(f(10))', '3628800'),
    ('import random\nprint(random.randint(1, 10**9) == random.Random(0).randint(1, 10**9))', 'True'),
    ('print({"雞": 3, "兔": 4})', "{'雞': 3, '兔': 4}"), ('import sys\nprint(7)\nsys.exit(0)', '7')])
def test_honest_programs_run(program, answer):
    assert run_program(program).answer == answer, run_program(program)


@confined
def test_the_same_program_prints_the_same():
    program = 'import random\nprint(hash("臺灣"), list({"甲", "乙", "丙", "丁"}), random.random())'
    assert len({run_program(program).output for _ in range(3)}) == 1


@confined
def test_outcomes_are_kept_and_replayed(tmp_path, monkeypatch):
    programs = ['print(3 * 8)', 'import os\nos.fork()', 'print(3 * 8)']
    with Ledger(tmp_path / 'ledger.sqlite') as ledger: first = run_programs(programs, ledger, cpu=10)
    assert [outcome.status for outcome in first] == ['ok', 'forbidden', 'ok']
    monkeypatch.setattr(confine, 'run_program', lambda *_, **__: pytest.fail('a known program was run again'))
    with Ledger(tmp_path / 'ledger.sqlite') as ledger:
        assert run_programs(programs, ledger, cpu=10) == first
        assert not ledger.verify() and len(list(ledger.entries())) == 2


def test_no_program_runs_where_none_can_be_confined(monkeypatch):
    monkeypatch.setattr(confine, 'confinement', lambda: ([], 'no seccomp here'))
    monkeypatch.setattr(confine, 'run_program', lambda *_, **__: pytest.fail('a program was run'))
    with Ledger(':memory:') as ledger:
        got = run_programs(['print(1)'], ledger)
        assert got == [Outcome('not_run', error='no seccomp here')] and not list(ledger.entries()), got


def test_other_platforms_cannot_confine(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert 'only Linux' in confinement.__wrapped__()[1]


@confined
@pytest.mark.parametrize('machine', ['riscv64', ''])
def test_an_unknown_machine_fails_closed(machine):
    source = cage_with(f'platform.machine = lambda: {machine!r}')
    done = subprocess.run([sys.executable, '-c', source, json.dumps({'cpu': 10, 'memory': 2**29, 'output': 99, 'confined': True})],
                          input='print(7)', text=True, capture_output=True)
    assert done.returncode == cage.NOT_CONFINED and not done.stdout, done


@confined
def test_a_kernel_without_seccomp_fails_closed():
    source = cage_with('def install_filter(machine): raise OSError("no filter")')
    done = subprocess.run([sys.executable, '-c', source, json.dumps({'cpu': 10, 'memory': 2**29, 'output': 99, 'confined': True})],
                          input='print(7)', text=True, capture_output=True)
    assert done.returncode == cage.NOT_CONFINED and not done.stdout, done


def cage_with(line):
    source = Path(cage.__file__).read_text(encoding='utf-8')
    last = source.rindex('if __name__')
    return source[:last] + line + '\n' + source[last:]


@confined
@pytest.mark.parametrize('line', ['def install_landlock(): return 0', 'def drop_root(): return False'], ids=['no Landlock', 'root'])
def test_the_filter_alone_holds(line):
    source = cage_with(line + '\ndef install_landlock(): return 0')
    for program in ['open("/etc/passwd")', 'import os\nos.listdir("/")', 'import os\nos.fork()', 'open("x", "w")']:
        done = subprocess.run([sys.executable, '-c', source, json.dumps({'cpu': 10, 'memory': 2**29, 'output': 9999, 'confined': True})],
                              input=program, text=True, capture_output=True)
        assert 'PermissionError' in done.stderr or done.returncode == -31, done


@pytest.mark.skipif(os.name != 'posix', reason='needs POSIX limits')
def test_unconfined_programs_still_have_limits():
    assert run_program('print(7)', confined=False).answer == '7'
    assert run_program('while True: pass', cpu=1, confined=False).status == 'time'
    assert run_program('while True: print("x" * 1000)', confined=False).status == 'output'


def test_every_status_is_explained():
    assert {status for _, _, statuses in WAYS_OUT for status in statuses.split()} <= STATUSES.keys()
