"Beyond one machine: real Ray nodes as processes, one of them killed; a ledger and limits for all of them."
import functools
import json
import os
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from loopback import ECHO, serve
from nodes import ray_nodes

from kyara.cluster import (Failed, LocalEngine, Office, RayEngine, RemoteLedger, Store, ask_in_shards, caller, cluster_of,
                           open_office, over_shards, read_engine, shard_table)
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
    "Every row is there, as without Ray; asked twice is at most what the dead node had under way or not yet handed in."
    asked, replies, victim = requests(1200), [], nodes.add()
    nodes.warm(victim, 3)
    with serve(latency=0.05) as server:
        settings = loopback(server)
        with nodes.killing(victim, server, 150) as killed:
            budget = ask_in_shards(asked, settings, replies.append, engine=RayEngine(3), ledger=tmp_path / 'calls.sqlite',
                                   stage='synthesis', run='demo', shard_size=100)
        stats = server.stats()
        alone = []
        spent = ask_each(asked, settings, alone.append, ledger=tmp_path / 'alone.sqlite')
    assert killed and killed[0] < 1200, killed
    assert plain(replies) == plain(alone)
    again, share = sum(count - 1 for count in stats.calls.values()), 16 // 3 # Of the calls that a worker may have under way
    assert len(stats.whole) == 1200 and stats.cut <= share and again <= share + share // 4, (again, stats.cut)
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
        deadline = time.monotonic() + 300
        call('begin', place, 'b', '1')
        while call('look_up', place, 'b', '1', ['a' * 64])[1]:
            call('give', place, 'b', '1', ['a' * 64])
            assert time.monotonic() < deadline, 'the claim was never told again'
            time.sleep(0.1)


def always(shard):
    if '壞' in shard: raise RuntimeError('這一片總是失敗')
    return [{'text': text, 'span': (0, len(text))} for text in shard]


def test_shard_that_always_fails(nodes, tmp_path):
    "It is tried, then named; all others are finished, and the ledger loses nothing."
    for engine in (LocalEngine(), RayEngine(2)):
        got = list(engine.map(always, [['好'], ['壞'], ['也好']], attempts=2))
        assert [type(one) for one in got] == [list, Failed, list] and '總是失敗' in got[1].reason, got


def test_no_more_is_drawn_than_workers_bear(nodes):
    "However long the list is, two shards a worker wait, or as many as may be at work at once."
    for most, window in ((0, 4), (1, 1)):
        drawn = []
        shards = ([str(number)] for number in range(24) if not drawn.append(number))
        for done, result in enumerate(RayEngine(2).map(always, shards, most=most), 1):
            assert result == always([str(done - 1)]) and len(drawn) == min(24, done + window)


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
    from pathlib import Path

    import kyara
    from kyara.cluster import package_versions
    shutil.copytree(Path(kyara.__file__).parent, tmp_path / 'kyara', ignore=shutil.ignore_patterns('data', '__pycache__'))
    source = (tmp_path / 'kyara/__init__.py').read_text()
    (tmp_path / 'kyara/__init__.py').write_text(source.replace(kyara.__version__, '0.0.9'))
    script = f'from kyara.cluster import run_shard; print(run_shard(len, [1], {package_versions()!r}))'
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
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
        deadline = time.monotonic() + 300
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


@contextmanager
def working(**engine):
    "Work as a stage does whose run was started with this engine."
    with cluster_of(read_engine(engine)): yield


def noted(texts, book):
    "Do what `always` does, and note it down."
    with open(book, 'a') as file: file.write('x')
    return always(texts)


def test_finished_shards_on_s3(bucket, tmp_path, monkeypatch):
    "The same results from the bucket as from work; what went in decides, and nothing is made twice."
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'test')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'test')
    texts, book = ['玉山', '雪山', '濁水溪', '高屏溪'], tmp_path / 'book'
    work = functools.partial(noted, book=str(book))
    with working(store=bucket):
        first = list(over_shards(work, texts, size=2))
        assert list(over_shards(work, texts, size=2)) == first == always(texts) and book.read_text() == 'xx'
        list(over_shards(work, [*texts[:2], '大甲溪'], size=2))
    assert book.read_text() == 'xxx'
    row, = shard_table(Store(bucket))
    assert row['function'] == 'test_cluster.noted' and row['shards'] == 3
    (tmp_path / 'large').write_bytes(os.urandom(9 * 2**20)) # Files of stages go in pieces
    Store(bucket).send(tmp_path / 'large', 'stages/x/stage/large')
    Store(bucket).fetch('stages/x/stage/large', tmp_path / 'there/large')
    assert (tmp_path / 'there/large').read_bytes() == (tmp_path / 'large').read_bytes()
    with pytest.raises(UserError, match='is not there'): Store(bucket).fetch('stages/x/none', tmp_path / 'none')


def test_what_cannot_be_written_down_is_made_each_time(tmp_path):
    "Neither a pickle nor a wrong key: a set in the result, a lambda among the arguments, an object that went in."
    with working(store=str(tmp_path / 'store')):
        assert list(over_shards(as_sets, ['玉山'])) == [{'玉', '山'}]
        assert list(over_shards(functools.partial(changed, by=lambda text: text * 2), ['玉山'])) == ['玉山玉山']
        assert list(over_shards(named, [Failed('x')])) == ['Failed']
        assert list(over_shards(functools.partial(changed, by=str.upper), ['jade'])) == ['JADE']
        assert list(over_shards(functools.partial(changed, by=str.title), ['jade'])) == ['Jade']
    assert not shard_table(Store(str(tmp_path / 'store')))


def as_sets(texts): return [set(text) for text in texts]
def changed(texts, by): return [by(text) for text in texts]
def named(things): return [type(thing).__name__ for thing in things]


def test_damaged_shard_is_made_again(tmp_path):
    "Cut, changed or foreign bytes are not taken for a result."
    with working(store=str(tmp_path)):
        right = list(over_shards(always, ['玉山']))
        place, = tmp_path.rglob('*.json.gz')
        whole = place.read_bytes()
        for damaged in (b'', whole[:-9], b'PAR1', whole[:-12] + bytes([whole[-12] ^ 1]) + whole[-11:]):
            place.write_bytes(damaged)
            assert list(over_shards(always, ['玉山'])) == right and place.read_bytes() == whole


SLOW = '''
import time
def slow(texts):
    with open({book!r}, 'a') as book: book.write(texts[0])
    time.sleep(0.3)
    return [text * 2 for text in texts]
'''


def test_run_killed_in_the_middle_goes_on_from_its_shards(tmp_path):
    "After SIGKILL at most one shard is made again, also by another process with the same store."
    import signal
    import subprocess
    book = tmp_path / 'book'
    (tmp_path / 'slowly.py').write_text(SLOW.format(book=str(book)))
    script = f'''
import slowly
from kyara.cluster import cluster_of, over_shards, read_engine
with cluster_of(read_engine({{'store': {str(tmp_path / 'store')!r}}})): print(''.join(over_shards(slowly.slow, 'ABCDEFGH', size=1)))
'''
    command = [sys.executable, '-c', script]
    process = subprocess.Popen(command, cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not book.exists() or len(book.read_text()) < 4: assert time.monotonic() < deadline and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(book.read_text())
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == 'AABBCCDDEEFFGGHH', done.stderr
    assert before < 8 and 8 <= len(book.read_text()) <= 9, book.read_text()


def test_storage_that_fills_up(tmp_path):
    "One line that names the place; what was finished stays, and no half of a file."
    import subprocess
    (tmp_path / 'large.py').write_text("""
from kyara.core import content_hash
def large(sizes): return [[content_hash([size, n], 64) for n in range(size)] for size in sizes]
""")
    script = f'''
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import large
from kyara.cluster import cluster_of, over_shards, read_engine
from kyara.core import UserError
try:
    with cluster_of(read_engine({{'store': 'store'}})): list(over_shards(large.large, [10, 2000, 20], size=1))
except UserError as error: print(error)
'''
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert 'cannot be written' in done.stdout and 'make room' in done.stdout, done.stdout + done.stderr[-2000:]
    assert len([path for path in (tmp_path / 'store').rglob('*') if path.is_file()]) == 1


def test_shards_of_a_stage_on_workers(nodes, tmp_path):
    "On Ray as here; a shard that always fails stops the stage when all others are kept, or leaves what stands for it."
    texts = [f'第{number}座山' for number in range(20)]
    ray_engine = dict(name='ray', address=nodes.address, workers=2, store=str(tmp_path / 'store'))
    lost = lambda text, reason: f'{text}: {reason}'
    with cluster_as_joined(nodes, ray_engine):
        assert list(over_shards(always, texts, size=3)) == always(texts)
        with pytest.raises(UserError, match='1 shards failed for good .*總是失敗'):
            list(over_shards(always, [*texts[:3], '壞', *texts[3:]], size=3, failed=lost))
        kept = shard_table(Store(str(tmp_path / 'store')))[0]['shards']
        assert kept == 7 + 5, kept # The first is in both lists, and the one with 壞 was never finished
    with cluster_as_joined(nodes, {**ray_engine, 'failed_shards': 'drop'}):
        got = list(over_shards(always, ['山', '壞', '水'], size=1, failed=lost))
    assert got[0] == always(['山'])[0] and got[2] == always(['水'])[0] and got[1].startswith('壞: RuntimeError'), got


@contextmanager
def cluster_as_joined(nodes, engine):
    "As `cluster_of`, which would leave the cluster at its end."
    from nodes import environment
    with environment(KYARA_ENGINE=json.dumps(read_engine(engine))): yield


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
    pytest.importorskip('ray', reason='pip install "kyara[ray]"')
    from pathlib import Path
    root = Path(__file__).parent.parent
    recipe = tmp_path / 'tiny.yaml'
    recipe.write_text("stages: {index: {notebook: 10_index, sources: ['sample:corpus'], max_documents: 3}}\n")
    with socket.socket() as place: # Bound, so that nobody else gets it, and nobody listens
        place.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{place.getsockname()[1]}'
        script = f"from kyara.run import run_recipe; run_recipe({str(recipe)!r}, ['engine=ray', 'engine.address={address}'], nbs={str(root / 'nbs')!r})"
        done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert f'no Ray cluster answers at {address}' in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize('answer, said', [(b'HTTP/1.1 400 Bad Request\r\n\r\n', 'something else listens there'), (b'SSH-2.0', 'something else listens there'),
                                          (b'', 'timed out')])
def test_something_else_at_the_address(answer, said, monkeypatch):
    "A web server, another service or one that keeps silent is told from Ray by the first frame, and Ray is not asked to try."
    import socket
    from kyara import cluster
    ray = pytest.importorskip('ray', reason='pip install "kyara[ray]"')
    monkeypatch.setattr(ray, 'is_initialized', lambda: False)
    monkeypatch.setattr(ray, 'init', lambda **_: pytest.fail('Ray was asked to try'))
    monkeypatch.setattr(cluster, 'listens_for_ray', functools.partial(cluster.listens_for_ray, patience=1))
    done = threading.Event()
    def serve(place):
        line, _ = place.accept()
        with line:
            line.recv(100)
            line.sendall(answer)
            if not answer: done.wait(60)
    with socket.create_server(('127.0.0.1', 0)) as place:
        server = threading.Thread(target=serve, args=[place])
        server.start()
        address = f'127.0.0.1:{place.getsockname()[1]}'
        with pytest.raises(UserError, match=f'no Ray cluster answers at {address} .{said}.; start one'): cluster.connect(address)
        done.set()
        server.join()


def test_cluster_that_starts_too_slowly(tmp_path, monkeypatch):
    "Ray's own words, which it raises as a bare `Exception`, become one line with what to do."
    import inspect
    ray = pytest.importorskip('ray', reason='pip install "kyara[ray]"')
    said = 'The current node timed out during startup. This '
    assert said in inspect.getsource(sys.modules['ray._private.node'])
    def init(*_, **__): raise Exception(f'{said}could happen because some of the raylet failed to startup')
    monkeypatch.setattr(ray, 'init', init)
    with pytest.raises(UserError, match='did not start on this machine in time.*less busy.*ray start --head'):
        with cluster_of(read_engine('ray')): raise AssertionError('it goes on without a cluster')


# A recipe


RUN = '''
import sys
from kyara.run import run_recipe
run_recipe(sys.argv[1], sys.argv[4:], nbs=sys.argv[2], runs=sys.argv[3])
'''


def without_lessons(nbs, target):
    "Copy stage notebooks without their lessons, which would take most of the time; what they import stays."
    import ast
    target.mkdir(exist_ok=True)
    for path in nbs.glob('1*.ipynb'):
        notebook, run = json.loads(path.read_text()), False
        for cell in notebook['cells']:
            source = ''.join(cell['source'])
            run = run or 'parameters' in cell['metadata'].get('tags', [])
            if run or cell['cell_type'] != 'code' or source.startswith('#| export'): continue
            imports = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
            cell['source'] = '\n'.join(ast.unparse(node) for node in imports)
        (target / path.name).write_text(json.dumps(notebook))
    return target


def run_in(folder, recipe, *sets):
    "Run a recipe in a process of its own, with its own ledger."
    import subprocess
    from pathlib import Path

    from nodes import light_start
    nbs = without_lessons(Path(__file__).parent.parent / 'nbs', recipe.parent / 'nbs')
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, **light_start(folder)}
    done = subprocess.run([sys.executable, '-c', RUN, str(recipe), str(nbs), str(folder), *sets], capture_output=True, text=True,
                          timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, {path.parent.name: json.loads(path.read_text()) for path in (folder / 'tiny').glob('*/manifest.json')}


RECIPE = """
stages:
  index: {notebook: 10_index, sources: ['sample:corpus'], max_documents: 8}
  math: {notebook: 12_math, max_problems: 24, held_out: 4, solvers: [offline, offline, offline-careless]}
  synthesis: {notebook: 11_synthesis, index: '{index}', max_chunks: 6, questions_per_chunk: 2, k: 2}
  base: {notebook: 13_base, sources: ['{synthesis}', '{math}', 'sample:dialogues_en'], held_out: ['{math}/held_out']}
  curation: {notebook: 14_curation, sources: ['{base}'], max_rows: 12}
  preference: {notebook: 16_preference, sources: ['{curation}'], prompts: ['{math}'], outcomes: ['{math}'], public: [], max_prompts: 4,
               calibration: [], held_out_items: ['{math}/held_out'], held_out: 2, max_tokens: 64}
  evaluation: {notebook: 18_evaluation, models: {teacher: offline}, benchmarks: {math-held-out: '{math}/held_out'}}
"""


def test_recipe_on_ray_gives_the_same_artifacts(nodes, tmp_path):
    "`engine: ray` changes neither an artifact nor a count nor a parameter; another machine takes all of it from the store."
    recipe, store = tmp_path / 'tiny.yaml', f'engine.store={tmp_path / "store"}'
    recipe.write_text(RECIPE)
    _, alone = run_in(tmp_path / 'alone', recipe)
    _, together = run_in(tmp_path / 'together', recipe, 'engine=ray', f'engine.address={nodes.address}', 'engine.workers=2', store)
    assert len(alone) == 7 and alone['synthesis']['counts']['kept'] > 3 and alone['math']['counts']['kept'] > 3, alone
    assert all(manifest['outputs'] for manifest in alone.values())
    for stage in alone: assert without_folders(alone[stage], 'alone') == without_folders(together[stage], 'together'), stage
    assert caller(open_office())('places').count(str(tmp_path / 'together/ledger.sqlite')) == 1
    with Ledger(tmp_path / 'alone/ledger.sqlite') as one, Ledger(tmp_path / 'together/ledger.sqlite') as other:
        calls = [{entry.call_id for entry in ledger.entries()} for ledger in (one, other)]
    assert calls[0] == calls[1] and len(calls[0]) > 100, len(calls[0])
    functions = {row['function'].split('.')[1] for row in shard_table(Store(str(tmp_path / 'store')))}
    assert {'synthesis', 'evidence'} <= functions, functions
    (tmp_path / 'together/tiny').rename(tmp_path / 'elsewhere')
    said, again = run_in(tmp_path / 'together', recipe, store)
    assert said.count('taken from the store') == 7 and again == together, said


def without_folders(manifest, folder):
    "Leave out where the run lay."
    return json.loads(json.dumps(manifest).replace(f'/{folder}/', '/'))


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
