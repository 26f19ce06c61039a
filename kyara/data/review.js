// Draws what the kernel describes and sends keys and clicks back. All text goes into the page as text, never as markup.
const MARKS = { accept: '✓', chosen: '✓', reject: '✗', rejected: '⇄', edit: '✎', tie: '＝' }
const VERDICTS = { supported: '有依據', contradicted: '與文件矛盾', unsupported: '文件未提及', unknown_id: '沒有這份文件', uncited: '沒有出處' }
const STATES = { all: '全部', open: '未標', done: '已標' }
const ROLES = { user: '使用者', assistant: '模型', system: '系統' }

function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(settings)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value)
    else if (name in element && name !== 'list') element[name] = value
    else element.setAttribute(name, value)
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined))
  return element
}

function drawPieces(pieces, claims, open) {
  return make('div', { className: 'text' }, pieces.map(piece => {
    const classes = [], titles = []
    if (piece.verdict) { classes.push('verdict', piece.verdict); titles.push(`${VERDICTS[piece.verdict] || piece.verdict}：${piece.reason}`) }
    if (piece.lint) { classes.push('lint'); titles.push(`臺灣多寫「${piece.suggestion}」`) }
    if (piece.evidence) classes.push('evidence')
    if (piece.cites) classes.push('cites')
    if (!classes.length) return piece.text
    const settings = { className: classes.join(' '), textContent: piece.text, title: titles.join('；') }
    if (piece.cites) {
      const claim = claims[piece.claim]
      Object.assign(settings, { title: '看這份文件', onclick: () => open(piece.cites, claim ? claim.text : '') })
    }
    return make('span', settings)
  }))
}

function drawClaims(claims) {
  const failed = claims.filter(claim => claim.verdict !== 'supported')
  return failed.length ? make('ul', { className: 'claims' }, failed.map(claim => make('li', {},
    make('span', { className: `verdict ${claim.verdict}`, textContent: VERDICTS[claim.verdict] }), ` ${claim.text.slice(0, 40)}：${claim.reason}`))) : null
}

function drawHeader(view, send) {
  const tasks = [['', '所有任務'], ...Object.entries(view.tasks).map(([name, count]) => [name, `${name} (${count})`])]
  const choose = (name, options, chosen) => make('select', { 'aria-label': name,
    onchange: event => send({ do: 'filter', ...view.filter, [name]: event.target.value }) },
    options.map(([value, text]) => make('option', { value, textContent: text, selected: value === chosen })))
  return make('header', {}, make('b', { textContent: view.stage }),
    make('span', { className: 'place', textContent: `第 ${view.visible ? view.place + 1 : 0} 筆，共 ${view.visible.toLocaleString()} 筆` }),
    make('span', { className: 'labelled', textContent: `已標 ${view.labelled.toLocaleString()} / ${view.total.toLocaleString()}` }),
    choose('task', tasks, view.filter.task), choose('state', Object.entries(STATES), view.filter.state),
    make('span', { className: 'reviewer', textContent: `標記者 ${view.reviewer}` }))
}

function drawList(view, send) {
  return make('div', { className: 'list' }, view.page.map(line => make('div', { className: line.place === view.place ? 'on' : '',
    title: `${line.task}：${line.text}`, onclick: () => send({ do: 'show', place: line.place }) },
    make('span', { className: 'mark', textContent: MARKS[line.verdict] || '' }), `${line.number}. ${line.text}`)))
}

function drawAnswers(row, open) {
  const better = row.label && ['chosen', 'rejected'].includes(row.label.verdict) ? row.label.verdict : ''
  return make('div', { className: 'pair' }, row.answers.map(answer => make('div', { className: answer.is && answer.is === better ? 'better' : '' },
    make('div', { className: 'who', textContent: `回答 ${answer.name}${answer.is ? (answer.is === 'chosen' ? '（資料選的）' : '（資料不選的）') : ''}` }),
    drawPieces(answer.pieces, answer.claims, open), drawClaims(answer.claims))))
}

function drawEditor(row, state, save, cancel) {
  const text = make('textarea', { className: 'editor', value: state.draft ?? (row.label?.edited || row.answer), 'aria-label': '修改後的回答',
    oninput: () => { state.draft = text.value } }) // a document opened meanwhile redraws the panel
  const note = make('input', { className: 'note', value: row.label?.note || '', placeholder: '理由（可不填）' })
  const keep = () => save(text.value, note.value)
  const keys = event => {
    event.stopPropagation()
    if (event.key === 'Escape') cancel()
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) keep()
  }
  const box = make('div', { onkeydown: keys }, text, note, make('button', { className: 'save', textContent: '存檔 (Ctrl+Enter)', onclick: keep }),
    make('button', { textContent: '取消 (Esc)', onclick: cancel }))
  setTimeout(() => text.focus())
  return box
}

function drawRow(view, state, send, redraw) {
  const row = view.row
  if (!row) return make('div', { className: 'row', textContent: '沒有符合條件的資料。' })
  const open = (id, claim) => send({ do: 'document', row: row.id, id, claim })
  const links = [...row.documents, ...row.sources.filter(id => !row.documents.some(one => one.id === id)).map(id => ({ id, title: '' }))]
  const save = (edited, note) => { Object.assign(state, { editing: false, draft: null }); send({ do: 'label', row: row.id, verdict: 'edit', edited, note }) }
  const cancel = () => { Object.assign(state, { editing: false, draft: null }); redraw() }
  const edited = row.label?.edited && !state.editing
    ? make('div', { className: 'turn edited' }, make('div', { className: 'who', textContent: '修改後' }), make('div', { className: 'text', textContent: row.label.edited })) : null
  return make('div', { className: 'row' },
    row.turns.map(turn => make('div', { className: 'turn' }, make('div', { className: 'who', textContent: ROLES[turn.role] || turn.role }),
      drawPieces(turn.pieces, turn.claims, open), drawClaims(turn.claims))),
    row.answers.length ? drawAnswers(row, open) : null,
    state.editing ? drawEditor(row, state, save, cancel) : null, edited,
    links.length ? make('div', { className: 'facts' }, '文件：', links.map(one => make('button', { textContent: one.title || one.id, onclick: () => open(one.id, '') }))) : null,
    make('ul', { className: 'facts' }, row.facts.map(([name, value]) => make('li', { textContent: `${name}：${value}` }))),
    row.label ? make('div', { className: 'facts label', textContent: `標記：${MARKS[row.label.verdict]} ${row.label.verdict}　${row.label.note}` }) : null)
}

function drawSide(view, send) {
  if (!view.side) return null
  const close = make('button', { textContent: '關閉', onclick: () => send({ do: 'close' }) })
  if (view.side.kind === 'trace') return make('div', { className: 'side' }, close, make('pre', { textContent: view.side.lines.join('\n') }))
  return make('div', { className: 'side' }, close, make('b', { textContent: ` ${view.side.title} ` }), make('code', { textContent: view.side.id }),
    drawPieces(view.side.pieces, [], () => {}))
}

function commands(view) {
  const label = verdict => ({ do: 'label', row: view.row?.id, verdict })
  const pair = view.kind === 'preference'
  const own = pair ? [['1', 'A 較好', label('A')], ['2', 'B 較好', label('B')], ['0', '平手', label('tie')], ['r', '都不好', label('reject')]]
    : [['a', '接受', label('accept')], ['r', '退回', label('reject')]]
  const edit = pair && view.row?.hidden ? [] : [['e', '修改', { edit: true }]]
  return [...own, ...edit, ['ArrowLeft', '上一筆', { do: 'show', place: view.place - 1 }], ['ArrowRight', '下一筆', { do: 'show', place: view.place + 1 }],
    ['u', '下一筆未標', { do: 'next_open' }], ['t', '來源與花費', { do: 'trace', row: view.row?.id }], ['Backspace', '取消標記', { do: 'unlabel', row: view.row?.id }],
    ['Escape', '', { do: 'close' }]]
}

const SIGNS = { ArrowLeft: '←', ArrowRight: '→', Backspace: '⌫' }

function render({ model, el }) {
  const state = { editing: false, draft: null, row: null }
  const root = make('div', { className: 'kyara-review', tabIndex: 0, 'data-lm-suppress-shortcuts': 'true', 'aria-label': '審閱' })
  const act = message => { // names its row: the kernel ignores what was meant for another
    if (message.edit) { state.editing = Boolean(model.get('view').row); return redraw() }
    model.send(message)
  }
  function redraw() {
    const view = model.get('view'), focused = root.contains(document.activeElement)
    if (state.row !== view.row?.id) Object.assign(state, { row: view.row?.id, editing: false, draft: null })
    root.replaceChildren(drawHeader(view, act),
      make('div', { className: view.side ? 'body with-side' : 'body' }, drawList(view, act), drawRow(view, state, act, redraw), ...[drawSide(view, act)].filter(Boolean)),
      make('footer', {}, commands(view).filter(([, name]) => name).map(([key, name, message]) =>
        make('button', { textContent: `${SIGNS[key] || key} ${name}`, 'data-key': key, onclick: () => act(message) })),
        make('span', { className: 'problem', textContent: view.message })))
    if (focused && !state.editing) root.focus({ preventScroll: true })
  }
  root.addEventListener('keydown', event => {
    event.stopPropagation()
    if (event.ctrlKey || event.metaKey || event.altKey || ['TEXTAREA', 'INPUT', 'SELECT'].includes(event.target.tagName)) return
    const found = commands(model.get('view')).find(([key]) => key === event.key)
    if (!found) return
    event.preventDefault()
    act(found[2])
  })
  model.on('change:view', redraw)
  el.append(root)
  redraw()
  return () => model.off('change:view', redraw)
}

export default { render }
