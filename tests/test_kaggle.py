"The demo in a folder laid out as Kaggle's."
import importlib.machinery, importlib.util, json, os, sys, types
from pathlib import Path

import papermill
import pytest
from fake_gemini import KEY, Fake, serve_rest

from kyara.core import read_rows, sample_path
from kyara.offline import reply

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / 'nbs/90_kaggle_demo.ipynb'
SECRETS = f'''class BackendError(Exception): pass
class UserSecretsClient:
    def get_secret(self, name): return {KEY!r}
'''

class Teacher(Fake):
    "A Gemini that answers what the offline teacher would."
    def generate(self, model, request):
        self.calls.append(request)
        messages = [{'role': 'user', 'content': request['contents'][-1]['parts'][0]['text']}]
        parts = [{'text': reply(messages, 'careful', 0, 0)}]
        usage = {'promptTokenCount': 10, 'candidatesTokenCount': 5, 'totalTokenCount': 15}
        return 200, {'candidates': [{'content': {'role': 'model', 'parts': parts}, 'finishReason': 'STOP', 'index': 0}],
                     'usageMetadata': usage, 'modelVersion': f'{model}-001'}

def source_of(name):
    "Find the source of a function of the notebook, without what follows it."
    cells = [''.join(cell['source']) for cell in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']]
    return next(part for cell in cells for part in cell.split('\n\n') if part.startswith(f'def {name}('))

@pytest.fixture
def kaggle(tmp_path):
    "Lay a folder out: a model among the inputs, an empty working folder, Kaggle's secrets with a key."
    from kyara.sft import make_student
    texts = [json.loads(line)['text'] for line in sample_path('corpus').read_text(encoding='utf-8').splitlines()[:20]]
    for name in ('kaggle/input/kyara-2b-it', 'kaggle/working', 'libraries'): (tmp_path / name).mkdir(parents=True)
    make_student(texts, tmp_path / 'kaggle/input/kyara-2b-it/1', vocab_size=1500, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    (tmp_path / 'libraries/kaggle_secrets.py').write_text(SECRETS)
    return tmp_path / 'kaggle'

def said(notebook):
    "List what cells printed."
    return ''.join(output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', []))

def test_demo_takes_the_attached_model_and_the_key_among_the_secrets(kaggle, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(kaggle.parent / 'libraries'), str(ROOT)]))
    monkeypatch.delenv('GEMINI_API_KEY', raising=False)
    gemini = Teacher()
    with serve_rest(gemini) as url:
        done = papermill.execute_notebook(NOTEBOOK, kaggle / 'working/done.ipynb', cwd=kaggle / 'working', progress_bar=False,
            start_timeout=600, iopub_timeout=600, parameters={
            'kaggle': str(kaggle), 'gemini_url': url, 'gemini_requests': 0, 'max_chunks': 2, 'max_new_tokens': 8})
    text = said(done)
    assert '百萬參數' in text and '極小的學生模型' not in text, 'the attached model was not taken'
    assert '教師：gemini-3.8-flash' in text and gemini.calls and set(gemini.keys) == {KEY}
    assert '[contradicted]' in text and '[unknown_id]' in text
    made = kaggle / 'working/kyara_demo/synthesis'
    rows, gone = list(read_rows(made, 'dialogue')), list(read_rows(made, 'dropped'))
    assert rows and all(row['drop_reason'] for row in gone)
    files = [path for path in (kaggle / 'working').rglob('*') if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()], 'the key was written down'

@pytest.mark.parametrize('failure', ['ConnectionError', 'BackendError'])
def test_without_a_secret_there_is_no_key(failure, monkeypatch):
    "The secret is not attached, or the internet is off."
    source = source_of('take_key')
    names, secrets = {'os': os, 'importlib': importlib}, types.ModuleType('kaggle_secrets')
    exec(f'class BackendError(Exception): pass\nclass UserSecretsClient:\n    def get_secret(self, name): raise {failure}', vars(secrets))
    secrets.__spec__ = importlib.machinery.ModuleSpec('kaggle_secrets', None)
    monkeypatch.setitem(sys.modules, 'kaggle_secrets', secrets)
    monkeypatch.delenv('GEMINI_API_KEY', raising=False)
    exec(source, names)
    assert names['take_key']('GEMINI_API_KEY') is False

@pytest.mark.parametrize('there, works, hidden', [(True, False, True), (True, True, False), (False, False, False)], ids=['P100', 'T4', 'none'])
def test_a_gpu_that_computes_nothing_is_hidden(there, works, hidden, monkeypatch, capsys):
    "A P100 is there, but PyTorch has no kernels for it any more."
    asked = types.SimpleNamespace(run=lambda *_, **__: types.SimpleNamespace(returncode=0 if works else 1))
    names = {'os': os, 'sys': sys, 'subprocess': asked, 'Path': lambda _: types.SimpleNamespace(exists=lambda: there)}
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    exec(source_of('hide_useless_gpu'), names)
    names['hide_useless_gpu']()
    assert (os.environ['CUDA_VISIBLE_DEVICES'] == '') is hidden is bool(capsys.readouterr().out)

@pytest.mark.parametrize('name, bf16, dtype', [('P100', False, 'float32'), ('T4', False, 'float32'), ('L4', True, 'bfloat16')])
def test_half_precision_fits_the_gpu(name, bf16, dtype, monkeypatch):
    "A T4 emulates bf16 slowly and Gemma-2 overflows in fp16: only native bf16 counts."
    import torch
    from kyara.model import safe_dtype
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bf16 or including_emulation)
    assert safe_dtype() is getattr(torch, dtype)

FIELDS = {'id', 'id_no', 'title', 'code_file', 'language', 'kernel_type', 'is_private', 'enable_gpu', 'enable_tpu', 'enable_internet', 'machine_shape',
          'dataset_sources', 'competition_sources', 'kernel_sources', 'model_sources', 'docker_image', 'keywords'} # Of Kaggle's command line

def test_metadata_is_ready_to_be_pushed():
    metadata = json.loads((ROOT / 'kernel-metadata.json').read_text())
    assert metadata.keys() <= FIELDS
    assert (ROOT / metadata['code_file']) == NOTEBOOK and metadata['kernel_type'] == 'notebook' and metadata['language'] == 'python'
    assert metadata['id'].split('/')[1] == metadata['title'].lower().replace(' ', '-'), 'Kaggle makes the slug from the title'
    assert metadata['machine_shape'] != 'NvidiaTeslaP100', 'the default, and useless with the current image'
    assert [source.count('/') for source in metadata['dataset_sources']] == [1], 'owner/name: the wheel'
    assert [source.count('/') for source in metadata['model_sources']] == [4], 'owner/model/framework/variation/version'
