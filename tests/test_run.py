"What a run does when parameters change, input is bad, a stage fails, or a process is killed."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest
import yaml

from kyara.core import UserError, fingerprint
from kyara.recipe import write_stage
from kyara.run import load_recipe, main, run_recipe, run_status

ROOT = Path(__file__).parent.parent
WRITE = '''
import os, time
from kyara.core import UserError, dialogue, drop, finish_stage, read_rows, start_stage, write_rows
folder = start_stage(out_dir)
if least < 0: raise UserError('least is negative; use 0 or more')
rows = [dialogue([{'role': 'user', 'content': text}], 'knowledge_qa', stage='write') for text in texts]
kept = [row for row in rows if len(row['messages'][0]['content']) >= least]
assert least < 100, 'nothing can be so long'
write_rows(kept, folder / 'dialogue', 'dialogue')
while os.path.exists('slow'): time.sleep(0.05)
write_rows([drop(row, 'short') for row in rows if row not in kept], folder / 'dropped', 'dialogue', dropped=True)
params = dict(texts=texts, least=least, teacher=teacher, corpus=corpus)
finish_stage(out_dir, 'kyara.core', params, [], ['dialogue', 'dropped'], {'kept': len(kept), 'dropped': len(rows) - len(kept)})
'''
COUNT = '''
from kyara.core import finish_stage, read_rows, start_stage, write_text
folder = start_stage(out_dir)
total = sum(1 for _ in read_rows(source))
write_text(folder / 'scores.json', '{"%s": {"rows": {"score": %d, "low": 0, "high": 9, "n": 3}}}' % (name, total))
finish_stage(out_dir, 'kyara.core', {'source': source, 'name': name}, [source], ['scores.json'], {'kept': total})
'''
WRITE_PARAMETERS = """out_dir: str = '../runs/_notebook/write'
texts: list = ['玉山有多高？', '愛玉為什麼會結凍？', '誰？']
least: int = 3  # Characters
teacher: str = 'offline'
corpus: str = 'sample:corpus'
"""
COUNT_PARAMETERS = "out_dir: str = '../runs/_notebook/count'\nsource: str = ''\nname: str = 'model'\n"
RECIPE = {'stages': {'write': {'notebook': '01_write'}, 'count': {'notebook': '02_count', 'source': '{write}'}}}

def write_recipe(root, recipe):
    "Write runs/tea.yaml."
    path = root / 'runs/tea.yaml'
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), encoding='utf-8')
    return path

def make_workspace(root):
    "Make a workspace of two stages; give its recipe."
    for name in ('nbs', 'runs'): (root / name).mkdir(parents=True)
    write_stage(root / 'nbs/01_write.ipynb', WRITE_PARAMETERS, WRITE)
    write_stage(root / 'nbs/02_count.ipynb', COUNT_PARAMETERS, COUNT)
    return write_recipe(root, RECIPE)

@pytest.fixture
def recipe(tmp_path): return make_workspace(tmp_path / 'a')

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A workspace whose recipe was run once; not to be changed."
    recipe = make_workspace(tmp_path_factory.mktemp('finished') / 'a')
    assert main(['run', str(recipe)]) == 0
    return recipe

@pytest.fixture
def copy(finished, tmp_path):
    "A copy of the finished workspace."
    shutil.copytree(finished.parent.parent, tmp_path / 'a')
    return tmp_path / 'a/runs/tea.yaml'

# Tests that a shell runs in the background ignore Ctrl-C, and so would what they start
PROGRAM = 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from kyara.run import main; sys.exit(main())'

def start(*words):
    "Start the command line in a process of its own."
    return subprocess.Popen([sys.executable, '-c', PROGRAM, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def started_stages(capsys):
    "Name the stages that the last call ran."
    return [line.split()[1].rstrip(':') for line in capsys.readouterr().out.splitlines() if ': starts (' in line]

def hashes(recipe):
    "Hash what every stage of a run wrote."
    folder = recipe.with_suffix('')
    return {name: json.loads((folder / name / 'manifest.json').read_text())['outputs'] for name in ('write', 'count')}

PATIENCE = 600 # Seconds that a run may take on however slow a machine

def wait_for(condition):
    "Wait until a condition holds."
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.05)

def kernels(recipe):
    "List processes that were started for a run."
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get('KYARA_RUN') == str(recipe.with_suffix('')): found.append(process.pid)
        except (psutil.Error, OSError): pass
    return found

# What runs, and what does not

def test_a_finished_recipe_does_nothing(copy, capsys):
    before = hashes(copy)
    report = (copy.with_suffix('') / 'report.html').stat().st_mtime_ns
    assert main(['run', str(copy)]) == 0
    assert started_stages(capsys) == []
    assert hashes(copy) == before and (copy.with_suffix('') / 'report.html').stat().st_mtime_ns == report

def test_the_table_and_the_report_end_a_run(copy, capsys):
    main(['run', str(copy)])
    printed = capsys.readouterr().out
    assert 'benchmark' in printed and '2.0 (0.0 to 9.0)' in printed and 'report.html' in printed, printed

@pytest.mark.parametrize('change, expected', [
    ('write.least=1', ['write', 'count']), # another result: what depends on it runs too
    ('write.least=4', ['write']), # the same result as with 3: nothing to do for count
    ('count.name=other', ['count'])])
def test_a_changed_parameter_reruns_what_depends_on_it(copy, capsys, change, expected):
    assert main(['run', str(copy), '--set', change]) == 0
    assert started_stages(capsys) == expected

def test_changed_notebook_code_and_artifacts_are_noticed(copy, capsys):
    folder, nbs = copy.with_suffix(''), copy.parent.parent / 'nbs'
    state = lambda: [row['state'] for row in run_status(folder)]
    assert state() == ['done', 'done']
    write_stage(nbs / '02_count.ipynb', COUNT_PARAMETERS, COUNT + '\n1 + 1\n')
    assert state() == ['done', 'runs next: notebook changed']
    write_stage(nbs / '02_count.ipynb', '# Only a comment\n' + COUNT_PARAMETERS, COUNT)
    assert state() == ['done', 'done']
    manifest = json.loads((folder / 'write/manifest.json').read_text())
    (folder / 'write/manifest.json').write_text(json.dumps({**manifest, 'code': 'of yesterday'}))
    assert state() == ['runs next: code changed', 'waits for write']
    (folder / 'write/manifest.json').write_text(json.dumps(manifest))
    shutil.rmtree(folder / 'write/dropped')
    assert state() == ['runs next: dropped is missing', 'waits for write']
    (folder / 'count.ipynb').unlink()
    assert state()[1] == 'runs next: its notebook did not finish'

def test_a_store_spares_another_machine_the_work(copy, tmp_path, capsys):
    "What decides the artifacts decides what is taken: not the folder, but parameters, notebook and inputs."
    store = ['--set', f'engine.store={tmp_path / "store"}']
    assert main(['run', str(copy), *store]) == 0 and started_stages(capsys) == [] # What was finished is put there, too
    other = make_workspace(tmp_path / 'b')
    assert main(['run', str(other), *store]) == 0
    printed = capsys.readouterr().out
    assert printed.count('taken from the store') == 2 and 'starts' not in printed, printed
    assert hashes(other) == hashes(copy) and [row['state'] for row in run_status(other.with_suffix(''))] == ['done', 'done']
    assert main(['run', str(other), *store, '--set', 'count.name=other']) == 0 and started_stages(capsys) == ['count']
    assert main(['run', str(other), *store]) == 0
    assert 'count: taken from the store' in capsys.readouterr().out
    assert main(['run', str(other), *store, '--only', 'count']) == 0 and started_stages(capsys) == ['count'] # Asked for

def test_a_store_is_not_believed(copy, tmp_path, capsys):
    "A damaged file, a file outside of the stage, and a place that cannot be reached: one line each."
    store = ['--set', f'engine.store={tmp_path / "store"}']
    main(['run', str(copy), *store])
    fresh = lambda name: str(make_workspace(tmp_path / name))
    for listed in (tmp_path / 'store').glob('stages/*/files.json'): files = json.loads(listed.read_text())
    for shard in (tmp_path / 'store').glob('stages/*/stage/dialogue/*.parquet'): shard.write_bytes(b'PAR1')
    assert_told(capsys, main(['run', fresh('b'), *store]), 'part-00000.parquet in the store is damaged')
    for listed in (tmp_path / 'store').glob('stages/*/files.json'): listed.write_text(json.dumps({'../../../evil': 'x', **files}))
    assert_told(capsys, main(['run', fresh('c'), *store]), '../../../evil, which lies outside')
    assert not list(tmp_path.rglob('evil'))
    assert_told(capsys, main(['run', fresh('d'), '--set', 'engine.store=nowhere://x']), 'nowhere')
    assert_told(capsys, main(['run', fresh('e'), '--set', 'engine.store=[1]']), 'store cannot be')

def test_from_only_and_fresh(copy, capsys):
    for words, expected in ((['--from', 'write', '--fresh'], ['write', 'count']), (['--from', 'count'], ['count'])): # --only: as with a store
        assert main(['run', str(copy), *words]) == 0
        assert started_stages(capsys) == expected, words

def test_only_needs_what_comes_before(recipe, capsys):
    assert main(['run', str(recipe), '--only', 'count']) == 2
    assert 'needs write, which is not finished' in capsys.readouterr().err

def test_status_trace_and_report(copy, capsys):
    folder = copy.with_suffix('')
    assert main(['status', str(folder)]) == 0
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines()[1:]] == [['write', 'done', '2', '1'], ['count', 'done', '2', '0.00']]
    from kyara.core import read_rows
    row = next(read_rows(folder / 'write', 'dropped'))
    assert main(['trace', row['id'], '--run', str(folder)]) == 0
    assert 'dropped: short' in capsys.readouterr().out
    assert main(['report', str(folder)]) == 0

def test_script_tags_in_data_are_escaped(recipe):
    text = "<script>alert('玉山')</script><img src=x onerror=alert(1)>"
    assert main(['run', str(recipe), '--set', f'write.texts={json.dumps([text])}']) == 0
    page = (recipe.with_suffix('') / 'report.html').read_text(encoding='utf-8')
    assert '&lt;script&gt;' in page and '<script' not in page and '<img src=x' not in page

def test_unquoted_references_and_numbers_are_understood(recipe):
    recipe.write_text("stages:\n  write: {notebook: 01_write}\n  count: {notebook: 02_count, source: {write}}\n", encoding='utf-8')
    assert load_recipe(recipe).stages[1].params['source'] == '../runs/tea/write'
    assert load_recipe(recipe, ['count.source={write}/dialogue']).stages[1].params['source'] == '../runs/tea/write/dialogue'

# Bad input

def changed(**changes):
    "Give the recipe with other keys for stage write; None removes a key."
    stage = {**RECIPE['stages']['write'], **changes}
    return {'stages': {**RECIPE['stages'], 'write': {key: value for key, value in stage.items() if value is not None}}}

BAD_RECIPES = {
    'a list for a description': ({**RECIPE, 'description': ['tea']}, 'description must be a text'),
    'unknown key': ({**RECIPE, 'stagse': {}}, 'unknown key stagse', "did you mean 'stages'"),
    'no stages': ({'name': 'tea'}, 'lists no stages'),
    'a list': ([1, 2], 'must hold a mapping'),
    'bad name': ({**RECIPE, 'name': '../out'}, "'../out' cannot name"),
    'no notebook': (changed(notebook=None), 'must name its notebook'),
    'unknown notebook': (changed(notebook='01_wriet'), 'no notebook 01_wriet', "did you mean '01_write'"),
    'unknown parameter': (changed(leest=3), 'no parameter leest', "did you mean 'least'"),
    'out_dir': (changed(out_dir='x'), 'out_dir is chosen by the runner'),
    'wrong type': (changed(least='many'), "least must be of type int, not 'many'"),
    'a truth value for a number': (changed(least=True), 'least must be of type int, not True'),
    'a text for a list': (changed(texts='玉山'), 'texts must be of type list'),
    'a later stage': (changed(corpus='{count}'), '{count} is no earlier stage'),
    'a stray brace': (changed(corpus='{count'), 'braces that name no stage'),
    'no model': (changed(teacher=''), 'teacher is empty; name a model'),
    'unknown model': (changed(teacher='ofline'), "no model named 'ofline'"),
    'missing corpus': (changed(corpus='data/none.jsonl'), 'data/none.jsonl does not exist'),
    'missing sample': (changed(corpus='sample:corpsu'), "no sample named 'corpsu'"),
    'user error in a stage': (changed(least=-1), 'stage write: least is negative; use 0 or more'),
}

def assert_told(capsys, code, *parts):
    "Check exit code 2 and one line on stderr."
    error = capsys.readouterr().err
    assert code == 2 and error.startswith('kyara: ') and error.count('\n') == 1, error
    for part in parts: assert part in error, error

@pytest.mark.parametrize('name', BAD_RECIPES)
def test_bad_recipe(recipe, capsys, name):
    content, *parts = BAD_RECIPES[name]
    write_recipe(recipe.parent.parent, content)
    assert_told(capsys, main(['run', str(recipe)]), *parts)

@pytest.mark.parametrize('words, part', [
    (['run', 'runs/none.yaml'], 'cannot be read'), (['run', '{recipe}', '--set', 'write=3'], 'not of the form'),
    (['run', '{recipe}', '--set', 'engine=[1'], 'not YAML'), (['run', '{recipe}', '--set', 'engine=rya'], "cannot be 'rya'"),
    (['run', '{recipe}', '--set', 'wriet.least=3'], "did you mean 'write'"), (['run', '{recipe}', '--from', 'wriet'], "did you mean 'write'"),
    (['status', 'runs/none'], 'is no run'), (['report', 'runs/none'], 'is no run'), (['trace', 'abc', '--run', 'runs/none'], 'is no run'),
    (['trace', 'abc', '--run', '{run}'], 'has the id abc'), (['ledger', 'stats', 'none.sqlite'], 'is no file'),
    (['lint', 'none.txt'], 'is no file')])
def test_bad_words(finished, capsys, words, part):
    names = {'recipe': finished, 'run': finished.with_suffix('')}
    assert_told(capsys, main([word.format(**names) for word in words]), part)

def test_yaml_that_is_none(recipe, capsys):
    for text, part in (('stages: [', 'is not YAML'), ('stages: {}\nstages: {}\n', 'stages is there twice'), ('name: 2026-13-45', 'is not YAML'),
                       ('name: !!timestamp never', 'is not YAML'), ('[' * 5000, 'is not YAML')):
        recipe.write_text(text, encoding='utf-8')
        assert_told(capsys, main(['run', str(recipe)]), part)

@pytest.mark.parametrize('text', ['{"cells": 3, "nbformat": 4}', '{"cells": [3], "nbformat": 4}', '{"cells": []}', '[]'])
def test_notebook_that_is_none(recipe, capsys, text):
    (recipe.parent.parent / 'nbs/01_write.ipynb').write_text(text, encoding='utf-8')
    assert_told(capsys, main(['run', str(recipe)]), '01_write.ipynb is no notebook')

@pytest.mark.parametrize('record', [{}, {'recipe': '../tea.yaml', 'nbs': '../../nbs', 'sets': 3}])
def test_record_that_is_torn(copy, capsys, record):
    "A run of a recipe that lies beside it is found by its name."
    (copy.with_suffix('') / 'run.json').write_text(json.dumps(record), encoding='utf-8')
    assert main(['status', str(copy.with_suffix(''))]) == 0
    assert 'write' in capsys.readouterr().out

@pytest.mark.parametrize('parameters, tags, part', [
    (WRITE_PARAMETERS, [], '0 cells tagged parameters'), ('least: int = max(1, 2)', ['parameters'], 'name: type = literal')])
def test_bad_parameters_cell(recipe, capsys, parameters, tags, part):
    write_stage(recipe.parent.parent / 'nbs/01_write.ipynb', parameters, WRITE, tags)
    assert_told(capsys, main(['run', str(recipe)]), part)

def test_paths_in_a_stages_error_are_as_the_user_knows_them(recipe, capsys, monkeypatch):
    "The notebook runs in another folder."
    write_stage(recipe.parent.parent / 'nbs/02_count.ipynb', COUNT_PARAMETERS, "from kyara.core import UserError\nraise UserError(f'{source} has no rows')")
    code = main(['run', str(recipe)])
    assert_told(capsys, code, f"stage count: {recipe.with_suffix('')}/write has no rows")
    monkeypatch.chdir(recipe.parent)
    assert_told(capsys, main(['run', str(recipe)]), 'stage count: tea/write has no rows')

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='there is no /dev/full')
def test_a_full_disk_is_one_line_whoever_writes(recipe, capsys):
    "The stage itself, papermill beside it, and a call from Python instead of the shell."
    notebook = recipe.parent.parent / 'nbs/01_write.ipynb'
    write_stage(notebook, WRITE_PARAMETERS, "with open('/dev/full', 'w') as file: file.write('x')")
    assert_told(capsys, main(['run', str(recipe)]), 'stage write: [Errno 28] No space left')
    executed = recipe.with_suffix('') / 'write.ipynb'
    executed.unlink()
    executed.symlink_to('/dev/full')
    with pytest.raises(UserError, match='stopped: No space left on device'): run_recipe(recipe)

def test_a_run_folder_that_is_none_is_one_line(recipe, capsys):
    recipe.with_suffix('').write_text('')
    assert_told(capsys, main(['run', str(recipe)]), 'tea stopped: File exists')

def test_missing_key_is_told_before_anything_runs(recipe, capsys, monkeypatch):
    settings = recipe.parent.parent / 'settings.ini'
    settings.write_text('[model.paid]\nprovider = openai\nmodel = m\napi_key_env = KYARA_TEST_KEY\n')
    monkeypatch.setenv('KYARA_SETTINGS', str(settings))
    write_recipe(recipe.parent.parent, changed(teacher='paid'))
    assert load_recipe(recipe).stages[0].models == ('paid',)
    assert_told(capsys, main(['run', str(recipe)]), 'set the environment variable KYARA_TEST_KEY')
    assert not (recipe.with_suffix('') / 'write').exists()

def test_manifest_of_another_version(copy, capsys):
    path = copy.with_suffix('') / 'write/manifest.json'
    path.write_text(path.read_text().replace('"version": "', '"version": "0.0.'))
    assert_told(capsys, main(['run', str(copy)]), '--fresh')
    assert main(['run', str(copy), '--fresh']) == 0

def test_failing_stage_names_cell_and_notebook(recipe, capsys):
    assert main(['run', str(recipe), '--set', 'write.least=100']) == 1
    error = capsys.readouterr().err
    assert 'stage write failed in cell' in error and 'nothing can be so long' in error and 'tea/write.ipynb' in error, error
    assert not (recipe.with_suffix('') / 'count').exists()
    assert main(['run', str(recipe)]) == 0

# Processes

def running(recipe):
    "Start a run whose first stage waits, and give it when it does."
    (recipe.parent.parent / 'nbs/slow').touch()
    process = start('run', recipe)
    wait_for(lambda: (recipe.with_suffix('') / 'write/dialogue/part-00000.parquet').exists() or process.poll() is not None)
    assert process.poll() is None, process.stderr.read()
    return process

def test_kill_and_rerun_give_the_same_artifacts(recipe, finished, capsys):
    process = running(recipe)
    process.kill()
    process.wait()
    wait_for(lambda: not kernels(recipe)) # the kernel sees that its parent is gone
    assert not (recipe.with_suffix('') / 'write/manifest.json').exists()
    (recipe.parent.parent / 'nbs/slow').unlink()
    assert main(['run', str(recipe)]) == 0
    assert hashes(recipe) == hashes(finished)

def test_a_kernel_of_a_killed_runner_is_ended_before_the_next_run(recipe, finished):
    process = running(recipe)
    os.kill(kernels(recipe)[0], signal.SIGSTOP) # it cannot notice anything now
    process.kill()
    process.wait()
    (recipe.parent.parent / 'nbs/slow').unlink()
    assert main(['run', str(recipe)]) == 0
    assert hashes(recipe) == hashes(finished)
    wait_for(lambda: not kernels(recipe))

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted(recipe, number):
    process = running(recipe)
    process.send_signal(number)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and error.splitlines()[-1].startswith('kyara: interrupted'), error
    wait_for(lambda: not kernels(recipe)) # killed, and gone in a moment

def test_one_process_at_a_time(recipe, capsys):
    process = running(recipe)
    code = main(['run', str(recipe)])
    (recipe.parent.parent / 'nbs/slow').unlink()
    assert_told(capsys, code, f'being run by process {process.pid}')
    assert process.wait(PATIENCE) == 0

def test_output_is_plain_where_nobody_watches(recipe):
    process = start('run', recipe)
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and error == '' and '\r' not in out, (out, error)

def test_fingerprint_of_a_stage_is_that_of_its_outputs(copy):
    folder = copy.with_suffix('')
    assert fingerprint(folder / 'write') == json.loads((folder / 'count/manifest.json').read_text())['inputs']['0:write']

# Commands on files

def test_ask_gives_a_line_for_every_line(tmp_path, capsys):
    turns = [{'role': 'user', 'content': '小明有3顆蘋果，又買了4顆，現在有幾顆？'}]
    lines = [json.dumps({'id': 'a', 'messages': turns}), '{broken', json.dumps({'id': 'c', 'messages': []}),
             json.dumps({'id': 'd', 'messages': turns, 'temprature': 1}), json.dumps({'id': 'e', 'messages': turns, 'sample': 1})]
    (tmp_path / 'prompts.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    words = ['ask', '--model', 'offline', '--in', f'{tmp_path}/prompts.jsonl', '--out', f'{tmp_path}/replies.jsonl',
             '--ledger', f'{tmp_path}/ledger.sqlite']
    assert main(words) == 3
    replies = [json.loads(line) for line in (tmp_path / 'replies.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [reply['id'] for reply in replies] == ['a', None, 'c', 'd', 'e']
    assert [reply['error'] for reply in replies] == [None, 'line 2 is not a JSON object', 'line 3 has no messages with role and content',
                                                     'line 4 has the unknown key temprature', None]
    assert replies[0].keys() == {'id', 'reply', 'finish_reason', 'model_version', 'usage', 'cost', 'error'}
    (tmp_path / 'prompts.jsonl').write_text(lines[0] + '\n', encoding='utf-8')
    assert main(words) == 0
    for action in ('stats', 'export', 'verify'): assert main(['ledger', action, f'{tmp_path}/ledger.sqlite']) == 0
    assert capsys.readouterr().out.splitlines()[-1] == 'whole'
    assert sum(1 for _ in open(tmp_path / 'ledger.jsonl', encoding='utf-8')) == 2

def test_cite_prints_claims(tmp_path, capsys):
    (tmp_path / 'answer.txt').write_text('玉山主峰海拔3,952公尺【id_27025b13】。合歡山位於花蓮縣【id_99】。', encoding='utf-8')
    rows = {'id_27025b13': '玉山主峰海拔3,952公尺，是臺灣最高的山。'}
    (tmp_path / 'map.json').write_text(json.dumps(rows), encoding='utf-8')
    lines = [json.dumps({'id': name, 'title': '玉山', 'text': text}) + '\n' for name, text in rows.items()]
    (tmp_path / 'rows.jsonl').write_text(''.join(lines), encoding='utf-8')
    for name in ('map.json', 'rows.jsonl'):
        assert main(['cite', '--answer', f'{tmp_path}/answer.txt', '--documents', f'{tmp_path}/{name}', '--json']) == 0
        claims = json.loads(capsys.readouterr().out)
        assert [claim['verdict'] for claim in claims] == ['supported', 'unknown_id'], claims
        assert claims[0].keys() == {'text', 'cited', 'verdict', 'reason', 'score'}

def test_lint_and_fix(tmp_path, capsys):
    path = tmp_path / 'article.txt'
    path.write_text('這個軟件很好用。\n', encoding='utf-8')
    assert main(['lint', str(path), '--json']) == 0
    finding, = json.loads(capsys.readouterr().out)
    assert finding['text'] == '軟件' and finding.keys() == {'start', 'end', 'text', 'kind', 'suggestion', 'confidence'}
    assert main(['lint', str(path), '--fix']) == 0
    assert path.read_text(encoding='utf-8') == '這個軟體很好用。\n'

def test_search(tmp_path, capsys):
    from kyara.index import KnowledgeBase
    document = {'doc_id': 'd1', 'title': '玉山', 'text': '玉山主峰海拔3,952公尺。', 'source': 'test', 'license': 'CC0-1.0', 'lang': 'zh-TW'}
    KnowledgeBase.build([document], tmp_path / 'kb')
    assert main(['search', '玉山有多高', '--kb', str(tmp_path / 'kb'), '--json']) == 0
    hit, = json.loads(capsys.readouterr().out)
    assert hit['title'] == '玉山' and hit['doc_id'] == 'd1'
    assert_told(capsys, main(['search', ' ', '--kb', str(tmp_path / 'kb')]), 'argument question: it is empty')
    assert_told(capsys, main(['search', '玉山', '--kb', str(tmp_path / 'none')]), 'none')


# Several runs of one recipe

def test_a_sweep_makes_one_run_for_each_value_and_a_table_of_all(copy, capsys):
    "The recipe's own run stays as it is."
    before = hashes(copy)
    assert main(['run', str(copy), '--set', 'write.least=3,7', '--set', 'count.name=甲']) == 0
    told, runs = capsys.readouterr().out, ['tea--least-3', 'tea--least-7']
    assert sorted(path.name for path in copy.parent.iterdir() if (path / 'run.json').exists()) == ['tea', *runs]
    scores = [json.loads((copy.parent / name / 'count/scores.json').read_text())['甲']['rows']['score'] for name in runs]
    assert scores == [2, 1] and hashes(copy) == before
    assert all(name in told for name in runs) and told.count('report.html') == 2, told
    assert main(['status', str(copy.parent / runs[1]), '--json']) == 0
    assert [row['stage'] for row in json.loads(capsys.readouterr().out)] == ['write', 'count']

def test_a_sweep_with_one_bad_value_runs_nothing(copy, capsys):
    folders = sorted(copy.parent.iterdir())
    assert main(['run', str(copy), '--set', 'write.least=3,viele']) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and sorted(copy.parent.iterdir()) == folders
