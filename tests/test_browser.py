"JupyterLab as people use it: a real server on loopback, a real browser."
import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = next((path for name in ('chromium', 'chromium-browser') if (path := shutil.which(name))), None)
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='there is no chromium; apt-get install chromium')
PATIENCE = 180_000 # Milliseconds: a kernel on a busy machine may take its time

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

def free_port():
    "Find a port that nobody listens on."
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]

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

@pytest.fixture(scope='module')
def lab(workspace, tmp_path_factory):
    "Serve JupyterLab."
    port, home = free_port(), tmp_path_factory.mktemp('home')
    environment = {**os.environ, 'JUPYTER_CONFIG_DIR': str(home / 'config'), 'JUPYTER_DATA_DIR': str(home / 'data'),
                   'JUPYTER_RUNTIME_DIR': str(home / 'runtime'), 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
    words = ['lab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
             '--IdentityProvider.token=', f'--ServerApp.root_dir={workspace}', f'--LabApp.workspaces_dir={home}/workspaces',
             f'--LabApp.user_settings_dir={home}/settings', '--LabApp.news_url=', '--expose-app-in-browser']
    log = open(home / 'lab.log', 'wb')
    server = subprocess.Popen([sys.executable, '-m', 'jupyter', *words], env=environment, stdout=log, stderr=log, cwd=workspace)
    try:
        wait_for(f'http://127.0.0.1:{port}/api/status', server, home / 'lab.log')
        yield f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        server.wait(60)
        log.close()

def wait_for(address, server, log):
    "Wait until the server answers."
    for _ in range(600):
        assert server.poll() is None, log.read_text(errors='replace')[-2000:]
        try: return urllib.request.urlopen(address, timeout=5)
        except OSError: time.sleep(0.3)
    raise AssertionError('JupyterLab did not start: ' + log.read_text(errors='replace')[-2000:])

@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield opened
        opened.close()

@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={'width': 1400, 'height': 1000}, locale='zh-TW')
    opened.set_default_timeout(PATIENCE)
    yield opened
    opened.close()

def open_notebook(page, lab, name):
    "Open a notebook and wait for its kernel."
    page.goto(f'{lab}/lab/workspaces/{time.monotonic_ns()}/tree/nbs/{name}.ipynb') # an empty one: no tabs of earlier tests
    wait_until_idle(page)

def wait_until_idle(page):
    "Wait until the notebook is there and its kernel has nothing to do."
    page.wait_for_selector('.jp-Notebook .jp-Cell', state='attached')
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")

def run_all(page):
    "Run all cells as the menu does, and wait until the last is done."
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")

def read_file(path):
    return json.loads(path.read_text(encoding='utf-8'))

# A whole notebook

WATCH = """() => { window.bars = 0; new MutationObserver(() => { window.bars += document.querySelectorAll('.widget-hprogress').length })
    .observe(document.body, { subtree: true, childList: true }) }"""
STICKS_OUT = """[...document.querySelectorAll('.jp-OutputArea-output')].filter(output => output.scrollWidth > output.clientWidth + 2)
    .map(output => output.innerText.slice(0, 200))"""

@pytest.mark.parametrize('name', WHOLE)
def test_run_all_finishes_and_shows_what_is_worth_seeing(page, lab, workspace, name):
    open_notebook(page, lab, name)
    page.evaluate(WATCH)
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    wait_until_idle(page)
    page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save') }")
    cells = [cell for cell in read_file(workspace / f'nbs/{name}.ipynb')['cells'] if cell['cell_type'] == 'code']
    outputs = [output for cell in cells for output in cell['outputs']]
    assert [output['evalue'] for output in outputs if output['output_type'] == 'error'] == []
    assert [''.join(cell['source']) for cell in cells if cell['source'] and not cell['execution_count']] == []
    text = json.dumps(outputs, ensure_ascii=False)
    assert re.search('[\u4e00-\u9fff]', text) or 'image/png' in text or name == '20_run', 'nothing worth seeing'
    assert 'missing from' not in text, 'a glyph is missing: boxes'
    printed = ''.join(''.join(output['text']) for output in outputs if output['output_type'] == 'stream')
    assert '%|' not in printed, 'a progress bar drawn with characters'
    if name == '14_curation': assert page.evaluate('window.bars'), 'no progress bar was shown'
    assert page.evaluate(STICKS_OUT) == []
    assert page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0

OPEN = """async path => {
    const opened = await window.jupyterapp.commands.execute('docmanager:open', { path })
    await Promise.all([opened.context.ready, opened.revealed, opened.sessionContext.ready])
    const cells = opened.content.widgets.length
    await opened.sessionContext.shutdown()
    opened.context.model.dirty = false // A kernel writes its name down: no question whether to save
    opened.close()
    return cells
}"""

def test_every_stage_notebook_opens(page, lab, workspace):
    "In one window, one after the other: all cells are there and nothing complains."
    assert len(STAGES) >= 12, STAGES
    page.goto(f'{lab}/lab/workspaces/{time.monotonic_ns()}')
    page.wait_for_function("window.jupyterapp?.commands.hasCommand('docmanager:open')")
    complaints = []
    page.on('pageerror', lambda error: complaints.append(str(error)))
    cancelled = re.compile('Canceled future for [a-z_]+ message before replies were done') # What a kernel that is shut down leaves open
    for name in STAGES:
        shown = page.evaluate(OPEN, f'nbs/{name}.ipynb')
        assert shown == len(read_file(workspace / f'nbs/{name}.ipynb')['cells']), name
    assert page.locator('.jp-Dialog').all_inner_texts() == []
    assert [complaint for complaint in complaints if not cancelled.search(complaint)] == []

def test_a_table_wraps_long_chinese(page, lab, workspace):
    "Nothing is cut, nothing sticks out, words stand on the left and numbers on the right."
    answer = '日月潭是臺灣面積最大的天然湖泊，位於南投縣魚池鄉。' * 20
    source = f"from kyara.page import Table\nTable([{{'題目': '日月潭在哪裡？', '回答': {answer!r}, '字數': 500}}])"
    (workspace / 'nbs/table.ipynb').write_text(notebook(source), encoding='utf-8')
    open_notebook(page, lab, 'table')
    run_all(page)
    cell = page.locator('.jp-OutputArea-output td').nth(1)
    cell.wait_for()
    assert cell.inner_text() == answer
    shape = cell.evaluate("cell => [cell.getBoundingClientRect().height / parseFloat(getComputedStyle(cell).fontSize), getComputedStyle(cell).textAlign]")
    assert shape[0] > 8 and shape[1] == 'left', shape
    assert page.locator('.jp-OutputArea-output td').nth(2).evaluate('cell => getComputedStyle(cell).textAlign') == 'right'
    assert page.evaluate(STICKS_OUT) == []

def test_plot_shows_chinese_without_fonts_of_the_machine(page, lab, workspace):
    "The plot in the browser is what matplotlib drew: characters with different shapes, none a box."
    source = ("from kyara.core import chinese_pyplot\nplt = chinese_pyplot()\nplt.figure(figsize=(3, 2))\n"
              "plt.barh(['臺北捷運', '玉山'], [3, 2]); plt.title('繁體中文圖表')\nplt.show()\n"
              "from kyara.core import progress\nbar = progress(total=3, label='文件')\nbar.update(1)")
    (workspace / 'nbs/plot.ipynb').write_text(notebook(source), encoding='utf-8')
    open_notebook(page, lab, 'plot')
    run_all(page)
    image = page.locator('.jp-OutputArea-output img')
    image.wait_for()
    assert image.evaluate('image => image.complete && image.naturalWidth') > 100
    assert page.locator('text=missing from').count() == 0
    page.locator('.jp-OutputArea-output', has_text='文件').locator('.widget-hprogress').wait_for() # a progress bar is a widget

# The panel

def open_panel(page, lab, name):
    "Open a notebook that shows the panel, run it and give the keyboard to the panel."
    open_notebook(page, lab, name)
    run_all(page)
    panel = page.locator('.kyara-review')
    panel.wait_for()
    panel.focus()
    return panel

def labels(workspace):
    from kyara.labels import read_labels
    path = workspace / 'runs/demo/labels'
    return read_labels(path) if path.is_dir() else {}

def test_accept_edit_reload(page, lab, workspace):
    panel = open_panel(page, lab, 'dialogues')
    cells = page.locator('.jp-Notebook .jp-Cell').count()
    assert panel.locator('.verdict.supported').first.inner_text().startswith('玉山主峰')
    assert panel.locator('.contradicted').count() >= 1
    page.keyboard.press('a')
    playwright.expect(panel.locator('.place')).to_contain_text('第 2 筆', timeout=PATIENCE)
    assert panel.locator('.lint').all_inner_texts() == ['軟件', '質量']
    page.keyboard.press('e')
    panel.locator('.editor').fill('這個軟體的品質很好。<b>字</b>')
    panel.locator('.facts button').first.click()
    playwright.expect(panel.locator('.side')).to_contain_text('玉山', timeout=PATIENCE)
    playwright.expect(panel.locator('.editor')).to_have_value('這個軟體的品質很好。<b>字</b>') # a document opened meanwhile takes nothing away
    panel.locator('.editor').focus()
    page.keyboard.press('Control+Enter')
    playwright.expect(panel.locator('.place')).to_contain_text('第 3 筆', timeout=PATIENCE)
    page.keyboard.press('r')
    playwright.expect(panel.locator('.labelled')).to_contain_text('已標 3', timeout=PATIENCE)
    assert page.locator('.jp-Notebook .jp-Cell').count() == cells, 'a key went to the notebook'
    assert [label.verdict for label in labels(workspace).values()] == ['accept', 'edit', 'reject']
    check_after_reload(page, lab)

def check_after_reload(page, lab):
    "After a reload, and with a new kernel, labels are still there."
    page.reload()
    wait_until_idle(page)
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.restartKernel() }")
    run_all(page)
    panel = page.locator('.kyara-review')
    playwright.expect(panel.locator('.labelled')).to_contain_text('已標 3', timeout=PATIENCE)
    playwright.expect(panel.locator('.list .mark').nth(0)).to_have_text('✓')
    panel.locator('.list > div').nth(1).click()
    playwright.expect(panel.locator('.edited .text')).to_have_text('這個軟體的品質很好。<b>字</b>', timeout=PATIENCE)
    assert panel.locator('b', has_text='字').count() == 0, 'a text became markup'

def test_citation_opens_its_document(page, lab):
    panel = open_panel(page, lab, 'dialogues')
    panel.locator('.list > div').nth(0).click()
    panel.locator('.cites').nth(1).click()
    marked = panel.locator('.side .evidence')
    playwright.expect(marked).to_have_text('雪山主峰海拔3,886公尺，是臺灣第二高的山。', timeout=PATIENCE)
    panel.focus()
    page.keyboard.press('t')
    playwright.expect(panel.locator('.side pre')).to_contain_text('id_27025b13', timeout=PATIENCE)

def test_blind_pair(page, lab, workspace):
    panel = open_panel(page, lab, 'pairs')
    assert '資料' not in panel.locator('.pair').inner_text()
    page.keyboard.press('1')
    playwright.expect(panel.locator('.pair .better')).to_contain_text('回答 A', timeout=PATIENCE)
    given = [label for label in labels(workspace).values() if label.kind == 'preference']
    assert len(given) == 1 and given[0].verdict == ('chosen' if given[0].order == 'AB' else 'rejected')
