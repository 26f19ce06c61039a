"Pages are executed as written: every command runs, in order; what needs a key is at least understood."
import configparser, json, os, re, shlex, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

from kyara.core import parse_model
from kyara.recipe import declared_parameters, read_recipe
from kyara.run import build_parser, main

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob('docs/*.md'))
READMES = [path for path in (ROOT / 'README.md', ROOT / 'README.zh-TW.md') if path.is_file()]
PATIENCE = 3600 # Seconds: only what hangs takes as long
BLOCK = re.compile(r'(<!-- needs a key -->\n)?```(\w*)\n(.*?)```', re.S)
stem = lambda path: path.name

def blocks(path, language):
    "List the blocks of a page in a language: their text, and whether they need a key."
    return [(match[3], bool(match[1])) for match in BLOCK.finditer(path.read_text(encoding='utf-8')) if match[2] == language]

@pytest.fixture
def workspace(tmp_path):
    "Lay a checkout out: notebooks, settings, an empty folder of runs, the command `kyara`."
    shutil.copytree(ROOT / 'nbs', tmp_path / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    shutil.copytree(ROOT / 'kyara', tmp_path / 'kyara', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('settings.ini', 'pyproject.toml', 'README.md', 'kernel-metadata.json'): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'bin').mkdir()
    command = tmp_path / 'bin/kyara'
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; from kyara.run import main; sys.exit(main())" "$@"\n')
    command.chmod(0o755)
    return tmp_path

def run_page(workspace, path):
    "Run the blocks of a page as one shell script that stops at the first failure."
    script = 'set -e\n' + '\n'.join(text for text, needs_key in blocks(path, 'sh') if not needs_key)
    places = [str(workspace / 'bin'), str(Path(sys.executable).parent), os.environ['PATH']]
    environment = {**os.environ, 'PATH': os.pathsep.join(places), 'PYTHONPATH': str(ROOT), 'KYARA_PROGRESS': '0',
                   'PIP_NO_BUILD_ISOLATION': '0'} # Means that there is none: nothing is fetched
    environment.pop('KYARA_SETTINGS', None)
    return subprocess.run(['bash', '-c', script], cwd=workspace, env=environment, capture_output=True, text=True, timeout=PATIENCE)

@pytest.mark.parametrize('path', [path for path in PAGES if blocks(path, 'sh')], ids=stem)
def test_commands_run_as_written(workspace, path):
    done = run_page(workspace, path)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    CHECKS[path.name](workspace, done.stdout)

def check_corpus(workspace, said):
    "What the page promises is there, and its Python runs."
    assert '濁水溪全長約186公里' in said and (workspace / 'runs/mine/report.html').is_file()
    from kyara.core import read_rows
    assert 'rag_answer' in [row['task'] for row in read_rows(workspace / 'runs/mine/synthesis')]
    assert any(read_rows(workspace / 'runs/other'))
    review, labels = (text for text, _ in blocks(ROOT / 'docs/your_corpus.md', 'python'))
    label = ("desk = review('../runs/mine', 'synthesis', reviewer='mei').desk\n"
             "from kyara.review import act\nact(desk, {'do': 'label', 'row': desk.row()['id'], 'verdict': 'reject'})\n")
    code = review + label + labels + "assert rows[0]['drop_reason'] == 'reviewer_reject'"
    subprocess.run([sys.executable, '-c', code], cwd=workspace / 'nbs', env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=True, timeout=PATIENCE)

def check_language(workspace, said):
    assert '"suggestion": "軟體"' in said and 'supported' in said

def check_models(workspace, said):
    assert '答案：5' in (workspace / 'replies.jsonl').read_text(encoding='utf-8')
    for text, _ in blocks(ROOT / 'docs/bring_a_model.md', 'ini'):
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(text)
        for name in parser.sections(): parse_model(name, dict(parser[name]))

def check_kaggle(workspace, said):
    "The wheel holds what the demo needs, and its data set is the one that the notebook is given."
    wheel, = (workspace / 'dist').glob('kyara-*.whl')
    assert {'kyara/review.py', 'kyara/data/review.js', 'kyara/data/corpus.jsonl'} <= set(zipfile.ZipFile(wheel).namelist())
    name = json.loads((workspace / 'dist/dataset-metadata.json').read_text())['id']
    assert json.loads((workspace / 'kernel-metadata.json').read_text())['dataset_sources'] == [name]

CHECKS = {'on_kaggle.md': check_kaggle, 'your_corpus.md': check_corpus, 'your_language.md': check_language, 'bring_a_model.md': check_models}

@pytest.mark.parametrize('path', PAGES + READMES, ids=stem)
def test_every_command_is_understood(path):
    "Commands that are not run are at least words that the command line knows."
    lines = [line for _, _, text in BLOCK.findall(path.read_text(encoding='utf-8')) for line in text.splitlines() if line.startswith('kyara ')]
    for line in lines: understand(line)

def understand(line):
    "Read a line as the command line does; of the demo's recipe, look its parameters up."
    words = shlex.split(line, comments=True)[1:]
    if words == ['--help']: return
    arguments = build_parser().parse_args(words)
    if getattr(arguments, 'recipe', '') != 'runs/demo.yaml': return
    stages = read_recipe(ROOT / arguments.recipe, [])['stages']
    for change in arguments.set:
        stage, _, parameter = change.split('=')[0].partition('.')
        if stage != 'engine': assert parameter in declared_parameters(ROOT / f'nbs/{stages[stage]["notebook"]}.ipynb'), line

def test_examples_of_the_help_are_understood(capsys):
    for name in re.findall(r'^    (\w+)', build_parser().format_help(), re.M):
        with pytest.raises(SystemExit): build_parser().parse_args([name, '--help'])
        example = capsys.readouterr().out.splitlines()[-1].strip()
        if example.startswith('kyara '): understand(example)

@pytest.mark.parametrize('path', PAGES + READMES, ids=stem)
def test_links_lead_somewhere(path):
    targets = re.findall(r'\]\(([^)#:]+)\)', path.read_text(encoding='utf-8'))
    assert [target for target in targets if not (path.parent / target).exists()] == []

def test_readme_names_every_notebook_once():
    linked = re.findall(r'^\| \[\w+\]\(nbs/(\w+)\.ipynb\)', (ROOT / 'README.md').read_text(encoding='utf-8'), re.M)
    others = {'20_review', '20_run', '90_kaggle_demo'}
    assert sorted([*linked, *others]) == sorted(path.stem for path in (ROOT / 'nbs').glob('*.ipynb'))

@pytest.mark.parametrize('path', [ROOT / 'docs/your_language.md'], ids=stem)
def test_notebooks_that_a_page_names_exist(path):
    named = set(re.findall(r'`(\d\d_\w+)`', path.read_text(encoding='utf-8')))
    assert [name for name in named if not (ROOT / f'nbs/{name}.ipynb').is_file()] == []

@pytest.mark.skipif(len(READMES) < 2, reason='there is no README.zh-TW.md')
def test_both_readmes_say_the_same():
    "Commands and the figures of tables are the same in both languages."
    english, chinese = (path.read_text(encoding='utf-8') for path in READMES)
    commands = lambda text: [line.split('#')[0].strip() for _, _, block in BLOCK.findall(text) for line in block.splitlines() if line.startswith(('kyara ', 'make '))]
    assert [line.split('  ')[0] for line in commands(english)] == [line.split('  ')[0] for line in commands(chinese)]
    figures = lambda text: re.findall(r'\d+\.\d \(\d+\.\d to \d+\.\d\)', text.replace(' 至 ', ' to '))
    assert figures(english) == figures(chinese)

def test_the_estimate_is_what_a_dry_run_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(['run', 'runs/kyara.yaml', '--dry-run', '--assume', 'index=1200000']) == 0
    total = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith('all '))
    page = (ROOT / 'README.md').read_text(encoding='utf-8')
    row = next(line for line in page.splitlines() if line.startswith('| all'))
    assert (total[1], total[-1].split('.')[0]) == re.search(r'([\d,]+) \|.*\| ([\d,]+) \| \|$', row).groups()
