"The command line as a shell sees it: exit codes, one line on stderr for every mistake, and what programs read."
import gzip, json, os, shutil, signal, socket, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from kyara.run import main

ROOT = Path(__file__).parent.parent
PATIENCE = 600 # Seconds: only what hangs takes as long
COMMAND = [sys.executable, '-c', 'import sys; from kyara.run import main; sys.exit(main())']
YUSHAN = '玉山主峰海拔3,952公尺，是臺灣最高的山。'
TURNS = [{'role': 'user', 'content': '小美有3顆芭樂，又買了2顆，現在共有幾顆？'}]
SETTINGS = '''[model.keyed]
provider = openai
model = m
api_key_env = KYARA_TEST_NO_KEY
[model.nobody]
provider = openai
model = m
base_url = http://127.0.0.1:9/v1
[model.idle]
provider = offline
model = careful
concurrency = 0
'''

def kyara(*words, folder, text='', **environment):
    "Run the command in a process of its own."
    return subprocess.run([*COMMAND, *map(str, words)], cwd=folder, input=text, capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=PATIENCE)

def write(folder, name, content):
    "Write a file of the workspace: text, bytes, or what JSON can hold."
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (dict, list)): content = json.dumps(content, ensure_ascii=False)
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8'))

def lines(*rows):
    "Write rows as JSONL."
    return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)

FILES = {
    'settings.ini': SETTINGS, 'empty.jsonl': '', 'broken.jsonl': '{broken\n', 'binary.txt': b'\xff\xfe\xa1\xa1',
    'fake.jsonl.gz': b'no gzip', 'fake.parquet': b'no',
    'prompts.jsonl': lines({'id': 'a', 'messages': TURNS}), 'note.txt': '這是一份筆記。\n',
    'answer.txt': '玉山主峰海拔3,952公尺【id_27025b13】。玉山主峰海拔4,000公尺【id_27025b13】。',
    'documents.json': {'id_27025b13': YUSHAN}, 'numbers.json': [1, 2], 'three.json': '3', 'schema.json': {}, 'deep.json': '[' * 100_000, 'no_text.json': [{'id': 'id_1'}],
    'outputs.jsonl': lines(*[{'id': name, 'answer': '7', 'output': f'{{"answer": "{said}"}}'} for name, said in ('17', '28')]),
    'no_output.jsonl': lines({'id': '1', 'answer': '7'}),
    'twice.jsonl': lines(*[{'id': '1', 'answer': '7', 'output': '7'}] * 2),
    'zebra.jsonl': lines({'id': 'lgp-test-2x2-1', 'output': '{"solution": {}}', 'solution': 5}),
    'subjects.csv': 'subject,n,m\nphysics,many,0.5\n',
    'damaged/knowledge_base.json': '{"loca',
    'runs/index.yaml': 'stages:\n  index:\n    notebook: 10_index\n',
    'runs/synthesis.yaml': 'stages:\n  synthesis:\n    notebook: 11_synthesis\n    index: kb\n',
    'runs/sft.yaml': 'stages:\n  sft:\n    notebook: 15_sft\n    sources: [sample:dialogues_en]\n'}

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A workspace with the real notebooks, small files and a knowledge base."
    from kyara.index import KnowledgeBase
    folder = tmp_path_factory.mktemp('workspace')
    for name, content in FILES.items(): write(folder, name, content)
    (folder / 'nbs').mkdir()
    for name in ('10_index', '11_synthesis', '15_sft'): shutil.copy(ROOT / f'nbs/{name}.ipynb', folder / 'nbs')
    (folder / 'bare').mkdir()
    document = {'doc_id': 'yushan', 'title': '玉山', 'text': YUSHAN}
    with KnowledgeBase.build([document], folder / 'kb', chunk=False) as kb:
        assert kb.search([YUSHAN], 1)[0][0].doc_id == 'yushan'
    return folder

@pytest.fixture
def inside(place, monkeypatch):
    "The same as the current folder."
    monkeypatch.chdir(place)
    monkeypatch.delenv('KYARA_SETTINGS', raising=False)
    return place

# Mistakes: one line, exit code 2

DRY = ['run', 'runs/index.yaml', '--dry-run']
SYNTHESIS = ['run', 'runs/synthesis.yaml', '--dry-run', '--assume', 'synthesis=10', '--set']
ASK = ['ask', '--ledger', 'calls.sqlite', '--out', 'replies.jsonl']
OFFLINE = [*ASK, '--model', 'offline', '--in', 'prompts.jsonl']
MISTAKES = [ # Words, then what the line must say
    ([], 'required: COMMAND'), (['frobnicate'], "invalid choice: 'frobnicate'"), (['-x'], 'unrecognized arguments: -x'),
    (['run'], 'required: recipe; see kyara run --help'),
    (['lint', '--frob'], '--frob'), (['ledger', 'burn', 'x'], "invalid choice: 'burn'"),
    (['trace', 'x'], '--run'), (['report', ''], 'argument run: it is empty'),
    (['run', 'bare'], 'Is a directory'), (['run', 'settings.ini'], 'is not YAML'),
    (['run', 'binary.txt'], 'is not UTF-8'),
    (['run', 'runs/index.yaml', '--set', 'index.sources=[3]'], '3 is no text'),
    (['run', 'runs/index.yaml', '--set', 'index.sources=[none.jsonl]'], 'none.jsonl does not exist'),
    (['run', 'runs/sft.yaml', '--set', 'sft.model=runs/none/model'], 'there is no folder runs/none/model'),
    (['run', 'runs/index.yaml', '--assume', 'index=5'], '--assume is for an estimate; add --dry-run'),
    (['run', 'runs/index.yaml', '--only', ''], 'argument --only: it is empty'),
    (['run', 'runs/index.yaml', '--from', ''], 'argument --from: it is empty'),
    *[([*DRY, *words], f'{words[0]} says what runs') for words in (['--from', 'index'], ['--only', 'index'], ['--fresh'])],
    *[([*DRY, '--assume', text], f'--assume {text} is not of the form') for text in ('index=²', 'index=-5', 'index', 'indxe=5')],
    ([*DRY, '--set', 'index.chunk_size=300,400'], 'name one value of each'),
    ([*DRY, '--set', 'index.max_documents=-3'], 'stage index: max_documents is -3; write a number from 0'),
    ([*SYNTHESIS, 'synthesis.rag_share=.nan'], 'rag_share is nan'),
    ([*SYNTHESIS, 'synthesis.rag_share=2'], 'stage synthesis: its shares come to more than 1'),
    (['status', '.'], 'is no run'), (['status', 'settings.ini'], 'is no run'),
    (['status', 'runs/indxe'], "did you mean 'index'"),
    (['report', 'bare'], 'no finished stage'), (['trace', 'x', '--run', 'bare'], 'no finished stage'),
    (['search', '', '--kb', 'kb'], 'argument question: it is empty'), (['search', '玉山', '--kb', ''], 'argument --kb: it is empty'),
    (['search', '玉山', '--kb', 'kb', '-k', '0'], 'no whole number from 1'),
    (['search', '玉山', '--kb', 'bare'], 'is no knowledge base'),
    (['search', '玉山', '--kb', 'damaged'], 'is damaged; run the index stage again'),
    (['search', '玉山', '--kb', 'qdrant:books'], '[qdrant] url'),
    (['search', '玉山', '--kb', 'http://127.0.0.1:9/books'], 'no Qdrant server'),
    ([*OFFLINE, '--model', 'ofline'], "no model named 'ofline'; settings.ini has idle, keyed, nobody, offline"),
    ([*OFFLINE, '--model', 'keyed'], 'environment variable KYARA_TEST_NO_KEY'),
    ([*OFFLINE, '--model', 'idle'], 'concurrency 0'),
    ([*OFFLINE, '--model', 'nobody'], 'does not answer'), ([*OFFLINE, '--in', 'none.jsonl'], 'is no file'),
    ([*OFFLINE, '--in', 'bare'], 'is no file'), ([*OFFLINE, '--in', 'fake.jsonl.gz'], 'cannot be read'),
    ([*OFFLINE, '--out', 'bare'], 'cannot be written'), ([*OFFLINE, '--out', ''], 'cannot be written'),
    ([*OFFLINE, '--out', '/proc/none/replies.jsonl'], 'cannot be written'),
    *[([*OFFLINE, '--out', name], f'{name} would be overwritten') for name in ('prompts.jsonl', './prompts.jsonl', 'calls.sqlite')],
    ([*OFFLINE, '--schema', 'schema.json', '--out', 'schema.json'], 'schema.json would be overwritten'),
    ([*OFFLINE, '--in', '-'], "'-' is no file"),
    ([*OFFLINE, '--ledger', 'bare'], 'is not a file'),
    ([*OFFLINE, '--ledger', 'settings.ini'], 'not a database'),
    ([*OFFLINE, '--concurrency', '0'], 'no whole number from 1'),
    ([*OFFLINE, '--max-cost', '-1'], 'no number'), ([*OFFLINE, '--max-cost', 'nan'], 'no number'),
    (['cite', '--answer', 'binary.txt', '--documents', 'documents.json'], 'is not UTF-8'),
    (['cite', '--answer', 'none.txt', '--documents', 'documents.json'], 'is no file'),
    *[(['cite', '--answer', 'answer.txt', '--documents', name], part) for name, part in {
        'broken.jsonl': 'line 1 is not a JSON object', 'three.json': 'no JSON object or list', 'numbers.json': 'has no id',
        'no_text.json': 'has no id or no text', 'fake.jsonl.gz': 'cannot be read', 'settings.ini': 'no JSON object or list',
        'fake.parquet': 'no JSON object or list', 'deep.json': 'no JSON object or list', '-': "'-' is no file"}.items()],
    (['lint', 'binary.txt'], 'is not UTF-8'), (['lint', 'bare'], 'is no file'),
    (['lint', 'binary.txt', '--fix'], 'is not UTF-8'), (['lint', 'note.txt', '--fix', '--json'], '--json: not allowed with argument --fix'),
    (['lint', '/proc/version', '--fix'], 'written'),
    *[(['score', *words], part) for words, part in [
        (['gsm9k', 'outputs.jsonl'], 'did you mean gsm8k'), (['gsm8k', 'none.jsonl'], 'is no file'),
        (['gsm8k', 'empty.jsonl'], 'no rows'),
        (['gsm8k', 'broken.jsonl'], 'line 1 is not JSON'), (['gsm8k', 'fake.jsonl.gz'], 'not gzip'),
        (['gsm8k', 'no_output.jsonl'], 'no output'),
        (['gsm8k', 'twice.jsonl'], 'stand twice'), (['gsm8k', 'outputs.jsonl', '--rule', 'v9'], "no rule 'v9'"),
        (['gsm8k', 'outputs.jsonl', '--data', 'none'], 'not a folder'),
        (['gsm8k', 'outputs.jsonl', '--out', 'bare'], 'cannot be written'),
        *[(['gsm8k', 'outputs.jsonl', option, ''], f'argument {option}: it is empty') for option in ('--out', '--rule', '--data', '--items')],
        (['gsm8k', 'outputs.jsonl', '--partial', '--out', 'outputs.jsonl'], 'outputs.jsonl would be overwritten'),
        (['zebra-grid', 'zebra.jsonl'], 'another form'), (['tmmluplus', 'subjects.csv'], 'another form'),
        (['arena-hard', 'outputs.jsonl'], 'needs')]],
    (['ledger', 'stats', 'settings.ini'], 'not a database'), (['ledger', 'verify', 'bare'], 'is no file'),
    (['ledger', 'stats', 'calls.sqlite', '--out', 'calls.jsonl'], '--out does nothing for stats'),
    (['ledger', 'verify', 'calls.sqlite', '--json'], '--json does nothing for verify'),
    (['ledger', 'export', 'calls.sqlite', '--out', ''], 'argument --out: it is empty'),
]

@pytest.mark.parametrize('words, part', MISTAKES, ids=[' '.join(words)[:70] for words, _ in MISTAKES])
def test_a_mistake_gets_one_line(inside, capsys, monkeypatch, words, part):
    monkeypatch.delenv('KYARA_TEST_NO_KEY', raising=False)
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert error.startswith('kyara: ') and error.count('\n') == 1 and part in error, error
    assert out == '', out

VARIABLES = [ # Name, value, what the line must say; told before any work, whatever the command
    ('KYARA_SETTINGS', 'none.ini', 'KYARA_SETTINGS names none.ini, which is not a file'),
    ('KYARA_SETTINGS', 'bare', 'KYARA_SETTINGS names bare, which is not a file'),
    ('KYARA_REPLAY', 'banana', "KYARA_REPLAY is 'banana'; set it to 1")]
COMMANDS = [['run', 'runs/index.yaml'], DRY, ['status', 'runs/index.yaml'], ['search', '玉山', '--kb', 'kb'], OFFLINE]

@pytest.mark.parametrize('name, value, part', [
    *VARIABLES, ('KYARA_ENGINE', 'nonsense', 'KYARA_ENGINE is what a run tells its own notebooks; unset it')])
def test_variables_are_checked_before_any_work(inside, capsys, monkeypatch, name, value, part):
    monkeypatch.setenv(name, value)
    for words in COMMANDS[:2] if name == 'KYARA_ENGINE' else COMMANDS:
        assert main(words) == 2
        out, error = capsys.readouterr()
        assert error.startswith(f'kyara: {part}') and error.count('\n') == 1 and out == '', (words, error, out)

@pytest.mark.skipif(not Path('/proc/self/mem').exists(), reason='needs a file that nobody can read from its start')
def test_settings_that_cannot_be_read_are_not_passed_over(inside, capsys, monkeypatch):
    monkeypatch.setenv('KYARA_SETTINGS', '/proc/self/mem')
    assert main(OFFLINE) == 2
    error = capsys.readouterr().err
    assert '/proc/self/mem cannot be read' in error and error.count('\n') == 1, error

BAD_SETTINGS = {'temprature = 1': 'unknown key temprature', 'timeout = soon': "'soon'", 'timeout = -5': 'timeout -5 is no number from 0',
                'price_input = nan': 'price_input nan is no number from 0', 'concurrency = 0': 'concurrency 0 is no number from 1', 'provider = magic': "provider 'magic'",
                'model = clever': "no model 'clever'", 'garbage': 'cannot be read'}

@pytest.mark.parametrize('line', BAD_SETTINGS)
def test_settings_are_checked(inside, tmp_path, capsys, monkeypatch, line):
    given = dict([line.split(' = ')]) if ' = ' in line else {}
    keys = {'provider': 'offline', 'model': 'careful', **given}
    body = ''.join(f'{key} = {value}\n' for key, value in keys.items()) if given else line
    write(tmp_path, 'settings.ini', f'[model.mine]\n{body}' if given else body)
    monkeypatch.setenv('KYARA_SETTINGS', str(tmp_path / 'settings.ini'))
    assert main([*OFFLINE, '--model', 'mine', '--ledger', f'{tmp_path}/calls.sqlite']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and BAD_SETTINGS[line] in error, error

def test_a_shell_sees_the_same(place):
    "Exit codes and both streams of real processes, two at a time."
    calls = [(['frobnicate'], '', 2), (['search', '玉山', '--kb', 'none'], '', 2), (['lint'], '這個軟件', 0),
             (['lint', '--fix'], '軟件\r\n', 0), (['lint', '--json'], '', 0), (['--version'], '', 0),
             ([*OFFLINE, '--in', 'broken.jsonl', '--out', 'failed.jsonl'], '', 3)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda call: kyara(*call[0], folder=place, text=call[1]), calls))
    assert [one.returncode for one in done] == [code for _, _, code in calls], [one.stderr for one in done]
    assert [len(one.stderr.splitlines()) for one in done] == [1, 1, 0, 0, 0, 0, 0], [one.stderr for one in done]
    assert '軟體' in done[2].stdout and done[3].stdout.startswith('軟體') and json.loads(done[4].stdout) == []

def test_help_waits_for_no_heavy_library(place):
    "Half a second is what an interpreter and argparse take; anything heavy would show among the modules."
    code = "import sys; from kyara.run import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\nprint(*sys.modules)"
    for words in (['--help'], ['score', '--help']):
        told = subprocess.run([sys.executable, '-c', code, *words], cwd=place, capture_output=True, text=True, timeout=PATIENCE)
        loaded = set(told.stdout.splitlines()[-1].split())
        assert told.stdout.startswith('usage: kyara') and 'argparse' in loaded, told.stderr
        assert not loaded & HEAVY and len(loaded) < 300, (loaded & HEAVY, len(loaded))

HEAVY = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'pandas', 'pyarrow', 'matplotlib', 'sympy', 'opencc', 'jieba',
         'yaml', 'aiohttp', 'qdrant_client', 'qdrant_edge', 'papermill', 'nbformat', 'IPython', 'pydantic', 'asyncio'}

def test_bash_completes_commands_and_options(place):
    script = kyara('completion', 'bash', folder=place).stdout
    words = 'COMP_WORDS=({}); COMP_CWORD={}; COMPREPLY=(); {} kyara; echo "${{COMPREPLY[@]}}"'
    function = script.split(' -F ')[-1].split()[0]
    told = [subprocess.run(['bash', '-c', script + '\n' + words.format(line, len(line.split()) - 1, function)], capture_output=True,
                           text=True, timeout=PATIENCE).stdout.split() for line in ('kyara re', 'kyara run --dr')]
    assert told == [['report'], ['--dry-run']], told

def test_a_pipe_that_closes_early_is_no_error(place):
    write(place, 'long.txt', '這個軟件很好用。\n' * 5000)
    reader = subprocess.Popen(['head', '-n', '1'], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    writer = subprocess.run([*COMMAND, 'lint', 'long.txt'], cwd=place, stdout=reader.stdin, stderr=subprocess.PIPE,
                            text=True, timeout=PATIENCE)
    reader.stdin.close()
    assert reader.wait(PATIENCE) == 0 and (writer.returncode, writer.stderr) == (0, '')

# What a table shows

def test_an_estimate_hides_no_name():
    "Two models whose folders end alike, and a stage with a long name; columns still stand below each other."
    from kyara.estimate import estimate_lines
    stage, models = 'synthesis_of_what_is_new', [f'../runs/a_recipe_with_a_long_name/{name}/sft/model' for name in 'ab']
    rows = [{'stage': stage, 'model': model, 'calls': 7, 'read': 8, 'written': 9, 'cost': 0.0, 'hours': None} for model in models]
    head, *told, total = estimate_lines(rows, [])
    assert [line.split()[:3] for line in told] == [[stage, f'{name}/sft/model', '7'] for name in 'ab'], told
    assert len({line.index(number) for line, number in ((told[0], ' 7 '), (told[1], ' 7 '), (total, '14 '))}) == 1, (told, total)
    assert len({line.index('0.00') for line in (*told, total)}) == 1 and head.index('calls') + 4 == told[0].index(' 7 ') + 1

def test_an_estimate_takes_odd_caps_and_weights(tmp_path, monkeypatch):
    "A cap that is no number is named; a pool that settings.ini gives no weight is asked nothing."
    from kyara.core import UserError
    from kyara.estimate import preference_calls, source_sizes
    stage = SimpleNamespace(name='base', params={'sources': ['hf:some/set'], 'caps': {'some/set': 'many'}})
    with pytest.raises(UserError, match="stage base: the cap of hf:some/set is 'many'; write a whole number"):
        source_sizes(stage, tmp_path, 0)
    write(tmp_path, 'settings.ini', '[model.light]\nprovider = offline\nmodel = careful\nweight = 0\n')
    monkeypatch.setenv('KYARA_SETTINGS', str(tmp_path / 'settings.ini'))
    needs, _ = preference_calls(0, {'pool': ['light'], 'max_prompts': 5, 'model': 'offline'})
    assert [(need.model, need.calls) for need in needs] == [('light', 0), ('offline', 0)], needs

# What programs read

def test_search_prints_hits(inside, capsys):
    assert main(['search', '玉山有多高', '--kb', 'kb', '-k', '3', '--json']) == 0
    hit, = json.loads(capsys.readouterr().out)
    assert {'id', 'doc_id', 'title', 'text', 'start', 'end', 'score'} <= hit.keys()
    assert (hit['doc_id'], hit['text'], hit['start'], hit['end']) == ('yushan', YUSHAN, 0, len(YUSHAN))
    assert main(['search', '玉山有多高', '--kb', 'kb', '--source', 'nowhere']) == 0 and capsys.readouterr().out == 'nothing found\n'
    assert main(['search', '？！', '--kb', 'kb']) == 0 and capsys.readouterr().out == 'nothing found\n'

def test_documents_may_come_as_text_rows_or_parquet(inside, capsys):
    import pyarrow as pa, pyarrow.parquet as pq
    rows = [{'id': 'id_27025b13', 'title': '玉山', 'text': YUSHAN}]
    pq.write_table(pa.Table.from_pylist(rows), 'documents.parquet')
    write(inside, 'marked.json', b'\xef\xbb\xbf' + json.dumps(rows).encode())
    write(inside, 'documents.jsonl.gz', gzip.compress(lines(*rows).encode()))
    for name in ('documents.json', 'documents.parquet', 'marked.json', 'documents.jsonl.gz'):
        assert main(['cite', '--answer', 'answer.txt', '--documents', name, '--json']) == 0
        claims = json.loads(capsys.readouterr().out)
        assert [claim['verdict'] for claim in claims] == ['supported', 'contradicted'], name
        assert all(claim.keys() == {'text', 'cited', 'verdict', 'reason', 'score'} for claim in claims)

def test_offsets_and_line_ends_are_those_of_the_file(inside, capsys):
    text = '第一行。\r\n第二行的軟件。\r\n'
    write(inside, 'windows.txt', text.encode())
    assert main(['lint', 'windows.txt', '--json']) == 0
    finding, = json.loads(capsys.readouterr().out)
    assert text[finding['start']:finding['end']] == finding['text'] == '軟件'
    assert main(['lint', 'windows.txt', 'note.txt', '--json']) == 0
    assert [finding['file'] for finding in json.loads(capsys.readouterr().out)] == ['windows.txt']
    assert main(['lint', 'windows.txt', '--fix']) == 0
    assert (inside / 'windows.txt').read_bytes() == text.replace('軟件', '軟體').encode()

def test_score_prints_one_object_and_writes_rows(inside, capsys):
    assert main(['score', 'gsm8k', 'outputs.jsonl', '--partial', '--json', '--out', 'made/for/it/rows.jsonl']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {'benchmark', 'rule', 'total', 'score', 'no_answer', 'details'} and result['score'] == 50
    rows = [json.loads(line) for line in (inside / 'made/for/it/rows.jsonl').read_text().splitlines()]
    assert rows == [{'id': '1', 'extracted': '7', 'correct': True}, {'id': '2', 'extracted': '8', 'correct': False}]

def test_ask_names_what_is_wrong_in_a_line(inside, capsys):
    wrong = {'temperature': 'hot', 'top_p': True, 'max_tokens': 0, 'stop': '。', 'seed': 'x', 'schema': 3, 'sample': -1}
    rows = [{'id': key, 'messages': TURNS, key: value} for key, value in wrong.items()]
    good = [{'id': '\ud800', 'messages': TURNS},
            {'id': 7, 'messages': TURNS, 'stop': ['。'], 'temperature': 0, 'seed': None}]
    Path('mixed.jsonl').write_text('\n'.join(json.dumps(row) for row in rows + good))
    assert main([*OFFLINE, '--in', 'mixed.jsonl', '--out', 'new/mixed.jsonl']) == 3
    replies = [json.loads(line) for line in Path('new/mixed.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [reply['error'] for reply in replies[-2:]] == [None, None] and replies[-1]['id'] == 7
    for number, (key, reply) in enumerate(zip(wrong, replies), 1):
        assert f'line {number}: {key} cannot be' in reply['error'], reply
    assert '2 answered, 7 failed' in capsys.readouterr().out

def test_ledger_commands(inside, capsys):
    assert main([*OFFLINE, '--ledger', 'own.sqlite']) == 0
    capsys.readouterr()
    assert main(['ledger', 'stats', 'own.sqlite']) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ['model', 'stage'] and row.split()[:3] == ['offline', 'ask', '1']
    assert main(['ledger', 'stats', 'own.sqlite', '--json']) == 0
    assert json.loads(capsys.readouterr().out)[0]['model'] == 'offline'
    assert main(['ledger', 'export', 'own.sqlite', '--out', 'deep/calls.jsonl.gz']) == 0
    entry = json.loads(gzip.open('deep/calls.jsonl.gz', 'rt', encoding='utf-8').read())
    assert entry['request']['messages'] == TURNS and entry['stage'] == 'ask'
    assert main(['ledger', 'export', 'own.sqlite', '--out', 'own.sqlite']) == 2 and main(['ledger', 'verify', 'own.sqlite']) == 0
    assert 'own.sqlite would be overwritten' in capsys.readouterr().err
    import sqlite3
    with sqlite3.connect('own.sqlite') as database: database.execute("update calls set text = 'forged'")
    assert main(['ledger', 'verify', 'own.sqlite']) == 3 and 'damaged entry' in capsys.readouterr().out

def test_interrupted_while_a_server_thinks(place):
    with socket.create_server(('127.0.0.1', 0)) as server: # takes calls, and never answers
        address = f'http://127.0.0.1:{server.getsockname()[1]}/v1'
        write(place, 'slow.ini', f'[model.slow]\nprovider = openai\nmodel = m\nbase_url = {address}\n')
        heard = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); ' # jobs in the background ignore it
        words = [sys.executable, '-c', heard + COMMAND[-1], *OFFLINE, '--model', 'slow', '--out', 'never.jsonl']
        process = subprocess.Popen(words, cwd=place, env={**os.environ, 'KYARA_SETTINGS': 'slow.ini'}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        server.settimeout(PATIENCE)
        with server.accept()[0]:
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and error.splitlines()[-1].startswith('kyara: interrupted'), error
    assert not (place / 'never.jsonl').exists()

# Recipes over real notebooks

def test_a_recipe_never_run_has_a_status(inside, capsys):
    assert main(['status', 'runs/index.yaml']) == 0
    assert capsys.readouterr().out.splitlines()[1].split(maxsplit=1) == ['index', 'runs next: not run yet']

def test_paths_may_be_those_of_the_root(inside):
    from kyara.run import load_recipe
    place_of = lambda stage, path: (stage.notebook.parent / path).resolve()
    stage = load_recipe('runs/index.yaml', ['index.sources=[prompts.jsonl]']).stages[0]
    assert [place_of(stage, path) for path in stage.given['sources']] == [Path('prompts.jsonl').resolve()]
    stages = {'synthesis': {'notebook': '11_synthesis', 'index': 'kb'}, 'sft': {'notebook': '15_sft', 'model': 'kb/'}}
    write(inside, 'runs/root.yaml', yaml.safe_dump({'stages': stages}, sort_keys=False))
    synthesis, sft = load_recipe('runs/root.yaml').stages
    assert place_of(synthesis, synthesis.given['index']) == place_of(sft, sft.given['model']) == Path('kb').resolve()

@pytest.mark.parametrize('articles', [['no article'], [{'paragraphs': [5]}], [{'paragraphs': 'none'}]])
def test_a_corpus_in_half_the_form_of_squad_is_refused(tmp_path, articles):
    from kyara.core import UserError
    from kyara.index import build_index
    write(tmp_path, 'squad.json', {'data': articles})
    with pytest.raises(UserError, match='squad.json: no document with a text; first problem: unknown_format'):
        build_index([f'{tmp_path}/squad.json'], tmp_path / 'index')
