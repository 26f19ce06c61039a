"JupyterLab as people use it: a real server on loopback, a real browser."
import json, os, re, shutil, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = next((path for name in ('chromium', 'chromium-browser') if (path := shutil.which(name))), None)
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='there is no chromium; apt-get install chromium')
PATIENCE = 600_000 # Milliseconds: a kernel on a busy machine may take its time
playwright.expect.set_options(timeout=PATIENCE)

def is_stage(path):
    "Tell whether people open this notebook to run it: it has parameters, or is an orchestrator's."
    return '"parameters"' in path.read_text(encoding='utf-8') or path.name.startswith('20_')

STAGES = [path.stem for path in sorted((ROOT / 'nbs').glob('*.ipynb')) if is_stage(path)]
WHOLE = STAGES if os.environ.get('KYARA_BROWSER') == 'all' else ['14_curation'] # All of them take minutes

def notebook(*sources):
    "Make a notebook of code cells."
    cells = [{'cell_type': 'code', 'id': f'c{number}', 'metadata': {}, 'source': source, 'execution_count': None, 'outputs': []}
             for number, source in enumerate(sources)]
    kernel = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    return json.dumps({'cells': cells, 'metadata': {'kernelspec': kernel}, 'nbformat': 4, 'nbformat_minor': 5})

@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    "Lay out a workspace: the notebooks, a run with rows to review, and a notebook that opens the panel."
    from test_review import make_run
    folder = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    shutil.copytree(ROOT / 'tests/data', folder / 'tests/data')
    shutil.copy(ROOT / 'settings.ini', folder)
    (folder / 'runs').mkdir()
    make_run(folder / 'runs/demo')
    for name, arguments in (('dialogues', "'synthesis'"), ('pairs', "'preference'")):
        source = f"from kyara.review import review\nreview('../runs/demo', {arguments}, reviewer='mei')"
        (folder / f'nbs/{name}.ipynb').write_text(notebook(source), encoding='utf-8')
    return folder

SETTINGS = {'docmanager-extension/plugin': {'autosave': False}, # Nothing is saved behind a test's back, and no news lie over a page
            'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False}}

@pytest.fixture(scope='module')
def lab(workspace, tmp_path_factory):
    "Serve JupyterLab on a port that the system chooses; no output is held back for coming too fast."
    home = tmp_path_factory.mktemp('home')
    for name, settings in SETTINGS.items():
        path = home / f'settings/@jupyterlab/{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    folders = {'JUPYTER_CONFIG_DIR': 'config', 'JUPYTER_DATA_DIR': 'data', 'JUPYTER_RUNTIME_DIR': 'runtime', 'IPYTHONDIR': 'ipython'}
    environment = {**os.environ, **{name: str(home / folder) for name, folder in folders.items()},
                   'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', 'KYARA_PROGRESS': '1'}
    words = ['lab', '--no-browser', '--allow-root', '--ip=127.0.0.1', '--port=0', '--ServerApp.port_retries=0',
             '--IdentityProvider.token=', f'--ServerApp.root_dir={workspace}', f'--LabApp.workspaces_dir={home}/workspaces',
             f'--LabApp.user_settings_dir={home}/settings', '--LabApp.news_url=', '--expose-app-in-browser',
             '--ZMQChannelsWebsocketConnection.limit_rate=False']
    with open(home / 'lab.log', 'wb') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyter', *words], env=environment, stdout=log, stderr=log, cwd=workspace)
        try: yield wait_for(server, home)
        finally: stop(server)

def wait_for(server, home):
    "Wait until the server answers; give its address."
    said = lambda: (home / 'lab.log').read_text(errors='replace')[-2000:]
    patient_until = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < patient_until:
        assert server.poll() is None, said()
        try:
            address = read_file(home / f'runtime/jpserver-{server.pid}.json')['url'].rstrip('/')
            urllib.request.urlopen(f'{address}/api/status', timeout=60).close()
            return address
        except (OSError, ValueError): time.sleep(0.3) # not there yet, or half written
    raise AssertionError('JupyterLab did not start: ' + said())

def stop(server):
    "End the server, and with it its kernels."
    server.terminate()
    try: server.wait(PATIENCE / 1000)
    except subprocess.TimeoutExpired: server.kill()

@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'], timeout=PATIENCE)
        yield opened
        opened.close()

@pytest.fixture
def page(browser, lab):
    "Open a window of JupyterLab without tabs; its kernels end with it."
    opened = browser.new_page(viewport={'width': 1400, 'height': 1000}, locale='zh-TW')
    opened.set_default_timeout(PATIENCE)
    new_window(opened, lab)
    yield opened
    opened.evaluate('async () => { await window.jupyterapp.serviceManager.sessions.shutdownAll() }')
    opened.close()

def new_window(page, lab):
    "Load the page anew, without tabs, and wait until every part of it is in place."
    page.goto(f'{lab}/lab/workspaces/{time.monotonic_ns()}')
    page.wait_for_function('window.jupyterapp')
    page.evaluate('async () => { await window.jupyterapp.restored }')

OPEN = """async path => {
    const opened = window.notebook = await window.jupyterapp.commands.execute('docmanager:open', { path })
    await Promise.all([opened.context.ready, opened.revealed, opened.sessionContext.ready])
    return opened.content.widgets.length
}"""

def open_notebook(page, name):
    "Open a notebook and wait for its kernel; give the number of its cells."
    cells = page.evaluate(OPEN, f'nbs/{name}.ipynb')
    wait_until_idle(page)
    return cells

def wait_until_idle(page):
    "Wait until the kernel has nothing to do."
    page.wait_for_function("window.notebook.sessionContext.session?.kernel?.status === 'idle'")

def run_all(page):
    "Run all cells as the menu does; come back when the last is done. Gives the code cells."
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    return [cell for cell in page.evaluate('window.notebook.content.model.toJSON()')['cells'] if cell['cell_type'] == 'code']

def read_file(path):
    return json.loads(path.read_text(encoding='utf-8'))

# A whole notebook

WATCH = """() => { window.bars = 0; window.notebook.sessionContext.iopubMessage.connect((_, message) => {
    window.bars += message.content.data?.state?._model_name === 'FloatProgressModel' }) }""" # A bar goes when its loop ends: seen or not
STICKS_OUT = """[...document.querySelectorAll('.jp-OutputArea-output')].filter(output => output.scrollWidth > output.clientWidth + 2)
    .map(output => output.innerText.slice(0, 200))"""

@pytest.mark.parametrize('name', WHOLE)
def test_run_all_finishes_and_shows_what_is_worth_seeing(page, name):
    open_notebook(page, name)
    page.evaluate(WATCH)
    cells = run_all(page)
    outputs = [output for cell in cells for output in cell['outputs']]
    assert [output['evalue'] for output in outputs if output['output_type'] == 'error'] == []
    assert [''.join(cell['source']) for cell in cells if cell['source'] and not cell['execution_count']] == []
    text = json.dumps(outputs, ensure_ascii=False)
    assert re.search('[\u4e00-\u9fff]', text) or 'image/png' in text or name == '20_run', 'nothing worth seeing'
    assert 'missing from' not in text, 'a glyph is missing: boxes'
    printed = [output for output in outputs if output['output_type'] == 'stream']
    assert '%|' not in str(printed), 'a progress bar drawn with characters'
    assert [output['text'] for output in printed if output['name'] == 'stderr'] == []
    if name == '14_curation': assert page.evaluate('window.bars'), 'no progress bar was shown'
    assert page.evaluate(STICKS_OUT) == []

def test_every_stage_notebook_opens(page, workspace):
    "In one window, one after the other: all cells are there and nothing complains."
    assert len(STAGES) >= 12, STAGES
    complaints = []
    page.on('pageerror', lambda error: complaints.append(str(error)))
    for name in STAGES:
        assert open_notebook(page, name) == len(read_file(workspace / f'nbs/{name}.ipynb')['cells']), name
    assert page.locator('.jp-Dialog').all_inner_texts() == []
    assert complaints == []

def test_a_table_wraps_long_chinese(page, workspace):
    "Nothing is cut, nothing sticks out, words stand on the left and numbers on the right."
    answer = '日月潭是臺灣面積最大的天然湖泊，位於南投縣魚池鄉。' * 20
    source = f"from kyara.page import Table\nTable([{{'題目': '日月潭在哪裡？', '回答': {answer!r}, '字數': 500}}])"
    (workspace / 'nbs/table.ipynb').write_text(notebook(source), encoding='utf-8')
    open_notebook(page, 'table')
    run_all(page)
    cell = page.locator('.jp-OutputArea-output td').nth(1)
    cell.wait_for()
    assert cell.inner_text() == answer
    shape = cell.evaluate("cell => [cell.getBoundingClientRect().height / parseFloat(getComputedStyle(cell).fontSize), getComputedStyle(cell).textAlign]")
    assert shape[0] > 8 and shape[1] == 'left', shape
    assert page.locator('.jp-OutputArea-output td').nth(2).evaluate('cell => getComputedStyle(cell).textAlign') == 'right'
    assert page.evaluate(STICKS_OUT) == []

def test_plot_shows_chinese_without_fonts_of_the_machine(page, workspace):
    "The plot in the browser is what matplotlib drew: characters with different shapes, none a box."
    source = ("from kyara.core import chinese_pyplot\nplt = chinese_pyplot()\nplt.figure(figsize=(3, 2))\n"
              "plt.barh(['臺北捷運', '玉山'], [3, 2]); plt.title('繁體中文圖表')\nplt.show()\n"
              "from kyara.core import progress\nbar = progress(total=3, label='文件')\nbar.update(1)")
    (workspace / 'nbs/plot.ipynb').write_text(notebook(source), encoding='utf-8')
    open_notebook(page, 'plot')
    assert 'missing from' not in str(run_all(page))
    image = page.locator('.jp-OutputArea-output img')
    assert image.evaluate('async image => { await image.decode(); return image.naturalWidth }') > 100
    page.locator('.jp-OutputArea-output', has_text='文件').locator('.widget-hprogress').wait_for() # a progress bar is a widget

# The panel

def open_panel(page, name):
    "Open a notebook that shows the panel, and run it."
    open_notebook(page, name)
    run_all(page)
    return page.locator('.kyara-review')

def labels(workspace):
    from kyara.labels import read_labels
    path = workspace / 'runs/demo/labels'
    return read_labels(path) if path.is_dir() else {}

def test_accept_edit_reload(page, lab, workspace):
    panel = open_panel(page, 'dialogues')
    cells = page.locator('.jp-Notebook .jp-Cell').count()
    assert panel.locator('.verdict.supported').first.inner_text().startswith('玉山主峰')
    assert panel.locator('.contradicted').count() >= 1
    panel.press('a')
    playwright.expect(panel.locator('.place')).to_contain_text('第 2 筆')
    assert panel.locator('.lint').all_inner_texts() == ['軟件', '質量']
    panel.press('e')
    panel.locator('.editor').fill('這個軟體的品質很好。<b>字</b>')
    panel.locator('.facts button').first.click()
    playwright.expect(panel.locator('.side')).to_contain_text('玉山')
    playwright.expect(panel.locator('.editor')).to_have_value('這個軟體的品質很好。<b>字</b>') # a document opened meanwhile takes nothing away
    panel.locator('.editor').press('Control+Enter')
    playwright.expect(panel.locator('.place')).to_contain_text('第 3 筆')
    panel.press('r')
    playwright.expect(panel.locator('.labelled')).to_contain_text('已標 3')
    assert page.locator('.jp-Notebook .jp-Cell').count() == cells, 'a key went to the notebook'
    assert [label.verdict for label in labels(workspace).values()] == ['accept', 'edit', 'reject']
    check_after_reload(page, lab)

def check_after_reload(page, lab):
    "After a reload, and with a new kernel, labels are still there."
    new_window(page, lab)
    open_notebook(page, 'dialogues')
    page.evaluate('async () => { await window.notebook.sessionContext.restartKernel() }')
    wait_until_idle(page)
    panel = open_panel(page, 'dialogues')
    playwright.expect(panel.locator('.labelled')).to_contain_text('已標 3')
    playwright.expect(panel.locator('.list .mark').nth(0)).to_have_text('✓')
    panel.locator('.list > div').nth(1).click()
    playwright.expect(panel.locator('.edited .text')).to_have_text('這個軟體的品質很好。<b>字</b>')
    assert panel.locator('b', has_text='字').count() == 0, 'a text became markup'

def test_citation_opens_its_document(page):
    panel = open_panel(page, 'dialogues')
    panel.locator('.cites').nth(1).click()
    marked = panel.locator('.side .evidence')
    playwright.expect(marked).to_have_text('雪山主峰海拔3,886公尺，是臺灣第二高的山。')
    panel.press('t')
    playwright.expect(panel.locator('.side pre')).to_contain_text('id_27025b13')

def test_blind_pair(page, workspace):
    panel = open_panel(page, 'pairs')
    assert '資料' not in panel.locator('.pair').inner_text()
    panel.press('1')
    playwright.expect(panel.locator('.pair .better')).to_contain_text('回答 A')
    given = [label for label in labels(workspace).values() if label.kind == 'preference']
    assert len(given) == 1 and given[0].verdict == ('chosen' if given[0].order == 'AB' else 'rejected')
