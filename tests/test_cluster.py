"Beyond one machine: real Ray nodes as processes, one of them killed; a ledger and limits for all of them."
import json
import os
import time

import pytest
from loopback import ECHO, serve
from nodes import at_work, ray_nodes

from kyara.cluster import (Failed, LocalEngine, Office, RayEngine, RemoteLedger, Store, ask_in_shards, caller, map_to_store,
                           open_office)
from kyara.core import ModelSettings, UserError
from kyara.ledger import Ledger
from kyara.llm import Request, ask_each


def requests(count, mark=''):
    return [Request([{'role': 'user', 'content': f'第{number:05d}題{mark}：臺灣第{number + 1}高的山是哪一座？'}]) for number in range(count)]


def loopback(server, **more):
    return ModelSettings('loopback', 'openai', 'loopback', server.url, **{'concurrency': 16, 'price_input': 1.0, **more})


def plain(replies): return [(reply.call_id, reply.text, reply.finish_reason, reply.usage, reply.cost) for reply in replies]


@pytest.fixture(scope='module')
def nodes(tmp_path_factory):
    with ray_nodes(tmp_path_factory.mktemp('ray')) as nodes: yield nodes


def test_node_killed_in_the_middle(nodes, tmp_path):
    "Every row is there, as without Ray; paid twice is at most what the dead node had under way."
    asked, replies, killed = requests(1200), [], []
    victim = nodes.add()
    with serve(latency=0.05) as server:
        settings = loopback(server)
        def deliver(reply):
            replies.append(reply)
            if not killed and len(replies) > 150 and len(replies) % 10 == 0 and at_work(victim):
                killed.append(server.stats(brief=True).requests)
                nodes.kill(victim)
        budget = ask_in_shards(asked, settings, deliver, engine=RayEngine(3), ledger=tmp_path / 'calls.sqlite', stage='synthesis',
                               run='demo', shard_size=100)
        stats = server.stats()
        alone = []
        spent = ask_each(asked, settings, alone.append, ledger=tmp_path / 'alone.sqlite')
    assert killed and killed[0] < 1200, killed
    assert plain(replies) == plain(alone)
    again = sum(count - 1 for count in stats.whole.values())
    assert len(stats.whole) == 1200 and again <= 16, again
    assert budget.spent['max_tokens'] == spent.spent['max_tokens'], (budget.spent, spent.spent)
    with Ledger(tmp_path / 'calls.sqlite') as ledger: assert sum(1 for _ in ledger.entries(run='demo', stage='synthesis')) == 1200


def test_same_replies_for_any_number_of_workers(nodes, tmp_path):
    "Also calls that occur in several shards are paid once, whoever asks first."
    asked = requests(150) + requests(150)
    results = []
    with serve(latency=0.01) as server:
        for workers, size in ((1, 1000), (2, 40), (2, 16)):
            replies = []
            ask_in_shards(asked, loopback(server), replies.append, engine=RayEngine(workers), ledger=tmp_path / f'{workers}-{size}.sqlite',
                          shard_size=size)
            results.append(plain(replies))
            stats = server.stats()
            assert set(stats.whole.values()) == {1} and len(stats.whole) == 150, stats.requests
            server.reset()
    assert results[0] == results[1] == results[2] and len(results[0]) == 300


def test_limits_hold_for_the_sum(nodes, tmp_path):
    "Three workers, 1,200 calls a minute: never more than the pace allows, from the first call to the last."
    asked = requests(120, '限速')
    with serve() as server:
        settings = loopback(server, requests_per_minute=1200)
        ask_in_shards(asked, settings, lambda reply: None, engine=RayEngine(3), ledger=tmp_path / 'calls.sqlite', shard_size=20)
        stats = server.stats()
    assert stats.requests == 120 and stats.last - stats.first >= 118 * 60 / 1200, stats.last - stats.first


def test_limits_of_concurrency_hold_for_the_sum(nodes, tmp_path):
    with serve(latency=0.05) as server:
        settings = loopback(server, concurrency=6)
        ask_in_shards(requests(120, '同時'), settings, lambda reply: None, engine=RayEngine(3), ledger=tmp_path / 'calls.sqlite', shard_size=20)
        assert server.stats().most_under_way <= 6


def test_office_that_dies_comes_back(nodes, tmp_path):
    "What was kept is in the file; a worker's claims are told to the new office."
    ray = pytest.importorskip('ray')
    place, office = str(tmp_path / 'calls.sqlite'), open_office()
    call = caller(office)
    with RemoteLedger(call, place, 'a', '1', beat=0.2) as ledger:
        assert ledger.claim('a' * 64)
        ray.kill(office, no_restart=False)
        deadline = time.monotonic() + 60
        call('begin', place, 'b', '1')
        while call('look_up', place, 'b', '1', ['a' * 64])[1]:
            call('give', place, 'b', '1', ['a' * 64])
            assert time.monotonic() < deadline, 'the claim was never told again'
            time.sleep(0.1)


def always(shard):
    if '壞' in shard: raise RuntimeError('這一片總是失敗')
    return {'rows': [{'text': text} for text in shard]}


def test_shard_that_always_fails(nodes, tmp_path):
    "It is tried, then named; all others are finished, and the ledger loses nothing."
    for engine in (LocalEngine(), RayEngine(2)):
        got = list(engine.map(always, [['好'], ['壞'], ['也好']], attempts=2))
        assert [type(one) for one in got] == [dict, Failed, dict] and '總是失敗' in got[1].reason, got


class Broken:
    "An engine whose second shard fails for good."
    workers = 1

    def map(self, function, shards, attempts=3, most=0):
        for number, shard in shards: yield Failed('RuntimeError: 這一片總是失敗') if number == 1 else function((number, shard))


def test_requests_of_a_failed_shard_are_named(nodes, tmp_path):
    "The others are answered and kept; then the run stops, unless it was told to go on without."
    with serve() as server:
        common = dict(engine=Broken(), ledger=tmp_path / 'calls.sqlite', shard_size=10)
        replies = []
        with pytest.raises(UserError, match='1 shards .* failed for good .*總是失敗.*failed_shards=drop'):
            ask_in_shards(requests(30), loopback(server), replies.append, **common)
        assert [reply.ok for reply in replies] == [True] * 10 + [False] * 10 + [True] * 10
        assert all('shard failed' in reply.error for reply in replies[10:20])
        replies.clear()
        ask_in_shards(requests(30), loopback(server), replies.append, spare=True, **common)
        assert sum(reply.ok for reply in replies) == 20 and server.stats().requests == 20


def test_bad_settings_stop_the_run_with_the_workers_own_words(nodes, tmp_path):
    "A user's mistake on a worker is told as it is here, and not tried again."
    with serve(model='another') as server, pytest.raises(UserError, match='knows no model'):
        ask_in_shards(requests(50), loopback(server), print, engine=RayEngine(2), ledger=tmp_path / 'calls.sqlite', shard_size=10)


def test_other_version_is_refused(tmp_path):
    "A worker whose Python finds another version of this package does no shard."
    import shutil
    import subprocess
    import sys
    from pathlib import Path

    import kyara
    from kyara.cluster import package_versions
    shutil.copytree(Path(kyara.__file__).parent, tmp_path / 'kyara', ignore=shutil.ignore_patterns('data', '__pycache__'))
    source = (tmp_path / 'kyara/__init__.py').read_text()
    (tmp_path / 'kyara/__init__.py').write_text(source.replace(kyara.__version__, '0.0.9'))
    script = f'from kyara.cluster import run_shard; print(run_shard(len, [1], {package_versions()!r}))'
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert 'has kyara 0.0.9 (' in done.stdout and f'this is {kyara.__version__} (' in done.stdout, done.stdout + done.stderr


# Places for shards


@pytest.fixture
def bucket():
    "A local server that speaks S3: moto's."
    import shlex
    import shutil
    import socket
    import subprocess
    import urllib.request
    command = shlex.split(os.environ.get('KYARA_MOTO_SERVER') or shutil.which('moto_server') or '')
    if not command: pytest.skip('no moto_server here: pip install "moto[server]", or name the command of one in KYARA_MOTO_SERVER')
    with socket.socket() as place:
        place.bind(('127.0.0.1', 0))
        port = place.getsockname()[1]
    process = subprocess.Popen([*command, '-H', '127.0.0.1', '-p', str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f'http://127.0.0.1:{port}'
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(urllib.request.Request(f'{url}/kyara', method='PUT'), timeout=10).close()
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None, 'moto_server does not start'
                time.sleep(0.2)
        yield f's3://kyara/runs/demo?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_delayed_open=true'
    finally:
        process.kill()
        process.wait()


def test_finished_shards_on_s3(bucket, tmp_path, monkeypatch):
    "The same bytes as in a folder; what is finished is not made again; a changed shard is."
    import pyarrow as pa
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'test')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'test')
    schemas, work = {'rows': pa.schema([('text', pa.string())])}, [['玉山', '雪山'], ['濁水溪']]
    here = list(map_to_store(always, work, schemas, Store(str(tmp_path / 'here')), LocalEngine(), 'v1'))
    there = list(map_to_store(always, work, schemas, Store(bucket), LocalEngine(), 'v1'))
    assert here == there and [one['made'] for one in there] == [True, True]
    again = list(map_to_store(always, [work[0], ['高屏溪']], schemas, Store(bucket), LocalEngine(), 'v1'))
    assert [one['made'] for one in again] == [False, True]
    assert Store(bucket).read('rows/part-00000.parquet') == (tmp_path / 'here/rows/part-00000.parquet').read_bytes()


def test_shard_killed_while_it_writes_is_made_again(tmp_path):
    "Without its manifest a shard is not finished, whatever lies there."
    import pyarrow as pa
    schemas, store = {'rows': pa.schema([('text', pa.string())])}, Store(str(tmp_path))
    first, = map_to_store(always, [['玉山']], schemas, store, LocalEngine(), 'v1')
    (tmp_path / 'shards/00000.json').unlink()
    (tmp_path / 'rows/part-00000.parquet').write_bytes(b'PAR1')
    again, = map_to_store(always, [['玉山']], schemas, store, LocalEngine(), 'v1')
    assert again == first and again['made']


def test_storage_that_fills_up(tmp_path):
    "One line that names the place; what was finished stays, and the rest is made where there is room."
    import subprocess
    import sys
    script = f'''
import json, resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import pyarrow as pa
from kyara.cluster import LocalEngine, Store, map_to_store
from kyara.core import UserError, content_hash
def large(size): return {{'rows': [{{'text': content_hash([size, n], 64)}} for n in range(size)]}}
try:
    for one in map_to_store(large, [10, 2000, 20], {{'rows': pa.schema([('text', pa.string())])}}, Store({str(tmp_path)!r}), LocalEngine(), 'v1'): pass
except UserError as error: print(error)
'''
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
    assert 'part-00001.parquet cannot be written' in done.stdout and 'make room' in done.stdout, done.stdout + done.stderr[-2000:]
    assert (tmp_path / 'shards/00000.json').exists() and not (tmp_path / 'shards/00001.json').exists()


# Clocks and addresses


def test_clocks_that_disagree(tmp_path):
    "Nothing compares the times of two machines: a reply from the year 1970 or 2100 is kept like any other."
    from kyara.ledger import Entry
    place, office = str(tmp_path / 'calls.sqlite'), Office(clock=lambda: 5.0)
    call = lambda name, *arguments: getattr(office, name)(*arguments)
    for number, when in enumerate((0.0, 4.1e9)):
        with RemoteLedger(call, place, f'shard/{number}', 'x') as ledger:
            assert ledger.claim(f'{number}' * 64)
            ledger.put_many([Entry(f'{number}' * 64, 'openai', 'm', {}, '好', time=when)])
    with Ledger(place) as ledger: assert [entry.time for entry in ledger.entries()] == [0.0, 4.1e9]


def test_silent_session_loses_its_claims(tmp_path):
    "A driver that died without a word does not hold a call for ever; one that is heard does."
    now, place = [0.0], str(tmp_path / 'calls.sqlite')
    office = Office(clock=lambda: now[0])
    for name in ('quiet', 'lively', 'other'): office.begin(place, name, 'x')
    office.look_up(place, 'quiet', 'x', ['a' * 64])
    office.look_up(place, 'lively', 'x', ['b' * 64])
    now[0] = 61.0
    office.hear(place, 'lively', 'x', [])
    assert office.look_up(place, 'other', 'x', ['a' * 64, 'b' * 64]) == ([], ['a' * 64])


def test_nobody_at_the_address(tmp_path):
    "A cluster that is not there is told in one line, at once."
    import socket
    import subprocess
    import sys
    pytest.importorskip('ray', reason='pip install "kyara[ray]"')
    from pathlib import Path
    with socket.socket() as place:
        place.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{place.getsockname()[1]}'
    command = Path(sys.executable).with_name('kyara')
    root = Path(__file__).parent.parent
    recipe = tmp_path / 'tiny.yaml'
    recipe.write_text("stages: {index: {notebook: 10_index, sources: ['sample:corpus'], max_documents: 3}}\n")
    script = f"from kyara.run import run_recipe; run_recipe({str(recipe)!r}, ['engine=ray', 'engine.address={address}'], nbs={str(root / 'nbs')!r})"
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert f'no Ray cluster answers at {address}' in done.stderr, done.stderr[-2000:]


# A recipe


RUN = '''
import sys
from kyara.run import run_recipe
run_recipe(sys.argv[1], sys.argv[4:], nbs=sys.argv[2], runs=sys.argv[3])
'''


def run_in(folder, recipe, *sets):
    "Run a recipe in a process of its own, with its own ledger."
    import subprocess
    import sys
    from pathlib import Path

    from nodes import light_start
    nbs = Path(__file__).parent.parent / 'nbs'
    folder.mkdir()
    environment = {**os.environ, **light_start(folder)}
    done = subprocess.run([sys.executable, '-c', RUN, str(recipe), str(nbs), str(folder), *sets], capture_output=True, text=True,
                          timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {stage: json.loads((folder / 'tiny' / stage / 'manifest.json').read_text()) for stage in ('index', 'synthesis')}


def test_recipe_on_ray_gives_the_same_artifacts(nodes, tmp_path):
    "`engine: ray` changes neither an artifact nor a count nor a parameter of a manifest."
    recipe = tmp_path / 'tiny.yaml'
    recipe.write_text("""
stages:
  index: {notebook: 10_index, sources: ['sample:corpus'], max_documents: 8}
  synthesis: {notebook: 11_synthesis, index: '{index}', max_chunks: 6, questions_per_chunk: 2, k: 2}
""")
    alone = run_in(tmp_path / 'alone', recipe)
    together = run_in(tmp_path / 'together', recipe, 'engine=ray', f'engine.address={nodes.address}', 'engine.workers=2')
    for manifests in (alone, together): del manifests['synthesis']['params']['index'] # The folder of that run
    assert alone['synthesis'] == together['synthesis'] and alone['synthesis']['counts']['kept'] > 3, together['synthesis']['counts']
    assert caller(open_office())('places').count(str(tmp_path / 'together/ledger.sqlite')) == 1
    with Ledger(tmp_path / 'alone/ledger.sqlite') as one, Ledger(tmp_path / 'together/ledger.sqlite') as other:
        calls = [{entry.call_id for entry in ledger.entries()} for ledger in (one, other)]
    assert calls[0] == calls[1] and len(calls[0]) > 30


# What it would take


def test_dry_run_asks_nobody_and_writes_nothing(tmp_path, capsys, monkeypatch):
    "The estimate of the published recipe: no key, no network; calls grow with what is assumed."
    from pathlib import Path

    from kyara.run import main
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.delenv('GEMINI_API_KEY', raising=False)
    before, calls = sorted(Path('runs').iterdir()), []
    for chunks in (1000, 2000):
        assert main(['run', 'runs/kyara.yaml', '--dry-run', '--assume', f'index={chunks}']) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('synthesis'))
        calls.append(int(line.split()[2].replace(',', '')))
    assert calls[0] > 3000 and abs(calls[1] - 2 * calls[0]) <= 1 and sorted(Path('runs').iterdir()) == before
    assert main(['run', 'runs/kyara.yaml', '--dry-run', '--assume', 'nix=3']) == 2 and 'nix=3' in capsys.readouterr().err


@pytest.mark.parametrize('engine, word', [('spark', 'spark'), ('{name: ray, worker: 2}', 'worker'), ('{workers: -1}', 'workers')])
def test_engine_that_is_not_understood(tmp_path, engine, word):
    from kyara.run import load_recipe
    from pathlib import Path
    recipe = tmp_path / 'tiny.yaml'
    recipe.write_text(f"engine: {engine}\nstages: {{index: {{notebook: 10_index, sources: ['sample:corpus']}}}}\n")
    with pytest.raises(UserError, match=f'engine.*{word}'): load_recipe(recipe, nbs=Path(__file__).parent.parent / 'nbs')
