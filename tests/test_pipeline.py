"The main job end to end, on text nobody here wrote."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kyara.core import read_manifest, read_rows
from kyara.index import KnowledgeBase

ROOT = Path(__file__).parent.parent
DRCD = ROOT.parent / 'shared/data/drcd/DRCD_dev.json.gz'
STAGES = ['index', 'math', 'synthesis', 'base', 'sft_base', 'curation', 'sft_refine', 'preference', 'dpo', 'evaluation']

def kyara(*arguments, **environment):
    command = Path(sys.executable).with_name('kyara')
    return subprocess.run([command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=3600,
                          env={**os.environ, **environment})

@pytest.fixture(scope='module')
def run_dir():
    "Run runs/drcd.yaml from nothing."
    if not DRCD.exists(): pytest.skip(f'{DRCD.name} is not on this machine')
    done = kyara('run', 'runs/drcd.yaml', '--fresh')
    assert done.returncode == 0, done.stderr + done.stdout
    return ROOT / 'runs/drcd'

def test_every_stage_finished_and_left_a_notebook(run_dir):
    for stage in STAGES:
        assert read_manifest(run_dir / stage), stage
        assert (run_dir / f'{stage}.ipynb').exists(), stage

def test_a_second_run_does_nothing(run_dir):
    before = {stage: (run_dir / stage / 'manifest.json').stat().st_mtime_ns for stage in STAGES}
    done = kyara('run', 'runs/drcd.yaml')
    assert done.returncode == 0, done.stderr
    assert {stage: (run_dir / stage / 'manifest.json').stat().st_mtime_ns for stage in STAGES} == before
    assert done.stdout.count('done already') == len(STAGES), done.stdout

def test_paragraphs_are_searchable(run_dir):
    chunk = next(read_rows(run_dir / 'index', 'chunk'))
    with KnowledgeBase.open(run_dir / 'index') as kb:
        hits = kb.search([chunk['text'][:40]], k=3)[0]
    assert chunk['id'] in [hit.id for hit in hits]

def test_every_task_of_the_synthesis_occurs(run_dir):
    tasks = {row['task'] for row in read_rows(run_dir / 'synthesis')}
    assert tasks == {'knowledge_qa', 'rag_answer', 'rag_refusal', 'system_prompt', 'back_translation'}, tasks

def test_no_held_out_problem_was_trained_on(run_dir):
    held_out = {row['messages'][0]['content'] for row in read_rows(run_dir / 'math', 'held_out')}
    trained = {row['messages'][0]['content'] for stage in ('base', 'curation') for row in read_rows(run_dir / stage)}
    assert held_out and not held_out & trained

def test_a_row_is_traced_to_its_paragraph(run_dir):
    row = next(row for row in read_rows(run_dir / 'curation') if row['task'] == 'rag_answer')
    done = kyara('trace', row['id'], '--run', 'runs/drcd')
    assert done.returncode == 0, done.stderr
    assert row['meta']['source_ids'][0] in done.stdout and 'CC-BY-SA-3.0' in done.stdout, done.stdout

def test_four_models_stand_side_by_side(run_dir):
    scores = json.loads((run_dir / 'evaluation/scores.json').read_text(encoding='utf-8'))
    assert list(scores) == ['untrained', 'SFT', 'refined', 'DPO']
    for model, benchmarks in scores.items():
        for name, figures in benchmarks.items():
            assert figures['low'] <= figures['score'] <= figures['high'], (model, name, figures)

def test_the_report_is_one_page_without_a_network(run_dir):
    page = (run_dir / 'report.html').read_text(encoding='utf-8')
    assert 'src="data:image/png' in page and 'src="http' not in page and '<link' not in page

def test_a_replay_gives_the_same_bytes(run_dir):
    "From nothing but the ledger: no stage may ask a model anything it has not asked before."
    outputs = lambda: {stage: read_manifest(run_dir / stage)['outputs'] for stage in STAGES}
    before = outputs()
    done = kyara('run', 'runs/drcd.yaml', '--fresh', KYARA_REPLAY='1')
    assert done.returncode == 0, done.stderr + done.stdout
    assert outputs() == before
    assert sum(read_manifest(run_dir / stage).get('cost', 0) for stage in STAGES) == 0
